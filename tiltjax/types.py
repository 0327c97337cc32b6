"""Array aliases, keys and callables: the words that every signature of the library is written in.

Sizes, always in this order: ``B`` prompts, ``N`` candidates, ``S`` prompt tokens, ``T`` completion tokens,
``V`` vocabulary, ``D`` features. Leading dimensions of a kernel are free and written ``*batch``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Key, PyTree, UInt8

__all__ = [
    "Array",
    "AxisName",
    "Bool",
    "Dtype",
    "Float",
    "Int",
    "Key",
    "Numeric",
    "PRNGKey",
    "Params",
    "PyTree",
    "Reward",
    "UInt8",
]

# A kernel takes NumPy arrays as they are. Ranks, shapes and types of arrays are checked by jaxtyping when the tests
# run, far more closely than a static checker could.
if TYPE_CHECKING:
    Array = Any
    _Scalar = Any
else:
    Array = jax.Array | np.ndarray
    """An array of JAX, traced or not, or of NumPy."""
    _Scalar = np.number

PRNGKey = Key[jax.Array, ""]
"""A typed key from `jax.random.key`; first positional argument of every sampler, consumed once."""

AxisName = str | tuple[str, ...] | None
"""A mapped axis (`pmap`, `shard_map`, `vmap`) over which a kernel communicates, several as one, or None for one device.

What is split over several stands as under ``PartitionSpec(names)``: the last name runs fastest.
"""

Dtype = jax.typing.DTypeLike
"""Anything `jax.numpy.dtype` accepts."""

Params = PyTree
"""A pytree of arrays; Flax NNX modules are such pytrees."""

Numeric = int | float | _Scalar | Float[Array, ""]
"""A number of Python or NumPy, or a scalar array: an option such as ``beta`` that may be traced."""

Reward = Callable[..., Any]
"""``(prompts, completions, **columns) -> floats``: one reward per completion, higher is better."""
