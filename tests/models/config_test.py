import dataclasses
import json

import jax
import pytest
from transformers import AutoConfig

from tiltjax.models.config import FAMILIES, TransformerConfig, config_from_hf, config_to_hf
from tiltjax.models.transformer import Transformer

LLAMA3 = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
# The published configurations, and the published numbers of parameters.
PUBLISHED = {
    "Llama-3.2-1B": (
        {
            "model_type": "llama",
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": LLAMA3,
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
        1_235_814_400,
        {"rope_scaling": ("llama3", 32.0, 1.0, 4.0, 8192.0), "rope_theta": 500000.0, "tied": True, "rotary_dim": 64},
    ),
    "Qwen2.5-0.5B": (
        {
            "model_type": "qwen2",
            "hidden_act": "silu",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 32768,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 32768,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        494_032_768,
        {"qkv_bias": True, "out_bias": False, "sliding_window": None, "head_dim": 64, "norm_eps": 1e-6},
    ),
    "Qwen3-0.6B": (
        {
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        596_049_920,
        {"qk_norm": True, "qkv_bias": False, "head_dim": 128, "rope_theta": 1e6},
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral",
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        7_241_732_096,
        {"sliding_window": 4096, "tied": False, "head_dim": 128},
    ),
    "pythia-160m": (
        {
            "model_type": "gpt_neox",
            "hidden_act": "gelu",
            "hidden_size": 768,
            "intermediate_size": 3072,
            "layer_norm_eps": 1e-05,
            "max_position_embeddings": 2048,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "tie_word_embeddings": False,
            "use_parallel_residual": True,
            "vocab_size": 50304,
        },
        162_322_944,
        {"rotary_dim": 16, "parallel_residual": True, "norm": "layer", "activation": "gelu", "gated": False},
    ),
    "gpt2": (
        {
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-05,
            "n_ctx": 1024,
            "n_embd": 768,
            "n_head": 12,
            "n_layer": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
        },
        124_439_808,
        {"tied": True, "rope_theta": None, "activation": "gelu_tanh", "mlp_features": 3072, "max_positions": 1024},
    ),
    "SmolLM2-135M": (
        {
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": 576,
            "intermediate_size": 1536,
            "max_position_embeddings": 8192,
            "num_attention_heads": 9,
            "num_hidden_layers": 30,
            "num_key_value_heads": 3,
            "rms_norm_eps": 1e-05,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "vocab_size": 49152,
        },
        134_515_008,
        {"head_dim": 64, "num_kv_heads": 3, "rope_theta": 1e5},
    ),
}
PLAIN = PUBLISHED["SmolLM2-135M"][0]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models(name):
    hf, parameters, fields = PUBLISHED[name]
    config = config_from_hf(hf)
    assert {field: getattr(config, field) for field in fields} == fields
    model = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    assert sum(leaf.size for leaf in jax.tree.leaves(model)) == parameters


@pytest.mark.parametrize("name", PUBLISHED)
def test_written_and_read_again(name, tmp_path):
    config = config_from_hf(PUBLISHED[name][0])
    hf = config_to_hf(config)
    assert config_from_hf(json.loads(json.dumps(hf))) == config
    (tmp_path / "config.json").write_text(json.dumps(hf))
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.model_type == config.family
    assert config_from_hf(json.loads(read.to_json_string())) == config


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "activation": "gelu", "tied": False}),
        ("llama", {"rope_scaling": ("linear", 2.5), "rope_theta": 5e5, "head_dim": 24, "rotary_dim": 24}),
        ("llama", {"rope_scaling": ("llama3", 8.0, 1.0, 4.0, 64.0), "max_positions": 512}),
        ("mistral", {"sliding_window": None, "norm_eps": 1e-6}),
        ("mistral", {"sliding_window": 7}),
        ("qwen2", {"qkv_bias": True, "sliding_window": 5}),
        ("qwen3", {"qk_norm": True, "qkv_bias": True, "out_bias": True, "num_kv_heads": 1}),
    ],
)
def test_every_setting_survives_transformers(family, fields, tmp_path):
    config = dataclasses.replace(TransformerConfig(), family=family, **fields)
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(config)))
    read = json.loads(AutoConfig.from_pretrained(tmp_path).to_json_string())
    assert "rope_theta" in read["rope_parameters"]
    assert config_from_hf(read) == config


def test_defaults_of_the_families_are_those_of_transformers():
    for family in FAMILIES:
        written = json.loads(AutoConfig.for_model(family).to_json_string(use_diff=False))
        bare = {k: v for k, v in written.items() if k.startswith(("num_", "n_", "hidden_size", "interm", "vocab"))}
        bare.pop("n_positions", None)
        assert config_from_hf(written) == config_from_hf(bare | {"model_type": family}), family


@pytest.mark.parametrize("family", FAMILIES)
def test_only_learned_positions_end_at_a_table(family):
    name = "n_positions" if family == "gpt2" else "max_position_embeddings"
    written = json.loads(AutoConfig.for_model(family).to_json_string(use_diff=False)) | {name: 77}
    config = config_from_hf(written)
    assert (config.max_positions, config.position_table) == (77, 77 if family == "gpt2" else None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "model_type must be one of llama, mistral.*got 'mamba'"),
        ({"model_type": None}, "model_type must be one of .*got None"),
        ({"auto_map": {"AutoConfig": "evil.Config"}}, "auto_map is set"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"hidden_act": "quick_gelu"}, "hidden_act must be one of .*got 'quick_gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type must be .*got 'yarn'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ between layers"),
        ({"rope_parameters": {"rope_type": "linear"}}, "the field 'rope_parameters.factor' is missing from a llama"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 3}, "differs between layers"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must divide num_attention_heads=9, got 2"),
    ],
)
def test_refuses(change, words):
    with pytest.raises(ValueError, match=words):
        config_from_hf(PLAIN | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
    ],
)
def test_refuses_of_gpt2(change, words):
    with pytest.raises(ValueError, match=words):
        config_from_hf(PUBLISHED["gpt2"][0] | change)


def test_names_a_missing_field():
    with pytest.raises(ValueError, match="'hidden_size' is missing from a llama"):
        config_from_hf({"model_type": "llama", "num_attention_heads": 4})


@pytest.mark.parametrize(
    ("kinds", "window"), [(["full_attention"] * 30, None), (["sliding_attention"] * 30, 64), (None, None)]
)
def test_layer_types_of_qwen(kinds, window):
    change = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 30}
    assert config_from_hf(PLAIN | change | {"layer_types": kinds}).sliding_window == window


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("llama", {"norm": "layer"}, "norm='layer' cannot be written as llama"),
        ("llama", {"sliding_window": 8}, "sliding_window=8 cannot be written as llama"),
        ("mistral", {"qkv_bias": True}, "qkv_bias=True cannot be written as mistral"),
        ("gpt2", {}, "num_kv_heads=2 cannot be written as gpt2"),
        ("gpt_neox", {"num_kv_heads": 4}, "norm='rms' cannot be written as gpt_neox"),
    ],
)
def test_does_not_write_what_the_family_cannot_say(family, fields, words):
    with pytest.raises(ValueError, match=words):
        config_to_hf(dataclasses.replace(TransformerConfig(), family=family, **fields))


def test_unknown_family():
    with pytest.raises(ValueError, match=r"family must be one of .*got 'mamba'"):
        TransformerConfig(family="mamba")
