"""Sampling and scoring over many prompts: host loops around two jitted functions, resumable batch by batch."""

import dataclasses
import functools
import itertools
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from tiltjax.data import candidates as batches
from tiltjax.data.buckets import Batch, batches_of, padding_waste
from tiltjax.data.candidates import Candidates
from tiltjax.models.transformer import Transformer
from tiltjax.ops.tokens import sequence_logp
from tiltjax.samplers.continuous import decode_queue, grid_of
from tiltjax.samplers.decode import Decoded, candidate_keys, decode
from tiltjax.train import distributed
from tiltjax.train.finite import check_candidates
from tiltjax.types import Array, Bool, Float, Int, Params, PRNGKey, PyTree

__all__ = ["collect", "make_sampler", "make_scorer", "narrow", "overlapped", "score_all", "whole_on_every_host"]

_LOG = logging.getLogger(__name__)

_DIVIDING = ("data", "fsdp")
"""Axes of a mesh that divide prompts or candidates."""


def make_sampler(
    *,
    num_candidates: int,
    max_tokens: int,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    slots: int | None = None,
    mesh: Mesh | None = None,
) -> Callable[..., Decoded]:
    """The jitted sampler: prefill once per prompt, then N candidates that share its keys and values.

    A prompt's completions depend on the key, its index and the model alone; with ``slots`` or without, they are the
    same.

    Args:
      num_candidates: N.
      max_tokens: T.
      eos_id: Token (or tokens) that end a completion.
      pad_id: Fills the rest.
      temperature: Softmax temperature; 0 is greedy.
      top_k: See `tiltjax.samplers.logits`.
      top_p: Likewise.
      slots: Candidates decoded at a time by continuous batching: the prompts of a call are a queue, and a finished
        candidate makes room for the next one (`tiltjax.samplers.continuous`). None decodes all together, to the end of
        the longest.
      mesh: Shards each call over ``data`` and ``fsdp``. An axis shards the prompts, or the candidates of each prompt
        (every device then runs the prompt itself), or is replicated; the choice that uses most devices is taken, and
        of those the one that shards prompts most. With ``slots``, or where candidates are sharded, each device decodes
        its own share with whole parameters and waits for no other. With tensor parallelism (``tensor`` above 1)
        devices go in step: all candidates are decoded together.

    Returns:
      ``(key, model, prompt [B, S], prompt_mask [B, S], index [B] = 0 .. B - 1) -> Decoded``: prompt i draws with
      ``fold_in(key, index[i])``, and its candidate j with ``fold_in(..., j)``, on whichever device it is.
    """
    options: dict[str, Any] = {"max_tokens": max_tokens, "eos_id": eos_id, "pad_id": pad_id}
    options |= {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    if mesh is not None and mesh.shape["tensor"] > 1:
        mesh = slots = None

    def together(keys, model, prompt, prompt_mask):
        B, N = keys.shape
        logits, cache = model.prefill(prompt, prompt_mask, num_candidates=N, max_tokens=max_tokens)
        step = model.unstacked(B * N).decode_step
        return decode(keys, logits, cache, step, num_candidates=N, **options)

    def queued(keys, model, prompt, prompt_mask, *, slots):
        B, N = keys.shape
        groups, width = grid_of(slots, B, N)
        prefill = functools.partial(model.prefill, num_candidates=width, max_tokens=max_tokens)
        step = model.unstacked(groups * width).decode_step
        grid = {"groups": groups, "slots": width, "num_candidates": N}
        return decode_queue(keys, prompt, prompt_mask, prefill, model.refill, step, **grid, **options)

    @jax.jit
    def sampler(
        key: PRNGKey,
        model: Transformer,
        prompt: Int[Array, "B S"],
        prompt_mask: Bool[Array, "B S"],
        index: Int[Array, " B"] | None = None,
    ) -> Decoded:
        B, N = len(prompt), num_candidates
        index = jnp.arange(B) if index is None else index
        keys = candidate_keys(jax.vmap(jax.random.fold_in, (None, 0))(key, index), B, N)
        prompts, candidates = ((), ()) if mesh is None else _axes_for(mesh, B, N)
        places = 1 if mesh is None else math.prod(mesh.shape[name] for name in (*prompts, *candidates))
        run = together if slots is None else functools.partial(queued, slots=max(1, slots // places))
        if mesh is not None and places > 1 and (slots is not None or candidates):
            run = _divided(run, mesh, prompts, candidates)
        return run(keys, model.cast(model.config.compute_dtype), prompt, prompt_mask)

    return sampler


def _axes_for(mesh: Mesh, B: int, N: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Mesh axes that divide B prompts, and those that divide their N candidates: most devices, then most prompts."""

    def places(axes: tuple[str, ...]) -> int:
        return math.prod(mesh.shape[name] for name in axes)

    ways = []
    for takers in itertools.product("pc-", repeat=len(_DIVIDING)):
        prompts, candidates = (
            tuple(name for name, taker in zip(_DIVIDING, takers, strict=True) if taker == who) for who in "pc"
        )
        if B % places(prompts) == 0 and N % places(candidates) == 0:
            ways.append((prompts, candidates))
    return max(ways, key=lambda way: (places(way[0] + way[1]), places(way[0])))


def _divided(
    run: Callable[..., Decoded], mesh: Mesh, prompts: tuple[str, ...], candidates: tuple[str, ...]
) -> Callable:
    """The same on every device, for its own prompts and candidates, and their keys."""

    def share(*arguments):
        out = run(*arguments)
        return dataclasses.replace(out, steps=jnp.asarray(out.steps)[None, None])

    rows, both = PartitionSpec(prompts), PartitionSpec(prompts, candidates)
    return jax.shard_map(
        share,
        mesh=mesh,
        in_specs=(both, PartitionSpec(), rows, rows),
        out_specs=both,
        axis_names=set(_DIVIDING),
        check_vma=False,
    )


def make_scorer(*, temperature: float = 1.0) -> Callable[[Transformer, Candidates], Float[Array, "B N"]]:
    """The jitted scorer: log-probability of every whole completion, nats, ``(model, candidates) -> [B, N]``.

    Args:
      temperature: At which the completions were drawn; what a filter left of the vocabulary, they say themselves.
    """

    @jax.jit
    def scorer(model: Transformer, candidates: Candidates) -> Float[Array, "B N"]:
        law: dict[str, Any] = {"temperature": temperature, "support": candidates.support}
        stats = model.score(candidates.prompt, candidates.prompt_mask, candidates.completion, **law)
        return sequence_logp(stats.logp, batches.token_mask(candidates))

    return scorer


def narrow(model: Transformer) -> Transformer:
    """The model with its weights cast to ``compute_dtype``, once instead of at every call of a sampler.

    Args:
      model: Any policy.

    Returns:
      The same numbers, converted once for many calls.
    """
    leaves, narrowed = jax.tree.leaves(model), jax.tree.leaves(jax.eval_shape(_narrow, model))
    done = all(a.dtype == b.dtype for a, b in zip(leaves, narrowed, strict=True))
    return model if done else _narrow(model)


@jax.jit
def _narrow(model: Transformer) -> Transformer:
    return model.cast(model.config.compute_dtype)


def collect(
    key: PRNGKey,
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    sampler: Callable[..., Decoded],
    pad_id: int,
    batch_size: int,
    reward: Callable[[Int[np.ndarray, " b"], Candidates], Float[np.ndarray, "b N"]] | None = None,
    buckets: int = 4,
    sharding: Sharding | None = None,
    directory: str | os.PathLike | None = None,
    fingerprint: str | None = None,
    description: str = "sample",
) -> Candidates:
    """Draws N candidates of every prompt, and rewards one batch on the host while the next one is drawn.

    Prompt i draws with ``fold_in(key, i)``, whatever batch it is in. With a ``directory`` every finished batch is kept
    there and taken from there next time: a killed run loses no more than the two batches that are under way. With
    several hosts all of them call this: each puts its own prompts on its devices, process 0 keeps the batches, and
    every host returns them all.

    Args:
      key: Typed key, consumed.
      model: The policy.
      prompts: Token ids of each prompt.
      sampler: From `make_sampler`.
      pad_id: Fills short prompts.
      batch_size: Prompts at a time.
      reward: ``(places of b prompts, their candidates) -> [b, N]``, on the host; None leaves the reward out.
      buckets: Most lengths that prompts are padded to, each a compilation; 1 pads all to the longest.
      sharding: Where a batch of prompts goes; None leaves it on the default device. Prompts that cannot be divided go
        to every device, ``NamedSharding(mesh, PartitionSpec())``: the sampler divides their candidates.
      directory: Where batches are kept.
      fingerprint: Of tokenizer, policy and settings: a kept batch of another one is refused.
      description: Of the progress bar.

    Returns:
      `Candidates` of NumPy arrays in the order of the prompts, with ``old_token_logp`` and ``support`` of the law that
      drew them.

    Raises:
      ValueError: If a kept batch is damaged, of another fingerprint or of other prompts.
      NonFiniteError: If a log-probability is not finite; its batch is not kept.
    """
    model = narrow(model)
    tokens, mask = batches.pad(prompts, pad_id=pad_id)
    folder = None if directory is None else pathlib.Path(directory)
    writes = distributed.is_main()
    if folder is not None and writes:
        folder.mkdir(parents=True, exist_ok=True)
    lengths = mask.sum(axis=1, keepdims=True)
    plan = batches_of(lengths, (tokens.shape[1],), batch_size=batch_size, most=buckets)
    _report(description, lengths, plan, (tokens.shape[1],))
    mine = distributed.host_rows(sharding, batch_size)

    paths = [pathlib.Path(folder or "") / f"{i:05d}.npz" for i in range(len(plan))]
    # Check for existing files first: a later collective would queue behind the running batch.
    kept = {path for path in paths if folder is not None and distributed.agree(path.exists())}

    def start(i: int) -> Candidates | Decoded:
        """What is kept; else the arrays that the devices are going to fill."""
        rows, real, (width,) = plan[i].rows, plan[i].real, plan[i].lengths
        if paths[i] in kept:
            part = batches.load(paths[i], fingerprint=fingerprint, vocab_size=model.config.vocab_size)
            if not np.array_equal(part.prompt, tokens[rows[:real]]):
                raise ValueError(f"{paths[i]}: made from other prompts, or cut into other batches")
            return part
        drawing = mask[rows] & (np.arange(batch_size) < real)[:, None]  # Prompts that fill up draw nothing.
        here = (tokens[rows[mine], :width], drawing[mine, :width], rows[mine].astype(np.int32))
        return whole_on_every_host(sampler(key, model, *distributed.global_batch(here, sharding, batch_size)), sharding)

    def finish(i: int, part: Candidates | Decoded) -> Candidates:
        rows = plan[i].rows[: plan[i].real]

        def keep(part: Candidates) -> Candidates:
            if folder is not None and writes:
                batches.save(paths[i], part, fingerprint=fingerprint)
            return part

        if isinstance(part, Decoded):
            drawn = distributed.fetch(dataclasses.replace(part, steps=None))
            names = ("completion", "completion_mask", "sampled_token_logp", "support")
            plain = drawn.token_logp[: len(rows)]
            drawn = {name: x[: len(rows)] for name in names if (x := getattr(drawn, name)) is not None}
            drawn["old_token_logp"] = drawn.pop("sampled_token_logp")
            # At temperature 1: that of a greedy token is 0 whatever the model says.
            check_candidates(description, "the log-probability", plain, rows)
            # Kept before it is rewarded: a reward that fails costs no candidate.
            part = keep(Candidates(prompt=tokens[rows], prompt_mask=mask[rows], **drawn))
        if reward is not None and part.reward is None:
            part = keep(dataclasses.replace(part, reward=reward(rows, part)))
        return part

    parts = []
    with tqdm(total=len(tokens), desc=description, unit="prompt", disable=not writes) as bar:
        for i, part in overlapped(range(len(plan)), start, finish):
            parts.append(part)
            bar.update(plan[i].real)
    order = np.concatenate([batch.rows[: batch.real] for batch in plan])
    return batches.take(batches.concatenate(parts), np.argsort(order))


def score_all(
    model: Params,
    candidates: Candidates,
    *,
    batch_size: int,
    scorer: Callable[[Any, Candidates], PyTree] | None = None,
    keep: Sequence[str] = (),
    buckets: int = 4,
    sharding: Sharding | None = None,
    description: str | None = "score",
) -> PyTree:
    """Log-probability of every completion under ``model``, or what else ``scorer`` says of it, batch by batch.

    Args:
      model: Any policy, or what ``scorer`` takes.
      candidates: B prompts with N completions each.
      batch_size: Prompts at a time.
      scorer: From `make_scorer`, to share its compilation between calls, or another that gives arrays
        ``[B, N]`` or ``[B, N, T, ...]``; None makes one.
      keep: Fields ``[B, N]`` of the candidates that ``scorer`` reads beside tokens and masks.
      buckets: Most shapes (prompt length by completion length) that batches are padded to, each a compilation; 1 leaves
        the arrays as wide as they are.
      sharding: Where a batch goes.
      description: Of the progress bar and of the line in the log; None leaves both out.

    Returns:
      Nats, NumPy ``[B, N]``, or the arrays of ``scorer`` of all candidates; entries of padding are 0.

    Raises:
      NonFiniteError: If a number is not finite.
    """
    scorer = scorer or make_scorer()
    fields = ("prompt", "prompt_mask", "completion", "completion_mask", "loss_mask", "support", *keep)
    bare = Candidates(**{name: getattr(candidates, name) for name in fields})
    lengths = batches.lengths(bare)
    widths = (bare.prompt.shape[-1], bare.completion.shape[-1])
    counts = (1, bare.completion.shape[1])
    plan = batches_of(lengths, widths, batch_size=batch_size, counts=counts, most=buckets)
    if description is not None:
        _report(description, lengths, plan, widths)
    mine = distributed.host_rows(sharding, batch_size)

    def start(batch: Batch) -> PyTree:
        part = batches.trim(batches.take(bare, batch.rows[mine]), *batch.lengths)
        return scorer(model, distributed.global_batch(part, sharding, batch_size))

    def whole(part: np.ndarray) -> np.ndarray:
        return np.zeros((*bare.completion.shape[: part.ndim], *part.shape[3:]), part.dtype)

    found: PyTree = None
    silent = description is None or not distributed.is_main()
    with tqdm(total=len(lengths), desc=description, unit="prompt", disable=silent) as bar:
        for batch, seen in overlapped(plan, start, lambda _, seen: distributed.fetch(seen)):
            rows, part = batch.rows[: batch.real], jax.tree.map(lambda x: x[: batch.real], seen)  # noqa: B023
            if found is None:
                found = jax.tree.map(whole, part)
            for out, x in zip(jax.tree.leaves(found), jax.tree.leaves(part), strict=True):
                check_candidates(description or "score", "what the model says", x, rows)
                out[(rows, slice(None), *map(slice, x.shape[2:3]))] = x  # Tokens beyond are padding.
            bar.update(batch.real)
    return found


def overlapped(work: Iterable[Any], start: Callable[[Any], Any], finish: Callable[[Any, Any], Any]) -> Iterator[tuple]:
    """``(x, finish(x, start(x)))`` of every x in turn; the next x is started before the last one is finished.

    Args:
      work: What is to be done.
      start: Dispatches to the devices, and does not wait for them.
      finish: Waits.

    Yields:
      The pairs.
    """
    begun: list[tuple] = []
    for x in work:
        begun.append((x, start(x)))  # Dispatched, not awaited.
        if len(begun) > 1:
            first, value = begun.pop(0)
            yield first, finish(first, value)
    for x, value in begun:
        yield x, finish(x, value)


def whole_on_every_host(drawn: PyTree, sharding: Sharding | None) -> PyTree:
    """Dispatches the all-gather between hosts right after sampling, so that it is not queued behind the next batch.

    Args:
      drawn: Arrays that the devices are going to fill.
      sharding: Of the prompts.

    Returns:
      The same, with several hosts whole on each of them.
    """
    if jax.process_count() == 1 or not isinstance(sharding, NamedSharding):
        return drawn
    return jax.device_put(drawn, NamedSharding(sharding.mesh, PartitionSpec()))


def _report(description: str, lengths: np.ndarray, plan: list[Batch], widths: tuple[int, ...]) -> None:
    shapes = sorted({batch.lengths for batch in plan})
    one = [dataclasses.replace(batch, lengths=widths) for batch in plan]
    shares = [" and ".join(f"{share:.0%}" for share in padding_waste(lengths, p)) for p in (plan, one)]
    _LOG.info(
        "%s: %d rows in %d batches of %d shapes (compilations) %s; padding %s, in one shape %s",
        description, len(lengths), len(plan), len(shapes), shapes, *shares,
    )  # fmt: skip
