r"""Guidance of a diffusion: classifier-free, by a classifier, and soft best-of-N at every reverse step.

Two conventions for its strength are in use, and are never confused here: ``w`` is what is added to the *conditional*
prediction, ``scale = 1 + w`` what multiplies the condition from the *unconditional* one. Both name the same field,

.. math:: (1 + w)\, s(x | c) - w\, s(x) = s(x) + \text{scale}\,(s(x | c) - s(x))
          = \nabla \log p_t(x | c)\, p_t(c | x)^w = \nabla \log p_t(x)\, p_t(c | x)^\text{scale}

which is the score of no noised version of ``p(x | c) p(c | x)^w``: tilting and noising do not commute.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least
from tiltjax.ops.collectives import axis_index, axis_size
from tiltjax.ops.masked import as_float
from tiltjax.ops.schedule import expand
from tiltjax.samplers.best_of_n import init, merge_over, update
from tiltjax.samplers.denoise import Denoiser, LogWeight, levels, reverse_kernel
from tiltjax.types import Array, AxisName, Float, Numeric, PRNGKey

__all__ = [
    "classifier_free_guidance",
    "classifier_guidance",
    "guidance_weight_for",
    "guided_denoiser",
    "soft_best_of_n_denoise",
    "soft_best_of_n_step",
]


def classifier_free_guidance(
    conditional: Float[Array, "*shape"],
    unconditional: Float[Array, "*shape"],
    *,
    w: Numeric | None = None,
    scale: Numeric | None = None,
) -> Float[Array, "*shape"]:
    r"""Pushes a conditional prediction away from the unconditional one.

    .. math:: (1 + w)\, \epsilon_c - w\, \epsilon = \epsilon + \text{scale}\,(\epsilon_c - \epsilon)

    Args:
      conditional: Prediction with the condition: noise, clean, score or velocity.
      unconditional: Prediction of the same kind without it.
      w: Exponent of ``p(c | x)`` on top of the conditional law: 0 is conditional, -1 unconditional.
      scale: ``1 + w``: 1 is conditional, 0 unconditional. Exactly one of the two is given.

    Returns:
      A prediction of the same kind and shape.

    Raises:
      ValueError: If both or neither of ``w`` and ``scale`` are given.

    Example:
      >>> conditional, unconditional = jnp.array([1.0]), jnp.array([0.5])
      >>> float(classifier_free_guidance(conditional, unconditional, w=2.0)[0])
      2.0
      >>> float(classifier_free_guidance(conditional, unconditional, scale=3.0)[0])
      2.0

    References:
      Ho, Salimans, 2022, arXiv:2207.12598, Eq. 6.
    """
    conditional, unconditional = as_float(conditional), as_float(unconditional)
    return unconditional + _scale(w, scale) * (conditional - unconditional)


def guided_denoiser(
    conditional: Denoiser, unconditional: Denoiser, *, w: Numeric | None = None, scale: Numeric | None = None
) -> Denoiser:
    """A denoiser made of two by `classifier_free_guidance`; the same options and errors.

    Args:
      conditional: ``(x, alpha_bar) -> noise`` with the condition closed over.
      unconditional: The same without the condition.
      w: Strength in the convention of the conditional law.
      scale: Strength in the convention of the unconditional one, ``1 + w``.

    Returns:
      ``(x, alpha_bar) -> noise``.
    """
    strength = _scale(w, scale)

    def denoiser(x: Array, alpha_bar: Numeric | Array) -> Array:
        return classifier_free_guidance(conditional(x, alpha_bar), unconditional(x, alpha_bar), scale=strength)

    return denoiser


def classifier_guidance(
    noise: Float[Array, "*shape"],
    grad_logp: Float[Array, "*shape"],
    alpha_bar: Numeric | Float[Array, "..."],
    *,
    strength: Numeric,
) -> Float[Array, "*shape"]:
    r"""Adds a classifier's gradient to a noise prediction.

    .. math:: \epsilon - \sqrt{1 - \bar\alpha}\; \text{strength}\; \nabla_x \log p_t(c | x)

    Args:
      noise: Prediction, ``[*batch, *event]``: of the unconditional denoiser, where ``strength`` is the ``scale`` of
        `classifier_free_guidance`; of the conditional one, where it is its ``w``.
      grad_logp: ``grad log p_t(c | x)`` with respect to the noisy x, shape of ``noise``.
      alpha_bar: In (0, 1); a scalar or ``[*batch]``.
      strength: Exponent of ``p_t(c | x)``.

    Returns:
      The guided noise, shape of ``noise``.

    Example:
      >>> float(classifier_guidance(jnp.array([1.0]), jnp.array([2.0]), 0.75, strength=3.0)[0])
      -2.0

    References:
      Dhariwal, Nichol, 2021, arXiv:2105.05233, Eq. 14.
    """
    noise = as_float(noise)
    return noise - jnp.sqrt(1 - expand(alpha_bar, noise)) * strength * grad_logp


def guidance_weight_for(w: Numeric, num_candidates: int) -> Numeric:
    r"""The exponent with which soft best-of-N of small reverse steps guides as strongly as ``w`` is meant to.

    .. math:: w' = w \frac{N}{N - 1}

    The N candidates of a small step have nearly equal weights ``p(c | x)^{w'}``, and the one chosen moves by
    ``(1 - 1/N) w'`` times what the gradient of ``log p(c | x)`` would move it: one N-th of every weight is compared
    with itself. So N = 2 suffices, where the steps are many. At few steps and large exponents the law is not exact.

    Args:
      w: Wanted exponent, of whichever law the candidates are drawn from.
      num_candidates: N, at least 2: a single candidate is guided by nothing.

    Returns:
      The exponent to weigh the candidates with.

    Raises:
      ValueError: If ``num_candidates`` is below 2.

    Example:
      >>> guidance_weight_for(3.0, 2), guidance_weight_for(3.0, 4)
      (6.0, 4.0)
    """
    check_at_least("num_candidates", num_candidates, 2)
    return w * num_candidates / (num_candidates - 1)


def soft_best_of_n_step(
    key: PRNGKey,
    mean: Float[Array, "*shape"],
    std: Float[Array, "..."],
    log_weight: Callable[[Array], Array],
    *,
    num_candidates: int,
    beta: Numeric = 1.0,
    axis_name: AxisName = None,
) -> Float[Array, "*shape"]:
    r"""One reverse step: N candidates of a Gaussian kernel, one chosen with odds ``exp(log_weight / beta)``.

    .. math:: x^i = \mu + \sigma z^i, \qquad \Pr(i) = \frac{e^{\ell(x^i) / \beta}}{\sum_j e^{\ell(x^j) / \beta}}

    With the kernel of the unconditional chain and ``log_weight = scale log p(c | x)`` this is guidance; with a soft
    value ``beta log E[exp(r(x_0) / beta) | x]`` it draws from the tilt of the data by the reward r. As N grows the
    step tends to the kernel times ``exp(log_weight / beta)``; for small steps N candidates act as ``1 - 1/N`` times the
    weight: see `guidance_weight_for`.

    Args:
      key: Consumed. Candidate ``i`` is drawn under a key folded with its global index ``i``.
      mean: Of the kernel, ``[*batch, *event]``.
      std: Its deviation: a scalar, or of the rank of ``mean``.
      log_weight: ``x [*batch, *event] -> [*batch]``, nats, or reward units beside a ``beta``; called once, under
        `jax.vmap` over the candidates. NaN never wins; where all are -inf the choice is uniform.
      num_candidates: N over all devices, a multiple of their number.
      beta: Divides ``log_weight``, > 0.
      axis_name: Mapped axis over which the candidates are split: each device draws and weighs its share, and all return
        the same winner, that of one device.

    Returns:
      The chosen x at the next level, shape of ``mean``; NaN where every weight is NaN.

    Raises:
      ValueError: If ``num_candidates`` is below 1 or does not divide over the devices, or ``beta`` is not positive.

    Example:
      >>> mean = jnp.zeros((4000, 1))
      >>> x = soft_best_of_n_step(jax.random.key(0), mean, jnp.array(1.0), lambda x: x[:, 0], num_candidates=64)
      >>> 0.9 < float(x.mean()) < 1.02  # The kernel N(0, 1) tilted by exp(x) is N(1, 1).
      True

    References:
      Verdun et al., 2025, arXiv:2505.03156; Jiao, Chen, Li, 2025, arXiv:2509.04372, Eqs. 31-38.
    """
    check_at_least("num_candidates", num_candidates, 1)
    size = axis_size(axis_name)
    if num_candidates % size:
        raise ValueError(f"num_candidates must be a multiple of the {size} devices, got {num_candidates!r}")
    mean = as_float(mean)
    draw, choose = jax.random.split(key)
    start = axis_index(axis_name) * (num_candidates // size)
    keys = jax.vmap(lambda i: jax.random.fold_in(draw, i))(start + jnp.arange(num_candidates // size))
    candidates = jax.vmap(lambda k: mean + std * jax.random.normal(k, mean.shape, mean.dtype))(keys)
    reward = as_float(jnp.moveaxis(jax.vmap(log_weight)(candidates), 0, -1))
    # Where every weight is 0 the choice is the kernel's own; a smallest number keeps their order by noise alone.
    reward = jnp.where(reward == -jnp.inf, jnp.finfo(reward.dtype).min / 2, reward)
    winner = update(
        choose,
        init(reward.shape[:-1], start=start, payload=mean, dtype=reward.dtype),
        reward,
        beta=beta,
        payload=jnp.moveaxis(candidates, 0, reward.ndim - 1),
    )
    winner = merge_over(winner, axis_name=axis_name)
    return winner.payload + expand(jnp.where(winner.reward == -jnp.inf, jnp.nan, 0.0), mean)


def soft_best_of_n_denoise(
    key: PRNGKey,
    denoiser: Denoiser,
    x: Float[Array, "*shape"],
    alpha_bar: Float[Array, " levels"],
    log_weight: LogWeight,
    *,
    num_candidates: int,
    beta: Numeric = 1.0,
    eta: Numeric = 1.0,
    axis_name: AxisName = None,
) -> Float[Array, "*shape"]:
    """The reverse chain with `soft_best_of_n_step` at every step.

    The step to level 0 has no noise to choose among: ``log_weight`` is not asked there. Guidance: the unconditional
    denoiser with ``log_weight = scale * log p(c | x)``, or the conditional one with ``w * log p(c | x)``; N candidates
    guide as ``1 - 1/N`` times that. Rewards: ``log_weight`` is a soft value in reward units, or the plug-in
    ``r(to_clean(x, denoiser(x, alpha_bar), alpha_bar))``, whose Jensen gap makes it biased.

    Args:
      key: Consumed. The step from level k is under ``fold_in(key, k)``.
      denoiser: ``(x, alpha_bar) -> noise``: its chain is what the candidates are drawn from.
      x: Where to start, at the last level, ``[*batch, *event]``.
      alpha_bar: The schedule, ``[K + 1]``, falling from 1.
      log_weight: ``(x [*batch, *event], alpha_bar) -> [*batch]`` at the level that a step leads to.
      num_candidates: N over all devices; 1 is the chain of the denoiser.
      beta: Divides ``log_weight``, > 0.
      eta: Share of the noise that is drawn anew, in (0, 1].
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      ``x_0``, shape of ``x``.

    Raises:
      ValueError: As for `soft_best_of_n_step`.
    """

    def step(x: Array, level: tuple) -> tuple[Array, None]:
        k, before, after = level
        mean, std = reverse_kernel(x, denoiser(x, before), before, after, eta=eta)
        chosen = soft_best_of_n_step(
            jax.random.fold_in(key, k),
            mean,
            std,
            lambda x: log_weight(x, after),
            num_candidates=num_candidates,
            beta=beta,
            axis_name=axis_name,
        )
        return chosen, None

    # The last step is deterministic: outside of the loop, where no weight is asked for.
    (numbers, before, after) = levels(alpha_bar)
    x, _ = jax.lax.scan(step, as_float(x), (numbers[:-1], before[:-1], after[:-1]))
    return reverse_kernel(x, denoiser(x, before[-1]), before[-1], after[-1], eta=eta)[0]


def _scale(w: Numeric | None, scale: Numeric | None) -> Numeric:
    if (w is None) == (scale is None):
        raise ValueError(f"exactly one of w and scale (= 1 + w) must be given, got w={w!r}, scale={scale!r}")
    return scale if w is None else 1 + w
