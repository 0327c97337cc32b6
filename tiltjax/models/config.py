"""The shape of a decoder-only transformer, and its reading from a Hugging Face ``config.json``."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tiltjax.models.fields import Fields
from tiltjax.models.rope import read_rope, scaling_to_hf
from tiltjax.ops.checks import check_at_least, check_choice

__all__ = ["ATTENTION", "FAMILIES", "REMAT", "RUN_TIME", "TransformerConfig", "config_from_hf", "config_to_hf"]

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt_neox", "gpt2")
"""Architectures, by the names that ``config.json`` gives them under "model_type"."""

REMAT = ("dots", "full", "none")
"""What the backward pass may recompute: "full", each block; "dots", all but its matrix products; "none", nothing."""

ATTENTION = ("auto", "fused", "plain")
"""Which attention may run: "fused" by the device's own kernel, "plain" by jax.numpy, "auto" the better one here."""

RUN_TIME = ("compute_dtype", "remat", "attention")
"""Fields that say how to compute, not what: no part of a checkpoint or of a fingerprint."""


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """One decoder-only transformer; every family is a setting of these fields.

    Attributes:
      family: Hugging Face ``model_type``; decides the names of the tensors on disk, nothing else.
      vocab_size: V.
      features: D, width of the residual stream.
      num_layers: How many blocks.
      num_heads: Query heads.
      num_kv_heads: Key and value heads; divides ``num_heads``.
      head_dim: Width of one head.
      mlp_features: Width of the hidden layer of the MLP.
      norm: "rms" or "layer" (with bias).
      norm_eps: Added to the variance.
      activation: "silu", "gelu" (exact), "gelu_tanh" or "relu".
      gated: Whether the MLP is ``down(act(gate(x)) * up(x))`` rather than ``down(act(up(x)))``.
      qkv_bias: Whether the query, key and value projections have a bias.
      out_bias: Whether the attention output projection has a bias.
      mlp_bias: Whether the MLP projections have a bias.
      qk_norm: Whether queries and keys are RMS-normalised per head.
      rope_theta: Base of the rotary angles; None means learned absolute positions.
      rotary_dim: How many of the ``head_dim`` dimensions rotate.
      rope_scaling: None, ("linear", factor), or ("llama3", factor, low, high, original_max_positions).
      max_positions: Longest sequence that the checkpoint was trained on. Learned positions end there
        (`position_table`); rotary ones are defined beyond it, but were not trained.
      parallel_residual: Whether attention and MLP read the same input (GPT-NeoX).
      sliding_window: How many positions back a query sees (itself included); None means all.
      tied: Whether the vocabulary projection is the embedding.
      compute_dtype: Operand type of the matrix products; sums, norms, softmax and logits are float32 or wider.
      remat: What the backward pass recomputes of each block: "full" (all of it, from its input), "dots" (all but the
        matrix products without a batch dimension, whose results are kept; within the MLP rounded to ``compute_dtype``)
        or "none".
      attention: "auto", fused on GPUs and TPUs where shapes and types permit (`tiltjax.models.fused.choose`); "fused",
        two fused calls merged by log-sum-exp; or "plain", the reference that the others are held to. The same function,
        to rounding.
    """

    family: str = "llama"
    vocab_size: int = 256
    features: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    mlp_features: int = 128
    norm: str = "rms"
    norm_eps: float = 1e-5
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    rope_theta: float | None = 10000.0
    rotary_dim: int = 16
    rope_scaling: tuple[Any, ...] | None = None
    max_positions: int = 2048
    parallel_residual: bool = False
    sliding_window: int | None = None
    tied: bool = True
    compute_dtype: str = "float32"
    remat: str = "full"
    attention: str = "auto"

    def __post_init__(self):
        check_choice("remat", self.remat, REMAT)
        check_choice("attention", self.attention, ATTENTION)
        if self.family not in FAMILIES:
            raise ValueError(f"family must be one of {', '.join(FAMILIES)}; got {self.family!r}")
        for size in ("vocab_size", "features", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_features"):
            check_at_least(size, getattr(self, size), 1)
        if self.rope_theta is not None and (self.rotary_dim % 2 or not 0 < self.rotary_dim <= self.head_dim):
            raise ValueError(
                f"rotary_dim must be even and between 2 and head_dim={self.head_dim}, got {self.rotary_dim}"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide num_heads={self.num_heads}, got {self.num_kv_heads}")

    @property
    def position_table(self) -> int | None:
        """Rows of the table of learned positions, beyond which there is no position; None where positions rotate."""
        return self.max_positions if self.rope_theta is None else None


def config_from_hf(hf: Mapping[str, Any]) -> TransformerConfig:
    """Reads a Hugging Face ``config.json``, in the spelling of transformers 4 or 5.

    Args:
      hf: The parsed file.

    Returns:
      The same architecture as a `TransformerConfig`.

    Raises:
      ValueError: If the ``model_type`` or one of its settings is not supported or missing; the message names it.
    """
    family = hf.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}; got {family!r}")
    for name in ("auto_map", "quantization_config"):
        if hf.get(name):
            raise ValueError(f"{name} is set: neither remote code nor quantised weights are supported")
    read = {"gpt2": _from_gpt2, "gpt_neox": _from_neox}.get(family, _from_llama_like)
    return read(Fields(hf, f"a {family} configuration"), family)


# Where a configuration leaves the length out, transformers means that of its family.
_TRAINED_LENGTH = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768, "gpt_neox": 2048}


def _from_llama_like(hf: Fields, family: str) -> TransformerConfig:
    width, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    head_dim = hf.integer("head_dim", None, null=True) or _head_dim("hidden_size", width, heads)
    theta, scaling, fraction = read_rope(hf, 1.0)
    if fraction != 1:
        raise ValueError(f"partial_rotary_factor={fraction} of a {family} checkpoint is not supported")
    optional: dict[str, Any] = {"default": None, "null": True} if family == "llama" else {}
    kv_heads = hf.integer("num_key_value_heads", **optional) or heads
    if heads % kv_heads:
        raise ValueError(f"num_key_value_heads must divide num_attention_heads={heads}, got {kv_heads}")
    if head_dim % 2:
        raise ValueError(f"head_dim (by default hidden_size / num_attention_heads) must be even, got {head_dim}")
    bias = family in ("llama", "qwen3") and hf.flag("attention_bias", False)
    return TransformerConfig(
        family=family,
        vocab_size=hf.integer("vocab_size"),
        features=width,
        num_layers=hf.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        mlp_features=hf.integer("intermediate_size"),
        norm="rms",
        norm_eps=hf.positive("rms_norm_eps", 1e-6),
        activation=_activation(hf, "hidden_act", "silu"),
        gated=True,
        qkv_bias=family == "qwen2" or bias,
        out_bias=bias,
        mlp_bias=family == "llama" and hf.flag("mlp_bias", False),
        qk_norm=family == "qwen3",
        rope_theta=theta,
        rotary_dim=head_dim,
        rope_scaling=scaling,
        max_positions=hf.integer("max_position_embeddings", _TRAINED_LENGTH[family]),
        sliding_window=_window(hf, family),
        tied=hf.flag("tie_word_embeddings", False),
    )


def _from_neox(hf: Fields, family: str) -> TransformerConfig:
    width, heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    head_dim = _head_dim("hidden_size", width, heads)
    theta, scaling, fraction = read_rope(hf, 0.25)
    rotary_dim = int(head_dim * fraction)
    if rotary_dim % 2 or rotary_dim == 0:
        per_head = f"hidden_size / num_attention_heads = {head_dim}"
        raise ValueError(f"rotary_pct must leave an even part of a head, {per_head}, got {fraction}")
    bias = hf.flag("attention_bias", True)
    return TransformerConfig(
        family=family,
        vocab_size=hf.integer("vocab_size"),
        features=width,
        num_layers=hf.integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=head_dim,
        mlp_features=hf.integer("intermediate_size"),
        norm="layer",
        norm_eps=hf.positive("layer_norm_eps", 1e-5),
        activation=_activation(hf, "hidden_act", "gelu"),
        gated=False,
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=True,
        rope_theta=theta,
        rotary_dim=rotary_dim,
        rope_scaling=scaling,
        max_positions=hf.integer("max_position_embeddings", _TRAINED_LENGTH[family]),
        parallel_residual=hf.flag("use_parallel_residual", True),
        tied=hf.flag("tie_word_embeddings", False),
    )


def _from_gpt2(hf: Fields, family: str) -> TransformerConfig:
    settings = (
        ("scale_attn_weights", True),
        ("scale_attn_by_inverse_layer_idx", False),
        ("add_cross_attention", False),
    )
    for name, wanted in settings:
        if hf.flag(name, wanted) != wanted:
            raise ValueError(f"{name}={not wanted} of a GPT-2 checkpoint is not supported")
    width, heads = hf.integer("n_embd"), hf.integer("n_head")
    return TransformerConfig(
        family=family,
        vocab_size=hf.integer("vocab_size"),
        features=width,
        num_layers=hf.integer("n_layer"),
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=_head_dim("n_embd", width, heads),
        mlp_features=hf.integer("n_inner", None, null=True) or 4 * width,
        norm="layer",
        norm_eps=hf.positive("layer_norm_epsilon", 1e-5),
        activation=_activation(hf, "activation_function", "gelu_new"),
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        rope_theta=None,
        rotary_dim=0,
        max_positions=hf.integer("n_positions", 1024),
        tied=hf.flag("tie_word_embeddings", True),
    )


def _head_dim(field: str, width: int, heads: int) -> int:
    if width < heads:
        raise ValueError(f"{field} must be at least the number of heads, {heads}, got {width}")
    return width // heads


def config_to_hf(config: TransformerConfig) -> dict[str, Any]:
    """Writes the ``config.json`` that transformers, 4 or 5, reads back as the same architecture.

    Args:
      config: A configuration that its family can express.

    Returns:
      A JSON-serialisable mapping, without token ids.

    Raises:
      ValueError: If the family has no word for a field (such as a layer norm in a Llama); the message names it.
    """
    names = {
        "gpt2": "GPT2LMHeadModel",
        "gpt_neox": "GPTNeoXForCausalLM",
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }
    hf = {
        "architectures": [names[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
    } | (_to_gpt2 if config.family == "gpt2" else _to_rotary)(config)
    read = dataclasses.replace(config_from_hf(hf), **{name: getattr(config, name) for name in RUN_TIME})
    for field in dataclasses.fields(config):
        wanted, got = getattr(config, field.name), getattr(read, field.name)
        if wanted != got:
            raise ValueError(f"{field.name}={wanted!r} cannot be written as {config.family}, which means {got!r}")
    return hf


def _to_gpt2(config: TransformerConfig) -> dict[str, Any]:
    return {
        "n_embd": config.features,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_inner": config.mlp_features,
        "n_positions": config.max_positions,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": _activation_to_hf(config.activation),
    }


def _to_rotary(config: TransformerConfig) -> dict[str, Any]:
    common = {
        "hidden_size": config.features,
        "intermediate_size": config.mlp_features,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "max_position_embeddings": config.max_positions,
        "hidden_act": _activation_to_hf(config.activation),
        "rope_scaling": scaling_to_hf(config.rope_scaling),
    }
    if config.family == "gpt_neox":
        return common | {
            "layer_norm_eps": config.norm_eps,
            "attention_bias": config.qkv_bias,
            "rotary_pct": config.rotary_dim / config.head_dim,
            "rotary_emb_base": config.rope_theta,
            "use_parallel_residual": config.parallel_residual,
        }
    common |= {
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }
    if config.family != "qwen2" or config.head_dim * config.num_heads != config.features:
        common["head_dim"] = config.head_dim
    if config.family == "mistral":
        return common | {"sliding_window": config.sliding_window}
    if config.family == "llama":
        return common | {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}
    bias = {"attention_bias": config.qkv_bias} if config.family == "qwen3" else {}
    window = {"use_sliding_window": config.sliding_window is not None, "sliding_window": config.sliding_window}
    return common | bias | window | {"max_window_layers": 0 if config.sliding_window else config.num_layers}


_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
_SYNONYMS = {"swish": "silu", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new"}


def _activation(hf: Fields, field: str, default: str) -> str:
    given = hf.text(field, default)
    name = _SYNONYMS.get(given, given)
    if name not in _ACTIVATIONS:
        raise ValueError(f"{field} must be one of {', '.join([*_ACTIVATIONS, *_SYNONYMS])}; got {given!r}")
    return _ACTIVATIONS[name]


def _activation_to_hf(name: str) -> str:
    return {v: k for k, v in _ACTIVATIONS.items()}[name]


def _window(hf: Fields, family: str) -> int | None:
    """The sliding window, which must be the same in every layer; Qwen says per layer whether it applies."""
    if family == "llama":
        return None
    window = hf.integer("sliding_window", 4096, null=True)
    if family == "mistral":
        return window
    first = hf.integer("max_window_layers", 28, least=0)
    kinds = hf.texts("layer_types", None, null=True)
    if not hf.flag("use_sliding_window", False) or window is None:
        return None
    if kinds is None:
        layers = hf.integer("num_hidden_layers")
        kinds = ["full_attention"] * (first > 0) + ["sliding_attention"] * (layers > first)
    if len(set(kinds)) > 1:
        raise ValueError("use_sliding_window=True: a window that differs between layers is not supported")
    return window if kinds and kinds[0] == "sliding_attention" else None
