"""How a record that learns once fits a policy, and what every fit of a policy shares."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from tiltjax.align.feedback import feedback
from tiltjax.align.session import Session
from tiltjax.align.settings import Fitting
from tiltjax.data import candidates as batches
from tiltjax.data import text
from tiltjax.data.buckets import batches_of
from tiltjax.data.candidates import Candidates
from tiltjax.data.packing import Sequences, pack_sequences, rows_needed
from tiltjax.data.pipeline import Stream, epoch_batches, host_batches
from tiltjax.models import lora
from tiltjax.models.transformer import Transformer
from tiltjax.train import distributed, offline
from tiltjax.train.loop import fit
from tiltjax.train.method import Batch, Feedback, Method
from tiltjax.train.objectives import candidate_weights, packed_objective
from tiltjax.train.policy import model_objective
from tiltjax.train.sharding import batch_sharding, pmap_step, shard, sharded_step
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step
from tiltjax.train.streams import stream
from tiltjax.types import Float, Int, Params

__all__ = [
    "Data",
    "adapters",
    "bucketed",
    "fingerprint_of",
    "host_data",
    "merge_policy",
    "optimizer",
    "packed",
    "schedule_of",
    "training_data",
    "tune",
]

_LOG = logging.getLogger(__name__)


def optimizer(
    *, learning_rate: float, steps: int, max_grad_norm: float, epochs: int = 1
) -> optax.GradientTransformation:
    """AdamW behind a clipped gradient, its rate rising over a tenth of the steps and falling to a tenth by a cosine.

    Args:
      learning_rate: Peak of the schedule.
      steps: Counted steps.
      max_grad_norm: Global norm at which gradients are clipped.
      epochs: Gradient steps per counted step.

    Returns:
      The optimizer.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, max(1, steps // 10), max(2, steps * epochs), 0.1 * learning_rate
    )
    return optax.chain(optax.clip_by_global_norm(max_grad_norm), optax.adamw(schedule, b2=0.95, weight_decay=0.0))


def schedule_of(settings: Fitting) -> dict[str, Any]:
    """The settings that `optimizer` takes."""
    return {"learning_rate": settings.learning_rate, "steps": settings.steps, "max_grad_norm": settings.max_grad_norm}


def adapters(session: Session) -> tuple[Params, Params]:
    """What is trained, and the part of the model that is frozen: None where all of it is trained."""
    settings = session.settings
    if not settings.lora_rank:
        return session.model, None
    key = stream(settings.seed, "adapters")
    return lora.partition(lora.add(key, session.model, rank=settings.lora_rank), lora.is_adapter)


def fingerprint_of(session: Session) -> str:
    """Of everything that decides the parameters after a step: candidates, what else the method needs, its settings."""
    parts = (session.fingerprint, session.inputs.fingerprint, session.settings.fingerprint())
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


def merge_policy(trained: Params, frozen: Params) -> Transformer:
    """Merges the two halves of `adapters` into one policy, adapters included."""
    return lora.merge(trained if frozen is None else lora.combine(trained, frozen))


@dataclasses.dataclass(frozen=True)
class Data:
    """What a fit learns from, and in which order.

    Attributes:
      rows: Labelled rows of the whole data set, in NumPy.
      order: ``step -> indices`` of the rows of the global batch.
      weights: Of their candidates, ``[R, N]``, where rows are packed; else None.
    """

    rows: Batch
    order: Callable[[int], np.ndarray]
    weights: Float[np.ndarray, "R N"] | None = None


def training_data(session: Session, record: Method, drawn: Candidates) -> Data:
    """The rows that a record learns from, once it has drawn what it will ever draw.

    A row is a demonstration, or as many of the run's candidates of a prompt as the record compares. Only rows that some
    step sees are labelled and, where the record reads the reference, scored by it.

    Args:
      session: Of the run.
      record: Of the settings; it learns once.
      drawn: N scored candidates of every training prompt, of the reference.

    Returns:
      `Data`.
    """
    settings = session.settings
    if "data" in record.sources:
        rows, prompts = session.inputs.each(drawn)
    else:
        rows, prompts = offline.candidate_groups(record, drawn)
    positions = batches.lengths(rows) @ np.array([1, rows.completion.shape[1]])
    options: dict[str, Any] = {"seed": settings.seed, "lengths": positions, "window": settings.length_window}
    order = epoch_batches(len(prompts), settings.batch_size, **options)
    seen = np.unique(np.concatenate([order(step) for step in range(settings.steps)]))
    rows, told = _told(session, record, _masked(session, batches.take(rows, seen)), prompts[seen])
    views = None
    if record.reads_old or record.reads_reference:
        views = session.view(rows, "score reference", temperature=record.temperature)
    beta = record.own_beta(settings.beta)
    batch = offline.labelled(record, rows, told, stream(settings.seed, "labels"), seen=views, beta=beta)
    if record.feedback == "demonstrations":  # Nobody rewarded them.
        batch = batch.change(reward=None)
    weights = np.asarray(candidate_weights(record, batch, beta=beta)) if settings.pack else None
    return Data(rows=batch, order=lambda step: np.searchsorted(seen, order(step)), weights=weights)


def _told(session: Session, record: Method, rows: Candidates, prompts: Int[np.ndarray, " R"]) -> tuple:
    """The rows with their rewards, and all that is found out about them; demonstrations are taken as they are."""
    if record.feedback == "demonstrations":
        return rows, Feedback(reward=np.zeros(rows.completion.shape[:2], np.float32))
    crossed = session.kept("train-crossed") if record.cross > 1 else None
    if crossed is not None:  # What a reward said once is not asked again.
        rows = dataclasses.replace(crossed, where=rows.where)
    unrewarded = rows.reward is None
    told = feedback(session, record, prompts, rows)
    rows = dataclasses.replace(rows, reward=told.reward)
    if unrewarded:
        session.keep("train-crossed", dataclasses.replace(rows, where=None))
    return rows, told


def _masked(session: Session, data: Candidates) -> Candidates:
    """Without the completions that are cut, where the run leaves them out of its loss."""
    ends = text.end_ids(session.tokenizer)
    return batches.without_truncated(data, ends) if session.settings.mask_truncated else data


def bucketed(session: Session, data: Data) -> list[tuple[int, ...]]:
    """What the prompts and completions of every step are padded to: at most ``length_buckets`` different pairs.

    They follow from the lengths of all prompts, whichever of them a host loads: hosts agree without asking.

    Args:
      session: Of the run.
      data: Of `training_data`.

    Returns:
      ``(S, T)`` of every step, in tokens.
    """
    settings, rows = session.settings, data.rows.candidates
    counts, widths = (1, rows.completion.shape[1]), (rows.prompt.shape[1], rows.completion.shape[2])
    steps, lengths = [data.order(step) for step in range(settings.steps)], batches.lengths(rows)
    longest = np.stack([lengths[at].max(axis=0) for at in steps])
    plan = batches_of(longest, widths, batch_size=1, counts=counts, most=settings.length_buckets)
    chosen = [batch.lengths for batch in sorted(plan, key=lambda batch: int(batch.rows[0]))]
    before, after = (settings.batch_size * np.mean(np.array(some) @ np.array(counts)) for some in ([widths], chosen))
    sizes = rows.prompt_mask.sum(axis=-1) + rows.completion_mask.sum(axis=(1, 2))
    held, shapes = np.mean([sizes[at].sum() for at in steps]), sorted(set(chosen))
    _LOG.info(
        "fit: %d steps of %d shapes (compilations) %s, %.0f positions a step in place of %.0f (%.0f%% saved), "
        "padding %.0f%% in place of %.0f%%",
        settings.steps, len(shapes), shapes, after, before, 100 * (1 - after / before), 100 * (1 - held / after),
        100 * (1 - held / before),
    )  # fmt: skip
    return chosen


def packed(session: Session, data: Data) -> tuple:
    """``(indices of prompts -> their rows, number of rows)``: the same number at every step."""
    settings, drawn, weights = session.settings, data.rows.candidates, data.weights
    assert weights is not None
    sizes = drawn.prompt_mask.sum(axis=-1)[:, None] + drawn.completion_mask.sum(axis=-1)
    places = session.mesh.shape["data"] * session.mesh.shape["fsdp"] * settings.microbatches
    steps = [sizes[at][weights[at] != 0] for at in map(data.order, range(settings.steps))]

    def plan(times: int) -> tuple[int, int, int]:
        length = batches.bucket_length(times * max(int(step.max(initial=1)) for step in steps), multiple=8)
        rows = batches.bucket_length(max(rows_needed(step, length=length) for step in steps), multiple=places)
        return rows * length, length, rows

    _, length, rows = min(plan(times) for times in (1, 2, 4, 8))  # Of those that hold the least, the shortest.
    N, T = drawn.completion.shape[1:]
    before, after = settings.batch_size * (drawn.prompt.shape[1] + N * T), rows * length
    held = drawn.prompt_mask.sum() + drawn.completion_mask.sum()
    counts = sizes[weights != 0].sum() * settings.batch_size / len(sizes)
    _LOG.info(
        "packed: %d rows of %d tokens a step, %d positions in place of %d (%.0f%% saved), "
        "padding %.0f%% in place of %.0f%%",
        rows, length, after, before, 100 * (1 - after / before), 100 * (1 - counts / after),
        100 * (1 - held * settings.batch_size / (before * len(sizes))),
    )  # fmt: skip

    def take(which: np.ndarray) -> Sequences:
        part, weight = jax.tree.map(lambda x: x[which], (drawn, weights))
        return pack_sequences(part, weight, length=length, rows=rows, pad_id=text.pad_id(session.tokenizer))

    return take, rows


def host_data(session: Session, data: Data) -> tuple[Any, int]:
    """What this host loads for each step.

    Args:
      session: Of the run.
      data: Of `training_data`.

    Returns:
      A grain dataset of the steps, as of `tiltjax.data.pipeline.host_batches`, and the rows of a global batch.
    """
    settings, place = session.settings, batch_sharding(session.mesh)
    if not settings.pack:
        mine = distributed.host_rows(place, settings.batch_size)
        take = lambda which: jax.tree.map(lambda x: x[which], data.rows)  # noqa: E731
        dataset = host_batches(take, data.order, num_steps=settings.steps, rows=mine)
        if settings.length_buckets > 1:
            lengths = bucketed(session, data)
            dataset = dataset.map_with_index(lambda step, batch: offline.trim_batch(batch, *lengths[step]))
        return dataset, settings.batch_size
    # Which sequences share a row is decided over the whole batch: every host packs all of it and cuts its rows out.
    pack, size = packed(session, data)
    mine = distributed.host_rows(place, size)
    part = lambda which: jax.tree.map(lambda x: x[mine], pack(which))  # noqa: E731
    return host_batches(part, data.order, num_steps=settings.steps), size


def tune(session: Session, drawn: Candidates) -> Transformer:
    """Fits the policy by a record that learns once; returns it with adapters merged.

    Args:
      session: Of the run.
      drawn: N scored candidates of every training prompt, of the reference.

    Returns:
      The policy; the reference where the run trains nothing.
    """
    settings, record = session.settings, session.settings.record
    if record is None:
        return session.model
    data = training_data(session, record, drawn)
    loss_fn = model_objective(record, beta=record.own_beta(settings.beta))
    if settings.pack:
        loss_fn = packed_objective(temperature=record.temperature)
    tx, (trained, frozen) = optimizer(**schedule_of(settings)), adapters(session)
    state = shard(init_state(trained, tx), session.mesh)
    step = functools.partial(train_step, loss_fn=loss_fn, tx=tx, microbatches=settings.microbatches)
    place = batch_sharding(session.mesh)
    rows, size = host_data(session, data)
    loaded = Stream(rows)
    batch_of = lambda step: distributed.global_batch(loaded(step), place, size)  # noqa: E731
    mapped = sharded_step(step, state, frozen, session.mesh) if settings.mapping == "sharded" else pmap_step(step)
    read = frozen
    if settings.mapping == "pmap":  # It maps over the devices of this host, and takes what is on them.
        batch_of, state, read = loaded, distributed.localize(state), distributed.localize(frozen)
    state = fit(
        state,
        batch_of,
        step_fn=mapped,
        key=stream(settings.seed, "fit"),
        num_steps=settings.steps,
        directory=session.directory,
        frozen=read,
        resume=session.resume,
        checkpoint_every=settings.checkpoint_every,
        fingerprint=fingerprint_of(session),
    )
    return merge_policy(distributed.replicate(state.params, session.mesh), frozen)
