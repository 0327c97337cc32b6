"""Several short prompts in one row, each with all of its candidates: less padding, the same numbers.

A model is told who belongs to whom (`tiltjax.models.segments`), so nothing leaks from one prompt to another, and what
it computes per candidate comes back in the order of the candidates that were packed.
"""

import chex
import jax.numpy as jnp
import numpy as np

from tiltjax.data.candidates import Candidates
from tiltjax.ops.checks import check_at_least
from tiltjax.types import Array, Bool, Float, Int

__all__ = ["Packed", "pack", "padding", "unpack"]


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
    members: list[list[int]] = []
    room: list[int] = []
    for b in np.argsort(-sizes, kind="stable"):
        fits = (r for r, free in enumerate(room) if free >= sizes[b] and len(members[r]) < most)
        row = next(fits, len(members))
        if row == len(members):
            members.append([])
            room.append(length)
        members[row].append(int(b))
        room[row] -= int(sizes[b])
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
