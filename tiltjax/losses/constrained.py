r"""Safe RLHF: a reward to be raised and a cost to be held below a threshold, through one multiplier.

.. math:: \min_\theta \max_{\lambda \ge 0} \; -E[r] + \lambda (E[c] - d)

A cost above 0 means harm. One step: `update_multiplier` with the costs of the new samples, outside the graph of the
policy; then `tiltjax.losses.policy_gradient.ppo_clip_loss` once, on the `combined_advantage`, plus `ptx_loss`.
"""

import chex
import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_positive
from tiltjax.ops.collectives import psum
from tiltjax.ops.masked import as_float, check_alike
from tiltjax.types import Array, AxisName, Bool, Float, Numeric

__all__ = ["Multiplier", "combined_advantage", "init_multiplier", "ptx_loss", "update_multiplier"]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Multiplier:
    """The Lagrange multiplier and the costs that it answers to.

    Attributes:
      log_multiplier: log of lambda, scalar: lambda stays positive.
      cost: Costs of the most recent completions on this device, newest last, ``[window]``.
      seen: True for the entries of ``cost`` that were observed, ``[window]``.
    """

    log_multiplier: Float[Array, ""]
    cost: Float[Array, " window"]
    seen: Bool[Array, " window"]


def init_multiplier(multiplier: float = 1.0, *, window: int = 128) -> Multiplier:
    """A `Multiplier` that has seen no cost.

    Args:
      multiplier: Its first value, > 0.
      window: How many recent completions the mean cost is over, >= 1.

    Returns:
      The state.

    Raises:
      ValueError: If an option is out of its range.
    """
    check_positive("multiplier", multiplier)
    check_at_least("window", window, 1)
    return Multiplier(
        log_multiplier=jnp.log(jnp.float32(multiplier)), cost=jnp.zeros(window), seen=jnp.zeros(window, bool)
    )


def update_multiplier(
    state: Multiplier,
    cost: Float[Array, "*batch"],
    where: Bool[Array, "*batch"] | None = None,
    *,
    learning_rate: Numeric = 0.1,
    threshold: Numeric = 0.0,
    max_multiplier: float = 5.0,
    axis_name: AxisName = None,
) -> Multiplier:
    r"""One step of gradient ascent on the multiplier, in log space.

    .. math:: \log \lambda \leftarrow \min\left( \log \lambda + \eta \lambda (\bar c - d), \log \lambda_{\max} \right)

    where :math:`\bar c` is the mean cost of the most recent completions. The step is proportional to the multiplier:
    one near 0 hardly moves, so a policy that was safe for long answers late.

    Args:
      state: The multiplier before.
      cost: Costs of the new completions, > 0 means harm, reward units.
      where: True for real completions; None means all.
      learning_rate: :math:`\eta` > 0.
      threshold: Mean cost d that is allowed, reward units.
      max_multiplier: Largest multiplier, > 0.
      axis_name: Mapped axis over which the completions are split: every device keeps its own window, and the mean is
        over all of them, so the multiplier stays the same everywhere.

    Returns:
      The multiplier after; unchanged while no cost was seen.

    Raises:
      ValueError: If ``learning_rate`` or ``max_multiplier`` is a Python number that is not positive and finite.

    Example:
      >>> state = update_multiplier(init_multiplier(1.0), jnp.array([1.0, 3.0]))
      >>> round(float(state.log_multiplier), 4)
      0.2

    References:
      Dai et al., 2023, arXiv:2310.12773, appendix (the update in log space).
    """
    check_positive("learning_rate", learning_rate)
    check_positive("max_multiplier", max_multiplier)
    check_alike(where, cost)
    new = jax.lax.stop_gradient(as_float(cost).reshape(-1))
    real = jnp.ones(new.shape, bool) if where is None else where.reshape(-1)
    window = state.cost.shape[0]
    costs = jnp.concatenate([state.cost, jnp.where(real, new, 0).astype(state.cost.dtype)])
    seen = jnp.concatenate([state.seen, real])
    # A stable sort moves what was not seen to the front, and keeps the order of time among the rest.
    recent = jnp.argsort(seen, stable=True)[-window:]
    costs, seen = costs[recent], seen[recent]
    total, count = psum((jnp.sum(jnp.where(seen, costs, 0)), jnp.sum(seen, dtype=costs.dtype)), axis_name)
    excess = jnp.where(count > 0, total / jnp.maximum(count, 1) - threshold, 0)
    raised = state.log_multiplier + learning_rate * jnp.exp(state.log_multiplier) * excess
    log_multiplier = jnp.minimum(raised, jnp.log(max_multiplier)).astype(state.log_multiplier.dtype)
    return Multiplier(log_multiplier=log_multiplier, cost=costs, seen=seen)


def combined_advantage(
    advantage: Float[Array, "*batch"],
    cost_advantage: Float[Array, "*batch"],
    *,
    log_multiplier: Numeric,
) -> Float[Array, "*batch"]:
    r"""The advantage of the Lagrangian, to be clipped once.

    .. math:: A = \frac{A_r - \lambda A_c}{1 + \lambda} = \sigma(-\log \lambda) A_r - \sigma(\log \lambda) A_c

    Each stream has its own critic. Pitfalls: two clipped losses, one per stream, make the cost side optimistic; with a
    KL term of :math:`-\beta k_1` in the reward stream and :math:`+\beta k_1` in the cost stream the combined
    coefficient is ``beta``, with half of it in each it is ``beta / 2``.

    Args:
      advantage: Of the reward, any shape, reward units.
      cost_advantage: Of the cost, the same shape; higher is more harm.
      log_multiplier: log of lambda: `Multiplier.log_multiplier`.

    Returns:
      The combined advantage, the same shape, without gradient.

    Example:
      >>> float(combined_advantage(jnp.array(1.0), jnp.array(3.0), log_multiplier=0.0))
      -1.0

    References:
      Dai et al., 2023, arXiv:2310.12773, section 3.3.
    """
    check_alike(None, advantage, cost_advantage)
    share = as_float(jnp.asarray(log_multiplier))
    combined = jax.nn.sigmoid(-share) * as_float(advantage) - jax.nn.sigmoid(share) * as_float(cost_advantage)
    return jax.lax.stop_gradient(combined)


def ptx_loss(
    token_logp: Float[Array, "*batch T"], mask: Bool[Array, "*batch T"], *, coefficient: Numeric
) -> Float[Array, "*batch T"]:
    r"""Keeps a policy near data that it must not forget, beside a policy gradient.

    .. math:: -\gamma_\text{ptx} \log \pi(y_t)

    Args:
      token_logp: Policy's log-probability of the tokens of pretraining or fine-tuning data, not of samples, nats.
      mask: True for real tokens.
      coefficient: :math:`\gamma_\text{ptx}` >= 0; 27.8 in InstructGPT.

    Returns:
      Loss per token ``[*batch, T]``; 0 where masked.

    Raises:
      ValueError: If ``coefficient`` is a negative Python number.

    Example:
      >>> ptx_loss(jnp.array([-1.0, -9.0]), jnp.array([True, False]), coefficient=2.0).tolist()
      [2.0, 0.0]

    References:
      Ouyang et al., 2022, arXiv:2203.02155, Eq. 2.
    """
    check_at_least("coefficient", coefficient, 0)
    check_alike(mask, token_logp)
    return coefficient * jnp.where(mask, -as_float(token_logp), 0)
