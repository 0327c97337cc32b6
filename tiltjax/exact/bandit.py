"""Worlds small enough to know everything: a reference over K arms, their rewards, and every law the library estimates.

Pure functions of ``ref [..., K]`` (probabilities) and ``reward [..., K]``, in the precision they are given: under
``jax.enable_x64(True)`` they are exact to about 1e-13. With ``ref`` uniform over the observed candidates of a prompt
(0 for masked ones) they give the exact law of resampling those candidates, for which float32 is enough.

Below, ``w = exp(r / beta) / Z``, ``p* = ref w`` and ``M(t) = E_ref exp(-t w)``.
"""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_positive
from tiltjax.ops.logspace import divide, exp_remainder
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Float, Int, Numeric

__all__ = [
    "Expansion",
    "PartitionLaw",
    "best_of_n_law",
    "chi_squared",
    "expansion",
    "kl",
    "log_partition",
    "log_partition_law",
    "soft_best_of_n_law",
    "tilted",
    "total_variation",
    "win_rate",
]

_Probs = Float[Array, "*batch K"]
_Beta = Numeric | Float[Array, "*batch"]
_Count = int | Int[Array, ""]


def log_partition(ref: _Probs, reward: _Probs, *, beta: _Beta) -> Float[Array, "*batch"]:
    """``log Z = log E_ref exp(r / beta)``, nats.

    Args:
      ref: Probability of every arm, summing to 1; the reward of an arm of probability 0 is never read.
      reward: Reward of every arm, reward units.
      beta: Strength of the KL term, > 0, reward units; a number, or one per row.

    Returns:
      ``[*batch]``.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> round(float(log_partition(jnp.array([0.5, 0.5]), jnp.array([0.0, 1.0]), beta=1.0)), 6)  # log((1 + e) / 2)
      0.620115
    """
    log_w, top = _exponents(ref, reward, beta)
    return top + _log_mean(as_float(ref), log_w)


def tilted(ref: _Probs, reward: _Probs, *, beta: _Beta) -> _Probs:
    """The tilted distribution ``p* = ref exp(r / beta) / Z``: the optimum of ``E r - beta KL(. || ref)``.

    Args:
      ref: Probability of every arm, summing to 1.
      reward: Reward of every arm, reward units.
      beta: Strength of the KL term, > 0, reward units; a number, or one per row.

    Returns:
      Probabilities, ``[*batch, K]``.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.
    """
    ref = as_float(ref)
    mass = ref * jnp.exp(_exponents(ref, reward, beta)[0])
    total = jnp.sum(mass, axis=-1, keepdims=True)
    return mass / jnp.where(total > 0, total, 1)


def chi_squared(ref: _Probs, reward: _Probs, *, beta: _Beta) -> Float[Array, "*batch"]:
    """``chi2(p* || ref) = Var_ref(w)``; arguments as for `tilted`."""
    return jnp.sum(as_float(ref) * jnp.square(_excess(ref, reward, beta)), axis=-1)


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Expansion:
    """How soft best-of-N approaches the tilt: to leading order ``TV(P_N, p*) = tv / N``, and either KL is ``kl / N^2``.

    On finitely many arms both constants are finite; `expansion` says what a law of infinitely many needs.

    Attributes:
      tv: ``C1 = E_p* |1 + chi2 - w| / 2``, ``[*batch]``.
      kl: ``C2 = Var_p*(w) / 2``, ``[*batch]``.
    """

    tv: Float[Array, "*batch"]
    kl: Float[Array, "*batch"]


def expansion(ref: _Probs, reward: _Probs, *, beta: _Beta) -> Expansion:
    r"""Leading constants of the distance between soft best-of-N and the tilted distribution.

    .. math:: \frac{P_N}{p^*} = 1 + \frac{1 + \chi^2 - w}{N} + O(N^{-2})

    so total variation falls as ``1/N`` and KL as ``1/N^2``. No bound on the reward is needed, but moments are: total
    variation takes a finite ``E_ref w^2 = 1 + chi2``, KL a finite ``E_ref w^3``, which ``C2`` contains. Where the tail
    of ``w`` is Pareto's of index ``a`` between 2 and 3, KL falls as ``N^(1 - a)`` only.

    Args:
      ref: Probability of every arm, summing to 1.
      reward: Reward of every arm, reward units.
      beta: Strength of the KL term, > 0, reward units; a number, or one per row.

    Returns:
      `Expansion` of both constants.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.
    """
    excess, target = _excess(ref, reward, beta), tilted(ref, reward, beta=beta)
    gap = chi_squared(ref, reward, beta=beta)[..., None] - excess
    return Expansion(tv=jnp.sum(target * jnp.abs(gap), axis=-1) / 2, kl=jnp.sum(target * jnp.square(gap), axis=-1) / 2)


def best_of_n_law(ref: _Probs, reward: _Probs, *, n: _Count) -> _Probs:
    r"""The law of best-of-n: the best of n i.i.d. draws, ties broken uniformly.

    .. math:: P(x) = \bigl[F(r_x)^n - F(r_x^-)^n\bigr] \frac{\mathrm{ref}(x)}{\mathrm{ref}(\text{level of } x)}

    where ``F`` is the distribution function of the reward and arms of equal reward form a level.

    Args:
      ref: Probability of every arm, summing to 1.
      reward: Reward of every arm, reward units.
      n: How many draws, at least 1.

    Returns:
      Probabilities, ``[*batch, K]``.

    Raises:
      ValueError: If ``n`` is a Python number below 1.

    Example:
      >>> [round(float(p), 4) for p in best_of_n_law(jnp.array([0.5, 0.25, 0.25]), jnp.array([0.0, 1.0, 1.0]), n=2)]
      [0.25, 0.375, 0.375]
    """
    check_positive("n", n)
    below, level, above = _levels(ref, reward)
    up_to = below + level
    ratio = jnp.where(below > 0, jnp.minimum(level / jnp.where(up_to > 0, up_to, 1), 1), 1)
    # F^n - F_^n = F^n (1 - (1 - level / F)^n), whose factors cannot cancel.
    share = as_float(ref) / jnp.where(level > 0, level, 1)
    return -jnp.exp(n * _log_of_rest(above, up_to)) * jnp.expm1(n * jnp.log1p(-ratio)) * share


def win_rate(p: _Probs, q: _Probs, reward: _Probs) -> Float[Array, "*batch"]:
    """Chance that a draw from ``p`` beats an independent draw from ``q``, a tie counting half.

    Args:
      p: Probabilities, ``[*batch, K]``.
      q: Probabilities of the opponent, ``[*batch, K]``.
      reward: Reward of every arm, reward units.

    Returns:
      ``[*batch]``, in [0, 1].
    """
    below, level, _ = _levels(q, reward)
    return jnp.sum(as_float(p) * (below + level / 2), axis=-1)


def soft_best_of_n_law(ref: _Probs, reward: _Probs, *, n: _Count, beta: _Beta) -> _Probs:
    r"""The law of soft best-of-n: n i.i.d. draws, one of which is kept with odds ``exp(r / beta)``.

    .. math:: P_n(x) = n\, \mathrm{ref}(x)\, w(x) \int_0^\infty e^{-t w(x)} M(t)^{n-1}\, dt

    All arms share one grid of ``log t``, where the integrands are analytic in a strip of half-width ``pi / 2`` and the
    trapezoidal rule converges geometrically. ``n = 1`` is the reference, ``beta -> 0`` hard best-of-n (ties included),
    ``n -> inf`` the tilt. Gaps between successive ``r / beta`` too wide for float arithmetic are narrowed, so no
    ``beta`` is too small. The cost is K times the spread of ``r / beta``, in nats. Forward mode only.

    Args:
      ref: Probability of every arm, summing to 1.
      reward: Reward of every arm, reward units.
      n: How many draws, at least 1.
      beta: Strength of the KL term, > 0, reward units; a number, or one per row.

    Returns:
      Probabilities, ``[*batch, K]``.

    Raises:
      ValueError: If ``n`` is a Python number below 1, or ``beta`` one that is not positive and finite.

    Example:
      >>> law = soft_best_of_n_law(jnp.array([0.5, 0.5]), jnp.array([0.0, jnp.log(3.0)]), n=2, beta=1.0)
      >>> [round(float(p), 4) for p in law]  # of two draws: 1/4 + 1/2 1/4, 1/4 + 1/2 3/4
      [0.375, 0.625]

    References:
      Verdun et al., 2025, arXiv:2505.03156 (the sampler).
    """
    check_positive("n", n)
    ref = as_float(ref)
    log_w = _narrow(ref, _exponents(ref, reward, beta)[0], n)[0]
    log_n, digits = jnp.log(jnp.asarray(n, ref.dtype)), -jnp.log(jnp.finfo(ref.dtype).eps)

    def integrand(v):
        log_s = v[..., None] + log_w[..., None, :]
        s = jnp.exp(log_s)
        return jnp.exp(log_s - s + (n - 1) * _log_laplace(ref, s)[..., None])

    # Below the first point lies at most exp(-digits) of any arm's integral, above the last exp(-(digits + 4)).
    first = jnp.full(log_w.shape[:-1], -digits - log_n)
    last = jnp.log(digits + 4) - jnp.min(log_w, axis=-1)
    return n * ref * _integrate(integrand, first, last, jnp.zeros_like(log_w))


@chex.dataclass(frozen=True, mappable_dataclass=False)
class PartitionLaw:
    """The plain log-partition of N draws, in expectation.

    Attributes:
      mean: ``E log Z_N``, nats, ``[*batch]``.
      bias: ``E log Z_N - log Z``, nats, ``[*batch]``; never positive.
    """

    mean: Float[Array, "*batch"]
    bias: Float[Array, "*batch"]


def log_partition_law(ref: _Probs, reward: _Probs, *, n: _Count, beta: _Beta) -> PartitionLaw:
    r"""Exact mean and bias of ``log Z_n = log (1/n) sum_i exp(r_i / beta)`` over n i.i.d. draws.

    .. math:: E \log \hat Z_n - \log Z = \int_0^\infty \bigl(e^{-nt} - M(t)^n\bigr) \frac{dt}{t}
              = -\frac{\chi^2}{2n} + O(n^{-2})

    (Frullani's integral; by Jensen the integrand is never positive, so nothing cancels.) By linearity the jackknife's
    mean is ``n law(n).mean - (n - 1) law(n - 1).mean``. Forward mode only.

    Args:
      ref: Probability of every arm, summing to 1.
      reward: Reward of every arm, reward units.
      n: How many draws, at least 1.
      beta: Strength of the KL term, > 0, reward units; a number, or one per row.

    Returns:
      `PartitionLaw` of mean and bias.

    Raises:
      ValueError: If ``n`` is a Python number below 1, or ``beta`` one that is not positive and finite.

    Example:
      >>> law = log_partition_law(jnp.array([0.5, 0.5]), jnp.array([0.0, 1.0]), n=1, beta=1.0)
      >>> round(float(law.mean), 6), round(float(law.bias), 6)  # one draw: E r = 1/2, and log Z = .620115
      (0.5, -0.120115)
    """
    check_positive("n", n)
    ref = as_float(ref)
    wide, top = _exponents(ref, reward, beta)
    log_w, narrowed = _narrow(ref, wide, n)
    log_z, log_n = _log_mean(ref, log_w), jnp.log(jnp.asarray(n, ref.dtype))
    log_a = log_w - log_z[..., None]
    excess = jnp.where(ref > 0, jnp.expm1(log_a), 0)
    furthest, digits = jnp.max(jnp.abs(excess), axis=-1), -jnp.log(jnp.finfo(ref.dtype).eps)

    def integrand(v):
        t = jnp.exp(v)
        log_m = _log_laplace(ref, jnp.exp(v[..., None] + log_a[..., None, :]))
        # log M + t = log E exp(-t (w - 1)) with E (w - 1) = 0: of second order while every exponent is small.
        close = t * furthest[..., None] < 1
        exponent = jnp.where(close, t, 0)[..., None] * -excess[..., None, :]
        second = jnp.sum(ref[..., None, :] * exp_remainder(exponent), axis=-1)
        gap = n * jnp.where(close, jnp.log1p(second), log_m + t)
        small = gap < 1
        product = -jnp.exp(-n * t) * jnp.expm1(jnp.where(small, gap, 0))
        return jnp.where(small, product, jnp.exp(-n * t) - jnp.exp(n * log_m))

    first = -digits / 2 - jnp.maximum(log_n, jnp.max(log_a, axis=-1))
    last = jnp.log(digits + 4) - log_n - jnp.min(log_a, axis=-1)
    bias = _integrate(integrand, first, last, jnp.zeros_like(log_z)) - narrowed
    return PartitionLaw(mean=top + log_z + bias, bias=bias + (log_z - _log_mean(ref, wide)))


def kl(p: _Probs, q: _Probs) -> Float[Array, "*batch"]:
    """``KL(p || q)``, nats; ``inf`` where ``q`` misses an arm of ``p``. Accurate however close the two are.

    Args:
      p: Probabilities, ``[*batch, K]``.
      q: Probabilities, ``[*batch, K]``.

    Returns:
      ``[*batch]``, never negative.
    """
    p, q = as_float(p), as_float(q)
    both = (p > 0) & (q > 0)
    p_both, q_both = jnp.where(both, p, 1), jnp.where(both, q, 1)
    ratio = (q_both - p_both) / p_both
    log_ratio = jnp.where(jnp.abs(ratio) < 0.5, jnp.log1p(ratio), jnp.log(q_both) - jnp.log(p_both))
    # p (q/p - 1 - log(q/p)): the two sums to 1 cancel, and every term is non-negative.
    return jnp.sum(jnp.where(both, p * exp_remainder(log_ratio), jnp.where(p > 0, jnp.inf, q)), axis=-1)


def total_variation(p: _Probs, q: _Probs) -> Float[Array, "*batch"]:
    """``sum |p - q| / 2``, in [0, 1]; arguments as for `kl`."""
    return jnp.sum(jnp.abs(as_float(p) - as_float(q)), axis=-1) / 2


def _exponents(ref, reward, beta):
    """``(r - max r) / beta`` (0 off the support), and ``max r / beta``."""
    check_positive("beta", beta)
    chex.assert_equal_shape([ref, reward])
    ref, reward = as_float(ref), as_float(reward)
    support = ref > 0
    top = jnp.max(reward, axis=-1, where=support, initial=-jnp.inf)
    top = jnp.where(jnp.any(support, axis=-1), top, 0)
    return divide(jnp.where(support, reward - top[..., None], 0), beta), top / beta


def _log_mean(ref, log_w):
    """``log E_ref w`` for ``w <= 1``; relative accuracy where all ``w`` are near 1."""
    below = jnp.sum(ref * jnp.expm1(log_w), axis=-1)
    near = below > -0.5
    log_ref = jnp.log(jnp.where(ref > 0, ref, 1))
    spread = jax.nn.logsumexp(log_ref + log_w, axis=-1, where=ref > 0)
    return jnp.where(near, jnp.log1p(jnp.where(near, below, 0)), spread)


def _log_laplace(ref, s):
    """``log E_ref exp(-s)`` at every grid point: ``s [..., G, K]`` to ``[..., G]``; finite, so that 0 times it is 0."""
    return jnp.maximum(_log_mean(jnp.broadcast_to(ref[..., None, :], s.shape), -s), -1e30)


def _excess(ref, reward, beta):
    """``w - 1``, with ``E_ref`` of it 0; 0 off the support."""
    ref = as_float(ref)
    log_w = _exponents(ref, reward, beta)[0]
    return jnp.where(ref > 0, jnp.expm1(log_w - _log_mean(ref, log_w)[..., None]), 0)


def _levels(ref, reward):
    """Reference mass strictly below, at, and strictly above the reward of every arm."""
    chex.assert_equal_shape([ref, reward])
    ref = as_float(ref)

    def row(ref, reward):
        order = jnp.argsort(reward)
        ranked = reward[order]
        level = jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), ranked[1:] != ranked[:-1]]))
        mass = jnp.zeros_like(ref).at[level].add(ref[order])
        below = jnp.concatenate([jnp.zeros(1, mass.dtype), jnp.cumsum(mass)[:-1]])
        above = jnp.concatenate([jnp.cumsum(mass[::-1])[-2::-1], jnp.zeros(1, mass.dtype)])
        back = jnp.zeros_like(level).at[order].set(level)
        return below[back], mass[back], above[back]

    reward = jnp.where(ref > 0, as_float(reward), 0)
    return jnp.vectorize(row, signature="(k),(k)->(k),(k),(k)")(ref, reward)


def _log_of_rest(above, up_to):
    """``log F`` from ``F`` and ``1 - F``, whichever is the more exact."""
    near = above < 0.5
    return jnp.where(near, jnp.log1p(-jnp.where(near, above, 0)), jnp.log(jnp.where(near, 1, up_to)))


def _narrow(ref, log_w, n):
    """Narrows gaps between successive ``log w`` that are too wide for more than one side to matter.

    Against the largest of n draws, what lies a gap of ``log n`` and all digits below it counts nothing: both laws see
    the order of the arms only. The mean of the largest ``log w`` moves by each narrowing times the chance that all
    draws lie below it, which is returned too.
    """
    widest = jnp.log(jnp.asarray(n, ref.dtype)) - 1.5 * jnp.log(jnp.finfo(ref.dtype).eps)
    order = jnp.argsort(log_w, axis=-1)
    ranked = jnp.take_along_axis(log_w, order, axis=-1)
    mass = jnp.take_along_axis(ref, order, axis=-1)
    over = jnp.maximum(jnp.diff(ranked, axis=-1) - widest, 0)
    lift = jnp.cumsum(over[..., ::-1], axis=-1)[..., ::-1]
    lift = jnp.concatenate([lift, jnp.zeros_like(ranked[..., :1])], axis=-1)
    below = jnp.cumsum(mass, axis=-1)[..., :-1]
    above = jnp.cumsum(mass[..., ::-1], axis=-1)[..., ::-1][..., 1:]
    moved = jnp.sum(over * jnp.exp(n * _log_of_rest(above, below)), axis=-1)
    back = jnp.argsort(order, axis=-1)
    return log_w + jnp.take_along_axis(lift, back, axis=-1), moved


def _integrate(integrand: Callable, first: Array, last: Array, zero: Array, *, chunk: int = 32) -> Array:
    """Trapezoidal rule over the real line, from where the integrand becomes visible to where it has vanished.

    The laws above are analytic for ``|Im v| < pi / 2`` and bounded there by their own value over ``cos(Im v)``: a step
    ``h`` costs a relative ``exp(-2 pi theta / h) / cos(theta)`` at any ``theta < pi / 2``, below 1e-16 for 0.2 and 1e-6
    for 0.5. The points come in chunks, so memory stays ``chunk`` times that of one point.
    """
    step = 0.2 if jnp.finfo(zero.dtype).bits > 32 else 0.5
    chunks = jnp.ceil(jnp.max((last - first) / (step * chunk), initial=0)).astype(jnp.int32) + 1
    offset = step * jnp.arange(chunk, dtype=zero.dtype)

    def body(i, total):
        v = (first + i * (step * chunk))[..., None] + offset.reshape(*[1] * first.ndim, chunk)
        return total + jnp.sum(integrand(v), axis=first.ndim)

    return step * jax.lax.fori_loop(0, chunks, body, zero)
