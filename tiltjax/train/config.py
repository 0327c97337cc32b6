"""A run's configuration: one frozen dataclass, its absl flags, its file."""

import dataclasses
import json
import os
import pathlib
from typing import Any, TypeVar, cast

from absl import flags

__all__ = ["define_flags", "field", "from_flags", "load_config", "save_config", "write_text"]

ConfigT = TypeVar("ConfigT")

flags.disclaim_key_flags()  # A flag belongs to the experiment that asks for it, so that its --help lists it.


def field(default: Any, help: str, *, choices: tuple[str, ...] | None = None) -> Any:  # noqa: A002
    """A dataclass field with the text that ``--help`` shows.

    Args:
      default: Its type (str, int, float, bool, or None for an optional float) decides the flag's.
      help: One sentence, with the unit.
      choices: Allowed strings.

    Returns:
      A `dataclasses.field`.
    """
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def define_flags(config_class: type) -> None:
    """Defines one absl flag per field; call once at import of an experiment, read with `from_flags` in ``main``.

    Args:
      config_class: A dataclass whose fields were made by `field`.
    """
    for item in dataclasses.fields(config_class):
        text, choices = item.metadata["help"], item.metadata["choices"]
        default: Any = item.default
        if choices:
            flags.DEFINE_enum(item.name, default, choices, text)
        elif isinstance(default, bool):
            flags.DEFINE_bool(item.name, default, text)
        elif isinstance(default, int):
            flags.DEFINE_integer(item.name, default, text)
        elif isinstance(default, float) or default is None:
            flags.DEFINE_float(item.name, default, text)
        else:
            flags.DEFINE_string(item.name, default, text)


def from_flags(config_class: type[ConfigT]) -> ConfigT:
    """The dataclass that the parsed flags say; the only place that reads them."""
    values: Any = {item.name: flags.FLAGS[item.name].value for item in dataclasses.fields(cast(Any, config_class))}
    return config_class(**values)


def save_config(config: Any, path: str | os.PathLike) -> None:
    """Writes the fields as JSON, atomically."""
    write_text(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a file whole or not at all."""
    part = pathlib.Path(path).with_suffix(".part")
    part.write_text(text)
    os.replace(part, path)


def load_config(config_class: type[ConfigT], path: str | os.PathLike) -> ConfigT:
    """Reads what `save_config` wrote.

    Raises:
      ValueError: If the file is not JSON or has other fields than ``config_class``; one line with the path.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text())
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a configuration of this experiment ({error})") from None
