"""Keeps 16-bit arrays 16-bit on a CPU, where XLA would widen them in loops and in saved residuals."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from tiltjax.ops.collectives import alike
from tiltjax.types import Array, Dtype

__all__ = ["KEPT", "as_bits", "from_bits", "gradient_at_rounded", "keep", "part"]

KEPT = "kept"
"""The name under which a rematerialisation policy finds what `keep` was given."""


def as_bits(x: Array) -> Array:
    """``x`` as it is best stored: floats of 16 bits as integers on the CPU, where XLA moves them by way of float32.

    Args:
      x: Any array.

    Returns:
      The same bits, of the same shape.
    """
    narrow = x.dtype.itemsize == 2 and jnp.issubdtype(x.dtype, jnp.floating)
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if narrow and jax.default_backend() == "cpu" else x


def from_bits(x: Array, dtype: Dtype) -> Array:
    """What `as_bits` made, as floats again.

    Args:
      x: From `as_bits`.
      dtype: Of what `as_bits` was given.

    Returns:
      The same bits, of the same shape.
    """
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def part(take: Callable[[Array, Array], Array], x: Array, index: Array) -> Array:
    """``take(x, index)``, a small part of a large array, its 16 bits moved as `as_bits` has them.

    XLA on the CPU would widen all of a 16-bit ``x`` to float32 to take some of it. No gradient passes.

    Args:
      take: Moves numbers and changes none.
      x: Any array.
      index: Which part.

    Returns:
      The part.
    """
    if as_bits(x).dtype == x.dtype:
        return take(x, index)
    # The barrier on the index stops XLA from hoisting the cast of all of x out of the loop.
    x, index = jax.lax.optimization_barrier((x, index))
    return from_bits(take(as_bits(x), index), x.dtype)


def keep(x: Array) -> Array:
    """``x``, named so that a rematerialisation policy for `KEPT` stores it for the gradient.

    For use in the forward half of a gradient's own rule: through the bits themselves no gradient passes.

    Args:
      x: What the rule remembers.

    Returns:
      The same numbers.
    """
    return from_bits(checkpoint_name(as_bits(x), KEPT), x.dtype)


def gradient_at_rounded(function: Callable[..., Array], dtype: Dtype, *x: Array) -> Array:
    r"""A function whose gradient remembers its arguments in ``dtype``.

    .. math:: y = f(x), \qquad \bar x = J_f([x])^\top \bar y

    where ``[.]`` rounds to ``dtype``. What is remembered goes by `keep`, so that a policy for `KEPT` stores it and
    nothing else.

    Args:
      function: Of ``x`` alone, closing over no array that is differentiated.
      dtype: What is remembered; at the width of ``x`` or above it, the function is left as it is.
      *x: Its arguments.

    Returns:
      ``function(*x)``.
    """
    if all(jnp.promote_types(dtype, a.dtype) == dtype for a in x):
        return function(*x)
    return _at_rounded(function, jnp.dtype(dtype), *alike(*x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _at_rounded(function, dtype, *x):
    return function(*x)


def _at_rounded_fwd(function, dtype, *x):
    # Empty arrays remember the types.
    return function(*x), [(keep(a.astype(dtype)), jnp.zeros(0, a.dtype)) for a in x]


def _at_rounded_bwd(function, dtype, saved, grad):
    return jax.vjp(function, *(a.astype(like.dtype) for a, like in saved))[1](grad)


_at_rounded.defvjp(_at_rounded_fwd, _at_rounded_bwd)
