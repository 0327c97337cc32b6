import importlib.util
import json
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import transformers

from tiltjax.data.tokenizer_files import load_tokenizer

CASES = Path(__file__).parents[1] / "cases"
HELLO = [{"role": "user", "content": "hé"}]


@pytest.fixture
def policy(tmp_path):
    """A policy's directory that a test may damage."""
    return Path(shutil.copytree(CASES / "policy", tmp_path / "policy"))


def test_folder(make_tokenizer, tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    for source in (tmp_path, str(tmp_path)):
        tokenizer = load_tokenizer(source)
        assert tokenizer.encode("hé", add_special_tokens=False) == list("hé".encode())
        assert tokenizer.chat_template == make_tokenizer().chat_template


@pytest.mark.robustness(
    "Checkpoints",
    given="a policy without a tokenizer",
    outcome="one line that names the directory and the files that would be one",
)
def test_paths_that_lead_nowhere(tmp_path, policy):
    for source in (tmp_path / "none", "./none", "/none/such", "none/model.gguf"):
        with pytest.raises(FileNotFoundError, match=r"none.*: no such directory or file|such: no such directory"):
            load_tokenizer(source)
    (tmp_path / "notes.txt").write_text("no tokenizer")
    with pytest.raises(ValueError, match=r"notes\.txt: is neither a directory nor a .gguf file"):
        load_tokenizer(tmp_path / "notes.txt")
    (policy / "tokenizer.json").unlink()
    with pytest.raises(
        FileNotFoundError, match=rf"^{policy}: no tokenizer there: none of tokenizer.json, .*, vocab.json$"
    ):
        load_tokenizer(policy)


@pytest.mark.robustness(
    "Checkpoints",
    given="a hub id without a connection (or with HF_HUB_OFFLINE), not in the cache",
    outcome="one line at once; the hub is asked one time",
)
def test_the_hub_is_asked_once(monkeypatch):
    asked = []

    def offline(name, **options):
        asked.append((name, "*.safetensors" in options["allow_patterns"]))
        raise huggingface_hub.errors.LocalEntryNotFoundError("Got: cannot reach the hub\nmore about it\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    words = "^a/b: no such directory, and the Hugging Face hub answers: cannot reach the hub$"
    with pytest.raises(FileNotFoundError, match=words):
        load_tokenizer("a/b")
    assert asked == [("a/b", False)]
    monkeypatch.undo()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"^a/b: no such directory, and the .* answers: Cannot find .* cached"):
        load_tokenizer("a/b")


def test_a_hub_id_is_its_snapshot(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(CASES / "policy"))
    assert load_tokenizer("a/b").chat_template == load_tokenizer(CASES / "policy").chat_template


def test_a_repositorys_code_is_never_run(make_tokenizer, tmp_path):
    make_tokenizer().save_pretrained(tmp_path)
    sentinel = tmp_path / "ran"
    (tmp_path / "custom.py").write_text(f"open({str(sentinel)!r}, 'w')\nclass Custom: pass\n")
    config = '{"auto_map": {"AutoTokenizer": ["custom.Custom", "custom.Custom"]}, "tokenizer_class": "Custom"}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    with pytest.raises(ValueError, match=r"the tokenizer cannot be read: .* contains custom code"):
        load_tokenizer(tmp_path)
    assert not sentinel.exists()


@pytest.mark.robustness(
    "Checkpoints",
    given="a tokenizer that is a SentencePiece or tiktoken model alone, without the package that reads it",
    outcome="refused with the file and the packages to install",
)
def test_sentencepiece_alone(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("sentencepiece", "tiktoken") else find(name)
    )
    folder = Path(shutil.copytree(CASES / "sentencepiece-only/policy", tmp_path / "policy"))
    file = folder / "tokenizer.model"
    with pytest.raises(ImportError, match=f"^{file}: .* read with: pip install sentencepiece protobuf$"):
        load_tokenizer(folder)
    file.write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(ImportError, match=f"^{file}: .* read with: pip install tiktoken$"):
        load_tokenizer(folder)


def test_an_adapter_has_the_tokenizer_of_its_base_unless_it_brings_one(tmp_path, policy):
    adapter = Path(shutil.copytree(CASES / "adapter-directory/adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(policy)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (policy / "chat_template.jinja").write_text("of the base")
    assert load_tokenizer(adapter).chat_template != "of the base"
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (adapter / name).unlink()
    assert load_tokenizer(adapter).chat_template == "of the base"


@pytest.mark.robustness(
    "Checkpoints",
    given="a file beside the tokenizer that is no JSON object, or a special token that is no text",
    outcome="one line with file and field",
)
@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", "[]", "expected a JSON object, got a list"),
        ("config.json", '{"model_type": 3}', "model_type must be a text, got 3"),
        ("config.json", '{"tokenizer_class": []}', r"tokenizer_class must be a text, got \[\]"),
        ("tokenizer_config.json", "null", "expected a JSON object, got null"),
        ("tokenizer_config.json", "{", "not valid JSON"),
        ("tokenizer_config.json", '{"eos_token": 5}', "eos_token must be a text, an object .*; got 5"),
        ("tokenizer_config.json", '{"pad_token": {"content": 5}}', "pad_token must be a text, an object .*; got {'con"),
        ("special_tokens_map.json", '{"bos_token": ["<s>"]}', r"bos_token must be a text, .*; got \['<s>'\]"),
        ("added_tokens.json", "3", "expected a JSON object, got a number"),
    ],
)  # fmt: skip
def test_files_beside_the_tokenizer(file, content, words, policy):
    (policy / file).write_text(content)
    with pytest.raises(ValueError, match=rf"^{policy}/{file}: {words}"):
        load_tokenizer(policy)


def test_the_size_of_the_model_is_no_matter_of_the_tokenizer(policy, monkeypatch):
    """Transformers would build a list with an entry for each of a thousand million layers."""
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)
    config = json.loads((policy / "config.json").read_text()) | {"num_hidden_layers": 10**9, "hidden_size": "x"}
    (policy / "config.json").write_text(json.dumps(config))
    wanted = load_tokenizer(CASES / "policy")
    assert load_tokenizer(policy).apply_chat_template(HELLO) == wanted.apply_chat_template(HELLO)
    (policy / "config.json").write_text(json.dumps(config | {"model_type": "none_that_is_known"}))
    assert load_tokenizer(policy).encode("hé") == wanted.encode("hé")


@pytest.mark.robustness(
    "Checkpoints",
    given="a damaged tokenizer.json: cut short, or with values of other types",
    outcome="one line with the directory and what is wrong",
)
def test_damaged_tokenizers(policy):
    file = policy / "tokenizer.json"
    whole = file.read_text()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 2):
        file.write_text(whole[:size])
        check_refused(policy)
    rng, content = np.random.default_rng(0), json.loads(whole)
    junk = (None, [], {}, "x", 7, -1, 1e30, True, [{}], {"type": "None"})
    for name in (*content, "model.type", "model.vocab", "model.merges", "model.byte_fallback", "model.unk_token"):
        value = junk[int(rng.integers(len(junk)))]
        head, _, tail = name.partition(".")
        change = {head: content[head] | {tail: value} if tail else value}
        file.write_text(json.dumps(content | change))
        check_refused(policy, may_load=True)


def check_refused(folder, *, may_load=False):
    try:
        load_tokenizer(folder)
    except ValueError as refused:
        words = str(refused)
        if "\n" in words or not words.startswith(f"{folder}"):
            pytest.fail(words)
        return
    assert may_load
