"""The figures of README, from one run of `experiments.align`.

    python -m experiments.align_page --run=runs/align

copies the report of a run, its plots and its `results.json` into ``docs/align`` and writes the table and the sentences
between the two marks of README.md anew. Without ``--run`` it only does the latter. A test holds README to
``docs/align/results.json``.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

from experiments.common.flags import from_flags
from experiments.common.launch import program, run_program
from tiltjax.align.evaluation import frontier_table, verdict
from tiltjax.train.config import field, write_text
from tiltjax.train.evaluate import Point
from tiltjax.train.metrics import Interval

__all__ = ["PageConfig", "block", "marked", "update"]

ROOT = pathlib.Path(__file__).parents[1]
FILES = ("report.md", "results.json", "frontier.png", "ess.png")
"""What ``docs/align`` holds of a run."""

BEGIN = "<!-- begin: python -m experiments.align_page -->"
END = "<!-- end -->"
"""Between them README.md belongs to this program."""


@dataclasses.dataclass(frozen=True)
class PageConfig:
    """What is read."""

    run: str = field("", "Directory of a finished run of experiments.align; empty takes docs/align as it is.")


def block(results: dict[str, Any]) -> str:
    """The table and the verdict of a run as Markdown.

    Args:
      results: What ``results.json`` holds.
    """
    results = _restored(results)
    return f"{frontier_table(results)}\n\n{verdict(results)}"


def _restored(value: Any) -> Any:
    """Intervals and points, which JSON has as lists and objects."""
    if isinstance(value, dict):
        if {f.name for f in dataclasses.fields(Point)} == set(value):
            return Point(**{name: _restored(part) for name, part in value.items()})
        return {name: _restored(part) for name, part in value.items()}
    if isinstance(value, list):
        if len(value) == 3 and all(isinstance(part, float) for part in value):
            return Interval(*value)
        return [_restored(part) for part in value]
    return value


def marked(text: str, inside: str) -> str:
    """A text with what stands between its marks replaced.

    Raises:
      ValueError: If it does not hold each mark once, in this order.
    """
    before, begun, rest = text.partition(BEGIN)
    old, ended, after = rest.partition(END)
    if not begun or not ended or BEGIN in after + old or END in after:
        raise ValueError(f"README.md must hold {BEGIN!r} and then {END!r}, each once")
    return f"{before}{BEGIN}\n{inside}\n{END}{after}"


def update(root: pathlib.Path, run: pathlib.Path | None) -> None:
    """Copies a run into ``docs/align``, and rewrites README.

    Args:
      root: Of the repository.
      run: Of `experiments.align`; None copies nothing.

    Raises:
      ValueError: If the run is not whole, or README has no place for it; nothing is written then.
    """
    source, page = run or root / "docs" / "align", root / "docs" / "align"
    if missing := [name for name in FILES if not (source / name).is_file()]:
        raise ValueError(f"{source}: {', '.join(missing)} is missing; is this a finished run of experiments.align?")
    readme = root / "README.md"
    text = marked(readme.read_text(), block(json.loads((source / "results.json").read_text())))
    if run is not None:
        page.mkdir(parents=True, exist_ok=True)
        for name in FILES:
            shutil.copyfile(source / name, page / name)
    write_text(readme, text)


@program
def main() -> None:
    """Reads the flags and writes."""
    run = from_flags(PageConfig).run
    update(ROOT, pathlib.Path(run) if run else None)
    print(f"{ROOT / 'README.md'}: the figures of {run or 'docs/align'}")


if __name__ == "__main__":
    run_program(main, PageConfig)
