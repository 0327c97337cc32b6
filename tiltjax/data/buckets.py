"""Length buckets: few padded lengths, chosen from the data, so that short sequences carry little padding.

Every length is one compilation of whatever runs on it: their number is bounded, and a bucket must be worth having.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np

from tiltjax.ops.checks import check_at_least
from tiltjax.types import Float, Int

__all__ = ["Batch", "batches_of", "bucket_of", "choose_buckets", "padding_waste"]


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows that go through together.

    Attributes:
      rows: Their places in the data, ``[batch_size]``; a short last batch is filled up with its own rows again.
      real: How many of them count, from the front.
      lengths: What they are padded to, one number per column of lengths.
    """

    rows: Int[np.ndarray, " _"]
    real: int
    lengths: tuple[int, ...]


def choose_buckets(
    lengths: Sequence[int] | Int[np.ndarray, " n"],
    *,
    longest: int | None = None,
    most: int = 4,
    multiple: int = 8,
    saving: float = 0.1,
) -> tuple[int, ...]:
    r"""The padded lengths, at most ``most``, that waste the least padding; by dynamic programming, exact.

    .. math:: \min_{b_1 < \dots < b_k} \sum_i \min \{ b_j : b_j \ge \ell_i \}

    A further bucket is taken only where it saves the given share of all positions, for it costs a compilation.

    Args:
      lengths: Of the n sequences, in tokens.
      longest: No bucket is longer; None takes the longest sequence.
      most: Largest number of buckets.
      multiple: Buckets are multiples of it, where ``longest`` allows.
      saving: Share of the positions (in one bucket) that each further bucket must save.

    Returns:
      Ascending lengths; the last one holds the longest sequence.

    Raises:
      ValueError: If ``most``, ``multiple`` or ``saving`` is out of range, or there is no sequence.

    Example:
      >>> choose_buckets([3, 5, 6, 60, 64, 61], most=3)
      (8, 64)
    """
    check_at_least("most", most, 1)
    check_at_least("multiple", multiple, 1)
    check_at_least("saving", saving, 0)
    if not len(lengths):
        raise ValueError("lengths is empty: there is nothing to choose buckets for")
    real = np.maximum(1, np.asarray(lengths))
    rounded = np.minimum(-(-real // multiple) * multiple, max(longest or 0, real.max()))
    value, count = np.unique(rounded, return_counts=True)
    upto = np.concatenate([[0], np.cumsum(count)])
    # span[i, j]: positions when the distinct lengths i to j share bucket value[j].
    span = value[None] * (upto[None, 1:] - upto[:-1, None]).astype(float)
    span = np.where(np.tri(len(value)).T > 0, span, np.inf)
    best = np.concatenate([[0.0], span[0]])  # best[j]: of the j shortest distinct lengths, in k buckets or fewer.
    begins, totals = [np.zeros(len(value), int)], [best[-1]]  # begins[k - 1][j]: where the last of k buckets begins.
    for _ in range(min(most, len(value)) - 1):
        total = best[:-1, None] + span
        best = np.concatenate([[0.0], np.min(total, axis=0)])
        begins.append(np.argmin(total, axis=0))
        totals.append(best[-1])
    k = 1
    while k < len(totals) and totals[k - 1] - totals[k] >= max(saving * totals[0], 1):
        k += 1
    chosen, end = [], len(value)
    for begin in reversed(begins[:k]):
        if end:
            chosen.append(int(value[end - 1]))
            end = int(begin[end - 1])
    return tuple(reversed(chosen))


def bucket_of(lengths: Sequence[int] | Int[np.ndarray, " n"], buckets: Sequence[int]) -> Int[np.ndarray, " n"]:
    """Index of the smallest bucket that holds each sequence.

    Args:
      lengths: Of n sequences.
      buckets: Ascending lengths, the last of them no shorter than any sequence.

    Returns:
      Indices into ``buckets``, ``[n]``.

    Raises:
      ValueError: If a sequence is longer than every bucket.

    Example:
      >>> bucket_of([3, 8, 9], (8, 64)).tolist()
      [0, 0, 1]
    """
    real = np.asarray(lengths)
    if len(real) and real.max() > buckets[-1]:
        raise ValueError(f"lengths must be at most {buckets[-1]}, the largest bucket; got {real.max()}")
    return np.searchsorted(np.asarray(buckets), real)


def batches_of(
    lengths: Int[np.ndarray, "n columns"],
    widths: tuple[int, ...],
    *,
    batch_size: int,
    counts: tuple[int, ...] | None = None,
    most: int = 4,
    multiple: int = 8,
    saving: float = 0.1,
) -> list[Batch]:
    """Batches of rows of similar length: a pure function of the lengths, so that a restart finds the same ones.

    Rows keep their order within a shape, and shapes come one after the other. The rows that are left over from a shape
    go with the next one, so there are as many batches as without buckets.

    Args:
      lengths: Of every row, one column per padded array (a prompt's length, that of its longest completion).
      widths: How wide those arrays are.
      batch_size: Rows of a batch.
      counts: How many sequences of that length a row has, by column (one prompt, N completions); None takes 1 each.
      most: Largest number of shapes, over all columns; 1 leaves the arrays as wide as they are.
      multiple: See `choose_buckets`.
      saving: Share of the positions of all columns that each further bucket must save.

    Returns:
      Every row in exactly one batch; at most ``most`` different ``Batch.lengths``.

    Raises:
      ValueError: As `choose_buckets` does; if ``batch_size < 1``.
    """
    check_at_least("batch_size", batch_size, 1)
    check_at_least("most", most, 1)
    per_row = np.array(counts or (1,) * len(widths))
    whole, options = per_row * np.maximum(1, widths), []
    for column, width, part in zip(lengths.T, widths, whole, strict=True):
        share = saving * float(whole.sum() / part)
        some = [
            choose_buckets(column, longest=width, most=k, multiple=multiple, saving=share) for k in range(1, most + 1)
        ]
        options.append(some if most > 1 else [(width,)])

    def positions(buckets: Sequence[tuple[int, ...]]) -> float:
        padded = [np.array(b)[bucket_of(column, b)].sum() for column, b in zip(lengths.T, buckets, strict=True)]
        return float(per_row @ np.array(padded))

    few = (buckets for buckets in itertools.product(*options) if math.prod(map(len, buckets)) <= most)
    buckets = min(few, key=positions)
    place = np.stack([bucket_of(column, b) for column, b in zip(lengths.T, buckets, strict=True)], axis=1)
    order = np.lexsort(place.T[::-1])
    out = []
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        top = place[rows].max(axis=0)
        fitted = tuple(int(column[j]) for column, j in zip(buckets, top, strict=True))
        out.append(Batch(rows=np.resize(rows, batch_size), real=len(rows), lengths=fitted))
    return out


def padding_waste(lengths: Int[np.ndarray, "n columns"], batches: Sequence[Batch]) -> Float[np.ndarray, " columns"]:
    """Share of the positions that is padding, by column.

    Args:
      lengths: As given to `batches_of`.
      batches: What it returned.

    Returns:
      In [0, 1), ``[columns]``; rows that only fill a batch up count as padding.
    """
    held = sum(len(batch.rows) * np.asarray(batch.lengths, float) for batch in batches)
    return 1 - np.sum(lengths, axis=0) / held
