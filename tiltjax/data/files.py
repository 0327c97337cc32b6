"""Records of one file: JSON Lines, JSON, CSV, Parquet and Arrow, texts also compressed by gzip.

Every record comes with its place, ``path:line``. A record that cannot be read is a `DataError` in its place, so that
the caller may go on to the next one; a file that cannot be read raises it.
"""

import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["SUFFIXES", "DataError", "Records", "first_line", "kind_of_file", "records"]


class DataError(ValueError):
    """A row or a file that cannot be used: ``path:line: reason``, in one line.

    In files without lines (Parquet, Arrow, a JSON array, TFDS) the line is the number of the row; both count from 1.
    """


Records = Iterator[tuple[str, Any]]
"""Place and record, or place and `DataError`."""

CONVERSED = ("chat_template_kwargs", "chosen", "completion", "completions", "messages", "prompt", "rejected", "tools")
"""Columns that hold what a chat template reads: there a null that Parquet has filled in is no value."""

_FOREIGN = {
    b"version https://git-lfs": "a Git LFS pointer, not the data: run git lfs pull",
    b"\xff\xfe": "UTF-16, not UTF-8, by its byte-order mark",
    b"\xfe\xff": "UTF-16, not UTF-8, by its byte-order mark",
    b"<!doctype html": "a page of HTML, not data",
    b"<html": "a page of HTML, not data",
    b"pk\x03\x04": "a ZIP archive: unpack it",
    b"bzh": "compressed by bzip2: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"\xfd7zxz": "compressed by xz: unpack it",
}
"""How files begin (in small letters) that are nothing that is read here, whatever their name."""

_OWN = {b"\x1f\x8b": ".gz", b"PAR1": ".parquet", b"ARROW1": ".arrow"}
"""How files begin that are read here -> what their name must end in."""


def kind_of_file(path: Path) -> str | None:
    """The ending by which a file is read, one of `SUFFIXES`; None if it is none of them."""
    name = path.name.lower()
    return max((suffix for suffix in SUFFIXES if name.endswith(suffix)), key=len, default=None)


def records(path: Path) -> Records:
    """Reads a file by the ending of its name.

    Args:
      path: A file.

    Yields:
      Place and record, or place and `DataError`.

    Raises:
      DataError: If the file as a whole cannot be read, with the reason.
      OSError: If it cannot be opened.
    """
    kind = kind_of_file(path)
    if kind is None:
        raise DataError(f"{path}: only {', '.join(SUFFIXES)} files are read")
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise DataError(f"{path}: empty file")
    for begins, reason in _FOREIGN.items():
        if head.lower().startswith(begins):
            raise DataError(f"{path}: {reason}")
    real = next((ending for begins, ending in _OWN.items() if head.startswith(begins)), None)
    if real is not None and not kind.endswith(real):
        raise DataError(f"{path}: its first bytes are those of a {real} file: its name must end so")
    if kind.endswith(".gz") and real != ".gz":
        raise DataError(f"{path}: not compressed by gzip: its name must not end in .gz")
    yield from _READERS[kind](path)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            yield from enumerate(file, 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: not a whole gzip file: {first_line(error)}") from None


def _read_jsonl(path: Path) -> Records:
    return _json_rows(path, _lines(path))


def _json_rows(path: Path, lines: Iterable[tuple[int, bytes]]) -> Records:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            record = _load_json(line.rstrip(), path, number)
        except DataError as error:
            record = error
        yield f"{path}:{number}", record


def _read_json(path: Path) -> Records:
    """A list of rows; or one row a line, as in JSON Lines."""
    lines: Iterator[tuple[int, bytes]] = itertools.dropwhile(
        lambda line: not line[1].strip(b"\xef\xbb\xbf \t\r\n"), _lines(path)
    )
    number, first = next(lines, (1, b""))
    if first.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        rows = _load_json(b"".join([first, *(line for _, line in lines)]), path, number)
        yield from ((f"{path}:{i}", row) for i, row in enumerate(rows, 1))
        return
    if first and not _is_json(first):
        rest = list(lines)
        if _is_json(b"".join([first, *(line for _, line in rest)])):
            raise DataError(f"{path}: one JSON object, not a list of rows")
        lines = iter(rest)
    yield from _json_rows(path, itertools.chain([(number, first)], lines))


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return False
    return True


def _load_json(text: bytes, path: Path, number: int) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        place = f"{path}:{number + error.lineno - 1}"
        raise DataError(f"{place}: invalid JSON: {error.msg} at column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number + text[: error.start].count(10)}: not UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}:{number}: invalid JSON: {first_line(error)}") from None


def _read_csv(path: Path) -> Records:
    """The first line names the columns; every value is a text."""
    reader = csv.reader(_texts(path), strict=True)
    start = 1
    try:
        header = next(reader, [])
        if twice := sorted({name for name in header if header.count(name) > 1}):
            raise DataError(f"{path}:1: the header names {', '.join(map(repr, twice))} twice")
        start = reader.line_num + 1
        for fields in reader:
            place = f"{path}:{start}"
            start = reader.line_num + 1
            if not fields:
                continue
            if len(fields) == len(header):
                yield place, dict(zip(header, fields, strict=True))
            else:
                yield place, DataError(f"{place}: {len(fields)} values, but the header has {len(header)} names")
    except csv.Error as error:
        raise DataError(f"{path}:{start}: invalid CSV: {error}") from None


def _texts(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            raise DataError(f"{path}:{number}: not UTF-8") from None


def _read_parquet(path: Path) -> Records:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as table:
            yield from _batch_rows(path, table.iter_batches(batch_size=1024))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Parquet file: {first_line(error)}") from None


def _read_arrow(path: Path) -> Records:
    """A file or a stream, of which the second is what ``datasets.save_to_disk`` writes."""
    import pyarrow

    try:
        with pyarrow.OSFile(str(path)) as file:
            if file.read(6) == b"ARROW1":
                table = pyarrow.ipc.open_file(file)
                batches: Iterable[Any] = (table.get_batch(i) for i in range(table.num_record_batches))
            else:
                # A stream that was cut between two batches reads like a whole one, but for its last bytes.
                file.seek(max(0, file.size() - 8))
                whole = file.read() == b"\xff\xff\xff\xff\0\0\0\0"
                file.seek(0)
                batches = pyarrow.ipc.open_stream(file)
                if not whole:
                    raise pyarrow.ArrowInvalid("no mark of its end")
            yield from _batch_rows(path, batches)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a whole Arrow file: {first_line(error)}") from None


def _batch_rows(path: Path, batches: Iterable[Any]) -> Records:
    number = 0
    for batch in batches:
        try:
            rows: list[Any] = batch.to_pylist()
        except ValueError:
            rows = [_batch_row(batch, i) for i in range(batch.num_rows)]
        for row in rows:
            number += 1
            place = f"{path}:{number}"
            if isinstance(row, str):
                yield place, DataError(f"{place}: {row}")
            else:
                yield place, {name: _filled(x) if name in CONVERSED else x for name, x in row.items()}


def _batch_row(batch: Any, i: int) -> dict[str, Any] | str:
    """One row, or why it is none."""
    row = {}
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name)[i].as_py()
        except UnicodeDecodeError:
            return f"{name} is not UTF-8"
        except ValueError as error:
            return f"{name} cannot be read: {first_line(error)}"
    return row


def _filled(value: Any) -> Any:
    """Without the nulls that stand, at every depth, for keys that another row has; a map is an object."""
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        value = dict(value)
    if isinstance(value, dict):
        return {key: _filled(part) for key, part in value.items() if part is not None}
    return [_filled(part) for part in value] if isinstance(value, list) else value


def first_line(error: BaseException) -> str:
    """The reason of an error, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


_READERS = {
    ".arrow": _read_arrow,
    ".csv": _read_csv,
    ".csv.gz": _read_csv,
    ".json": _read_json,
    ".json.gz": _read_json,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}

SUFFIXES = tuple(_READERS)
"""What the name of a file must end in."""
