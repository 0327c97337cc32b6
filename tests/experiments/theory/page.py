import re

import jax
import matplotlib.pyplot as plt

from experiments.theory import __main__ as program
from experiments.theory import claims


def check(name, tmp_path):
    """Runs the fast half of a family: no claim fails, and the page is whole."""
    (family,) = program.families([name])
    with plt.rc_context({"savefig.dpi": 40}):
        body, judged = claims.run(family, tmp_path, fast=True)
    assert not [c for c in judged if c.verdict == claims.FAILED]
    assert len(judged) >= 6
    report = (tmp_path / "report.md").read_text()
    assert report.startswith(body)
    assert f"python -m experiments.theory.{name} --fast" in report
    for image in re.findall(r"\]\((\w+\.png)\)", report):
        assert 0 < (tmp_path / image).stat().st_size < 40_000  # Five times as much at the dpi of a page.
    assert not jax.config.jax_enable_x64  # The page's precision is its own.
