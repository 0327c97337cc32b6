r"""Rewards that know the right answer: 1 or 0, and the one rule by which an answer is found in a completion.

**The rule** (`extract_answer`). The shape of the gold answer says what to look for:

1. The marked part is the inside of the last ``<answer>...</answer>``; else what follows the last ``Answer:`` (any case,
   also ``**Answer:**``), for as many lines as the gold answer has; else the whole completion.
2. If the gold answer is a number, the answer is the last number of the marked part.
3. Otherwise, or where there is no number, it is the marked part, stripped.
"""

import operator
import re
import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from tiltjax.ops.checks import check_at_least
from tiltjax.rewards.extras import import_extra

__all__ = ["as_number", "exact_match", "extract_answer", "math_reward"]

_TAG = re.compile(r"</?answer>", re.IGNORECASE)
_MARK = re.compile(r"\banswer[*_]*[ \t]*:[*_]*", re.IGNORECASE)
# The exponent is short on purpose: a completion such as 1e999999999 must not be expanded.
_NUMBER = re.compile(
    r"(?:(?<!\w)-)?(?<!\w)(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?=\.[0-9]))"
    r"(?:\.[0-9]+)?(?:e[-+]?[0-9]{1,3}(?!\w)|/[0-9]+)?",
    re.IGNORECASE,
)
_EDGES = " \t\n*_`\"'$.,;:!?()[]{}"


def as_number(text: str) -> Fraction | None:
    """The exact value of a text that is one number: ``12``, ``-1,234.50``, ``.5``, ``1e-3`` or ``3/4``; else None.

    Example:
      >>> as_number("1,234.50") == as_number("2469/2"), as_number("12 apples") is None
      (True, True)
    """
    text = text.strip().replace("\u2212", "-").removeprefix("+")
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):  # 1.5/2, 1/0, or more digits than Python converts
        return None


def _last_block(completion: str) -> str | None:
    """Inside of the last ``<answer>...</answer>``, in one pass however many tags a model repeats."""
    inside, opened = None, None
    for tag in _TAG.finditer(completion):
        if not tag[0].startswith("</"):
            opened = tag.end()
        elif opened is not None:
            inside, opened = completion[opened : tag.start()], None
    return inside


def extract_answer(completion: str, gold: str | None) -> str:
    r"""Finds the answer in a completion by the rule at the top of this module.

    Args:
      completion: What was generated.
      gold: The right answer, only looked at for its shape (a number, its number of lines); None for a task that has no
        single right answer: everything after the mark is taken.

    Returns:
      The answer; a number comes without its thousands separators.

    Example:
      >>> extract_answer("7 + 5 = 12, so we get 12.", "13"), extract_answer("**Answer:** Paris\nBye", "Rome")
      ('12', 'Paris')
    """
    block = _last_block(completion)
    part = completion if block is None else block
    if block is None and (marks := list(_MARK.finditer(completion))):
        part = completion[marks[-1].end() :].strip()
        if gold is not None:
            part = "\n".join(part.split("\n")[: len(gold.strip().split("\n"))])
    if gold is not None and as_number(gold) is not None and (numbers := _NUMBER.findall(part.replace("\u2212", "-"))):
        return numbers[-1].replace(",", "")
    return part.strip()


def _gold_texts(answer: Sequence[Any]) -> list[str]:
    for index, gold in enumerate(answer):
        if isinstance(gold, bool) or not isinstance(gold, str | int | float) or not str(gold).strip():
            raise ValueError(f"answer {index} must be a number or a text that is not empty, got {gold!r}")
    return [str(gold).strip() for gold in answer]


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).strip(_EDGES)


def exact_match(prompts: list[str], completions: list[str], answer: list[Any]) -> list[float]:
    """1.0 where the answer found in the completion (see the top of this module) is the gold answer, else 0.0.

    Two numbers are compared by value, exactly: ``0.5`` is ``1/2`` and ``1,000`` is ``1e3``. Other texts are compared
    without regard to case, to the amount of white space, and to quotes, brackets and punctuation at either end.

    Args:
      prompts: Unused, ``M`` strings.
      completions: ``M`` strings.
      answer: The gold answers, strings or numbers: the column "answer" of the prompt rows. Only the final answer, not
        its derivation.

    Returns:
      ``M`` floats, 0.0 or 1.0.

    Raises:
      ValueError: If a gold answer is empty, or neither a string nor a number.

    Example:
      >>> exact_match([""] * 4, ["7 + 5 = 12", "12 - 5 = 7", "It is red.", "Answer: Red."], [12, "12", "red", "red"])
      [1.0, 0.0, 0.0, 1.0]
    """

    def right(completion: str, gold: str) -> bool:
        found, value = extract_answer(completion, gold), as_number(gold)
        return as_number(found) == value if value is not None else _normal(found) == _normal(gold)

    return [float(right(completion, gold)) for completion, gold in zip(completions, _gold_texts(answer), strict=True)]


def _as_expression(text: str) -> str:
    return text if "$" in text or "\\boxed" in text or "\\[" in text or "\\(" in text else f"${text}$"


def math_reward(*, timeout: int = 5) -> Callable[[list[str], list[str], list[Any]], list[float]]:
    r"""Reward of 1.0 where completion and gold answer are the same mathematics, else 0.0 (math-verify).

    ``1/2``, ``0.5`` and ``$\frac{2}{4}$`` are the same. The gold answer is read as LaTeX, with or without dollar signs.
    In the completion, the inside of the last ``<answer>...</answer>`` is read so too; without one, math-verify looks
    for a boxed expression, "the answer is ...", LaTeX between dollar signs, or the last number. Whatever cannot be
    parsed, or compared in time, is 0.0.

    The time limit is a Unix alarm, which only the main thread can set: on another thread there is none.

    Args:
      timeout: Seconds for one parse and for one comparison, at least 1.

    Returns:
      A reward ``(prompts, completions, answer) -> floats`` with the gold answers (strings or numbers) from the column
      "answer".

    Raises:
      ValueError: If ``timeout < 1``.
      ImportError: If math-verify is not installed.

    Example:
      >>> math_reward()([""] * 2, [r"The answer is $\frac{2}{4}$.", "7 + 5 = 13"], ["1/2", 12])
      [1.0, 0.0]
    """
    check_at_least("timeout", timeout, 1)
    timeout = operator.index(timeout)  # a fraction of a second would fail inside, where every failure is a 0
    library = import_extra("math_verify")
    late = import_extra("math_verify.errors").TimeoutException

    def parse(text: str, seconds: int | None) -> list:
        # Left to itself, math-verify logs the whole text when time is up.
        try:
            return library.parse(text, parsing_timeout=seconds, raise_on_error=True)
        except (Exception, late):
            return []

    def right(completion: str, gold: str) -> bool:
        seconds = timeout if threading.current_thread() is threading.main_thread() else None
        block = _last_block(completion)
        found = parse(completion if block is None else _as_expression(block.strip()), seconds)
        return library.verify(parse(_as_expression(gold), seconds), found, timeout_seconds=seconds)

    def math(prompts: list[str], completions: list[str], answer: list[Any]) -> list[float]:
        return [
            float(right(completion, gold)) for completion, gold in zip(completions, _gold_texts(answer), strict=True)
        ]

    return math
