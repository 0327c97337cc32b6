import dataclasses
import json
import math
import pathlib
import re

import pytest

from tests import smoke
from tiltjax.train.method import FEEDBACK, SOURCES
from tiltjax.train.methods import FAMILIES, METHODS

ROOT = pathlib.Path(__file__).parents[1]
ALL = [METHODS[name] for name in smoke.METHODS]


def test_ci_walks_the_real_paths():
    assert re.search(r"^make smoke$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    assert re.search(r"^smoke:.*\n\t.*-m tests\.smoke$", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_source_and_kind_of_record_is_walked():
    assert {source for record in ALL for source in record.sources} == set(SOURCES)
    assert {record.feedback for record in ALL} == set(FEEDBACK)
    for kind in ("critics", "memory", "constrained"):
        assert any(getattr(record, kind) for record in ALL), kind
    for family, records in FAMILIES.items():
        assert {record.name for record in ALL} & {record.name for record in records}, family


def test_every_notebook_is_walked():
    notebooks = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert {f"notebook_{name}" for name in notebooks} <= set(smoke.JOBS)


def test_a_number_that_is_not_finite_is_named():
    smoke.check_finite({"a": [1.0, None, "x", 3]})
    with pytest.raises(ValueError, match=r"results\.a\[1\]\.b must be finite, got nan"):
        smoke.check_finite({"a": [0, {"b": math.nan}]})


def test_lines_of_metrics_are_counted(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"loss": 1.0}) + "\n")
    smoke.check_metrics(tmp_path, 1)
    with pytest.raises(ValueError, match="must have 2 lines, got 1"):
        smoke.check_metrics(tmp_path, 2)


def test_a_job_that_fails_says_why(tmp_path, monkeypatch):
    def fails(folder):
        raise ValueError(f"nothing in {folder.name}")

    monkeypatch.setattr(smoke, "JOBS", {"fails": fails, "passes": lambda folder: None})
    name, _, reason = smoke._run("fails", str(tmp_path))
    assert name == "fails"
    assert "nothing in" in reason
    assert smoke._run("passes", str(tmp_path))[2] == ""


def test_sizes_are_those_of_a_run():
    from experiments.align.config import AlignConfig

    assert set(smoke.SIZES) <= {item.name for item in dataclasses.fields(AlignConfig)}
