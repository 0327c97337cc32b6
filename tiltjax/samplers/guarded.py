r"""Resampling that guards diversity: what a model may be fine-tuned on without forgetting all but a few completions.

Three guards on ``exp(reward / beta)``: a ``beta`` that leaves a wanted effective sample size, a cap on how often one
candidate is copied, and systematic draws, whose counts stay within 1 of their means.
"""

import chex
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_positive
from tiltjax.ops.masked import as_float, masked_sum
from tiltjax.samplers.resample import counts, resample
from tiltjax.tilt.temperature import beta_for_ess
from tiltjax.tilt.weights import tilt
from tiltjax.types import Array, Bool, Float, Int, Numeric, PRNGKey

__all__ = ["Guarded", "cap_weights", "guarded_resample"]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Guarded:
    """Chosen candidates, and how diverse they are: report the figures beside the reward.

    Attributes:
      indices: Of the chosen candidates, ``[*batch, num]``.
      weights: What they were drawn from, capped, ``[*batch, N]``; sums to 1.
      beta: That the rewards were divided by, reward units, ``[*batch]``.
      ess: Effective sample size of the capped weights, ``[*batch]``.
      distinct: How many different candidates were chosen, ``[*batch]``.
      most: How often the one chosen most often was, ``[*batch]``.
    """

    indices: Int[Array, "*batch num"]
    weights: Float[Array, "*batch N"]
    beta: Float[Array, "*batch"]
    ess: Float[Array, "*batch"]
    distinct: Int[Array, "*batch"]
    most: Int[Array, "*batch"]


def cap_weights(weights: Float[Array, "*batch N"], *, cap: Numeric) -> Float[Array, "*batch N"]:
    r"""The weights nearest to the given ones, in KL, of which none is above a cap.

    .. math:: \hat w_i = \min(c\, w_i, \text{cap}), \qquad \sum_i \hat w_i = 1

    Args:
      weights: Non-negative, of any positive sum.
      cap: The largest weight allowed, > 0. Where it is too small for the positive weights to sum to 1 they are equal.

    Returns:
      Weights that sum to 1, ``[*batch, N]``; 0 where they were 0, and for a row without a positive weight.

    Raises:
      ValueError: If ``cap`` is a Python number that is not positive and finite.

    Example:
      >>> [round(float(w), 3) for w in cap_weights(jnp.array([0.7, 0.2, 0.1, 0.0]), cap=0.5)]
      [0.5, 0.333, 0.167, 0.0]
    """
    check_positive("cap", cap)
    weights = as_float(weights)
    total = masked_sum(weights)[..., None]
    weights = weights / jnp.where(total <= 0, 1, total)  # NaN stays.
    positive = jnp.sum(weights > 0, axis=-1, keepdims=True)
    cap = jnp.maximum(cap, 1 / jnp.maximum(positive, 1))
    # With the k largest at the cap the others share what is left: the first k that keeps them below it is right.
    order = -jnp.sort(-weights, axis=-1)
    rest = jnp.flip(jnp.cumsum(jnp.flip(order, axis=-1), axis=-1), axis=-1)
    held = jnp.arange(weights.shape[-1], dtype=weights.dtype).reshape((1,) * (weights.ndim - 1) + (-1,))
    factor = (1 - held * cap) / jnp.where(rest > 0, rest, 1)
    fits = (factor * order <= cap * (1 + 4 * jnp.finfo(weights.dtype).eps)) & (rest > 0)
    k = jnp.argmax(fits, axis=-1, keepdims=True)
    factor = jnp.where(jnp.any(fits, axis=-1, keepdims=True), jnp.take_along_axis(factor, k, axis=-1), jnp.inf)
    return jnp.where(weights <= 0, 0, jnp.minimum(factor * weights, cap))


def guarded_resample(
    key: PRNGKey,
    reward: Float[Array, "*batch N"],
    *,
    num: int,
    beta: Numeric | Float[Array, "*batch"] | None = None,
    ess: Numeric | Float[Array, "*batch"] | None = None,
    max_copies: int | None = None,
    where: Bool[Array, "*batch N"] | None = None,
) -> Guarded:
    """Chooses ``num`` of N candidates in proportion to ``exp(reward / beta)``, with guards on diversity.

    Args:
      key: Consumed.
      reward: Reward of every candidate, drawn from the reference, reward units.
      num: How many to choose, with replacement, at least 1.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      ess: Instead of ``beta``: the effective sample size that it shall leave, at least 1.
      max_copies: The most copies of one candidate, at least 1; None is no cap. Candidates that are too few for
        ``num`` under the cap are copied equally often.
      where: True for real candidates; None means all.

    Returns:
      `Guarded`. With a cap, a systematic draw of capped weights has no more than ``max_copies`` of any candidate.

    Raises:
      ValueError: If both or neither of ``beta`` and ``ess`` are given, or an option is out of range.

    Example:
      >>> import jax
      >>> out = guarded_resample(jax.random.key(0), jnp.array([0.0, 1.0, 9.0, 1.0]), num=4, beta=1.0, max_copies=2)
      >>> out.indices.tolist(), int(out.distinct)
      ([1, 2, 2, 3], 3)

    References:
      Dong et al., 2023, arXiv:2304.06767 (fine-tuning on the best candidates, without these guards).
    """
    check_at_least("num", num, 1)
    if max_copies is not None:
        check_at_least("max_copies", max_copies, 1)
    if (beta is None) == (ess is None):
        raise ValueError(f"exactly one of beta and ess must be given, got beta={beta!r}, ess={ess!r}")
    reward = as_float(reward)
    if beta is None:
        beta = beta_for_ess(reward, ess=ess, where=where)
    weights = tilt(reward, beta=beta, where=where).weights
    if max_copies is not None:
        # A little less, so that a count stays within the cap however the sums of weights round.
        weights = cap_weights(weights, cap=max_copies / num * (1 - 1e-5))
    indices = resample(key, weights, num=num)
    square = masked_sum(jnp.square(weights))
    copies = counts(indices, reward.shape[-1])
    return Guarded(
        indices=indices,
        weights=weights,
        beta=jnp.broadcast_to(jnp.asarray(beta, reward.dtype), reward.shape[:-1]),
        ess=jnp.where(square <= 0, 0, 1 / jnp.where(square <= 0, 1, square)),
        distinct=jnp.sum(copies > 0, axis=-1),
        most=jnp.max(copies, axis=-1),
    )
