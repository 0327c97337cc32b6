"""A profile as text: for docs/performance.md and for the terminal."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.cases import CASES

__all__ = ["profiles", "table", "told_profile"]

Row = dict[str, Any]


def profiles(rows: Sequence[Row], shape: str) -> list[str]:
    """Where tiltjax's time goes, case by case: the sections of the page.

    Args:
      rows: Of one run.
      shape: Name of the model's shape.

    Returns:
      Nothing where there is no profile.
    """
    found = [row for row in rows if row.get("measure") == "profile" and row["shape"] == shape]
    if not found:
        return []
    order = [case.name for case in CASES]
    found.sort(key=lambda row: order.index(row["case"]))
    return ["## Where the time goes", _PROFILES, *(_profile(row) for row in found)]


_PROFILES = (
    "`python -m benchmarks.profile`: one call of each case, traced; XLA's operations summed by the function of the "
    "library that asked for them, those of a percent or more (by line of the source: what the command prints, and "
    "`benchmarks/results/profile.jsonl`). Share: of the time of all threads; alone: the part of it in which no other "
    "thread worked; GFLOP/s: of a thread at products of matrices, to be held to the yardstick, a product of 2048 x "
    "2048. What XLA fuses counts for its last operation; tracing lengthens what consists of many short ones."
)


def told_profile(row: Row) -> str:
    """A profile for a terminal: by function, then by line of the source."""
    names = [[one["phase"], one["line"] or "-", _code(one["text"])] for one in row["lines"]]
    return f"{_profile(row)}\n\n{_worked(['phase', 'line', 'source'], names[:15], row['lines'])}\n"


def _profile(row: Row) -> str:
    text = next(case.text for case in CASES if case.name == row["case"])
    large = [one for one in row["functions"] if one["share"] >= 0.01]
    shown, told = (sum(one["share"] for one in ones) for ones in (large, row["functions"]))
    head = (
        f"{row['seconds']:.2f} s, {row['traced_seconds']:.2f} s traced; yardstick {row['yardstick']:,.0f}; "
        f"threads were idle {1 - told:.1%} of their time, what is below a percent took {told - shown:.1%}."
    )
    names = [[one["phase"], _code(one["function"]) + (", products" if one["product"] else "")] for one in large]
    return f"### {text}\n\n{head}\n\n{_worked(['phase', 'function'], names, large)}"


def _code(text: str) -> str:
    return f"`{text}`".replace("|", "\\|") if text else "-"


def _worked(head: list[str], names: list[list[str]], rows: Sequence[Row]) -> str:
    figures = [
        [f"{one['share']:.1%}", f"{one['alone']:.1%}", _speed(one["gflops"]), f"{one['runs']:,}"]
        for one in rows[: len(names)]
    ]
    body = [[*name, *told] for name, told in zip(names, figures, strict=True)]
    return table([*head, "share", "alone", "GFLOP/s", "operations"], body)


def _speed(gflops: float) -> str:
    return f"{gflops:,.0f}" if gflops else "-"


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
