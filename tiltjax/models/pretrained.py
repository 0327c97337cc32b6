"""Hugging Face checkpoints in and out: safetensors straight to their final sharding, and back to a directory."""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from tiltjax.files import TOKENIZER_FILES, write_json
from tiltjax.models import lora
from tiltjax.models.config import RUN_TIME, TransformerConfig, config_to_hf
from tiltjax.models.families import BASE_PREFIX, Stored, TensorSource, locate, parameter_path
from tiltjax.models.model_files import ModelFiles, open_model
from tiltjax.models.tensor_files import BUFFER, DTYPES, write_tensors
from tiltjax.models.transformer import Transformer
from tiltjax.ops.checks import check_at_least, check_choice
from tiltjax.types import Dtype

__all__ = ["fingerprint", "load", "save"]

_LOG = logging.getLogger(__name__)


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
      path: A Hugging Face directory (``config.json`` and safetensors, or an adapter of PEFT, which is merged into the
        base model that it names), a ``.gguf`` file (any part of a split one), or a hub id ``owner/name``.
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
      ValueError: If the architecture is not supported, or a tensor is missing, truncated, of another shape or not
        finite; the message names the file and the field or tensor.
      ImportError: If a GGUF file is given and the package gguf is not installed.
    """
    dtype = jnp.dtype(dtype)
    check_choice("dtype", dtype.name, set(DTYPES.values()))
    check_choice("compute_dtype", compute_dtype or dtype.name, set(DTYPES.values()))
    files = open_model(path)
    where, config, tensors = files.where, files.config, files.tensors
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
        _LOG.warning("%s: %d tensors are not used: %s", where, len(unused), ", ".join(sorted(unused)[:5]))
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
      source: What the model was loaded from, such as `load` takes: its token ids (every end id of them),
        generation_config.json, and chat template and tokenizer files are carried over (of a GGUF file the token ids
        only), so that it generates, and stops, as before.
      tokenizer: An object with ``save_pretrained``, written instead of the tokenizer files of ``source``; its token ids
        count where ``source`` has none.
      dtype: Of the tensors on disk; None takes that which the config.json of ``source`` declares, else keeps that of
        each parameter.
      overwrite: Whether an existing model directory is replaced.
      max_shard_bytes: A larger model is split over several files with an index.

    Raises:
      FileExistsError: If ``directory`` holds something already (and, with ``overwrite``, something other than a model).
      ValueError: If the family of the model cannot express its configuration, or a parameter is not finite.
    """
    check_at_least("max_shard_bytes", max_shard_bytes, 1)
    target, writes = Path(directory), jax.process_index() == 0
    if writes and target.exists() and (not target.is_dir() or any(target.iterdir())):
        if not overwrite:
            raise FileExistsError(f"{target}: exists already; pass overwrite=True to replace it")
        if not (target / "config.json").is_file():
            raise FileExistsError(f"{target}: is not a model directory and is not replaced")
    merged: Any = lora.merge(model)
    files = None if source is None else open_model(source)
    if dtype is None and files is not None and files.dtype in DTYPES.values():
        dtype = files.dtype
        _LOG.info("%s: written as %s, as %s is", target, dtype, files.where)
    hf = config_to_hf(model.config) | _token_ids(files, tokenizer)
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
            _write_rest(inside, files, tokenizer)
        for file, names in shards.items():
            tensors = {name: _gather(plan[name], dtype) for name in names}
            if writes:
                write_tensors(inside / file, tensors)
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
                    self._check_finite(stored.name.format(layer=layer), row)
                done[ranges] = out
            return done[ranges]

        if sharding is None:
            return jnp.asarray(read((slice(None),) * len(shape)))
        return jax.make_array_from_callback(shape, sharding(path, shape), read, dtype=dtype)

    def _check_finite(self, name: str, value: np.ndarray) -> None:
        """What a step would spread over the whole model; also what overflows the parameters' type."""
        if not (finite := np.isfinite(value)).all():
            count = f"{value.size - np.count_nonzero(finite)} of the {value.size} values read"
            raise ValueError(f"{self.where}: the tensor {name} is not finite as {value.dtype} ({count})")

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


def _token_ids(source: ModelFiles | None, tokenizer: Any) -> dict[str, Any]:
    """Those of the source, all end ids of them, else the tokenizer's; null keeps transformers from a default."""
    named = {} if source is None else source.token_ids
    ids = {name: named.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: getattr(tokenizer, name, None) if value is None else value for name, value in ids.items()}


def _write_rest(directory: Path, source: ModelFiles | None, tokenizer: Any) -> None:
    """What generation needs, and the tokenizer: the given one, or the source's files."""
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    for name in ("generation_config.json", *(TOKENIZER_FILES if tokenizer is None else ())):
        found = [folder / name for folder in (source.directories if source else ()) if (folder / name).is_file()]
        if found:
            shutil.copyfile(found[0], directory / name)


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
        return _to_host(self.leaf if self.layer is None else _layer(self.leaf, self.layer))


@jax.jit
def _layer(leaf: jax.Array, layer: int | jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)


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
    if not np.isfinite(tensor).all():
        name = parts[0].stored.name.format(layer=parts[0].layer)
        raise ValueError(f"the tensor {name} is not finite as {tensor.dtype}; the model is not written")
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
