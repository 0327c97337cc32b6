"""Safetensors files: tensors that are read slice by slice, and their writing."""

import dataclasses
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tiltjax.files import read_json
from tiltjax.models.families import TensorSource

__all__ = ["BUFFER", "DTYPES", "FileSlice", "open_file", "open_tensors", "write_tensors"]

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Types of parameters: their names in safetensors, and in NumPy with ml_dtypes."""

BUFFER = re.compile(r"(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias)$")
"""Names of constants that old checkpoints carry beside their parameters."""


@dataclasses.dataclass(frozen=True)
class FileSlice:
    """A tensor of an open safetensors file; only what is asked for is read.

    Attributes:
      handle: The open file.
      name: Of the tensor.
      shape: Its sizes.
    """

    handle: Any
    name: str
    shape: tuple[int, ...]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads one slice per axis."""
        return self.handle.get_slice(self.name)[index]


def open_tensors(directory: Path) -> dict[str, TensorSource]:
    """Every tensor of a Hugging Face directory, by name, none of them read yet.

    Args:
      directory: Has ``model.safetensors``, or several such files and ``model.safetensors.index.json``.

    Returns:
      Tensors that are read slice by slice.

    Raises:
      FileNotFoundError: If there are no such files, or one that the index names is missing.
      ValueError: If a file is truncated, or holds a tensor of another type than `DTYPES`.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return dict(open_file(single))
    if not index.is_file():
        pickled = [p.name for p in directory.glob("*.bin")]
        reason = f"only pickled weights ({pickled[0]}), which are not read" if pickled else "no model.safetensors"
        raise FileNotFoundError(f"{directory}: {reason}; save it with save_pretrained(..., safe_serialization=True)")
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index}: weight_map must give the name of a file for every tensor")
    tensors: dict[str, TensorSource] = {}
    for file in sorted(set(places.values())):
        if Path(file).name != file or not (directory / file).is_file():
            raise FileNotFoundError(f"{index}: names the file {file}, which is not in the directory")
        tensors |= {name: tensor for name, tensor in open_file(directory / file) if places.get(name) == file}
    return tensors


def open_file(path: Path) -> Iterator[tuple[str, TensorSource]]:
    """The tensors of one file; as `open_tensors`."""
    try:
        handle = safe_open(path, "np")
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or not a safetensors file ({error})") from None
    for name in handle.keys():  # noqa: SIM118
        tensor = handle.get_slice(name)
        if tensor.get_dtype() not in DTYPES and not BUFFER.search(name):
            raise ValueError(f"{path}: the tensor {name} is {tensor.get_dtype()}; supported: {', '.join(DTYPES)}")
        yield name, FileSlice(handle, name, tuple(tensor.get_shape()))


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, with the permissions that a new file has (safetensors leaves it to its owner).

    Args:
      path: Where to.
      tensors: By name.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)
