"""The directory of a run: one program at a time, never overwritten unasked, nothing left of what came to nothing."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import pathlib
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from tiltjax.train import distributed
from tiltjax.train.config import field, load_config, output_field, save_config, write_text
from tiltjax.train.hardware import compilation_cache_field

__all__ = ["Run", "RunFlags", "locked", "open_run", "overwrite_field"]

_LOG = logging.getLogger(__name__)

_CONFIG = "config.json"
_PARTS = "fingerprint.json"
_LOCK = ".lock"
_WRITTEN = (
    "metrics.jsonl", "tensorboard", "checkpoints", "candidates", "hf", "results.json", "report.md", "*.png", "*.part",
    _PARTS, _CONFIG,
)  # fmt: skip
"""What a run may write, with what its program adds to it; the settings go last, so that a half removed run is one."""

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def overwrite_field() -> Any:
    """The field of an experiment's configuration with which `open_run` removes the run that is there."""
    return field(False, "Remove the run in --output and start anew; files that no run writes stay.")


@dataclasses.dataclass(frozen=True)
class RunFlags:
    """Settings of a run's directory, which move no number."""

    output: str = output_field("runs/run")
    resume: bool = field(
        False,
        "Go on with the run in --output from wherever it was stopped: bit for bit with the same settings, to rounding "
        "with another --remat, --attention or --length_buckets.",
    )
    overwrite: bool = overwrite_field()
    compilation_cache: str = compilation_cache_field()


@dataclasses.dataclass
class Run:
    """The directory of a run, held by this program; see `open_run`.

    Attributes:
      config: Of the run.
      directory: ``config.output`` as a path.
      resumed: Whether there is a run that this one goes on with.
      writes: Names and patterns of what the run writes into its directory.
      begun: Whether `begin` was called.
    """

    config: Any
    directory: pathlib.Path
    resumed: bool
    writes: tuple[str, ...]
    begun: bool = False

    def begin(self, parts: Mapping[str, str] | None = None) -> None:
        """Writes the settings, and removes a run that is to be overwritten; once all input was read and found good.

        With several hosts all of them call this. A second call adds parts.

        Args:
          parts: What the run is made of -> its fingerprint, such as {"policy": "5f1e"}.

        Raises:
          ValueError: If a run that is resumed was made of other parts; names them.
        """
        distributed.by_main(lambda: self._begin(dict(parts or {})))
        self.begun = True

    def _begin(self, parts: dict[str, str]) -> None:
        if not self.resumed and not self.begun:
            _remove(self.directory, self.writes)
        noted = self.directory / _PARTS
        before = json.loads(noted.read_text()) if noted.exists() else {}
        if changed := [name for name, value in parts.items() if before.get(name, value) != value]:
            raise ValueError(f"{self.directory}: made with another {', '.join(changed)} than it would be now")
        if parts:
            write_text(noted, json.dumps(before | parts, indent=2) + "\n")
        save_config(self.config, self.directory / _CONFIG)


@contextlib.contextmanager
def open_run(
    config: Any, *, free: Collection[str] = (), resume: bool | None = None, writes: Collection[str] = ()
) -> Iterator[Run]:
    """Holds the directory of a run: it must be new, or go on with its own run, or overwrite it when told to.

    A first attempt that fails before it has a result leaves nothing behind. With several hosts all of them call this;
    process 0 holds the directory.

    Args:
      config: With the fields ``output`` and ``overwrite``, and ``resume`` where the program has it.
      free: Fields that may differ from those of the run that is there.
      resume: Whether to go on with it; None asks ``config.resume``.
      writes: Names and patterns of what this program writes beside what all do.

    Yields:
      `Run`; nothing but a lock is written before its `Run.begin`.

    Raises:
      ValueError: If another program is at work there, there is a run and it is neither resumed nor overwritten, other
        settings made it, or what is to be overwritten is no run of this program.
    """
    asked = bool(config.resume) if resume is None else resume
    directory, names = pathlib.Path(config.output), (*writes, *_WRITTEN)
    if config.overwrite and resume is None and asked:
        raise ValueError("resume and overwrite exclude each other")
    with locked(directory):

        def look() -> bool:
            return _look(config, directory, names, free, go_on=asked, flag=resume is None)

        run = Run(config, directory, distributed.together(look), names)
        try:
            yield run
        except Exception:
            if distributed.is_main() and run.begun and not run.resumed and not _results(directory, names):
                _remove(directory, names)
            raise


def _look(
    config: Any, directory: pathlib.Path, names: tuple[str, ...], free: Collection[str], *, go_on: bool, flag: bool
) -> bool:
    """Whether to go on with what is there; writes nothing."""
    saved = directory / _CONFIG
    if config.overwrite:
        strange = [p.name for p in directory.iterdir() if p.name != _LOCK] if directory.exists() else []
        if strange and not _is_run(saved, type(config)):
            raise ValueError(
                f"{directory}: --overwrite removes a run of this program, and this is none (it holds {strange[0]!r})"
            )
        return False
    if not saved.exists():
        return False
    before = load_config(type(config), saved, like=config)
    if not _results(directory, names):
        return go_on and not _changed(before, config, free)
    if not go_on:
        ways = "--resume to go on with it, " if flag else ""
        raise ValueError(
            f"{directory}: there is a run already; pass {ways}--overwrite to remove it, or another --output"
        )
    if changed := _changed(before, config, free):
        if flag:
            raise ValueError(f"{saved}: --resume with other settings: {changed}")
        raise ValueError(
            f"{saved}: a run with other settings: {changed}; pass --overwrite to remove it, or another --output"
        )
    return True


def _changed(before: Any, config: Any, free: Collection[str]) -> str:
    pairs = zip(dataclasses.asdict(before).items(), dataclasses.asdict(config).values(), strict=True)
    same = {"output", "resume", "overwrite", *free}
    return ", ".join(f"{name} ({a} -> {b})" for (name, a), b in pairs if a != b and name not in same)


def _is_run(saved: pathlib.Path, config_class: type) -> bool:
    """Whether settings are those of a run of a program, of this version or an older one."""
    try:
        values = json.loads(saved.read_text())
    except (OSError, ValueError, RecursionError):
        return False
    known = {item.name for item in dataclasses.fields(config_class)}
    return isinstance(values, dict) and "output" in values and set(values) <= known


def _results(directory: pathlib.Path, names: tuple[str, ...]) -> bool:
    """Whether a run has come to anything: rewarded candidates, a line of metrics, a checkpoint, a report."""
    paths = (path for name in names for path in directory.glob(name))
    files = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    return any(_is_result(file) for file in files if not _is_unfinished(file.relative_to(directory)))


def _is_unfinished(path: pathlib.Path) -> bool:
    return path.parts[0] == "tensorboard" or any(part.startswith(".part-") for part in path.parts)


def _is_result(path: pathlib.Path) -> bool:
    if path.name in (_CONFIG, _PARTS) or path.suffix == ".part" or not path.is_file():
        return False
    if path.suffix == ".npz":
        try:
            with np.load(path) as kept:
                return "reward" in kept.files
        except (OSError, ValueError):
            return True  # Whatever it is, it is not ours to say that it is nothing.
    return path.stat().st_size > 0


def _remove(directory: pathlib.Path, names: tuple[str, ...]) -> None:
    for name in names:
        for path in directory.glob(name):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


@contextlib.contextmanager
def locked(directory: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Holds a directory for this program; a program that ends in whatever way holds nothing.

    The directory is made; where it is empty at the end, it is removed again if it was made here. With several hosts all
    of them call this, and process 0 holds it.

    Args:
      directory: Where the program writes.

    Yields:
      ``directory`` as a path.

    Raises:
      ValueError: If another program holds it.
    """
    path = pathlib.Path(directory)
    held = distributed.by_main(lambda: _take(path))
    try:
        yield path
    finally:
        if held is not None:
            file, made = held
            with contextlib.suppress(OSError):
                (path / _LOCK).unlink()
            os.close(file)
            for folder in made:
                with contextlib.suppress(OSError):
                    folder.rmdir()


def _take(directory: pathlib.Path) -> tuple[int, list[pathlib.Path]]:
    """An open file that is locked, and the folders that were made for it, the deepest first."""
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    lock = directory / _LOCK
    while True:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # Whoever held it has just removed the folder, or one above it.
        except FileExistsError:
            if directory.exists():
                raise  # As a file.
            continue  # It was there for mkdir, and is gone.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(file, 200).decode(errors="replace").strip()
            if error.errno in _NO_LOCKS:
                _LOG.warning("%s: this file system has no locks; see that no other program writes here", directory)
                return file, made
            os.close(file)
            if not isinstance(error, BlockingIOError):
                raise
            raise ValueError(
                f"{directory}: another program is at work here{f' ({holder})' if holder else ''}; "
                "wait for it, or pass another --output"
            ) from None
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), os.stat(lock)):
                break
        os.close(file)  # The one that held it has removed it in between.
    os.truncate(file, 0)
    os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return file, made
