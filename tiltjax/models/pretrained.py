"""Hugging Face checkpoints in and out: safetensors straight to their final sharding, and back to a directory."""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from safetensors.numpy import save_file

from tiltjax.models import lora
from tiltjax.models.config import RUN_TIME, TransformerConfig, config_from_hf, config_to_hf
from tiltjax.models.families import BASE_PREFIX, Stored, TensorSource, locate, parameter_path
from tiltjax.models.gguf import read_gguf
from tiltjax.models.tensor_files import BUFFER, DTYPES, open_tensors, read_json, write_json
from tiltjax.models.transformer import Transformer
from tiltjax.ops.checks import check_at_least, check_choice
from tiltjax.types import Dtype

__all__ = ["fingerprint", "load", "resolve", "save"]

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def load(
    path: str | os.PathLike,
    *,
    dtype: Dtype = "float32",
    compute_dtype: str | None = None,
    remat: str = "full",
    attention: str = "auto",
    sharding: Callable[[str, tuple[int, ...]], Sharding] | None = None,
) -> Transformer:
    """Reads a pretrained model; every device receives only its own slices, and no host holds the model twice.

    Args:
      path: A Hugging Face directory (``config.json`` and safetensors), a ``.gguf`` file, or a hub id ``owner/name``.
      dtype: Of the parameters.
      compute_dtype: Operand type of the matrix products; None means ``dtype``.
      remat: See `tiltjax.models.config.TransformerConfig`.
      attention: Likewise.
      sharding: ``(parameter path, shape) -> jax.sharding.Sharding``, with paths such as ``blocks.query.kernel``; None
        puts every array on the default device.

    Returns:
      The model.

    Raises:
      FileNotFoundError: If the directory, its ``config.json`` or its weights are missing.
      ValueError: If the architecture is not supported, or a tensor is missing, truncated or of another shape.
      ImportError: If a GGUF file is given and the package gguf is not installed.
    """
    dtype = jnp.dtype(dtype)
    check_choice("dtype", dtype.name, set(DTYPES.values()))
    check_choice("compute_dtype", compute_dtype or dtype.name, set(DTYPES.values()))
    where = resolve(path)
    is_gguf = where.suffix == ".gguf"
    hf, tensors = read_gguf(where) if is_gguf else (read_json(where / "config.json"), open_tensors(where))
    try:
        config = config_from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{where if is_gguf else where / 'config.json'}: {error}") from None
    how: dict[str, Any] = {"compute_dtype": compute_dtype or dtype.name, "remat": remat, "attention": attention}
    config = dataclasses.replace(config, **how)
    reader = _Reader(where, config, tensors, set())
    shapes, structure = jax.tree_util.tree_flatten_with_path(
        jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    )
    leaves = [reader.array(parameter_path(key), leaf.shape, dtype, sharding) for key, leaf in shapes]
    unused = [name for name in tensors if name not in reader.used and not BUFFER.search(name)]
    unused = [name for name in unused if not (config.tied and name == locate(config, "head").name)]
    if unused:
        logging.warning("%s: %d tensors are not used: %s", where, len(unused), ", ".join(sorted(unused)[:5]))
    return jax.tree_util.tree_unflatten(structure, leaves)


def save(
    model: Transformer,
    directory: str | os.PathLike,
    *,
    source: str | os.PathLike | None = None,
    tokenizer: Any = None,
    dtype: Dtype | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a directory that transformers (and `load`) reads; it appears whole or not at all.

    Adapters are merged into their kernels. With several hosts, all of them call this and the first one writes.

    Args:
      model: The model.
      directory: Where to; must not exist yet, or be empty.
      source: What the model was loaded from: its token ids, chat template and tokenizer files are carried over (of a
        GGUF file the token ids only).
      tokenizer: An object with ``save_pretrained``, written instead of the tokenizer files of ``source``.
      dtype: Of the tensors on disk; None keeps that of each parameter.
      overwrite: Whether an existing model directory is replaced.
      max_shard_bytes: A larger model is split over several files with an index.

    Raises:
      FileExistsError: If ``directory`` holds something already (and, with ``overwrite``, something other than a model).
      ValueError: If the family of the model cannot express its configuration.
    """
    check_at_least("max_shard_bytes", max_shard_bytes, 1)
    target, writes = Path(directory), jax.process_index() == 0
    if writes and target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not overwrite:
            raise FileExistsError(f"{target}: exists already; pass overwrite=True to replace it")
        if not (target / "config.json").is_file():
            raise FileExistsError(f"{target}: is not a model directory and is not replaced")
    merged: Any = lora.merge(model)
    hf = config_to_hf(model.config) | _token_ids(source, tokenizer)
    hf["dtype"] = jnp.dtype(model.embedding.dtype if dtype is None else dtype).name
    plan = _plan(merged)
    shards = _shards(plan, dtype, max_shard_bytes)
    with contextlib.ExitStack() as stack:
        if writes:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(
                stack.enter_context(tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}."))
            )
            inside = temporary / "new"
            inside.mkdir()
            write_json(inside / "config.json", hf)
            _write_tokenizer(inside, source, tokenizer)
        for file, names in shards.items():
            tensors = {name: _gather(plan[name], dtype) for name in names}
            if writes:
                save_file(tensors, inside / file, metadata={"format": "pt"})
        if writes:
            if len(shards) > 1:
                total = sum(_size(parts, dtype) for parts in plan.values())
                places = {name: file for file, names in shards.items() for name in names}
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
                write_json(inside / "model.safetensors.index.json", index)
            if target.exists() and overwrite:
                os.replace(target, temporary / "old")
            os.replace(inside, target)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"tiltjax.save {target}")


def fingerprint(model: Transformer) -> str:
    r"""Names the function that a model computes: a hash of its architecture and of every parameter.

    Each row of an array is summed where it lies, so that neither sharding nor the number of hosts matters, and the sums
    are hashed. Parameters enter as float32, adapters are merged first, the compute type is left out.

    .. math:: h = \sum_i w_i\, (b_i \oplus \lfloor b_i / 2^{15} \rfloor) \bmod 2^{32}, \quad w_i \text{ odd}, \quad
       b_i = \mathrm{bits}(\theta_i)

    Args:
      model: The model.

    Returns:
      16 hexadecimal digits, to be kept with what was computed from the model (reference log-probabilities).
    """
    merged: Any = lora.merge(model)
    config = {name: value for name, value in dataclasses.asdict(model.config).items() if name not in RUN_TIME}
    leaves = {parameter_path(key): leaf for key, leaf in jax.tree_util.tree_flatten_with_path(merged)[0]}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path, rows in sorted(_digests(leaves).items()):
        digest.update(json.dumps([path, leaves[path].shape]).encode())
        digest.update(_to_host(rows).astype("<u4").tobytes())
    return digest.hexdigest()[:16]


def resolve(path: str | os.PathLike) -> Path:
    """The local directory or ``.gguf`` file that ``path`` names; a hub id is downloaded (or found in its cache).

    Args:
      path: As for `load`.

    Returns:
      An existing path.

    Raises:
      FileNotFoundError: If there is nothing of that name.
      ValueError: If it is a file of another kind.
    """
    local = Path(path)
    if local.is_dir() or (local.is_file() and local.suffix == ".gguf"):
        return local
    if local.exists():
        raise ValueError(f"{path}: is neither a directory nor a .gguf file")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", os.fspath(path)) or local.suffix == ".gguf":
        raise FileNotFoundError(f"{path}: no such directory or file")
    from huggingface_hub import snapshot_download

    files = ["config.json", "*.safetensors", "*.safetensors.index.json", *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(os.fspath(path), allow_patterns=files, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(f"{path}: no such directory, and the Hugging Face hub answers: {reason}") from error


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Builds parameters from the tensors of one checkpoint, remembering which it used."""

    where: Path
    config: TransformerConfig
    tensors: Mapping[str, TensorSource]
    used: set[str]

    def array(self, path: str, shape: tuple[int, ...], dtype: Any, sharding: Callable | None) -> jax.Array:
        """One parameter, every device's slice read from the file."""
        stored = locate(self.config, path)
        layered = "{layer}" in stored.name
        one = shape[1:] if layered else shape
        sources = [self._source(stored, i, one) for i in range(shape[0] if layered else 1)]
        done: dict[tuple, np.ndarray] = {}

        def read(index: Any) -> np.ndarray:
            ranges = tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))
            if ranges not in done:
                out = np.empty([stop - start for start, stop in ranges], dtype)
                rest = tuple(slice(*r) for r in (ranges[1:] if layered else ranges))
                layers = range(*ranges[0]) if layered else range(1)
                for row, layer in zip(out if layered else [out], layers, strict=True):
                    stored.read(sources[layer], rest, row)
                done[ranges] = out
            return done[ranges]

        if sharding is None:
            return jnp.asarray(read((slice(None),) * len(shape)))
        return jax.make_array_from_callback(shape, sharding(path, shape), read, dtype=dtype)

    def _source(self, stored: Stored, layer: int, parameter: tuple[int, ...]) -> TensorSource:
        full = stored.name.format(layer=layer)
        name = full if full in self.tensors else full.removeprefix(BASE_PREFIX[self.config.family])
        if name not in self.tensors:
            raise ValueError(f"{self.where}: the tensor {full} is missing")
        self.used.add(name)
        found, wanted = tuple(self.tensors[name].shape), stored.shape(parameter)
        if found != wanted:
            raise ValueError(f"{self.where}: the tensor {name} has shape {found}, its configuration says {wanted}")
        return self.tensors[name]


def _token_ids(source: str | os.PathLike | None, tokenizer: Any) -> dict[str, Any]:
    """From the tokenizer, else from the source; null keeps transformers from making up a default."""
    if tokenizer is not None:
        return {name: getattr(tokenizer, name, None) for name in _TOKEN_IDS}
    if source is None:
        return dict.fromkeys(_TOKEN_IDS)
    where = resolve(source)
    hf = read_gguf(where)[0] if where.suffix == ".gguf" else read_json(where / "config.json")
    return {name: hf.get(name) for name in _TOKEN_IDS}


def _write_tokenizer(directory: Path, source: str | os.PathLike | None, tokenizer: Any) -> None:
    where = None if source is None else resolve(source)
    if where is not None and where.is_dir():
        for name in TOKENIZER_FILES if tokenizer is None else ("generation_config.json",):
            if (where / name).is_file():
                shutil.copyfile(where / name, directory / name)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One parameter of one layer, on its way to a tensor; a fused tensor has three."""

    stored: Stored
    leaf: jax.Array
    layer: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape if self.layer is None else self.leaf.shape[1:]

    def fetch(self) -> np.ndarray:
        """Its value on this host."""
        return _to_host(self.leaf if self.layer is None else self.leaf[self.layer])


def _plan(model: Transformer) -> dict[str, list[_Part]]:
    """The parameters that make up every tensor, by its name."""
    plan: dict[str, list[_Part]] = {}
    for key, leaf in jax.tree_util.tree_flatten_with_path(model)[0]:
        stored = locate(model.config, parameter_path(key))
        for layer in range(leaf.shape[0]) if "{layer}" in stored.name else [None]:
            plan.setdefault(stored.name.format(layer=layer), []).append(_Part(stored, leaf, layer))
    return plan


def _size(parts: list[_Part], dtype: Dtype | None) -> int:
    width = jnp.dtype(parts[0].leaf.dtype if dtype is None else dtype).itemsize
    return math.prod(parts[0].stored.shape(parts[0].shape)) * width


def _shards(plan: Mapping[str, list[_Part]], dtype: Dtype | None, limit: int) -> dict[str, list[str]]:
    """Which file holds which tensors."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, parts in plan.items():
        more = _size(parts, dtype)
        if groups[-1] and size + more > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += more
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": names for i, names in enumerate(groups, 1)}


def _gather(parts: list[_Part], dtype: Dtype | None) -> np.ndarray:
    stored, shape = parts[0].stored, parts[0].shape
    tensor = np.empty(stored.shape(shape), jnp.dtype(parts[0].leaf.dtype if dtype is None else dtype))
    for part in parts:
        part.stored.write(part.fetch(), tensor)
    return tensor


def _to_host(value: jax.Array) -> np.ndarray:
    """The whole value on this host, wherever its shards lie."""
    if not value.is_fully_addressable:
        value = multihost_utils.process_allgather(value, tiled=True)
    return np.asarray(value)


@jax.jit
def _digests(leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A 32-bit sum per row; integers wrap, so the order of summation does not matter."""

    def digest(leaf):
        value = leaf.astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(jnp.where(value == 0, 0.0, value), jnp.uint32)
        weight = (jax.lax.iota(jnp.uint32, leaf.shape[-1]) * jnp.uint32(0x9E3779B1)) | jnp.uint32(1)
        weight = weight.reshape((1,) * (leaf.ndim - 1) + weight.shape)
        return jnp.sum((bits ^ (bits >> 15)) * weight, axis=-1, dtype=jnp.uint32)

    return {path: digest(leaf) for path, leaf in leaves.items()}
