"""Where every parameter of a `Transformer` lies in a Hugging Face checkpoint: one table, read in both directions."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from tiltjax.models.config import TransformerConfig

__all__ = ["BASE_PREFIX", "FAMILY_TABLES", "Stored", "TensorSource", "locate", "parameter_path"]


@runtime_checkable
class TensorSource(Protocol):
    """A tensor on disk: a shape, and slices that are read when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    def __getitem__(self, index: Any, /) -> np.ndarray:
        """Reads a slice, one `slice` of step 1 per axis."""


@dataclasses.dataclass(frozen=True)
class Stored:
    """One parameter of one layer as it stands in a checkpoint.

    Attributes:
      name: Of the tensor, with ``{layer}`` where the parameter belongs to a block.
      transposed: Whether the tensor is ``[out, in]``; the parameter always is ``[in, out]``.
      part: Which of the three parts (0 query, 1 key, 2 value) of a fused tensor, None where it has its own.
      group: Output features that stand together before the next part begins, in a fused tensor.
    """

    name: str
    transposed: bool = False
    part: int | None = None
    group: int = 0

    def shape(self, parameter: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the tensor on disk, given that of the parameter of one layer."""
        whole = (*parameter[:-1], parameter[-1] * (1 if self.part is None else 3))
        return whole[::-1] if self.transposed else whole

    def read(self, tensor: TensorSource, index: tuple[slice, ...], out: np.ndarray) -> None:
        """Copies the slice ``index`` of the parameter into ``out``, touching no other part of the tensor."""
        for stored, local in self._pieces(index[-1]):
            where = (*index[:-1], stored)
            piece = tensor[where[::-1] if self.transposed else where]
            with np.errstate(over="ignore"):  # What overflows is infinite, and refused by name.
                out[..., local] = piece.T if self.transposed else piece

    def write(self, parameter: np.ndarray, tensor: np.ndarray) -> None:
        """Copies the parameter of one layer to its place in ``tensor``."""
        view = tensor.T if self.transposed else tensor
        for stored, local in self._pieces(slice(0, parameter.shape[-1])):
            with np.errstate(over="ignore"):  # As in `read`.
                view[..., stored] = parameter[..., local]

    def _pieces(self, out: slice) -> Iterator[tuple[slice, slice]]:
        """Contiguous runs of output features: where each stands in the tensor, and in the wanted slice."""
        if self.part is None:
            yield out, slice(None)
            return
        for start in range(out.start // self.group * self.group, out.stop, self.group):
            lo, hi = max(start, out.start), min(start + self.group, out.stop)
            shift = 2 * start + self.part * self.group
            yield slice(lo + shift, hi + shift), slice(lo - out.start, hi - out.start)


BASE_PREFIX = {
    "llama": "model.",
    "mistral": "model.",
    "qwen2": "model.",
    "qwen3": "model.",
    "gpt_neox": "gpt_neox.",
    "gpt2": "transformer.",
}
"""What stands before every name but the head's; checkpoints of the bare base model leave it out."""

_LLAMA = {
    "embedding": "embed_tokens",
    "norm": "norm",
    "head": "lm_head",
    "blocks.attention_norm": "layers.{layer}.input_layernorm",
    "blocks.query": "layers.{layer}.self_attn.q_proj",
    "blocks.key": "layers.{layer}.self_attn.k_proj",
    "blocks.value": "layers.{layer}.self_attn.v_proj",
    "blocks.query_norm": "layers.{layer}.self_attn.q_norm",
    "blocks.key_norm": "layers.{layer}.self_attn.k_norm",
    "blocks.out": "layers.{layer}.self_attn.o_proj",
    "blocks.mlp_norm": "layers.{layer}.post_attention_layernorm",
    "blocks.gate": "layers.{layer}.mlp.gate_proj",
    "blocks.up": "layers.{layer}.mlp.up_proj",
    "blocks.down": "layers.{layer}.mlp.down_proj",
}

FAMILY_TABLES: Mapping[str, Mapping[str, str]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gpt_neox": {
        "embedding": "embed_in",
        "norm": "final_layer_norm",
        "head": "embed_out",
        "blocks.attention_norm": "layers.{layer}.input_layernorm",
        "blocks.query": "layers.{layer}.attention.query_key_value",
        "blocks.key": "layers.{layer}.attention.query_key_value",
        "blocks.value": "layers.{layer}.attention.query_key_value",
        "blocks.out": "layers.{layer}.attention.dense",
        "blocks.mlp_norm": "layers.{layer}.post_attention_layernorm",
        "blocks.up": "layers.{layer}.mlp.dense_h_to_4h",
        "blocks.down": "layers.{layer}.mlp.dense_4h_to_h",
    },
    "gpt2": {
        "embedding": "wte",
        "position_embedding": "wpe",
        "norm": "ln_f",
        "head": "lm_head",
        "blocks.attention_norm": "h.{layer}.ln_1",
        "blocks.query": "h.{layer}.attn.c_attn",
        "blocks.key": "h.{layer}.attn.c_attn",
        "blocks.value": "h.{layer}.attn.c_attn",
        "blocks.out": "h.{layer}.attn.c_proj",
        "blocks.mlp_norm": "h.{layer}.ln_2",
        "blocks.up": "h.{layer}.mlp.c_fc",
        "blocks.down": "h.{layer}.mlp.c_proj",
    },
}
"""Module of the `Transformer` to module of the checkpoint; three entries of one name are parts of a fused tensor."""

_PARTS = ("blocks.query", "blocks.key", "blocks.value")


def locate(config: TransformerConfig, path: str) -> Stored:
    """Where the parameter ``path`` of a model with this configuration is stored.

    Args:
      config: Of the model.
      path: As `parameter_path` spells it.

    Returns:
      Its name and layout.

    Raises:
      ValueError: If a checkpoint of the family has no place for it.

    Example:
      >>> locate(TransformerConfig(), "blocks.query.kernel").name
      'model.layers.{layer}.self_attn.q_proj.weight'
    """
    table = FAMILY_TABLES[config.family]
    module, _, kind = path.rpartition(".")
    if path in table:
        module, kind = path, "weight"
    if module not in table or kind not in ("kernel", "bias", "scale", "weight"):
        raise ValueError(f"a {config.family} checkpoint has no tensor for the parameter {path}")
    prefix = "" if path == "head" else BASE_PREFIX[config.family]
    fused = module in _PARTS and len({table[part] for part in _PARTS}) == 1
    # GPT-NeoX repeats (query, key, value) for every head, GPT-2 has all queries, all keys, all values.
    group = config.head_dim if config.family == "gpt_neox" else config.num_heads * config.head_dim
    return Stored(
        name=f"{prefix}{table[module]}.{'bias' if kind == 'bias' else 'weight'}",
        transposed=kind == "kernel" and config.family != "gpt2",
        part=_PARTS.index(module) if fused else None,
        group=group if fused else 0,
    )


def parameter_path(path: tuple[Any, ...]) -> str:
    """Spells a path of `jax.tree_util` into a `Transformer`, such as ``blocks.query.kernel``.

    Args:
      path: From `jax.tree_util.tree_flatten_with_path`.

    Returns:
      The attribute names, joined by dots.
    """
    return ".".join(key.name for key in path if key.name != "value" or key is not path[-1])
