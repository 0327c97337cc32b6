"""Labels, advantages and adapters that several records share: small functions of a round and its batch."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tiltjax.advantages import (
    gae,
    greedy_baseline,
    group_normalised,
    leave_one_out,
    reinforce_pp_advantage,
    token_reward,
)
from tiltjax.data.candidates import token_mask
from tiltjax.losses.game import self_play_reward, spo_reward
from tiltjax.losses.penalties import kl_k1
from tiltjax.losses.policy_gradient import aggregate
from tiltjax.ops.masked import Average, average
from tiltjax.ops.tokens import sequence_logp
from tiltjax.rewards.shaping import overlong_penalty
from tiltjax.samplers.best_of_n import best_of_n
from tiltjax.train.method import Batch, Loss, Prepare, Round, View
from tiltjax.types import Array, Bool, Float, Int, Numeric

__all__ = [
    "actor_critic",
    "balanced",
    "best_and_worst",
    "centred",
    "chain",
    "chosen",
    "desirable",
    "drawn_logp",
    "every",
    "first_source",
    "greedy_centred",
    "group_scaled",
    "implied",
    "informative",
    "judged",
    "left_out",
    "lengths",
    "logp_of",
    "overlong",
    "own",
    "per_completion",
    "preferences",
    "ranked",
    "regularised",
    "select",
    "surrogate",
    "unregularised",
    "whitened_to_go",
    "win_rates",
    "win_rates_against",
]


def unregularised(beta: Numeric) -> bool:
    """Whether there is no KL term: 0 times the log-ratio of a token that the reference rules out would be NaN."""
    return isinstance(beta, int | float) and beta == 0


def logp_of(view: View, batch: Batch) -> Float[Array, "B N"]:
    """Log-probability of every completion under a view, nats: of the tokens that are learned from."""
    return sequence_logp(view.token_logp, token_mask(batch.candidates))


def drawn_logp(batch: Batch) -> Float[Array, "B N"]:
    """Log-probability of every completion under whoever drew it, nats: of the same tokens."""
    return sequence_logp(batch.candidates.old_token_logp, token_mask(batch.candidates))


def lengths(batch: Batch) -> Int[Array, "B N"]:
    """Tokens that make up `logp_of` of every completion, EOS included."""
    return jnp.sum(token_mask(batch.candidates), axis=-1)


def chain(*steps: Prepare) -> Prepare:
    """One step after the other."""

    def run(now: Round, batch: Batch) -> Batch:
        for step in steps:
            batch = step(now, batch)
        return batch

    return run


def _any(where: Bool[Array, "B N"]) -> Bool[Array, " B"]:
    return jnp.any(where, axis=-1)


def every(where: Bool[Array, "B N"]) -> Bool[Array, " B"]:
    """Prompts all of whose candidates count: what a loss on pairs needs."""
    return jnp.all(where, axis=-1)


def own(where: Bool[Array, "B N"]) -> Bool[Array, " B"]:
    """Prompts whose own candidate counts, of those that `Method.cross` puts together."""
    return where[:, 0]


def per_completion(kernel: Callable[..., Array], *, counts: Callable[[Array], Array] = _any) -> Loss:
    """A loss from ``kernel(logp, batch, beta)``, whose values are averaged over the prompts or candidates that count.

    Args:
      kernel: Gives one value per prompt, ``[B]``, or per candidate, ``[B, N]``.
      counts: ``where [B, N] -> [B]``: which prompts count, where the kernel gives one value of each. `every` for pairs.

    Returns:
      `Loss`.
    """

    def loss(view: View, batch: Batch, beta: Numeric) -> Average:
        values = kernel(logp_of(view, batch), batch, beta)
        where = batch.where if values.ndim == 2 else counts(batch.where)
        return average(values, where)

    return loss


def surrogate(kernel: Callable[..., Array], *, mode: str, kl: Callable[..., Array] | None = None) -> Loss:
    """A policy-gradient loss from a kernel of `tiltjax.losses.policy_gradient`.

    Args:
      kernel: ``(token_logp, old_token_logp, advantage, mask)`` to one value per token.
      mode: Of `tiltjax.losses.policy_gradient.aggregate`; "dr_grpo" divides by the width of the completions.
      kl: ``(token_logp, ref_token_logp, mask)``: a penalty of `tiltjax.losses.penalties` that is added at strength
        ``beta``; None where the KL is in the reward, or nowhere.

    Returns:
      `Loss`.
    """

    def loss(view: View, batch: Batch, beta: Numeric) -> Average:
        mask = batch.mask
        values = kernel(view.token_logp, batch.old.token_logp, batch.advantage, mask)
        if kl is not None and not unregularised(beta):
            values = values + beta * kl(view.token_logp, batch.ref.token_logp, mask)
        width = mask.shape[-1] if mode == "dr_grpo" else None
        return aggregate(values, mask, mode=mode, max_length=width, where=batch.where)

    return loss


def select(batch: Batch, index: Int[Array, "B K"]) -> Batch:
    """The candidates at ``index`` of every prompt, with all that is known of them.

    Args:
      batch: Any.
      index: K places in ``[0, N)`` per prompt.

    Returns:
      K candidates per prompt.
    """
    rows = jnp.arange(index.shape[0])[:, None]
    inner = {"prompt", "prompt_mask"}
    old = {f.name: getattr(batch.candidates, f.name) for f in dataclasses.fields(batch.candidates)}
    new = {name: x if x is None or name in inner else x[rows, index] for name, x in old.items()}
    take = lambda tree: jax.tree.map(lambda x: x[rows, index], tree)  # noqa: E731
    changes = {name: take(getattr(batch, name)) for name in ("source", "old_view", "ref_view", "advantage", "returns")}
    return batch.change(candidates=type(batch.candidates)(**new), **changes)


def first_source(now: Round, batch: Batch) -> Batch:
    """Only the candidates of the first source count; the others are there to be compared with."""
    return batch.change(where=batch.where & (batch.source == 0))


def best_and_worst(now: Round, batch: Batch) -> Batch:
    """The candidates of largest and of smallest reward as a pair; a prompt whose candidates all tie does not count."""
    reward, where = batch.reward, batch.where
    pair = jnp.stack([best_of_n(reward, where=where), best_of_n(-reward, where=where)], axis=-1)
    batch = select(batch, pair)
    decided = batch.reward[:, :1] > batch.reward[:, 1:]
    return batch.change(where=batch.where & decided)


def preferences(reward: Float[Array, "B N"]) -> Float[Array, "B N N"]:
    """Probability that candidate i is preferred to candidate j: Bradley and Terry's, of the rewards in nats."""
    return jax.nn.sigmoid(reward[..., :, None] - reward[..., None, :])


def judged(now: Round, batch: Batch) -> Batch:
    """Two candidates, put in the order of one noisy comparison: chosen first."""
    win = preferences(batch.reward)[:, 0, 1]
    first = jax.random.bernoulli(now.key, win)[:, None]
    return select(batch, jnp.where(first, jnp.array([[0, 1]]), jnp.array([[1, 0]])))


def chosen(now: Round, batch: Batch) -> Batch:
    """Of two candidates that one noisy comparison put in order, only the chosen counts."""
    batch = judged(now, batch)
    return batch.change(where=batch.where & jnp.array([[True, False]]))


def ranked(now: Round, batch: Batch) -> Batch:
    """All candidates, put in the order of one noisy ranking: Plackett and Luce's, of the rewards in nats."""
    noise = jax.random.gumbel(now.key, batch.reward.shape, batch.reward.dtype)
    return select(batch, jnp.argsort(-(batch.reward + noise), axis=-1))


def desirable(now: Round, batch: Batch) -> Batch:
    """The reward is 1 where the candidate is correct, else 0; only the prompt's own candidate counts.

    Where nobody said what is correct, a coin with the odds of the reward did.
    """
    correct = now.feedback.correct
    if correct is None:
        correct = jax.random.bernoulli(now.key, jax.nn.sigmoid(batch.reward))
    own = jnp.arange(batch.where.shape[1])[None] == 0
    return batch.change(reward=correct.astype(batch.reward.dtype), where=batch.where & own)


def balanced(now: Round, batch: Batch) -> Batch:
    """The advantage is the weight of a candidate's class, desirable or not: KTO's rule for classes of unequal size.

    The rarer class weighs more, and as little more as brings the ratio of weighted counts, desirable to undesirable,
    into [1, 4/3] (Ethayarajh et al., 2024, arXiv:2402.01306). Counts are those of the round: of the whole
    data set where the method is offline, of the mini-batch where it is online. Where a class is empty, all weigh 1.
    """
    good = batch.reward > 0
    number = jnp.sum(batch.where & good), jnp.sum(batch.where & ~good)
    ratio = number[0] / jnp.maximum(number[1], 1)
    # The factor of the desirable by which the ratio gets to the nearer end of the interval; 1 inside.
    factor = jnp.clip(ratio, 1.0, 4 / 3) / jnp.where(ratio > 0, ratio, 1)
    factor = jnp.where((number[0] > 0) & (number[1] > 0), factor, 1)
    weight = jnp.where(good, jnp.maximum(factor, 1), jnp.maximum(1 / factor, 1))
    return batch.change(advantage=weight)


def win_rates(now: Round, batch: Batch) -> Batch:
    """The reward is how often a candidate beats the prompt's others, in expectation."""
    return batch.change(reward=self_play_reward(preferences(batch.reward), where=batch.where))


def win_rates_against(now: Round, batch: Batch) -> Batch:
    """The reward is how often a candidate of the first source beats those of the second; only the first counts."""
    wins = preferences(batch.reward)
    met = (batch.source == 1) & batch.where
    met = jnp.broadcast_to(met[:, None, :], wins.shape)
    return first_source(now, batch.change(reward=spo_reward(wins, where=met)))


def regularised(now: Round, batch: Batch) -> Batch:
    """The KL in the reward: the reward less ``beta`` times the log-ratio of the whole completion to the reference."""
    if unregularised(now.beta):
        return batch
    ratio = logp_of(batch.old, batch) - logp_of(batch.ref, batch)
    return batch.change(reward=batch.reward - now.beta * ratio)


def implied(now: Round, batch: Batch) -> Batch:
    """The reward whose tilt of the sampler is the tilt of the reference: ``r + beta log(ref / sampler)``."""
    return batch.change(reward=batch.reward + now.beta * (logp_of(batch.ref, batch) - drawn_logp(batch)))


def informative(now: Round, batch: Batch) -> Batch:
    """DAPO's dynamic sampling: prompts whose candidates all have one reward do not count.

    Where the loop can (`Method.resample`) it has drawn others in their place, and this masks what is left.
    """
    low = jnp.min(jnp.where(batch.where, batch.reward, jnp.inf), axis=-1)
    high = jnp.max(jnp.where(batch.where, batch.reward, -jnp.inf), axis=-1)
    return batch.change(where=batch.where & (high > low)[:, None])


def overlong(now: Round, batch: Batch) -> Batch:
    """DAPO's soft penalty over the last fifth of the budget of tokens; below five tokens there is none."""
    T = batch.candidates.completion.shape[-1]
    if T < 5:
        return batch
    written = jnp.sum(batch.candidates.completion_mask, axis=-1)
    return batch.change(reward=batch.reward + overlong_penalty(written, max_length=T, cache=T // 5))


def left_out(now: Round, batch: Batch) -> Batch:
    """`tiltjax.advantages.leave_one_out`."""
    return batch.change(advantage=leave_one_out(batch.reward, batch.where))


def group_scaled(now: Round, batch: Batch) -> Batch:
    """`tiltjax.advantages.group_normalised`, divided by the standard deviation."""
    return batch.change(advantage=group_normalised(batch.reward, batch.where))


def centred(now: Round, batch: Batch) -> Batch:
    """`tiltjax.advantages.group_normalised`, not divided: Dr. GRPO."""
    return batch.change(advantage=group_normalised(batch.reward, batch.where, scale="none"))


def greedy_centred(now: Round, batch: Batch) -> Batch:
    """`tiltjax.advantages.greedy_baseline`: the last candidate is the policy's greedy one, and only a baseline."""
    batch = first_source(now, batch)
    return batch.change(advantage=greedy_baseline(batch.reward, batch.reward[:, -1], batch.where))


def whitened_to_go(now: Round, batch: Batch) -> Batch:
    """`tiltjax.advantages.reinforce_pp_advantage`."""
    ratio = _log_ratio(batch, now.beta)
    return batch.change(advantage=reinforce_pp_advantage(batch.reward, ratio, batch.mask, beta=now.beta))


def actor_critic(
    reward: Float[Array, "B N"],
    batch: Batch,
    *,
    beta: Numeric,
    critic: int = 0,
    lam: float = 0.95,
) -> tuple[Float[Array, "B N T"], Float[Array, "B N T"]]:
    """`tiltjax.advantages.gae` with the KL to the reference in the reward of every token.

    Args:
      reward: Per candidate; it lands on the last real token.
      batch: Any with values.
      beta: Strength of the KL term; may be negative, for a cost.
      critic: Which of the critics.
      lam: Of `gae`.

    Returns:
      Advantages and returns.

    Raises:
      ValueError: If the view has no values.
    """
    mask = batch.mask
    ratio = _log_ratio(batch, beta)
    if batch.old.value is None:
        raise ValueError("view must give values for an actor-critic method, got None")
    per_token = token_reward(reward, jnp.zeros_like(ratio), mask, beta=0.0) - beta * ratio
    return gae(per_token, batch.old.value[..., critic], mask, lam=lam)


def _log_ratio(batch: Batch, beta: Numeric) -> Float[Array, "B N T"]:
    """Of every token to the reference; 0 where there is no KL term."""
    if unregularised(beta):
        return jnp.zeros(batch.mask.shape)
    return kl_k1(batch.old.token_logp, batch.ref.token_logp, batch.mask)
