r"""Sampling by denoising: DDPM, DDIM and the probability flow, as pure functions of a denoiser.

A *denoiser* is any callable ``denoiser(x, alpha_bar) -> noise``: it predicts the noise in
``x = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise``, in the shape of ``x [*batch, *event]``, for a scalar
``alpha_bar`` below 1. A prompt (a class, say) is closed over. Another parameterisation is translated by
`tiltjax.ops.schedule.to_noise`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tiltjax.ops.masked import as_float
from tiltjax.ops.schedule import expand, to_clean
from tiltjax.types import Array, Float, Int, Numeric, PRNGKey

__all__ = [
    "Denoiser",
    "LogWeight",
    "ddim",
    "ddpm",
    "ddpm_path",
    "levels",
    "probability_flow",
    "reverse_kernel",
    "twisted_mean",
]

Denoiser = Callable[[Array, Array], Array]
"""``(x [*batch, *event], alpha_bar) -> noise``, shape of ``x``."""

LogWeight = Callable[[Array, Array], Array]
"""``(x [*batch, *event], alpha_bar) -> [*batch]``: log of a positive function of a noisy x, nats (or reward units)."""

_AlphaBar = Numeric | Float[Array, "..."]


def levels(
    alpha_bar: Float[Array, " levels"],
) -> tuple[Int[Array, " steps"], Float[Array, " steps"], Float[Array, " steps"]]:
    """The steps of a schedule as a `jax.lax.scan` takes them, from the noisiest to the clean end.

    Args:
      alpha_bar: The schedule, ``[K + 1]``, falling from 1.

    Returns:
      ``(k, alpha_bar[k], alpha_bar[k - 1])`` for k = K ... 1: number of the level, and the values before and after.

    Raises:
      ValueError: If the schedule, not traced, ends at 0.
    """
    alpha_bar = _schedule(alpha_bar)
    return jnp.arange(len(alpha_bar) - 1, 0, -1), alpha_bar[:0:-1], alpha_bar[-2::-1]


def reverse_kernel(
    x: Float[Array, "*shape"],
    noise: Float[Array, "*shape"],
    alpha_bar_from: _AlphaBar,
    alpha_bar_to: _AlphaBar,
    *,
    eta: Numeric = 1.0,
) -> tuple[Float[Array, "*shape"], Float[Array, "..."]]:
    r"""Mean and standard deviation of one step of the reverse chain.

    .. math:: \sigma = \eta \sqrt{\frac{1 - \bar\alpha'}{1 - \bar\alpha}
                       \left(1 - \frac{\bar\alpha}{\bar\alpha'}\right)}, \qquad
              \mu = \sqrt{\bar\alpha'}\, \hat x_0 + \sqrt{1 - \bar\alpha' - \sigma^2}\, \epsilon

    ``eta = 1`` is DDPM with the smaller of its two variances, ``eta = 0`` the deterministic DDIM. The step to
    ``alpha_bar_to = 1`` returns the clean prediction with deviation 0. Levels may be any distance apart.

    Args:
      x: At the noisier level, ``[*batch, *event]``.
      noise: The denoiser's prediction there, shape of ``x``.
      alpha_bar_from: Of the noisier level, in (0, 1); a scalar or ``[*batch]``.
      alpha_bar_to: Of the cleaner one, at least as large; likewise.
      eta: Share of the noise that is drawn anew, in [0, 1].

    Returns:
      The mean, shape of ``x``, and the deviation: a scalar, or ``[*batch, 1, ...]`` of the rank of ``x``.

    Example:
      >>> mean, std = reverse_kernel(jnp.ones(2), jnp.zeros(2), 0.25, 0.64)
      >>> round(float(mean[0]), 4), round(float(std), 4)
      (1.6, 0.5408)

    References:
      Ho, Jain, Abbeel, 2020, arXiv:2006.11239, Eqs. 6-7; Song, Meng, Ermon, 2021, arXiv:2010.02502, Eqs. 12, 16.
    """
    x, noise = as_float(x), as_float(noise)
    before, after = expand(alpha_bar_from, x), expand(alpha_bar_to, x)
    std = eta * jnp.sqrt((1 - after) / (1 - before) * (1 - before / after))
    rest = jnp.sqrt(jnp.maximum(1 - after - jnp.square(std), 0))
    return jnp.sqrt(after) * to_clean(x, noise, alpha_bar_from) + rest * noise, std


def twisted_mean(
    mean: Float[Array, "*shape"], std: Float[Array, "..."], twist: LogWeight, alpha_bar: _AlphaBar
) -> Float[Array, "*shape"]:
    """The mean of the kernel tilted by ``exp(twist)``, to first order: ``mean + std^2 grad twist(mean)``.

    Args:
      mean: Of the kernel, ``[*batch, *event]``.
      std: Its deviation, as `reverse_kernel` returns it.
      twist: ``(x, alpha_bar) -> [*batch]``, nats: ``w log p(c | x)`` is classifier guidance.
      alpha_bar: Of the level that the kernel leads to.

    Returns:
      The new mean, shape of ``mean``.

    References:
      Dhariwal, Nichol, 2021, arXiv:2105.05233, Algorithm 1.
    """
    slope = jax.grad(lambda x: jnp.sum(twist(x, jnp.asarray(alpha_bar))))(mean)
    # A weight may be undefined at the last level, where nothing is drawn any more.
    return mean + jnp.where(std > 0, jnp.square(std) * jnp.where(std > 0, slope, 0), 0)


def ddim(
    key: PRNGKey,
    denoiser: Denoiser,
    x: Float[Array, "*shape"],
    alpha_bar: Float[Array, " levels"],
    *,
    eta: Numeric = 0.0,
    twist: LogWeight | None = None,
) -> Float[Array, "*shape"]:
    """Denoises step by step: deterministic at ``eta = 0``, DDPM at ``eta = 1``.

    Args:
      key: Consumed; without effect at ``eta = 0``. The noise of the step from level k is under ``fold_in(key, k)``.
      denoiser: ``(x, alpha_bar) -> noise``.
      x: Where to start, at the last level: ``jax.random.normal(key, [*batch, *event])``.
      alpha_bar: The schedule, ``[K + 1]``, falling from 1 to above 0; a slice of it takes fewer steps.
      eta: Share of the noise that is drawn anew, in [0, 1].
      twist: ``(x, alpha_bar) -> [*batch]``, nats: log of what the law of every step is tilted by; see `twisted_mean`.

    Returns:
      ``x_0``, shape of ``x``.

    Example:
      >>> from tiltjax.ops.schedule import cosine_schedule
      >>> still = lambda x, alpha_bar: jnp.sqrt(1 - alpha_bar) * x  # Of data that are standard normal.
      >>> x = jax.random.normal(jax.random.key(0), (3, 2))
      >>> bool(jnp.allclose(ddim(jax.random.key(1), still, x, cosine_schedule(200)), x, atol=0.03))
      True

    References:
      Song, Meng, Ermon, 2021, arXiv:2010.02502.
    """

    def step(x: Array, level: tuple) -> tuple[Array, None]:
        return _denoise(key, denoiser, x, level, eta, twist), None

    return jax.lax.scan(step, as_float(x), levels(alpha_bar))[0]


def ddpm(
    key: PRNGKey,
    denoiser: Denoiser,
    x: Float[Array, "*shape"],
    alpha_bar: Float[Array, " levels"],
    *,
    twist: LogWeight | None = None,
) -> Float[Array, "*shape"]:
    """Denoises with fresh noise at every step: `ddim` at ``eta = 1``, same arguments.

    References:
      Ho, Jain, Abbeel, 2020, arXiv:2006.11239, Algorithm 2.
    """
    return ddim(key, denoiser, x, alpha_bar, eta=1.0, twist=twist)


def ddpm_path(
    key: PRNGKey,
    denoiser: Denoiser,
    x: Float[Array, "*shape"],
    alpha_bar: Float[Array, " levels"],
    *,
    eta: Numeric = 1.0,
    twist: LogWeight | None = None,
) -> Float[Array, " levels *shape"]:
    """Every level that `ddim` passes through: entry k is at ``alpha_bar[k]``, so entry 0 is ``x_0`` and the last ``x``.

    What a policy gradient needs: the log-probability of a step is that of entry k under `reverse_kernel` at entry
    k + 1. The step to level 0 has deviation 0, and no density.

    Args:
      key: Consumed.
      denoiser: ``(x, alpha_bar) -> noise``.
      x: Where to start.
      alpha_bar: The schedule.
      eta: Share of the noise that is drawn anew.
      twist: As for `ddim`.

    Returns:
      The path, ``[K + 1, *batch, *event]``.
    """

    def step(x: Array, level: tuple) -> tuple[Array, Array]:
        x = _denoise(key, denoiser, x, level, eta, twist)
        return x, x

    x = as_float(x)
    path = jax.lax.scan(step, x, levels(alpha_bar))[1]
    return jnp.concatenate([path[::-1], x[None]])


def probability_flow(
    denoiser: Denoiser, x: Float[Array, "*shape"], alpha_bar: Float[Array, " levels"]
) -> Float[Array, "*shape"]:
    r"""Solves the ordinary differential equation that has the marginals of the chain, by Heun's method.

    .. math:: \frac{dy}{d\sigma} = \epsilon(x, \bar\alpha), \qquad
              y = \frac{x}{\sqrt{\bar\alpha}}, \quad \sigma^2 = \frac{1 - \bar\alpha}{\bar\alpha}

    Euler's method would be `ddim` at ``eta = 0``; the last step is one of Euler, so that the denoiser is never asked
    about a clean ``x``. Two evaluations per step, of second order.

    Args:
      denoiser: ``(x, alpha_bar) -> noise``.
      x: Where to start, at the last level, ``[*batch, *event]``.
      alpha_bar: The schedule, ``[K + 1]``, falling from 1.

    Returns:
      ``x_0``, shape of ``x``.

    References:
      Song et al., 2021, arXiv:2011.13456, Eq. 13; Karras et al., 2022, arXiv:2206.00364, Algorithm 1.
    """
    alpha_bar = _schedule(alpha_bar)
    sigma = jnp.sqrt((1 - alpha_bar) / alpha_bar)

    def slope(y: Array, k: Array) -> Array:
        return denoiser(jnp.sqrt(alpha_bar[k]) * y, alpha_bar[k])

    def step(y: Array, k: Array) -> tuple[Array, None]:
        first = slope(y, k)
        width = sigma[k - 1] - sigma[k]
        second = slope(y + width * first, k - 1)
        return y + width * (first + second) / 2, None

    last = len(alpha_bar) - 1
    y = as_float(x) / jnp.sqrt(alpha_bar[last])
    y, _ = jax.lax.scan(step, y, jnp.arange(last, 1, -1))
    return y - sigma[1] * slope(y, jnp.int32(1))


def _schedule(alpha_bar: Float[Array, " levels"]) -> Float[Array, " levels"]:
    """The schedule as floats, whose last level must say something of ``x_0``: the noise alone does not."""
    alpha_bar = as_float(jnp.asarray(alpha_bar))
    silent = alpha_bar <= 0  # Of a constant inside `jax.jit` this is traced already.
    if isinstance(silent, jax.core.Tracer) or not silent.is_fully_addressable or not silent.any():
        return alpha_bar
    raise ValueError(
        "noise predictions cannot start at alpha_bar = 0, where x is noise alone: leave out that level, alpha_bar[:-1]"
    )


def _denoise(key: PRNGKey, denoiser: Denoiser, x: Array, level: tuple, eta: Numeric, twist: LogWeight | None) -> Array:
    k, before, after = level
    mean, std = reverse_kernel(x, denoiser(x, before), before, after, eta=eta)
    if twist is not None:
        mean = twisted_mean(mean, std, twist, after)
    return mean + std * jax.random.normal(jax.random.fold_in(key, k), x.shape, x.dtype)
