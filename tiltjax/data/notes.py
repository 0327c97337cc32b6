"""What a user should know and need not be told at every batch."""

import functools
import logging

__all__ = ["warn_once"]


@functools.lru_cache(maxsize=1024)
def warn_once(logger: logging.Logger, message: str) -> None:
    """Warns, unless this process has said the same before.

    Args:
      logger: Of the module that speaks.
      message: One line.
    """
    logger.warning("%s", message)
