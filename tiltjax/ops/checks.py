"""Errors for what can be known before a kernel runs: one line that names the argument, its value and what is allowed.

Numbers are looked at where they are Python's or NumPy's; a JAX array may be traced, and passes. Of arrays the shape and
the type are known always. Arrays that must be alike are held together by chex (`tiltjax.ops.masked.check_alike`).
"""

import difflib
from collections.abc import Collection
from typing import Any

import numpy as np

__all__ = [
    "check_at_least",
    "check_boolean",
    "check_choice",
    "check_fraction",
    "check_one_shape",
    "check_pair",
    "check_per_row",
    "check_positive",
    "check_within",
    "did_you_mean",
    "is_number",
]

_LISTED = 12
"""Most choices that an error lists."""


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number that can be compared now: of Python, or a scalar of NumPy."""
    return isinstance(value, int | float | np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is a finite number above 0, or a JAX array."""
    if is_number(value) and not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a finite number above 0, got {_plain(value)!r}")


def check_at_least(name: str, value: Any, least: int | float) -> None:
    """Raises ValueError unless ``value >= least``, or a JAX array."""
    if is_number(value) and not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {_plain(value)!r}")


def check_fraction(name: str, value: Any) -> None:
    """Raises ValueError unless ``0 < value <= 1``, or a JAX array."""
    if is_number(value) and not 0 < value <= 1:
        raise ValueError(f"{name} must lie in (0, 1], got {_plain(value)!r}")


def check_within(name: str, value: Any, low: int | float, high: int | float) -> None:
    """Raises ValueError unless ``low <= value <= high``, or a JAX array."""
    if is_number(value) and not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {_plain(value)!r}")


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


def check_boolean(name: str, value: Any) -> None:
    """Raises ValueError unless ``value`` is None or an array of booleans: labels of -1 and 1 would both be true."""
    if value is not None and np.dtype(getattr(value, "dtype", type(value))) != np.bool_:
        dtype = getattr(value, "dtype", type(value).__name__)
        raise ValueError(f"{name} must be boolean, got {dtype}: write {name} == 1 for labels that are 1 where true")


def check_pair(name: str, value: Any, *, axis: int = -1) -> None:
    """Raises ValueError unless an axis of an array holds exactly a chosen and a rejected one."""
    shape = np.shape(value)
    if len(shape) < -axis or shape[axis] != 2:
        raise ValueError(f"{name} must have 2 entries, chosen and rejected, on axis {axis}; got the shape {shape}")


def check_per_row(name: str, value: Any, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless ``value`` is None, a scalar, or of exactly the shape that has one entry per row.

    Anything else would broadcast: a column ``[B, 1]`` beside ``[B]`` rows gives ``[B, B]`` results.
    """
    found = np.shape(value)
    if value is not None and found not in ((), tuple(shape)):
        rows = f" or have the shape {tuple(shape)}, one per row" if shape else ""
        raise ValueError(f"{name} must be a number{rows}; got the shape {found}")


def check_one_shape(**values: Any) -> None:
    """Raises ValueError unless all values that are no scalars have one shape."""
    shapes = {name: np.shape(value) for name, value in values.items() if np.shape(value)}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"arrays must have one shape, got {', '.join(f'{n} {s}' for n, s in shapes.items())}")


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic | np.ndarray) else value
