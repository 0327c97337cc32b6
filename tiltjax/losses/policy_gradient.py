"""Policy gradients: losses that climb towards the tilt on the policy's own samples.

Every loss takes token log-probabilities ``[..., N, T]`` and advantages, one per candidate ``[..., N]`` or one per token
``[..., N, T]`` (see `tiltjax.advantages`), and returns one value per token, 0 on padding. `aggregate` makes a mean of
them by a named rule. GRPO is `ppo_clip_loss` on `group_normalised` advantages, plus ``beta`` times a penalty of
`tiltjax.losses.penalties`; RLOO is `reinforce_loss` on `leave_one_out`.

Old log-probabilities must come from the same parameters, temperature and precision as the new ones did: the first
step's ratio is then exactly 1, and every loss with a ratio has the gradient of `reinforce_loss`. Log-ratios above 20
are cut before they are exponentiated, and give no gradient.
"""

import jax
import jax.numpy as jnp

from tiltjax.losses.penalties import kl_k3_corrected
from tiltjax.ops.checks import check_at_least, check_choice, check_fraction, check_per_row, check_positive, is_number
from tiltjax.ops.masked import Average, as_float, check_alike, masked_mean, masked_sum
from tiltjax.types import Array, Bool, Float, Numeric

__all__ = [
    "aggregate",
    "cispo_loss",
    "gspo_loss",
    "mdloo_loss",
    "mdpo_loss",
    "ppo_clip_loss",
    "reinforce_loss",
    "value_loss",
]

_MAX_LOG_RATIO = 20.0
_MODES = ("dr_grpo", "seq_mean_token_mean", "seq_mean_token_sum", "token_mean")


def aggregate(
    values: Float[Array, "*batch N T"],
    mask: Bool[Array, "*batch N T"],
    *,
    mode: str,
    max_length: int | None = None,
    where: Bool[Array, "*batch N"] | None = None,
) -> Average:
    r"""Sums per-token values into an `Average`, by the rule that says what a long completion counts.

    | mode | mean | known as |
    | --- | --- | --- |
    | ``seq_mean_token_mean`` | :math:`\frac1n \sum_i \frac{1}{|y_i|} \sum_t l_{i,t}` | GRPO, GSPO |
    | ``token_mean`` | :math:`\sum_{i,t} l_{i,t} / \sum_i |y_i|` | DAPO, PPO |
    | ``seq_mean_token_sum`` | :math:`\frac1n \sum_{i,t} l_{i,t}` | RLOO, the policy gradient itself |
    | ``dr_grpo`` | :math:`\frac{1}{n L} \sum_{i,t} l_{i,t}` | Dr. GRPO |

    for n completions over every prompt. Averages of microbatches and devices of unequal size add up to that of the
    whole batch, exactly: divide once, at the end. Pitfalls: only the last two give an unbiased policy gradient, the
    first makes long failures cheap; verl's "seq-mean-token-sum-norm" divides the total by the padded width alone, and
    so grows with the batch.

    Args:
      values: One per token, from any loss of this module or penalty.
      mask: True for real tokens.
      mode: One of the four; no default, as papers differ in it.
      max_length: The constant budget of tokens L, for ``dr_grpo`` only.
      where: True for the candidates that count; None means those with a real token. Give it where completions are
        masked out of the loss and still divide it, as truncated ones do in TRL.

    Returns:
      `Average` over the whole of ``values``.

    Raises:
      ValueError: If ``mode`` is unknown, or ``max_length`` is missing for ``dr_grpo``, below 1, or given for another.

    Example:
      >>> values, mask = jnp.array([[3.0, 0.0, 0.0], [1.0, 1.0, 1.0]]), jnp.array([[True, False, False], [True] * 3])
      >>> [float(aggregate(values, mask, mode=mode).mean) for mode in ("seq_mean_token_mean", "token_mean")]
      [2.0, 1.5]
      >>> float(aggregate(values, mask, mode="dr_grpo", max_length=4).mean)
      0.75

    References:
      Shao et al., 2024, arXiv:2402.03300; Yu et al., 2025, arXiv:2503.14476; Liu et al., 2025, arXiv:2503.20783.
    """
    check_choice("mode", mode, _MODES)
    if (mode == "dr_grpo") != (max_length is not None):
        raise ValueError(f"max_length must be given for mode dr_grpo and for no other, got {max_length!r} for {mode}")
    check_at_least("max_length", max_length, 1)
    check_alike(mask, values)
    per_candidate = masked_mean(values, mask) if mode == "seq_mean_token_mean" else masked_sum(values, mask)
    if max_length is not None:
        per_candidate = per_candidate / max_length
    check_alike(where, per_candidate)
    real = jnp.any(mask, axis=-1) if where is None else where
    count = jnp.sum(mask & real[..., None] if mode == "token_mean" else real, dtype=per_candidate.dtype)
    return Average(total=jnp.sum(jnp.where(real, per_candidate, 0)), count=count)


def reinforce_loss(
    token_logp: Float[Array, "*batch N T"],
    advantage: Float[Array, "*batch N"] | Float[Array, "*batch N T"],
    mask: Bool[Array, "*batch N T"],
) -> Float[Array, "*batch N T"]:
    r"""The policy gradient.

    .. math:: -\mathrm{sg}(A_t) \log \pi(y_t)

    On samples of the policy, and with a baseline that does not depend on them, its gradient under
    ``seq_mean_token_sum`` is minus that of the expected reward. Off-policy it is biased: it has no ratio. Its value
    means nothing.

    Args:
      token_logp: Policy's log-probability of every token, nats.
      advantage: Per candidate or per token, reward units; no gradient.
      mask: True for real tokens.

    Returns:
      Loss per token ``[*batch, N, T]``; 0 where masked.

    Example:
      >>> reinforce_loss(jnp.array([[-1.0, -2.0]]), jnp.array([2.0]), jnp.array([[True, False]])).tolist()
      [[2.0, 0.0]]

    References:
      Williams, 1992, "Simple statistical gradient-following algorithms"; Ahmadian et al., 2024, arXiv:2402.14740.
    """
    check_alike(mask, token_logp)
    return _per_token(advantage, mask) * jnp.where(mask, -as_float(token_logp), 0)


def ppo_clip_loss(
    token_logp: Float[Array, "*batch N T"],
    old_token_logp: Float[Array, "*batch N T"],
    advantage: Float[Array, "*batch N"] | Float[Array, "*batch N T"],
    mask: Bool[Array, "*batch N T"],
    *,
    clip_low: Numeric = 0.2,
    clip_high: Numeric = 0.2,
    dual_clip: Numeric | None = None,
) -> Float[Array, "*batch N T"]:
    r"""PPO's clipped surrogate, token by token.

    .. math:: \max\left( -A_t \rho_t, -A_t\, \mathrm{clip}(\rho_t, 1 - \epsilon_l, 1 + \epsilon_h) \right), \qquad
              \rho_t = \frac{\pi(y_t)}{\pi_\text{old}(y_t)}

    The gradient is exactly 0 where the clip acts: A > 0 above the interval, A < 0 below it. GRPO, REINFORCE++ and Safe
    RLHF (on one combined advantage) use it as it is. ``clip_high`` above ``clip_low`` is DAPO's clip-higher: it lets
    rare tokens grow. ``dual_clip`` also bounds the loss of A < 0 by ``-dual_clip A``, without gradient beyond (TRL's
    ``delta``).

    Args:
      token_logp: Policy's log-probability of every token, nats.
      old_token_logp: That of the policy that drew the tokens, nats; no gradient.
      advantage: Per candidate or per token, reward units; no gradient.
      mask: True for real tokens.
      clip_low: How far the ratio may fall, in (0, 1]; 0.2 in PPO, GRPO and DAPO.
      clip_high: How far it may rise, > 0; 0.2 in PPO and GRPO, 0.28 in DAPO.
      dual_clip: Largest ratio where A < 0, > 1; 3 in verl. None means no bound.

    Returns:
      Loss per token ``[*batch, N, T]``, reward units; 0 where masked.

    Raises:
      ValueError: If an option is a Python number out of its range.

    Example:
      >>> logp, old, mask = jnp.log(jnp.array([[1.5, 0.5]])), jnp.zeros((1, 2)), jnp.ones((1, 2), bool)
      >>> ppo_clip_loss(logp, old, jnp.ones((1, 2)), mask, clip_high=0.25).round(3).tolist()
      [[-1.25, -0.5]]

    References:
      Schulman et al., 2017, arXiv:1707.06347, Eq. 7; Ye et al., 2020, arXiv:1912.09729 (dual clip);
      Yu et al., 2025, arXiv:2503.14476 (clip-higher).
    """
    check_fraction("clip_low", clip_low)
    check_positive("clip_high", clip_high)
    if dual_clip is not None and is_number(dual_clip) and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip!r}")
    ratio = _ratio(_log_ratio(token_logp, old_token_logp, mask))
    return _clipped(ratio, _per_token(advantage, mask), clip_low, clip_high, dual_clip)


def value_loss(
    value: Float[Array, "*batch T"],
    old_value: Float[Array, "*batch T"],
    returns: Float[Array, "*batch T"],
    mask: Bool[Array, "*batch T"],
    *,
    clip: Numeric | None = 0.2,
) -> Float[Array, "*batch T"]:
    r"""The critic's clipped squared error.

    .. math:: \tfrac12 \max\left( (V - R)^2, (V_\text{old} + \mathrm{clip}(V - V_\text{old}, -\epsilon, \epsilon) - R)^2
              \right)

    The gradient is exactly 0 where the clipped error is the larger. Pitfall: the clip is in reward units, so it must
    follow the scale of the rewards.

    Args:
      value: Critic's estimate before every token, reward units.
      old_value: The estimate at the time of sampling; no gradient.
      returns: Targets, from `tiltjax.advantages.gae`, before any whitening; no gradient.
      mask: True for real tokens.
      clip: Largest move that is rewarded, > 0, reward units; None leaves the plain error.

    Returns:
      Loss per token ``[*batch, T]``, squared reward units; 0 where masked.

    Raises:
      ValueError: If ``clip`` is a Python number that is not positive and finite.

    Example:
      >>> value_loss(jnp.array([1.0]), jnp.array([0.0]), jnp.array([0.75]), jnp.array([True]), clip=0.25).tolist()
      [0.125]

    References:
      Schulman et al., 2017, arXiv:1707.06347 (Eq. 9 without the clip, which is in its code).
    """
    check_alike(mask, value, old_value, returns)
    value = jnp.where(mask, as_float(value), 0)
    old_value, returns = (jax.lax.stop_gradient(jnp.where(mask, as_float(x), 0)) for x in (old_value, returns))
    plain = jnp.square(value - returns) / 2
    if clip is None:
        return plain
    check_positive("clip", clip)
    bound = jnp.square(jax.lax.stop_gradient(jnp.clip(value, old_value - clip, old_value + clip)) - returns) / 2
    return jnp.where(bound > plain, bound, plain)


def gspo_loss(
    token_logp: Float[Array, "*batch N T"],
    old_token_logp: Float[Array, "*batch N T"],
    advantage: Float[Array, "*batch N"],
    mask: Bool[Array, "*batch N T"],
    *,
    clip_low: Numeric = 3e-4,
    clip_high: Numeric = 4e-4,
) -> Float[Array, "*batch N T"]:
    r"""GSPO: PPO's clip on one ratio per completion, the geometric mean of its tokens' ratios.

    .. math:: \max\left( -A s, -A\, \mathrm{clip}(s, 1 - \epsilon_l, 1 + \epsilon_h) \right), \qquad
              s = \left( \frac{\pi(y)}{\pi_\text{old}(y)} \right)^{1 / |y|}

    A completion is clipped as a whole. Every token carries its completion's value, so that ``seq_mean_token_mean`` is
    the paper's objective. Pitfall: the ratio is not an importance weight (its logarithm is divided by the length),
    and the clip is three orders of magnitude narrower than PPO's.

    Args:
      token_logp: Policy's log-probability of every token, nats.
      old_token_logp: That of the policy that drew the tokens, nats; no gradient.
      advantage: Per candidate, reward units; no gradient.
      mask: True for real tokens.
      clip_low: How far the ratio may fall, in (0, 1]; 3e-4 in the paper.
      clip_high: How far it may rise, > 0; 4e-4 in the paper.

    Returns:
      Loss per token ``[*batch, N, T]``, reward units, the same for all tokens of a completion; 0 where masked.

    Raises:
      ValueError: If an option is a Python number out of its range.

    References:
      Zheng et al., 2025, arXiv:2507.18071, Eqs. 5-7.
    """
    check_fraction("clip_low", clip_low)
    check_positive("clip_high", clip_high)
    ratio = _ratio(masked_mean(_log_ratio(token_logp, old_token_logp, mask), mask))
    advantage = _per_candidate(advantage, mask)
    return _spread(_clipped(ratio, advantage, clip_low, clip_high, None), mask)


def cispo_loss(
    token_logp: Float[Array, "*batch N T"],
    old_token_logp: Float[Array, "*batch N T"],
    advantage: Float[Array, "*batch N"] | Float[Array, "*batch N T"],
    mask: Bool[Array, "*batch N T"],
    *,
    max_ratio: Numeric,
) -> Float[Array, "*batch N T"]:
    r"""CISPO: the policy gradient with a capped importance weight.

    .. math:: -\mathrm{sg}\left( \min(\rho_t, \rho_{\max}) A_t \right) \log \pi(y_t), \qquad
              \rho_t = \frac{\pi(y_t)}{\pi_\text{old}(y_t)}

    The weight is clipped and not the token: unlike under `ppo_clip_loss`, every token keeps a gradient. Its value means
    nothing. Pitfall: the cap is ``1 + epsilon_high`` of the paper, and what TRL calls ``epsilon_high``.

    Args:
      token_logp: Policy's log-probability of every token, nats.
      old_token_logp: That of the policy that drew the tokens, nats; no gradient.
      advantage: Per candidate or per token, reward units; no gradient.
      mask: True for real tokens.
      max_ratio: Largest weight, > 0. No default: the paper tunes it.

    Returns:
      Loss per token ``[*batch, N, T]``; 0 where masked.

    Raises:
      ValueError: If ``max_ratio`` is a Python number that is not positive and finite.

    References:
      MiniMax, 2025, arXiv:2506.13585, Eqs. 4-5.
    """
    check_positive("max_ratio", max_ratio)
    weight = jnp.minimum(_ratio(_log_ratio(token_logp, old_token_logp, mask)), max_ratio)
    return reinforce_loss(token_logp, weight * _per_token(advantage, mask), mask)


def mdpo_loss(
    token_logp: Float[Array, "*batch N T"],
    old_token_logp: Float[Array, "*batch N T"],
    advantage: Float[Array, "*batch N"] | Float[Array, "*batch N T"],
    mask: Bool[Array, "*batch N T"],
    *,
    beta: Numeric,
    token_kl: Float[Array, "*batch N T"] | None = None,
    clip: tuple[Numeric, Numeric] | None = None,
) -> Float[Array, "*batch N T"]:
    r"""Mirror descent policy optimisation, token by token: a KL to the old policy in the place of PPO's clip.

    .. math:: -\rho_t A_t + \beta\, \mathrm{KL}_t(\pi \,\|\, \pi_\text{old}), \qquad
              \rho_t = \frac{\pi(y_t)}{\pi_\text{old}(y_t)}

    Minimised exactly, one round gives :math:`\pi_\text{old} e^{A/\beta} / Z`: it climbs to the tilt of the old policy.
    The KL has gradient 0 at the old policy, so it acts from the second inner step on; with a single inner step per
    batch it does nothing.

    Args:
      token_logp: Policy's log-probability of every token, nats.
      old_token_logp: That of the policy that drew the tokens, the centre of the KL, nats; no gradient.
      advantage: Per candidate or per token, reward units; no gradient.
      mask: True for real tokens.
      beta: Strength of the KL term to the old policy, > 0, reward units: 1 / step size of the mirror descent.
      token_kl: Exact KL per token, with its gradient, from `tiltjax.losses.penalties.full_vocabulary_kl`; None means
        the sampled one, `tiltjax.losses.penalties.kl_k3_corrected`.
      clip: ``(clip_low, clip_high)`` to clip the ratio as well, as `ppo_clip_loss` does: an extension. None is the
        paper's.

    Returns:
      Loss per token ``[*batch, N, T]``, reward units; 0 where masked.

    Raises:
      ValueError: If ``beta`` or an element of ``clip`` is a Python number out of its range.

    References:
      Tomar et al., 2020, arXiv:2005.09814.
    """
    check_positive("beta", beta)
    ratio = _ratio(_log_ratio(token_logp, old_token_logp, mask))
    surrogate = _surrogate(ratio, _per_token(advantage, mask), clip)
    if token_kl is None:
        token_kl = kl_k3_corrected(token_logp, old_token_logp, old_token_logp, mask)
    check_alike(mask, token_kl)
    return surrogate + beta * jnp.where(mask, as_float(token_kl), 0)


def mdloo_loss(
    token_logp: Float[Array, "*batch N T"],
    old_token_logp: Float[Array, "*batch N T"],
    advantage: Float[Array, "*batch N"],
    mask: Bool[Array, "*batch N T"],
    *,
    beta: Numeric,
    token_kl: Float[Array, "*batch N T"] | None = None,
    clip: tuple[Numeric, Numeric] | None = None,
) -> Float[Array, "*batch N T"]:
    r"""MDLOO: mirror descent with leave-one-out advantages and the ratio of whole completions.

    .. math:: -\frac{\pi(y)}{\pi_\text{old}(y)} A + \beta\, \mathrm{KL}(\pi \,\|\, \pi_\text{old})

    per completion; ``advantage`` is `tiltjax.advantages.leave_one_out` of the reward less the KL term to the
    *reference*, ``beta_ref log(pi_old / p_ref)``. The KL to the old policy replaces the clip. A completion's value is
    spread evenly over its tokens (an exact KL stays where it arises): aggregate with ``seq_mean_token_sum``. Pitfalls:
    the ratio of a whole completion varies by the exponential of its length; the exact token KLs are summed over the
    prefixes that the old policy drew.

    Args:
      token_logp: Policy's log-probability of every token, nats.
      old_token_logp: That of the policy that drew the tokens, the centre of the KL, nats; no gradient.
      advantage: Per candidate, reward units; no gradient.
      mask: True for real tokens.
      beta: Strength of the KL term to the old policy, > 0, reward units; 1 / step size of the mirror descent.
      token_kl: As in `mdpo_loss`; None means the sampled KL of whole completions.
      clip: As in `mdpo_loss`, on the ratio of the completion.

    Returns:
      Loss per token ``[*batch, N, T]``, reward units; 0 where masked.

    Raises:
      ValueError: As in `mdpo_loss`.

    References:
      Gunter et al., 2024, arXiv:2407.21075, section 4.2.
    """
    check_positive("beta", beta)
    log_ratio = masked_sum(_log_ratio(token_logp, old_token_logp, mask))
    advantage = _per_candidate(advantage, mask)
    per_candidate = _surrogate(_ratio(log_ratio), advantage, clip)
    if token_kl is None:
        zero = jnp.zeros_like(log_ratio)
        per_candidate = per_candidate + beta * kl_k3_corrected(log_ratio, zero, zero)
    length = jnp.maximum(jnp.sum(mask, axis=-1, dtype=per_candidate.dtype), 1)
    spread = _spread(per_candidate / length, mask)
    if token_kl is None:
        return spread
    check_alike(mask, token_kl)
    return spread + beta * jnp.where(mask, as_float(token_kl), 0)


def _log_ratio(token_logp: Array, old_token_logp: Array, mask: Array) -> Array:
    check_alike(mask, token_logp, old_token_logp)
    token_logp, old_token_logp = as_float(token_logp), jax.lax.stop_gradient(as_float(old_token_logp))
    return jnp.where(mask, token_logp, 0) - jnp.where(mask, old_token_logp, 0)


def _ratio(log_ratio: Array) -> Array:
    return jnp.exp(jnp.minimum(log_ratio, _MAX_LOG_RATIO))


def _per_token(advantage: Array, mask: Array) -> Array:
    """Advantages ``[*batch, N]`` or ``[*batch, N, T]`` as constants ``[*batch, N, T]``, 0 where masked."""
    advantage = jax.lax.stop_gradient(as_float(advantage))
    if advantage.ndim == mask.ndim - 1:
        check_per_row("advantage", advantage, mask.shape[:-1])
        advantage = jnp.broadcast_to(advantage[..., None], mask.shape)
    check_alike(mask, advantage)
    return jnp.where(mask, advantage, 0)


def _per_candidate(advantage: Array, mask: Array) -> Array:
    """Advantages ``[*batch, N]`` as constants, 0 for a candidate without a token."""
    advantage, real = jax.lax.stop_gradient(as_float(advantage)), jnp.any(mask, axis=-1)
    check_alike(real, advantage)
    return jnp.where(real, advantage, 0)


def _spread(per_candidate: Array, mask: Array) -> Array:
    return jnp.where(mask, jnp.broadcast_to(per_candidate[..., None], mask.shape), 0)


def _clipped(ratio: Array, advantage: Array, low: Numeric, high: Numeric, dual: Numeric | None) -> Array:
    """``max(-A ratio, -A clip(ratio))``: written with the cases, so that the gradient is 0 where clipped, ties too."""
    up, down = (advantage > 0) & (ratio > 1 + high), (advantage < 0) & (ratio < 1 - low)
    ratio = jnp.where(up, 1 + high, jnp.where(down, 1 - low, ratio))
    if dual is not None:
        ratio = jnp.where((advantage < 0) & (ratio > dual), dual, ratio)
    return -advantage * ratio


def _surrogate(ratio: Array, advantage: Array, clip: tuple[Numeric, Numeric] | None) -> Array:
    if clip is None:
        return -advantage * ratio
    check_fraction("clip[0]", clip[0])
    check_positive("clip[1]", clip[1])
    return _clipped(ratio, advantage, *clip, None)
