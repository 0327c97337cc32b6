"""Orbax checkpoints that are either whole or ignored."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tiltjax.train import distributed
from tiltjax.train.finite import check_leaves, finite_leaves
from tiltjax.train.sharding import copied
from tiltjax.types import PyTree

__all__ = ["Saver", "latest", "restore", "save"]

_MANIFEST = "manifest.json"
_LOG = logging.getLogger(__name__)
_SMALLEST_SHARE = 1 << 20
"""Bytes of an array below which a replica writes it whole: to share the writing takes a program per shape and device"""


def save(
    directory: str | os.PathLike, step: int, tree: PyTree, *, keep: int = 2, fingerprint: str = ""
) -> pathlib.Path:
    """Writes a checkpoint, and takes it into account only when it is whole and all its numbers are finite.

    Arrays go into a temporary folder through Orbax; a manifest with the size and checksum of every file is added, and
    the folder gets its name ``<directory>/<step>`` by one rename. With several hosts all of them call this, on a
    directory that all of them see; each writes its own parts of the arrays.

    Args:
      directory: Of all checkpoints of a run.
      step: Names the checkpoint.
      tree: Pytree of arrays, sharded or not.
      keep: How many of the newest checkpoints stay.
      fingerprint: Of the run; `latest` refuses the checkpoint to any other.

    Returns:
      The folder of this checkpoint.

    Raises:
      NonFiniteError: If a number of ``tree`` is not finite.
      OSError: If it cannot be written.
    """
    return _finish(_begin(pathlib.Path(directory).absolute(), step, tree), keep, fingerprint)


class Saver:
    """Checkpoints that are written while the steps go on; use it as a context, which ends when the last is whole.

    What `save` is given may be donated as soon as it returns. With several hosts a checkpoint gets its name when the
    next one begins or the context ends, so that hosts meet at the same place of the program.

    Args:
      directory: Of all checkpoints of a run; None keeps none.
      keep: How many of the newest checkpoints stay.
      fingerprint: Of the run.
    """

    def __init__(self, directory: str | os.PathLike | None, *, keep: int = 2, fingerprint: str = ""):
        self._root = None if directory is None else pathlib.Path(directory).absolute()
        self._keep, self._fingerprint = keep, fingerprint
        self._thread = futures.ThreadPoolExecutor(1)
        self._pending: Callable[[], pathlib.Path] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            if kind is None or jax.process_count() == 1:  # After an error the other hosts may never come.
                self.wait()
        finally:
            self._thread.shutdown()

    def save(self, step: int, tree: PyTree, *, after: Callable[[], object] = lambda: None) -> None:
        """Begins a checkpoint, after the one before it is whole; see the function `save`.

        Args:
          step: Names the checkpoint.
          tree: Pytree of arrays.
          after: What must be done before the checkpoint counts, such as the wait for a line of metrics; if it fails,
            the checkpoint does not count. One process calls it in the background, when all is written. Several call it
            here, where they meet: if it fails on one of them, none begins the checkpoint, and all raise.
        """
        self.wait()
        several = jax.process_count() > 1
        if several:
            distributed.together(after)
        if self._root is None:
            return
        # The arrays of a CPU are read where they lie, and the next step may overwrite them.
        begun = _begin(self._root, step, copied(tree) if jax.default_backend() == "cpu" else tree)
        finish = functools.partial(_finish, begun, self._keep, self._fingerprint)
        self._pending = finish if several else self._thread.submit(finish, after).result

    def wait(self) -> None:
        """Waits until the checkpoint that was begun last is whole; its errors are raised here."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending()


def latest(directory: str | os.PathLike, *, fingerprint: str | None = None) -> int | None:
    """Step of the newest whole checkpoint; broken ones are passed over with a logged warning.

    Args:
      directory: Of all checkpoints of a run; need not exist.
      fingerprint: Of the run; None takes the checkpoints of any.

    Returns:
      The step, or None where there is no whole checkpoint; with several hosts, as process 0 sees it.

    Raises:
      ValueError: If it is the checkpoint of another run.
    """
    root = pathlib.Path(directory).absolute()
    step = distributed.agree(_latest(root) if distributed.is_main() else -1)
    if step < 0:
        return None

    def check() -> None:
        made_by = _manifest(root / str(step)).get("fingerprint", "")
        if fingerprint is not None and made_by != fingerprint:
            raise ValueError(
                f"{root / str(step)}: checkpoint of another run, made with other settings, policy, data or reward "
                f"(its fingerprint is {made_by or 'missing'}, that of this run {fingerprint})"
            )

    distributed.together(check)
    return step


def restore(directory: str | os.PathLike, step: int, like: PyTree) -> PyTree:
    """Reads a checkpoint into the structure, types and places of ``like``, on whatever mesh that is now.

    Args:
      directory: Of all checkpoints of a run.
      step: From `latest`.
      like: Pytree of arrays, or of `jax.ShapeDtypeStruct` with shardings.

    Returns:
      The same structure with the saved values.

    Raises:
      ValueError: If the checkpoint lacks a parameter of ``like``, or has it in another shape.
    """
    folder = pathlib.Path(directory).absolute() / str(step) / "state"
    # With several hosts Orbax reads global arrays only; what belongs to one host (pmap) is read whole and put there.
    targets = _flat(like)
    places = {name: distributed.global_sharding(leaf.sharding) for name, leaf in targets.items()}
    wanted = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=places[k]) for k, v in targets.items()}
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
        for name, leaf in wanted.items():
            found = tuple(saved[name].shape) if name in saved else None
            if found != leaf.shape:
                raise ValueError(f"{folder}: {name} should have shape {leaf.shape}, the checkpoint has {found}")
        values = checkpointer.restore(folder, wanted)
    for name, leaf in targets.items():
        if places[name] != leaf.sharding:
            values[name] = jax.device_put(np.asarray(values[name]), leaf.sharding)
    return jax.tree.unflatten(jax.tree.structure(like), [values[name] for name in wanted])


@dataclasses.dataclass(frozen=True)
class _Begun:
    """A checkpoint that is being written.

    Attributes:
      checkpointer: Writes it.
      part: The folder that it is written into.
      step: Its name.
      finite: Paths of its leaves, and whether each is finite.
    """

    checkpointer: ocp.AsyncCheckpointer
    part: pathlib.Path
    step: int
    finite: tuple[list[str], jax.Array]


def _begin(root: pathlib.Path, step: int, tree: PyTree) -> _Begun:
    """Copies the arrays to the host and begins to write them."""
    part = root / f".part-{step}"

    def make_room():
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)

    distributed.by_main(make_room)
    arrays = distributed.replicate(_flat(tree))
    finite = finite_leaves(arrays)
    handler = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_SMALLEST_SHARE)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, handler))
    # Directories that are made in the background leave threads that wait for ever where they cannot be made.
    checkpointer = ocp.AsyncCheckpointer(
        ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    with _removed_on_error(part), _one_line(part), contextlib.ExitStack() as undo:
        undo.callback(checkpointer.close)
        checkpointer.save(part / "state", args=ocp.args.PyTreeSave(arrays))
        undo.pop_all()
    return _Begun(checkpointer, part, step, finite)


def _finish(
    begun: _Begun, keep: int, fingerprint: str = "", after: Callable[[], object] = lambda: None
) -> pathlib.Path:
    """Waits until all is written, then lets the checkpoint count."""
    part, step = begun.part, begun.step
    with _removed_on_error(part):
        with _one_line(part), begun.checkpointer:
            begun.checkpointer.wait_until_finished()
        after()
        check_leaves(f"step {step}", begun.finite[0], distributed.fetch(begun.finite[1]))
    root, final = part.parent, part.parent / str(step)

    def give_name():
        files = {str(p.relative_to(part)): [p.stat().st_size, _checksum(p)] for p in _files(part)}
        (part / _MANIFEST).write_text(json.dumps({"step": step, "fingerprint": fingerprint, "files": files}))
        shutil.rmtree(final, ignore_errors=True)
        os.replace(part, final)
        for old in _steps(root)[:-keep]:
            shutil.rmtree(root / str(old), ignore_errors=True)

    distributed.barrier(f"checkpoint {step} written")
    distributed.by_main(give_name)
    return final


@contextlib.contextmanager
def _removed_on_error(part: pathlib.Path) -> Iterator[None]:
    """Leaves nothing of a checkpoint that does not become one; does not communicate."""
    try:
        yield
    except Exception:
        if distributed.is_main():
            shutil.rmtree(part, ignore_errors=True)
        raise


@contextlib.contextmanager
def _one_line(part: pathlib.Path) -> Iterator[None]:
    """Makes one line of what Orbax and TensorStore say when they cannot write, with all their settings."""
    try:
        yield
    except jax.errors.JaxRuntimeError:
        raise  # Of the hosts' communication: see `tiltjax.train.distributed.ends_with_the_others`.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].partition(" [")[0]
        raise OSError(f"{part}: checkpoint cannot be written: {reason}") from error


def _latest(root: pathlib.Path) -> int:
    for part in sorted(root.glob(".part-*")):
        _LOG.warning("%s: checkpoint was cut off while it was written; ignored", part)
    for step in reversed(_steps(root)):
        fault = _fault(root / str(step))
        if fault is None:
            return step
        _LOG.warning("%s: checkpoint is not whole (%s); ignored", root / str(step), fault)
    return -1


def _flat(tree: PyTree) -> dict:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path).replace("/", "|"): _as_array(leaf) for path, leaf in leaves}


def _as_array(leaf):
    return jax.numpy.asarray(leaf) if isinstance(leaf, np.ndarray | int | float) else leaf


def _steps(root: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in root.glob("*") if p.name.isdigit())


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != _MANIFEST)


def _checksum(path: pathlib.Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _manifest(folder: pathlib.Path) -> dict[str, Any]:
    return json.loads((folder / _MANIFEST).read_text())


def _fault(folder: pathlib.Path) -> str | None:
    try:
        files = _manifest(folder)["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "its manifest is missing or unreadable"
    for name, (size, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _checksum(path) != checksum:
            return f"{name} is damaged"
    return None
