"""The strength of a tilt from what it should do: ``beta`` for a wanted KL, or a wanted effective sample size.

One ``beta`` per prompt, so that prompts with wide and narrow rewards are tilted equally far.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_per_row, check_positive
from tiltjax.tilt.divergence import Deviation
from tiltjax.types import Array, AxisName, Bool, Float, Numeric

__all__ = ["beta_for_ess", "beta_for_kl"]

# beta is sought within [exp(-L), exp(L)] times the range of the rewards of its prompt.
_LOG_BRACKET = 18.0


def beta_for_kl(
    reward: Float[Array, "*batch N"],
    *,
    kl: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""The ``beta`` whose tilt of these candidates is ``kl`` nats away from uniform.

    .. math:: \sum_i w_i(\beta) \log(N w_i(\beta)) = \mathrm{kl}

    The left side falls from ``log(N / ties at the top)`` to 0 as ``beta`` grows, so bisection of ``log beta`` finds it.
    Shifting the rewards changes nothing; scaling them scales ``beta``.

    Args:
      reward: Reward of every candidate, drawn from the reference, reward units.
      kl: Wanted divergence, > 0, nats; a number, or one per prompt.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      ``beta``, reward units, ``[*batch]``, without gradient. Targets out of reach: ``inf`` (the uniform weights) where
      all rewards are equal or no candidate is real; ``exp(-18)`` times the range of the rewards (best-of-N to rounding)
      where ``kl`` is ``log(N / ties)`` or more.

    Raises:
      ValueError: If ``kl`` is a Python number that is not positive and finite.

    Example:
      >>> from tiltjax.tilt.divergence import tilt_kl
      >>> reward = jnp.array([0.0, 1.0, 2.0, 5.0])
      >>> beta = beta_for_kl(reward, kl=0.5)
      >>> round(float(tilt_kl(reward, beta=beta)), 4)
      0.5
    """
    check_positive("kl", kl)
    deviation = Deviation.of(jax.lax.stop_gradient(reward), where=where, axis_name=axis_name)
    return _solve(deviation, lambda beta: deviation.kl(beta, axis_name=axis_name), kl)


def beta_for_ess(
    reward: Float[Array, "*batch N"],
    *,
    ess: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""The ``beta`` whose tilt leaves these candidates an effective sample size of ``ess``.

    .. math:: \frac{1}{\sum_i w_i(\beta)^2} = \mathrm{ess}

    The left side rises from the number of ties at the top to N as ``beta`` grows; bisection of ``log beta`` finds it.
    Shifting the rewards changes nothing; scaling them scales ``beta``.

    Args:
      reward: Reward of every candidate, drawn from the reference, reward units.
      ess: Wanted effective sample size, at least 1; a number, or one per prompt.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      ``beta``, reward units, ``[*batch]``, without gradient. Targets out of reach: ``inf`` (the uniform weights) where
      ``ess`` is N or more or all rewards are equal; ``exp(-18)`` times the range of the rewards (best-of-N to rounding)
      where ``ess`` is the number of ties or fewer.

    Raises:
      ValueError: If ``ess`` is a Python number below 1.

    Example:
      >>> from tiltjax.tilt.weights import tilt
      >>> reward = jnp.array([0.0, 1.0, 2.0, 5.0])
      >>> beta = beta_for_ess(reward, ess=2.0)
      >>> round(float(tilt(reward, beta=beta).ess), 4)
      2.0
    """
    check_at_least("ess", ess, 1.0)
    deviation = Deviation.of(jax.lax.stop_gradient(reward), where=where, axis_name=axis_name)
    # ESS = N / (1 + chi2), in the form that does not cancel where ESS is nearly N.
    target = (deviation.count - ess) / ess
    return _solve(deviation, lambda beta: deviation.chi_squared(beta, axis_name=axis_name), target)


def _solve(deviation: Deviation, fall: Callable, target: Numeric | Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Bisection in ``log(beta / span)`` for ``fall(beta) = target``, ``fall`` decreasing."""
    check_per_row("the target", target, deviation.span.shape)
    tiltable = (deviation.span > 0) & (target > 0)
    span = jnp.where(tiltable, deviation.span, 1)

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        too_far = fall(span * jnp.exp(middle)) > target
        return jnp.where(too_far, middle, low), jnp.where(too_far, high, middle)

    # Written with `where` so that the carry varies over the same mapped axes as the rewards.
    high = jnp.where(tiltable, _LOG_BRACKET, _LOG_BRACKET).astype(span.dtype)
    _, high = jax.lax.fori_loop(0, jnp.finfo(span.dtype).nmant + 7, halve, (-high, high))
    unreachable = jnp.where(jnp.isnan(deviation.span + target), jnp.nan, jnp.inf)
    return jax.lax.stop_gradient(jnp.where(tiltable, span * jnp.exp(high), unreachable))
