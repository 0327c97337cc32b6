"""Named streams of random numbers: every use of a run's seed has a name, and no two share one.

Adding to a seed makes one run's stream another's root; a number folded in says nothing, and meets another one day.
"""

import zlib

import jax
import numpy as np

from tiltjax.types import PRNGKey

__all__ = ["generator", "root_key", "stream"]

_HALF = 1 << 32


def root_key(seed: int) -> PRNGKey:
    """The key that a seed of 64 bits stands for.

    `jax.random.key` looks at the lower 32 bits only, unless 64-bit types are on.

    Args:
      seed: In ``[0, 2**64)``.

    Returns:
      A typed key; for seeds below 2**32 that of `jax.random.key`.

    Raises:
      ValueError: If the seed is out of range.
    """
    if not 0 <= seed < _HALF**2:
        raise ValueError(f"seed must lie in [0, 2**64), got {seed}")
    key = jax.random.key(np.uint32(seed % _HALF))
    return jax.random.fold_in(key, np.uint32(seed // _HALF)) if seed >= _HALF else key


def stream(seed: int, name: str) -> PRNGKey:
    """The key of one use of a seed.

    Args:
      seed: Of the run, in ``[0, 2**64)``.
      name: Of the use, such as "adapters"; the same name gives the same key in every process and version.

    Returns:
      A typed key, to be consumed; what is numbered folds its number in.

    Example:
      >>> bool(stream(0, "sample") == stream(0, "fit"))
      False
    """
    return jax.random.fold_in(root_key(seed), np.uint32(zlib.crc32(name.encode())))


def generator(seed: int, name: str, *numbers: int) -> np.random.Generator:
    """The same for NumPy, on the host.

    Args:
      seed: Of the run, in ``[0, 2**64)``.
      name: Of the use.
      *numbers: Of what is numbered, such as a step.

    Returns:
      A generator of its own for every seed, name and numbers.
    """
    return np.random.default_rng([seed, zlib.crc32(name.encode()), *numbers])
