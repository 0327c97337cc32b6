"""Errors for Python options: one line that names the argument, its value and what is allowed.

Array ranks and shapes are checked by chex at trace time; these functions look at plain Python numbers and strings only
and let traced values pass.
"""

import difflib
from collections.abc import Collection
from typing import Any

__all__ = ["check_at_least", "check_choice", "check_fraction", "check_positive", "did_you_mean"]

_LISTED = 12
"""Most choices that an error lists."""


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is a number above 0, or traced."""
    if isinstance(value, int | float) and not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def check_at_least(name: str, value: Any, least: int | float) -> None:
    """Raises ValueError unless ``value >= least``, or traced."""
    if isinstance(value, int | float) and not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")


def check_fraction(name: str, value: Any) -> None:
    """Raises ValueError unless ``0 < value <= 1``, or traced."""
    if isinstance(value, int | float) and not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {value!r}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    """Raises ValueError unless ``value`` is one of ``choices``; the message says which are near."""
    if value in choices:
        return
    known = sorted(choices)
    shown = ", ".join(known) if len(known) <= _LISTED else f"{len(known)} names ({', '.join(known[:3])}, ...)"
    raise ValueError(f"{name} must be one of {shown}; got {value!r}{did_you_mean(value, choices)}")


def did_you_mean(value: str, choices: Collection[str]) -> str:
    """The end of an error's line: the choices that look like ``value``, or nothing where none does.

    Args:
      value: What was given.
      choices: What is allowed.

    Returns:
      Text to append, empty where no choice is near.

    Example:
      >>> did_you_mean("rlo", ("rloo", "grpo"))
      "; did you mean 'rloo'?"
    """
    near = difflib.get_close_matches(value, choices, n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
