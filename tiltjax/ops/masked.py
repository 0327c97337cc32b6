"""Reductions under a mask, and the one average of the library.

A mask enters through `jnp.where`, never by multiplication: ``0 * -inf`` is NaN.
"""

import chex
import jax
import jax.numpy as jnp

from tiltjax.ops.collectives import psum
from tiltjax.types import Array, AxisName, Bool, Float

__all__ = ["Average", "as_float", "average", "masked_mean", "masked_sum", "masked_var"]


def as_float(x: Array | float) -> Array:
    """``x`` in float32, or wider if it came wider: the precision inside every kernel."""
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Average:
    """A mean that is not divided yet: microbatches, devices and hosts of unequal size add up to the exact answer.

    Attributes:
      total: Sum of the values, scalar.
      count: How many values it sums (or their total weight), scalar float.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]

    def __add__(self, other: "Average") -> "Average":
        return jax.tree.map(jnp.add, self, other)

    def psum(self, axis_name: AxisName) -> "Average":
        """The average over all devices of the mapped axis."""
        return psum(self, axis_name)

    @property
    def mean(self) -> Float[Array, ""]:
        """``total / count``, and 0 where nothing was counted."""
        return jnp.where(self.count > 0, self.total / jnp.where(self.count > 0, self.count, 1), 0)


def average(values: Float[Array, "*batch"], where: Bool[Array, "*batch"] | None = None) -> Average:
    """Sums per-prompt (or per-token) values into an `Average`.

    Args:
      values: Any shape.
      where: True for the entries that count, same shape; None counts all.

    Returns:
      `Average` of the real entries.

    Example:
      >>> float(average(jnp.array([1.0, 3.0, jnp.nan]), jnp.array([True, True, False])).mean)
      2.0
    """
    values = as_float(values)
    count = jnp.asarray(values.size, values.dtype) if where is None else jnp.sum(where, dtype=values.dtype)
    total = jnp.sum(values) if where is None else jnp.sum(jnp.where(where, values, 0))
    return Average(total=total, count=count)


def masked_sum(
    x: Float[Array, "*batch N"], where: Bool[Array, "*batch N"] | None = None, *, axis_name: AxisName = None
) -> Float[Array, "*batch"]:
    """Sum of the real entries of the last axis (and over ``axis_name``)."""
    x = as_float(x)
    return psum(jnp.sum(x if where is None else jnp.where(where, x, 0), axis=-1), axis_name)


def masked_mean(
    x: Float[Array, "*batch N"], where: Bool[Array, "*batch N"] | None = None, *, axis_name: AxisName = None
) -> Float[Array, "*batch"]:
    """Mean of the real entries of the last axis (and over ``axis_name``); 0 where there is none."""
    ones = jnp.ones_like(as_float(x))
    return masked_sum(x, where, axis_name=axis_name) / jnp.maximum(masked_sum(ones, where, axis_name=axis_name), 1)


def masked_var(
    x: Float[Array, "*batch N"],
    where: Bool[Array, "*batch N"] | None = None,
    *,
    ddof: int = 0,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    """Variance of the real entries of the last axis: ``sum (x - mean)^2 / (n - ddof)``; 0 where ``n <= ddof``."""
    mean = masked_mean(x, where, axis_name=axis_name)
    count = masked_sum(jnp.ones_like(as_float(x)), where, axis_name=axis_name)
    square = jnp.square(x - mean[..., None]) if where is None else jnp.square(jnp.where(where, x - mean[..., None], 0))
    return masked_sum(square, axis_name=axis_name) / jnp.maximum(count - ddof, 1)
