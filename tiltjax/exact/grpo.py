"""What GRPO does to a probability of success: its map from round to round, its finite groups, its expected gradient.

For a reward of 0 or 1 and a policy of success probability p, the whitened advantage of an infinite group is
``(1 - p) / s`` on success and ``-p / s`` on failure, ``s^2 = p (1 - p) + eps``. The exact optimum of the KL-regularised
round is the tilt by that advantage, and only p survives of it: GRPO is a one-dimensional map,

    logit h(p) = logit ref + 1 / (beta s)

with fixed points, cycles and chaos. Since the last term is positive, ``h(p) > ref`` everywhere: every fixed point is
above the reference. All of it is computed in log-odds, where neither end loses digits.
"""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlog1py, xlogy

from tiltjax.losses.policy_gradient import reinforce_loss
from tiltjax.ops.checks import check_at_least, check_choice, check_positive
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Bool, Float, Numeric

__all__ = [
    "Cycles",
    "FixedPoints",
    "expected_advantage",
    "expected_gradient",
    "fixed_points",
    "lyapunov_exponent",
    "orbit",
    "success_map",
    "success_slope",
    "two_cycles",
    "uniqueness_beta",
]

_Probability = Numeric | Float[Array, "*batch"]
_Advantage = Callable[[Any], Any]


def success_map(
    p: _Probability,
    ref: _Probability,
    *,
    beta: Numeric,
    eps: Numeric,
    scale: str = "variance",
    kl_to: str = "reference",
) -> Float[Array, "*batch"]:
    r"""Success probability after a round of GRPO, exactly optimised.

    .. math:: h(p) = \mathrm{sigmoid}\left( \mathrm{logit}(p_\text{ref}) + \frac{1}{\beta \sqrt{p (1 - p) + \epsilon}}
              \right)

    Args:
      p: Success probability of the policy that the advantages are from.
      ref: That of the reference, in (0, 1).
      beta: Strength of the KL term, > 0, in units of the advantage.
      eps: >= 0, added to the variance of the reward; at 0, p = 0 and p = 1 go to 1.
      scale: ``"variance"`` as above; ``"none"`` (Dr. GRPO) has ``1 / beta`` in place of the last term. As in
        `tiltjax.advantages.group_normalised`.
      kl_to: ``"reference"``, or ``"previous"``: the KL term is to the policy of the round before, whose log-odds take
        the place of the reference's. Then p only ever grows.

    Returns:
      ``[*batch]``.

    Raises:
      ValueError: If an option that is a Python value is out of its range.

    Example:
      >>> round(float(success_map(0.5, 0.5, beta=2 / jnp.log(3.0), eps=0.0)), 6)  # odds of 1 times exp(2 / beta)
      0.75

    References:
      Mroueh, 2025, arXiv:2503.06639.
    """
    ref = _check(ref, beta, eps, scale, kl_to)
    p = jnp.asarray(p, ref.dtype)
    return jax.nn.sigmoid(_next(_logit(p), _logit(ref), beta, eps, scale, kl_to))


def success_slope(
    p: _Probability,
    ref: _Probability,
    *,
    beta: Numeric,
    eps: Numeric,
    scale: str = "variance",
    kl_to: str = "reference",
) -> Float[Array, "*batch"]:
    r"""Derivative of `success_map` at p.

    .. math:: h'(p) = \frac{h (1 - h) (2 p - 1)}{2 \beta\, (p (1 - p) + \epsilon)^{3/2}}

    A fixed point attracts its neighbours if it is less than 1 there in absolute value, and repels them if more.
    Arguments as for `success_map`.
    """
    ref = _check(ref, beta, eps, scale, kl_to)
    p = jnp.asarray(p, ref.dtype)
    h = success_map(p, ref, beta=beta, eps=eps, scale=scale, kl_to=kl_to)
    variance = p * (1 - p)
    rise = jnp.zeros_like(p) if scale == "none" else (2 * p - 1) / (2 * beta * (variance + eps) ** 1.5)
    return h * (1 - h) * (rise if kl_to == "reference" else rise + 1 / variance)


@chex.dataclass(frozen=True, mappable_dataclass=False)
class FixedPoints:
    """Every solution of ``h(p) = p``, lowest first.

    Attributes:
      p: Success probabilities, ``[*batch, 3]``.
      logit: Their log-odds, exact where p rounds to 1, ``[*batch, 3]``.
      slope: ``h'(p)``, ``[*batch, 3]``.
      where: True for those that exist, ``[*batch, 3]``; the others are 0.
    """

    p: Float[Array, "*batch 3"]
    logit: Float[Array, "*batch 3"]
    slope: Float[Array, "*batch 3"]
    where: Bool[Array, "*batch 3"]

    @property
    def stable(self) -> Bool[Array, "*batch 3"]:
        """True where neighbours are attracted."""
        return self.where & (jnp.abs(self.slope) < 1)


def uniqueness_beta(eps: Numeric) -> Float[Array, "..."]:
    r"""The ``beta`` from which on `success_map` has one fixed point, whatever the reference.

    .. math:: \max_v \frac{v \sqrt{1 - 4 v}}{2 (v + \epsilon)^{3/2}}, \quad \text{attained at} \quad
              v = \frac{2 \epsilon}{1 + 12 \epsilon}

    In log-odds the map climbs nowhere by more than this over ``beta``. Below it, some references have three.

    Args:
      eps: > 0.
    """
    check_positive("eps", eps)
    eps = as_float(jnp.asarray(eps))
    return _gap_slope(_steepest(eps), eps)


def fixed_points(ref: _Probability, *, beta: Numeric, eps: Numeric) -> FixedPoints:
    r"""All fixed points of `success_map`: one or three, none of them missed.

    In log-odds :math:`x`, :math:`h(x) - x` changes direction at most twice, where the slope of the map is 1: on either
    side of the one inflection, which is known in closed form. Each of the three pieces is bisected.

    Args:
      ref: Success probability of the reference, in (0, 1).
      beta: Strength of the KL term, > 0.
      eps: > 0, added to the variance of the reward.

    Returns:
      `FixedPoints`.

    Raises:
      ValueError: If a Python number is out of its range.

    Example:
      >>> found = fixed_points(0.1, beta=1.0, eps=0.01)
      >>> [round(float(p), 4) for p in found.p], found.stable.tolist()
      ([0.4442, 0.9855, 0.9995], [True, False, True])
    """
    check_positive("eps", eps)
    ref = _check(ref, beta, eps, "variance", "reference")
    origin, beta, eps = _logit(ref), jnp.asarray(beta, ref.dtype), jnp.asarray(eps, ref.dtype)

    column = origin[..., None]

    def excess(x):
        return column + _gap(x, eps) / beta - x

    def climbs(x):
        return _gap_slope(x, eps) - beta

    low, high = column, column + 1 / (beta * jnp.sqrt(eps))
    bend = jnp.broadcast_to(_steepest(eps), column.shape)
    # The slope is at most exp(-x) / (2 eps^1.5): below beta from here on.
    flat = bend + jnp.maximum(-jnp.log(2 * beta * eps**1.5), 0)
    signs = jnp.asarray([1.0, -1.0], ref.dtype) * jnp.ones_like(column)
    ends = jnp.concatenate([jnp.zeros_like(bend), bend], -1), jnp.concatenate([bend, flat], -1)
    turns = jnp.where(climbs(bend) > 0, _bisect(lambda x: signs * climbs(x), *ends), bend)
    edges = jnp.concatenate([low, jnp.clip(turns, low, high), high], axis=-1)
    signs = jnp.asarray([-1.0, 1.0, -1.0], ref.dtype) * jnp.ones_like(column)
    logit = _bisect(lambda x: signs * excess(x), edges[..., :-1], edges[..., 1:])
    down, up = excess(edges)[..., 1], excess(edges)[..., 2]
    where = jnp.stack([down <= 0, (down < 0) & (up > 0), up > 0], axis=-1)
    order = jnp.argsort(~where, axis=-1, stable=True)
    where, logit = (jnp.take_along_axis(x, order, axis=-1) for x in (where, logit))
    clean = (jnp.where(where, x, 0) for x in (jax.nn.sigmoid(logit), logit, _gap_slope(logit, eps) / beta))
    p, logit, slope = clean
    return FixedPoints(p=p, logit=logit, slope=slope, where=where)


def orbit(
    p: _Probability,
    ref: _Probability,
    *,
    beta: Numeric,
    eps: Numeric,
    steps: int,
    scale: str = "variance",
    kl_to: str = "reference",
) -> Float[Array, "..."]:
    """Success probability over rounds of `success_map`, the start included: ``[steps + 1, *batch]``.

    Arguments as for `success_map`; ``steps`` is the number of rounds, at least 1.
    """
    check_at_least("steps", steps, 1)
    return jax.nn.sigmoid(_logits(p, _check(ref, beta, eps, scale, kl_to), beta, eps, steps, scale, kl_to))


def lyapunov_exponent(
    p: _Probability, ref: _Probability, *, beta: Numeric, eps: Numeric, steps: int, burn_in: int = 1000
) -> Float[Array, "*batch"]:
    """Mean of ``log |h'|`` along an orbit: the rate, in nats a round, at which neighbours part (> 0: chaos) or join.

    Args:
      p: Start of the orbit.
      ref: Success probability of the reference, in (0, 1).
      beta: Strength of the KL term, > 0.
      eps: > 0, added to the variance of the reward.
      steps: How many rounds to average, at least 1.
      burn_in: How many to leave out before.

    Returns:
      ``[*batch]``; the same in log-odds and in p, but for a constant over ``steps``.

    Raises:
      ValueError: If a Python number is out of its range.
    """
    check_positive("eps", eps)
    check_at_least("steps", steps, 1)
    check_at_least("burn_in", burn_in, 0)
    ref = _check(ref, beta, eps, "variance", "reference")
    x = _logits(p, ref, beta, eps, burn_in + steps, "variance", "reference")[burn_in:-1]
    slope = jnp.maximum(jnp.abs(_gap_slope(x, eps)) / beta, jnp.finfo(x.dtype).tiny)
    return jnp.mean(jnp.log(slope), axis=0)


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Cycles:
    """Orbits of period 2 of a `success_map`.

    Attributes:
      p: Lower and upper success probability of each, ``[cycles, 2]``.
      slope: Derivative of two rounds along each, ``[cycles]``.
    """

    p: Float[Array, "cycles 2"]
    slope: Float[Array, " cycles"]

    @property
    def stable(self) -> Bool[Array, " cycles"]:
        """True where neighbours are attracted."""
        return np.abs(self.slope) < 1


def two_cycles(ref: float, *, beta: float, eps: float, grid: int = 20_001) -> Cycles:
    """Orbits of period 2, by the sign of two rounds less the identity over a grid of log-odds, then bisection.

    On the host, not for `jax.jit`. Two cycles closer than a step of the grid are missed.

    Args:
      ref: Success probability of the reference, in (0, 1).
      beta: Strength of the KL term, > 0.
      eps: > 0, added to the variance of the reward.
      grid: Points of the grid, at least 2.

    Returns:
      `Cycles`, of NumPy arrays, by their lower point.

    Raises:
      ValueError: If an argument is out of its range.
    """
    check_positive("eps", eps)
    check_at_least("grid", grid, 2)
    origin = _logit(_check(ref, beta, eps, "variance", "reference"))
    points, miss = map(np.asarray, _two_rounds(origin, beta, eps, grid))
    turns = np.flatnonzero(np.sign(miss[1:]) != np.sign(miss[:-1]))
    found = _cycles(points[turns], points[turns + 1], np.sign(miss[turns + 1]), origin, beta, eps)
    lower, rise, p, slope = map(np.asarray, found)
    real = rise > (1e-6 if lower.dtype == np.float64 else 1e-2)
    return Cycles(p=p[real], slope=slope[real])


def expected_advantage(
    p: _Probability, advantage: _Advantage, *, size: int
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    r"""Mean advantage of a success and of a failure in a group of finite size, by the binomial law of the others.

    .. math:: E[A \mid r = 1] = \sum_k \mathrm{Bin}(k; G - 1, p)\, A_1(k + 1), \qquad
              E[A \mid r = 0] = \sum_k \mathrm{Bin}(k; G - 1, p)\, A_0(k)

    where ``A(s)`` is the kernel's advantage in a group with ``s`` successes. Of a success in a large group it is
    :math:`\sqrt{(1 - p)/p}` under `tiltjax.advantages.group_normalised`; small groups fall short of it where success is
    rare, since a group without any teaches nothing.

    Args:
      p: Success probability.
      advantage: Rewards ``[..., G]`` to advantages ``[..., G]``, such as a kernel of `tiltjax.advantages`.
      size: G, at least 1.

    Returns:
      Of a success and of a failure, each ``[*batch]``; ``p`` times the first and ``1 - p`` times the second add up to
      0 if the advantages of every group do.

    Raises:
      ValueError: If ``size`` is below 1.

    Example:
      >>> from tiltjax.advantages import leave_one_out
      >>> [round(float(a), 4) for a in expected_advantage(0.25, leave_one_out, size=8)]  # 1 - p and -p
      [0.75, -0.25]
    """
    check_at_least("size", size, 1)
    p = as_float(jnp.asarray(p))
    count = jnp.arange(size + 1)
    rewards = (jnp.arange(size)[None] < count[:, None]).astype(p.dtype)
    values = advantage(rewards)
    ways = jnp.asarray([math.log(math.comb(size - 1, k)) for k in range(size)], p.dtype)
    k = count[:-1].astype(p.dtype)

    def law(p):
        return jnp.exp(ways + xlogy(k, p) + xlog1py(size - 1 - k, -p))

    chance = jnp.vectorize(law, signature="()->(n)")(p)
    return chance @ values[1:, 0], chance @ values[:-1, -1]


def expected_gradient(
    logits: Float[Array, " K"], reward: Float[Array, " K"], advantage: _Advantage, *, size: int
) -> Float[Array, " K"]:
    r"""Exact mean of a policy gradient over all groups of ``size`` draws from a softmax policy over K arms.

    .. math:: E_{y_1, \dots, y_G \sim \pi} \left[ \frac1G \sum_i A_i \nabla \log \pi(y_i) \right]

    by enumeration, through `tiltjax.losses.policy_gradient.reinforce_loss`. Unbiased advantages give
    :math:`\nabla E_\pi r = \pi (r - E_\pi r)`.

    Args:
      logits: Of the policy.
      reward: Reward of every arm.
      advantage: Rewards ``[..., G]`` to advantages ``[..., G]``.
      size: G, at least 1; there are ``K^size`` groups.

    Returns:
      Gradient with respect to ``logits``, of ascent, ``[K]``.

    Raises:
      ValueError: If ``size`` is below 1, or there would be more than a million groups.
    """
    check_at_least("size", size, 1)
    arms = logits.shape[-1]
    if arms**size > 1_000_000:
        raise ValueError(f"size must leave at most 1000000 groups of {arms} arms, got {size!r}")
    groups = np.array(list(itertools.product(range(arms), repeat=size)))
    logits = as_float(logits)
    chance = jnp.prod(jax.nn.softmax(logits)[groups], axis=-1)
    weights = jax.lax.stop_gradient(advantage(as_float(reward)[groups]))

    def objective(logits):
        logp = jax.nn.log_softmax(logits)[groups]
        loss = reinforce_loss(logp[..., None], weights, jnp.full((*groups.shape, 1), True))
        return -jnp.sum(chance * jnp.mean(loss, axis=(-2, -1)))

    return jax.grad(objective)(logits)


def _check(ref, beta, eps, scale, kl_to):
    check_positive("beta", beta)
    check_at_least("eps", eps, 0)
    check_choice("scale", scale, ("variance", "none"))
    check_choice("kl_to", kl_to, ("reference", "previous"))
    if isinstance(ref, int | float) and not 0 < ref < 1:
        raise ValueError(f"ref must lie in (0, 1), got {ref!r}")
    return as_float(jnp.asarray(ref))


def _logit(p):
    return jnp.log(p) - jnp.log1p(-p)


def _gap(x, eps):
    """Advantage of a success less that of a failure, at log-odds x."""
    return jax.lax.rsqrt(jax.nn.sigmoid(x) * jax.nn.sigmoid(-x) + eps)


def _gap_slope(x, eps):
    variance = jax.nn.sigmoid(x) * jax.nn.sigmoid(-x)
    return variance * jnp.tanh(x / 2) / (2 * (variance + eps) ** 1.5)


def _steepest(eps):
    """Log-odds at which `_gap_slope` is largest: there the variance of the reward is ``2 eps / (1 + 12 eps)``."""
    return 2 * jnp.arccosh(jnp.sqrt((1 + 12 * eps) / (8 * eps)))


def _next(x, origin, beta, eps, scale, kl_to):
    gap = jnp.ones_like(x) if scale == "none" else _gap(x, eps)
    return (origin if kl_to == "reference" else x) + gap / beta


def _logits(p, ref, beta, eps, steps, scale, kl_to):
    origin = _logit(ref)
    start = jnp.broadcast_to(_logit(jnp.asarray(p, ref.dtype)), jnp.broadcast_shapes(jnp.shape(p), jnp.shape(ref)))

    def step(x, _):
        x = _next(x, origin, beta, eps, scale, kl_to)
        return x, x

    return jnp.concatenate([start[None], jax.lax.scan(step, start, length=steps)[1]])


@functools.partial(jax.jit, static_argnames="grid")
def _two_rounds(origin, beta, eps, grid):
    """A grid of log-odds, and by how much two rounds move each point."""
    points = jnp.linspace(origin, origin + 1 / (beta * eps**0.5), grid)
    return points, _round(_round(points, origin, beta, eps), origin, beta, eps) - points


@jax.jit
def _cycles(low, high, sign, origin, beta, eps):
    """Where two rounds come back between ``low`` and ``high``: log-odds, move of one round, both p, slope of two."""
    x = _bisect(lambda x: sign * (_round(_round(x, origin, beta, eps), origin, beta, eps) - x), low, high)
    upper = _round(x, origin, beta, eps)
    p = jax.nn.sigmoid(jnp.stack([x, upper], axis=-1))
    return x, upper - x, p, _gap_slope(x, eps) * _gap_slope(upper, eps) / beta**2


def _round(x, origin, beta, eps):
    return origin + _gap(x, eps) / beta


def _bisect(rising, low, high):
    """Where a function that rises from below 0 to above crosses it."""

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        below = rising(middle) < 0
        return jnp.where(below, middle, low), jnp.where(below, high, middle)

    low, high = jax.lax.fori_loop(0, 100, halve, (low, high))
    return (low + high) / 2
