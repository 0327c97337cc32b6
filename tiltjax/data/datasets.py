"""Rows from JSON Lines, JSON, Parquet and TensorFlow Datasets; a bad row is refused by file, line and reason.

What the columns mean is in `tiltjax.data.rows`.
"""

import glob
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tiltjax.data.rows import KINDS, PairRow, PromptRow, RankedRow, Row, SupervisedRow, UnpairedRow, parse_row
from tiltjax.ops.checks import check_at_least, check_choice

__all__ = ["DataError", "PairRow", "PromptRow", "RankedRow", "Row", "SupervisedRow", "UnpairedRow", "read"]


class DataError(ValueError):
    """A row or a file that cannot be used: ``path:line: reason``, in one line.

    In files without lines (Parquet, a JSON array, TFDS) the line is the number of the row; both count from 1.
    """


def read(source: str | os.PathLike, kind: str, *, split: str | None = None, limit: int | None = None) -> list[Row]:
    """Reads rows of one kind.

    Args:
      source: A ``.jsonl``, ``.json`` or ``.parquet`` file; a folder or a glob of them, read in the order of their
        names; ``tfds:name`` or ``tfds:name/config`` for a prepared TensorFlow dataset, or ``tfds:folder`` for one by
        its folder. TensorFlow itself is not used, so the dataset must be stored as ``array_record`` or ``parquet``.
      kind: ``"prompt"``, ``"supervised"``, ``"pair"``, ``"unpaired"`` or ``"ranked"``.
      split: Of a TensorFlow dataset: the split, which may be left out where there is only one. Of a folder or a glob:
        only the files whose name is the split's, or begins with it (``train-00000-of-00002.parquet``).
      limit: Stop after so many rows; None reads all.

    Returns:
      At least one row.

    Raises:
      DataError: If a row or a file is bad, with its place and the reason.
      FileNotFoundError: If there is no such file.
      ValueError: If ``kind`` is unknown, or ``split`` is missing or out of place.
    """
    check_choice("kind", kind, KINDS)
    if limit is not None:
        check_at_least("limit", limit, 1)
    source, rows = os.fspath(source), []
    records = _read_tfds(source, split) if source.startswith("tfds:") else _read_files(source, split)
    for place, record in tqdm(itertools.islice(records, limit), desc=source, unit=" rows", delay=2, disable=None):
        try:
            rows.append(parse_row(record, kind, place=place))
        except ValueError as error:
            raise DataError(f"{place}: {error}") from None
    if not rows:
        raise DataError(f"{source}: no rows")
    return rows


def _read_files(source: str, split: str | None) -> Iterator[tuple[str, Any]]:
    path, pattern = Path(source).expanduser(), any(c in source for c in "*?[")
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix in _READERS and not file.name.startswith(".")]
    elif pattern and not path.exists():
        files = [Path(file) for file in glob.glob(str(path), recursive=True)]
    elif path.exists():
        if split is not None:
            raise ValueError(f"split must be None for a single file, got {split!r}: {path}")
        files = [path]
    else:
        raise FileNotFoundError(f"no such file: {path}")
    if split is not None:
        files = [file for file in files if file.stem == split or file.stem.startswith((f"{split}-", f"{split}_"))]
    if not files:
        of_split = "" if split is None else f" of split {split!r}"
        raise FileNotFoundError(f"no {', '.join(_READERS)} file{of_split}: {path}")
    for file in sorted(files):
        if file.suffix not in _READERS:
            raise DataError(f"{file}: only {', '.join(_READERS)} files are read")
    return itertools.chain.from_iterable(_READERS[file.suffix](file) for file in sorted(files))


def _read_jsonl(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}:{number}", _load_json(line, path, number)


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    with open(path, "rb") as file:
        if not file.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from _read_jsonl(path)
            return
        file.seek(0)
        for number, row in enumerate(_load_json(file.read(), path, 1), 1):
            yield f"{path}:{number}", row


def _load_json(text: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"{path}:{number + error.lineno - 1}"
        raise DataError(f"{place}: invalid JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number + text[: error.start].count(10)}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number}: invalid JSON: {_first_line(error)}") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file: {_first_line(error)}") from None


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _read_tfds(source: str, split: str | None) -> Iterator[tuple[str, Any]]:
    import tensorflow_datasets as tfds

    name = source.removeprefix("tfds:")
    folder = Path(name).expanduser()
    if not folder.is_dir() and name.startswith(("/", "~", ".")):
        raise FileNotFoundError(f"no such folder: {folder}")
    try:
        builder = tfds.builder_from_directory(str(folder)) if folder.is_dir() else tfds.builder(name)
        splits = list(builder.info.splits)
        if not splits:
            raise ValueError(f"not prepared; with TensorFlow, run: tfds build {name} --file_format=array_record")
        if split is None and len(splits) > 1:
            raise ValueError(f"split must be one of {', '.join(splits)}; got None")
        examples = builder.as_data_source(split=split or splits[0])
    except NotImplementedError:
        raise DataError(f"{source}: stored as tfrecord; prepare it with file_format='array_record'") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{source}: {_first_line(error)}") from None
    for i in range(len(examples)):
        try:
            record = _plain(examples[i])
        except (ValueError, OSError, RuntimeError) as error:
            raise DataError(f"{source}:{i + 1}: {_first_line(error)}") from None
        yield f"{source}:{i + 1}", record


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value
    if hasattr(value, "tolist"):
        return _plain(value.tolist())
    return [_plain(part) for part in value] if isinstance(value, list | tuple) else value


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
