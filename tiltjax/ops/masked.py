"""Reductions under a mask, and the one average of the library.

A mask enters through `jnp.where`, never by multiplication: ``0 * -inf`` is NaN.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tiltjax.ops.checks import check_boolean
from tiltjax.ops.collectives import pmax, psum
from tiltjax.types import Array, AxisName, Bool, Float

__all__ = [
    "Average",
    "as_float",
    "average",
    "check_alike",
    "masked_mean",
    "masked_std",
    "masked_sum",
    "masked_var",
    "shares",
]


def as_float(x: Array | float) -> Array:
    """``x`` in float32, or wider if it came wider: the precision inside every kernel.

    A Python number takes the precision of the array that it meets. Integers of 32 bits or more are float64 where JAX
    has it (``jax_enable_x64``). In float32 whole numbers beyond 2^24 would tie: those are refused, unless traced.

    Raises:
      ValueError: If integers are too large for float32.
    """
    if getattr(x, "weak_type", isinstance(x, int | float)):
        return jnp.asarray(x) * 1.0
    dtype = jnp.promote_types(jnp.result_type(x), jnp.float32)
    given = np.dtype(getattr(x, "dtype", float))
    if given.kind in "iu" and given.itemsize >= 4:
        dtype = jnp.promote_types(jnp.result_type(float), jnp.float32)
        _check_whole(x, dtype)
    return jnp.asarray(x, dtype)


def _check_whole(x: Array, dtype: np.dtype) -> None:
    if isinstance(x, jax.core.Tracer) or not getattr(x, "is_fully_addressable", True):
        return
    whole = np.asarray(x)
    if np.abs(whole, dtype=float).max(initial=0) <= 2**24:
        return
    lost = whole[whole.astype(dtype).astype(object) != whole]
    if len(lost):
        raise ValueError(f"integers must be exact in {dtype}, got {lost[0]}: subtract what all have in common")


def check_alike(where: Array | None, *arrays: Array) -> None:
    """Raises unless the arrays, and the mask where it is given, have one shape, and the mask is boolean."""
    check_boolean("where", where)
    chex.assert_equal_shape(arrays if where is None else [*arrays, where])


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
        nothing = self.count <= 0
        return jnp.where(nothing, 0, self.total / jnp.where(nothing, 1, self.count))


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
    check_alike(where, values)
    count = jnp.asarray(values.size, values.dtype) if where is None else jnp.sum(where, dtype=values.dtype)
    total = jnp.sum(values) if where is None else jnp.sum(jnp.where(where, values, 0))
    return Average(total=total, count=count)


def shares(name: str, label: Array, like: Array, where: Array | None = None) -> Array:
    """Labels that may be shares: in the precision of ``like``, of its shape, without gradient, and 0 where masked.

    Args:
      name: Of the argument, for the error.
      label: Booleans, or numbers in [0, 1]; any other number of a traced array becomes NaN.
      like: What is trained.
      where: True for real entries; None means all.

    Raises:
      ValueError: If a real label that is not traced lies outside [0, 1].
    """
    check_alike(where, like, label)
    label = jax.lax.stop_gradient(jnp.asarray(label, like.dtype))
    label = label if where is None else jnp.where(where, label, 0)
    outside = (label < 0) | (label > 1)
    if not isinstance(outside, jax.core.Tracer) and outside.is_fully_addressable and outside.any():
        raise ValueError(f"{name} must lie in [0, 1], got {label[outside][0]}")
    return jnp.where(outside, jnp.nan, label)


def masked_sum(
    x: Float[Array, "*batch N"], where: Bool[Array, "*batch N"] | None = None, *, axis_name: AxisName = None
) -> Float[Array, "*batch"]:
    """Sum of the real entries of the last axis (and over ``axis_name``)."""
    x = as_float(x)
    check_alike(where, x)
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


def masked_std(
    x: Float[Array, "*batch N"],
    where: Bool[Array, "*batch N"] | None = None,
    *,
    ddof: int = 0,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    """Root of `masked_var`, also where the variance itself is beyond the range of floats."""
    x = as_float(x)
    size = jnp.abs(x) if where is None else jnp.where(where, jnp.abs(x), 0)
    largest = pmax(jnp.max(size, axis=-1, initial=0), axis_name)
    # A power of 2 at most as large: no digit of an ordinary variance changes.
    exponent = jnp.frexp(jnp.where(jnp.isfinite(largest), largest, 1))[1] - 1
    unit = jnp.ldexp(jnp.ones_like(largest), jnp.maximum(exponent, -126))
    return unit * jnp.sqrt(masked_var(x / unit[..., None], where, ddof=ddof, axis_name=axis_name))
