"""How `experiments.align` fits a policy to candidates that are drawn once, and what every fit of a policy shares."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.align_world import World
from tiltjax.data import candidates as batches
from tiltjax.data import text
from tiltjax.data.buckets import batches_of
from tiltjax.data.candidates import Candidates
from tiltjax.data.packing import Sequences, pack_sequences, rows_needed
from tiltjax.data.pipeline import Stream, epoch_batches, host_batches
from tiltjax.models import lora
from tiltjax.models.transformer import Transformer
from tiltjax.samplers.best_of_n import best_of_n
from tiltjax.samplers.resample import resample
from tiltjax.tilt.weights import tilt
from tiltjax.train import distributed
from tiltjax.train.loop import fit
from tiltjax.train.objectives import (
    VarBatch,
    candidate_weights,
    likelihood_objective,
    method_kernel,
    packed_objective,
    var_objective,
)
from tiltjax.train.sharding import batch_sharding, pmap_step, shard, sharded_step
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step
from tiltjax.train.streams import stream
from tiltjax.types import Params

__all__ = [
    "adapters",
    "bucketed",
    "fingerprint_of",
    "host_data",
    "optimizer",
    "packed",
    "training_data",
    "tune",
    "whole",
]

_LOG = logging.getLogger(__name__)


def optimizer(config: Any, *, epochs: int = 1) -> optax.GradientTransformation:
    """AdamW behind a clipped gradient, its rate rising over a tenth of the steps and falling to a tenth by a cosine.

    Args:
      config: With ``learning_rate``, ``steps`` and ``max_grad_norm``.
      epochs: Gradient steps per counted step.

    Returns:
      The optimizer.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, max(1, config.steps // 10), max(2, config.steps * epochs), 0.1 * config.learning_rate
    )
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optax.adamw(schedule, b2=0.95, weight_decay=0.0)
    )


def adapters(world: World) -> tuple[Params, Params]:
    """What is trained, and the part of the model that is frozen: None where all of it is trained."""
    config = world.config
    if not config.lora_rank:
        return world.model, None
    key = stream(config.seed, "adapters")
    return lora.partition(lora.add(key, world.model, rank=config.lora_rank), lora.is_adapter)


def fingerprint_of(world: World) -> str:
    """Of everything that decides the parameters after a step: candidates, what else the method needs, its settings."""
    parts = (world.fingerprint, world.given.fingerprint, world.config.fingerprint())
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def whole(trained: Params, frozen: Params) -> Transformer:
    """The policy that the halves of `adapters` make, adapters merged."""
    return lora.merge(trained if frozen is None else lora.combine(trained, frozen))


def training_data(world: World, drawn: Candidates) -> tuple[Any, Any, Any]:
    """``(rows, step -> which of them, loss function)`` of the method."""
    config, drawn = world.config, _masked(world, drawn)
    if config.method == "var":
        blocks, B = var_blocks(world, drawn), config.batch_size
        which = epoch_batches(len(blocks), 1, seed=config.seed)
        rows = jax.tree.map(lambda *parts: np.concatenate(parts), *blocks)
        objective = var_objective(beta=config.beta, temperature=config.temperature)
        return rows, lambda step: which(step)[0] * B + np.arange(B), objective
    if config.method == "dpo":
        worst = best_of_n(-jnp.asarray(drawn.reward))
        pair = np.stack([best_of_n(jnp.asarray(drawn.reward)), worst], axis=1)
        pairs = batches.select(drawn, pair)
        drawn = world.with_reference("train-pairs", pairs, "score reference", temperature=config.temperature)
        chosen, rejected = np.asarray(drawn.reward).T
        decided = np.stack([chosen > rejected] * 2, axis=1)  # A prompt whose candidates all tie teaches nothing.
        real = batches.learned(drawn)  # A pair counts where both do.
        drawn = dataclasses.replace(drawn, where=decided if real is None else decided & real.all(1, keepdims=True))
    temperature = config.temperature
    if config.method == "sft":  # No law of the policy drew what it imitates.
        drawn, temperature = _masked(world, world.given.each(drawn)), 1.0
    kernel = method_kernel(config.method, beta=config.beta)
    if config.method == "tilted_mle" and config.fit_candidates:
        key = stream(config.seed, "resample")
        which = _tilted_draws(key, jnp.asarray(drawn.reward), config.beta, config.fit_candidates)
        drawn = batches.select(drawn, np.asarray(which))
        kernel = method_kernel("sft", beta=config.beta)
    drawn = dataclasses.replace(drawn, old_token_logp=None)
    positions = batches.lengths(drawn) @ np.array([1, drawn.completion.shape[1]])
    options: dict[str, Any] = {"seed": config.seed, "lengths": positions, "window": config.length_window}
    order = epoch_batches(len(drawn.prompt), config.batch_size, **options)
    if config.pack:
        return (drawn, np.asarray(candidate_weights(kernel, drawn))), order, packed_objective(temperature=temperature)
    return drawn, order, likelihood_objective(kernel, temperature=temperature)


@functools.partial(jax.jit, static_argnames="num")
def _tilted_draws(key, reward, beta, num):
    """``num`` candidates of every prompt, drawn with replacement by the weights of the tilt."""
    return resample(key, tilt(reward, beta=beta).weights, num=num)


def _masked(world: World, data: Candidates) -> Candidates:
    """Without the completions that are cut, where the run leaves them out of its loss."""
    ends = text.end_ids(world.tokenizer)
    return batches.without_truncated(data, ends) if world.config.mask_truncated else data


def bucketed(world: World, data: Candidates | VarBatch, order: Callable[[int], np.ndarray]) -> list[tuple[int, ...]]:
    """What the prompts and completions of every step are padded to: at most ``length_buckets`` different pairs.

    They follow from the lengths of all prompts, whichever of them a host loads: hosts agree without asking.

    Args:
      world: Of the run.
      data: Rows of all prompts, of `training_data`.
      order: ``step -> indices`` of the global batch.

    Returns:
      ``(S, T)`` of every step, in tokens.
    """
    config, rows = world.config, data.candidates if isinstance(data, VarBatch) else data
    counts, widths = (1, rows.completion.shape[1]), (rows.prompt.shape[1], rows.completion.shape[2])
    steps, lengths = [order(step) for step in range(config.steps)], batches.lengths(rows)
    longest = np.stack([lengths[at].max(axis=0) for at in steps])
    plan = batches_of(longest, widths, batch_size=1, counts=counts, most=config.length_buckets)
    chosen = [batch.lengths for batch in sorted(plan, key=lambda batch: int(batch.rows[0]))]
    before, after = (config.batch_size * np.mean(np.array(some) @ np.array(counts)) for some in ([widths], chosen))
    sizes = rows.prompt_mask.sum(axis=-1) + rows.completion_mask.sum(axis=(1, 2))
    held, shapes = np.mean([sizes[at].sum() for at in steps]), sorted(set(chosen))
    _LOG.info(
        "fit: %d steps of %d shapes (compilations) %s, %.0f positions a step in place of %.0f (%.0f%% saved), "
        "padding %.0f%% in place of %.0f%%",
        config.steps, len(shapes), shapes, after, before, 100 * (1 - after / before), 100 * (1 - held / after),
        100 * (1 - held / before),
    )  # fmt: skip
    return chosen


def packed(world: World, data: tuple[Candidates, np.ndarray], order: Callable[[int], np.ndarray]) -> tuple:
    """``(indices of prompts -> their rows, number of rows)``: the same number at every step."""
    config, (drawn, weights) = world.config, data
    sizes = drawn.prompt_mask.sum(axis=-1)[:, None] + drawn.completion_mask.sum(axis=-1)
    places = world.mesh.shape["data"] * world.mesh.shape["fsdp"] * config.microbatches
    steps = [sizes[at][weights[at] != 0] for at in map(order, range(config.steps))]

    def plan(times: int) -> tuple[int, int, int]:
        length = batches.bucket_length(times * max(int(step.max(initial=1)) for step in steps), multiple=8)
        rows = batches.bucket_length(max(rows_needed(step, length=length) for step in steps), multiple=places)
        return rows * length, length, rows

    _, length, rows = min(plan(times) for times in (1, 2, 4, 8))  # Of those that hold the least, the shortest.
    N, T = drawn.completion.shape[1:]
    before, after = config.batch_size * (drawn.prompt.shape[1] + N * T), rows * length
    held = drawn.prompt_mask.sum() + drawn.completion_mask.sum()
    counts = sizes[weights != 0].sum() * config.batch_size / len(sizes)
    _LOG.info(
        "packed: %d rows of %d tokens a step, %d positions in place of %d (%.0f%% saved), "
        "padding %.0f%% in place of %.0f%%",
        rows, length, after, before, 100 * (1 - after / before), 100 * (1 - counts / after),
        100 * (1 - held * config.batch_size / (before * len(sizes))),
    )  # fmt: skip

    def take(which: np.ndarray) -> Sequences:
        part, weight = jax.tree.map(lambda x: x[which], (drawn, weights))
        return pack_sequences(part, weight, length=length, rows=rows, pad_id=text.pad_id(world.tokenizer))

    return take, rows


def var_blocks(world: World, drawn: Candidates) -> list[VarBatch]:
    """Mini-batches of fixed members with every completion scored under every prompt of its mini-batch."""
    config, blocks = world.config, []
    for start in range(0, config.num_prompts - config.batch_size + 1, config.batch_size):
        part = batches.take(dataclasses.replace(drawn, old_token_logp=None), slice(start, start + config.batch_size))
        B, N, T = part.completion.shape
        shape = (B, B * N)
        crossed = Candidates(
            prompt=part.prompt,
            prompt_mask=part.prompt_mask,
            completion=np.broadcast_to(part.completion.reshape(1, B * N, T), (*shape, T)).copy(),
            completion_mask=np.broadcast_to(part.completion_mask.reshape(1, B * N, T), (*shape, T)).copy(),
        )
        if part.loss_mask is not None:
            mask = np.broadcast_to(part.loss_mask.reshape(1, B * N, T), (*shape, T)).copy()
            crossed = dataclasses.replace(crossed, loss_mask=mask)
        name, at = f"train-crossed-{start // B}", config.temperature
        crossed = world.with_reference(name, crossed, f"score across prompts {start // B + 1}", temperature=at)
        texts = text.decode_completions(world.tokenizer, crossed.completion, crossed.completion_mask)
        reward = world.score(world.rows["train"][start : start + B], texts)
        swap = lambda x: np.swapaxes(x.reshape(B, B, N), 1, 2).copy()  # noqa: E731, B023
        ref_logp = swap(np.asarray(crossed.ref_logp))
        real = batches.learned(part)
        where = None if real is None else np.broadcast_to(real.T[None], reward.shape[:1] + real.T.shape).copy()
        blocks.append(VarBatch(candidates=part, ref_logp=ref_logp, reward=swap(reward), own=np.arange(B), where=where))
    return blocks


def host_data(world: World, data: Any, order: Callable[[int], np.ndarray]) -> tuple[Any, int]:
    """What this host loads for each step.

    Args:
      world: Of the run.
      data: Rows of all prompts, of `training_data`; where packing, with weights.
      order: ``step -> indices`` of the global batch.

    Returns:
      A grain dataset of the steps, as of `tiltjax.data.pipeline.host_batches`, and the rows of a global batch.
    """
    config, place = world.config, batch_sharding(world.mesh)
    if not config.pack:
        mine = distributed.host_rows(place, config.batch_size)
        take = lambda which: jax.tree.map(lambda x: x[which], data)  # noqa: E731
        dataset = host_batches(take, order, num_steps=config.steps, rows=mine)
        if config.length_buckets > 1:
            lengths = bucketed(world, data, order)
            dataset = dataset.map_with_index(lambda step, batch: _trimmed(batch, *lengths[step]))
        return dataset, config.batch_size
    # Which sequences share a row is decided over the whole batch: every host packs all of it and cuts its rows out.
    pack, size = packed(world, data, order)
    mine = distributed.host_rows(place, size)
    part = lambda which: jax.tree.map(lambda x: x[mine], pack(which))  # noqa: E731
    return host_batches(part, order, num_steps=config.steps), size


def _trimmed(batch: Candidates | VarBatch, *lengths: int) -> Candidates | VarBatch:
    if isinstance(batch, VarBatch):
        return dataclasses.replace(batch, candidates=batches.trim(batch.candidates, *lengths))
    return batches.trim(batch, *lengths)


def tune(world: World, drawn: Candidates) -> Transformer:
    """Fits the policy; returns it with adapters merged."""
    config = world.config
    if config.method == "soft_best_of_n":
        return world.model
    data, order, loss_fn = training_data(world, drawn)
    tx, (trained, frozen) = optimizer(config), adapters(world)
    state = shard(init_state(trained, tx), world.mesh)
    step = functools.partial(train_step, loss_fn=loss_fn, tx=tx, microbatches=config.microbatches)
    place = batch_sharding(world.mesh)
    rows, size = host_data(world, data, order)
    loaded = Stream(rows)
    batch_of = lambda step: distributed.global_batch(loaded(step), place, size)  # noqa: E731
    mapped = sharded_step(step, state, frozen, world.mesh) if config.mapping == "sharded" else pmap_step(step)
    read = frozen
    if config.mapping == "pmap":  # It maps over the devices of this host, and takes what is on them.
        batch_of, state, read = loaded, distributed.localize(state), distributed.localize(frozen)
    state = fit(
        state,
        batch_of,
        step_fn=mapped,
        key=stream(config.seed, "fit"),
        num_steps=config.steps,
        directory=world.directory,
        frozen=read,
        resume=config.resume,
        checkpoint_every=config.checkpoint_every,
        fingerprint=fingerprint_of(world),
    )
    return whole(distributed.replicate(state.params, world.mesh), frozen)
