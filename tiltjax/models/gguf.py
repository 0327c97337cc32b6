"""GGUF files (llama.cpp) as Hugging Face configurations and tensors; needs the extra ``gguf``."""

import dataclasses
import os
import re
from typing import Any

import numpy as np

from tiltjax.models.families import BASE_PREFIX, FAMILY_TABLES

__all__ = ["QuantisedTensor", "read_gguf"]

_BLOCK = {
    "attn_norm": "attention_norm",
    "attn_q": "query",
    "attn_k": "key",
    "attn_v": "value",
    "attn_output": "out",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
_WHOLE = {"token_embd": "embedding", "output_norm": "norm", "output": "head"}
_ARCHITECTURES = ("llama", "qwen2")


@dataclasses.dataclass(frozen=True)
class QuantisedTensor:
    """A tensor of a GGUF file; a slice of rows is read and dequantised when it is asked for.

    Attributes:
      raw: The memory-mapped quantised rows.
      kind: The quantisation, as the package gguf names it.
      shape: As in the Hugging Face checkpoint, ``[out, in]`` for a matrix.
      rotary_heads: Heads whose rotary pairs llama.cpp keeps side by side, to be put back into two halves; 0 for none.
    """

    raw: np.ndarray
    kind: Any
    shape: tuple[int, ...]
    rotary_heads: int = 0

    def __getitem__(self, index: Any) -> np.ndarray:
        """Dequantises a slice to float32; ``[:]`` is the whole tensor."""
        from gguf.quants import dequantize

        index = index if isinstance(index, tuple) else (index,)
        if self.rotary_heads:
            whole = dequantize(self.raw, self.kind).reshape(self.rotary_heads, -1, 2, *self.shape[1:])
            return whole.swapaxes(1, 2).reshape(self.shape)[index].astype(np.float32, copy=False)
        rows = dequantize(self.raw[index[0]], self.kind).astype(np.float32, copy=False)
        return rows[(slice(None), *index[1:])]


def read_gguf(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, QuantisedTensor]]:
    """Reads the header of a GGUF file.

    Args:
      path: A ``.gguf`` file of the architecture llama (which Mistral models also bear) or qwen2.

    Returns:
      ``(config, tensors)``: what the ``config.json`` would say, token ids included, and the tensors under their
      Hugging Face names, dequantised when read.

    Raises:
      ImportError: If the package gguf is not installed.
      FileNotFoundError: If there is no such file.
      ValueError: If the file is broken, or its architecture or a setting is not supported; the message names it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such GGUF file")
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError(f"{path}: reading GGUF needs the package gguf: pip install 'tiltjax[gguf]'") from None
    try:
        reader = GGUFReader(os.fspath(path))
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path}: truncated or not a GGUF file ({error})") from error
    try:
        config = _config(reader.fields, {tensor.name: tensor for tensor in reader.tensors})
        return config, dict(_tensor(tensor, config) for tensor in reader.tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _config(fields: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    def get(name, default=None):
        if name in fields:
            return fields[name].contents()
        if default is None:
            raise ValueError(f"the field {name} is missing")
        return default

    family = get("general.architecture")
    if family not in _ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(_ARCHITECTURES)}; got {family!r}")
    for name in ("expert_count", "attention.sliding_window"):
        if get(f"{family}.{name}", 0):
            raise ValueError(f"{family}.{name}={get(f'{family}.{name}')} is not supported")
    width, heads = get(f"{family}.embedding_length"), get(f"{family}.attention.head_count")
    head_dim = get(f"{family}.attention.key_length", width // heads)
    if get(f"{family}.rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"{family}.rope.dimension_count must be the width of a head, {head_dim}")
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ValueError("the tensor token_embd.weight is missing")
    config = {
        "model_type": family,
        "hidden_size": width,
        "num_hidden_layers": get(f"{family}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get(f"{family}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "intermediate_size": get(f"{family}.feed_forward_length"),
        "max_position_embeddings": get(f"{family}.context_length"),
        # The file holds a float32; the checkpoint it was made from had the short decimal.
        "rms_norm_eps": float(str(np.float32(get(f"{family}.attention.layer_norm_rms_epsilon")))),
        "rope_theta": get(f"{family}.rope.freq_base", 10000.0),
        "rope_scaling": _scaling(get(f"{family}.rope.scaling.type", "none"), get, family),
        "vocab_size": int(embedding.shape[-1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": family == "llama" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    for key, name in (("bos", "bos"), ("eos", "eos"), ("padding", "pad")):
        token = f"tokenizer.ggml.{key}_token_id"
        config[f"{name}_token_id"] = get(token) if token in fields else None
    return config


def _scaling(kind: str, get: Any, family: str) -> dict[str, Any] | None:
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": get(f"{family}.rope.scaling.factor")}
    raise ValueError(f"rope.scaling.type must be none or linear; got {kind!r}")


def _tensor(tensor: Any, config: dict[str, Any]) -> tuple[str, QuantisedTensor]:
    """A tensor under the name that `tiltjax.models.families` gives it."""
    name = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", tensor.name)
    module = name and (_WHOLE.get(name[2]) if name[1] is None else _BLOCK.get(name[2]))
    if name is None or module is None:
        raise ValueError(f"the tensor {tensor.name} is not supported")
    family = config["model_type"]
    table = FAMILY_TABLES[family]
    stored = table[module] if name[1] is None else table[f"blocks.{module}"].format(layer=name[1])
    prefix = "" if module == "head" else BASE_PREFIX[family]
    heads = {"query": config["num_attention_heads"], "key": config["num_key_value_heads"]} if family == "llama" else {}
    shape = tuple(int(size) for size in reversed(tensor.shape))
    values = QuantisedTensor(raw=tensor.data, kind=tensor.tensor_type, shape=shape, rotary_heads=heads.get(module, 0))
    return f"{prefix}{stored}.{name[3]}", values
