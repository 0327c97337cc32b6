"""GGUF files (llama.cpp) as Hugging Face configurations and tensors; needs the extra ``gguf``."""

import dataclasses
import os
import re
from typing import Any

import numpy as np

from tiltjax.files import gguf_parts
from tiltjax.models.families import BASE_PREFIX, FAMILY_TABLES
from tiltjax.models.rope import scaling_from_factors, scaling_to_hf

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
_ROPE_FACTORS = "rope_freqs.weight"
"""How files carry the scaling of Llama 3: what every frequency is divided by."""


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

    @classmethod
    def of(cls, tensor: Any, rotary_heads: int = 0) -> "QuantisedTensor":
        """From a tensor of a reader of the package gguf."""
        shape = tuple(int(size) for size in reversed(tensor.shape))
        return cls(raw=tensor.data, kind=tensor.tensor_type, shape=shape, rotary_heads=rotary_heads)

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
      path: A ``.gguf`` file of the architecture llama (which Mistral models also bear) or qwen2, or any part of a split
        one.

    Returns:
      ``(config, tensors)``: what the ``config.json`` would say, token ids included (the ends of a turn and of a message
      among those of a text), and the tensors under their Hugging Face names, dequantised when read.

    Raises:
      ImportError: If the package gguf is not installed.
      FileNotFoundError: If there is no such file, or a part is missing.
      ValueError: If the file is broken, or its architecture or a setting is not supported; the message names it.
    """
    parts = gguf_parts(path)
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError(f"{path}: reading GGUF needs the package gguf: pip install 'tiltjax[gguf]'") from None
    readers = []
    for part in parts:
        try:
            readers.append(GGUFReader(os.fspath(part)))
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise ValueError(f"{part}: truncated or not a GGUF file ({error})") from error
    fields, found = readers[0].fields, {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    try:
        if "split.count" in fields and (count := fields["split.count"].contents()) != len(parts):
            raise ValueError(f"a part of {count}, and its name does not end in -00001-of-{count:05d}.gguf")
        factors = found.pop(_ROPE_FACTORS, None)
        config = _config(fields, found, None if factors is None else QuantisedTensor.of(factors)[:])
        return config, dict(_tensor(tensor, config) for tensor in found.values())
    except ValueError as error:
        raise ValueError(f"{parts[0]}: {error}") from error


def _config(fields: dict[str, Any], tensors: dict[str, Any], factors: np.ndarray | None) -> dict[str, Any]:
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
        "vocab_size": int(embedding.shape[-1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": family == "llama" and "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
    }
    config["rope_scaling"] = _scaling(get(f"{family}.rope.scaling.type", "none"), get, family)
    if factors is not None:
        if config["rope_scaling"] is not None or len(factors) != head_dim // 2:
            raise ValueError(f"{_ROPE_FACTORS} needs {head_dim // 2} factors and no other scaling, has {len(factors)}")
        config["rope_scaling"] = scaling_to_hf(scaling_from_factors(factors, config["rope_theta"]))
    tokens = {key: fields.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot", "eom", "padding")}
    ids = {key: None if token is None else token.contents() for key, token in tokens.items()}
    ends = list(dict.fromkeys(ids[key] for key in ("eos", "eot", "eom") if ids[key] is not None))
    config["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    return config | {"bos_token_id": ids["bos"], "pad_token_id": ids["padding"]}


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
    return f"{prefix}{stored}.{name[3]}", QuantisedTensor.of(tensor, rotary_heads=heads.get(module, 0))
