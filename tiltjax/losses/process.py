r"""Process rewards without process labels: a log-ratio trained on outcomes scores every prefix on the way.

The implicit process reward model is a policy :math:`\pi` beside a reference, with the outcome reward written as
:math:`r(y) = \beta \log(\pi / p_\text{ref})(y)`. After any prefix the probability
ratio of the rest is 1 on average over the reference, so the log-ratio of a prefix is an exact soft value (`implicit_q`)
and that of one token or step is its advantage (`implicit_process_reward`). Any loss on outcomes trains it:

* `implicit_prm_ce_loss`, cross-entropy on each completion's correctness: PRIME's, updated online;
* `implicit_prm_dpo_loss`, correct completions of a prompt against wrong ones. Where the pairs are given,
  `tiltjax.losses.preference.dpo_loss`;
* `implicit_prm_kto_loss`, each completion against a reference point;
* `implicit_prm_nca_loss`, correct completions against all. Where there are rewards, `tiltjax.losses.binary.nca_loss`.

Then `step_reward` and `aggregate_steps` score a completion for best-of-N, and `tiltjax.advantages.prime_advantage`
turns token rewards into PRIME's advantages.
"""

import jax
import jax.numpy as jnp

from tiltjax.losses.binary import kto_loss
from tiltjax.losses.preference.dpo import dpo_loss, implicit_reward
from tiltjax.losses.reward_model import outcome_loss
from tiltjax.ops.checks import check_at_least, check_boolean, check_choice, check_per_row, check_positive
from tiltjax.ops.logspace import over_row
from tiltjax.ops.masked import as_float, check_alike, masked_mean, masked_sum
from tiltjax.types import Array, AxisName, Bool, Float, Int, Numeric

__all__ = [
    "aggregate_steps",
    "implicit_prm_ce_loss",
    "implicit_prm_dpo_loss",
    "implicit_prm_kto_loss",
    "implicit_prm_nca_loss",
    "implicit_process_reward",
    "implicit_q",
    "step_index",
    "step_reward",
]

_MODES = ("min", "product", "last", "mean", "sum")


def implicit_process_reward(
    token_logp: Float[Array, "*batch T"],
    ref_token_logp: Float[Array, "*batch T"],
    *,
    beta: Numeric,
    where: Bool[Array, "*batch T"] | None = None,
) -> Float[Array, "*batch T"]:
    r"""Process reward of every token: the gain in `implicit_q` that it brings.

    .. math:: r_t = q_t - q_{t-1} = \beta \log \frac{\pi(y_t | x, y_{<t})}{p_\text{ref}(y_t | x, y_{<t})}

    One term only: a sum from ``t - 1`` to ``t``, read token by token, would count every token twice. They add up to
    the outcome reward. These are PRIME's token rewards.

    Args:
      token_logp: Log-probability of the tokens under the trained policy, nats.
      ref_token_logp: The reference's, nats.
      beta: Scale of the reward, > 0, reward units per nat: the one it was trained with.
      where: True for real tokens; None means all.

    Returns:
      ``[*batch, T]``, reward units, without gradient; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> implicit_process_reward(jnp.array([-1.0, -2.0]), jnp.array([-2.0, -1.5]), beta=0.5).tolist()
      [0.5, -0.25]

    References:
      Yuan et al., 2024, arXiv:2412.01981; Cui et al., 2025, arXiv:2502.01456.
    """
    reward = implicit_reward(token_logp, ref_token_logp, beta=beta)
    check_alike(where, reward)
    return reward if where is None else jnp.where(where, reward, 0)


def implicit_q(
    token_logp: Float[Array, "*batch T"],
    ref_token_logp: Float[Array, "*batch T"],
    *,
    beta: Numeric,
    where: Bool[Array, "*batch T"] | None = None,
) -> Float[Array, "*batch T"]:
    r"""Soft value of the prefix that ends with each token.

    .. math:: q_t = \beta \sum_{i \le t} \log \frac{\pi(y_i | x, y_{<i})}{p_\text{ref}(y_i | x, y_{<i})}
              = \beta \log E_{y \sim p_\text{ref}(\cdot | y_{\le t})} e^{r(y) / \beta}

    The expectation is over completions by the reference given the prefix with token ``t`` in it. So
    :math:`E_{p_\text{ref}}[r | y_{\le t}] \le q_t \le \max r`, and it is 0 before the first token. Pitfall: the
    identity is about the implicit reward of this policy; whether that is the true reward is a matter of the training.

    Args:
      token_logp: Log-probability of the tokens under the trained policy, nats.
      ref_token_logp: The reference's, nats.
      beta: Scale of the reward, > 0, reward units per nat.
      where: True for real tokens; None means all.

    Returns:
      ``[*batch, T]``, reward units, without gradient; at the last real token the outcome reward, and 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> implicit_q(jnp.array([-1.0, -2.0]), jnp.array([-2.0, -1.5]), beta=0.5).tolist()
      [0.5, 0.25]

    References:
      Yuan et al., 2024, arXiv:2412.01981, Proposition 3.1.
    """
    q = jnp.cumsum(implicit_process_reward(token_logp, ref_token_logp, beta=beta, where=where), axis=-1)
    return q if where is None else jnp.where(where, q, 0)


def step_index(last: Bool[Array, "*batch T"]) -> Int[Array, "*batch T"]:
    """The step that each token belongs to, from the tokens that end one.

    Args:
      last: True on the last token of every step, such as a line break; that token belongs to the step it ends.

    Returns:
      0 up to and with the first such token, then 1, and so on, ``[*batch, T]``.

    Example:
      >>> step_index(jnp.array([False, True, False, False, True, False])).tolist()
      [0, 0, 1, 1, 1, 2]
    """
    ends = jnp.asarray(last).astype(jnp.int32)
    return jnp.cumsum(ends, axis=-1) - ends


def step_reward(
    token_reward: Float[Array, "*batch T"],
    step: Int[Array, "*batch T"],
    *,
    num_steps: int,
    where: Bool[Array, "*batch T"] | None = None,
) -> tuple[Float[Array, "*batch K"], Bool[Array, "*batch K"]]:
    r"""Reward of every step: the sum over exactly its tokens.

    .. math:: R_k = \sum_{t : \mathrm{step}(t) = k} r_t

    Args:
      token_reward: Reward of every token (`implicit_process_reward`), reward units.
      step: The step each token belongs to (`step_index`); tokens out of ``[0, num_steps)`` belong to none.
      num_steps: How many steps at most, ``K`` >= 1; static.
      where: True for real tokens; None means all.

    Returns:
      The rewards ``[*batch, K]``, 0 for a step without a real token, and whether each step has one.

    Raises:
      ValueError: If ``num_steps`` is below 1.

    Example:
      >>> reward, real = step_reward(jnp.array([1.0, 2.0, 4.0]), jnp.array([0, 0, 1]), num_steps=3)
      >>> reward.tolist(), real.tolist()
      ([3.0, 4.0, 0.0], [True, True, False])

    References:
      Yuan et al., 2024, arXiv:2412.01981.
    """
    check_at_least("num_steps", num_steps, 1)
    check_alike(where, token_reward, step)
    member = jax.nn.one_hot(step, num_steps, dtype=bool)
    if where is not None:
        member &= where[..., None]
    reward = jnp.where(member, as_float(token_reward)[..., None], 0)
    return jnp.sum(reward, axis=-2), jnp.any(member, axis=-2)


def aggregate_steps(
    reward: Float[Array, "*batch K"], *, mode: str, where: Bool[Array, "*batch K"] | None = None
) -> Float[Array, "*batch"]:
    """One score of a completion from those of its steps, to rank completions by.

    Args:
      reward: Score of every step: process rewards, logits or probabilities.
      mode: "min", the weakest step; "product", for probabilities in [0, 1] only (that every step is good, were they
        independent: of rewards of either sign it means nothing); "last", the last real step; "mean"; or "sum", which
        of implicit process rewards is the outcome reward.
      where: True for real steps; None means all.

    Returns:
      ``[*batch]``; 0 without a real step.

    Raises:
      ValueError: If ``mode`` is unknown.

    Example:
      >>> p = jnp.array([0.5, 0.25, 1.0])
      >>> [float(aggregate_steps(p, mode=m)) for m in ("min", "product", "last", "sum")]
      [0.25, 0.125, 1.0, 1.75]

    References:
      Lightman et al., 2023, arXiv:2305.20050 (product, min); Yuan et al., 2024, arXiv:2412.01981.
    """
    check_choice("mode", mode, _MODES)
    check_alike(where, reward)
    if mode == "mean":
        return masked_mean(reward, where)
    reward = as_float(reward)
    real = jnp.full(reward.shape, True) if where is None else where
    if mode == "last":
        after = jnp.cumsum(real[..., ::-1], axis=-1)[..., ::-1]
        return masked_sum(reward, real & (after == 1))
    if mode == "sum":
        return masked_sum(reward, real)
    if mode == "min":
        value = jnp.min(jnp.where(real, reward, jnp.inf), axis=-1, initial=jnp.inf)
    else:
        value = jnp.prod(jnp.where(real, reward, 1), axis=-1)
    return jnp.where(jnp.any(real, axis=-1), value, 0)


def implicit_prm_ce_loss(
    logp: Float[Array, "*batch N"],
    ref_logp: Float[Array, "*batch N"],
    correct: Bool[Array, "*batch N"],
    *,
    beta: Numeric,
    bias: Numeric | Float[Array, "*batch"] = 0.0,
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch N"]:
    r"""Implicit process reward model by cross-entropy on outcomes: needs one completion per prompt.

    .. math:: -c \log \sigma(r + b) - (1 - c) \log \sigma(-r - b), \qquad r = \beta \log \frac{\pi(y)}{p_\text{ref}(y)}

    Pitfall: with ``bias`` 0, as in the official code, the logit is a log-ratio, so :math:`E_{p_\text{ref}}
    e^{r/\beta} = 1` whatever the labels: the log-odds of correctness cannot be fitted, even by a policy that can do
    anything. A trained bias absorbs the constant, at best :math:`b = \beta \log E_{p_\text{ref}} e^{s/\beta}` for true
    log-odds ``s``, which differs from prompt to prompt; process rewards do not contain it.

    Args:
      logp: Log-probability of every candidate under the trained policy, nats.
      ref_logp: The reference's, nats; no gradient.
      correct: Whether each candidate is.
      beta: Scale of the reward, > 0, per nat; 0.1 in the official code, 0.05 in PRIME's.
      bias: ``b``, trained where it is an array: a number, or one per prompt.
      where: True for real candidates; None means all.

    Returns:
      Loss per candidate ``[*batch, N]``, nats; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> arrays = jnp.array([-4.0, -4.0]), jnp.array([-6.0, -6.0]), jnp.array([True, False])
      >>> [round(float(x), 4) for x in implicit_prm_ce_loss(*arrays, beta=0.5)]
      [0.3133, 1.3133]

    References:
      Yuan et al., 2024, arXiv:2412.01981; Cui et al., 2025, arXiv:2502.01456.
    """
    check_positive("beta", beta)
    check_boolean("correct", correct)
    logit = _implicit(logp, ref_logp, beta, where)
    return outcome_loss(logit + over_row("bias", bias, logit), correct, where=where)


def implicit_prm_dpo_loss(
    logp: Float[Array, "*batch N"],
    ref_logp: Float[Array, "*batch N"],
    correct: Bool[Array, "*batch N"],
    *,
    beta: Numeric,
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Implicit process reward model by DPO: every correct candidate of a prompt against every wrong one.

    .. math:: -\frac1{|C||W|} \sum_{i \in C} \sum_{j \in W} \log \sigma(r_i - r_j), \qquad
              r = \beta \log \frac{\pi(y)}{p_\text{ref}(y)}

    A constant of the prompt cancels, so, unlike `implicit_prm_ce_loss` without a bias, it fits true log-odds of
    correctness up to that constant, from labels drawn independently. Prompts with one kind of candidate only teach
    nothing. The official code picks pairs beforehand: pass those to `tiltjax.losses.preference.dpo_loss`.

    Args:
      logp: Log-probability of every candidate under the trained policy, nats.
      ref_logp: The reference's, nats; no gradient.
      correct: Whether each candidate is.
      beta: Scale of the reward, > 0, per nat; 0.1 in the official code.
      where: True for real candidates; None means all.

    Returns:
      Loss per prompt ``[*batch]``, nats, a mean over its pairs; 0 without a pair.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Yuan et al., 2024, arXiv:2412.01981; Rafailov et al., 2023, arXiv:2305.18290, Eq. 7.
    """
    check_boolean("correct", correct)
    check_per_row("beta", beta, ())
    logp, ref_logp, correct = as_float(logp), as_float(ref_logp), jnp.asarray(correct)
    check_alike(where, logp, ref_logp, correct)
    real = jnp.full(logp.shape, True) if where is None else where
    pair = (real & correct)[..., :, None] & (real & ~correct)[..., None, :]
    loss = dpo_loss(_pairs(logp), _pairs(ref_logp), beta=beta, where=jnp.stack([pair, pair], axis=-1))
    flat = (*pair.shape[:-2], -1)
    mean = masked_mean(loss.reshape(flat), pair.reshape(flat))
    # A candidate in no pair has no loss, but it may not be unknown.
    unknown = jnp.any(real & jnp.isnan(jax.lax.stop_gradient(logp + ref_logp)), axis=-1)
    return jnp.where(unknown, jnp.nan, mean)


def implicit_prm_kto_loss(
    logp: Float[Array, "*batch N"],
    ref_logp: Float[Array, "*batch N"],
    correct: Bool[Array, "*batch N"],
    mismatched_log_ratio: Float[Array, "*batch M"],
    *,
    beta: Numeric,
    where: Bool[Array, "*batch N"] | None = None,
    mismatched_where: Bool[Array, "*batch M"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch N"]:
    """Implicit process reward model by KTO: `tiltjax.losses.binary.kto_loss` where correct is desirable.

    See there for the formula, its reference point and its pitfalls. Both classes weigh alike.

    Args:
      logp: Log-probability of every example under the trained policy, nats. The last axis is the batch, examples of
        all prompts.
      ref_logp: The reference's, nats; no gradient.
      correct: Whether each example is.
      mismatched_log_ratio: ``log(pi / p_ref)`` of completions under other prompts than their own, nats; no gradient.
      beta: Scale of the reward, > 0, per nat; 0.01 in the official code.
      where: True for real examples.
      mismatched_where: True for real mismatched pairs.
      axis_name: Mapped axis over which examples and mismatched pairs are split.

    Returns:
      Loss per example ``[*batch, N]``, in [0, 1]; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Yuan et al., 2024, arXiv:2412.01981; Ethayarajh et al., 2024, arXiv:2402.01306, Eqs. 7-8.
    """
    check_boolean("correct", correct)
    return kto_loss(
        logp,
        ref_logp,
        correct,
        mismatched_log_ratio,
        beta=beta,
        where=where,
        mismatched_where=mismatched_where,
        axis_name=axis_name,
    )


def implicit_prm_nca_loss(
    logp: Float[Array, "*batch N"],
    ref_logp: Float[Array, "*batch N"],
    correct: Bool[Array, "*batch N"],
    *,
    beta: Numeric,
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""Implicit process reward model by noise contrastive alignment: correct candidates against all of them.

    .. math:: -\frac1{|C|} \sum_{i \in C} \log \sigma(r_i) - \frac1n \sum_i \log \sigma(-r_i), \qquad
              r = \beta \log \frac{\pi(y)}{p_\text{ref}(y)}

    The limit ``alpha -> 0`` of `tiltjax.losses.binary.nca_loss` with correctness as the reward, and with one correct
    of two candidates `tiltjax.losses.binary.nca_pair_loss`. A prompt without a correct candidate keeps the second
    term only, where that limit would imitate its wrong ones.

    Args:
      logp: Log-probability of every candidate under the trained policy, nats.
      ref_logp: The reference's, nats; no gradient.
      correct: Whether each candidate is.
      beta: Scale of the reward, > 0, per nat.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split; the result is global.

    Returns:
      Loss per prompt ``[*batch]``, nats; 0 without a real candidate.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Yuan et al., 2024, arXiv:2412.01981; Chen et al., 2024, arXiv:2402.05369.
    """
    check_positive("beta", beta)
    check_boolean("correct", correct)
    reward = _implicit(logp, ref_logp, beta, where)
    check_alike(where, reward, correct)
    right = correct if where is None else correct & where
    drawn = masked_mean(jax.nn.log_sigmoid(reward), right, axis_name=axis_name)
    return -drawn - masked_mean(jax.nn.log_sigmoid(-reward), where, axis_name=axis_name)


def _implicit(logp: Array, ref_logp: Array, beta: Numeric, where: Array | None) -> Array:
    """The implicit reward with its gradient (`implicit_reward` has none), 0 where masked."""
    check_per_row("beta", beta, ())
    logp, ref_logp = as_float(logp), jax.lax.stop_gradient(as_float(ref_logp))
    check_alike(where, logp, ref_logp)
    reward = beta * (logp - ref_logp)
    return reward if where is None else jnp.where(where, reward, 0)


def _pairs(x: Array) -> Array:
    """``[..., i, j] = (x_i, x_j)``."""
    return jnp.stack(jnp.broadcast_arrays(x[..., :, None], x[..., None, :]), axis=-1)
