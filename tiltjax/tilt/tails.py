"""Can these weights be trusted? The Pareto tail index of importance weights, and the smoothing that goes with it.

The k largest weights are compared with a generalised Pareto law of shape ``k``: moments of the weights of order above
``1/k`` do not exist, so an average with ``k > 1/2`` has no variance and one with ``k > 1`` no mean.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tiltjax.ops.logspace import logsumexp
from tiltjax.ops.masked import as_float, check_alike
from tiltjax.types import Array, Bool, Float, Int

__all__ = ["ParetoSmoothed", "pareto_k", "pareto_k_limit", "pareto_smooth"]

# Zhang and Stephens' grid of 30 + sqrt(n) points with prior 3, and Vehtari et al.'s 10 pseudo-observations at 1/2.
_GRID, _PRIOR_SCALE, _PRIOR_COUNT, _PRIOR_SHAPE, _FEWEST = 30, 3.0, 10.0, 0.5, 5


@chex.dataclass(frozen=True, mappable_dataclass=False)
class ParetoSmoothed:
    """Importance weights with their tail replaced by that of a fitted generalised Pareto law.

    Attributes:
      log_weights: Smoothed log-weights, normalised, nats, ``[*batch, N]``; -inf where masked.
      k: Shape of the fitted tail, ``[*batch]``; ``inf`` where there are fewer than 5 tail points.
    """

    log_weights: Float[Array, "*batch N"]
    k: Float[Array, "*batch"]


def pareto_k(
    log_weights: Float[Array, "*batch N"], *, where: Bool[Array, "*batch N"] | None = None
) -> Float[Array, "*batch"]:
    """Shape ``k`` of the tail of importance weights, the diagnostic of Pareto-smoothed importance sampling.

    Below 0.5 good; from 0.5 to 0.7 usable; above 0.7, or above `pareto_k_limit` of a small sample, unreliable: draw
    more candidates or raise ``beta``. See `pareto_smooth` for the fit.

    Args:
      log_weights: Log-weights up to a constant, nats; ``reward / beta`` for a tilt.
      where: True for real candidates; None means all.

    Returns:
      ``k``, ``[*batch]``, without gradient; ``inf`` where fewer than 5 weights exceed the cutoff: at most 20 real
      candidates, or ties.

    Example:
      >>> u = jnp.arange(1, 1001) / 1000
      >>> round(float(pareto_k(-0.5 * jnp.log(u))), 2)  # weights u^-1/2 of a uniform u have k = 1/2
      0.44
    """
    return pareto_smooth(log_weights, where=where).k


def pareto_k_limit(n: int | Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Largest ``k`` at which ``n`` candidates still give a reliable average: ``min(1 - 1 / log10 n, 0.7)``.

    Args:
      n: How many candidates, above 1.

    Returns:
      The limit, ``[*batch]``; negative below 10 candidates, where no ``k`` is good enough.

    Example:
      >>> [round(float(pareto_k_limit(n)), 2) for n in (64, 2000, 10**6)]
      [0.45, 0.7, 0.7]

    References:
      Vehtari et al., 2024, arXiv:1507.02646, section 3.2.
    """
    return jnp.minimum(1 - 1 / jnp.log10(as_float(jnp.asarray(n))), 0.7)


def pareto_smooth(
    log_weights: Float[Array, "*batch N"], *, where: Bool[Array, "*batch N"] | None = None
) -> ParetoSmoothed:
    r"""Pareto-smoothed importance sampling: steadier log-weights, and the shape of their tail.

    The ``M = ceil(min(N / 5, 3 sqrt N))`` largest weights are what exceeds the cutoff ``u``, the largest of the rest. A
    generalised Pareto law is fitted to ``w - u`` by Zhang and Stephens' profile mean over a grid of ``30 + sqrt M``
    points, its shape is drawn towards 1/2 by 10 pseudo-observations, and the tail is replaced by the quantiles

    .. math:: \tilde w_{(i)} = u + F^{-1}_{\hat\sigma, \hat k}\Bigl(\frac{i - 1/2}{M}\Bigr), \quad i = 1 \dots M,

    cut off at the largest raw weight. Weights that tie with the cutoff are not tail; ties within the tail are ranked in
    their order. Everything stays in log space, so weights may span more than the float range. Smoothing trades a little
    bias for a finite, small variance.

    Args:
      log_weights: Log-weights up to a constant, nats; ``reward / beta`` for a tilt.
      where: True for real candidates; None means all.

    Returns:
      `ParetoSmoothed` log-weights and ``k``, without gradient. With fewer than 5 tail points the weights are the raw
      ones, normalised, and ``k`` is ``inf``. A row without a real candidate gets -inf throughout.

    Example:
      >>> out = pareto_smooth(-2 * jnp.log(jnp.arange(1, 101) / 100))
      >>> round(float(jnp.exp(out.log_weights).sum()), 4)
      1.0

    References:
      Vehtari et al., 2024, arXiv:1507.02646, section 3 and appendix; Zhang and Stephens, 2009, Technometrics 51(3).
    """
    log_weights = as_float(jax.lax.stop_gradient(log_weights))
    check_alike(where, log_weights)
    where = jnp.ones(log_weights.shape, bool) if where is None else where
    smoothed, k = jnp.vectorize(_smooth_row, signature="(n),(n)->(n),()")(log_weights, where)
    unknown = jnp.any(where & jnp.isnan(log_weights), axis=-1)
    smoothed = jnp.where(where & unknown[..., None], jnp.nan, smoothed)
    return ParetoSmoothed(log_weights=smoothed, k=jnp.where(unknown, jnp.nan, k))


def _smooth_row(log_weights, where):
    """`pareto_smooth` of one row, ``[N]``."""
    N = log_weights.shape[0]
    real = jnp.sum(where, dtype=jnp.int32)
    x = jnp.where(where, log_weights, -jnp.inf)
    x = x - jnp.where(real > 0, jnp.max(x, initial=-jnp.inf), 0)
    order = jnp.argsort(-x)
    ranked = x[order]
    # The tail: at most `most` of `ranked`, the largest first; `n` of them exceed the cutoff.
    most = min(_tail_length(N), N - 1)
    if most < _FEWEST:
        return x - jnp.where(real > 0, logsumexp(x), 0), jnp.full((), jnp.inf, x.dtype)
    cutoff = ranked[jnp.asarray(_tail_lengths(N))[real]]
    in_tail = ranked[:most] > cutoff
    n = jnp.sum(in_tail, dtype=jnp.int32)
    enough = n >= _FEWEST
    # log(w - u) of the tail, one harmless value elsewhere.
    above = jnp.where(in_tail, ranked[:most], 0)
    log_excess = jnp.where(in_tail, above + _log1mexp(jnp.where(in_tail, above - cutoff, 1)), 0)
    k, log_scale = _fit(log_excess, in_tail, jnp.where(enough, n, _FEWEST))
    quantile = log_scale + _log_quantile((n - jnp.arange(most) - 0.5) / jnp.maximum(n, 1), k)
    tail = jnp.where(in_tail & enough & jnp.isfinite(k), jnp.logaddexp(quantile, cutoff), ranked[:most])
    x = x.at[order[:most]].set(jnp.minimum(tail, 0))
    return x - jnp.where(real > 0, logsumexp(x), 0), jnp.where(enough, k, jnp.inf)


def _fit(log_excess, in_tail, n):
    """Zhang and Stephens' estimate of a generalised Pareto law: shrunk shape, and log of the scale.

    With ``b = -k / sigma`` the shape is ``k(b) = mean log(1 - b x)``; ``b`` is averaged over its profile likelihood.
    Excesses ``x`` come largest first and are measured in units of their first quartile, where every ``|b|`` on the grid
    is of order one.
    """
    quartile = log_excess[n - jnp.floor(n / 4 + 0.5).astype(jnp.int32)]
    z = log_excess - quartile
    points = _GRID + jnp.floor(jnp.sqrt(n)).astype(jnp.int32)
    most = _GRID + int(log_excess.shape[0] ** 0.5)
    i = jnp.arange(most) + 0.5
    used = jnp.arange(most) < points
    # 1 - sqrt(m / i) without cancellation at i = m.
    step = (i - points) / i / (1 + jnp.sqrt(points / i))
    b = jnp.where(used, step / _PRIOR_SCALE + jnp.exp(-z[0]), -1)
    b = jnp.where(b == 0, jnp.finfo(b.dtype).tiny, b)

    def shape(b):
        log_bx = jnp.log(jnp.abs(b))[..., None] + z.reshape(*[1] * b.ndim, -1)
        term = jnp.where((b < 0)[..., None], jnp.logaddexp(log_bx, 0), jnp.log1p(-jnp.exp(jnp.minimum(log_bx, -1e-6))))
        return jnp.sum(jnp.where(in_tail, term, 0) if b.ndim == 0 else jnp.where(in_tail[None], term, 0), axis=-1) / n

    k = shape(b)
    log_profile = n * (jnp.log(jnp.abs(b)) - jnp.log(jnp.abs(k)) - k - 1)
    b = jnp.sum(jax.nn.softmax(jnp.where(used, log_profile, -jnp.inf)) * b)
    k = shape(b)
    log_scale = jnp.log(jnp.abs(k)) - jnp.log(jnp.abs(b)) + quartile
    return (n * k + _PRIOR_COUNT * _PRIOR_SHAPE) / (n + _PRIOR_COUNT), log_scale


def _log_quantile(p, k):
    """``log F^{-1}(p)`` of the generalised Pareto law of scale 1: ``log((1 - p)^{-k} - 1) / k)``."""
    inside = (p > 0) & (p < 1)
    y = -jnp.log1p(-jnp.where(inside, p, 0.5))
    flat = jnp.abs(k) < jnp.finfo(k.dtype).eps
    k = jnp.where(flat, 1, k)
    curved = jnp.maximum(k * y, 0) + _log1mexp(jnp.abs(k) * y) - jnp.log(jnp.abs(k))
    return jnp.where(flat, jnp.log(y), curved)


def _log1mexp(x):
    """``log(1 - exp(-x))`` for ``x > 0``."""
    return jnp.log(-jnp.expm1(-x))


def _tail_length(n: int) -> int:
    return int(np.ceil(min(n / 5, 3 * n**0.5)))


@functools.cache
def _tail_lengths(N: int) -> np.ndarray:
    """The tail length for every number of real candidates up to N: also the rank of the cutoff."""
    return np.array([_tail_length(n) for n in range(N + 1)], np.int32)
