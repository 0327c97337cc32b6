import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tiltjax.data.text import find_embedded_gguf
from tiltjax.models.config import TransformerConfig
from tiltjax.models.gguf import read_gguf
from tiltjax.models.pretrained import load, save
from tiltjax.models.transformer import Transformer

GOLDEN = Path(__file__).parent / "golden"
NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.": "blk.",
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "ffn_norm.",
    "self_attn.q_proj.": "attn_q.",
    "self_attn.k_proj.": "attn_k.",
    "self_attn.v_proj.": "attn_v.",
    "self_attn.o_proj.": "attn_output.",
    "mlp.gate_proj.": "ffn_gate.",
    "mlp.up_proj.": "ffn_up.",
    "mlp.down_proj.": "ffn_down.",
}
LLAMA = TransformerConfig(vocab_size=64, features=64, mlp_features=96, qkv_bias=True, out_bias=True, tied=False)
QWEN2 = TransformerConfig(family="qwen2", vocab_size=64, features=64, mlp_features=96, qkv_bias=True, rope_theta=1e6)


def random_checkpoint(config, directory):
    """A model whose biases are not 0, and its tensors under their Hugging Face names."""
    model = Transformer(jax.random.key(0), config)
    model = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), model)
    save(model, directory)
    return model, load_file(directory / "model.safetensors")


def write_gguf(path, config, tensors, *, kind=gguf.GGMLQuantizationType.F32, **extra):
    """What the converter of llama.cpp does: other names, rotary pairs side by side in llama, quantised matrices."""
    family = config.family
    writer = gguf.GGUFWriter(path, extra.pop("architecture", family))
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.features)
    writer.add_feed_forward_length(config.mlp_features)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_eos_token_id(2)
    for name, value in extra.items():
        getattr(writer, name)(value)
    for name, tensor in tensors.items():
        if family == "llama" and (".q_proj." in name or ".k_proj." in name):
            halves = tensor.reshape(-1, 2, config.head_dim // 2, *tensor.shape[1:])
            tensor = np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        if tensor.ndim == 2 and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("config", [LLAMA, QWEN2], ids=["llama", "qwen2"])
def test_unquantised_is_the_checkpoint(config, tmp_path):
    model, tensors = random_checkpoint(config, tmp_path / "hf")
    path = write_gguf(tmp_path / "model.gguf", config, tensors)
    hf, found = read_gguf(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        np.testing.assert_array_equal(found[name][:], tensor, err_msg=name)
        part = (slice(3, 9), slice(1, 4))[: tensor.ndim]
        np.testing.assert_array_equal(found[name][part], tensor[part], err_msg=name)
    assert [hf[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [None, 2, None]
    read = load(path)
    assert read.config == config
    assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), read, model)))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_is_near_and_bounded_by_its_step(kind, tmp_path):
    _, tensors = random_checkpoint(LLAMA, tmp_path / "hf")
    path = write_gguf(tmp_path / "model.gguf", LLAMA, tensors, kind=gguf.GGMLQuantizationType[kind])
    found = read_gguf(path)[1]
    step = {"Q8_0": 1 / 127, "Q4_1": 1 / 15, "F16": 2**-11, "BF16": 2**-8}[kind]
    for name, tensor in tensors.items():
        assert found[name][:].dtype == np.float32
        spread = 2 * np.abs(tensor).max() if tensor.ndim == 2 else 0
        assert np.abs(found[name][:] - tensor).max() <= 0.51 * step * spread + 1e-3 * spread, name
        if tensor.ndim == 2:
            assert np.abs(found[name][:] - tensor).max() > 0


def test_linear_rope_scaling(tmp_path):
    _, tensors = random_checkpoint(QWEN2, tmp_path / "hf")
    scaling = {"add_rope_scaling_type": gguf.RopeScalingType.LINEAR, "add_rope_scaling_factor": 4.0}
    path = write_gguf(tmp_path / "model.gguf", QWEN2, tensors, **scaling)
    assert load(path).config.rope_scaling == ("linear", 4.0)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"architecture": "mamba"}, "architecture must be one of llama, qwen2; got 'mamba'"),
        ({"add_expert_count": 8}, r"llama.expert_count=8 is not supported"),
        ({"add_sliding_window": 32}, r"llama.attention.sliding_window=32 is not supported"),
        ({"add_rope_dimension_count": 8}, r"llama.rope.dimension_count must be the width of a head, 16"),
        ({"add_rope_scaling_type": gguf.RopeScalingType.YARN}, r"rope.scaling.type must be none or linear; got 'yarn'"),
    ],
)
def test_refuses(extra, words, tmp_path):
    _, tensors = random_checkpoint(LLAMA, tmp_path / "hf")
    path = write_gguf(tmp_path / "model.gguf", LLAMA, tensors, **extra)
    with pytest.raises(ValueError, match=f"^{path}: {words}"):
        load(path)


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_qkv.weight", "model.layers.0.mlp.x_proj.weight"])
def test_refuses_a_tensor_by_name(name, tmp_path):
    _, tensors = random_checkpoint(LLAMA, tmp_path / "hf")
    path = write_gguf(tmp_path / "model.gguf", LLAMA, tensors | {name: np.ones(8, np.float32)})
    shown = name.replace("model.layers.", "blk.")
    with pytest.raises(ValueError, match=f"^{path}: the tensor {shown} is not supported"):
        read_gguf(path)


def test_missing_tensor_and_field(tmp_path):
    _, tensors = random_checkpoint(LLAMA, tmp_path / "hf")
    partial = {name: tensor for name, tensor in tensors.items() if "layers.1.mlp.up_proj" not in name}
    path = write_gguf(tmp_path / "model.gguf", LLAMA, partial)
    with pytest.raises(ValueError, match=r"model.gguf: the tensor model.layers.1.mlp.up_proj.weight is missing"):
        load(path)
    partial = {name: tensor for name, tensor in tensors.items() if "embed" not in name}
    with pytest.raises(ValueError, match=r"model.gguf: the tensor token_embd.weight is missing"):
        load(write_gguf(path, LLAMA, partial))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"model.gguf: the field llama.\w+.* is missing"):
        load(path)


def test_broken_files(tmp_path):
    _, tensors = random_checkpoint(LLAMA, tmp_path / "hf")
    path = write_gguf(tmp_path / "model.gguf", LLAMA, tensors)
    whole = path.read_bytes()
    for broken in (whole[:-1000], whole[:200], whole[:2], b"", b"GARBAGE!" * 100):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=f"^{path}: truncated or not a GGUF file"):
            load(path)
    with pytest.raises(FileNotFoundError, match="no such GGUF file"):
        read_gguf(tmp_path / "absent.gguf")


def test_says_how_to_install_gguf(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"model.gguf: reading GGUF needs .* pip install 'tiltjax\[gguf\]'"):
        load(path)


def test_smollm2_is_what_torch_computes():
    with np.load(GOLDEN / "smollm2.npz") as expected:
        tokens, length = jnp.asarray(expected["tokens"]), expected["length"]
        top_ids, top_logits, token_logp = expected["top_ids"], expected["top_logits"], expected["token_logp"]
    model = load(find_embedded_gguf())
    mask = jnp.arange(tokens.shape[1])[None] < length[:, None]
    logits, _ = jax.jit(lambda m: m.prefill(tokens, mask, num_candidates=1, max_tokens=1))(model)
    np.testing.assert_allclose(np.take_along_axis(np.asarray(logits), top_ids, axis=1), top_logits, atol=1e-3)
    np.testing.assert_array_equal(np.argsort(-logits)[:, :8], top_ids)
    stats = jax.jit(lambda m: m.score(tokens[:, :1], mask[:, :1], tokens[:, None, 1:]))(model)
    np.testing.assert_allclose(jnp.where(mask[:, 1:], stats.logp[:, 0], 0), token_logp, atol=1e-3)
