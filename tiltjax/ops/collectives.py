"""Communication over an optional mapped axis: the only file that calls `jax.lax` collectives.

Every function is the identity (or the one-device answer) when ``axis_name`` is None, so a kernel is written once and
runs alone, under `jax.pmap`, `jax.shard_map` or `jax.vmap(axis_name=...)`.
"""

import jax
import jax.numpy as jnp

from tiltjax.types import Array, AxisName, Int, PyTree

__all__ = ["axis_index", "axis_size", "pmax", "pmean", "pmin", "psum"]


def psum(x: PyTree, axis_name: AxisName) -> PyTree:
    """Sum of every leaf over the mapped axis.

    Args:
      x: A pytree of arrays.
      axis_name: The mapped axis; None leaves ``x`` as it is.

    Returns:
      The same pytree, summed.
    """
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def pmean(x: PyTree, axis_name: AxisName) -> PyTree:
    """Mean of every leaf over the mapped axis; see `psum`."""
    return x if axis_name is None else jax.lax.pmean(x, axis_name)


def pmax(x: PyTree, axis_name: AxisName) -> PyTree:
    """Largest value of every leaf over the mapped axis, without gradient (`jax.lax.pmax` has none); see `psum`."""
    x = jax.lax.stop_gradient(x)
    return x if axis_name is None else jax.lax.pmax(x, axis_name)


def pmin(x: PyTree, axis_name: AxisName) -> PyTree:
    """Smallest value of every leaf over the mapped axis, without gradient; see `psum`."""
    x = jax.lax.stop_gradient(x)
    return x if axis_name is None else jax.lax.pmin(x, axis_name)


def axis_index(axis_name: AxisName) -> Int[Array, ""]:
    """This device's place on the mapped axis, or 0."""
    return jnp.int32(0) if axis_name is None else jax.lax.axis_index(axis_name)


def axis_size(axis_name: AxisName) -> int:
    """Number of devices on the mapped axis, or 1."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)
