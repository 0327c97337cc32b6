"""The absl flags of an experiment: one for each field of its settings."""

import dataclasses
from typing import Any, TypeVar, cast

from absl import flags

from tiltjax.train.config import make_config

__all__ = ["define_flags", "from_flags"]

ConfigT = TypeVar("ConfigT")

flags.disclaim_key_flags()  # A flag belongs to the experiment that asks for it, so that its --help lists it.


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
    return make_config(config_class, values)
