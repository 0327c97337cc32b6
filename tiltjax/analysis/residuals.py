"""What a forward pass keeps for the gradient, read from the program without running or allocating anything."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Var
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tiltjax.train.sharding import batch_sharding, shardings
from tiltjax.train.step import LossFn
from tiltjax.types import Params, PyTree

__all__ = ["Kept", "kept"]


@dataclasses.dataclass(frozen=True)
class Kept:
    """An array that lies in memory from the forward pass to the backward pass.

    Attributes:
      shape: Of the whole array.
      dtype: Of its numbers.
      nbytes: On one device.
      of_batch: Whether it depends on the batch: an activation. Else it is of parameters, gathered or converted.
    """

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    of_batch: bool


def kept(loss_fn: LossFn, params: Params, frozen: Params, batch: PyTree, key: Any, *, mesh: Mesh) -> list[Kept]:
    """What the forward pass hands to the backward pass, before XLA optimises either.

    The arguments (parameters as they are stored, the batch) are left out, and so is what depends on none of them. An
    array is divided over devices as XLA places it.

    Args:
      loss_fn: Of a train step.
      params: Trained parameters, or their shapes.
      frozen: The others, likewise.
      batch: One part of the batch, likewise.
      key: Likewise.
      mesh: Over which parameters and batch are placed as by `tiltjax.train.sharding.sharded_step`.

    Returns:
      Every array once.
    """

    def forward(params, batch, frozen, key):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return jax.vjp(lambda params: loss_fn(params, frozen, batch, key)[0].mean, params)[1]

    places = (shardings(params, mesh), batch_sharding(mesh), shardings(frozen, mesh),
              NamedSharding(mesh, PartitionSpec()))  # fmt: skip
    traced = jax.jit(forward, in_shardings=places).trace(params, batch, frozen, key)
    jaxpr, found = traced.jaxpr.jaxpr, jax.tree.leaves(traced.lower().compile().output_shardings)
    infos = jax.tree.leaves(traced.out_info)
    first, count = len(jax.tree.leaves(params)), len(jax.tree.leaves(batch))
    of_batch = _depending(jaxpr, jaxpr.invars[first : first + count])
    computed = _depending(jaxpr, jaxpr.invars) - set(jaxpr.invars)
    arrays = {}
    for out, info, place in zip(jaxpr.outvars, infos, found, strict=True):
        if isinstance(out, Var) and out in computed:
            nbytes = math.prod(place.shard_shape(info.shape)) * info.dtype.itemsize
            arrays[out] = Kept(info.shape, str(info.dtype), nbytes, out in of_batch)
    return list(arrays.values())


def _depending(jaxpr: Jaxpr, sources: Iterable[Var]) -> set[Var]:
    """The sources, and what is computed from any of them."""
    found = set(sources)
    for equation in jaxpr.eqns:
        given = [isinstance(x, Var) and x in found for x in equation.invars]
        if any(given):
            found.update(out for out, moved in zip(equation.outvars, _moved(equation, given), strict=True) if moved)
    return found


def _moved(equation: JaxprEqn, given: list[bool]) -> list[bool]:
    """Which results of an equation depend on those of its operands that are given."""
    inner = equation.params.get("jaxpr")
    body = getattr(inner, "jaxpr", inner)
    if body is None or len(body.invars) != len(given):
        return [True] * len(equation.outvars)
    loop = equation.primitive.name == "scan"
    first, carried = (equation.params[f"num_{name}"] for name in ("consts", "carry")) if loop else (0, 0)
    while True:
        found = _depending(body, [x for x, moves in zip(body.invars, given, strict=True) if moves])
        moved = [isinstance(out, Var) and out in found for out in body.outvars]
        # What a turn of a loop hands to the next one.
        again = [a or b for a, b in zip(given[first : first + carried], moved[:carried], strict=True)]
        if again == given[first : first + carried]:
            return moved
        given = [*given[:first], *again, *given[first + carried :]]
