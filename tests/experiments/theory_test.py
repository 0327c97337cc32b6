import re

import jax
import pytest

from experiments.theory import __main__ as program
from experiments.theory import claims


@pytest.mark.alone
@pytest.mark.parametrize("name", program.FAMILIES)
def test_no_claim_fails(name, tmp_path):
    (family,) = program.families([name])
    body, judged = claims.run(family, tmp_path, fast=True)
    assert not [c for c in judged if c.verdict == claims.FAILED]
    assert len(judged) >= 6
    report = (tmp_path / "report.md").read_text()
    assert report.startswith(body)
    assert f"python -m experiments.theory.{name} --fast" in report
    for image in re.findall(r"\]\((\w+\.png)\)", report):
        assert 0 < (tmp_path / image).stat().st_size < 200_000
    assert not jax.config.jax_enable_x64  # The page's precision is its own.


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
