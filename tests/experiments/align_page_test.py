import json
import pathlib
import re
import shutil

import pytest

from experiments import align_page
from experiments.align import __main__ as align
from tiltjax.align.evaluation import _plain
from tiltjax.train.evaluate import Point
from tiltjax.train.metrics import Interval

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = {
    "report_beta": 0.2,
    "optimum": Interval(0.5, 0.25, 0.75),
    "tilted_reward": Interval(0.0, 0.0, 1.0),
    "tilt_kl": Interval(1.0, 0.5, 1.5),
    "objective": Interval(0.25, 0.125, 0.375),
    "improvement": Interval(0.25, 0.125, 0.5),
    "points": {
        "reference": [Point("reference", None, Interval(0.0, -1.0, 1.0), Interval(0.0, 0.0, 0.0))],
        "soft_best_of_n": [
            Point("soft best-of-N", n, Interval(0.5, 0.25, 0.75), Interval(0.5, 0.5, 0.5)) for n in (1, 2)
        ],
        "best_of_n": [Point("best-of-N", 2, Interval(0.5, 0.25, 0.75), Interval(0.5, 0.5, 0.5))],
        "tuned": [Point("rloo", None, Interval(0.25, 0.125, 0.5), Interval(0.5, 0.25, 0.75))],
    },
}


def test_readme_has_the_figures_of_the_committed_run():
    """``python -m experiments.align_page`` makes them equal."""
    readme = (ROOT / "README.md").read_text()
    results = json.loads((ROOT / "docs" / "align" / "results.json").read_text())
    assert align_page.marked(readme, align_page.block(results)) == readme
    report = (ROOT / "docs" / "align" / "report.md").read_text()
    for line in align_page.block(results).splitlines():
        assert line in report
    assert not re.search(r"\d\.\d{2}", align.__doc__)  # What a run gives stands in one place.


@pytest.fixture
def clone(tmp_path):
    """A README with its marks, and a finished run."""
    (tmp_path / "README.md").write_text(f"before\n{align_page.BEGIN}\nold\n{align_page.END}\nafter\n")
    (tmp_path / "run").mkdir()
    for name in align_page.FILES:
        (tmp_path / "run" / name).write_text(name)
    (tmp_path / "run" / "results.json").write_text(json.dumps(_plain(RESULTS)))
    return tmp_path


def test_a_run_becomes_the_page(clone):
    align_page.update(clone, clone / "run")
    text = (clone / "README.md").read_text()
    assert text.startswith(f"before\n{align_page.BEGIN}\n| policy | reward |")
    assert text.endswith(f"\n{align_page.END}\nafter\n")
    assert "| rloo | 0.250 [0.125, 0.500] | 0.500 [0.250, 0.750] |" in text
    assert "At beta = 0.2, beta log Z = 0.500 [0.250, 0.750]" in text
    assert {path.name for path in (clone / "docs" / "align").iterdir()} == set(align_page.FILES)
    shutil.rmtree(clone / "run")
    align_page.update(clone, None)
    assert (clone / "README.md").read_text() == text


@pytest.mark.parametrize("broken", ["run", "begin", "end", "twice"])
def test_half_a_run_and_a_readme_without_marks_are_refused(clone, broken):
    readme = clone / "README.md"
    text = readme.read_text()
    if broken == "run":
        (clone / "run" / "ess.png").unlink()
    else:
        cut = {"begin": (align_page.BEGIN, ""), "end": (align_page.END, ""), "twice": ("old", align_page.BEGIN)}[broken]
        readme.write_text(text.replace(*cut))
    before = readme.read_text()
    with pytest.raises(ValueError, match="ess.png is missing" if broken == "run" else "must hold"):
        align_page.update(clone, clone / "run")
    assert readme.read_text() == before
    assert not (clone / "docs").exists()
