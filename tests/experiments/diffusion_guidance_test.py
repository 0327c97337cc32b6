"""The committed figures are judged again, the report is written from them, and one stage runs, tiny."""

import copy
import json
import pathlib

import jax
import numpy as np
import pytest

from experiments.diffusion_guidance import __main__ as experiment
from experiments.diffusion_guidance import world as guidance_world
from experiments.theory.claims import FAILED

DOCS = pathlib.Path(__file__).parents[2] / "docs" / "diffusion_guidance"
STAGES = ("gaussian", "finite", "line", "particles")


@pytest.fixture(scope="module")
def committed():
    return json.loads((DOCS / "results.json").read_text())


@pytest.fixture(scope="module")
def plane():
    return guidance_world.plane(jax.random.key(0), num_steps=12, num_samples=40)


def test_committed_figures_hold(committed):
    facts = experiment.judge(committed, quick=False)
    assert len(facts) > 25
    assert not [fact for fact in facts if fact.verdict == FAILED]
    assert {fact.verdict for fact in facts} == {"confirmed", "sharpened", "refuted"}
    for fact in facts:
        assert fact.claim in (DOCS / "report.md").read_text().replace("\\|", "|")


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("gaussian", "sde_limit"), 0.40),
        (("gaussian", "doob"), 1.01),
        (("finite", "displacement", "4"), 1.0),
        (("finite", "limit", "2"), 0.3875),
        (("finite", "worst"), 0.5),
        (("line", "tv", "soft_value"), 0.01),
        (("line", "inverse", "2.0"), 1.6),
        (("particles", "estimates", "plug-in value", "mean"), 1.3),
    ],
)
def test_another_figure_fails(committed, place, value):
    changed = copy.deepcopy(committed)
    at = changed
    for name in place[:-1]:
        at = at[name]
    at[place[-1]] = value
    assert FAILED in [fact.verdict for fact in experiment.judge(changed, quick=False)]


def test_the_plane_has_every_sampler_and_a_law(plane):
    assert tuple(plane["samples"]) == guidance_world.SAMPLERS
    assert all(x.shape == (40, 2) and np.isfinite(x).all() for x in plane["samples"].values())
    assert plane["tilt"].sum() == pytest.approx(1, rel=1e-6)
    # The class is the arc above: guidance leaves the middle, no guidance does not.
    inside = {name: (np.hypot(x[:, 0], x[:, 1] + 0.4) < 1.0).mean() for name, x in plane["samples"].items()}
    assert inside["p(x): no guidance"] > 0.15
    assert max(inside["guidance, DDPM"], inside["guidance, flow"]) < 0.05


def test_a_run_leaves_its_report_and_is_not_overwritten(committed, plane, tmp_path, monkeypatch):
    for name in STAGES:
        monkeypatch.setattr(guidance_world, name, lambda *arguments, name=name: committed[name])
    monkeypatch.setattr(guidance_world, "plane", lambda *arguments: plane)
    config = experiment.GuidanceConfig(output=str(tmp_path / "run"), seed=3)
    results, facts = experiment.run(config)
    written = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {name: written[name] for name in STAGES} == {name: committed[name] for name in STAGES}
    assert [fact["verdict"] for fact in written["facts"]] == [fact.verdict for fact in facts]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "python -m experiments.diffusion_guidance" in report
    assert "--seed=3" in report
    for name in ("plane", "variance", "finite_n", "densities"):
        assert f"({name}.png)" in report
        assert (tmp_path / "run" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="there is a run already; pass --overwrite to remove it"):
        experiment.run(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 10}, "num_steps must be at least 50, got 10"),
        ({"num_samples": 10}, "num_samples must be at least 200, got 10"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        experiment.GuidanceConfig(**options)


def test_bad_flags_end_in_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "from_flags", lambda config: config(num_steps=1, output=str(tmp_path / "run")))
    with pytest.raises(SystemExit) as stop:
        experiment.main(["guidance"])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err == "error: num_steps must be at least 50, got 1\n"
    assert not (tmp_path / "run").exists()
