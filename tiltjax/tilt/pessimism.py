r"""Inference-time pessimism: weights that grow with the reward, not with its exponential, and drop the low candidates.

The optimum of ``E r - (beta / 2) chi2`` is less tempted by the few candidates a faulty reward overrates than best-of-N:
no candidate weighs more than its lead over the threshold, in units of ``beta``. Its sampler is
`tiltjax.samplers.pessimism`.
"""

import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_per_row, check_positive
from tiltjax.ops.logspace import divide
from tiltjax.ops.masked import as_float, check_alike
from tiltjax.types import Array, Bool, Float, Numeric

__all__ = ["pessimistic_threshold", "pessimistic_weights"]


def pessimistic_threshold(
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch"]:
    r"""The reward below which a candidate is dropped.

    .. math:: \frac1N \sum_i \max\left(0, \frac{r_i - \lambda}{\beta}\right) = 1
              \quad\Leftrightarrow\quad
              \lambda = \max_k \left( \frac1k \sum_{i \le k} r_{[i]} - \frac{N \beta}{k} \right), \qquad
              r_{[1]} \ge r_{[2]} \ge \dots

    The closed form is exact: the means of the k best, less what they must share, rise with k while the next reward lies
    above them and fall afterwards. Sums are of distances below the best reward, so a shift of the rewards costs no
    digits.

    Args:
      reward: Reward of every candidate, drawn from the reference, reward units.
      beta: Strength of the chi-squared term, > 0, reward units; a number, or one per prompt.
      where: True for real candidates; None means all.

    Returns:
      The threshold, reward units, ``[*batch]``, in ``[max r - N beta, max r - beta]`` and at least ``mean r - beta``;
      0 for a row without a real candidate.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> float(pessimistic_threshold(jnp.array([0.0, 1.0, 2.0]), beta=0.5))  # (2 - .75) + (1 - .75) = 3 times .5
      0.75

    References:
      Huang et al., 2025, arXiv:2503.21878.
    """
    top, _, lead = _leads(reward, beta, where)
    return top - lead


def pessimistic_weights(
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch N"]:
    r"""Density of the pessimistic optimum with respect to the reference, at every candidate.

    .. math:: w_i = \max\left(0, \frac{r_i - \lambda}{\beta}\right), \qquad \frac1N \sum_i w_i = 1

    With ``lambda`` from `pessimistic_threshold`. Divided by the number of real candidates they are probabilities, those
    of ``f_divergence_tilt(reward, beta=beta, divergence="chi_squared")``. ``beta -> 0`` leaves only the best reward
    (its ties share), ``beta -> inf`` the reference.

    Args:
      reward: Reward of every candidate, drawn from the reference, reward units.
      beta: Strength of the chi-squared term, > 0, reward units; a number, or one per prompt.
      where: True for real candidates; None means all.

    Returns:
      Weights, ``[*batch, N]``, of mean 1 over the real candidates; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> [float(w) for w in pessimistic_weights(jnp.array([0.0, 1.0, 2.0]), beta=0.5)]
      [0.0, 0.5, 2.5]

    References:
      Huang et al., 2025, arXiv:2503.21878.
    """
    _, below, lead = _leads(reward, beta, where)
    kept = ~(below >= lead[..., None])  # NaN is no distance to drop a candidate for.
    return divide(jnp.where(kept, lead[..., None] - jnp.where(kept, below, 0), 0), beta)


def _leads(reward: Array, beta: Numeric | Array, where: Array | None) -> tuple[Array, Array, Array]:
    """The best reward, how far every candidate lies below it (inf where masked), and how far the threshold does."""
    check_positive("beta", beta)
    reward = as_float(reward)
    check_alike(where, reward)
    check_per_row("beta", beta, reward.shape[:-1])
    real = jnp.ones(reward.shape, bool) if where is None else where
    count = jnp.sum(real, axis=-1, dtype=reward.dtype)
    top = jax.lax.stop_gradient(jnp.max(reward, axis=-1, where=real, initial=-jnp.inf))
    top = jnp.where(count > 0, top, 0)
    below = jnp.where(real, top[..., None] - jnp.where(real, reward, 0), jnp.inf)
    ranked = jnp.cumsum(jnp.sort(below, axis=-1), axis=-1)
    k = jnp.arange(1, reward.shape[-1] + 1, dtype=reward.dtype).reshape(*[1] * count.ndim, -1)
    lead = jnp.min(((count * beta)[..., None] + ranked) / k, axis=-1)
    return top, below, jnp.where(count > 0, lead, 0)
