"""Where the prompts of a session come from."""

import pathlib
from collections.abc import Sequence
from typing import Any

from tiltjax.data.datasets import PromptRow, parse_rows, read
from tiltjax.rewards.puzzles import puzzle_rows
from tiltjax.rewards.registry import parse_spec

__all__ = ["prompt_rows"]

PROMPTS = pathlib.Path(__file__).parent / "prompts"
DOUBLINGS = 6
"""How often the number of puzzles is doubled, until enough of their questions differ."""


def prompt_rows(source: str | Sequence[Any], wanted: int, *, seed: int, skip_bad: bool = False) -> list[PromptRow]:
    """Prompts of a shipped set, a file or a TFDS builder, from memory, or of a task of reasoning-gym.

    Args:
      source: Name of a shipped set; what `tiltjax.data.datasets.read` takes; ``reasoning_gym:<task>?option=value``; or
        rows: texts, conversations, objects with "prompt" and further columns, or all of them `PromptRow`.
      wanted: How many puzzles of a task; it has fewer where no more of its questions differ. Other sources give all.
      seed: Of the puzzles.
      skip_bad: As for `tiltjax.data.datasets.read`.

    Returns:
      At least one row.

    Raises:
      DataError: If a row is bad; in one line.
    """
    if not isinstance(source, str):
        if all(isinstance(row, PromptRow) for row in source):
            return list(source)
        records = [(f"rows:{i}", row if isinstance(row, dict) else {"prompt": row}) for i, row in enumerate(source, 1)]
        made: Any = parse_rows(records, "prompt", source="rows", skip_bad=skip_bad)
        return made
    if source.startswith("reasoning_gym:"):
        return _puzzles(source, wanted, seed=seed)
    shipped = PROMPTS / f"{source}.jsonl"
    rows: Any = read(shipped if shipped.exists() else source, "prompt", skip_bad=skip_bad)
    return rows


def _puzzles(source: str, wanted: int, *, seed: int) -> list[PromptRow]:
    name, options = parse_spec(source.removeprefix("reasoning_gym:"))
    puzzles: dict[str, dict] = {}  # A question that comes again would be trained on and held out.
    for size in (wanted << doubled for doubled in range(DOUBLINGS)):
        for row in puzzle_rows(name, size=size, seed=seed, **options):
            puzzles.setdefault(str(row["prompt"]), row)
        if len(puzzles) >= wanted:
            break
    rows = list(puzzles.values())[:wanted]
    return [
        PromptRow(prompt=str(row.pop("prompt")), columns=dict(row), place=f"{source}:{i}")
        for i, row in enumerate(rows, 1)
    ]
