"""Baselines and credit: rewards in, advantages out.

An advantage says how much better a completion (or what follows a token) did than expected. Nothing here carries
gradient. A baseline that does not depend on the completion leaves the expected policy gradient as it is:
`leave_one_out` and `greedy_baseline`; the mean of the whole group shrinks it by ``(n - 1) / n``, and a division by a
standard deviation (`group_normalised`, `batch_whitened`) changes the objective.
"""

import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_choice, check_fraction, check_per_row, check_within
from tiltjax.ops.collectives import axis_size, pmax
from tiltjax.ops.logspace import over_row
from tiltjax.ops.masked import as_float, check_alike, masked_mean, masked_std, masked_sum
from tiltjax.types import Array, AxisName, Bool, Float, Numeric

__all__ = [
    "batch_whitened",
    "gae",
    "greedy_baseline",
    "group_normalised",
    "leave_one_out",
    "prime_advantage",
    "reinforce_pp_advantage",
    "reward_to_go",
    "token_reward",
]


def token_reward(
    reward: Float[Array, "*batch"],
    token_kl: Float[Array, "*batch T"],
    mask: Bool[Array, "*batch T"],
    *,
    beta: Numeric,
) -> Float[Array, "*batch T"]:
    r"""Reward of every token: the completion's on its last token, less the KL penalty of each.

    .. math:: r_t = \mathbf 1[t = \text{last}]\, r(x, y) - \beta \left( \log \pi(y_t) - \log p_\text{ref}(y_t) \right)

    Its sum is :math:`r - \beta \log(\pi / p_\text{ref})`, so its policy gradient is exactly that of the KL-regularised
    objective whose optimum is the tilt. Pitfall: some code puts the reward one position after the last token.

    Args:
      reward: Reward per completion, reward units.
      token_kl: Log-ratio per token (`tiltjax.losses.penalties.kl_k1`), nats.
      mask: True on completion tokens up to and including EOS; a completion without any gets 0.
      beta: Strength of the KL term, >= 0, reward units.

    Returns:
      Reward per token ``[*batch, T]``, reward units; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a negative Python number.

    Example:
      >>> token_reward(jnp.array(1.0), jnp.array([0.5, -0.5, 9.0]), jnp.array([True, True, False]), beta=0.5).tolist()
      [-0.25, 1.25, 0.0]
    """
    check_at_least("beta", beta, 0)
    check_per_row("reward", reward, jnp.shape(mask)[:-1])
    reward, token_kl = _constant(reward), _constant(token_kl, mask)
    after = jnp.cumsum(mask[..., ::-1], axis=-1)[..., ::-1]
    return jnp.where(mask & (after == 1), reward[..., None], 0) - beta * token_kl


def gae(
    reward: Float[Array, "*batch T"],
    value: Float[Array, "*batch T"],
    mask: Bool[Array, "*batch T"],
    *,
    gamma: Numeric = 1.0,
    lam: Numeric = 0.95,
) -> tuple[Float[Array, "*batch T"], Float[Array, "*batch T"]]:
    r"""Generalised advantage estimation.

    .. math:: \delta_t = r_t + \gamma V_{t+1} - V_t, \qquad A_t = \delta_t + \gamma \lambda A_{t+1}, \qquad
              R_t = A_t + V_t

    The recursion skips masked positions, inside a completion too, and the value after the last real one is 0.
    ``lam=1`` is the reward-to-go less the value, ``lam=0`` the one-step error. Pitfalls: returns are the targets of
    the value before any whitening of the advantages; a completion cut at the length limit counts as ended.

    Args:
      reward: Reward of every token, reward units; see `token_reward`.
      value: Critic's estimate of the reward-to-go before every token, reward units.
      mask: True for real tokens.
      gamma: Discount per real token, in (0, 1].
      lam: Bias against variance, in [0, 1]; 0.95 is the usual choice.

    Returns:
      Advantages and returns, each ``[*batch, T]``, without gradient; 0 where masked.

    Raises:
      ValueError: If ``gamma`` or ``lam`` is a Python number out of its range.

    Example:
      >>> advantage, returns = gae(jnp.array([0.0, 1.0]), jnp.array([0.5, 0.25]), jnp.array([True, True]), lam=0.5)
      >>> advantage.tolist(), returns.tolist()
      ([0.125, 0.75], [0.625, 1.0])

    References:
      Schulman et al., 2015, arXiv:1506.02438, Eq. 16.
    """
    check_fraction("gamma", gamma)
    check_within("lam", lam, 0, 1)
    reward, value = _constant(reward, mask), _constant(value, mask)

    def step(carry, now):
        (advantage, next_value), (reward, value, real) = carry, now
        advantage = jnp.where(real, reward + gamma * next_value - value + gamma * lam * advantage, advantage)
        return (advantage, jnp.where(real, value, next_value)), advantage

    zero = jnp.sum(jnp.zeros_like(reward + value), axis=-1)  # Also of completions without a token.
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, -1, 0), (reward, value, mask))
    _, advantage = jax.lax.scan(step, (zero, zero), tokens, reverse=True)
    advantage = jnp.where(mask, jnp.moveaxis(advantage, 0, -1), 0)
    return advantage, advantage + value


def reward_to_go(
    reward: Float[Array, "*batch T"], mask: Bool[Array, "*batch T"], *, gamma: Numeric = 1.0
) -> Float[Array, "*batch T"]:
    r"""Discounted sum of the rewards from each token on: :math:`\sum_{s \ge t} \gamma^{s - t} r_s`.

    Args:
      reward: Reward of every token, reward units.
      mask: True for real tokens; the others take no part, in the exponent neither.
      gamma: Discount per real token, in (0, 1].

    Returns:
      One sum per token ``[*batch, T]``, without gradient; 0 where masked.

    Raises:
      ValueError: If ``gamma`` is a Python number out of its range.

    Example:
      >>> reward_to_go(jnp.array([0.0, 9.0, 1.0]), jnp.array([True, False, True]), gamma=0.5).tolist()
      [0.5, 0.0, 1.0]
    """
    return gae(reward, jnp.zeros_like(as_float(reward)), mask, gamma=gamma, lam=1.0)[0]


def leave_one_out(
    reward: Float[Array, "*batch N"],
    where: Bool[Array, "*batch N"] | None = None,
    *,
    axis_name: AxisName = None,
) -> Float[Array, "*batch N"]:
    r"""RLOO: reward less the mean reward of the other candidates.

    .. math:: A_i = r_i - \frac{1}{n-1} \sum_{j \ne i} r_j = \frac{n}{n-1} (r_i - \bar r)

    The baseline is independent of the candidate, so the policy gradient stays unbiased. Advantages of a prompt sum to
    0 and are exactly 0 where all of its rewards are equal. RLOO proper takes the reward less ``beta`` times the
    log-ratio of the whole completion.

    Args:
      reward: Reward of every candidate, reward units.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      Advantages ``[*batch, N]``, without gradient; 0 where masked, and where there is no other candidate.

    Raises:
      ValueError: If there are fewer than 2 candidates over all devices.

    Example:
      >>> [round(float(a), 3) for a in leave_one_out(jnp.array([1.0, 0.0, 0.0]))]
      [1.0, -0.5, -0.5]

    References:
      Ahmadian et al., 2024, arXiv:2402.14740.
    """
    _check_group(reward, axis_name)
    centred, count = _centred(reward, where, axis_name)
    return centred * (count / jnp.maximum(count - 1, 1))[..., None]


def group_normalised(
    reward: Float[Array, "*batch N"],
    where: Bool[Array, "*batch N"] | None = None,
    *,
    scale: str = "std",
    ddof: int = 1,
    eps: Numeric = 1e-4,
    axis_name: AxisName = None,
) -> Float[Array, "*batch N"]:
    r"""GRPO: rewards of a prompt's candidates, centred and divided by their spread.

    .. math:: A_i = \frac{r_i - \bar r}{\mathrm{std}(r) + \epsilon}

    Exactly 0 where all rewards of a prompt are equal. The division makes prompts of rare success or rare failure count
    more; ``scale="none"`` (Dr. GRPO) leaves it out. Pitfalls: the mean includes the candidate itself, which shrinks the
    gradient by ``(n - 1) / n``; completions that are taken out by ``where`` leave the mean and the spread too (to keep
    them there, mask them in the loss only); published code agrees neither on ``ddof`` nor on ``eps``.

    Args:
      reward: Reward of every candidate, reward units.
      where: True for real candidates; None means all.
      scale: ``"std"`` as above; ``"variance"`` divides by :math:`\sqrt{\mathrm{Var}(r) + \epsilon}`, the form in which
        GRPO's dynamics are analysed (with ``ddof=0``); ``"none"`` does not divide.
      ddof: 1 divides the sum of squares by ``n - 1`` (TRL, verl), 0 by ``n``.
      eps: >= 0, in reward units (their square for ``"variance"``): 1e-4 in TRL, 1e-6 in verl, 1e-8 in Dr. GRPO's code.
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      Advantages ``[*batch, N]``, without gradient; 0 where masked.

    Raises:
      ValueError: If ``scale`` is unknown, ``ddof`` is neither 0 nor 1, ``eps`` is negative, or there are fewer than 2
        candidates over all devices.

    Example:
      >>> [round(float(a), 3) for a in group_normalised(jnp.array([1.0, 0.0, 0.0, 1.0]), ddof=0)]
      [1.0, -1.0, -1.0, 1.0]

    References:
      Shao et al., 2024, arXiv:2402.03300, section 4.1; Liu et al., 2025, arXiv:2503.20783; Mroueh, 2025,
      arXiv:2503.06639.
    """
    check_choice("scale", scale, ("std", "variance", "none"))
    check_at_least("eps", eps, 0)
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof!r}")
    _check_group(reward, axis_name)
    centred, _ = _centred(reward, where, axis_name)
    if scale == "none":
        return centred
    spread = masked_std(centred, where, ddof=ddof, axis_name=axis_name)
    spread = spread + eps if scale == "std" else jnp.hypot(spread, jnp.sqrt(jnp.asarray(eps, spread.dtype)))
    return centred / jnp.where(spread > 0, spread, 1)[..., None]


def batch_whitened(
    advantage: Float[Array, "*batch"],
    mask: Bool[Array, "*batch"] | None = None,
    *,
    eps: Numeric = 1e-8,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""Advantages of the whole batch at mean 0 and variance 1.

    .. math:: \frac{A - \bar A}{\sqrt{\mathrm{Var}(A) + \epsilon}}

    Mean and variance (with Bessel's correction) are over every real entry of every axis and device. Over tokens, long
    completions weigh more in both. Microbatches must be whitened together, before they are split.

    Args:
      advantage: Any shape: one per token or one per candidate.
      mask: True for real entries, the same shape; None means all.
      eps: >= 0, added to the variance.
      axis_name: Mapped axis over which the batch is split.

    Returns:
      The same shape, without gradient; 0 where masked, and everywhere if all are equal.

    Raises:
      ValueError: If ``eps`` is a negative Python number.

    Example:
      >>> [round(float(a), 4) for a in batch_whitened(jnp.array([1.0, 2.0, 3.0]))]
      [-1.0, 0.0, 1.0]
    """
    check_at_least("eps", eps, 0)
    check_alike(mask, advantage)
    flat = None if mask is None else mask.reshape(-1)
    centred, _ = _centred(advantage.reshape(-1), flat, axis_name)
    spread = masked_std(centred, flat, ddof=1, axis_name=axis_name)
    spread = jnp.hypot(spread, jnp.sqrt(jnp.asarray(eps, spread.dtype)))
    return (centred / jnp.where(spread > 0, spread, 1)).reshape(advantage.shape)


def greedy_baseline(
    reward: Float[Array, "*batch N"],
    greedy_reward: Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch N"]:
    r"""ReMax: reward less that of the policy's own greedy completion.

    .. math:: A_i = r(x, y_i) - r(x, y_\text{greedy})

    The baseline does not depend on the samples: the policy gradient is unbiased from a single candidate. It costs one
    more completion per prompt, decoded greedily by the same policy. The official code multiplies the difference by
    ``gamma`` once per remaining token, the last included, and subtracts each token's own KL penalty only.

    Args:
      reward: Reward of every candidate, reward units.
      greedy_reward: Reward of the greedy completion of every prompt.
      where: True for real candidates; None means all.

    Returns:
      Advantages ``[*batch, N]``, without gradient; 0 where masked.

    Example:
      >>> greedy_baseline(jnp.array([1.0, 0.0]), jnp.array(0.75)).tolist()
      [0.25, -0.75]

    References:
      Li et al., 2023, arXiv:2310.10505, Algorithm 1.
    """
    reward = _constant(reward)
    check_alike(where, reward)
    advantage = reward - over_row("greedy_reward", _constant(greedy_reward), reward)
    return advantage if where is None else jnp.where(where, advantage, 0)


def prime_advantage(
    process_reward: Float[Array, "*batch N T"],
    reward: Float[Array, "*batch N"],
    mask: Bool[Array, "*batch N T"],
    *,
    gamma: Numeric = 1.0,
    baseline: str = "paper",
    scale: str = "none",
    whiten: bool = False,
    axis_name: AxisName = None,
) -> Float[Array, "*batch N T"]:
    r"""PRIME: leave-one-out advantages of implicit process rewards, and of the outcome.

    .. math:: A_t^i = \sum_{s \ge t} \gamma^{s-t} \left[ r_s^i - \frac{1}{n-1} \sum_{j \ne i} \bar r^j \right]
                      + r_o^i - \frac{1}{n-1} \sum_{j \ne i} r_o^j

    where :math:`\bar r^j` is the mean process reward of candidate j's tokens. Pitfall: the baseline is one per token,
    so a token's advantage depends on how many follow it. The official code is ``baseline="code"``,
    ``scale="batch_max"`` and ``whiten=True``; it scales each worker by its own maximum.

    Args:
      process_reward: Reward of every token, :math:`\beta \log(\pi_\phi / p_\text{ref})`, reward units: see
        `tiltjax.losses.process.implicit_process_reward`.
      reward: Outcome reward of every candidate.
      mask: True for real tokens; a candidate without any takes no part in the baselines.
      gamma: Discount of the process rewards per real token, in (0, 1].
      baseline: ``"paper"`` as above; ``"code"`` puts :math:`\frac{n}{n-1} r_s^i - \frac{1}{n-1} \sum_j \bar r^j` in the
        bracket, which is leave-one-out for completions of one token only.
      scale: ``"none"`` as above; ``"batch_max"`` first divides the process rewards by the largest absolute
        reward-to-go, undiscounted, of the whole batch (plus 1e-6), so that none exceeds 1 beside the outcome's.
      whiten: Whether `batch_whitened` is applied to the sum.
      axis_name: Mapped axis over which the prompts are split, for ``scale`` and ``whiten``.

    Returns:
      Advantages ``[*batch, N, T]``, without gradient; 0 where masked. Where there is no other candidate they are 0
      before any whitening.

    Raises:
      ValueError: If ``gamma`` is out of its range, ``baseline`` or ``scale`` is unknown, or N < 2.

    References:
      Cui et al., 2025, arXiv:2502.01456.
    """
    check_choice("baseline", baseline, ("paper", "code"))
    check_choice("scale", scale, ("none", "batch_max"))
    _check_group(reward, None)
    check_per_row("reward", reward, jnp.shape(process_reward)[:-1])
    process_reward, real = _constant(process_reward, mask), jnp.any(mask, axis=-1)
    if scale == "batch_max":
        largest = pmax(jnp.max(jnp.abs(reward_to_go(process_reward, mask)), initial=0), axis_name)
        process_reward = process_reward / (largest + 1e-6)
    mean = masked_mean(process_reward, mask)
    count = jnp.sum(real, axis=-1, keepdims=True, dtype=mean.dtype)
    others = jnp.maximum(count - 1, 1)
    total = jnp.sum(mean, axis=-1, keepdims=True)
    if baseline == "paper":
        bracket = process_reward - ((total - mean) / others)[..., None]
    else:
        bracket = process_reward * (count / others)[..., None] - (total / others)[..., None]
    process = reward_to_go(bracket, mask, gamma=gamma)
    advantage = jnp.where(mask & (count > 1)[..., None], process + leave_one_out(reward, real)[..., None], 0)
    return batch_whitened(advantage, mask, axis_name=axis_name) if whiten else advantage


def reinforce_pp_advantage(
    reward: Float[Array, "*batch"],
    token_kl: Float[Array, "*batch T"],
    mask: Bool[Array, "*batch T"],
    *,
    beta: Numeric,
    gamma: Numeric = 1.0,
    eps: Numeric = 1e-8,
    axis_name: AxisName = None,
) -> Float[Array, "*batch T"]:
    r"""REINFORCE++: rewards-to-go with a KL penalty in them, whitened over all tokens of the global batch.

    .. math:: A_t = \mathrm{whiten}\Big( \sum_{s \ge t} \gamma^{s-t} r_s \Big), \qquad
              r_s = \mathbf 1[s = \text{last}]\, r(x, y) - \beta \log \frac{\pi(y_s)}{p_\text{ref}(y_s)}

    To be used in `tiltjax.losses.policy_gradient.ppo_clip_loss`. The variant with a baseline passes
    ``group_normalised(reward, scale="none")``, ``beta=0`` and adds `tiltjax.losses.penalties.kl_k2` to the loss.

    Args:
      reward: Reward per completion, reward units.
      token_kl: Log-ratio per token (`tiltjax.losses.penalties.kl_k1`), nats.
      mask: True for real tokens.
      beta: Strength of the KL term, >= 0, reward units.
      gamma: Discount per real token, in (0, 1].
      eps: As in `batch_whitened`.
      axis_name: Mapped axis over which the batch is split.

    Returns:
      Advantages ``[*batch, T]``, without gradient; 0 where masked.

    Raises:
      ValueError: If ``beta``, ``gamma`` or ``eps`` is a Python number out of its range.

    References:
      Hu et al., 2025, arXiv:2501.03262.
    """
    returns = reward_to_go(token_reward(reward, token_kl, mask, beta=beta), mask, gamma=gamma)
    return batch_whitened(returns, mask, eps=eps, axis_name=axis_name)


def _constant(x: Array, mask: Array | None = None) -> Array:
    """``x`` without gradient, 0 where masked."""
    x = jax.lax.stop_gradient(as_float(x))
    check_alike(mask, x)
    return x if mask is None else jnp.where(mask, x, 0)


def _centred(x: Array, where: Array | None, axis_name: AxisName) -> tuple[Array, Array]:
    """``x - mean(x)`` over the last axis, 0 where masked, and how many entries are real."""
    x = _constant(x)
    check_alike(where, x)
    # Differences from the largest entry: equal rewards give exactly 0, whatever the rounding of their mean.
    shift = pmax(jnp.max(x if where is None else jnp.where(where, x, -jnp.inf), axis=-1, initial=-jnp.inf), axis_name)
    x = x - jnp.where(jnp.isfinite(shift), shift, 0)[..., None]
    centred = x - masked_mean(x, where, axis_name=axis_name)[..., None]
    count = masked_sum(jnp.ones_like(x), where, axis_name=axis_name)
    return centred if where is None else jnp.where(where, centred, 0), count


def _check_group(reward: Array, axis_name: AxisName) -> None:
    N = reward.shape[-1] * axis_size(axis_name)
    if N < 2:
        raise ValueError(f"reward must have at least 2 candidates per prompt, got {N}")
