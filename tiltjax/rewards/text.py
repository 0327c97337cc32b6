"""Rewards that read the surface of a completion: its length, its overlap with a reference."""

import functools
from collections.abc import Callable
from typing import Any

from tiltjax.ops.checks import check_at_least
from tiltjax.rewards.extras import import_extra

__all__ = ["brevity_reward", "length_reward", "rouge_l"]


def _words(completion: str) -> int:
    return len(completion.split())


def length_reward(*, target: int = 40) -> Callable[[list[str], list[str]], list[float]]:
    r"""Reward for completions of a wanted length: 0 at the target, -1 for an empty one or one of twice the target.

    .. math:: r(y) = -\frac{|\mathrm{words}(y) - \mathrm{target}|}{\mathrm{target}}

    Args:
      target: Wanted number of words (runs of non-space characters), at least 1.

    Returns:
      A reward ``(prompts, completions) -> floats``.

    Raises:
      ValueError: If ``target < 1``.

    Example:
      >>> length_reward(target=4)([""] * 3, ["one two three", "one two three four", ""])
      [-0.25, 0.0, -1.0]
    """
    check_at_least("target", target, 1)

    def length(prompts: list[str], completions: list[str]) -> list[float]:
        return [-abs(_words(completion) - target) / target + 0.0 for completion in completions]

    return length


def brevity_reward(*, limit: int = 40) -> Callable[[list[str], list[str]], list[float]]:
    r"""Penalty for the words beyond a limit: 0 up to it, -1 at twice the limit. Add it to a reward that likes length.

    .. math:: r(y) = -\frac{\max(0, \mathrm{words}(y) - \mathrm{limit})}{\mathrm{limit}}

    Args:
      limit: Number of words that are free, at least 1.

    Returns:
      A reward ``(prompts, completions) -> floats``.

    Raises:
      ValueError: If ``limit < 1``.

    Example:
      >>> brevity_reward(limit=2)([""] * 3, ["one", "one two", "one two three"])
      [0.0, 0.0, -0.5]
    """
    check_at_least("limit", limit, 1)

    def brevity(prompts: list[str], completions: list[str]) -> list[float]:
        return [-max(0, _words(completion) - limit) / limit + 0.0 for completion in completions]

    return brevity


@functools.cache
def _scorer() -> Any:
    return import_extra("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(prompts: list[str], completions: list[str], reference: list[Any]) -> list[float]:
    r"""ROUGE-L of every completion against its reference, 0 to 1: how much of both lies on one common subsequence.

    .. math:: F = \frac{2 P R}{P + R}, \qquad P = \frac{\mathrm{LCS}}{|y|}, \quad R = \frac{\mathrm{LCS}}{|y^*|}

    Words are lower-cased, stripped of everything but letters and digits, and stemmed (Porter).

    Args:
      prompts: Unused, ``M`` strings.
      completions: ``M`` strings.
      reference: The wanted text of every completion, ``M`` strings: the column "reference" of the prompt rows.

    Returns:
      ``M`` floats.

    Raises:
      ValueError: If a reference is not a string.
      ImportError: If rouge-score is not installed.

    Example:
      >>> rouge_l([""], ["the cat lay on the mat"], ["the cat sat on the mat"])
      [0.8333333333333334]

    References:
      Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.
    """
    for index, text in enumerate(reference):
        if not isinstance(text, str):
            raise ValueError(f"reference {index} must be a string, got {text!r}")
    scorer = _scorer()
    return [
        float(scorer.score(text, completion)["rougeL"].fmeasure)
        for text, completion in zip(reference, completions, strict=True)
    ]
