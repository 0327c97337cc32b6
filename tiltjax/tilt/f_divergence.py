r"""Tilts under other divergences: the optimum of ``E r - beta D_f``, with its normaliser inside the inverse link.

An f-divergence is :math:`D_f(\pi \| p_\text{ref}) = E_\text{ref} f(\pi / p_\text{ref})`, f convex and 0 at 1. One
table here gives f, its derivative (the link) and the inverse of that for the whole library; the losses that learn such
an optimum from pairs take their links from it. Total variation is missing on purpose: its f' is a step, which has no
inverse, so its optimum is the vertex of a linear program (mass leaves every candidate that is more than ``beta`` below
the best one, and goes there), not a tilt. Chi-squared has an inverse, but a finite f'(0): its optimum drops candidates.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_choice, check_fraction, check_positive
from tiltjax.ops.collectives import pmax, psum
from tiltjax.ops.logspace import divide, exp_remainder
from tiltjax.ops.masked import as_float, check_alike, masked_sum
from tiltjax.types import Array, AxisName, Bool, Float, Numeric

__all__ = ["DIVERGENCES", "MAX_EXPONENT", "FDivergenceTilt", "divergence_link", "f_divergence", "f_divergence_tilt"]

DIVERGENCES = ("alpha", "chi_squared", "forward_kl", "js", "mixed_chi_squared", "reverse_kl")
"""The names that ``divergence`` may take."""

MAX_EXPONENT = 80.0
"""Exponents of log-ratios are clamped here: ``exp(80)`` is finite in float32, and a loss of that size says enough."""

# Distances below the best candidate, in units of beta, are clamped here; the ratio there is 1e-30 or less.
_FURTHEST = 1e30


@chex.dataclass(frozen=True, mappable_dataclass=False)
class FDivergenceTilt:
    """The optimum of ``E r - beta D_f`` over the candidates.

    Attributes:
      weights: Its probability of every candidate, ``[*batch, N]``; sums to 1.
      lam: The multiplier of that sum, reward units, ``[*batch]``: ``r - beta f'(weights / ref)`` wherever weights > 0.
    """

    weights: Float[Array, "*batch N"]
    lam: Float[Array, "*batch"]


def f_divergence_tilt(
    reward: Float[Array, "*batch N"],
    ref_weights: Float[Array, "*batch N"] | None = None,
    *,
    beta: Numeric | Float[Array, "*batch"],
    divergence: str = "reverse_kl",
    alpha: Numeric = 0.5,
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> FDivergenceTilt:
    r"""Tilts candidates as far as any f-divergence from the reference allows.

    .. math:: \pi^* = \arg\max_\pi E_\pi r - \beta D_f(\pi \| p_\text{ref})
              = p_\text{ref} \max\left(0, (f')^{-1}\left(\frac{r - \lambda}{\beta}\right)\right), \qquad
              \sum_i \pi^*_i = 1

    The multiplier :math:`\lambda` stands inside the inverse link, which makes the optimum invariant to a shift of the
    rewards. Dividing :math:`p_\text{ref} (f')^{-1}(r / \beta)` by its sum instead is right for reverse KL only; for the
    others it depends on the origin of the rewards, or does not exist. Reverse KL is `tiltjax.tilt.weights.tilt`, with
    :math:`\lambda = \beta \log Z`. Only the clamp of "chi_squared" is ever active; its optimum is sparse, and its
    :math:`\lambda` is ``beta`` above that of `tiltjax.tilt.pessimism.pessimistic_threshold`.

    The unknown is the log-ratio of the best candidate, in ``[0, -log p_ref(best)]``, found by bisection and one Newton
    step. Derivatives are the exact ones of the implicit function, to first order, for ``reward``, ``ref_weights`` and
    ``beta``.

    Args:
      reward: Reward of every candidate, reward units.
      ref_weights: Reference mass of every candidate, >= 0, any sum; None means equal, as for draws from the reference.
      beta: Strength of the divergence, > 0, reward units; a number, or one per prompt.
      divergence: One of `DIVERGENCES`; for their f see `divergence_link`.
      alpha: Of the alpha divergence, in (0, 1]: 0 is the limit reverse KL, 1 is forward KL.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split; weights stay local.

    Returns:
      `FDivergenceTilt`; zeros for a row without a real candidate of positive mass.

    Raises:
      ValueError: If ``divergence`` is unknown, ``beta`` not positive and finite or ``alpha`` outside (0, 1], as Python
        numbers.

    Example:
      >>> reward = jnp.array([0.0, 1.0, 2.0])
      >>> for divergence in ("reverse_kl", "forward_kl", "chi_squared"):
      ...     t = f_divergence_tilt(reward, beta=0.5, divergence=divergence)
      ...     print([round(float(w), 4) for w in t.weights], round(float(t.lam), 4))
      [0.0159, 0.1173, 0.8668] 1.5222
      [0.0754, 0.1375, 0.7871] 1.7117
      [0.0, 0.1667, 0.8333] 1.25

    References:
      Wang et al., 2023, arXiv:2309.16240 (the form); Huang et al., 2024, arXiv:2407.13399 (mixed
      chi-squared); Huang et al., 2025, arXiv:2503.21878 (chi-squared).
    """
    check_choice("divergence", divergence, DIVERGENCES)
    check_positive("beta", beta)
    check_fraction("alpha", alpha)
    reward = as_float(reward)
    mass, total = _masses(reward, ref_weights, where, axis_name)
    real, some = mass > 0, total > 0
    top = pmax(jnp.max(reward, axis=-1, where=real, initial=-jnp.inf), axis_name)
    top = jnp.where(some, top, 0)
    below = jnp.minimum(divide(jnp.where(real, top[..., None] - jnp.where(real, reward, 0), 0), beta), _FURTHEST)
    share = mass / jnp.where(some, total, 1)[..., None]
    row, order = _TABLE[divergence], _order(divergence, alpha)

    # The solution, without gradient.
    fixed = jax.lax.stop_gradient((below, share, order))
    best = _best_log_ratio(row, *fixed, axis_name)
    fall = row.fall(best[..., None], fixed[0], fixed[2])
    log_ratio = best[..., None] + fall
    weights = jax.lax.stop_gradient(mass) * jnp.exp(fall)
    norm = masked_sum(weights, axis_name=axis_name)[..., None]
    weights = weights / (norm + (norm == 0))

    # The derivative of the implicit function as a first-order term: zeros that carry a gradient. Its coefficient is
    # p_ref / f''(u), and it moves the multiplier so that the weights still sum to 1.
    response = weights * jnp.exp(-jnp.where(weights > 0, row.log_slope(log_ratio, fixed[2]), 0))
    closer, added = fixed[0] - below, jnp.where(real, jnp.exp(log_ratio), 0) * (share - fixed[1])
    pushed, whole = psum((jnp.sum(response * closer + added, -1), jnp.sum(response, -1)), axis_name)
    shift = pushed / jnp.where(whole > 0, whole, 1)
    weights = weights + added + response * (closer - shift[..., None])
    lam = jnp.where(some, top - beta * (row.link(best, fixed[2]) - shift), 0)
    return FDivergenceTilt(weights=weights, lam=lam)


def f_divergence(
    weights: Float[Array, "*batch N"],
    ref_weights: Float[Array, "*batch N"] | None = None,
    *,
    divergence: str = "reverse_kl",
    alpha: Numeric = 0.5,
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""How far weights are from the reference, in any f-divergence.

    .. math:: D_f(\pi \| p_\text{ref}) = \sum_i p_{\text{ref},i}\, f\left(\frac{\pi_i}{p_{\text{ref},i}}\right)

    with the f of `divergence_link`: so "chi_squared" is *half* of Pearson's chi-squared (that of
    `tiltjax.tilt.divergence.chi_squared`), and "js" is twice the Jensen-Shannon divergence. Every term is non-negative
    and keeps its relative accuracy near ratio 1. Candidates that only one side has count as the limits of f say, which
    may be infinite (:math:`f(0)` for forward KL, :math:`f'(\infty)` for reverse KL and both chi-squareds).

    Args:
      weights: Non-negative, summing to 1 over the real candidates.
      ref_weights: Reference mass of every candidate, >= 0, any sum; None means equal.
      divergence: One of `DIVERGENCES`.
      alpha: Of the alpha divergence, in (0, 1].
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      The divergence, nats (chi-squared: a number), ``[*batch]``; 0 for a row without a real candidate. No gradient
      flows to weights that are exactly 0.

    Raises:
      ValueError: If ``divergence`` is unknown, or ``alpha`` a Python number outside (0, 1].

    Example:
      >>> weights = jnp.array([0.25, 0.75])
      >>> [round(float(f_divergence(weights, divergence=d)), 4) for d in ("reverse_kl", "forward_kl", "chi_squared")]
      [0.1308, 0.1438, 0.125]
    """
    check_choice("divergence", divergence, DIVERGENCES)
    check_fraction("alpha", alpha)
    weights = as_float(weights)
    mass, total = _masses(weights, ref_weights, where, axis_name)
    if where is not None:
        weights = jnp.where(where, weights, 0)
    row, order = _TABLE[divergence], _order(divergence, alpha)
    ref = mass / jnp.where(total <= 0, 1, total)[..., None]
    ours, theirs = ~(weights <= 0), ~(ref <= 0)  # NaN is no absence.
    both, only_ref, only_weights = ours & theirs, ~ours & theirs, ours & ~theirs
    ratio = jnp.where(both, weights, 1) / jnp.where(both, ref, 1)
    terms = jnp.where(both, ref * row.value(ratio, jnp.log(ratio), order), 0)
    terms = jnp.where(only_ref, jnp.where(only_ref, ref, 1) * row.at_zero(order), terms)
    terms = jnp.where(only_weights, jnp.where(only_weights, weights, 1) * row.at_infinity(order), terms)
    return jnp.where(total <= 0, 0, masked_sum(terms, axis_name=axis_name))


def divergence_link(
    log_ratio: Float[Array, "*batch"], *, divergence: str, alpha: Numeric = 0.5
) -> Float[Array, "*batch"]:
    r"""The derivative :math:`f'(u)` of an f-divergence at :math:`u = e^a`: what takes the log-ratio's place in f-DPO.

    =================  ===================================  =============================  ==================
    divergence         f(u)                                 f'(u), 0 at the reference      derivative in ``a``
    =================  ===================================  =============================  ==================
    reverse_kl         u log u                              a                              1
    forward_kl         -log u                               1 - exp(-a)                    exp(-a)
    js                 u log u - (u + 1) log((u + 1) / 2)   log 2 + log sigma(a)           sigma(-a)
    alpha              (u^(1-c) - (1-c) u - c) / (c (c-1))  (1 - exp(-c a)) / c            exp(-c a)
    chi_squared        (u - 1)^2 / 2                        exp(a) - 1                     exp(a)
    mixed_chi_squared  (u - 1)^2 / 2 + u log u              exp(a) - 1 + a                 exp(a) + 1
    =================  ===================================  =============================  ==================

    with ``c = alpha``. An additive constant in f' cancels in every loss of a difference of two links, and only such
    losses may use a link other than reverse KL: their reward is known up to a constant of the prompt. They can recover
    the reward only where f'(0) is infinite, so not with "chi_squared", whose optimum drops candidates. Exponents are
    clamped at 80, beyond which the gradient is 0.

    Args:
      log_ratio: ``log(pi / p_ref)``, nats.
      divergence: One of `DIVERGENCES`.
      alpha: Of the alpha divergence, in (0, 1].

    Returns:
      The link, the shape of ``log_ratio``.

    Raises:
      ValueError: If ``divergence`` is unknown, or ``alpha`` a Python number outside (0, 1].

    Example:
      >>> [round(float(divergence_link(jnp.float32(1.0), divergence=d)), 4) for d in ("forward_kl", "js", "alpha")]
      [0.6321, 0.3799, 0.7869]

    References:
      Wang et al., 2023, arXiv:2309.16240, Table 1; Huang et al., 2024, arXiv:2407.13399 (mixed chi-squared).
    """
    check_choice("divergence", divergence, DIVERGENCES)
    check_fraction("alpha", alpha)
    return _TABLE[divergence].link(as_float(log_ratio), _order(divergence, alpha))


class _Divergence(NamedTuple):
    """One row of the table: with log-ratio ``a`` at ratio ``u``, and ``c`` the order of an alpha divergence.

    Attributes:
      value: ``(u, a, c) -> f(u)``, plus the multiple of ``u - 1`` (which sums to 0) that makes it non-negative.
      at_zero: ``c -> f(0)``.
      link: ``(a, c) -> f'(u)``.
      at_infinity: ``c -> f'(inf)``.
      log_slope: ``(a, c) -> log`` of the derivative of the link in ``a``, which is ``u f''(u)``.
      fall: ``(a, d, c) -> a' - a <= 0`` such that the link at ``a'`` is ``d >= 0`` below the one at ``a``; -inf where
        the clamp is active. It is the inverse link, in a form that never cancels.
    """

    value: Callable[..., Array]
    at_zero: Callable[..., Any]
    link: Callable[..., Array]
    at_infinity: Callable[..., Any]
    log_slope: Callable[..., Array]
    fall: Callable[..., Array]


def _order(divergence: str, alpha: Numeric) -> Numeric:
    return alpha if divergence == "alpha" else 1.0


def _kl_value(u: Array, a: Array, _: Numeric) -> Array:
    return u * exp_remainder(-a)


def _alpha_value(u: Array, a: Array, c: Numeric) -> Array:
    # With h(x) = e^x - 1 - x, f is u (h(-a) - h(-ca) / c) / (1 - c), and the same with a, c, u for -a, 1 - c, 1.
    upper = jnp.asarray(c) > 0.5
    x, k = jnp.where(upper, a, -a), jnp.where(upper, 1 - c, c)
    part = jnp.where(k > 0, exp_remainder(k * x) / jnp.where(k > 0, k, 1), 0)
    return jnp.where(upper, 1, u) * (exp_remainder(x) - part) / (1 - k)


def _alpha_link(a: Array, c: Numeric) -> Array:
    # expm1, and not exp, so that small alpha is reverse KL to rounding.
    return -jnp.expm1(jnp.minimum(-c * a, MAX_EXPONENT)) / c


def _alpha_fall(a: Array, d: Array, c: Numeric) -> Array:
    return -jnp.log1p(jnp.minimum(c * d * jnp.exp(c * a), _FURTHEST)) / c


def _js_value(u: Array, a: Array, _: Numeric) -> Array:
    half = (u - 1) / 2  # The middle m = 1 + half; two KLs to it, u log(u / m) and log(1 / m).
    return u * exp_remainder(jnp.log1p(-half / u)) + exp_remainder(jnp.log1p(half))


def _js_link(a: Array, _: Numeric) -> Array:
    near = -jnp.log1p(jnp.expm1(-jnp.clip(a, -1, 1)) / 2)  # To rounding where the link is near 0.
    return jnp.where(jnp.abs(a) < 1, near, math.log(2) + jax.nn.log_sigmoid(a))


def _js_fall(a: Array, d: Array, _: Numeric) -> Array:
    return -d - jnp.log1p(-jnp.expm1(-d) * jnp.exp(a))


def _chi_squared_value(u: Array, _a: Array, _: Numeric) -> Array:
    return jnp.square(u - 1) / 2


def _chi_squared_link(a: Array, _: Numeric) -> Array:
    return jnp.expm1(jnp.minimum(a, MAX_EXPONENT))


def _chi_squared_fall(a: Array, d: Array, _: Numeric) -> Array:
    lost = d * jnp.exp(-a)
    return jnp.where(lost < 1, jnp.log1p(-jnp.where(lost < 1, lost, 0)), -jnp.inf)


def _mixed_fall(a: Array, d: Array, _: Numeric) -> Array:
    """Root of ``x + u (e^x - 1) + d``, convex in ``x``: Newton's method from the right."""
    u = jnp.exp(a)
    y = a + u - d  # a + x is the logarithm of Lambert's W(e^y), below both y and log y.
    first = jnp.where(y > 1, jnp.log(jnp.where(y > 1, y, 1)), y) - a
    return jax.lax.fori_loop(0, 7, lambda _, x: x - (x + u * jnp.expm1(x) + d) / (1 + u * jnp.exp(x)), first)


_ALPHA = _Divergence(
    value=_alpha_value,
    at_zero=lambda c: jnp.divide(1.0, 1 - c),
    link=_alpha_link,
    at_infinity=lambda c: 1 / c,
    log_slope=lambda a, c: -c * a,
    fall=_alpha_fall,
)
_TABLE = {
    "reverse_kl": _Divergence(
        value=_kl_value,
        at_zero=lambda _: 1.0,
        link=lambda a, _: a,
        at_infinity=lambda _: jnp.inf,
        log_slope=lambda a, _: jnp.zeros_like(a),
        fall=lambda a, d, _: -d,
    ),
    "forward_kl": _ALPHA,
    "js": _Divergence(
        value=_js_value,
        at_zero=lambda _: math.log(2),
        link=_js_link,
        at_infinity=lambda _: math.log(2),
        log_slope=lambda a, _: jax.nn.log_sigmoid(-a),
        fall=_js_fall,
    ),
    "alpha": _ALPHA,
    "chi_squared": _Divergence(
        value=_chi_squared_value,
        at_zero=lambda _: 0.5,
        link=_chi_squared_link,
        at_infinity=lambda _: jnp.inf,
        log_slope=lambda a, _: a,
        fall=_chi_squared_fall,
    ),
    "mixed_chi_squared": _Divergence(
        value=lambda u, a, c: _chi_squared_value(u, a, c) + _kl_value(u, a, c),
        at_zero=lambda _: 1.5,
        link=lambda a, c: _chi_squared_link(a, c) + a,
        at_infinity=lambda _: jnp.inf,
        log_slope=lambda a, _: jax.nn.softplus(a),
        fall=_mixed_fall,
    ),
}


def _masses(like: Array, ref_weights: Array | None, where: Array | None, axis_name: AxisName) -> tuple[Array, Array]:
    """Reference mass of every candidate, 0 where masked, and its sum."""
    mass = jnp.ones_like(like) if ref_weights is None else jnp.asarray(ref_weights, like.dtype)
    check_alike(where, like, mass)
    mass = mass if where is None else jnp.where(where, mass, 0)
    return mass, psum(jnp.sum(mass, axis=-1), axis_name)


def _best_log_ratio(row: _Divergence, below: Array, share: Array, order: Numeric, axis_name: AxisName) -> Array:
    """The log-ratio of the best candidate at which the weights sum to 1."""

    def surplus(best):
        """``sum pi - 1``, without cancellation where all ratios are near 1; and every ``log(pi / ref)``."""
        log_ratio = best[..., None] + row.fall(best[..., None], below, order)
        return masked_sum(share * jnp.expm1(log_ratio), axis_name=axis_name), log_ratio

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        short = surplus(middle)[0] < 0
        return jnp.where(short, middle, low), jnp.where(short, high, middle)

    tied = masked_sum(jnp.where(below == 0, share, 0), axis_name=axis_name)
    high = jnp.minimum(-jnp.log(jnp.where(tied > 0, tied, 1)), MAX_EXPONENT)
    # Written with `where` so that the carry varies over the same mapped axes as the rewards.
    low = jnp.where(high > 0, 0, jnp.zeros_like(high))
    low, high = jax.lax.fori_loop(0, jnp.finfo(high.dtype).nmant + 7, halve, (low, high))
    best = (low + high) / 2
    value, log_ratio = surplus(best)
    # A ratio u moves with the best one, U, as their links move together: d log u / d log U = slope(U) / slope(u).
    gain = row.log_slope(best[..., None], order) - row.log_slope(log_ratio, order)
    kept = log_ratio > -jnp.inf
    rise = jnp.where(kept, share * jnp.exp(jnp.where(kept, log_ratio + gain, 0)), 0)
    rise = masked_sum(rise, axis_name=axis_name)
    return best - value / jnp.where(rise > 0, rise, 1)
