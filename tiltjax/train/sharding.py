"""Two mappings of the one train step: replicated (`jax.pmap`) and sharded (`jax.jit` over a mesh)."""

import functools
import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from tiltjax.models.layers import NARROW, WIDEN
from tiltjax.train.state import TrainState
from tiltjax.types import Params, PyTree

__all__ = [
    "AXES",
    "BATCH",
    "batch_sharding",
    "make_mesh",
    "param_spec",
    "parse_mesh",
    "pmap_step",
    "shard",
    "sharded_step",
    "shardings",
]

AXES = ("data", "fsdp", "tensor")
"""Mesh axes: prompts over ``data`` and ``fsdp``; parameters over ``fsdp`` and ``tensor``."""

BATCH = PartitionSpec(("data", "fsdp"))
"""Where a batch lies: its prompts are split over both axes."""


def parse_mesh(spec: str) -> dict[str, int]:
    """The size of every mesh axis that a spec says; needs no device.

    Args:
      spec: As for `make_mesh`.

    Returns:
      Axis -> size, -1 where it is open.

    Raises:
      ValueError: If an axis is unknown or named twice, a size is neither positive nor -1, or two are open.

    Example:
      >>> parse_mesh("fsdp:2")
      {'data': 1, 'fsdp': 2, 'tensor': 1}
    """
    sizes: dict[str, int] = {}
    for part in (spec or "data:-1").split(","):
        name, _, size = part.partition(":")
        if name not in AXES or not re.fullmatch(r"-1|[1-9]\d{0,8}", size, re.ASCII):
            raise ValueError(f"mesh must be like data:4,fsdp:2,tensor:1 (axes {', '.join(AXES)}); got {part!r}")
        if name in sizes:
            raise ValueError(f"mesh must name every axis once, got {name} twice in {spec!r}")
        sizes[name] = int(size)
    if list(sizes.values()).count(-1) > 1:
        raise ValueError(f"mesh may leave one size open, got {spec!r}")
    return dict.fromkeys(AXES, 1) | sizes


def make_mesh(spec: str = "") -> Mesh:
    """A device mesh from ``"data:4,fsdp:2"``.

    Args:
      spec: Axis names with sizes; axes that are not named have size 1, one size may be -1 (all remaining devices).
        The empty string puts every device on ``data``.

    Returns:
      A mesh with the axes `AXES`.

    Raises:
      ValueError: As of `parse_mesh`, or if the product is not the number of devices.

    Example:
      >>> make_mesh("data:-1").axis_names
      ('data', 'fsdp', 'tensor')
    """
    sizes = parse_mesh(spec)
    devices = jax.device_count()
    known = math.prod(s for s in sizes.values() if s != -1)
    sizes = {name: devices // known if size == -1 else size for name, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        raise ValueError(f"mesh {spec!r} has {math.prod(sizes.values())} places for {devices} devices")
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def param_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Where a parameter lives, by the names in its path; optimizer state mirrors the names and so the places.

    Kernels that widen (query, key, value, gate, up) split their output over ``tensor``, those that narrow (out, down)
    their input, the embedding and the head their vocabulary; the other side, and the features of learned positions, go
    over ``fsdp``. An axis that does not divide its dimension is left out.

    Args:
      path: Attribute names joined by dots, such as ``blocks.query.kernel``; what stands before them does not matter.
      shape: Of the array.
      mesh: From `make_mesh`.

    Returns:
      One entry per dimension.
    """
    *_, owner, name = ["", *path.removesuffix(".value").split(".")]
    widens, narrows = owner in WIDEN, owner in NARROW
    wanted: tuple[str | None, ...] = ()
    if name in ("embedding", "head"):
        wanted = ("tensor", "fsdp")
    elif name == "position_embedding":
        wanted = (None, "fsdp")
    elif name == "kernel" and (widens or narrows):
        wanted = (None, "fsdp", "tensor") if widens else (None, "tensor", "fsdp")
    elif name == "bias" and widens:
        wanted = (None, "tensor")
    elif name == "lora_a":
        wanted = (None, "fsdp" if widens else "tensor", None)
    elif name == "lora_b":
        wanted = (None, None, "tensor" if widens else "fsdp")
    if len(wanted) != len(shape):
        return PartitionSpec()
    fits = (axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(wanted, shape, strict=True))
    return PartitionSpec(*fits)


def shardings(tree: PyTree, mesh: Mesh) -> PyTree:
    """The `jax.sharding.NamedSharding` of every leaf of parameters, optimizer state or a whole `TrainState`."""

    def place(path, leaf):
        return NamedSharding(mesh, param_spec(jax.tree_util.keystr(path), np.shape(leaf), mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Prompts over the ``data`` and ``fsdp`` axes."""
    return NamedSharding(mesh, BATCH)


def shard(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies parameters (or a state) to their places on the mesh; the copy may be donated."""
    # device_put alone may keep the caller's buffers, on the devices that had them already.
    return jax.device_put(copied(tree), shardings(tree, mesh))


@jax.jit
def copied(tree: PyTree) -> PyTree:
    """Copies of all arrays of a pytree, where they lie, by one program; they may be donated."""
    return jax.tree.map(jnp.copy, tree)


def sharded_step(step: Callable, state: TrainState, frozen: Params, mesh: Mesh) -> Callable:
    """`jax.jit` of the train step over a mesh; the compiler places the communication.

    Args:
      step: ``(state, batch, key, frozen) -> (state, metrics)``, `tiltjax.train.step.train_step` with its options bound.
      state: A state (or its shapes), for the structure.
      frozen: Likewise.
      mesh: From `make_mesh`.

    Returns:
      A function of the same signature. The state given to it is donated.
    """

    def placed(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return step(*arguments)

    places = shardings(state, mesh)
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(
        placed,
        in_shardings=(places, batch_sharding(mesh), whole, shardings(frozen, mesh)),
        out_shardings=(places, whole),
        donate_argnums=0,
    )


def pmap_step(step: Callable, *, axis_name: str = "data") -> Callable:
    """`jax.pmap` of the train step: replicated parameters, prompts split over the devices.

    Args:
      step: ``(state, batch, key, frozen, axis_name=...) -> (state, metrics)``.
      axis_name: Name of the mapped axis.

    Returns:
      ``(state, batch, key, frozen) -> (state, metrics)`` on unreplicated arrays; the number of prompts must be a
      multiple of the number of devices. The state given to it is donated, and the one that it returns is on every
      device. What is frozen is sent there at every step, unless `tiltjax.train.distributed.localize` has put it there.
    """
    mapped = jax.pmap(
        functools.partial(step, axis_name=axis_name),
        axis_name=axis_name,
        in_axes=(None, 0, None, None),
        out_axes=None,
        donate_argnums=0,
    )

    def run(state, batch, key, frozen=None):
        devices = jax.local_device_count()
        parts = jax.tree.map(lambda x: x.reshape(devices, x.shape[0] // devices, *x.shape[1:]), batch)
        return mapped(state, parts, key, frozen)

    return run
