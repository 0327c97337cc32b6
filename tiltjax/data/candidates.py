"""`Candidates`: a prompt and N completions of it, the one batch that everything trains on, draws or scores.

Supervised fine-tuning has N = 1, a preference pair N = 2 (index 0 chosen, index 1 rejected), a ranking or a group N.
Builders make NumPy arrays on the host; a `Candidates` is a pytree and moves to devices as any other.
"""

import dataclasses
import math
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np

from tiltjax.data import kept
from tiltjax.files import naming
from tiltjax.ops.checks import check_at_least, check_choice
from tiltjax.types import Array, Bool, Float, Int, UInt8

__all__ = [
    "Candidates",
    "Tokens",
    "alike",
    "bucket_length",
    "concatenate",
    "from_tokens",
    "learned",
    "lengths",
    "load",
    "pad",
    "pairs",
    "save",
    "select",
    "supervised",
    "take",
    "token_mask",
    "trim",
    "truncated",
    "without_truncated",
]

Tokens = Sequence[int] | Int[Array, " _"]
"""Token ids of one prompt or one completion, not padded."""


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Candidates:
    """B prompts and N completions of each, right-padded.

    Attributes:
      prompt: Tokens, ``[B, S]``.
      prompt_mask: True on real tokens, ``[B, S]``.
      completion: Tokens, ``[B, N, T]``.
      completion_mask: True on real tokens up to and including EOS, ``[B, N, T]``.
      reward: Higher is better, reward units, ``[B, N]``; None where there is none.
      ref_logp: Log-probability of the whole completion under the reference, nats, ``[B, N]``; None until computed.
      old_token_logp: Log-probability of every token under the law that drew it (temperature, top-k and top-p
        applied), nats, ``[B, N, T]``; None offline.
      where: True for real candidates, ``[B, N]``; None means all.
      loss_mask: True on the completion tokens that are learned from, ``[B, N, T]``: a tool's answer is read and not
        learned from. None means all of ``completion_mask``. See `token_mask` and `learned`.
      support: Which tokens of the vocabulary the filters (top-k, top-p) left to the law that drew each token, one bit
        a token, the lowest first, ``[B, N, T, ceil(V / 8)]``, uint8. None means all of them.
    """

    prompt: Int[Array, "B S"]
    prompt_mask: Bool[Array, "B S"]
    completion: Int[Array, "B N T"]
    completion_mask: Bool[Array, "B N T"]
    reward: Float[Array, "B N"] | None = None
    ref_logp: Float[Array, "B N"] | None = None
    old_token_logp: Float[Array, "B N T"] | None = None
    where: Bool[Array, "B N"] | None = None
    loss_mask: Bool[Array, "B N T"] | None = None
    support: UInt8[Array, "B N T bytes"] | None = None


_FIELDS = tuple(Candidates.__annotations__)
_REQUIRED = _FIELDS[:4]


def bucket_length(length: int, *, multiple: int = 64) -> int:
    """The smallest positive multiple of ``multiple`` that holds ``length``: few shapes, so few compilations.

    Example:
      >>> [bucket_length(n, multiple=64) for n in (0, 1, 64, 65)]
      [64, 64, 64, 128]
    """
    check_at_least("length", length, 0)
    check_at_least("multiple", multiple, 1)
    return max(1, -(-length // multiple)) * multiple


def pad(
    sequences: Sequence[Tokens], *, length: int | None = None, pad_id: int = 0, truncate: str | None = None
) -> tuple[Int[np.ndarray, "n L"], Bool[np.ndarray, "n L"]]:
    """Right-pads token sequences to one length.

    Args:
      sequences: n sequences of token ids.
      length: L; None takes the longest.
      pad_id: Token written where there is none.
      truncate: What a sequence longer than ``length`` loses, its ``"left"`` or its ``"right"`` end; None refuses it.

    Returns:
      Tokens (int32) and mask, True on real tokens, both ``[n, L]``.

    Raises:
      ValueError: If a sequence is too long and ``truncate`` is None, or ``truncate`` is unknown.

    Example:
      >>> tokens, mask = pad([[7, 8, 9], [7]], pad_id=2)
      >>> tokens.tolist(), mask.tolist()
      ([[7, 8, 9], [7, 2, 2]], [[True, True, True], [True, False, False]])
    """
    if truncate is not None:
        check_choice("truncate", truncate, ("left", "right"))
    if length is None:
        length = max(map(len, sequences), default=0)
    check_at_least("length", length, 0)
    tokens = np.full((len(sequences), length), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, sequence in enumerate(sequences):
        size = len(sequence)
        if size > length and truncate is None:
            raise ValueError(f"sequence {i} has {size} tokens, more than length={length}; truncate it left or right")
        kept = sequence[max(0, size - length) :] if truncate == "left" else sequence[:length]
        tokens[i, : len(kept)] = kept
        mask[i, : len(kept)] = True
    return tokens, mask


def from_tokens(
    prompts: Sequence[Tokens],
    completions: Sequence[Sequence[Tokens]],
    *,
    pad_id: int,
    prompt_length: int | None = None,
    completion_length: int | None = None,
    truncate: bool = False,
    reward: Sequence[Sequence[float | int] | Float[Array, " _"]] | Float[Array, "B N"] | None = None,
    loss_mask: Sequence[Sequence[Sequence[bool]]] | None = None,
) -> Candidates:
    """Pads prompts and any number of completions of each into one batch.

    Args:
      prompts: Token ids of B prompts, none of them empty.
      completions: For every prompt, token ids of its completions, EOS included. Their number may differ: ``where``
        marks the real ones, and is None where all are.
      pad_id: Token written where there is none.
      prompt_length: S; None takes the longest.
      completion_length: T; None takes the longest.
      truncate: Whether a prompt may lose its start and a completion its end to fit; else too long a one is refused.
      reward: One finite number per completion, reward units.
      loss_mask: One bool per token of every completion, True on those that are learned from; None means all.

    Returns:
      `Candidates` of NumPy arrays; ``loss_mask`` is None where every token is learned from.

    Raises:
      ValueError: If numbers disagree, a prompt is empty, a sequence is too long or a reward is not finite.

    Example:
      >>> batch = from_tokens([[5], [5, 6]], [[[7, 2], [8, 2]], [[9, 2]]], pad_id=0)
      >>> batch.completion.shape, batch.where.tolist()
      ((2, 2, 2), [[True, True], [True, False]])
    """
    _check_same_number("completions", completions, prompts)
    for i, tokens in enumerate(prompts):
        if len(tokens) == 0:
            raise ValueError(f"prompt[{i}] is empty")
    if prompt_length is not None:
        check_at_least("prompt_length", prompt_length, 1)
    if not truncate:
        _check_fits("prompt", [prompts], prompt_length)
        _check_fits("completion", completions, completion_length)
    counts = np.array([len(group) for group in completions], int)
    where = np.arange(max(1, counts.max(initial=0)))[None] < counts[:, None]
    prompt, prompt_mask = pad(prompts, length=prompt_length, pad_id=pad_id, truncate="left")
    flat = [completion for group in completions for completion in group]
    real, real_mask = pad(flat, length=completion_length, pad_id=pad_id, truncate="right")
    batch: dict[str, Any] = {"prompt": prompt, "prompt_mask": prompt_mask}
    batch["completion"] = np.full((*where.shape, real.shape[-1]), pad_id, np.int32)
    batch["completion_mask"] = np.zeros(batch["completion"].shape, bool)
    batch["completion"][where], batch["completion_mask"][where] = real, real_mask
    batch["reward"] = None if reward is None else _rewards(reward, counts, where)
    batch["loss_mask"] = None if loss_mask is None else _loss_mask(loss_mask, completions, where, batch)
    batch["where"] = None if where.all() else where
    return Candidates(**batch)


def supervised(
    prompts: Sequence[Tokens],
    completions: Sequence[Tokens],
    *,
    pad_id: int,
    prompt_length: int | None = None,
    completion_length: int | None = None,
    truncate: bool = False,
    loss_mask: Sequence[Sequence[bool]] | None = None,
) -> Candidates:
    """One completion per prompt, N = 1; see `from_tokens`."""
    return from_tokens(
        prompts,
        [[completion] for completion in completions],
        pad_id=pad_id,
        prompt_length=prompt_length,
        completion_length=completion_length,
        truncate=truncate,
        loss_mask=None if loss_mask is None else [[one] for one in loss_mask],
    )


def pairs(
    prompts: Sequence[Tokens],
    chosen: Sequence[Tokens],
    rejected: Sequence[Tokens],
    *,
    pad_id: int,
    prompt_length: int | None = None,
    completion_length: int | None = None,
    truncate: bool = False,
) -> Candidates:
    """Preference pairs, N = 2: index 0 is chosen, index 1 rejected; see `from_tokens`.

    Example:
      >>> pairs([[5]], [[7, 2]], [[8, 9, 2]], pad_id=0).completion.tolist()
      [[[7, 2, 0], [8, 9, 2]]]
    """
    _check_same_number("rejected", rejected, chosen, "chosen")
    return from_tokens(
        prompts,
        list(zip(chosen, rejected, strict=True)),
        pad_id=pad_id,
        prompt_length=prompt_length,
        completion_length=completion_length,
        truncate=truncate,
    )


def token_mask(candidates: Candidates) -> Bool[Array, "B N T"]:
    """The tokens whose log-probabilities make up that of a completion: those that are learned from.

    A completion without any, one that is masked out of the loss as a whole (`learned`), is seen whole: labels and
    advantages that read it are those of the completion that was drawn.

    Args:
      candidates: NumPy or JAX.

    Returns:
      ``completion_mask & loss_mask``, or ``completion_mask`` where that is False throughout a completion.

    Example:
      >>> batch = supervised([[5]], [[7, 8, 2]], pad_id=0, loss_mask=[[True, False, True]])
      >>> token_mask(batch).tolist()
      [[[True, False, True]]]
    """
    if candidates.loss_mask is None:
        return candidates.completion_mask
    mask = candidates.completion_mask & candidates.loss_mask
    return mask | (candidates.completion_mask & ~mask.any(axis=-1, keepdims=True))


def learned(candidates: Candidates) -> Bool[Array, "B N"] | None:
    """The candidates that count in a loss: the real ones with a token to learn from.

    Args:
      candidates: NumPy or JAX.

    Returns:
      What ``where`` is in a loss; None means all, as there.

    Example:
      >>> batch = from_tokens([[5]], [[[7, 2], [8, 9]]], pad_id=0, loss_mask=[[[True, True], [False, False]]])
      >>> learned(batch).tolist()
      [[True, False]]
    """
    if candidates.loss_mask is None:
        return candidates.where
    some = (candidates.completion_mask & candidates.loss_mask).any(axis=-1)
    return some if candidates.where is None else candidates.where & some


def truncated(candidates: Candidates, end_ids: Sequence[int]) -> Bool[Array, "B N"]:
    """The completions that the width of the batch cut: they fill it and do not end.

    Args:
      candidates: NumPy or JAX, as wide as a completion may be.
      end_ids: What ends a completion.

    Returns:
      True where the last place holds a token that is no end.

    Example:
      >>> truncated(from_tokens([[5]], [[[7, 2], [8, 9], [2]]], pad_id=0), (2,)).tolist()
      [[False, True, False]]
    """
    ended = np.isin(np.asarray(candidates.completion[..., -1]), np.asarray(end_ids))
    return np.asarray(candidates.completion_mask[..., -1]) & ~ended


def without_truncated(candidates: Candidates, end_ids: Sequence[int]) -> Candidates:
    """The same candidates, those that are `truncated` masked out of the loss: DAPO's overlong filtering.

    Args:
      candidates: As for `truncated`, on the host.
      end_ids: Likewise.

    Returns:
      `Candidates` with a ``loss_mask``.

    References:
      Yu et al., 2025, arXiv:2503.14476, section 3.4.
    """
    mask = candidates.completion_mask if candidates.loss_mask is None else candidates.loss_mask
    return dataclasses.replace(candidates, loss_mask=mask & ~truncated(candidates, end_ids)[..., None])


def take(candidates: Candidates, indices: Sequence[int] | slice | Int[Array, " K"]) -> Candidates:
    """The prompts at ``indices``, with all of their candidates.

    Args:
      candidates: B prompts.
      indices: K places in ``[0, B)``, or a slice.

    Returns:
      K prompts.
    """
    at = np.asarray(indices, int) if isinstance(indices, Sequence) else indices
    return jax.tree.map(lambda x: x[at], candidates)


def lengths(candidates: Candidates) -> Int[np.ndarray, "B 2"]:
    """Tokens of every prompt, and of the longest of its completions.

    Args:
      candidates: Padded on the right.

    Returns:
      Two columns, what `trim` takes at least.

    Example:
      >>> lengths(from_tokens([[5, 6], [5]], [[[7], [8, 9, 2]], [[8], []]], pad_id=0)).tolist()
      [[2, 3], [1, 1]]
    """
    longest = np.asarray(candidates.completion_mask).sum(axis=-1).max(axis=-1)
    return np.stack([np.asarray(candidates.prompt_mask).sum(axis=-1), longest], axis=1)


def trim(candidates: Candidates, prompt_length: int, completion_length: int) -> Candidates:
    """The same candidates with less padding: no prompt or completion may be longer (`lengths`).

    Args:
      candidates: Padded on the right.
      prompt_length: S of the result.
      completion_length: T of the result.

    Returns:
      `Candidates`; views of the same arrays.

    Example:
      >>> short = trim(from_tokens([[5]], [[[7]]], pad_id=0, prompt_length=9, completion_length=9), 2, 3)
      >>> short.prompt.shape, short.completion.shape
      ((1, 2), (1, 1, 3))
    """
    prompts = {name: getattr(candidates, name)[:, :prompt_length] for name in ("prompt", "prompt_mask")}
    names = ("completion", "completion_mask", "old_token_logp", "loss_mask", "support")
    tokens = {name: x[:, :, :completion_length] for name, x in _given(candidates).items() if name in names}
    return dataclasses.replace(candidates, **prompts, **tokens)


def select(candidates: Candidates, index: Int[Array, "B K"]) -> Candidates:
    """The candidates at ``index`` of every prompt: the best of N, or the best and the worst as a pair.

    Args:
      candidates: B prompts, N candidates.
      index: K places in ``[0, N)`` per prompt.

    Returns:
      B prompts, K candidates, in the order of ``index``.

    Example:
      >>> batch = from_tokens([[5]], [[[7], [8], [9]]], pad_id=0, reward=[[0.1, 0.9, 0.5]])
      >>> pair = select(batch, np.stack([batch.reward.argmax(-1), batch.reward.argmin(-1)], -1))
      >>> pair.completion.tolist()
      [[[8], [7]]]
    """
    chex.assert_rank(index, 2)
    chex.assert_equal(index.shape[0], candidates.prompt.shape[0])
    row = np.arange(index.shape[0])[:, None]
    prompts = {name: getattr(candidates, name) for name in ("prompt", "prompt_mask")}
    return Candidates(
        **{name: x[row, index] for name, x in _given(candidates).items() if name not in prompts}, **prompts
    )


def concatenate(batches: Sequence[Candidates]) -> Candidates:
    """One batch of all prompts, padded to the largest S, N and T among the batches.

    What is added is token 0 and mask False (for a candidate, ``where`` False).

    Args:
      batches: At least one; ``reward``, ``ref_logp`` and ``old_token_logp`` are in all of them or in none. A batch
        without a ``loss_mask`` or ``support`` that others have is learned from, or was drawn, without one.

    Returns:
      `Candidates` of NumPy arrays.

    Raises:
      ValueError: If there is no batch, or some batches have a field that others lack.
    """
    if not batches:
        raise ValueError("batches is empty: nothing to concatenate")
    parts = [_given(batch) for batch in alike(batches)]
    for name in _FIELDS:
        have = [name in part for part in parts]
        if name != "where" and any(have) and not all(have):
            raise ValueError(f"{name} is in batch {have.index(True)} but not in batch {have.index(False)}")
    if any("where" in part for part in parts) or len({part["completion"].shape[1] for part in parts}) > 1:
        parts = [{"where": np.ones(part["completion"].shape[:2], bool)} | part for part in parts]
    joined: dict[str, Any] = {name: _stack([np.asarray(part[name]) for part in parts]) for name in parts[0]}
    return Candidates(**joined)


def alike(batches: Sequence[Candidates]) -> list[Candidates]:
    """The batches, each with a ``loss_mask`` and a ``support`` where one of them has it.

    Args:
      batches: Any.

    Returns:
      The same, with fields that say what None says.
    """
    masked = any(batch.loss_mask is not None for batch in batches)
    sizes = {batch.support.shape[-1] for batch in batches if batch.support is not None}

    def full(batch: Candidates) -> Candidates:
        changes: dict[str, Any] = {}
        if masked and batch.loss_mask is None:
            changes["loss_mask"] = batch.completion_mask
        for size in sizes if batch.support is None else ():
            changes["support"] = np.full((*batch.completion.shape, size), 255, np.uint8)
        return dataclasses.replace(batch, **changes)

    return [full(batch) for batch in batches]


def save(path: str | os.PathLike, candidates: Candidates, *, fingerprint: str | None = None) -> None:
    """Writes a batch as ``.npz``, whole or not at all, with a digest of every field.

    Args:
      path: File to write, in a folder that exists; an older file is replaced.
      candidates: Any batch; bfloat16 fields are written as float32.
      fingerprint: Of what made the batch (tokenizer, policy, settings), kept in the file.
    """
    path = Path(path)
    arrays: dict[str, Any] = {name: np.asarray(x) for name, x in _given(candidates).items()}
    arrays = {name: x.astype(np.float32) if x.dtype.kind == "V" else x for name, x in arrays.items()}
    if fingerprint is not None:
        arrays["fingerprint"] = np.array(fingerprint)
    arrays["digests"] = np.array(kept.digests(arrays))
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            np.savez_compressed(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise naming(path, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike, *, fingerprint: str | None = None, vocab_size: int | None = None) -> Candidates:
    """Reads what `save` wrote, and nothing else; nothing is unpickled.

    Args:
      path: The file.
      fingerprint: Of what would make the batch now; a file that was made with another one is refused.
      vocab_size: Of the model that is going to read the tokens; an id beyond it is refused.

    Returns:
      `Candidates` of NumPy arrays.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: In one line, with the path and the field: not such a file, cut short, of another fingerprint, changed
        since it was written, or with values that no batch can have (`tiltjax.data.kept.check_values`).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except PermissionError:
        raise
    except Exception:  # What zipfile, its decompressors and NumPy raise on damage is not one kind of error.
        raise ValueError(f"{path}: not a whole .npz file") from None
    written, made_with = arrays.pop("digests", None), arrays.get("fingerprint")
    if fingerprint is not None and (made_with is None or str(made_with) != fingerprint):
        raise ValueError(
            f"{path}: made by another policy, tokenizer, prompts or settings: {made_with}, not {fingerprint}"
        )
    fields = {name: array for name, array in arrays.items() if name != "fingerprint"}
    if unknown := sorted(set(fields) - set(_FIELDS)):
        raise ValueError(f"{path}: unknown field {', '.join(unknown)}")
    if missing := [name for name in _REQUIRED if name not in fields]:
        raise ValueError(f"{path}: no field {', '.join(missing)}")
    try:
        kept.check_digests(arrays, written)
        kept.check_values(fields, vocab_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; delete it to have it made again") from None
    return Candidates(**fields)


def _check_fits(name, groups, length):
    for b, group in enumerate(groups):
        for n, sequence in enumerate(group):
            if length is not None and len(sequence) > length:
                place = f"[{n}]" if name == "prompt" else f"[{b}][{n}]"
                raise ValueError(f"{name}{place} has {len(sequence)} tokens, more than {name}_length={length}")


def _check_same_number(name, values, others, other="prompts"):
    if len(values) != len(others):
        raise ValueError(f"{name} must be as many as {other} ({len(others)}), got {len(values)}")


def _rewards(reward, counts, where):
    _check_same_number("reward", reward, counts)
    padded = np.zeros(where.shape, np.float32)
    for b, (row, count) in enumerate(zip(reward, counts, strict=True)):
        if len(row) != count:
            raise ValueError(f"reward[{b}] must be as many as its completions ({count}), got {len(row)}")
        for n, value in enumerate(row):
            if not math.isfinite(value):
                raise ValueError(f"reward[{b}][{n}] must be finite, got {float(value)}")
        padded[b, :count] = row
    return padded


def _loss_mask(loss_mask, completions, where, batch):
    """In the shape of the completions, or None where it is True on all of their tokens."""
    _check_same_number("loss_mask", loss_mask, completions, "completions")
    rows = []
    for b, (row, group) in enumerate(zip(loss_mask, completions, strict=True)):
        if [len(bools) for bools in row] != [len(tokens) for tokens in group]:
            raise ValueError(f"loss_mask[{b}] must have one bool per token of each of its completions")
        rows += [np.asarray(bools, np.int32) for bools in row]
    mask = np.zeros(batch["completion"].shape, bool)
    mask[where] = pad(rows, length=mask.shape[-1], truncate="right")[0] > 0
    return None if np.array_equal(mask, batch["completion_mask"]) else mask


def _given(candidates: Candidates) -> dict[str, Any]:
    return {name: value for name in _FIELDS if (value := getattr(candidates, name)) is not None}


def _stack(arrays: list[np.ndarray]) -> np.ndarray:
    inner = [max(sizes) for sizes in zip(*(x.shape[1:] for x in arrays), strict=True)]
    grown = [
        np.pad(x, [(0, 0), *((0, new - old) for new, old in zip(inner, x.shape[1:], strict=True))]) for x in arrays
    ]
    return np.concatenate(grown)
