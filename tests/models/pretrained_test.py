import dataclasses
import json
import os
import shutil
from pathlib import Path

import chex
import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, GenerationConfig

from tiltjax.data.text import load_tokenizer
from tiltjax.files import resolve
from tiltjax.models import families, lora
from tiltjax.models.config import FAMILIES, TransformerConfig
from tiltjax.models.families import locate, parameter_path
from tiltjax.models.pretrained import fingerprint, load, save
from tiltjax.models.tensor_files import FileSlice
from tiltjax.models.transformer import Transformer

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def checkpoint(tmp_path):
    """A Llama checkpoint that a test may damage."""
    return Path(shutil.copytree(GOLDEN / "llama", tmp_path / "llama"))


def rewrite(directory, change):
    tensors = load_file(directory / "model.safetensors")
    save_file(change(tensors), directory / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_goes_back_to_its_place(family, tmp_path):
    save(load(GOLDEN / family), tmp_path / "out", source=GOLDEN / family)
    wanted, written = load_file(GOLDEN / family / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    assert set(written) == set(wanted)
    for name, tensor in wanted.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    chex.assert_trees_all_equal(load(tmp_path / "out"), load(GOLDEN / family))
    ours, theirs = (AutoConfig.from_pretrained(d).to_dict() for d in (tmp_path / "out", GOLDEN / family))
    assert {k for k in ours if ours[k] != theirs[k]} <= {"_name_or_path", "max_window_layers"}


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_bfloat16_round_trip_is_exact(family, tmp_path):
    half = load(GOLDEN / family, dtype="bfloat16", compute_dtype="float32")
    assert half.config.compute_dtype == "float32"
    save(half, tmp_path / "out")
    tensors = load_file(tmp_path / "out/model.safetensors")
    for name, tensor in load_file(GOLDEN / family / "model.safetensors").items():
        assert tensors[name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(tensors[name], tensor.astype(jnp.bfloat16))
    chex.assert_trees_all_equal(load(tmp_path / "out", dtype="bfloat16", compute_dtype="float32"), half)
    wide = load(tmp_path / "out")
    chex.assert_trees_all_equal(jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide.blocks), half.blocks)
    save(wide, tmp_path / "again", dtype="bfloat16")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("spec", [("fsdp", "tensor"), ("tensor", "fsdp"), (None, ("fsdp", "tensor"))])
@pytest.mark.parametrize("family", FAMILIES)
def test_sharded_load_reads_every_element_once(family, spec, monkeypatch):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    wanted, read = {}, []
    original = FileSlice.__getitem__

    def counted(self, index):
        piece = original(self, index)
        read.append(piece.size)
        return piece

    def sharding(path, shape):
        used = (None,) * (len(shape) - 2) + spec if len(shape) > 1 else ()
        sizes = [1 if a is None else 8 if isinstance(a, tuple) else mesh.shape[a] for a in used]
        fits = [a if size % n == 0 else None for a, n, size in zip(used, sizes, shape, strict=False)]
        wanted[path] = NamedSharding(mesh, PartitionSpec(*fits))
        return wanted[path]

    whole = load(GOLDEN / family)
    monkeypatch.setattr(FileSlice, "__getitem__", counted)
    model = load(GOLDEN / family, sharding=sharding)
    monkeypatch.undo()
    leaves = {parameter_path(k): leaf for k, leaf in jax.tree_util.tree_flatten_with_path(model)[0]}
    assert set(leaves) == set(wanted)
    for path, leaf in leaves.items():
        assert leaf.sharding.is_equivalent_to(wanted[path], leaf.ndim), path
    assert len(leaves["blocks.query.kernel"].sharding.device_set) == 8
    assert not leaves["blocks.query.kernel"].is_fully_replicated
    chex.assert_trees_all_equal(model, whole)
    assert sum(read) == sum(leaf.size for leaf in leaves.values())
    assert fingerprint(model) == fingerprint(whole)


def test_sharded_model_is_written_whole(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    spec = {True: PartitionSpec(None, "fsdp"), False: PartitionSpec()}
    model = load(GOLDEN / "gpt_neox", sharding=lambda path, shape: NamedSharding(mesh, spec[len(shape) == 3]))
    save(model, tmp_path / "out", source=GOLDEN / "gpt_neox")
    save(load(GOLDEN / "gpt_neox"), tmp_path / "one", source=GOLDEN / "gpt_neox")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_several_files_with_an_index(family, tmp_path):
    model = load(GOLDEN / family)
    save(model, tmp_path / "out", max_shard_bytes=20_000)
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) >= 4
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    tensors = {name: load_file(tmp_path / "out" / file)[name] for name, file in index["weight_map"].items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert set(tensors) == set(load_file(GOLDEN / family / "model.safetensors"))
    assert max(sum(t.nbytes for t in load_file(tmp_path / "out" / file).values()) for file in files) <= 20_000
    chex.assert_trees_all_equal(load(tmp_path / "out"), model)


def test_names_without_the_base_prefix(tmp_path):
    directory = Path(shutil.copytree(GOLDEN / "gpt2", tmp_path / "gpt2"))
    rewrite(directory, lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()})
    chex.assert_trees_all_equal(load(directory), load(GOLDEN / "gpt2"))


def test_warns_of_tensors_it_does_not_use(checkpoint, caplog):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(4, np.float32)}
    rewrite(checkpoint, lambda tensors: tensors | buffers)
    load(checkpoint)
    assert caplog.messages == []
    rewrite(checkpoint, lambda tensors: tensors | {"score.weight": np.zeros((1, 32), np.float32)})
    load(checkpoint)
    assert caplog.messages == [f"{checkpoint}: 1 tensors are not used: score.weight"]


def test_adapters_are_merged_on_the_way_out(key, tmp_path):
    base = load(GOLDEN / "qwen3")
    model = lora.add(key, base, rank=2, alpha=8.0)
    assert fingerprint(model) == fingerprint(base)
    model.blocks.query.lora_b.set_value(jnp.ones_like(model.blocks.query.lora_b[...]))
    save(model, tmp_path / "out")
    a, b = np.asarray(model.blocks.query.lora_a[...]), np.asarray(model.blocks.query.lora_b[...])
    expected = np.asarray(base.blocks.query.kernel[...]) + 4.0 * np.einsum("lir,lro->lio", a, b)
    np.testing.assert_allclose(load(tmp_path / "out").blocks.query.kernel[...], expected, rtol=1e-5, atol=1e-6)
    assert fingerprint(load(tmp_path / "out")) == fingerprint(model) != fingerprint(base)


class Words:
    """The part of a tokenizer that `save` uses."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, None

    def save_pretrained(self, directory):
        (Path(directory) / "tokenizer.json").write_text("{}")


def test_token_ids_and_tokenizer_files(checkpoint, tmp_path):
    hf = json.loads((checkpoint / "config.json").read_text()) | {"eos_token_id": [7, 9], "bos_token_id": 3}
    (checkpoint / "config.json").write_text(json.dumps(hf))
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "modeling_evil.py"):
        (checkpoint / name).write_text(f'"{name}"')
    model = load(checkpoint)

    def written(**options):
        save(model, tmp_path / "out", overwrite=True, **options)
        ids = json.loads((tmp_path / "out/config.json").read_text())
        files = {path.name for path in (tmp_path / "out").iterdir()} - {"config.json", "model.safetensors"}
        return [ids[f"{name}_token_id"] for name in ("bos", "eos", "pad")], files

    carried = {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert written() == ([None] * 3, set())
    assert written(source=checkpoint) == ([3, [7, 9], None], carried)
    assert (tmp_path / "out/tokenizer.json").read_text() == '"tokenizer.json"'
    assert written(tokenizer=Words()) == ([1, 2, None], {"tokenizer.json"})
    both = written(tokenizer=Words(), source=checkpoint)
    assert both == ([3, [7, 9], None], {"tokenizer.json", "generation_config.json"})
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"


CASES = Path(__file__).parents[1] / "cases"


@pytest.mark.robustness(
    "Checkpoints",
    given="a chat model whose turns end in another token than the tokenizer's EOS, tuned and exported",
    outcome="the export keeps generation_config.json, every end id, the chat template and the tokenizer",
)
@pytest.mark.parametrize("own", [True, False], ids=["tokenizer", "files"])
def test_an_export_ends_as_its_source_does(own, tmp_path):
    """What tests/cases/export-generation-config asks for."""
    source = CASES / "turn-end-token/policy"
    save(load(source), tmp_path / "out", source=source, tokenizer=load_tokenizer(source) if own else None)
    before, after = (json.loads((d / "config.json").read_text()) for d in (source, tmp_path / "out"))
    assert (before["eos_token_id"], after["eos_token_id"]) == (258, 258)
    assert (tmp_path / "out/generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    ends = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (ends.eos_token_id, ends.pad_token_id, ends.temperature) == ([258, 256], 256, 0.7)
    old, new = load_tokenizer(source), load_tokenizer(tmp_path / "out")
    assert new.chat_template == old.chat_template
    assert new.eos_token_id == old.eos_token_id == 256
    hello = [{"role": "user", "content": "hello"}]
    assert new.apply_chat_template(hello)["input_ids"] == old.apply_chat_template(hello)["input_ids"]


def test_an_export_has_the_type_that_its_source_declares(checkpoint, tmp_path, caplog):
    hf = json.loads((checkpoint / "config.json").read_text())
    model = load(checkpoint)
    for declared, wanted in (({"dtype": "bfloat16"}, "bfloat16"), ({"torch_dtype": "float16"}, "float16"),
                             ({}, "float32"), ({"dtype": "int4"}, "float32"), ({"dtype": 3}, "float32")):  # fmt: skip
        rest = {k: v for k, v in hf.items() if k not in ("dtype", "torch_dtype")}
        (checkpoint / "config.json").write_text(json.dumps(rest | declared))
        caplog.clear()
        with caplog.at_level("INFO"):
            save(model, tmp_path / "out", source=checkpoint, overwrite=True)
        assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].dtype == jnp.dtype(wanted)
        assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == wanted
        assert any(f"written as {wanted}" in message for message in caplog.messages) == (wanted != "float32")
    save(model, tmp_path / "out", source=checkpoint, dtype="bfloat16", overwrite=True)
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].dtype == jnp.bfloat16


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_new_files(umask, tmp_path):
    source = CASES / "turn-end-token/policy"
    before = os.umask(umask)
    try:
        save(load(source), tmp_path / "out", tokenizer=load_tokenizer(source), source=source, max_shard_bytes=20_000)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert "model-00001-of-00003.safetensors" in modes
    assert set(modes.values()) == {0o666 & ~umask}
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.robustness(
    "Numbers",
    given="a checkpoint with a weight that is NaN or infinite, or overflows the type that was asked for",
    outcome="refused with the tensor's name; such a model is not exported either",
)
def test_weights_that_are_not_finite(checkpoint, tmp_path):
    case = CASES / "nan-checkpoint/policy"
    tensor = "the tensor model.layers.0.mlp.down_proj.weight is not finite as float32"
    with pytest.raises(ValueError, match=rf"^{case}: {tensor} \(1 of the 384 values read\)"):
        load(case)
    name = "model.layers.1.input_layernorm.weight"
    model = load(checkpoint)
    for value, dtype, words in ((np.inf, "float32", "float32"), (7e4, "float16", "float16"), (-np.inf, "bfloat16", "")):
        rewrite(checkpoint, lambda tensors, x=value: tensors | {name: np.full_like(tensors[name], x)})
        with pytest.raises(ValueError, match=f"^{checkpoint}: the tensor {name} is not finite as {words}"):
            load(checkpoint, dtype=dtype)
    model.blocks.mlp_norm.scale.set_value(model.blocks.mlp_norm.scale[...].at[1, 3].set(jnp.nan))
    name = "model.layers.1.post_attention_layernorm.weight"
    with pytest.raises(ValueError, match=f"the tensor {name} is not finite as float32; the model is not written"):
        save(model, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama"]


def test_written_whole_or_not_at_all(checkpoint, tmp_path):
    class Broken(Words):
        def save_pretrained(self, directory):
            raise OSError("disk full")

    model = load(checkpoint)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="disk full"):
        save(model, tmp_path / "new", tokenizer=Broken())
    with pytest.raises(OSError, match="disk full"):
        save(model, checkpoint, tokenizer=Broken(), overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(FileExistsError, match="llama: exists already; pass overwrite=True"):
        save(model, checkpoint)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/diary.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="notes: is not a model directory"):
        save(model, tmp_path / "notes", overwrite=True)
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty", source=checkpoint)
    save(model, checkpoint, source=checkpoint, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "llama", "notes"]
    chex.assert_trees_all_equal(load(checkpoint), model)


def test_a_model_the_family_cannot_express_is_not_written(key, tmp_path):
    config = TransformerConfig(family="llama", norm="layer")
    with pytest.raises(ValueError, match="norm='layer' cannot be written as llama"):
        save(Transformer(key, config), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_sees_every_parameter():
    model = load(GOLDEN / "qwen2")
    leaves, structure = jax.tree_util.tree_flatten(model)
    seen = {fingerprint(model)}
    for i, leaf in enumerate(leaves):
        for change in (lambda x: x.at[(0,) * x.ndim].add(1e-3), lambda x: jnp.flip(x, -1), lambda x: -x):
            seen.add(
                fingerprint(jax.tree_util.tree_unflatten(structure, [*leaves[:i], change(leaf), *leaves[i + 1 :]]))
            )
    assert len(seen) == 1 + 3 * len(leaves)
    assert {len(name) for name in seen} == {16}


def test_fingerprint_is_of_the_function_not_of_how_it_runs():
    half = load(GOLDEN / "llama", dtype="bfloat16")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    assert fingerprint(half) == fingerprint(wide) != fingerprint(load(GOLDEN / "llama"))
    for how in ({"compute_dtype": "bfloat16"}, {"attention": "plain"}, {"attention": "fused", "remat": "none"}):
        structure = jax.tree_util.tree_structure(load(GOLDEN / "llama", **how))
        assert fingerprint(jax.tree_util.tree_unflatten(structure, jax.tree.leaves(half))) == fingerprint(half)
    other = dataclasses.replace(half.config, rope_theta=5e4)
    moved = jax.tree_util.tree_structure(jax.eval_shape(lambda: Transformer(jax.random.key(0), other)))
    assert fingerprint(jax.tree_util.tree_unflatten(moved, jax.tree.leaves(half))) != fingerprint(half)


def test_a_loaded_model_computes_as_it_was_told():
    assert (load(GOLDEN / "llama").config.attention, load(GOLDEN / "llama").config.remat) == ("auto", "full")
    told = load(GOLDEN / "llama", attention="plain", remat="dots").config
    assert (told.attention, told.remat) == ("plain", "dots")
    with pytest.raises(ValueError, match="attention must be one of auto, fused, plain; got 'flash'"):
        load(GOLDEN / "llama", attention="flash")


def without(*names):
    return lambda tensors: {k: v for k, v in tensors.items() if k not in names}


def with_tensor(name, value):
    return lambda tensors: tensors | {name: value}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("model.norm.weight"), "llama: the tensor model.norm.weight is missing"),
        (
            without("model.layers.1.self_attn.k_proj.bias"),
            r"llama: the tensor model.layers.1.self_attn.k_proj.bias is missing",
        ),
        (
            with_tensor("model.layers.1.mlp.up_proj.weight", np.zeros((32, 48), np.float32)),
            r"the tensor model.layers.1.mlp.up_proj.weight has shape \(32, 48\), its configuration says \(48, 32\)",
        ),
        (
            with_tensor("model.norm.weight", np.zeros(32, np.int8)),
            "model.safetensors: the tensor model.norm.weight is I8; supported: F64, F32, F16, BF16",
        ),
    ],
)
def test_names_the_tensor_that_is_wrong(checkpoint, change, words):
    rewrite(checkpoint, change)
    with pytest.raises(ValueError, match=words):
        load(checkpoint)


def test_truncated_file(checkpoint):
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    for size in (len(whole) - 1, 100, 4, 0):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{file}: truncated or not a safetensors file"):
            load(checkpoint)


def test_missing_files(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="/nowhere: no such directory or file"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"nowhere.gguf: no such directory or file"):
        load(tmp_path / "nowhere.gguf")
    with pytest.raises(ValueError, match=r"config.json: is neither a directory nor a .gguf file"):
        load(checkpoint / "config.json")
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"llama: only pickled weights \(pytorch_model.bin\), which are not read"
    ):
        load(checkpoint)
    (checkpoint / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"llama: no model.safetensors"):
        load(checkpoint)
    (checkpoint / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config.json: no such file"):
        load(checkpoint)


@pytest.mark.parametrize("file", ["model-00001-of-00002.safetensors", "../model.safetensors"])
def test_index_that_names_a_file_which_is_not_there(checkpoint, file):
    shutil.copy(checkpoint / "model.safetensors", checkpoint.parent)
    (checkpoint / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": file}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=f"index.json: names the file {file}, which is not in the directory"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "config.json: not valid JSON"),
        ("[]", "config.json: expected a JSON object, got a list"),
        ('{"model_type": "mamba"}', "config.json: model_type must be one of"),
        ('{"model_type": "llama", "auto_map": {"A": "b.C"}}', "config.json: auto_map is set"),
    ],
)
def test_bad_config(checkpoint, text, words):
    (checkpoint / "config.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{checkpoint}/{words}"):
        load(checkpoint)


def test_options():
    with pytest.raises(ValueError, match=r"dtype must be one of .*; got 'int8'"):
        load(GOLDEN / "llama", dtype="int8")
    with pytest.raises(ValueError, match=r"compute_dtype must be one of .*; got 'half'"):
        load(GOLDEN / "llama", compute_dtype="half")


def test_hub_id(monkeypatch):
    asked = []

    def download(name, *, revision, allow_patterns, ignore_patterns):
        asked.append((name, "config.json" in allow_patterns, any("bin" in p or "py" in p for p in allow_patterns)))
        return str(GOLDEN / "llama")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve("someone/some-model") == GOLDEN / "llama"
    chex.assert_trees_all_equal(load("someone/some-model"), load(GOLDEN / "llama"))
    assert asked == [("someone/some-model", True, False)] * 2

    def offline(name, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot reach the hub\nmore lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(FileNotFoundError) as error:
        load("someone/some-model")
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(
        "someone/some-model: no such directory, and the Hugging Face hub answers: cannot"
    )


def test_a_parameter_without_a_place():
    with pytest.raises(ValueError, match=r"a llama checkpoint has no tensor for the parameter blocks.query.lora_a"):
        locate(TransformerConfig(), "blocks.query.lora_a")
    assert set(families.FAMILY_TABLES) == set(families.BASE_PREFIX) == set(FAMILIES)
