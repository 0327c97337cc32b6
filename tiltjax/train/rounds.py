"""The one loop that runs every `tiltjax.train.method.Method`, in three functions.

`collect` draws, a ``score`` of the user's rewards, `fit` labels the candidates and takes the gradient steps; `play` is
one round of the three. Everything is pure: a language model learns with rewards from the host between two compiled
functions, and a small world runs inside one `jax.jit`, scanned over rounds and mapped over ``beta`` and seeds. Offline
is one round.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from tiltjax.data.candidates import Candidates, alike, learned
from tiltjax.ops.checks import check_at_least
from tiltjax.ops.masked import Average, average
from tiltjax.ops.tokens import sequence_logp
from tiltjax.train.method import Batch, Feedback, Method, Players, Round, Sample, View, ViewFn
from tiltjax.train.reference import soft_update
from tiltjax.train.sharding import copied
from tiltjax.train.state import TrainState, init_state
from tiltjax.train.step import train_step
from tiltjax.types import Array, Int, Numeric, Params, PRNGKey, PyTree

__all__ = ["collect", "draw", "fit", "init_players", "join", "label", "measures", "objective", "play", "prepare"]


def init_players(method: Method, params: Params, tx: optax.GradientTransformation) -> Players:
    """The players before the first round, all of them the same policy.

    Args:
      method: The record.
      params: What is trained.
      tx: Optimizer.

    Returns:
      `Players`; the frozen ones are copies, so the policy's buffers may be donated.
    """
    copies = [copied(params) for _ in range(3)]
    memory = None if method.memory is None else method.memory.init(params)
    return Players(
        state=init_state(params, tx),
        reference=copies[0],
        initial=copies[1],
        previous=copies[2],
        memory=memory,
        round=jnp.int32(0),
    )


def collect(method: Method, players: Players, prompts: Candidates, key: PRNGKey, *, sample: Sample) -> Candidates:
    """Draws a round's candidates, from whom the record says.

    Args:
      method: The record.
      players: Policies.
      prompts: ``prompt`` and ``prompt_mask``; the rest is not read.
      key: Consumed.
      sample: `Sample`.

    Returns:
      `Candidates` with ``old_token_logp``, in the order of `Method.draw`; with `Method.cross`, the prompt's own one
      first and without ``old_token_logp``.
    """
    return join(method, prompts, draw(method, players, prompts, key, sample=sample))


def draw(method: Method, players: Players, prompts: Candidates, key: PRNGKey, *, sample: Sample) -> list[Candidates]:
    """The first half of `collect`: begins what may go on while the host does something else.

    Args:
      method: The record.
      players: Policies.
      prompts: As for `collect`.
      key: Consumed.
      sample: `Sample`.

    Returns:
      What every source of `Method.draw` wrote.
    """
    keys = jax.random.split(key, len(method.draw))
    return [sample(k, players, source, prompts, num) for k, (source, num) in zip(keys, method.draw, strict=True)]


def join(method: Method, prompts: Candidates, parts: Sequence[Candidates]) -> Candidates:
    """The second half of `collect`: the candidates of a prompt side by side.

    Args:
      method: The record.
      prompts: As for `collect`.
      parts: From `draw`.

    Returns:
      As `collect`.
    """
    parts = alike(parts)
    names = ["completion", "completion_mask", *(["old_token_logp"] if method.cross == 1 else [])]
    names += [name for name in ("loss_mask", "support") if getattr(parts[0], name) is not None]
    joined = {name: jnp.concatenate([getattr(part, name) for part in parts], axis=1) for name in names}
    if method.cross > 1:
        if "support" in joined:
            raise ValueError(f"top_k and top_p must be off for {method.name}: it looks at completions of other prompts")
        rolled = [jax.tree.map(lambda x: jnp.roll(x, -j, axis=0), joined) for j in range(method.cross)]  # noqa: B023
        joined = {name: jnp.concatenate([part[name] for part in rolled], axis=1) for name in joined}
    return Candidates(prompt=prompts.prompt, prompt_mask=prompts.prompt_mask, **joined)


def prepare(
    method: Method,
    players: Players,
    candidates: Candidates,
    feedback: Feedback,
    key: PRNGKey,
    *,
    view: ViewFn,
    beta: Numeric,
) -> tuple[PyTree, Batch]:
    """Views, labels and advantages of a round: all that is constant during its gradient steps.

    Candidates without a token to learn from (`tiltjax.data.candidates.learned`) are labelled as the others are, and
    then do not count.

    Args:
      method: The record.
      players: Policies, as they were when the candidates were drawn.
      candidates: From `collect`.
      feedback: Of the candidates.
      key: Of the labels, consumed.
      view: `ViewFn`.
      beta: Strength of the KL term, as of `Method.own_beta`; may be traced.

    Returns:
      The method's memory after the round, and the `Batch`.

    Raises:
      ValueError: If the method cannot have that ``beta``.
    """
    N = candidates.completion.shape[1]
    counts = [num for _, num in method.draw] if method.cross == 1 else [N]
    sources = [i for i, num in enumerate(counts) for _ in range(num)]
    old = view(players.state.params, candidates) if method.reads_old else None
    ref = view(players.reference, candidates) if method.reads_reference else None
    now = Round(feedback=feedback, beta=beta, key=key, round=players.round, memory=players.memory, view=view)
    return label(method, candidates, now, source=jnp.array(sources), old=old, ref=ref)


def label(
    method: Method,
    candidates: Candidates,
    now: Round,
    *,
    source: Int[Array, " N"],
    old: View | None = None,
    ref: View | None = None,
) -> tuple[PyTree, Batch]:
    """The second half of `prepare`: memory, labels and advantages, once the views are known.

    Args:
      method: The record.
      candidates: From `collect`.
      now: Of the round.
      source: Which entry of `Method.draw` wrote each candidate.
      old: The policy's view, where the method reads it.
      ref: The reference's, likewise.

    Returns:
      As `prepare`.

    Raises:
      ValueError: If the method cannot have that ``beta``.
    """
    method.check_beta(now.beta)
    where = jnp.ones(candidates.completion.shape[:2], bool) if candidates.where is None else candidates.where
    batch = Batch(
        candidates=dataclasses.replace(candidates, where=where, reward=now.feedback.reward),
        source=jnp.broadcast_to(source[None], where.shape),
        old_view=old,
        ref_view=ref,
    )
    if method.memory is not None:
        now = dataclasses.replace(now, memory=method.memory.update(now, batch, now.memory))
    for step in (method.label, method.advantage):
        batch = batch if step is None else step(now, batch)
    # Not before: who is masked out of the loss still has a part in the baselines of the others.
    batch = batch.change(where=learned(batch.candidates))
    return now.memory, jax.lax.stop_gradient(batch)


def objective(method: Method, *, view: ViewFn, beta: Numeric) -> Callable:
    """The loss function of a train step on a `Batch`.

    In the first gradient step of a round the policy equals the sampler, so its own log-probabilities are used as the
    old ones: the importance weight is exactly 1, even if two compilations of one model round differently.

    Args:
      method: The record.
      view: `ViewFn`.
      beta: Strength of the KL term, as of `Method.own_beta`; may be traced.

    Returns:
      A `tiltjax.train.step.LossFn`; logs what `measures` does, and what the record adds.
    """

    def loss_fn(params: Params, frozen: Params, batch: Batch, key: PRNGKey):
        now = view(params, batch.candidates)
        if batch.fresh is not None and batch.old_view is not None:
            same = jax.lax.stop_gradient(now.token_logp)
            logp = jnp.where(batch.fresh[:, None, None], same, batch.old.token_logp)
            batch = batch.change(old_view=dataclasses.replace(batch.old, token_logp=logp))
        own = {} if method.measures is None else method.measures(jax.lax.stop_gradient(now), batch, beta)
        return method.loss(now, batch, beta), measures(now, batch) | own

    return loss_fn


def measures(now: View, batch: Batch) -> dict[str, Average]:
    """Metrics over real tokens and candidates only.

    Args:
      now: The policy's view.
      batch: Of the gradient step.

    Returns:
      ``logp`` of the completions (nats), ``entropy`` (nats per token) and ``length`` (tokens); ``reward`` (of the
      method), ``off_policy``, the distance of the ratio to the old policy from 1, and ``kl_k1`` and ``kl_k3``, two
      estimates of the KL to the reference (nats), where the batch has them.
    """
    now, mask, written = jax.lax.stop_gradient(now), batch.mask, batch.candidates.completion_mask
    real = batch.where & jnp.any(written, axis=-1)

    def ratio(other: View) -> Array:
        return jnp.sum(jnp.where(mask, now.token_logp - other.token_logp, 0), axis=-1)

    measured = {
        "logp": average(sequence_logp(now.token_logp, mask), real),
        "entropy": average(now.entropy, mask),
        "length": average(jnp.sum(written, axis=-1).astype(jnp.float32), real),
    }
    if batch.candidates.reward is not None:
        measured["reward"] = average(batch.reward, real)
    if batch.old_view is not None:
        measured["off_policy"] = average(jnp.abs(jnp.expm1(jnp.minimum(ratio(batch.old), 20.0))), real)
    if batch.ref_view is None:
        return measured
    to_ref = ratio(batch.ref_view)
    kl = {"kl_k1": to_ref, "kl_k3": jnp.expm1(jnp.minimum(-to_ref, 20.0)) + to_ref}
    return measured | {name: average(value, real) for name, value in kl.items()}


def fit(
    method: Method,
    players: Players,
    candidates: Candidates,
    feedback: Feedback,
    key: PRNGKey,
    *,
    view: ViewFn,
    tx: optax.GradientTransformation,
    beta: Numeric,
    minibatches: int = 1,
    microbatches: int = 1,
    probe: Callable[[Params], PyTree] | None = None,
    probes: int = 1,
) -> tuple[Players, PyTree]:
    """A round's gradient steps, and what follows them: the reference, the previous policy, the memory.

    Args:
      method: The record.
      players: Policies, as they were when the candidates were drawn.
      candidates: From `collect`.
      feedback: Of the candidates.
      key: Consumed.
      view: `ViewFn`.
      tx: Optimizer.
      beta: Strength of the KL term, as of `Method.own_beta`; may be traced.
      minibatches: Into how many parts the prompts are cut, one gradient step each. From the second epoch on, the parts
        are new ones. Divides the number of prompts.
      microbatches: Parts of each of those, to save memory: see `tiltjax.train.step.train_step`.
      probe: Measured on the parameters ``probes`` times during the steps.
      probes: Divides the number of steps.

    Returns:
      The players after the round; and the mean of every metric over the steps with those of the memory, or, with
      ``probe``, what it measured, stacked.

    Raises:
      ValueError: If a number is below 1.
      AssertionError: If one does not divide what it has to.
    """
    check_at_least("minibatches", minibatches, 1)
    check_at_least("probes", probes, 1)
    memory, batch = prepare(method, players, candidates, feedback, jax.random.fold_in(key, 0), view=view, beta=beta)
    B, steps = batch.source.shape[0], method.epochs * minibatches
    chex.assert_is_divisible(B, minibatches)
    chex.assert_is_divisible(steps, probes)
    later = [jax.random.permutation(jax.random.fold_in(key, 2 + e), B) for e in range(method.epochs - 1)]
    rows = jnp.stack([jnp.arange(B), *later]).reshape(probes, steps // probes, B // minibatches)
    loss_fn = objective(method, view=view, beta=beta)

    def step(state: TrainState, inputs: tuple[Array, Array]):
        part = jax.tree.map(lambda x: x[inputs[0]], batch)
        part = part.change(fresh=jnp.full(inputs[0].shape, inputs[1] == 0))
        options: dict[str, Any] = {"loss_fn": loss_fn, "tx": tx, "microbatches": microbatches}
        return train_step(state, part, jax.random.fold_in(key, 1), **options)

    def stretch(state: TrainState, inputs: tuple[Array, Array]):
        state, scalars = jax.lax.scan(step, state, inputs)
        return state, jax.tree.map(jnp.mean, scalars) if probe is None else probe(state.params)

    number = jnp.arange(steps).reshape(probes, -1)
    state, seen = jax.lax.scan(stretch, players.state, (rows, number))
    if probe is None:
        seen = jax.tree.map(jnp.mean, seen)
        if method.memory is not None and method.memory.measures is not None:
            seen |= method.memory.measures(memory)
    return _advance(method, players, state, memory, tx), seen


def _advance(method: Method, players: Players, state: TrainState, memory: PyTree, tx) -> Players:
    reference, update, count = players.reference, method.reference, players.round + 1
    if update.every is not None:
        due = count % update.every == 0
        moved = soft_update(reference, state.params, alpha=update.alpha)
        reference = jax.tree.map(lambda new, old: jnp.where(due, new, old), moved, reference)
        if update.reset_optimizer:
            begun = tx.init(state.params)
            opt_state = jax.tree.map(lambda new, old: jnp.where(due, new, old), begun, state.opt_state)
            state = dataclasses.replace(state, opt_state=opt_state)
    previous = copied(players.state.params)
    return dataclasses.replace(players, state=state, reference=reference, previous=previous, memory=memory, round=count)


def play(
    method: Method,
    players: Players,
    prompts: Candidates,
    key: PRNGKey,
    *,
    sample: Sample,
    score: Callable[[Candidates], Feedback],
    **options,
) -> tuple[Players, PyTree]:
    """One round: collect, score, fit. Traceable where ``sample`` and ``score`` are; else call the three in turn.

    Args:
      method: The record.
      players: Policies.
      prompts: As for `collect`.
      key: Consumed.
      sample: `Sample`.
      score: ``candidates -> Feedback``.
      **options: Of `fit`.

    Returns:
      As `fit`.
    """
    draw, learn = jax.random.split(key)
    candidates = collect(method, players, prompts, draw, sample=sample)
    return fit(method, players, candidates, score(candidates), learn, **options)
