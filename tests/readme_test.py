import doctest
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_examples_print_what_they_say():
    blocks = re.findall(r"```python\n(>>>.*?)```", README, re.DOTALL)
    test = doctest.DocTestParser().get_doctest("".join(blocks), {}, "README.md", "README.md", 0)
    assert len(blocks) == 2
    assert len(test.examples) > 10
    out = []
    doctest.DocTestRunner().run(test, out=out.append)
    assert not out, "".join(out)


def test_ci_runs_the_readmes_commands():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "make test" in README
    assert re.search(r"^make test$", ci, re.MULTILINE)


def test_every_call_of_the_table_exists():
    import importlib

    names = re.findall(r"^\| `([a-z_.]+\.[a-z_]+)`", README, re.MULTILINE)
    assert len(names) > 8
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(f"tiltjax.{module}"), attribute), name
