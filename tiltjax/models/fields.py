"""Fields of a ``config.json`` with the types that they must have."""

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["Fields", "token_ids"]

_LARGEST = 2**31 - 1
_REQUIRED: Any = object()


class Fields:
    """Reads a JSON object field by field; every complaint names the field, its value and what is allowed.

    A field that is null is not one that is absent: it is refused unless ``null`` says what it means.

    Attributes:
      values: The object.
      name: What it is, for a missing field.
      prefix: Before the name of every field, such as ``rope_scaling.``.
    """

    def __init__(self, values: Mapping[str, Any], name: str, prefix: str = ""):
        self.values, self.name, self.prefix = values, name, prefix

    def integer(self, field: str, default: Any = _REQUIRED, *, null: bool = False, least: int = 1) -> Any:
        """An integer between ``least`` and 2^31 - 1."""
        wanted = f"an integer between {least} and {_LARGEST}"
        return self._read(field, default, null, wanted, lambda x: _is_integer(x) and least <= x <= _LARGEST)

    def positive(self, field: str, default: Any = _REQUIRED, *, null: bool = False) -> Any:
        """A finite number above 0, as a float."""
        value = self._read(field, default, null, "a finite number above 0", lambda x: _is_number(x) and x > 0)
        return None if value is None else float(value)

    def number(self, field: str, default: Any = _REQUIRED) -> float:
        """A finite number, as a float."""
        return float(self._read(field, default, False, "a finite number", _is_number))

    def integers(self, field: str, default: Any = _REQUIRED) -> list[int]:
        """A list of integers."""
        allowed = lambda x: isinstance(x, list) and all(map(_is_integer, x))  # noqa: E731
        return self._read(field, default, False, "a list of integers", allowed)

    def flag(self, field: str, default: bool) -> bool:
        """True or false."""
        return self._read(field, default, False, "true or false", lambda x: isinstance(x, bool))

    def text(self, field: str, default: Any = _REQUIRED, *, null: bool = False) -> Any:
        """A string."""
        return self._read(field, default, null, "a text", lambda x: isinstance(x, str))

    def texts(self, field: str, default: Any = _REQUIRED, *, null: bool = False) -> Any:
        """A list of strings."""
        allowed = lambda x: isinstance(x, list) and all(isinstance(item, str) for item in x)  # noqa: E731
        return self._read(field, default, null, "a list of texts", allowed)

    def group(self, field: str) -> "Fields":
        """An object inside; an empty one where the field is null or absent."""
        found = self._read(field, None, True, "an object", lambda x: isinstance(x, Mapping))
        return Fields(found or {}, self.name, f"{self.prefix}{field}.")

    def _read(self, field: str, default: Any, null: bool, wanted: str, allowed: Any) -> Any:
        if field not in self.values:
            if default is _REQUIRED:
                raise ValueError(f"the field {self.prefix + field!r} is missing from {self.name}")
            return default
        value = self.values[field]
        if (null and value is None) or allowed(value):
            return value
        raise ValueError(f"{self.prefix}{field} must be {wanted}{' or null' if null else ''}, got {_short(value)}")


def token_ids(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The special ids of a configuration.

    Args:
      hf: A ``config.json`` or ``generation_config.json``.

    Returns:
      ``bos_token_id``, ``eos_token_id`` (an integer or a list of them) and ``pad_token_id``, null where absent.

    Raises:
      ValueError: If one is of another type.
    """
    found = {}
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = hf.get(field)
        several = isinstance(value, list) and field == "eos_token_id"
        if value is not None and not all(_is_integer(item) for item in (value if several else [value])):
            allowed = "an integer, a list of integers or null" if field == "eos_token_id" else "an integer or null"
            raise ValueError(f"{field} must be {allowed}, got {_short(value)}")
        found[field] = value
    return found


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    # An integer beyond the floats would raise.
    return (_is_integer(value) and abs(value) < 1e300) or (isinstance(value, float) and math.isfinite(value))


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
