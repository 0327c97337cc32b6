"""Every method of the library as a `tiltjax.train.method.Method` record, by family.

`METHODS` has them by name: `likelihood` imitates, `preference` compares, `policy_gradient` climbs, `game` plays itself,
`internal` judges itself. Each record holds its paper's defaults; `dataclasses.replace` changes them.
"""

from tiltjax.ops.checks import check_choice
from tiltjax.train.method import Method
from tiltjax.train.methods.game import GAME
from tiltjax.train.methods.internal import INTERNAL
from tiltjax.train.methods.likelihood import LIKELIHOOD
from tiltjax.train.methods.policy_gradient import POLICY_GRADIENT
from tiltjax.train.methods.preference import PREFERENCE

__all__ = ["FAMILIES", "METHODS", "get_method"]

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


def get_method(name: str) -> Method:
    """The record of that name.

    Args:
      name: One of `METHODS`.

    Returns:
      `Method`.

    Raises:
      ValueError: If there is none; the message lists them.

    Example:
      >>> get_method("rloo").draw, get_method("dpo").schedule
      ((('current', 4),), 'offline')
    """
    check_choice("method", name, METHODS)
    return METHODS[name]
