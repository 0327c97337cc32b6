"""Rankings and segments: direct alignment where a comparison is of more than two completions, or of many steps."""

import jax
import jax.numpy as jnp

from tiltjax.losses.preference.pairs import Beta, gap
from tiltjax.ops.checks import check_at_least, check_pair, check_per_row, check_positive, check_within
from tiltjax.ops.logspace import centred_difference, over_row, scale
from tiltjax.ops.masked import as_float, check_alike, masked_mean, masked_sum, shares
from tiltjax.ops.order import plackett_luce_logp
from tiltjax.types import Array, Bool, Float, Int, Numeric

__all__ = ["ipl_loss", "plackett_luce_dpo_loss"]


def plackett_luce_dpo_loss(
    logp: Float[Array, "*batch N"],
    ref_logp: Float[Array, "*batch N"],
    ranking: Int[Array, "*batch N"] | None = None,
    *,
    beta: Beta,
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch"]:
    r"""DPO on a ranking: the Plackett-Luce likelihood of the implicit rewards.

    .. math:: -\sum_{k=1}^{n-1} \left[ s_{\tau(k)} - \log \sum_{j \ge k} e^{s_{\tau(j)}} \right], \qquad
              s_i = \beta \log \frac{\pi(y_i)}{p_\text{ref}(y_i)}

    Inverts the tilt: it is the likelihood of drawing the ranking one candidate at a time from the softmax of the
    rewards of those left; with two candidates it is `dpo_loss`. Pitfall: a sum over ranks, so a prompt with more
    candidates weighs more.

    Args:
      logp: Policy's log-probability of every candidate, sums over tokens, nats.
      ref_logp: The reference's, nats; no gradient.
      ranking: Index of the best candidate, of the second, ... of the worst. None means that they are in that order.
      beta: Strength of the KL term, > 0, reward units per nat. A number, or one per prompt.
      where: True for real candidates, in the order of ``logp``; masked ones drop out of the ranking.

    Returns:
      Loss per prompt ``[*batch]``, nats; 0 with fewer than two real candidates.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> round(float(plackett_luce_dpo_loss(jnp.zeros(3), jnp.zeros(3), beta=0.1)), 4)  # log 3!
      1.7918

    References:
      Rafailov et al., 2023, arXiv:2305.18290, appendix A.3.
    """
    check_positive("beta", beta)
    logp, ref_logp = as_float(logp), jax.lax.stop_gradient(as_float(ref_logp))
    ratio = centred_difference(logp, ref_logp, where=where)
    score = ratio * over_row("beta", beta, ratio)
    return -plackett_luce_logp(score, ranking, where=where)


def ipl_loss(
    q: Float[Array, "*batch 2 T"],
    next_value: Float[Array, "*batch 2 T"],
    label: Float[Array, "*batch"] | None = None,
    *,
    discount: Numeric,
    penalty: Numeric,
    where: Bool[Array, "*batch 2 T"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Inverse preference learning: Bradley-Terry on segments, with the reward that a Q-function implies.

    .. math:: -p \log \sigma(S_0 - S_1) - (1 - p) \log \sigma(S_1 - S_0) + \lambda\, \overline{r^2}, \qquad
              S_k = \sum_t r_{k,t}, \quad r_{k,t} = Q_{k,t} - \gamma V_{k,t+1}

    The inverse soft Bellman operator is a bijection of rewards and Q-functions, so no reward model is fitted: the
    policy is the softmax of ``Q``. Inverts the tilt: with one step, ``discount`` 0 and
    :math:`Q = \beta \log(\pi / p_\text{ref})` it is `dpo_loss`. The mean of :math:`r^2` is over the real steps of both
    segments. Pitfalls: the discount is not applied inside the sum; segments should have equal length; a terminal step
    has next value 0; and "preferred" is index 0.

    Args:
      q: Q-value of every step taken, of the chosen and the rejected segment, reward units.
      next_value: Value of the state that follows each step, reward units; no gradient.
      label: Probability that segment 0 is preferred, in [0, 1]; None means 1.
      discount: ``gamma``, in [0, 1].
      penalty: ``lambda``, >= 0, weight of the chi-squared regulariser; 0.5 to 4 in the official configurations.
      where: True for real steps; a pair counts where both segments have one.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``penalty`` is negative or ``discount`` outside [0, 1], as Python numbers.

    References:
      Hejna, Sadigh, 2023, arXiv:2305.15363.
    """
    check_at_least("penalty", penalty, 0)
    check_within("discount", discount, 0, 1)
    check_pair("q", q, axis=-2)
    check_per_row("label", label, jnp.shape(q)[:-2])
    check_alike(where, q, next_value)
    q, next_value = as_float(q), jax.lax.stop_gradient(as_float(next_value))
    steps = jnp.full(q.shape, True) if where is None else where
    real = jnp.all(jnp.any(steps, axis=-1), axis=-1)
    steps = steps & real[..., None, None]
    reward = jnp.where(steps, q, 0) - discount * jnp.where(steps, next_value, 0)
    margin = gap(masked_sum(reward, steps))
    flipped = 0.0 if label is None else 1 - shares("label", label, margin, real)
    # -log sigma(m) + (1 - p) m is the soft-label loss.
    loss = -jax.nn.log_sigmoid(margin) + scale(flipped, margin)
    flat = (*reward.shape[:-2], -1)
    # Without a penalty, an infinite reward has no gradient but that of the comparison.
    kept = jnp.where((penalty == 0) & jnp.isinf(reward), 0, reward)
    size = masked_mean(jnp.square(kept).reshape(flat), steps.reshape(flat))
    return jnp.where(real, loss + penalty * size, 0)
