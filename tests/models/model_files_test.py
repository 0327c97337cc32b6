import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tiltjax.models.config import FAMILIES, TransformerConfig, config_from_hf
from tiltjax.models.model_files import open_model
from tiltjax.models.pretrained import load, save

GOLDEN = Path(__file__).parent / "golden"
CASES = Path(__file__).parents[1] / "cases"


@pytest.fixture
def checkpoint(tmp_path):
    """A Llama checkpoint that a test may damage."""
    return Path(shutil.copytree(GOLDEN / "llama", tmp_path / "llama"))


def rewrite_config(directory, **fields):
    hf = json.loads((directory / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(hf))


@pytest.mark.robustness(
    "Checkpoints",
    given="tie_word_embeddings, and a head in the file that is not the embedding",
    outcome="the head of the file is used, and one line says so",
)
def test_a_head_beside_a_tied_embedding(caplog, tmp_path):
    case = CASES / "head-beside-tied/policy"
    model = load(case)
    wanted = load_file(case / "model.safetensors")["lm_head.weight"]
    np.testing.assert_array_equal(model.head[...], wanted)
    assert not model.config.tied
    assert caplog.messages == [
        f"{case}/config.json: says tie_word_embeddings, but the head has values of its own, which are used"
    ]
    caplog.clear()
    save(model, tmp_path / "out", source=case)
    np.testing.assert_array_equal(load(tmp_path / "out").head[...], wanted)
    assert not any("tie_word" in message for message in caplog.messages[1:])


def test_a_head_that_is_the_embedding_is_tied(tmp_path, caplog):
    directory = Path(shutil.copytree(CASES / "head-beside-tied/policy", tmp_path / "policy"))
    tensors = load_file(directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, directory / "model.safetensors")
    assert load(directory).head is None
    assert caplog.messages == []


@pytest.mark.robustness(
    "Checkpoints",
    given="config.json asks for more layers than the file has (a thousand million of them)",
    outcome="refused at once with the first layer that is missing; nothing is built",
)
@pytest.mark.parametrize("count", [3, 10**9])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_layers_without_tensors(family, count, tmp_path, monkeypatch):
    directory = Path(shutil.copytree(GOLDEN / family, tmp_path / family))
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    rewrite_config(directory, **{name: count})
    monkeypatch.setattr(jax, "eval_shape", None)
    with pytest.raises(
        ValueError, match=f"^{directory}/config.json: {name} is {count}, but the tensors of layer 2 are"
    ):
        load(directory)


def test_layers_without_the_base_prefix_and_a_gap(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    save_file({k.removeprefix("model."): v for k, v in tensors.items()}, checkpoint / "model.safetensors")
    assert open_model(checkpoint).config.num_layers == 2
    save_file({k: v for k, v in tensors.items() if ".0." not in k}, checkpoint / "model.safetensors")
    with pytest.raises(ValueError, match="num_hidden_layers is 2, but the tensors of layer 0 are missing"):
        load(checkpoint)


@pytest.mark.robustness(
    "Checkpoints",
    given="an end id, a padding id or a weight map of another type",
    outcome="refused with file and field before weights are read",
)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id must be an integer, a list of integers or null, got '</s>'"),
        ({"eos_token_id": [1, None]}, r"eos_token_id must be .*, got \[1, None\]"),
        ({"bos_token_id": True}, "bos_token_id must be an integer or null, got True"),
        ({"pad_token_id": [0]}, r"pad_token_id must be an integer or null, got \[0\]"),
    ],
)
def test_special_ids_of_another_type(fields, words, checkpoint):
    rewrite_config(checkpoint, **fields)
    with pytest.raises(ValueError, match=f"^{checkpoint}/config.json: {words}"):
        load(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": 3}}')
    with pytest.raises(ValueError, match=r"index.json: weight_map must give the name of a file for every tensor"):
        load(checkpoint)


def test_a_directory_of_gguf_files_is_told_apart(tmp_path):
    shutil.copy(CASES / "llama31-gguf/model.gguf", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"the directory holds GGUF files: name one, such as model.gguf"):
        load(tmp_path)


def logits(model):
    """At every position of a text of 64 tokens: beyond 32, where the scaling of this model begins."""
    tokens = jax.random.randint(jax.random.key(0), (1, 64), 0, 256)
    score = jax.jit(lambda m: m.score(tokens[:, :1], jnp.ones((1, 1), bool), tokens[:, None, 1:]).logp)
    return score(model)


@pytest.mark.robustness(
    "Checkpoints",
    given="a GGUF file of Llama 3.1 to 3.3, whose rotary scaling is the tensor rope_freqs.weight",
    outcome="read as the scaling that it came from; log-probabilities are those of the Hugging Face directory",
)
def test_llama31_as_gguf_is_the_directory(tmp_path):
    directory, file = load(CASES / "llama31-gguf/hf"), load(CASES / "llama31-gguf/model.gguf")
    assert file.config == directory.config
    assert file.config.rope_scaling == ("llama3", 8.0, 1.0, 4.0, 32.0)
    np.testing.assert_allclose(logits(file), logits(directory), atol=1e-3)
    save(file, tmp_path / "out", source=CASES / "llama31-gguf/model.gguf")
    assert load(tmp_path / "out").config == directory.config


JUNK = (None, "", "64", [], [1], {}, {"a": 1}, True, -1, 0, 1, 7, 1.5, 64.0, math.nan, math.inf, 1e30, 10**30, 2**31)


@pytest.mark.robustness(
    "Checkpoints",
    given="config.json with a field of any other type or size, null, or left out",
    outcome="refused with the path and the field, or read with the meaning it has in transformers",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_fields_of_config_json_are_read_or_refused(family, tmp_path):
    hf = json.loads((GOLDEN / family / "config.json").read_text())
    hf |= {"rope_scaling": {"rope_type": "linear", "factor": 2.0}} if family != "gpt2" else {}
    types = {field: type(value) for field, value in vars(config_from_hf(hf)).items()}
    rng = np.random.default_rng(0)
    changes = [{name: value} for name in hf for value in JUNK if not (name == "model_type" and value == "llama")]
    changes += [
        {"rope_scaling": {"rope_type": kind, "factor": value}} for kind in ("linear", "llama3", 3) for value in JUNK
    ]
    pairs = rng.choice(sorted(hf), (20, 2))
    changes += [dict.fromkeys(pair.tolist(), JUNK[int(rng.integers(len(JUNK)))]) for pair in pairs]
    for change in changes:
        try:
            config = config_from_hf(hf | change)
        except ValueError as refused:
            words = str(refused)
            named = [name for name in (*change, "rope_type") if name in words]
            if "\n" in words or not named:
                pytest.fail(f"{change}: {words}")
            continue
        for field, kind in types.items():
            value = getattr(config, field)
            assert isinstance(value, kind) or field in ("sliding_window", "rope_scaling", "rope_theta"), (change, field)
            assert not (isinstance(value, float) and not 0 < value < math.inf), (change, field)


@pytest.mark.parametrize("seed", range(6))
def test_damaged_configurations_never_load_into_something_else(seed, checkpoint):
    """The same, through `load`: what is not refused by its field is refused by the shape of a tensor, or is a model."""
    rng = np.random.default_rng(seed)
    before = json.loads((checkpoint / "config.json").read_text())
    for _ in range(12):
        name = sorted(before)[int(rng.integers(len(before)))]
        rewrite_config(checkpoint, **before | {name: JUNK[int(rng.integers(len(JUNK)))]})
        try:
            config = open_model(checkpoint).config
        except ValueError as refused:
            words = str(refused)
            if "\n" in words or not words.startswith(f"{checkpoint}/config.json: "):
                pytest.fail(words)
            continue
        assert isinstance(config, TransformerConfig)
