import doctest
import importlib
import json
import pathlib
import re
import shlex

import pytest
from absl import flags

from experiments.common.flags import define_flags
from tests.tiny import save_policy
from tiltjax.data.rows import parse_row

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


PAGES = {path.name: path.read_text() for path in (ROOT / "docs" / "kernels.md", ROOT / "docs" / "running.md")}


def test_the_page_is_short():
    assert len(README.splitlines()) < 120


@pytest.mark.parametrize(("text", "least"), [(README, 8), (PAGES["kernels.md"], 2)], ids=["README.md", "kernels.md"])
def test_the_examples_print_what_they_say(text, least):
    blocks = re.findall(r"```python\n(>>>.*?)```", text, re.DOTALL)
    test = doctest.DocTestParser().get_doctest("".join(blocks), {}, "page", "page", 0)
    assert len(test.examples) >= least
    out = []
    doctest.DocTestRunner().run(test, out=out.append)
    assert not out, "".join(out)


def test_the_session_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    """With a tiny policy: on the real one the notebook does the same."""
    save_policy(tmp_path / "policy", ["<eos>", "<pad>", ",", "the", "cook", "said"])
    code = re.search(r"```python\n(import tiltjax\n.*?)```", README, re.DOTALL)[1]
    assert code.count('"smollm2"') == 1
    assert len(code.splitlines()) <= 21
    monkeypatch.chdir(tmp_path)
    exec(code.replace('"smollm2"', '"policy"'), {})
    assert "| tilted_mle |" in capsys.readouterr().out
    assert (tmp_path / "runs" / "mine" / "hf" / "model.safetensors").exists()


def test_every_flag_and_program_of_the_pages_exists():
    """A command of a page is one that the program takes."""
    commands = re.findall(
        r"^python -m (experiments\.[a-z_]+)((?:[^\n]*\\\n)*[^\n]*)$", PAGES["running.md"], re.MULTILINE
    )
    assert len(commands) > 5
    for module, line in commands:
        values = flags.FlagValues()
        main = importlib.import_module(f"{module}.__main__")
        configs = {getattr(main, name) for name in ("AlignConfig", "OnlineConfig", "RewardConfig", "PlanConfig")
                   if getattr(getattr(main, name, None), "__module__", "").startswith(module)}  # fmt: skip
        for config in configs:
            define_flags(config, values)
        assert len(configs) == 1
        values(shlex.split(f"{module} {line}".replace("\\\n", " ")))


def test_the_kinds_of_rows_are_those_of_the_page():
    rows = re.search(r"```json\n(.*?)```", PAGES["running.md"], re.DOTALL)[1].splitlines()
    kinds = ("prompt", "prompt", "supervised", "pair", "unpaired", "ranked")
    for row, kind in zip(rows, kinds, strict=True):
        parse_row(json.loads(row), kind)


def test_ci_runs_the_readmes_commands():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "make test" in README
    assert re.search(r"^make test$", ci, re.MULTILINE)


def test_every_call_of_the_table_exists():
    names = re.findall(r"^\| `([a-z_.]+\.[a-z_]+)`", PAGES["kernels.md"], re.MULTILINE)
    assert len(names) > 8
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"tiltjax.{module}"), attribute), name
