r"""Noise schedules of the variance-preserving chain, and the four ways to say what a denoiser predicts.

A clean ``x_0`` becomes ``x = sqrt(a) x_0 + sqrt(1 - a) noise``, where ``a``, called ``alpha_bar``, falls from 1 (clean)
to nearly 0. A schedule is the array of its values, ``[K + 1]`` with ``alpha_bar[0] = 1``; fewer steps of the same
schedule are a slice of it. An ``alpha_bar`` beside an ``x [*batch, *event]`` is a scalar or has the shape ``[*batch]``.
"""

import chex
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_choice, check_positive
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Float, Numeric

__all__ = [
    "PREDICTIONS",
    "add_noise",
    "cosine_schedule",
    "expand",
    "from_noise",
    "linear_schedule",
    "log_snr",
    "to_clean",
    "to_noise",
    "to_score",
    "to_velocity",
]

PREDICTIONS = ("clean", "noise", "score", "velocity")
"""What a denoiser may predict; "noise" is what the samplers read, and "clean" is also known as x0, "velocity" as v."""

_AlphaBar = Numeric | Float[Array, "..."]


def cosine_schedule(num_steps: int, *, offset: Numeric = 0.008, max_rate: Numeric = 0.999) -> Float[Array, " levels"]:
    r"""The schedule that falls like a squared cosine.

    .. math:: \bar\alpha_k = \prod_{j \le k} \max\left(\frac{f(j/K)}{f((j-1)/K)}, 1 - \text{max\_rate}\right), \qquad
              f(t) = \cos^2\left(\frac{t + s}{1 + s} \frac\pi2\right)

    Args:
      num_steps: K, at least 1.
      offset: ``s``: the larger, the more noise the first step adds.
      max_rate: The most that one step may forget, below 1, so that the last ``alpha_bar`` is not 0.

    Returns:
      ``alpha_bar [K + 1]``, falling from exactly 1.

    Raises:
      ValueError: If ``num_steps`` is below 1.

    Example:
      >>> [round(float(a), 4) for a in cosine_schedule(4)]
      [1.0, 0.847, 0.4938, 0.1443, 0.0001]

    References:
      Nichol, Dhariwal, 2021, arXiv:2102.09672, Eq. 17.
    """
    check_at_least("num_steps", num_steps, 1)
    time = jnp.linspace(0.0, 1.0, num_steps + 1)
    curve = jnp.square(jnp.cos((time + offset) / (1 + offset) * jnp.pi / 2))
    keep = jnp.maximum(curve[1:] / curve[:-1], 1 - max_rate)
    return jnp.concatenate([jnp.ones(1, keep.dtype), jnp.cumprod(keep)])


def linear_schedule(num_steps: int, *, first: Numeric = 0.1, last: Numeric = 20.0) -> Float[Array, " levels"]:
    r"""The schedule whose rate grows linearly.

    .. math:: \log \bar\alpha(t) = -\int_0^t \lambda_0 + (\lambda_1 - \lambda_0) u \, du, \qquad t = k / K

    With 1000 steps it is that of Ho et al., 2020 (rates 1e-4 to 0.02 a step); with any other number it reaches the
    same ``alpha_bar``. ``first == last`` is the Ornstein-Uhlenbeck process at equal times.

    Args:
      num_steps: K, at least 1.
      first: Rate at the clean end, > 0.
      last: Rate at the noisy end, > 0.

    Returns:
      ``alpha_bar [K + 1]``, falling from exactly 1.

    Raises:
      ValueError: If ``num_steps`` is below 1 or a rate is not positive and finite.

    Example:
      >>> [round(float(a), 5) for a in linear_schedule(4)]
      [1.0, 0.52368, 0.07906, 0.00344, 4e-05]

    References:
      Ho, Jain, Abbeel, 2020, arXiv:2006.11239; Song et al., 2021, arXiv:2011.13456, Eq. 32.
    """
    check_at_least("num_steps", num_steps, 1)
    check_positive("first", first)
    check_positive("last", last)
    time = jnp.linspace(0.0, 1.0, num_steps + 1)
    return jnp.exp(-(first * time + (last - first) * jnp.square(time) / 2))


def expand(alpha_bar: _AlphaBar, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """``alpha_bar`` as it broadcasts against ``x``: trailing dimensions of 1, unless it is a scalar.

    Args:
      alpha_bar: A scalar, or ``[*batch]``.
      x: ``[*batch, *event]``.

    Returns:
      A scalar, or ``[*batch, 1, ...]`` of the rank of ``x``; float32 or wider.
    """
    alpha_bar = as_float(jnp.asarray(alpha_bar))
    if alpha_bar.ndim == 0:
        return alpha_bar
    chex.assert_equal_shape_prefix([alpha_bar, x], alpha_bar.ndim)
    return alpha_bar.reshape(alpha_bar.shape + (1,) * (jnp.ndim(x) - alpha_bar.ndim))


def log_snr(alpha_bar: _AlphaBar) -> Float[Array, "..."]:
    """Log of the signal-to-noise ratio, ``log alpha_bar / (1 - alpha_bar)``, nats; infinite at 1."""
    alpha_bar = as_float(jnp.asarray(alpha_bar))
    return jnp.log(alpha_bar) - jnp.log1p(-alpha_bar)


def add_noise(
    clean: Float[Array, "*shape"], noise: Float[Array, "*shape"], alpha_bar: _AlphaBar
) -> Float[Array, "*shape"]:
    """The noisy ``x = sqrt(alpha_bar) clean + sqrt(1 - alpha_bar) noise``."""
    a = expand(alpha_bar, clean)
    return jnp.sqrt(a) * clean + jnp.sqrt(1 - a) * noise


def to_noise(
    x: Float[Array, "*shape"], prediction: Float[Array, "*shape"], alpha_bar: _AlphaBar, *, kind: str
) -> Float[Array, "*shape"]:
    r"""The noise prediction that another kind of prediction stands for.

    .. math:: \epsilon = \frac{x - \sqrt{\bar\alpha}\, \hat x_0}{\sqrt{1 - \bar\alpha}}
              = -\sqrt{1 - \bar\alpha}\; s = \sqrt{\bar\alpha}\, v + \sqrt{1 - \bar\alpha}\, x

    Args:
      x: Noisy, ``[*batch, *event]``.
      prediction: Of the noise, of the clean ``x_0``, of the score ``grad log p(x)`` or of the velocity
        ``sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0``.
      alpha_bar: In (0, 1); a scalar or ``[*batch]``.
      kind: Which of these it is: one of `PREDICTIONS`.

    Returns:
      The noise, shape of ``x``.

    Raises:
      ValueError: If ``kind`` is unknown.

    Example:
      >>> x, clean = jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])
      >>> [round(float(e), 4) for e in to_noise(x, clean, 0.64, kind="clean")]
      [0.3333, 3.3333]

    References:
      Salimans, Ho, 2022, arXiv:2202.00512, Section 4 (velocity).
    """
    check_choice("kind", kind, PREDICTIONS)
    x, prediction = as_float(x), as_float(prediction)
    a = expand(alpha_bar, x)
    signal, spread = jnp.sqrt(a), jnp.sqrt(1 - a)
    if kind == "clean":
        return (x - signal * prediction) / spread
    if kind == "score":
        return -spread * prediction
    return signal * prediction + spread * x if kind == "velocity" else prediction


def from_noise(
    x: Float[Array, "*shape"], noise: Float[Array, "*shape"], alpha_bar: _AlphaBar, *, kind: str
) -> Float[Array, "*shape"]:
    """What a noise prediction says in another kind of prediction: the inverse of `to_noise`, same arguments."""
    check_choice("kind", kind, PREDICTIONS)
    if kind == "clean":
        return to_clean(x, noise, alpha_bar)
    if kind == "score":
        return to_score(noise, alpha_bar)
    return to_velocity(x, noise, alpha_bar) if kind == "velocity" else as_float(noise)


def to_clean(x: Float[Array, "*shape"], noise: Float[Array, "*shape"], alpha_bar: _AlphaBar) -> Float[Array, "*shape"]:
    """The clean ``E[x_0 | x] = (x - sqrt(1 - alpha_bar) noise) / sqrt(alpha_bar)`` of a noise prediction.

    Args:
      x: Noisy, ``[*batch, *event]``.
      noise: Predicted, shape of ``x``.
      alpha_bar: In (0, 1]; a scalar or ``[*batch]``.

    Returns:
      The clean prediction, shape of ``x``.
    """
    x, noise = as_float(x), as_float(noise)
    a = expand(alpha_bar, x)
    return (x - jnp.sqrt(1 - a) * noise) / jnp.sqrt(a)


def to_score(noise: Float[Array, "*shape"], alpha_bar: _AlphaBar) -> Float[Array, "*shape"]:
    """The score ``grad log p(x) = -noise / sqrt(1 - alpha_bar)`` of a noise prediction; ``alpha_bar`` below 1."""
    noise = as_float(noise)
    return -noise / jnp.sqrt(1 - expand(alpha_bar, noise))


def to_velocity(
    x: Float[Array, "*shape"], noise: Float[Array, "*shape"], alpha_bar: _AlphaBar
) -> Float[Array, "*shape"]:
    """The velocity ``sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x_0`` of a noise prediction; see `to_clean`."""
    x, noise = as_float(x), as_float(noise)
    a = expand(alpha_bar, x)
    return (noise - jnp.sqrt(1 - a) * x) / jnp.sqrt(a)
