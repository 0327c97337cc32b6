"""Settings: frozen dataclasses whose fields know their help text, their checks and their file."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from tiltjax.files import naming
from tiltjax.ops.checks import check_choice

__all__ = [
    "check_fields",
    "field",
    "load_config",
    "make_config",
    "output_field",
    "refield",
    "save_config",
    "seed_field",
    "write_text",
]

ConfigT = TypeVar("ConfigT")

_SEEDS = 1 << 64
_NOUNS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}


def field(
    default: Any,
    help: str,  # noqa: A002
    *,
    choices: tuple[str, ...] | None = None,
    check: Callable[[str, Any], None] | None = None,
    code: bool = False,
) -> Any:
    """A dataclass field with the text that ``--help`` shows.

    Args:
      default: Its type (str, int, float, bool, or None for an optional float) decides the flag's.
      help: One sentence, with the unit.
      choices: Allowed strings.
      check: ``(name, value)``: raises ValueError for a value of the right type that is not allowed.
      code: Whether ``check`` or the class runs code that a value with a colon names, ``module:attribute``: from a file
        such a value is refused unless it is the one that the flags have.

    Returns:
      A `dataclasses.field`.
    """
    metadata = {"help": help, "choices": choices, "check": check, "code": code}
    return dataclasses.field(default=default, metadata=metadata)


def refield(owner: type, name: str, default: Any, help: str | None = None) -> Any:  # noqa: A002
    """A field of a base class with another default, and another text where it means something else there.

    Args:
      owner: The base class, a dataclass whose fields were made by `field`.
      name: Of its field.
      default: As for `field`.
      help: As for `field`; None keeps the text.

    Returns:
      A `dataclasses.field`.
    """
    item = next(item for item in dataclasses.fields(cast(Any, owner)) if item.name == name)
    return dataclasses.field(default=default, metadata={**item.metadata, "help": help or item.metadata["help"]})


def seed_field(help: str = "Root of all randomness, from 0 to 2**64 - 1.") -> Any:  # noqa: A002
    """The field ``seed`` of an experiment: an integer of 64 bits, 0 unless told otherwise.

    Args:
      help: As for `field`.

    Returns:
      A `dataclasses.field`.
    """

    def check(name: str, value: int) -> None:
        if not 0 <= value < _SEEDS:
            raise ValueError(f"{name} must lie in [0, 2**64), got {value}")

    return field(0, help, check=check)


def output_field(default: str, help: str = "Directory of the run; nothing is written outside of it.") -> Any:  # noqa: A002
    """The field ``output`` of an experiment: a path, which must not be empty.

    Args:
      default: Path.
      help: As for `field`.

    Returns:
      A `dataclasses.field`.
    """

    def check(name: str, value: str) -> None:
        if not value.strip():
            raise ValueError(f"{name} must name a path, got {value!r} (the current directory is --{name}=.)")

    return field(default, help, check=check)


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Writes the fields as JSON, atomically."""
    write_text(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file whole or not at all."""
    part = pathlib.Path(path).with_suffix(".part")
    try:
        part.write_text(text)
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        raise naming(path, error) from None


def load_config(config_class: type[ConfigT], path: str | os.PathLike, *, like: ConfigT | None = None) -> ConfigT:
    """Reads what `save_config` wrote.

    Args:
      config_class: Of what was written.
      path: Of the file.
      like: Settings from the flags. A field that names code (``code`` of `field`) is read only if it is equal there.

    Raises:
      ValueError: If the file is not JSON, no object, or has other fields than ``config_class`` or values of another
        type or out of range; one line with the path.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text())
        if not isinstance(values, dict):
            raise ValueError(f"its root must be an object, got {type(values).__name__}")
        known = {item.name for item in dataclasses.fields(cast(Any, config_class))}
        if strange := sorted(set(values) - known):
            raise ValueError(f"unknown fields {', '.join(map(repr, strange[:3]))}")
        for item in dataclasses.fields(cast(Any, config_class)):
            value = values.get(item.name)
            if item.metadata.get("code") and ":" in str(value) and value != getattr(like, item.name, None):
                raise ValueError(f"{item.name} names code to run, {_shown(value)}, and the flags do not")
        return make_config(config_class, values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a configuration of this experiment ({error})") from None


def check_fields(config: Any) -> None:
    """Checks the type, the finiteness and the choices of every field; call it first in ``__post_init__``.

    An integer in a field of floats becomes a float, so that 1 and 1.0 are the same settings.

    Args:
      config: An instance of a frozen dataclass whose fields were made by `field`.

    Raises:
      ValueError: If a value is not allowed; one line that names the field.
    """
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    for name, value in _checked(type(config), values).items():
        object.__setattr__(config, name, value)


def make_config(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Makes settings from values that are checked first: what ``__post_init__`` computes with must have its type.

    Args:
      config_class: A dataclass whose fields were made by `field`.
      values: Field -> value.

    Returns:
      An instance.

    Raises:
      ValueError: If a value is not allowed; one line that names the field.
    """
    return config_class(**_checked(config_class, values))


def _checked(config_class: type, values: Mapping[str, Any]) -> dict[str, Any]:
    hints, checked = typing.get_type_hints(config_class), dict(values)
    for item in dataclasses.fields(config_class):
        value = values.get(item.name)
        if item.name not in values or (value is None and item.default is None):
            continue
        checked[item.name] = value = _typed(item.name, value, hints[item.name])
        if item.metadata.get("choices"):
            check_choice(item.name, value, item.metadata["choices"])
        if item.metadata.get("check"):
            item.metadata["check"](item.name, value)
    return checked


def _typed(name: str, value: Any, hint: Any) -> Any:
    kind = next(part for part in (*typing.get_args(hint), hint) if part is not type(None))
    allowed = (int, float) if kind is float else kind
    fits = isinstance(value, allowed) and (kind is bool or not isinstance(value, bool))
    if not fits or (kind is float and not _finite(value)):
        raise ValueError(f"{name} must be {_NOUNS[kind]}, got {_shown(value)}")
    if kind is int and not -_SEEDS < value < _SEEDS:
        raise ValueError(f"{name} must fit in 64 bits, got {_shown(value)}")
    if kind is str and "\0" in value:
        raise ValueError(f"{name} must not hold the character NUL, got {_shown(value)}")
    return float(value) if kind is float else value


def _finite(value: float | int) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # An integer beyond the largest float.
        return False


def _shown(value: Any) -> str:
    """At most a line of it; an integer too long for Python to print is one of the values that end here."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:80]}..."
