import dataclasses
import json
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tiltjax.models.config import TransformerConfig
from tiltjax.models.gguf import read_gguf
from tiltjax.models.pretrained import load, save
from tiltjax.models.transformer import Transformer
from tiltjax.ops.tokens import token_logp as logp_of

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
    model, rng = jax.eval_shape(lambda: Transformer(jax.random.key(0), config)), np.random.default_rng(0)
    model = jax.tree.map(lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), model)
    save(model, directory)
    return model, load_file(directory / "model.safetensors")


def write_gguf(path, config, tensors, *, kind=gguf.GGMLQuantizationType.F32, **extra):
    """What the converter of llama.cpp does: other names, rotary pairs side by side in llama, quantised matrices."""
    family = config.family
    writer = gguf.GGUFWriter(path, extra.pop("architecture", family), split_max_tensors=extra.pop("each", 0))
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


@pytest.mark.parametrize("name", ["rope_freqs.bias", "blk.0.attn_qkv.weight", "model.layers.0.mlp.x_proj.weight"])
def test_refuses_a_tensor_by_name(name, tmp_path):
    _, tensors = random_checkpoint(LLAMA, tmp_path / "hf")
    path = write_gguf(tmp_path / "model.gguf", LLAMA, tensors | {name: np.ones(8, np.float32)})
    shown = name.replace("model.layers.", "blk.")
    with pytest.raises(ValueError, match=f"^{path}: the tensor {shown} is not supported"):
        read_gguf(path)


def llama3_factors(frequencies, *, low=1.0, high=4.0, factor=8.0, original=64):
    """As the converter of llama.cpp writes them: by the wavelength."""
    wavelength = 2 * np.pi / frequencies
    smooth = (original / wavelength - low) / (high - low)
    between = 1 / ((1 - smooth) / factor + smooth)
    return np.where(wavelength > original / low, factor, np.where(wavelength < original / high, 1.0, between))


@pytest.mark.parametrize("original", [32, 64, 8192])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_factors_of_rope_are_the_scaling_of_llama3(original, theta, tmp_path):
    config = dataclasses.replace(LLAMA, rope_theta=theta)
    _, tensors = random_checkpoint(config, tmp_path / "hf")
    frequencies = theta ** (-np.arange(8) / 8)
    factors = llama3_factors(frequencies, factor=32.0, original=original).astype(np.float32)
    read = load(write_gguf(tmp_path / "model.gguf", config, tensors | {"rope_freqs.weight": factors})).config
    if read.rope_scaling is None:
        np.testing.assert_array_equal(factors, 1)
        return
    kind, factor, low, high, length = read.rope_scaling
    assert kind == "llama3"
    again = llama3_factors(frequencies, low=low, high=high, factor=factor, original=length)
    np.testing.assert_allclose(again, factors, rtol=1e-4)


@pytest.mark.robustness(
    "Checkpoints",
    given="a GGUF file whose rotary factors are of another scaling than Llama 3's",
    outcome="refused with the file and the tensor",
)
@pytest.mark.parametrize(
    ("factors", "extra", "words"),
    [
        (np.linspace(1, 9, 8), {}, "the factors of rope_freqs.weight are not those of Llama 3"),
        (np.full(8, np.nan), {}, "the factors of rope_freqs.weight are not those of Llama 3"),
        (np.ones(4), {}, "rope_freqs.weight needs 8 factors and no other scaling, has 4"),
        (
            np.ones(8),
            {"add_rope_scaling_type": gguf.RopeScalingType.LINEAR, "add_rope_scaling_factor": 4.0},
            "rope_freqs.weight needs 8 factors and no other scaling, has 8",
        ),
    ],
)
def test_factors_of_another_scaling(factors, extra, words, tmp_path):
    _, tensors = random_checkpoint(LLAMA, tmp_path / "hf")
    tensors["rope_freqs.weight"] = factors.astype(np.float32)
    path = write_gguf(tmp_path / "model.gguf", LLAMA, tensors, **extra)
    with pytest.raises(ValueError, match=f"^{path}: {words}"):
        load(path)


def test_the_end_of_a_turn_is_an_end_id(tmp_path):
    _, tensors = random_checkpoint(LLAMA, tmp_path / "hf")
    path = write_gguf(tmp_path / "model.gguf", LLAMA, tensors, add_eot_token_id=7)
    assert read_gguf(path)[0]["eos_token_id"] == [2, 7]
    save(load(path), tmp_path / "out", source=path)
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == [2, 7]
    path = write_gguf(tmp_path / "same.gguf", LLAMA, tensors, add_eot_token_id=2)
    assert read_gguf(path)[0]["eos_token_id"] == 2


@pytest.mark.robustness(
    "Checkpoints",
    given="a GGUF model split over several files",
    outcome="all parts are read, whichever is named; a missing part is named",
)
def test_split_files_are_one_model(tmp_path):
    model, tensors = random_checkpoint(LLAMA, tmp_path / "hf")
    write_gguf(tmp_path / "model.gguf", LLAMA, tensors, each=10)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"model-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        read = load(part)
        assert read.config == LLAMA
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), read, model)))
    parts[0].rename(tmp_path / "renamed.gguf")
    with pytest.raises(
        ValueError, match=r"renamed.gguf: a part of 3, and its name does not end in -00001-of-00003.gguf"
    ):
        load(tmp_path / "renamed.gguf")
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00003.gguf: no such GGUF file, a part of model-00002"):
        load(parts[1])


@pytest.mark.robustness(
    "Checkpoints",
    given="a weight that is NaN in a GGUF file, quantised or not",
    outcome="refused with file and tensor",
)
@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_weights_that_are_not_finite(kind, tmp_path):
    _, tensors = random_checkpoint(QWEN2, tmp_path / "hf")
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name][3, 5] = np.nan
    with np.errstate(all="ignore"):
        path = write_gguf(tmp_path / "model.gguf", QWEN2, tensors, kind=gguf.GGMLQuantizationType[kind])
    with pytest.raises(ValueError, match=f"^{path}: the tensor {name} is not finite"):
        load(path)


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
    model = load("smollm2")
    mask = np.arange(tokens.shape[1]) < length[:, None]

    @jax.jit
    def run(model):
        """Logits after the last token, and log-probabilities of all after the first: of one pass."""
        more = jnp.pad(tokens[:, None, 1:], ((0, 0), (0, 0), (0, 1)))
        hidden = model.hidden(tokens[:, :1], jnp.ones((len(tokens), 1), bool), more)[:, 0]
        last = jnp.take_along_axis(hidden, jnp.asarray(length)[:, None, None] - 1, axis=1)[:, 0]
        return last @ model.projection().T, logp_of(hidden, model.projection(), more[:, 0]).logp[:, :-1]

    logits, logp = run(model)
    np.testing.assert_allclose(np.take_along_axis(np.asarray(logits), top_ids, axis=1), top_logits, atol=1e-3)
    np.testing.assert_array_equal(jax.lax.top_k(logits, 8)[1], top_ids)
    np.testing.assert_allclose(np.where(mask[:, 1:], logp, 0), token_logp, atol=1e-3)
