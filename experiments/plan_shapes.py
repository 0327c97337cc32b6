"""Which policies `experiments.plan` knows by name, and how many operations a step on them needs."""

import dataclasses
import math
import pathlib
from typing import Any

import jax

from tiltjax.files import adapter_base, read_json, resolve
from tiltjax.models.config import TransformerConfig, config_from_hf
from tiltjax.models.gguf import read_gguf

__all__ = ["SHAPES", "Shape", "StepFlops", "num_parameters", "policy_config", "step_flops"]

_CHUNK, _ROWS = 3072, 2048
"""Vocabulary entries and positions (per device) that `tiltjax.ops.tokens.token_logp` takes at a time."""


def _neox(**sizes: int) -> dict[str, Any]:
    return {"model_type": "gpt_neox", "hidden_act": "gelu", "max_position_embeddings": 2048, "rotary_pct": 0.25,
            "rotary_emb_base": 10000, "use_parallel_residual": True, "tie_word_embeddings": False} | sizes  # fmt: skip


def _llama(**settings: Any) -> dict[str, Any]:
    return {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5} | settings


SHAPES: dict[str, dict[str, Any]] = {
    "EleutherAI/pythia-1.4b": _neox(vocab_size=50304, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
                                    num_attention_heads=16),
    "EleutherAI/pythia-6.9b": _neox(vocab_size=50432, hidden_size=4096, intermediate_size=16384, num_hidden_layers=32,
                                    num_attention_heads=32),
    "HuggingFaceTB/SmolLM2-135M": _llama(vocab_size=49152, hidden_size=576, intermediate_size=1536,
                                         num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
                                         max_position_embeddings=8192, rope_theta=100000, tie_word_embeddings=True),
    "meta-llama/Llama-3.1-8B": _llama(vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                                      num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                                      max_position_embeddings=131072, rope_theta=500000, tie_word_embeddings=False,
                                      rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                                    "high_freq_factor": 4.0,
                                                    "original_max_position_embeddings": 8192}),
    "mini": _neox(vocab_size=1024, hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8),
}  # fmt: skip
"""Published ``config.json`` files, by hub id; "mini" is for trying things out."""


def policy_config(policy: str) -> TransformerConfig:
    """The architecture of a policy, without its weights and without the network.

    Args:
      policy: A name of `SHAPES`, a ``config.json``, a Hugging Face directory, or a GGUF file.

    Returns:
      Its configuration.

    Raises:
      ValueError: If there is nothing of that name, or its architecture is not supported.
    """
    path = pathlib.Path(policy)
    if policy in SHAPES:
        return config_from_hf(SHAPES[policy])
    if path.is_file() and path.suffix == ".json":
        hf = read_json(path)
    elif path.exists():
        found = resolve(path)
        if found.is_dir() and (base := adapter_base(found)) is not None:
            found = resolve(base[0], revision=base[1])
        hf = read_gguf(found)[0] if found.suffix == ".gguf" else read_json(found / "config.json")
    else:
        raise ValueError(f"policy must be a local file or directory, or one of {', '.join(SHAPES)}; got {policy!r}")
    try:
        return config_from_hf(hf)
    except ValueError as error:
        raise ValueError(f"{policy}: {error}") from None


def num_parameters(tree: Any) -> int:
    """How many numbers a pytree of arrays or of their shapes holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one global batch: ``B`` prompts of ``S`` tokens with ``N`` completions of ``T``."""

    B: int
    N: int
    S: int
    T: int


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of the matrix products of one training step on a global batch, 2 per multiply-add.

    Attributes:
      model: Three times the forward pass: what the mathematics needs (less for adapters, whose kernels have no
        gradient).
      executed: With what the backward pass computes again.
    """

    model: float
    executed: float


def step_flops(
    config: TransformerConfig, shape: Shape, *, lora_rank: int = 0, devices: int = 1, gathered: bool = False
) -> StepFlops:
    """Counts the products of `tiltjax.train.step.train_step` on a `tiltjax.models.transformer.Transformer`.

    The prompt goes through the blocks once for its N completions, of which all tokens but the last do. Scores are
    counted in full, as the plain attention computes them. The vocabulary projection is computed again in the backward
    pass, unless one chunk is all of it: then the compiler sees that both are the same, where each pass has not gathered
    the projection for itself. Of a block, all is computed again but the products on whose results no gradient depends.

    Args:
      config: Of the policy.
      shape: Of the batch.
      lora_rank: Rank of the adapters; 0 trains all parameters.
      devices: Over which the batch is spread.
      gathered: Whether the features of the vocabulary projection are spread over devices.

    Returns:
      `StepFlops`.
    """
    c, s = config, shape
    own = s.T - 1
    tokens = s.B * (s.S + s.N * own)
    width, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    sides = {
        "query": (c.features, width),
        "key": (c.features, narrow),
        "value": (c.features, narrow),
        "out": (width, c.features),
        "up": (c.features, c.mlp_features),
        "down": (c.mlp_features, c.features),
    }
    sides |= {"gate": sides["up"]} if c.gated else {}  # fmt: skip
    kernels = {name: 2.0 * tokens * a * b for name, (a, b) in sides.items()}
    down_adapters = {name: 2.0 * tokens * a * lora_rank for name, (a, _) in sides.items()}
    up_adapters = {name: 2.0 * tokens * b * lora_rank for name, (_, b) in sides.items()}
    scores = 4.0 * s.B * width * (s.S**2 + s.N * own * (s.S + own))
    kernel, adapter = sum(kernels.values()), sum(down_adapters.values()) + sum(up_adapters.values())
    backward = 2 * (scores + adapter) + kernel * (1 if lora_rank else 2)
    # Nothing needs the output of a block again, nor in a parallel one that of its attention.
    unused = ("down", "out") if c.parallel_residual else ("down",)
    again = {
        "none": 0.0,
        "dots": scores,
        "full": kernel + scores + adapter - sum(kernels[name] + up_adapters[name] for name in unused),
    }[c.remat]
    forward = kernel + scores + adapter
    head = 2.0 * s.B * s.N * s.T * c.vocab_size * c.features
    head_backward = head * (1 if lora_rank else 2)
    twice = gathered or c.vocab_size > _CHUNK or _ROWS * devices < s.B * s.N * s.T
    return StepFlops(
        model=c.num_layers * (forward + backward) + head + head_backward,
        executed=c.num_layers * (forward + backward + again) + (1 + twice) * head + head_backward,
    )
