"""A model on disk, whichever way it is stored: its configuration, its tensors, the special ids it names."""

import dataclasses
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tiltjax.files import ADAPTER, adapter_base, read_json, resolve
from tiltjax.models.config import TransformerConfig, config_from_hf
from tiltjax.models.families import BASE_PREFIX, FAMILY_TABLES, TensorSource, locate
from tiltjax.models.fields import token_ids
from tiltjax.models.gguf import read_gguf
from tiltjax.models.peft import adapted_tensors
from tiltjax.models.tensor_files import open_tensors

__all__ = ["ModelFiles", "open_model"]

_LOG = logging.getLogger(__name__)

_ROWS = 4096
"""Of a vocabulary, compared at a time."""


@dataclasses.dataclass(frozen=True)
class ModelFiles:
    """A model of which nothing but headers has been read.

    Attributes:
      where: Its directory or GGUF file, for messages.
      directories: Where its other files lie, the first that has one counts: of an adapter, then of its base model.
      config: Its architecture.
      token_ids: ``bos_token_id``, ``eos_token_id`` (an integer or a list) and ``pad_token_id`` as its files give them.
      dtype: Of its parameters, as its configuration declares it, or None.
      tensors: By their Hugging Face names.
    """

    where: Path
    directories: tuple[Path, ...]
    config: TransformerConfig
    token_ids: Mapping[str, Any]
    dtype: str | None
    tensors: Mapping[str, TensorSource]


def open_model(path: str | os.PathLike, *, revision: str | None = None) -> ModelFiles:
    """Reads the headers of a model, and refuses what cannot be one before anything is built.

    Args:
      path: A Hugging Face directory (``config.json`` and safetensors, or an adapter of PEFT and its base model), a
        ``.gguf`` file (any part of a split one), or a hub id ``owner/name``.
      revision: Branch, tag or commit of a hub id.

    Returns:
      The model's files.

    Raises:
      FileNotFoundError: If the directory, its ``config.json``, its weights or its base model are missing.
      ValueError: If the architecture is not supported, a field is of another type, or layers are missing.
      ImportError: If a GGUF file is given and the package gguf is not installed.
    """
    where = resolve(path, revision=revision)
    if where.suffix == ".gguf":
        hf, tensors = read_gguf(where)
        return _checked(where, where, (), hf, tensors)
    if (base := adapter_base(where)) is not None:
        return _adapted(where, *base)
    source = where / "config.json"
    if not source.is_file() and (files := sorted(file.name for file in where.glob("*.gguf"))):
        raise FileNotFoundError(f"{source}: no such file; the directory holds GGUF files: name one, such as {files[0]}")
    return _checked(source, where, (where,), read_json(source), open_tensors(where))


def _adapted(where: Path, name: str, revision: str | None) -> ModelFiles:
    try:
        found = resolve(name, revision=revision)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{where}: holds an adapter of the base model {name!r}, which cannot be read ({error}); "
            f"give its path as base_model_name_or_path in {ADAPTER}"
        ) from None
    if found.is_dir() and adapter_base(found) is not None:
        raise ValueError(f"{where / ADAPTER}: base_model_name_or_path must not be an adapter itself, got {name!r}")
    base = open_model(found)
    changed = adapted_tensors(where, base.config.family, base.tensors)
    _LOG.info("%s: %d tensors of %s are adapted", where, len(changed), name)
    return dataclasses.replace(
        base, where=where, directories=(where, *base.directories), tensors={**base.tensors, **changed}
    )


def _checked(
    source: Path, where: Path, directories: tuple[Path, ...], hf: Mapping[str, Any], tensors: Mapping[str, TensorSource]
) -> ModelFiles:
    try:
        config, ids = config_from_hf(hf), token_ids(hf)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    _check_layers(source, config, tensors)
    if config.tied and _other_head(config, tensors):
        _LOG.warning("%s: says tie_word_embeddings, but the head has values of its own, which are used", source)
        config = dataclasses.replace(config, tied=False)
    dtype = hf.get("dtype") or hf.get("torch_dtype")
    return ModelFiles(where, directories, config, ids, dtype if isinstance(dtype, str) else None, tensors)


def _check_layers(source: Path, config: TransformerConfig, tensors: Mapping[str, TensorSource]) -> None:
    """A configuration may ask for any number of layers; nothing is made for those that have no tensors."""
    stem = FAMILY_TABLES[config.family]["blocks.attention_norm"].partition("{layer}")[0]
    pattern = re.compile(rf"(?:{re.escape(BASE_PREFIX[config.family])})?{re.escape(stem)}(\d+)\.")
    found = {int(match[1]) for name in tensors if (match := pattern.match(name))}
    missing = next(layer for layer in range(len(found) + 1) if layer not in found)
    if missing < config.num_layers:
        name = "n_layer" if config.family == "gpt2" else "num_hidden_layers"
        raise ValueError(f"{source}: {name} is {config.num_layers}, but the tensors of layer {missing} are missing")


def _other_head(config: TransformerConfig, tensors: Mapping[str, TensorSource]) -> bool:
    """Whether there is a head, and it differs from the embedding."""
    head, embedding = locate(config, "head").name, locate(config, "embedding").name
    if embedding not in tensors:
        embedding = embedding.removeprefix(BASE_PREFIX[config.family])
    if head not in tensors or embedding not in tensors:
        return False
    one, other = tensors[head], tensors[embedding]
    if tuple(one.shape) != tuple(other.shape):
        return True
    size = one.shape[0]
    rows = (slice(start, min(start + _ROWS, size)) for start in range(0, size, _ROWS))
    return not all(np.array_equal(one[part, :], other[part, :]) for part in rows)
