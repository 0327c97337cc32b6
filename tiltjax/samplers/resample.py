"""Resampling: ancestors drawn in proportion to weights, with unbiased counts.

``E[count_i] = num w_i / sum w`` for every method; they differ in the variance of the counts: multinomial has the most,
then residual and stratified; systematic keeps every count within 1 of its mean.
"""

import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_choice
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Float, Int, PRNGKey

__all__ = ["METHODS", "counts", "inverse_cdf", "resample"]

METHODS = ("multinomial", "residual", "stratified", "systematic")
"""Names of the schemes that `resample` knows."""


def resample(
    key: PRNGKey, weights: Float[Array, "*batch N"], *, num: int, method: str = "systematic"
) -> Int[Array, "*batch num"]:
    r"""Draws ``num`` ancestors with replacement, in proportion to their weights.

    The inverse of the weights' distribution function is read at ``num`` points of the unit interval:

    .. math:: u_k \;(\text{multinomial}), \qquad \frac{k + u_k}{num} \;(\text{stratified}),
              \qquad \frac{k + u}{num} \;(\text{systematic}),

    with independent uniforms. "residual" copies candidate ``i`` :math:`\lfloor num\, w_i \rfloor` times and draws the
    rest, multinomially, from what is left of the weights. A systematic draw is one uniform: its counts are unbiased but
    strongly dependent, and depend on the order of the candidates.

    Args:
      key: Consumed.
      weights: Non-negative, of any positive sum.
      num: How many ancestors, at least 1.
      method: One of `METHODS`.

    Returns:
      Indices into the N candidates, ``[*batch, num]``. A zero weight is never chosen; a row without a positive weight
      gives 0s, and one with a weight that is NaN gives -1s, where it is traced. Systematic and stratified indices
      ascend; residual ones ascend within each of their two parts.

    Raises:
      ValueError: If ``num`` is below 1, ``method`` unknown, or a weight, not traced, NaN.

    Example:
      >>> resample(jax.random.key(0), jnp.array([0.5, 0.0, 0.25, 0.25]), num=4).tolist()
      [0, 0, 2, 3]

    References:
      Douc, Cappe, Moulines, 2005, arXiv:cs/0507025.
    """
    check_at_least("num", num, 1)
    check_choice("method", method, METHODS)
    weights = as_float(weights)
    unknown = jnp.any(jnp.isnan(weights), axis=-1, keepdims=True)
    if not isinstance(unknown, jax.core.Tracer) and unknown.is_fully_addressable and unknown.any():
        place = tuple(int(i) for i in jnp.argwhere(jnp.isnan(weights))[0])
        raise ValueError(f"weights must be numbers, got NaN at {place}")
    return jnp.where(unknown, -1, _ancestors(key, jnp.where(unknown, 0, weights), num, method))


def _ancestors(key: PRNGKey, weights: Array, num: int, method: str) -> Array:
    batch = weights.shape[:-1]
    if method == "residual":
        return _residual(key, weights, num)
    uniform = jax.random.uniform(key, (*batch, 1 if method == "systematic" else num), weights.dtype)
    if method != "multinomial":
        strata = jnp.arange(num, dtype=weights.dtype).reshape((1,) * len(batch) + (num,))
        uniform = (strata + uniform) / num
    return inverse_cdf(weights, uniform)


def inverse_cdf(weights: Float[Array, "*batch N"], uniform: Float[Array, "*batch num"]) -> Int[Array, "*batch num"]:
    """Where each point of the unit interval falls when it is cut in proportion to the weights.

    Args:
      weights: Non-negative, of any positive sum.
      uniform: Points in [0, 1].

    Returns:
      Indices ``[*batch, num]``, never of a zero weight, however sums round; 0 for a row without a positive weight.
    """
    weights = as_float(weights)
    positive = weights > 0
    # A parallel prefix sum may round down: the running maximum over positive weights makes it monotone, and flat at 0s.
    cdf = jax.lax.cummax(jnp.where(positive, jnp.cumsum(weights, axis=-1), -jnp.inf), axis=weights.ndim - 1)
    some = jnp.any(positive, axis=-1, keepdims=True)
    last = weights.shape[-1] - 1 - jnp.argmax(jnp.flip(positive, axis=-1), axis=-1, keepdims=True)
    points = uniform * jnp.where(some, cdf[..., -1:], 0)
    search = jnp.vectorize(lambda c, p: jnp.searchsorted(c, p, side="right"), signature="(n),(m)->(m)")
    return jnp.minimum(search(cdf, points), jnp.where(some, last, 0)).astype(jnp.int32)


def counts(indices: Int[Array, "*batch num"], N: int) -> Int[Array, "*batch N"]:
    """How often each of ``N`` candidates was chosen; indices outside [0, N) count for none.

    Example:
      >>> counts(jnp.array([0, 0, 2, 3]), 4).tolist()
      [2, 0, 1, 1]
    """
    check_at_least("N", N, 1)
    indices = jnp.asarray(indices)
    inside = jnp.where(indices < 0, N, indices)  # A negative index would count from the end.
    count = jnp.vectorize(lambda i: jnp.zeros(N, jnp.int32).at[i].add(1, mode="drop"), signature="(m)->(n)")
    return count(inside)


def _residual(key: PRNGKey, weights: Array, num: int) -> Array:
    total = jnp.sum(weights, axis=-1, keepdims=True)
    share = num * (weights / jnp.where(total > 0, total, 1))
    copies = jnp.floor(share)
    ends = jnp.cumsum(copies.astype(jnp.int32), axis=-1)
    place = jnp.arange(num, dtype=jnp.int32)
    search = jnp.vectorize(lambda e: jnp.searchsorted(e, place, side="right").astype(jnp.int32), signature="(n)->(m)")
    drawn = inverse_cdf(share - copies, jax.random.uniform(key, (*weights.shape[:-1], num), weights.dtype))
    return jnp.where(place.reshape((1,) * (weights.ndim - 1) + (num,)) < ends[..., -1:], search(ends), drawn)
