"""A run's configuration: one frozen dataclass, its absl flags, its file."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import typing
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from absl import flags

from tiltjax.files import naming
from tiltjax.ops.checks import check_choice

__all__ = [
    "check_fields",
    "define_flags",
    "field",
    "from_flags",
    "load_config",
    "output_field",
    "save_config",
    "seed_field",
    "write_text",
]

ConfigT = TypeVar("ConfigT")

_SEEDS = 1 << 64
_NOUNS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}

flags.disclaim_key_flags()  # A flag belongs to the experiment that asks for it, so that its --help lists it.


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


def define_flags(config_class: type, flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines one absl flag per field; call once at import of an experiment, read with `from_flags` in ``main``.

    Args:
      config_class: A dataclass whose fields were made by `field`.
      flag_values: Where they are defined.
    """
    for item in dataclasses.fields(config_class):
        text, choices = item.metadata["help"], item.metadata["choices"]
        default: Any = item.default
        define: Any = flags.DEFINE_string
        if choices:  # Not DEFINE_enum, which answers a typing error with all choices.
            text = f"<{'|'.join(choices)}>: {text}"
        elif isinstance(default, bool):
            define = flags.DEFINE_bool
        elif isinstance(default, int):
            define = flags.DEFINE_integer
        elif isinstance(default, float) or default is None:
            define = flags.DEFINE_float
        define(item.name, default, text, flag_values=flag_values)


def from_flags(config_class: type[ConfigT], flag_values: flags.FlagValues = flags.FLAGS) -> ConfigT:
    """The dataclass that the parsed flags say; the only place that reads them.

    Args:
      config_class: What `define_flags` was called with.
      flag_values: Likewise.

    Returns:
      An instance.

    Raises:
      ValueError: If a value is not allowed; one line that names the field.
    """
    values = {item.name: flag_values[item.name].value for item in dataclasses.fields(cast(Any, config_class))}
    return _made(config_class, values)


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
        return _made(config_class, values)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a configuration of this experiment ({error})") from None


def check_fields(config: Any) -> None:
    """Raises ValueError unless every field has its type, is finite, and is one of its choices; call it before others.

    Args:
      config: An instance of a dataclass whose fields were made by `field`.
    """
    _checked(type(config), {item.name: getattr(config, item.name) for item in dataclasses.fields(config)})


def _made(config_class: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Checked before it is made: what ``__post_init__`` computes with must have its type."""
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
