"""Masked and shardable sums of exponentials, and a running one that never holds all of its terms.

The largest entry is subtracted before the division by a temperature, so the result is exact where ``x / beta`` is 1e5.
A real NaN is never hidden: it makes the sum NaN.
"""

import chex
import jax.numpy as jnp

from tiltjax.ops.collectives import pmax, psum
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, AxisName, Bool, Dtype, Float, Numeric

__all__ = ["LogSum", "divide", "empty", "exp_remainder", "exp_sum", "logmeanexp", "logsumexp", "merge"]


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
    return x / beta if jnp.ndim(beta) == 0 else x / jnp.expand_dims(beta, -1)


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
    if where is not None:
        chex.assert_equal_shape([x, where])
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


def _finite(shift: Array) -> Array:
    return jnp.where(jnp.isfinite(shift), shift, 0)


def _safe_log(x: Array) -> Array:
    return jnp.log(jnp.where(x == 0, 1, x))
