"""Communication over an optional mapped axis: the only file that calls `jax.lax` collectives.

Every function is the identity (or the one-device answer) when ``axis_name`` is None, so a kernel is written once and
runs alone, under `jax.pmap`, `jax.shard_map` or `jax.vmap(axis_name=...)`. Several names are one long axis, and are
reduced one after the other: a value that is split over some of them only is refused by `jax.lax.psum` over all at once.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from tiltjax.types import Array, AxisName, Int, PyTree

__all__ = [
    "alike",
    "all_gather",
    "axis_index",
    "axis_size",
    "in_parts",
    "num_parts",
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
      axis_name: The mapped axis, or several; None leaves ``x`` as it is.

    Returns:
      The same pytree, summed.
    """
    return functools.reduce(jax.lax.psum, _names(axis_name), x)


def pmean(x: PyTree, axis_name: AxisName) -> PyTree:
    """Mean of every leaf over the mapped axis; see `psum`."""
    return functools.reduce(jax.lax.pmean, _names(axis_name), x)


def pmax(x: PyTree, axis_name: AxisName) -> PyTree:
    """Largest value of every leaf over the mapped axis, without gradient (`jax.lax.pmax` has none); see `psum`."""
    return functools.reduce(jax.lax.pmax, _names(axis_name), jax.lax.stop_gradient(x))


def pmin(x: PyTree, axis_name: AxisName) -> PyTree:
    """Smallest value of every leaf over the mapped axis, without gradient; see `psum`."""
    return functools.reduce(jax.lax.pmin, _names(axis_name), jax.lax.stop_gradient(x))


def all_gather(x: PyTree, axis_name: AxisName) -> PyTree:
    """The parts of all devices, joined along the leading axis of every leaf, in the order of the mapped axis.

    Args:
      x: A pytree of arrays of one dimension or more.
      axis_name: The mapped axis, or several; None leaves ``x`` as it is.

    Returns:
      The same pytree, every leaf with a leading axis as many times as long as there are devices.
    """
    return functools.reduce(functools.partial(jax.lax.all_gather, tiled=True), reversed(_names(axis_name)), x)


def axis_index(axis_name: AxisName) -> Int[Array, ""]:
    """This device's place on the mapped axis, or 0."""
    index = jnp.int32(0)
    for name in _names(axis_name):
        index = index * jax.lax.axis_size(name) + jax.lax.axis_index(name)
    return index


def axis_size(axis_name: AxisName) -> int:
    """Number of devices on the mapped axis, or 1."""
    return math.prod(map(jax.lax.axis_size, _names(axis_name)))


def alike(*arrays: Array) -> tuple[Array, ...]:
    """Casts replicated arrays to device-varying if any of ``arrays`` varies; for custom VJPs under `jax.shard_map`.

    Under `jax.shard_map` a rule that is given a device's rows and a shared matrix knows the device's part of the
    matrix's gradient only. The parts are summed on the way back through this function.

    Args:
      *arrays: What the rule is given.

    Returns:
      The arrays, unchanged.
    """
    own = [jax.typeof(x).manual_axis_type.varying for x in arrays]
    missing = [tuple(sorted(frozenset().union(*own) - names)) for names in own]
    return tuple(jax.lax.pcast(x, names, to="varying") for x, names in zip(arrays, missing, strict=True))


def spread(x: Array, axes: tuple[str, ...] = ("data", "fsdp")) -> Array:
    """Keeps the leading axis over ``axes`` of the mesh that a sharded `jax.jit` is traced under.

    Where both a batch and a matrix are split over one mesh axis, the compiler has to move one of the two, and may
    choose the batch: activations then cross the network in every layer. Told where they stay, it gathers the matrix.

    Args:
      x: Any array.
      axes: Mesh axes; those that the mesh does not have, or that are mapped by hand, do not count.

    Returns:
      ``x``. Without a mesh, or if the axis does not divide it, no constraint is added.
    """
    sizes = _free_axes(jax.sharding.get_abstract_mesh())
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
      ``x``. Without a mesh no constraint is added.
    """
    sizes = _free_axes(jax.sharding.get_abstract_mesh())
    if not sizes:
        return x
    spec: list[str | None] = [None] * x.ndim
    if split is not None and x.shape[split] % sizes.get(axis, 1) == 0 and axis in sizes:
        spec[split] = axis
    return _together(PartitionSpec(*spec), x)


def num_parts(x: Array, axes: tuple[str, ...] = ("data", "fsdp")) -> int:
    """In how many parts the compiler of a sharded `jax.jit` may hold the leading axis of an array; see `spread`.

    Args:
      x: Any array. Without a mesh that the program is traced under, the one that its arguments lie on counts.
      axes: Mesh axes; those that the mesh does not have, or that are mapped by hand, do not count.

    Returns:
      1 for axes mapped by hand (`jax.pmap`, `jax.shard_map`), where shapes are those of one device, and on one device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sizes = _free_axes(jax.typeof(x).sharding.mesh if mesh.empty else mesh)
    return math.prod(sizes.get(axis, 1) for axis in axes)


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


def _names(axis_name: AxisName) -> tuple[str, ...]:
    if axis_name is None:
        return ()
    return (axis_name,) if isinstance(axis_name, str) else axis_name


def _free_axes(mesh: AbstractMesh) -> dict[str, int]:
    """Sizes of the axes, above 1, along which the compiler of a sharded `jax.jit` may place things."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}
