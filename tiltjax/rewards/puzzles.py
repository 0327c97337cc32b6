"""Any task of reasoning-gym: prompt rows from a seed, and the task's own scorer as a reward.

A row is ``{"prompt": ..., "answer": ..., "entry": ...}``. The entry is the task's full item as one string of JSON, so
that rows of any task can share a file or a table; some tasks do not make the same item twice, so it is stored, not
made again.
"""

import json
import re
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from tiltjax.ops.checks import check_at_least
from tiltjax.rewards.evaluated import is_formula, is_inert
from tiltjax.rewards.extras import import_extra
from tiltjax.rewards.verifiers import extract_answer

__all__ = ["puzzle_reward", "puzzle_rows", "puzzle_tasks"]

_EVALUATED: dict[str, Callable[[str], bool]] = {
    "binary_matrix": is_inert,
    "countdown": is_formula,
    "intermediate_integration": is_formula,
    "n_queens": is_inert,
    "polynomial_multiplication": is_formula,
    "puzzle24": is_formula,
    "simple_integration": is_formula,
    "spiral_matrix": is_inert,
    "string_insertion": is_inert,
}
"""Tasks whose scorer evaluates the answer as code, and what an answer must be to reach it."""


def _is_bitwise(text: str) -> bool:
    return re.fullmatch(r"(?:0x[0-9a-fA-F]+|[0-9]+|<<|>>|[-+*&|^~() ])+", text) is not None


def _is_antiderivative(text: str) -> bool:
    return is_formula(re.sub(r"Integral\((.+?), [A-Za-z]\)", r"(\1)", text))


_HARMLESS_ENTRY: dict[str, Callable[[dict], bool]] = {
    "bitwise_arithmetic": lambda entry: _is_bitwise(entry["metadata"]["problem"]),
    "countdown": lambda entry: is_formula(entry["answer"]),
    "intermediate_integration": lambda entry: (
        is_formula(entry["metadata"]["integrand"]) and _is_antiderivative(entry["answer"])
    ),
    "number_sorting": lambda entry: is_inert(entry["answer"]),
    "polynomial_multiplication": lambda entry: is_formula(entry["answer"]),
    "puzzle24": lambda entry: is_formula(entry["answer"]),
    "simple_integration": lambda entry: is_formula(entry["metadata"]["integrand"]) and is_formula(entry["answer"]),
}
"""Tasks whose scorer evaluates a part of the entry, which a file may have brought; the gold answer always passes."""


def _pack(x: Any) -> Any:
    """JSON has no tuples, and no keys but strings: both are kept, by a marked object."""
    if isinstance(x, tuple):
        return {"__tuple__": [_pack(y) for y in x]}
    if isinstance(x, list):
        return [_pack(y) for y in x]
    if isinstance(x, dict) and not all(isinstance(key, str) for key in x):
        return {"__items__": [[_pack(key), _pack(value)] for key, value in x.items()]}
    return {key: _pack(value) for key, value in x.items()} if isinstance(x, dict) else x


def _unpack(x: dict) -> Any:
    """Inverse of `_pack` for one JSON object, whose members are unpacked already."""
    if set(x) == {"__tuple__"}:
        return tuple(x["__tuple__"])
    return dict(x["__items__"]) if set(x) == {"__items__"} else x


def puzzle_tasks() -> list[str]:
    """Names of all tasks, sorted; "composite", which mixes tasks, is left out: join the rows of several instead."""
    return sorted(set(import_extra("reasoning_gym.factory").DATASETS) - {"composite"})


def _dataset(task: str, config: dict[str, Any]) -> Any:
    tasks = puzzle_tasks()
    if task not in tasks:
        near = ", ".join(get_close_matches(task, tasks)) or "chain_sum, gcd, letter_counting"
        raise ValueError(f"task must be one of the {len(tasks)} of puzzle_tasks(), such as {near}; got {task!r}")
    library = import_extra("reasoning_gym")
    try:
        return library.create_dataset(task, **config)
    except (AssertionError, TypeError, ValueError) as error:
        raise ValueError(f"task {task!r} cannot be made with {config}: {error}") from error


def puzzle_rows(task: str, /, *, size: int, seed: int, **config: Any) -> list[dict[str, str | None]]:
    """Prompt rows of a task.

    Args:
      task: Name of a reasoning-gym task; `puzzle_tasks` lists them.
      size: Number of rows, at least 1.
      seed: Seed of the items.
      **config: Options of the task, such as ``min_terms=2`` for "chain_sum".

    Returns:
      ``size`` dicts: "prompt"; "answer", the gold answer, or None where the task has no single one; and "entry", what
      `puzzle_reward` scores with, JSON in a string.

    Raises:
      ValueError: If the task is unknown, or refuses its options; if ``size < 1``.
      ImportError: If reasoning-gym is not installed.

    Example:
      >>> row = puzzle_rows("gcd", size=1, seed=0, max_value=20)[0]
      >>> row["prompt"], row["answer"]
      ('Find the Greatest Common Divisor (GCD) of these numbers: 14, 2. Give only the GCD as your final answer.', '2')
    """
    check_at_least("size", size, 1)
    dataset = _dataset(task, {**config, "size": size, "seed": seed})
    items = [dataset[index] for index in range(size)]
    return [
        {"prompt": item["question"], "answer": item["answer"], "entry": json.dumps(_pack(item), ensure_ascii=False)}
        for item in items
    ]


def _read_entry(task: str, text: Any, index: int) -> dict:
    try:
        entry = json.loads(text, object_hook=_unpack)
        made_by = entry["metadata"]["source_dataset"]
        if made_by != task:
            raise ValueError(f"it is of task {made_by!r}")
        if task in _HARMLESS_ENTRY and not _HARMLESS_ENTRY[task](entry):
            raise ValueError("its scorer would run a part of it as code")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"entry {index} is no entry of puzzle_rows({task!r}): {error}") from error
    return entry


def puzzle_reward(task: str, /, **config: Any) -> Callable[[list[str], list[str], list[Any]], list[float]]:
    """Reward of a task: its own ``score_answer``, 0 to 1, on the answer found in the completion.

    The answer is found by the rule of `tiltjax.rewards.verifiers`. Most tasks give 1 or 0; some give a little for a
    wrong answer of the right form. An answer that the scorer cannot read counts as none. Where the scorer runs the
    answer as Python, only literals and formulas reach it; anything else counts as no answer.

    Args:
      task: Name of a reasoning-gym task.
      **config: The options that its rows were made with; a few scorers look at them.

    Returns:
      A reward ``(prompts, completions, entry) -> floats`` with the entries of `puzzle_rows` from the column "entry". It
      raises ValueError for an entry of another task or not of `puzzle_rows`.

    Raises:
      ValueError: If the task is unknown, or refuses its options.
      ImportError: If reasoning-gym is not installed.

    Example:
      >>> row = puzzle_rows("gcd", size=1, seed=0, max_value=20)[0]
      >>> puzzle_reward("gcd", max_value=20)([row["prompt"]] * 2, ["14 = 7 * 2, so 2.", "14"], [row["entry"]] * 2)
      [1.0, 0.0]
    """
    dataset = _dataset(task, {"size": 1, "seed": 0, **config})
    harmless = _EVALUATED.get(task)

    def one(completion: str, entry: dict) -> float:
        gold = entry["answer"]
        answer = extract_answer(completion, gold)
        if harmless is not None and not harmless(answer) and not (harmless is is_formula and answer == gold):
            answer = ""
        try:
            return float(dataset.score_answer(answer=answer, entry=entry))
        except Exception:  # a scorer that fails on what a model wrote says that it is wrong
            return 0.0

    def puzzle(prompts: list[str], completions: list[str], entry: list[Any]) -> list[float]:
        items = [_read_entry(task, text, index) for index, text in enumerate(entry)]
        with warnings.catch_warnings():  # of what a model wrote, such as an empty grid
            warnings.simplefilter("ignore")
            return [one(completion, item) for completion, item in zip(completions, items, strict=True)]

    puzzle.__name__ = f"reasoning_gym:{task}"
    return puzzle
