"""Orbax checkpoints that are either whole or ignored."""

import json
import logging
import os
import pathlib
import shutil
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from tiltjax.types import PyTree

__all__ = ["latest", "restore", "save"]

_MANIFEST = "manifest.json"
_LOG = logging.getLogger(__name__)


def save(directory: str | os.PathLike, step: int, tree: PyTree, *, keep: int = 2) -> pathlib.Path:
    """Writes a checkpoint, and takes it into account only when it is whole.

    Arrays go into a temporary folder through Orbax; a manifest with the size and checksum of every file is added, and
    the folder gets its name ``<directory>/<step>`` by one rename.

    Args:
      directory: Of all checkpoints of a run.
      step: Names the checkpoint.
      tree: Pytree of arrays, sharded or not.
      keep: How many of the newest checkpoints stay.

    Returns:
      The folder of this checkpoint.
    """
    root = pathlib.Path(directory).absolute()
    part, final = root / f".part-{step}", root / str(step)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(part / "state", _flat(tree))
    files = {str(p.relative_to(part)): [p.stat().st_size, _checksum(p)] for p in _files(part)}
    (part / _MANIFEST).write_text(json.dumps({"step": step, "files": files}))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(part, final)
    for old in _steps(root)[:-keep]:
        shutil.rmtree(root / str(old), ignore_errors=True)
    return final


def latest(directory: str | os.PathLike) -> int | None:
    """Step of the newest whole checkpoint; broken ones are passed over with a logged warning.

    Args:
      directory: Of all checkpoints of a run; need not exist.

    Returns:
      The step, or None where there is no whole checkpoint.
    """
    root = pathlib.Path(directory).absolute()
    for part in sorted(root.glob(".part-*")):
        _LOG.warning("%s: checkpoint was cut off while it was written; ignored", part)
    for step in reversed(_steps(root)):
        fault = _fault(root / str(step))
        if fault is None:
            return step
        _LOG.warning("%s: checkpoint is not whole (%s); ignored", root / str(step), fault)
    return None


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
    wanted = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for k, v in _flat(like).items()}
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder).item_metadata.tree
        for name, leaf in wanted.items():
            found = tuple(saved[name].shape) if name in saved else None
            if found != leaf.shape:
                raise ValueError(f"{folder}: {name} should have shape {leaf.shape}, the checkpoint has {found}")
        values = checkpointer.restore(folder, wanted)
    return jax.tree.unflatten(jax.tree.structure(like), [values[name] for name in wanted])


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


def _fault(folder: pathlib.Path) -> str | None:
    try:
        files = json.loads((folder / _MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "its manifest is missing or unreadable"
    for name, (size, checksum) in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size or _checksum(path) != checksum:
            return f"{name} is damaged"
    return None
