"""Which policies `experiments.plan` knows by name."""

import pathlib
from typing import Any

from tiltjax.files import adapter_base, read_json, resolve
from tiltjax.models.config import TransformerConfig, config_from_hf
from tiltjax.models.gguf import read_gguf

__all__ = ["SHAPES", "policy_config"]


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
