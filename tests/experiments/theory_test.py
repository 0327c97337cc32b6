import pathlib
import re

import pytest

from experiments.theory import __main__ as program
from experiments.theory import claims


def test_every_family_is_judged_in_a_file_of_the_folder():
    """Several files, so that several workers share the work."""
    folder = pathlib.Path(__file__).parent / "theory"
    judged = [
        name for path in folder.glob("*_test.py") for name in re.findall(r'^    "(\w+)",$', path.read_text(), re.M)
    ]
    assert sorted(judged) == sorted(program.FAMILIES)


class TestVerdicts:
    def test_equal(self):
        assert claims.equal("c", "f", 1.0, 1.001, rtol=0.01).verdict == "confirmed"
        assert claims.equal("c", "f", 1.0, 1.1, rtol=0.01).verdict == claims.FAILED
        assert claims.equal("c", "f", float("nan"), 1.0, rtol=0.01).verdict == claims.FAILED

    def test_at_most(self):
        assert claims.at_most("c", "f", 1.0, 1.0, verdict="sharpened").verdict == "sharpened"
        assert claims.at_most("c", "f", 1.1, 1.0).verdict == claims.FAILED
        assert claims.at_most("c", "f", float("nan"), 1.0).verdict == claims.FAILED

    def test_an_unknown_verdict_is_refused(self):
        with pytest.raises(ValueError, match="verdict: 'proved'"):
            claims.holds("c", "f", 1.0, "1", True, verdict="proved")


def test_an_unknown_family_is_refused():
    with pytest.raises(ValueError, match="astrology"):
        program.families(["astrology"])


def test_the_index_counts_and_links():
    (family,) = program.families(["soft_best_of_n"])
    judged = {family.name: [claims.equal("c", "f", 1, 1), claims.equal("d", "g", 1, 1, verdict="refuted")]}
    section = claims.nested("# Title\n\n![a](a.png) [paper](https://x.org)", "theory/x")
    page = claims.index([family], judged, [section], "the command")
    assert "| 1 | 0 | 1 |" in page
    assert "![a](theory/x/a.png) [paper](https://x.org)" in page
    assert page.rstrip().endswith("```\nthe command\n```")
