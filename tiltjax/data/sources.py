"""Which records a source names: a file, a folder or a glob of files, a dataset that was saved to disk, or one of TFDS.

Where there are several splits, one must be chosen: nobody trains on the test split by the order of the names.
"""

import glob
import itertools
import json
import re
from pathlib import Path
from typing import Any

from tiltjax.data.files import SUFFIXES, DataError, Records, first_line, kind_of_file, records

__all__ = ["open_source"]

_ABOUT = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Files about a dataset, which are no data."""

_SHARD = re.compile(r"(.+?)[-_.]\d+-of-\d+")
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation", "heldout")
"""Words in a file's name that say which split it is."""


def open_source(source: str, split: str | None) -> Records:
    """The records of a source, see `tiltjax.data.datasets.read`.

    Args:
      source: A file, folder, glob or TFDS builder; a split may follow, as in ``folder?split=train``.
      split: The split, if it is not in the source.

    Returns:
      Places and records.

    Raises:
      DataError: If a file cannot be read, or a split must be chosen.
      FileNotFoundError: If there is no such file.
      ValueError: If two splits are named.
    """
    name, option, named = source.partition("?split=")
    if option and split not in (None, named):
        raise ValueError(f"split must be that of the source, {named!r}, got {split!r}")
    split = named if option else split
    if name.startswith("tfds:"):
        return _read_tfds(name, split)
    return itertools.chain.from_iterable(map(records, _files(name, split)))


def _files(source: str, split: str | None) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists():
            names = _json(path / "dataset_dict.json").get("splits")
            folder = path / _choose(source, names if isinstance(names, list) else [], split)
            return _saved(folder) if (folder / "state.json").exists() else _files(str(folder), None)
        if (path / "state.json").exists():
            return _saved(path, split)
        every = sorted(file for file in path.iterdir() if not file.name.startswith("."))
        files = [file for file in every if file.is_file() and kind_of_file(file) and file.name not in _ABOUT]
        if not files:
            there = ", ".join(f"{file.name}/" if file.is_dir() else file.name for file in every[:8])
            raise FileNotFoundError(f"no {', '.join(SUFFIXES)} file in folder {path}; it has: {there or 'nothing'}")
        return _of_split(source, files, split)
    if path.exists():
        if split is not None:
            raise ValueError(f"split must be None for a single file, got {split!r}: {path}")
        return [path]
    if any(c in source for c in "*?["):
        files = sorted(Path(file) for file in glob.glob(str(path), recursive=True))
        if not files:
            raise FileNotFoundError(f"no file matches {path}")
        return _of_split(source, files, split)
    raise FileNotFoundError(f"no such file: {path}")


def _of_split(source: str, files: list[Path], split: str | None) -> list[Path]:
    named = [_split_of(file) for file in files]
    names = sorted({name for name in named if name is not None})
    if split is None and len(names) <= 1:
        return files
    chosen = split if split is not None and any(_stem(file) == split for file in files) else None
    chosen = chosen or _choose(source, names, split)
    return [file for file, name in zip(files, named, strict=True) if chosen in (name, _stem(file))]


def _choose(source: str, names: list[str], split: str | None) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split not in names:
        example = next((name for name in names if name.startswith("train")), "".join(names[:1]))
        hint = f"; write {source}?split={example}" if names else ""
        raise DataError(f"{source}: split must be one of {', '.join(names) or 'none'}; got {split}{hint}")
    assert split is not None
    return split


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len(kind_of_file(path) or path.suffix)]


def _split_of(path: Path) -> str | None:
    """What a file's name says: ``train`` of train-00000-of-00002.parquet, of train.jsonl and of questions_train.csv."""
    stem = _stem(path)
    if shard := _SHARD.fullmatch(stem):
        return shard[1]
    return next((word for word in re.split(r"[-_. ]+", stem.lower()) if word in _SPLITS), None)


def _saved(folder: Path, split: str | None = None) -> list[Path]:
    """The files of a folder that ``datasets.save_to_disk`` wrote, in its order."""
    about = _json(folder / "state.json")
    if split not in (None, about.get("_split")):
        raise ValueError(f"split must be None for a dataset of one split, got {split!r}: {folder}")
    if about.get("_indices_data_files") or about.get("_indices_files"):
        raise DataError(f"{folder}: its rows are chosen by indices; save it again with flatten_indices()")
    try:
        return [folder / file["filename"] for file in about["_data_files"]]
    except (KeyError, TypeError):
        raise DataError(f"{folder / 'state.json'}: does not name the data files") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: invalid JSON: {first_line(error)}") from None
    if not isinstance(found, dict):
        raise DataError(f"{path}: not an object")
    return found


def _read_tfds(source: str, split: str | None) -> Records:
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
        examples = builder.as_data_source(split=_choose(source, splits, None) if split is None else split)
    except NotImplementedError:
        raise DataError(f"{source}: stored as tfrecord; prepare it with file_format='array_record'") from None
    except DataError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(f"{source}: {first_line(error)}") from None
    for i in range(len(examples)):
        try:
            record = _plain(examples[i])
        except (ValueError, OSError, RuntimeError) as error:
            raise DataError(f"{source}:{i + 1}: {first_line(error)}") from None
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
