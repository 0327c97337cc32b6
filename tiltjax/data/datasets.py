"""Rows from JSON Lines, JSON, CSV, Parquet, Arrow and TensorFlow Datasets; a bad row is refused by its file and line.

What the columns mean is in `tiltjax.data.rows`.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from tiltjax.data.files import DataError
from tiltjax.data.rows import KINDS, PairRow, PromptRow, RankedRow, Row, SupervisedRow, UnpairedRow, parse_row
from tiltjax.data.sources import open_source
from tiltjax.ops.checks import check_at_least, check_choice

__all__ = [
    "DataError",
    "PairRow",
    "PromptRow",
    "RankedRow",
    "Row",
    "SupervisedRow",
    "UnpairedRow",
    "hold_out",
    "parse_rows",
    "prompt_identity",
    "read",
    "with_columns",
]

_LOG = logging.getLogger(__name__)

_Row = TypeVar("_Row", bound=Row)


def read(
    source: str | os.PathLike,
    kind: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    check: Callable[[Any], None] | None = None,
) -> list[Row]:
    """Reads rows of one kind.

    Args:
      source: A ``.jsonl``, ``.json``, ``.csv`` (each also ``.gz``), ``.parquet`` or ``.arrow`` file; a folder or a glob
        of them, read in the order of their names; a folder that ``datasets.save_to_disk`` wrote; ``tfds:name`` or
        ``tfds:name/config`` for a prepared TensorFlow dataset, or ``tfds:folder`` for one by its folder. TensorFlow
        itself is not used, so the dataset must be stored as ``array_record`` or ``parquet``. The first line of a CSV
        names its columns, and all its values are texts. ``source?split=train`` chooses a split.
      kind: ``"prompt"``, ``"supervised"``, ``"pair"``, ``"unpaired"`` or ``"ranked"``.
      split: The split, unless ``source`` has it. It may be left out where there is only one. A file of a folder or a
        glob is of the split that its name says (``train-00000-of-00002.parquet``, ``train.jsonl``).
      limit: Stop after so many rows; None reads all.
      skip_bad: Leaves out rows that are bad, and says how many in one line of the log, instead of refusing the first.
        A file that cannot be read as a whole is refused all the same.
      check: Raises ValueError with the reason where a row is bad for what only the caller knows.

    Returns:
      At least one row. Nulls that Parquet and Arrow have filled in inside conversations and tools are gone.

    Raises:
      DataError: If a row or a file is bad, with its place and the reason, or a split must be chosen.
      FileNotFoundError: If there is no such file.
      ValueError: If ``kind`` is unknown, or ``split`` is out of place.
    """
    check_choice("kind", kind, KINDS)
    if limit is not None:
        check_at_least("limit", limit, 1)
    source = os.fspath(source)
    records = iter(tqdm(open_source(source, split), desc=source, unit=" rows", delay=2, disable=None))
    return parse_rows(records, kind, source=source, limit=limit, skip_bad=skip_bad, check=check)


def parse_rows(
    records: Iterable[tuple[str, Any]],
    kind: str,
    *,
    source: str,
    limit: int | None = None,
    skip_bad: bool = False,
    check: Callable[[Any], None] | None = None,
) -> list[Row]:
    """Makes rows of one kind from records that are in memory.

    Args:
      records: ``(place, record)``: what messages call it, and column names with plain Python values.
      kind: As for `read`.
      source: What messages call all of them.
      limit: As for `read`.
      skip_bad: As for `read`.
      check: As for `read`.

    Returns:
      At least one row.

    Raises:
      DataError: If a row is bad, with its place and the reason, or there is none.

    Example:
      >>> [row.prompt for row in parse_rows([("rows:1", {"prompt": "The sky"})], "prompt", source="rows")]
      ['The sky']
    """
    rows: list[Row] = []
    bad: list[DataError] = []
    for place, record in records:
        try:
            rows.append(_row(place, record, kind, check))
        except DataError as error:
            bad.append(error)
            if not skip_bad:
                raise
        if limit is not None and len(rows) == limit:
            break
    _report_skipped(source, bad)
    if not rows:
        raise DataError(f"{source}: no rows{f' but {len(bad)} bad ones; the first: {bad[0]}' if bad else ''}")
    if plain := [row for row in rows if row.template and isinstance(row.prompt, str)]:
        _LOG.warning(
            "%s: %d of %d rows have tools or chat_template_kwargs but a text as prompt, which no chat template reads; "
            "the first: %s",
            source, len(plain), len(rows), plain[0].place,
        )  # fmt: skip
    return rows


def with_columns(rows: Sequence[_Row], needs: Mapping[str, str], *, source: str, skip_bad: bool = False) -> list[_Row]:
    """The rows, every one of which must have some further columns.

    Args:
      rows: From `read`.
      needs: Column that must be there and not null -> what needs it, for the message.
      source: Where the rows are from.
      skip_bad: As for `read`.

    Returns:
      The rows that have them all.

    Raises:
      DataError: With the place and the column, if a row does not have one; or if none does.
    """
    good: list[_Row] = []
    bad: list[DataError] = []
    for row in rows:
        column = next((name for name in needs if row.columns.get(name) is None), None)
        if column is None:
            good.append(row)
            continue
        reason = f"column {column!r} is null" if column in row.columns else f"no column {column!r}"
        error = DataError(f"{row.place or source}: {reason}, which {needs[column]} needs")
        if not skip_bad:
            raise error
        bad.append(error)
    _report_skipped(source, bad)
    if bad and not good:
        raise bad[0]
    return good


def hold_out(rows: Sequence[_Row], num_train: int, num_held_out: int, *, source: str) -> tuple[list[_Row], list[_Row]]:
    """Rows to train on and rows to be judged by, which share no prompt.

    The first rows are trained on, however often a prompt comes among them. Of the rows after them those are held out
    whose prompt comes for the first time; how many were passed over is said in one line of the log.

    Args:
      rows: From `read`.
      num_train: How many to train on.
      num_held_out: How many to hold out.
      source: Where the rows are from.

    Returns:
      ``num_train`` and ``num_held_out`` rows.

    Raises:
      ValueError: If there are too few rows, or too few whose prompts are not trained on.
    """
    wanted = num_train + num_held_out
    if len(rows) < wanted:
        raise ValueError(f"{source}: {wanted} prompts are needed (training and held-out), the file has {len(rows)}")
    train = list(rows[:num_train])
    held_out: list[_Row] = []
    trained = {prompt_identity(row) for row in train}
    seen = set(trained)
    repeats = again = 0
    for row in rows[num_train:]:
        if len(held_out) == num_held_out:
            break
        identity = prompt_identity(row)
        repeats += identity in trained
        again += identity in seen and identity not in trained
        if identity not in seen:
            seen.add(identity)
            held_out.append(row)
    told = f"{repeats} rows after the first {num_train} repeat a prompt that is trained on and {again} one held out"
    if len(held_out) < num_held_out:
        raise ValueError(f"{source}: {num_held_out} held-out prompts are needed, there are {len(held_out)}: {told}")
    if repeats or again:
        _LOG.warning("%s: %s: left out of the held-out prompts", source, told)
    return train, held_out


def prompt_identity(row: Row) -> str:
    """What two rows share that ask the same: the prompt, and what the chat template is given with it."""
    return json.dumps([row.prompt, row.template], sort_keys=True, default=repr)


def _row(place: str, record: Any, kind: str, check: Callable[[Any], None] | None) -> Row:
    if isinstance(record, DataError):
        raise record
    try:
        _check_texts(record, "")
        row = parse_row(record, kind, place=place)
        if check is not None:
            check(row)
    except ValueError as error:
        raise DataError(f"{place}: {error}") from None
    return row


def _check_texts(value: Any, name: str) -> None:
    """No text may hold half of a surrogate pair: JSON can write it, but it is no text that a tokenizer takes."""
    if isinstance(value, str):
        try:
            value.isascii() or value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            raise ValueError(f"{name} has half of a surrogate pair, {half}, at character {error.start + 1}") from None
    elif isinstance(value, dict):
        for key, part in value.items():
            _check_texts(key, f"a name in {name or 'the columns'}")
            _check_texts(part, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            _check_texts(part, f"{name}[{i}]")


def _report_skipped(source: str, bad: Sequence[DataError]) -> None:
    if bad:
        _LOG.warning("%s: %d bad rows left out; the first: %s", source, len(bad), bad[0])
