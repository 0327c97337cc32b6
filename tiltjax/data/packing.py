"""Several short prompts, or several short sequences, in one row: less padding, the same numbers.

A model is told who belongs to whom (`tiltjax.models.segments`), so nothing leaks from one to another. `pack` keeps a
prompt with all of its candidates and gives back what is computed per candidate. `pack_sequences` lays prompt and
completion down as one sequence: it pads neither, and leaves out the candidates that count for nothing, but repeats the
prompt for each of the others. It is for data with one completion per prompt, or few that count.
"""

from collections.abc import Sequence

import chex
import jax.numpy as jnp
import numpy as np

from tiltjax.data.candidates import Candidates, learned, token_mask
from tiltjax.ops.checks import check_at_least
from tiltjax.types import Array, Bool, Float, Int

__all__ = ["Packed", "Sequences", "pack", "pack_sequences", "padding", "rows_needed", "unpack"]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Packed:
    """R rows of up to G prompts; M = G N places for completions.

    Attributes:
      prompt: Prompts one after another, ``[R, S]``.
      prompt_mask: True on real tokens, ``[R, S]``.
      prompt_segment: Which prompt of its row a token belongs to, ``[R, S]``, counted from 0.
      completion: The N completions of prompt g stand at places ``g N`` to ``(g + 1) N``, ``[R, M, T]``.
      completion_mask: True on real tokens, ``[R, M, T]``.
      segment: Which prompt of its row a completion belongs to, ``[R, M]``.
      place: Where candidate n of prompt b went: its row times M plus its place in the row, ``[B, N]``.
    """

    prompt: Int[Array, "R S"]
    prompt_mask: Bool[Array, "R S"]
    prompt_segment: Int[Array, "R S"]
    completion: Int[Array, "R M T"]
    completion_mask: Bool[Array, "R M T"]
    segment: Int[Array, "R M"]
    place: Int[Array, "B N"]


def pack(candidates: Candidates, *, length: int, most: int = 8, rows: int | None = None, pad_id: int = 0) -> Packed:
    """Puts prompts together, the longest first, each into the first row that has room.

    Args:
      candidates: B prompts with N candidates each, on the host.
      length: S of a row, at least the longest prompt.
      most: G, the most prompts of one row.
      rows: R, to keep one shape over many batches; None takes as few as this batch needs.
      pad_id: Token written where there is none.

    Returns:
      `Packed` of NumPy arrays. Places that stay empty belong to the row's first prompt and are masked.

    Raises:
      ValueError: If a prompt is longer than ``length``, or ``rows`` are too few.

    Example:
      >>> from tiltjax.data.candidates import from_tokens
      >>> batch = from_tokens([[5, 6], [7], [8, 9, 5]], [[[2]], [[3]], [[4]]], pad_id=0)
      >>> packed = pack(batch, length=4, most=2)
      >>> packed.prompt.tolist(), packed.prompt_segment.tolist(), packed.place.tolist()
      ([[8, 9, 5, 7], [5, 6, 0, 0]], [[0, 0, 0, 1], [0, 0, 0, 0]], [[2], [1], [0]])
    """
    check_at_least("most", most, 1)
    sizes = np.sum(np.asarray(candidates.prompt_mask), axis=1)
    if sizes.max(initial=0) > length:
        raise ValueError(f"length must be at least the longest prompt, {sizes.max()} tokens, got {length}")
    members = _first_fit(sizes, length, most)
    R = len(members) if rows is None else rows
    if len(members) > R:
        raise ValueError(f"rows must be at least {len(members)} for these prompts, got {rows}")
    B, N, T = candidates.completion.shape
    shape = (R, most, N, T)
    out = {
        "prompt": np.full((R, length), pad_id, np.int32),
        "prompt_mask": np.zeros((R, length), bool),
        "prompt_segment": np.zeros((R, length), np.int32),
        "completion": np.full(shape, pad_id, np.int32),
        "completion_mask": np.zeros(shape, bool),
        "segment": np.zeros((R, most, N), np.int32),
        "place": np.zeros((B, N), np.int32),
    }
    out["prompt_mask"][len(members) :, 0] = True  # A row of nothing has a prompt of one token, so that it is finite.
    for r, packed in enumerate(members):
        start = 0
        for g, b in enumerate(packed):
            stop = start + int(sizes[b])
            out["prompt"][r, start:stop] = np.asarray(candidates.prompt)[b, : sizes[b]]
            out["prompt_mask"][r, start:stop] = True
            out["prompt_segment"][r, start:stop] = g
            out["completion"][r, g] = np.asarray(candidates.completion)[b]
            out["completion_mask"][r, g] = np.asarray(candidates.completion_mask)[b]
            out["segment"][r, g] = g
            out["place"][b] = (r * most + g) * N + np.arange(N)
            start = stop
    for name in ("completion", "completion_mask", "segment"):
        out[name] = out[name].reshape(R, most * N, *out[name].shape[3:])
    return Packed(**out)


def unpack(packed: Packed, values: Float[Array, "R M *rest"]) -> Float[Array, "B N *rest"]:
    """What a model computed of packed completions, in the order of the candidates that were packed.

    Args:
      packed: From `pack`.
      values: Per packed completion, for instance token log-probabilities ``[R, M, T]``.

    Returns:
      The same per candidate.
    """
    flat = jnp.asarray(values).reshape(-1, *values.shape[2:])
    return flat[jnp.asarray(packed.place)]


def padding(batch: Candidates | Packed) -> dict[str, float]:
    """Which share of a batch's places hold no token: ``prompt`` and ``completion``, each in [0, 1]."""
    masks = {"prompt": batch.prompt_mask, "completion": batch.completion_mask}
    return {name: 1 - float(np.mean(np.asarray(mask))) for name, mask in masks.items()}


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Sequences:
    """R rows of whole sequences, each a prompt and a completion.

    Attributes:
      token: Sequences one after another, ``[R, L]``.
      segment: Which sequence of its row a token belongs to, ``[R, L]``, counted from 0; -1 where there is none.
      weight: What the log-probability of a token counts, ``[R, L]``: 0 but for completions.
      count: How many prompts a row stands for, ``[R]``; their sum is that of the prompts that were packed.
      mass: Sum of the weights of a row's sequences with a token to learn from, ``[R]``.
    """

    token: Int[Array, "R L"]
    segment: Int[Array, "R L"]
    weight: Float[Array, "R L"]
    count: Float[Array, " R"]
    mass: Float[Array, " R"]


def pack_sequences(
    candidates: Candidates, weights: Float[Array, "B N"], *, length: int, rows: int | None = None, pad_id: int = 0
) -> Sequences:
    """Prompts and completions as whole sequences, the longest first, each into the first row that has room.

    Args:
      candidates: B prompts with N completions each, on the host.
      weights: Of the candidates; those of weight 0 are left out.
      length: L of a row, at least the longest sequence.
      rows: R, to keep one shape over many batches; None takes as few as this batch needs.
      pad_id: Token written where there is none.

    Returns:
      `Sequences` of NumPy arrays. A prompt counts if ``where`` has one of its candidates, or is None. Tokens that are
      not learned from (`tiltjax.data.candidates.token_mask`) have weight 0.

    Raises:
      ValueError: If a sequence is longer than ``length``, or ``rows`` are too few.

    Example:
      >>> from tiltjax.data.candidates import from_tokens
      >>> batch = from_tokens([[5, 6], [7]], [[[2]], [[3]]], pad_id=0)
      >>> packed = pack_sequences(batch, np.array([[0.5], [2.0]]), length=6)
      >>> packed.token.tolist(), packed.segment.tolist(), packed.weight.tolist(), packed.count.tolist()
      ([[5, 6, 2, 7, 3, 0]], [[0, 0, 0, 1, 1, -1]], [[0.0, 0.0, 0.5, 0.0, 2.0, 0.0]], [2.0])
    """
    weights, kept = np.asarray(weights), np.argwhere(np.asarray(weights) != 0)
    mask, end = np.asarray(candidates.prompt_mask), np.asarray(candidates.completion_mask)
    sizes = mask.sum(axis=-1)[kept[:, 0]] + end.sum(axis=-1)[kept[:, 0], kept[:, 1]]
    members = _first_fit(sizes, length)
    R = max(1, len(members)) if rows is None else rows
    if len(members) > R:
        raise ValueError(f"rows must be at least {len(members)} for these sequences, got {rows}")
    token, segment = np.full((R, length), pad_id, np.int32), np.full((R, length), -1, np.int32)
    weight, count = np.zeros((R, length), np.float32), np.zeros(R, np.float32)
    where, learn = learned(candidates), np.asarray(token_mask(candidates))
    real = np.full(len(weights), True) if where is None else np.any(where, axis=-1, keepdims=True)[:, 0]
    mass = np.zeros(R, np.float32)
    for r, packed in enumerate(members):
        start = 0
        for g, i in enumerate(packed):
            b, n = kept[i]
            prompt, completion = candidates.prompt[b][mask[b]], candidates.completion[b, n][end[b, n]]
            middle, stop = start + len(prompt), start + len(prompt) + len(completion)
            token[r, start:middle], token[r, middle:stop] = prompt, completion
            segment[r, start:stop] = g
            told = learn[b, n][end[b, n]]
            weight[r, middle:stop] = np.where(told, weights[b, n], 0)
            mass[r] += weights[b, n] * told.any()
            count[r], real[b] = count[r] + real[b], False
            start = stop
    count[0] += real.sum()
    return Sequences(token=token, segment=segment, weight=weight, count=count, mass=mass)


def rows_needed(sizes: Sequence[int] | Int[np.ndarray, " n"], *, length: int) -> int:
    """How many rows `pack_sequences` takes for sequences of these lengths.

    Example:
      >>> rows_needed([3, 5, 2, 2], length=7)
      2
    """
    return len(_first_fit(np.asarray(sizes), length))


def _first_fit(sizes: Int[np.ndarray, " n"], length: int, most: int | None = None) -> list[list[int]]:
    """Which sequences stand in which row: the longest first, each into the first row that has room for it."""
    if sizes.max(initial=0) > length:
        raise ValueError(f"length must be at least the longest sequence, {sizes.max()} tokens, got {length}")
    members: list[list[int]] = []
    room: list[int] = []
    for i in np.argsort(-sizes, kind="stable"):
        fits = (r for r, free in enumerate(room) if free >= sizes[i] and (most is None or len(members[r]) < most))
        row = next(fits, len(members))
        if row == len(members):
            members.append([])
            room.append(length)
        members[row].append(int(i))
        room[row] -= int(sizes[i])
    return members
