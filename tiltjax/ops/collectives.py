"""Communication over an optional mapped axis: the only file that calls `jax.lax` collectives.

Every function is the identity (or the one-device answer) when ``axis_name`` is None, so a kernel is written once and
runs alone, under `jax.pmap`, `jax.shard_map` or `jax.vmap(axis_name=...)`.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from tiltjax.types import Array, AxisName, Int, PyTree

__all__ = [
    "all_gather",
    "axis_index",
    "axis_size",
    "in_parts",
    "parts_known",
    "pmax",
    "pmean",
    "pmin",
    "psum",
    "spread",
    "whole",
]


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


def all_gather(x: PyTree, axis_name: AxisName) -> PyTree:
    """The parts of all devices, joined along the leading axis of every leaf, in the order of the mapped axis.

    Args:
      x: A pytree of arrays of one dimension or more.
      axis_name: The mapped axis; None leaves ``x`` as it is.

    Returns:
      The same pytree, every leaf with a leading axis as many times as long as there are devices.
    """
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def axis_index(axis_name: AxisName) -> Int[Array, ""]:
    """This device's place on the mapped axis, or 0."""
    return jnp.int32(0) if axis_name is None else jax.lax.axis_index(axis_name)


def axis_size(axis_name: AxisName) -> int:
    """Number of devices on the mapped axis, or 1."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def spread(x: Array, axes: tuple[str, ...] = ("data", "fsdp")) -> Array:
    """Keeps the leading axis over ``axes`` of the mesh that a sharded `jax.jit` is traced under.

    Where both a batch and a matrix are split over one mesh axis, the compiler has to move one of the two, and may
    choose the batch: activations then cross the network in every layer. Told where they stay, it gathers the matrix.

    Args:
      x: Any array.
      axes: Mesh axes; those that the mesh does not have, or that are mapped by hand, do not count.

    Returns:
      ``x``, unchanged; without a mesh, or where the sizes do not divide, not even told.
    """
    sizes = _free_axes()
    axes = tuple(axis for axis in axes if axis in sizes)
    if not axes or x.shape[0] % math.prod(sizes[axis] for axis in axes):
        return x
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *rest))


def whole(x: Array, *, split: int | None = None, axis: str = "tensor") -> Array:
    """Brings an array together on every device, but for one dimension that stays over ``axis``; see `spread`.

    What is gathered once serves every product that follows. The gradient is not told where to be: it is summed where
    the array lives, and never brought together.

    Args:
      x: Any array, such as a layer's matrix whose rows live on different devices.
      split: The dimension that stays split; None keeps none.
      axis: Over which mesh axis.

    Returns:
      ``x``, unchanged; without a mesh, not even told.
    """
    sizes = _free_axes()
    if not sizes:
        return x
    spec: list[str | None] = [None] * x.ndim
    if split is not None and x.shape[split] % sizes.get(axis, 1) == 0 and axis in sizes:
        spec[split] = axis
    return _together(PartitionSpec(*spec), x)


def in_parts(
    function: Callable, *arrays: Array, rows: tuple[str, ...] = ("data", "fsdp"), columns: str = "tensor"
) -> PyTree:
    """Runs a function on each device for its own part: for kernels that the compiler cannot split.

    Args:
      function: Of all ``arrays``; treats their first two axes as a batch, and so do its results, all with both axes.
      *arrays: All with the same first axis, and those of two axes or more with the same second one.
      rows: Mesh axes that the first axis is split over; as in `spread`, where it divides.
      columns: Mesh axis of the second one, likewise.

    Returns:
      What the function returns on whole arrays; without a mesh, the function is just called.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if not free:
        return function(*arrays)

    def fits(axes, size):
        axes = tuple(axis for axis in axes if axis in free)
        return axes if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None

    sizes = next(x.shape for x in arrays if x.ndim > 1)
    spec = PartitionSpec(fits(rows, sizes[0]), fits((columns,), sizes[1]))
    places = tuple(spec if x.ndim > 1 else PartitionSpec(spec[0]) for x in arrays)
    run = jax.shard_map(function, in_specs=places, out_specs=spec, axis_names=free, check_vma=False)
    return run(*arrays)


def parts_known() -> bool:
    """Whether `in_parts` can tell every device's part: one device, or a mesh that the program is traced under."""
    return jax.device_count() == 1 or not jax.sharding.get_abstract_mesh().empty


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _together(spec: PartitionSpec, x: Array) -> Array:
    return jax.lax.with_sharding_constraint(x, spec)


_together.defvjp(lambda spec, x: (_together(spec, x), None), lambda spec, _, grad: (grad,))


def _free_axes() -> dict[str, int]:
    """Sizes of the axes, above 1, along which the compiler of a sharded `jax.jit` may place things."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}
