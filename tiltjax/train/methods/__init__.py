"""Every method of the library as a `tiltjax.train.method.Method` record, by family.

`METHODS` has them by name: `likelihood` imitates, `preference` compares, `policy_gradient` climbs, `game` plays itself,
`internal` judges itself. Each record holds its paper's defaults; `dataclasses.replace` changes them.
"""

from tiltjax.ops.checks import check_choice
from tiltjax.rewards.registry import load_object
from tiltjax.train.method import Method
from tiltjax.train.methods.game import GAME
from tiltjax.train.methods.internal import INTERNAL
from tiltjax.train.methods.likelihood import LIKELIHOOD
from tiltjax.train.methods.policy_gradient import POLICY_GRADIENT
from tiltjax.train.methods.preference import PREFERENCE

__all__ = ["FAMILIES", "METHODS", "RENAMED", "get_method"]

FAMILIES: dict[str, tuple[Method, ...]] = {
    "likelihood": LIKELIHOOD,
    "preference": PREFERENCE,
    "policy_gradient": POLICY_GRADIENT,
    "game": GAME,
    "internal": INTERNAL,
}
"""Family -> its records."""

METHODS: dict[str, Method] = {method.name: method for family in FAMILIES.values() for method in family}
"""Name -> record."""

RENAMED: dict[str, str] = {
    "tilted_mle_offline": "tilted_mle",
    "tilted_mle_iterated": "iterated_tilted_mle",
    "var_printed": "var",
    "var_offline": "var_importance",
    "var_iterated": "iterated_var_importance",
    "online_var": "online_var_importance",
}
"""Names of version 0.1 -> what the record is called now."""


def get_method(name: str) -> Method:
    """The record of that name, or one of your own.

    Args:
      name: One of `METHODS`, or ``package.module:record`` or ``path/to/file.py:record``, which runs that code.

    Returns:
      `Method`.

    Raises:
      ValueError: If there is none; the message lists them, or has the new name. If what was named is no record.

    Example:
      >>> get_method("rloo").draw, get_method("dpo").schedule
      ((('current', 4),), 'offline')
      >>> get_method("tiltjax.train.methods.preference:PREFERENCE")
      Traceback (most recent call last):
      ValueError: method 'tiltjax.train.methods.preference:PREFERENCE' must be a tiltjax.train.Method, got tuple
    """
    if name in RENAMED:
        raise ValueError(f"method {name!r} is now called {RENAMED[name]!r}")
    if ":" not in name:
        check_choice("method", name, METHODS)
        return METHODS[name]
    record = load_object(name, what="method")
    if not isinstance(record, Method):
        raise ValueError(f"method {name!r} must be a tiltjax.train.Method, got {type(record).__name__}")
    return record
