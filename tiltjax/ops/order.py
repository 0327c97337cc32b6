"""Order statistics of draws: what the best of n would have scored, from N >= n draws that were not ordered."""

import chex
import jax.numpy as jnp
import numpy as np

from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Bool, Float, Int

__all__ = ["expected_max", "pass_at_k"]


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
    chex.assert_equal_shape([reward, where])
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
    return top[..., 0] - jnp.sum(jnp.where(used, coefficient, 0) * shortfall, axis=-1)


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
