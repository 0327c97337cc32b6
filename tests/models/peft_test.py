import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tiltjax.models.pretrained import fingerprint, load, save

GOLDEN = Path(__file__).parent / "golden"
CASE = Path(__file__).parents[1] / "cases" / "adapter-directory" / "adapter"
OPTIONS = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 6,
    "lora_dropout": 0.1,
    "bias": "none",
    "modules_to_save": None,
    "use_dora": False,
    "inference_mode": True,
}
MODULES = {
    "llama": ["model.layers.{}.self_attn.q_proj", "model.layers.{}.mlp.down_proj"],
    "gpt_neox": ["gpt_neox.layers.{}.attention.query_key_value"],
    "gpt2": ["transformer.h.{}.attn.c_attn", "transformer.h.{}.mlp.c_fc"],
}


def write_adapter(folder, family, *, layers=(0, 1), base=None, rank=2, names=None, **options):
    """A random adapter of a golden model, as PEFT writes it; returns the changes of the tensors, not scaled."""
    rng, tensors, change = np.random.default_rng(0), {}, {}
    weights = load_file(GOLDEN / family / "model.safetensors")
    modules = [name.format(layer) for name in MODULES[family] for layer in layers] if names is None else names
    for module in modules:
        into, out = weights[f"{module}.weight"].shape if family == "gpt2" else weights[f"{module}.weight"].shape[::-1]
        r = rank(module) if callable(rank) else rank
        a, b = (rng.normal(size=shape).astype(np.float32) for shape in ((r, into), (out, r)))
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
        change[f"{module}.weight"] = (b @ a).T if family == "gpt2" else b @ a
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.rsplit(".", 1)[1] for module in modules})
    base = str(GOLDEN / family) if base is None else base
    config = OPTIONS | {"base_model_name_or_path": base, "target_modules": targets} | options
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return change


def check_merged(folder, family, change, scale, tmp_path):
    """The tensors of the loaded adapter are those of the base with the changes, and all others are the base's."""
    save(load(folder), tmp_path / "merged")
    merged, base = (load_file(d / "model.safetensors") for d in (tmp_path / "merged", GOLDEN / family))
    assert set(merged) == set(base)
    for name, tensor in base.items():
        wanted = tensor + scale(name) * change[name] if name in change else tensor
        np.testing.assert_allclose(merged[name], wanted, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.robustness(
    "Checkpoints",
    given="a directory with a low-rank adapter of PEFT instead of a model",
    outcome="read: merged into the base model that it names, with rank, alpha and rslora as configured",
)
@pytest.mark.parametrize("family", MODULES)
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_is_merged_into_its_base(family, rslora, tmp_path):
    change = write_adapter(tmp_path / "adapter", family, use_rslora=rslora)
    check_merged(tmp_path / "adapter", family, change, lambda _: 6 / 2**0.5 if rslora else 3.0, tmp_path)
    assert fingerprint(load(tmp_path / "adapter")) != fingerprint(load(GOLDEN / family))


def test_patterns_of_rank_and_alpha_and_layers(tmp_path):
    change = write_adapter(
        tmp_path / "adapter",
        "llama",
        layers=(1,),
        rank=lambda module: 3 if "down" in module else 2,
        rank_pattern={"down_proj": 3},
        alpha_pattern={r"^model\.layers\.1\.self_attn\.q_proj": 5, "mlp.down_proj": 9.0},
        layers_to_transform=[1],
        layers_pattern="layers",
    )
    check_merged(tmp_path / "adapter", "llama", change, lambda name: 3.0 if "down" in name else 2.5, tmp_path)


@pytest.mark.parametrize(
    "targets",
    [
        r"model\.layers\.\d+\.(self_attn\.q|mlp\.down)_proj",
        ["self_attn.q_proj", "model.layers.0.mlp.down_proj", "layers.1.mlp.down_proj"],
    ],
)
def test_targets_as_an_expression_or_as_names(targets, tmp_path):
    change = write_adapter(tmp_path / "adapter", "llama", target_modules=targets)
    check_merged(tmp_path / "adapter", "llama", change, lambda _: 3.0, tmp_path)


def test_all_linear_less_what_is_excluded(tmp_path):
    names = [n.removesuffix(".weight") for n, t in load_file(GOLDEN / "llama/model.safetensors").items() if t.ndim == 2]
    names = [name for name in names if "embed" not in name and "lm_head" not in name and "gate" not in name]
    options = {"target_modules": "all-linear", "exclude_modules": ["gate_proj"]}
    change = write_adapter(tmp_path / "adapter", "llama", names=names, **options)
    check_merged(tmp_path / "adapter", "llama", change, lambda _: 3.0, tmp_path)


def test_the_base_may_lie_beside_the_adapter_and_gives_what_the_adapter_lacks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = Path(shutil.copytree(GOLDEN / "llama", tmp_path / "base"))
    (base / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    (base / "chat_template.jinja").write_text("of the base")
    write_adapter(tmp_path / "adapter", "llama", base="../base")
    (tmp_path / "adapter/chat_template.jinja").write_text("of the adapter")
    save(load(tmp_path / "adapter"), tmp_path / "out", source=tmp_path / "adapter")
    assert (tmp_path / "out/generation_config.json").read_text() == '{"eos_token_id": [3, 4]}'
    assert (tmp_path / "out/chat_template.jinja").read_text() == "of the adapter"
    assert not (tmp_path / "out/adapter_config.json").exists()


@pytest.mark.robustness(
    "Checkpoints",
    given="an adapter whose base model is not there",
    outcome="one line that names the adapter, its base model and where to write the path of it",
)
def test_the_base_model_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    adapter = shutil.copytree(CASE, tmp_path / "adapter")
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    words = "adapter: holds an adapter of the base model 'base/model', which cannot be read .* in adapter_config.json$"
    with pytest.raises(FileNotFoundError, match=words):
        load(adapter)


def offline(*_, **__):
    raise OSError("no connection")


@pytest.mark.robustness(
    "Checkpoints",
    given="an adapter with an option that cannot be honoured (DoRA, saved modules, biases, PiSSA, another kind)",
    outcome="refused with file, option and value",
)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"bias": "lora_only"}, "bias='lora_only' is not supported"),
        ({"trainable_token_indices": [1]}, r"trainable_token_indices=\[1\] is not supported"),
        ({"an_option_of_tomorrow": 3}, "an_option_of_tomorrow=3 is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base model too"),
        ({"r": "2"}, "r must be an integer between 1 and 2147483647, got '2'"),
        ({"r": True}, "r must be an integer .*, got True"),
        ({"lora_alpha": None}, "lora_alpha must be a finite number above 0, got None"),
        ({"use_rslora": "yes"}, "use_rslora must be true or false, got 'yes'"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj must be an integer between 1 .* got 0"),
        ({"rank_pattern": [2]}, r"rank_pattern must be an object or null, got \[2\]"),
        ({"target_modules": None}, "target_modules must be a list of texts, got None"),
        ({"target_modules": "q_proj("}, "target_modules is not a regular expression"),
        ({"layers_to_transform": "all"}, "layers_to_transform must be an integer, a list .*, got 'all'"),
        ({"base_model_name_or_path": ""}, "base_model_name_or_path must name the base model, got ''"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path must be a text, got 3"),
        ({"base_model_name_or_path": "."}, "base_model_name_or_path must not be an adapter itself, got '.'"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_honoured(options, words, tmp_path, monkeypatch):
    adapter = tmp_path / "adapter"
    write_adapter(adapter, "llama")
    monkeypatch.chdir(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text()) | options
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"^{adapter}/adapter_config.json: {words}"):
        load(adapter)


def rename(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def put(name, value):
    return lambda tensors: tensors | {f"base_model.model.model.layers.0.self_attn.q_proj.{name}.weight": value}


@pytest.mark.robustness(
    "Checkpoints",
    given="an adapter whose tensors do not fit its configuration or its base model, or are not finite",
    outcome="refused with file and module; no part of an adapter is left out",
)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rename("lora_A", "lora_magnitude_vector"), "lora_magnitude_vector.weight is not one of a pair"),
        (rename("0.self_attn.q_proj", "7.self_attn.q_proj"), "adapts model.layers.7.self_attn.q_proj, which the base"),
        (rename("q_proj", "v_proj"), "no adapter of model.layers.0.self_attn.q_proj, which adapter_config.json names"),
        (lambda tensors: {k: v for k, v in tensors.items() if "q_proj.lora_B" not in k}, "lora_B of .* is missing"),
        (lambda tensors: {}, "holds no tensors"),
        (put("lora_A", np.zeros((2, 31), np.float32)), r"has A \(2, 31\) and B .*, its base has a weight of shape"),
        (put("lora_A", np.full((2, 32), np.nan, np.float32)), "lora_A of .*q_proj holds values that are not finite"),
        (
            lambda tensors: {k: np.concatenate([v, v], int("_B" in k)) for k, v in tensors.items()},
            "has rank 4, .* says 2",
        ),
    ],
)
def test_tensors_that_do_not_fit(change, words, tmp_path):
    write_adapter(tmp_path / "adapter", "llama")
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in change(load_file(file)).items()}, file)
    with pytest.raises(ValueError, match=f"^{file}: .*{words}"):
        load(tmp_path / "adapter")


def test_files_that_are_missing_or_too_many(tmp_path):
    write_adapter(tmp_path / "adapter", "llama")
    shutil.copy(GOLDEN / "llama/model.safetensors", tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter: holds a model \(model.safetensors\) and an adapter"):
        load(tmp_path / "adapter")
    (tmp_path / "adapter/model.safetensors").unlink()
    (tmp_path / "adapter/adapter_model.safetensors").rename(tmp_path / "adapter/adapter_model.bin")
    with pytest.raises(FileNotFoundError, match=r"adapter_model.safetensors: no such file \(pickled weights are not"):
        load(tmp_path / "adapter")
