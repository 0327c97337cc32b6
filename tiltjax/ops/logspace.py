"""Masked and shardable sums of exponentials, and a running one that never holds all of its terms.

The largest entry is subtracted before the division by a temperature, so the result is exact where ``x / beta`` is 1e5.
A real NaN is never hidden: it makes the sum NaN.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tiltjax.ops.checks import check_per_row, is_number
from tiltjax.ops.collectives import pmax, psum
from tiltjax.ops.masked import as_float, check_alike
from tiltjax.types import Array, AxisName, Bool, Dtype, Float, Numeric

__all__ = [
    "LogSum",
    "centred_difference",
    "difference",
    "divide",
    "empty",
    "exp_remainder",
    "exp_sum",
    "log_softmax",
    "log_weight",
    "logmeanexp",
    "logsumexp",
    "merge",
    "over_row",
    "quotient",
    "scale",
]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class LogSum:
    """First two moments of ``exp(x)``: ``mass = sum exp(x - shift)`` and ``square = sum exp(2 (x - shift))``.

    A monoid under `merge`: two halves of a sum, on two devices or at two times, combine exactly.

    Attributes:
      shift: Largest ``x`` seen, -inf before the first.
      mass: In units of ``exp(shift)``.
      square: In units of ``exp(2 shift)``.
      count: How many terms.
    """

    shift: Float[Array, "*batch"]
    mass: Float[Array, "*batch"]
    square: Float[Array, "*batch"]
    count: Float[Array, "*batch"]

    @property
    def log_sum(self) -> Float[Array, "*batch"]:
        """``log sum exp(x)``; -inf for the empty sum."""
        return jnp.where(self.mass == 0, -jnp.inf, _finite(self.shift) + _safe_log(self.mass))

    @property
    def log_mean(self) -> Float[Array, "*batch"]:
        """``log mean exp(x)``; 0 for the empty sum (nothing is tilted)."""
        value = _finite(self.shift) + _safe_log(self.mass / jnp.maximum(self.count, 1))
        return jnp.where(self.count > 0, jnp.where(self.mass == 0, -jnp.inf, value), 0)

    @property
    def ess(self) -> Float[Array, "*batch"]:
        """Effective sample size ``mass^2 / square``, in ``[1, count]``; 0 for the empty sum."""
        return jnp.square(self.mass) / jnp.where(self.square > 0, self.square, 1)


def divide(x: Array, beta: Numeric | Float[Array, "*batch"]) -> Array:
    """``x / beta`` where ``beta`` is a number, or one per row of ``x [*batch, N]``."""
    return x / over_row("beta", beta, x)


def over_row(name: str, value: Numeric | Float[Array, "*batch"], x: Float[Array, "*batch N"]) -> Any:
    """A number, or one per row of ``x [*batch, N]``, as it broadcasts against ``x``.

    Args:
      name: Of the argument, for the error.
      value: A number, or ``[*batch]``.
      x: Of any shape ``[*batch, N]``.

    Returns:
      The number, or ``[*batch, 1]``.

    Raises:
      ValueError: If ``value`` has another shape.
    """
    check_per_row(name, value, jnp.shape(x)[:-1])
    return value if jnp.ndim(value) == 0 else jnp.expand_dims(value, -1)


def scale(factor: Numeric | Array, x: Array) -> Array:
    """``factor * x``, and 0 where the factor is 0 and ``x`` infinite: the limit of what takes no part. NaN stays."""
    return jnp.where((factor == 0) & jnp.isinf(x), 0, factor * x)


def log_weight(
    x: Float[Array, "*batch N"], log_z: Float[Array, "*batch"], *, beta: Numeric | Float[Array, "*batch"]
) -> Float[Array, "*batch N"]:
    """``x / beta - log_z``, to rounding where the two are large and nearly the same.

    Args:
      x: Exponents before the division by ``beta``.
      log_z: One per row.
      beta: Positive; a number or one per row.

    Returns:
      The difference, ``[*batch, N]``.
    """
    x = as_float(x)
    share, lost = quotient(x, over_row("beta", beta, x))
    return (share - over_row("log_z", as_float(log_z), x)) + lost


def difference(x: Array, y: Array) -> tuple[Array, Array]:
    """``x - y``, rounded, and what the rounding lost (Knuth's two-sum); the second has no gradient, nor infinities."""
    a, b = jax.lax.stop_gradient(x), jax.lax.stop_gradient(y)
    total = a - b
    part = total - a
    return x - y, _zero_unless_finite((a - (total - part)) - (b + part))


def centred_difference(
    x: Float[Array, "*batch N"],
    y: Float[Array, "*batch N"],
    *,
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch N"]:
    """``x - y`` less its largest entry, rounded: what rows have in common costs no digits of their differences.

    Args:
      x: Any, trained.
      y: The same shape.
      where: True for real entries; the others are 0.
      axis_name: Mapped axis over which the last axis is split.

    Returns:
      The difference up to a constant per row, which has no gradient, ``[*batch, N]``.
    """
    check_alike(where, x, y)
    real = jnp.full(x.shape, True) if where is None else where
    total, lost = difference(*(jnp.where(real, v, 0) for v in (x, y)))
    top = pmax(jnp.max(total, axis=-1, initial=-jnp.inf, where=real), axis_name)
    return jnp.where(real, (total - _finite(top)[..., None]) + lost, 0)


def quotient(x: Array, y: Numeric | Array) -> tuple[Array, Array]:
    """``x / y``, rounded, and what the rounding lost; the second has no gradient, nor infinities."""
    a, b = jax.lax.stop_gradient(x), jax.lax.stop_gradient(jnp.asarray(y, x.dtype))
    share = a / b
    # The product is formed from halves, whose products are exact.
    (high, low), (b_high, b_low) = _halves(share), _halves(b)
    rest = ((a - high * b_high) - (high * b_low + low * b_high)) - low * b_low
    if is_number(y):  # A Python number has more digits than the array.
        rest = rest - share * (float(y) - float(np.asarray(y, x.dtype)))
    return x / y, _zero_unless_finite(rest / b)


def exp_sum(
    x: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"] = 1.0,
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> tuple[Float[Array, "*batch N"], LogSum]:
    """Unnormalised weights ``exp((x - max x) / beta)`` and their `LogSum`.

    Args:
      x: Exponents before the division by ``beta``.
      beta: Positive; a number or one per row.
      where: True for real entries.
      axis_name: Mapped axis over which the last axis is split.

    Returns:
      The weights in [0, 1] (0 where masked), and the sum of all of them over the last axis and ``axis_name``.
    """
    x = as_float(x)
    check_alike(where, x)
    if where is not None:
        x = jnp.where(where, x, -jnp.inf)
    shift = pmax(jnp.max(x, axis=-1, initial=-jnp.inf), axis_name)
    # Masked entries stand at the shift while they are exponentiated: finite values, finite gradients.
    real = x != -jnp.inf
    centred = jnp.where(real, jnp.where(real, x, 0) - _finite(shift)[..., None], 0)
    weights = jnp.where(real, jnp.exp(divide(centred, beta)), 0)
    count = jnp.full(x.shape[:-1], x.shape[-1], x.dtype) if where is None else jnp.sum(where, -1, dtype=x.dtype)
    mass, square, count = psum((jnp.sum(weights, -1), jnp.sum(jnp.square(weights), -1), count), axis_name)
    return weights, LogSum(shift=shift / beta, mass=mass, square=square, count=count)


def logsumexp(
    x: Float[Array, "*batch N"], *, where: Bool[Array, "*batch N"] | None = None, axis_name: AxisName = None
) -> Float[Array, "*batch"]:
    """``log sum_i exp(x_i)`` over the real entries of the last axis; -inf where there is none.

    Example:
      >>> round(float(logsumexp(jnp.array([0.0, 0.0, jnp.nan]), where=jnp.array([True, True, False]))), 6)
      0.693147
    """
    return exp_sum(x, where=where, axis_name=axis_name)[1].log_sum


def logmeanexp(
    x: Float[Array, "*batch N"], *, where: Bool[Array, "*batch N"] | None = None, axis_name: AxisName = None
) -> Float[Array, "*batch"]:
    """``log (1/n) sum_i exp(x_i)`` over the ``n`` real entries of the last axis; 0 where there is none."""
    return exp_sum(x, where=where, axis_name=axis_name)[1].log_mean


def log_softmax(
    x: Float[Array, "*batch N"],
    *,
    factor: Numeric = 1.0,
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch N"]:
    """``factor x_i - log sum_j exp(factor x_j)`` over the real entries, to rounding where it is near 0 too.

    Args:
      x: Exponents before the multiplication by ``factor``, so that what all have in common costs no digits.
      factor: Positive.
      where: True for real entries.
      axis_name: Mapped axis over which the last axis is split.

    Returns:
      The log-shares, at most 0, the shape of ``x``; 0 where masked.

    Example:
      >>> f"{log_softmax(jnp.array([1012.0, 1000.0]))[0]:.4e}"
      '-6.1442e-06'
    """
    x = as_float(x)
    check_alike(where, x)
    real = jnp.full(x.shape, True) if where is None else where
    x = jnp.where(real, x, 0)
    top = pmax(jnp.max(x, axis=-1, initial=-jnp.inf, where=real), axis_name)
    below = factor * (x - _finite(top)[..., None])
    first = real & (x == top[..., None])
    # All of the mass but the 1 of a largest entry: a small remainder keeps its digits.
    rest = jnp.where(first, jnp.expm1(jnp.where(first, below, 0)), jnp.where(real, jnp.exp(below), 0))
    rest, ties = psum((jnp.sum(rest, axis=-1), jnp.sum(first, axis=-1, dtype=x.dtype)), axis_name)
    total = jnp.log1p(rest + jnp.maximum(ties - 1, 0))
    return jnp.where(real, below - total[..., None], 0)


def empty(shape: tuple[int, ...] = (), dtype: Dtype = jnp.float32) -> LogSum:
    """The sum of nothing: the neutral element of `merge`, and the first carry of a scan."""
    zero = jnp.zeros(shape, dtype)
    return LogSum(shift=jnp.full(shape, -jnp.inf, dtype), mass=zero, square=zero, count=zero)


def merge(a: LogSum, b: LogSum) -> LogSum:
    """The sum of two disjoint parts: associative, commutative, exact to rounding."""
    shift = jnp.maximum(a.shift, b.shift)
    fa, fb = (jnp.where(p.mass == 0, 0, jnp.exp(jnp.where(p.mass == 0, 0, p.shift - shift))) for p in (a, b))
    return LogSum(
        shift=shift,
        mass=fa * a.mass + fb * b.mass,
        square=jnp.square(fa) * a.square + jnp.square(fb) * b.square,
        count=a.count + b.count,
    )


def exp_remainder(x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """``exp(x) - 1 - x``, to rounding near 0 too, where the difference would lose every digit.

    Example:
      >>> x = jnp.float32(1e-3)
      >>> f"{exp_remainder(x):.4e}", f"{jnp.exp(x) - 1 - x:.4e}"
      ('5.0017e-07', '5.2352e-07')
    """
    small = jnp.abs(x) < 0.5
    near = jnp.where(small, x, 0)
    series = jnp.ones_like(near)
    for k in range(15, 2, -1):
        series = 1 + series * near / k
    far = jnp.where(small | (x == jnp.inf), 1, x)
    return jnp.where(small, jnp.square(near) / 2 * series, jnp.where(x == jnp.inf, x, jnp.expm1(far) - far))


def _halves(x: Array) -> tuple[Array, Array]:
    info = jnp.finfo(x.dtype)
    high = jax.lax.reduce_precision(x, info.nexp, info.nmant // 2)
    return high, x - high


def _zero_unless_finite(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def _finite(shift: Array) -> Array:
    return jnp.where(jnp.isfinite(shift), shift, 0)


def _safe_log(x: Array) -> Array:
    return jnp.log(jnp.where(x == 0, 1, x))
