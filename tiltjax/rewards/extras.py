"""The optional packages behind the shipped rewards, imported on first use."""

import importlib
import warnings
from types import ModuleType

__all__ = ["import_extra"]


def import_extra(module: str) -> ModuleType:
    """Imports a module of the ``rewards`` extra.

    Args:
      module: Dotted name of the module.

    Returns:
      The module.

    Raises:
      ImportError: If it, or a package it needs, is not installed; the message says how to install it.
    """
    try:
        with warnings.catch_warnings():  # of the first compilation, in a dependency of reasoning-gym
            warnings.simplefilter("ignore", SyntaxWarning)
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"the reward needs the package {error.name!r}, which is not installed: pip install 'tiltjax[rewards]'",
            name=error.name,
        ) from error
