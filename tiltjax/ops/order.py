"""Order: what the best of n would have scored, from N >= n draws that were not ordered; and how likely an order is."""

import jax
import jax.numpy as jnp
import numpy as np

from tiltjax.ops.checks import check_at_least, check_one_shape
from tiltjax.ops.logspace import logsumexp
from tiltjax.ops.masked import as_float, check_alike, masked_sum
from tiltjax.types import Array, Bool, Float, Int

__all__ = ["expected_max", "pass_at_k", "pass_at_k_bound", "plackett_luce_logp"]


def expected_max(
    reward: Float[Array, "*batch N"], *, n: int, where: Bool[Array, "*batch N"] | None = None
) -> Float[Array, "*batch"]:
    r"""Unbiased estimate of the expected largest of ``n`` i.i.d. draws, from ``N >= n`` of them.

    The mean of the maximum over all subsets of size ``n``, by sorting:

    .. math:: \hat E = \sum_{j=0}^{N-n} \frac{\binom{N-1-j}{n-1}}{\binom{N}{n}}\, r_{[j]}, \qquad
              r_{[0]} \ge r_{[1]} \ge \dots

    The coefficients are running products of ratios below 1, so no binomial is ever formed; ``n = 1`` is the mean and
    ``n = N`` the maximum. On 0/1 rewards it is `pass_at_k`.

    Args:
      reward: Reward of every draw, reward units.
      n: Size of the best-of-n, at most N; static.
      where: True for real draws; None means all.

    Returns:
      The estimate, reward units, ``[*batch]``. A row with fewer than ``n`` real draws has no such estimate and gives 0:
      leave it out of an average with ``where.sum(-1) >= n``.

    Raises:
      ValueError: If ``n`` is below 1 or above N.

    Example:
      >>> round(float(expected_max(jnp.array([1.0, 2.0, 6.0]), n=2)), 4)  # the mean of 2, 6 and 6
      4.6667

    References:
      Chen et al., 2021, arXiv:2107.03374, Eq. 1 (0/1 rewards); Hoeffding, 1948 (U-statistics).
    """
    N = reward.shape[-1]
    if not 1 <= n <= N:
        raise ValueError(f"n must lie between 1 and the number of draws, {N}, got {n!r}")
    reward = as_float(reward)
    if where is None:
        where = jnp.ones(reward.shape, bool)
    check_alike(where, reward)
    real = jnp.sum(where, axis=-1, keepdims=True, dtype=reward.dtype)
    descending = -jnp.sort(jnp.where(where, -reward, jnp.inf), axis=-1)
    j = jnp.arange(N, dtype=reward.dtype).reshape(*[1] * (reward.ndim - 1), N)
    # c_0 = n / m; c_{j+1} = c_j (m - n - j) / (m - 1 - j), which reaches 0 at j = m - n and must stay there.
    ratio = jnp.maximum(real - n - j, 0) / jnp.maximum(real - 1 - j, 1)
    first = n / jnp.maximum(real, 1)
    coefficient = first * jnp.concatenate([jnp.ones_like(real), jnp.cumprod(ratio, axis=-1)[..., :-1]], axis=-1)
    used = (j <= real - n) & (real >= n)
    top = jnp.where(real >= n, descending[..., :1], 0)
    # The coefficients sum to 1: summing shortfalls below the largest makes a common shift of the rewards exact.
    shortfall = jnp.where(used, top - jnp.where(used, descending, 0), 0)
    estimate = top[..., 0] - jnp.sum(jnp.where(used, coefficient, 0) * shortfall, axis=-1)
    # Not every draw has a coefficient, but none may be unknown.
    return jnp.where(jnp.any(where & jnp.isnan(reward), axis=-1), jnp.nan, estimate)


def pass_at_k(num_correct: Int[Array, "*batch"], *, num_samples: int, k: int) -> Float[Array, "*batch"]:
    r"""Unbiased estimate of the chance that at least one of ``k`` draws is correct, from ``num_samples`` draws.

    .. math:: 1 - \binom{n-c}{k} \Big/ \binom{n}{k} \;=\; 1 - \prod_{i=n-c+1}^{n} \Bigl(1 - \frac{k}{i}\Bigr)

    The plug-in ``1 - (1 - c/n)^k`` is biased low. The product is taken in float64 when the function is traced.

    Args:
      num_correct: How many of the draws were correct, ``c`` in ``[0, num_samples]``.
      num_samples: How many were drawn, ``n``; static.
      k: Size of the set that must hold a correct one, at most ``num_samples``; static.

    Returns:
      The estimate in [0, 1], ``[*batch]``; exactly 1 where fewer than ``k`` draws were wrong.

    Raises:
      ValueError: If ``k`` is below 1 or above ``num_samples``.

    Example:
      >>> [round(float(p), 4) for p in pass_at_k(jnp.array([0, 1, 3]), num_samples=4, k=2)]
      [0.0, 0.5, 1.0]

    References:
      Chen et al., 2021, arXiv:2107.03374, Eq. 1.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k must lie between 1 and num_samples, {num_samples}, got {k!r}")
    i = np.arange(num_samples, 0, -1, dtype=np.float64)
    fail = np.concatenate([[1.0], np.cumprod(np.maximum(1 - k / i, 0))])
    return jnp.asarray(1 - fail, jnp.result_type(float))[jnp.clip(jnp.asarray(num_correct), 0, num_samples)]


def pass_at_k_bound(
    mean: Float[Array, "*batch"], variance: Float[Array, "*batch"], *, k: int | float
) -> Float[Array, "*batch"]:
    r"""Upper bound on the mean pass@k of prompts, from the mean and variance of their pass@1.

    .. math:: E\left[1 - (1 - \rho)^k\right] \le 1 - \left[ (1 - E \rho)^2 + \mathrm{Var}\, \rho \right]^{k/2},
              \qquad k \ge 2

    Jensen's inequality for :math:`x^{k/2}` at :math:`x = (1 - \rho)^2`: an equality at ``k = 2`` and wherever
    :math:`\rho` does not vary. At ``k = 1`` that power is concave and the inequality turns round, so it is refused.
    More even prompts (a smaller variance) allow a higher pass@k at the same pass@1.

    Args:
      mean: Mean over prompts of the chance :math:`\rho` that one draw is correct, in [0, 1].
      variance: Its variance over prompts, at most ``mean (1 - mean)``.
      k: Size of the set that must hold a correct draw, at least 2.

    Returns:
      The bound in [0, 1], ``[*batch]``, accurate in relative terms where it is small.

    Raises:
      ValueError: If ``k`` is below 2.

    Example:
      >>> round(float(pass_at_k_bound(jnp.float32(0.5), jnp.float32(0.25), k=2)), 4)  # half of the prompts are solved
      0.5

    References:
      Liu et al., 2025, arXiv:2505.24864.
    """
    check_at_least("k", k, 2)
    check_one_shape(mean=mean, variance=variance)
    mean, variance = as_float(mean), as_float(variance)
    below_one = jnp.maximum(variance - mean * (2 - mean), -1)  # Of the bracket: (1 - mean)^2 + variance - 1.
    real = ~(below_one <= -1)
    return jnp.where(real, -jnp.expm1(k / 2 * jnp.log1p(jnp.where(real, below_one, 0))), 1)


def plackett_luce_logp(
    score: Float[Array, "*batch N"],
    ranking: Int[Array, "*batch N"] | None = None,
    *,
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Log-probability of a ranking when items are drawn one at a time, from the softmax of the scores of those left.

    .. math:: \log P(\tau) = \sum_{k=1}^{n-1} \left[ s_{\tau(k)} - \log \sum_{j \ge k} e^{s_{\tau(j)}} \right]

    Args:
      score: Score of every item, nats.
      ranking: Index of the first item, of the second, ... of the last. None means that they are in that order.
      where: True for real items, in the order of ``score``; masked ones drop out of the ranking. None means all.

    Returns:
      ``[*batch]``, nats, at most 0; 0 with fewer than two real items.

    Example:
      >>> round(float(jnp.exp(plackett_luce_logp(jnp.log(jnp.array([1.0, 2.0, 3.0]))))), 4)  # 1/6 * 2/5
      0.0667

    References:
      Plackett, 1975, "The analysis of permutations".
    """
    score = as_float(score)
    check_alike(where, score)
    real = jnp.full(score.shape, True) if where is None else where
    if ranking is not None:
        check_alike(None, score, ranking)
        score, real = (jnp.take_along_axis(x, ranking, axis=-1) for x in (score, real))
    score = jnp.where(real, score, 0)
    # Who comes later against who is drawn, pair by pair: what all scores have in common costs no digits.
    lead = score[..., None, :] - score[..., :, None]
    later = jnp.triu(jnp.full(lead.shape, True), 1) & real[..., None, :] & real[..., :, None]
    return -masked_sum(jax.nn.softplus(logsumexp(lead, where=later)), real)
