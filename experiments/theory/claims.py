"""What a family of claims is, how a claim is judged, and how the page about it is written."""

import dataclasses
import math
import pathlib
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import matplotlib as mpl
from absl import flags

mpl.use("Agg")
import matplotlib.pyplot as plt

from experiments.common.flags import from_flags
from experiments.common.launch import program, run_program
from experiments.common.plots import STYLE
from experiments.common.run_directory import locked
from tiltjax.train.config import field, output_field, write_text

__all__ = [
    "FAILED",
    "PALETTE",
    "VERDICTS",
    "Claim",
    "Family",
    "at_most",
    "equal",
    "holds",
    "index",
    "main",
    "nested",
    "run",
    "show",
    "table",
]

flags.disclaim_key_flags()  # The flags of `main` belong to the family that is run.

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito (2008): safe for colour-blind readers. Theory is drawn as lines, computation as markers."""

VERDICTS = ("confirmed", "sharpened", "refuted")
"""What a computation can say about a statement; `FAILED` where it does not say what the page says."""

FAILED = "FAILED"


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement, what was computed about it, and what that says.

    Attributes:
      claim: The statement, in words.
      formula: What is computed, as plain text.
      computed: The number that came out, formatted.
      expected: The number, or the bound, that it is held to.
      verdict: "confirmed" (as stated), "sharpened" (true, and more is known), "refuted" (false as stated; the next row
        says what is true instead), or "FAILED": the computation does not show what this page says, which is an error.
    """

    claim: str
    formula: str
    computed: str
    expected: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Family:
    """Claims that stand and fall together: one module, one page.

    Attributes:
      name: Of the module.
      title: Of the page.
      text: One or two paragraphs of Markdown: what is at stake and what came out.
      claims: The judged claims; called with ``fast`` True to leave out whatever takes more than a few seconds.
      figures: File stem -> function that draws it onto a new figure and returns it.
      sources: Papers whose claims these are.
    """

    name: str
    title: str
    text: str
    claims: Callable[[bool], Sequence[Claim]]
    figures: Mapping[str, Callable[[], Any]]
    sources: Sequence[str]


def equal(
    claim: str,
    formula: str,
    computed: Any,
    expected: Any,
    *,
    rtol: float = 0.0,
    atol: float = 0.0,
    verdict: str = "confirmed",
) -> Claim:
    """A claim that holds where two numbers agree.

    Args:
      claim: The statement, in words.
      formula: What is computed.
      computed: The number.
      expected: What it must be.
      rtol: Relative tolerance.
      atol: Absolute tolerance.
      verdict: What agreement says about the statement: one of `VERDICTS`.

    Raises:
      ValueError: If ``verdict`` is unknown.
    """
    computed, expected = float(computed), float(expected)
    agree = math.isclose(computed, expected, rel_tol=rtol, abs_tol=atol)
    tolerance = f" ± {show(atol + rtol * abs(expected))}" if atol or rtol else ""
    return holds(claim, formula, computed, f"{show(expected)}{tolerance}", agree, verdict=verdict)


def at_most(claim: str, formula: str, computed: Any, bound: Any, *, verdict: str = "confirmed") -> Claim:
    """A claim that holds where a number is no larger than its bound; arguments as for `equal`."""
    return holds(claim, formula, computed, f"≤ {show(bound)}", float(computed) <= float(bound), verdict=verdict)


def holds(claim: str, formula: str, computed: Any, expected: str, true: Any, *, verdict: str = "confirmed") -> Claim:
    """A claim judged by the caller: ``true`` says whether the computation shows what ``verdict`` says."""
    if verdict not in VERDICTS:
        raise ValueError(f"verdict: {verdict!r} is none of {VERDICTS}")
    return Claim(claim, formula, show(computed), expected, verdict if bool(true) else FAILED)


def show(value: Any) -> str:
    """A number as the tables print it; text as it is."""
    if isinstance(value, str):
        return value
    value = float(value)
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.5g}"
    return f"{value:.2e}"


def table(claims: Sequence[Claim]) -> str:
    """The claims as a Markdown table."""
    rows = ["| claim | formula | computed | expected | verdict |", "| --- | --- | --- | --- | --- |"]
    for c in claims:
        cells = (c.claim, f"`{c.formula}`" if c.formula else "", c.computed, c.expected, f"**{c.verdict}**")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)


def run(family: Family, directory: pathlib.Path, *, fast: bool = False) -> tuple[str, Sequence[Claim]]:
    """Judges the claims, draws the figures and writes ``report.md``.

    Args:
      family: The claims.
      directory: Where the page and its figures go; made if it is not there.
      fast: Leave out what takes more than a few seconds.

    Returns:
      The body of the page, without its closing command, and the claims.
    """
    directory.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with jax.enable_x64(True):
        claims = family.claims(fast)
        for stem, draw in family.figures.items():
            with plt.rc_context(STYLE):
                figure = draw()
                figure.savefig(directory / f"{stem}.png", metadata={"Software": None})
                plt.close(figure)
    images = [f"![{stem.replace('_', ' ')}]({stem}.png)" for stem in family.figures]
    sources = "Sources: " + "; ".join(family.sources) + "."
    body = "\n\n".join([f"# {family.title}", family.text.strip(), table(claims), *images, sources])
    command = f"python -m experiments.theory.{family.name}" + (" --fast" if fast else "")
    write_text(directory / "report.md", f"{body}\n\n```\n{command}\n```\n")
    counts = {v: sum(c.verdict == v for c in claims) for v in (*VERDICTS, FAILED)}
    told = ", ".join(f"{n} {v}" for v, n in counts.items() if n)
    print(f"{family.name}: {told} ({time.perf_counter() - start:.0f} s)", flush=True)
    return body, claims


def nested(body: str, directory: str) -> str:
    """The body of a page as a section of another: headings one level down, figures found under ``directory``."""
    return (
        re.sub(r"^#", "##", body, flags=re.MULTILINE)
        .replace("](", f"]({directory}/")
        .replace(f"]({directory}/http", "](http")
    )


def index(
    families: Sequence[Family], judged: Mapping[str, Sequence[Claim]], sections: Sequence[str], command: str
) -> str:
    """One page of every verdict: counts by family, then every family's section.

    Args:
      families: In the order of the page.
      judged: Their claims, by name.
      sections: Their pages, nested.
      command: That made it.
    """
    counts = ["| family | " + " | ".join(VERDICTS) + " |", "| --- " * (len(VERDICTS) + 1) + "|"]
    for family in families:
        numbers = [str(sum(c.verdict == v for c in judged[family.name])) for v in VERDICTS]
        anchor = re.sub(r"[^\w\- ]", "", family.title.lower()).replace(" ", "-")
        counts.append(f"| [{family.title}](#{anchor}) | " + " | ".join(numbers) + " |")
    intro = (
        "Every claim below is computed, not quoted: by enumeration, quadrature or closed form in float64 wherever that "
        "is possible, with the library's own kernels. **confirmed**: true as stated. **sharpened**: true, and more is "
        "known than the paper says. **refuted**: false as stated; the next row has what is true."
    )
    return "\n\n".join(["# Claims", intro, "\n".join(counts), *sections, f"```\n{command}\n```"]) + "\n"


def main(family: Family) -> None:
    """Runs one family as a program: flags, the table on the terminal, and exit status 1 if a claim failed."""
    fast = field(False, "Leave out whatever takes more than a few seconds.")
    output = output_field(f"runs/theory/{family.name}", "Directory for report.md and its figures.")
    config_class = dataclasses.make_dataclass("Config", [("output", str, output), ("fast", bool, fast)], frozen=True)

    @program
    def start() -> bool:
        config: Any = from_flags(config_class)
        with locked(config.output) as directory:
            _, claims = run(family, directory, fast=config.fast)
        print(table(claims))
        print(f"\nreport: {directory / 'report.md'}")
        return any(c.verdict == FAILED for c in claims)

    run_program(start, config_class)
