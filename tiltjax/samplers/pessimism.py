"""Inference-time pessimism by rejection: one of N candidates, without the last word to the largest reward."""

import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_per_row, check_positive
from tiltjax.ops.masked import as_float, check_alike
from tiltjax.tilt.pessimism import pessimistic_threshold
from tiltjax.types import Array, Bool, Float, Int, Numeric, PRNGKey

__all__ = ["inference_time_pessimism"]


def inference_time_pessimism(
    key: PRNGKey,
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    reward_max: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
) -> Int[Array, "*batch"]:
    r"""One of N candidates, by rejection from the optimum of ``E r - (beta / 2) chi2``.

    .. math:: \text{the first } i < N \text{ with } u_i < \min\left(1, \frac{w_i}{M}\right), \text{ else } N, \qquad
              w_i = \max\left(0, \frac{r_i - \lambda}{\beta}\right), \quad M = \frac{r_{\max} - \lambda}{\beta}

    with ``lambda`` the `tiltjax.tilt.pessimism.pessimistic_threshold` of the first N - 1 real candidates and uniform
    ``u``. The last real candidate takes no part in either: it is the fresh draw from the reference that the algorithm
    returns when none is accepted, so N candidates are the N - 1 of the paper and one more, and ``N = 1`` is the
    reference. Each one is accepted with a chance of about ``1 / M``: of N candidates none is with ``(1 - 1/M)^(N-1)``.
    Candidates must be in the order in which they were drawn (or in any that does not depend on the reward). Equal keys
    give equal choices; where prompts are split under a mapped axis, fold ``axis_index`` into the key.

    Args:
      key: Consumed. The uniform of candidate ``i`` is drawn under ``jax.random.fold_in(key, i)``.
      reward: Reward of every candidate, drawn from the reference, reward units.
      beta: Strength of the chi-squared term, > 0, reward units; a number, or one per prompt.
      reward_max: The largest possible reward, reward units; a number, or one per prompt. Too small a value accepts
        rewards above it as if they were equal to it; too large a one wastes candidates.
      where: True for real candidates; None means all.

    Returns:
      Index of the chosen candidate, ``[*batch]``; 0 for a row without a real candidate.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> draws = jnp.broadcast_to(jnp.array([0.0, 1.0, 2.0, 1.0]), (4000, 4))  # Weights 0, 1/2, 5/2; M = 5/2.
      >>> index = inference_time_pessimism(jax.random.key(0), draws, beta=0.5, reward_max=2.0)
      >>> [round(float(p), 1) for p in jnp.bincount(index, length=4) / 4000]
      [0.0, 0.2, 0.8, 0.0]

    References:
      Huang et al., 2025, arXiv:2503.21878.
    """
    check_positive("beta", beta)
    reward = as_float(reward)
    check_alike(where, reward)
    check_per_row("reward_max", reward_max, reward.shape[:-1])
    real = jnp.ones(reward.shape, bool) if where is None else where
    order = jnp.arange(reward.shape[-1]).reshape(*[1] * (reward.ndim - 1), -1)
    last = jnp.max(jnp.where(real, order, 0), axis=-1)
    tried = real & (order < last[..., None])
    # Relative to the best reward the threshold keeps its digits, however large the rewards are.
    top = jnp.max(reward, axis=-1, where=tried, initial=-jnp.inf)
    top = jnp.where(jnp.any(tried, axis=-1), top, 0)
    reward = jnp.where(tried, reward - top[..., None], 0)
    threshold = pessimistic_threshold(reward, beta=beta, where=tried)
    lead = jnp.where(tried, jax.nn.relu(reward - threshold[..., None]), 0)
    furthest = jnp.maximum((reward_max - top - threshold)[..., None], lead)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(reward.shape[-1]))
    uniform = jax.vmap(lambda k: jax.random.uniform(k, last.shape, reward.dtype), out_axes=-1)(keys)
    accepted = (lead > 0) & (uniform * furthest < lead)
    return jnp.where(jnp.any(accepted, axis=-1), jnp.argmax(accepted, axis=-1), last).astype(jnp.int32)
