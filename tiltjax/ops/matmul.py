"""Matrix products with narrow operands and wide results, forward and backward: the fast path of every matrix unit."""

import functools
import pathlib

import jax
import jax.numpy as jnp

from tiltjax.ops.bits import as_bits, from_bits
from tiltjax.ops.bits import keep as kept
from tiltjax.ops.collectives import alike
from tiltjax.types import Array, Dtype, Float

__all__ = [
    "dot",
    "matmul",
    "multiplies_bfloat16",
    "outer",
    "product",
    "scale_rows",
    "turned_is_faster",
    "turned_matmul",
]

_PADDING = 16


def product(
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    sums: tuple[tuple[int, ...], tuple[int, ...]],
    batch: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
) -> Float[Array, "..."]:
    """`jax.lax.dot_general` with a float32 (or wider) result, in a form that the backend can run.

    Every product of the library with 16-bit operands is made here. XLA on the CPU compiles such a product and fails
    when it runs it, if it has folded a transposition of the result into the product. A barrier behind the product
    keeps it from that, and the gradient multiplies float32 operands. Other backends run every form.

    Args:
      x: Left operand.
      w: Right operand, of the same type.
      sums: Axes of ``x`` and of ``w`` that are summed over.
      batch: Axes of ``x`` and of ``w`` that run along with each other.

    Returns:
      Batch axes, then the other axes of ``x``, then those of ``w``.
    """
    return (_guarded if _narrow_on_cpu(x.dtype) else _dot_general)((sums, batch), x, w)


def _dot_general(dimensions, x, w):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, w, dimensions, preferred_element_type=wide)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _guarded(dimensions, x, w):
    return jax.lax.optimization_barrier(_dot_general(dimensions, x, w))


def _guarded_fwd(dimensions, x, w):
    return _guarded(dimensions, x, w), (x, w)


def _guarded_bwd(dimensions, saved, grad):
    wide = (a.astype(jnp.float32) for a in saved)
    grads = jax.vjp(functools.partial(_dot_general, dimensions), *wide)[1](grad)
    return tuple(g.astype(a.dtype) for g, a in zip(grads, saved, strict=True))


_guarded.defvjp(_guarded_fwd, _guarded_bwd)


def dot(x: Float[Array, "M D"], w: Float[Array, "C D"], dtype: Dtype) -> Float[Array, "M C"]:
    """``x w^T`` with operands in ``dtype`` and a float32 (or wider) result.

    Args:
      x: Rows.
      w: Rows.
      dtype: Of the operands.

    Returns:
      Every row of ``x`` with every row of ``w``.
    """
    return _product(x.astype(dtype), w.astype(dtype), 1)


def matmul(
    x: Float[Array, "*batch I"], w: Float[Array, "I O"], dtype: Dtype, *, keep: bool = False
) -> Float[Array, "*batch O"]:
    r"""``x W`` with operands in ``dtype`` and a float32 (or wider) result; so are the products of its gradient.

    .. math:: y = [x] [W], \qquad \bar x = [\bar y] [W]^\top, \qquad \bar W = [x]^\top [\bar y]

    where ``[.]`` rounds to ``dtype``. Without a rule of its own the gradient would multiply the float32 ``\bar y`` with
    the rounded operands, which every machine does at the speed of float32.

    Args:
      x: Any leading axes.
      w: One matrix.
      dtype: Of the operands.
      keep: Names the rounded ``x`` by `tiltjax.ops.bits.keep`, to be stored for the gradient of ``w``.

    Returns:
      The products; their gradients come in the types of ``x`` and ``w``.
    """
    if jnp.dtype(dtype) == jnp.promote_types(dtype, jnp.float32):
        return _product(x.astype(dtype), w.astype(dtype), 0)
    return _narrow(jnp.dtype(dtype), keep, *alike(x, w))


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this machine has units for products of bfloat16: GPUs and TPUs, and CPUs with AVX-512 BF16 or AMX."""
    if jax.default_backend() != "cpu":
        return True
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in text or "amx_bf16" in text


def turned_is_faster(rows: int, features_in: int, features_out: int, dtype: Dtype) -> bool:
    """Whether `turned_matmul` beats `matmul` on this machine: on a CPU, for all but small narrow products.

    Args:
      rows: Of ``x``.
      features_in: I.
      features_out: O.
      dtype: Of the operands.

    Returns:
      What was measured of XLA on AVX-512: up to twice as fast for 2,048 x 8,192; False off the CPU.
    """
    small = rows < 32 and features_in * features_out < 2**21 and jnp.dtype(dtype).itemsize == 2
    return jax.default_backend() == "cpu" and not small


def turned_matmul(
    w: Float[Array, "O I"], x: Float[Array, "_ _"], dtype: Dtype, *, axis: int = 1
) -> Float[Array, "O _"]:
    """``W x^T`` (``axis=1``) or ``W x`` (0): the products of few rows, as columns.

    Before it multiplies, XLA on the CPU brings the second operand of a product into an order of its own. Where ``x``
    has few rows, that takes as long as the product if the second operand is the matrix, and no time if it is ``x``.

    Args:
      w: One matrix, rows of outputs.
      x: R rows ``[R, I]``, or columns ``[I, R]`` as this function returns them.
      dtype: Of the operands.
      axis: The one of ``x`` to sum over.

    Returns:
      The products, ``[O, R]``, float32 or wider.
    """
    rows, x = x.shape[1 - axis], x.astype(dtype)
    if rows == 1:
        x = _two_rows(x) if axis else _two_rows(x).T
    # The barrier keeps XLA from swapping the operands.
    return jax.lax.optimization_barrier(_product(w.astype(dtype), x, axis))[:, :rows]


def scale_rows(x: Float[Array, "*batch D"], factor: Float[Array, "*batch"]) -> Float[Array, "*batch D"]:
    r"""``x`` times one number per row.

    .. math:: y_i = f_i x_i, \qquad \bar f_i = \bar y_i \cdot x_i

    Written as a product of matrices, so that its gradient is one too: XLA on the CPU sums the products of two arrays
    an order of magnitude slower in any other form.

    Args:
      x: Rows.
      factor: Of each.

    Returns:
      The scaled rows.
    """
    return jnp.einsum("...d,...->...d", x, factor, precision=jax.lax.Precision.HIGHEST)


def _product(x, w, over_w):
    """Of the last axis of ``x`` with axis ``over_w`` of the matrix ``w``."""
    if x.size == x.shape[-1] and _narrow_on_cpu(x.dtype):
        return _product(_two_rows(x), w, over_w)[:1].reshape(*x.shape[:-1], -1)
    return product(x, w, ((x.ndim - 1,), (over_w,)))


def _two_rows(x):
    """Of one: for a single one XLA on the CPU would make a float32 copy of all of the matrix."""
    return jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0)))


def _narrow_on_cpu(dtype):
    return dtype == jnp.bfloat16 and jax.default_backend() == "cpu"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _narrow(dtype, keep, x, w):
    return _narrow_fwd(dtype, keep, x, w)[0]


def _narrow_fwd(dtype, keep, x, w):
    rounded = kept(x.astype(dtype)) if keep else x.astype(dtype)
    # An empty array remembers the type of x; w itself is kept, as nothing new has to be stored for it.
    return _product(rounded, w.astype(dtype), 0), (rounded, w, jnp.zeros(0, x.dtype))


def _narrow_bwd(dtype, keep, saved, grad):
    x, w, like = saved
    grad = grad.astype(dtype)
    grad_x = _product(grad, w.astype(dtype), 1)
    return grad_x.astype(like.dtype), outer(x, grad).astype(w.dtype)


_narrow.defvjp(_narrow_fwd, _narrow_bwd)


def outer(x: Float[Array, "*batch I"], y: Float[Array, "*batch O"]) -> Float[Array, "I O"]:
    """``x^T y``, summed over all leading axes, with a float32 (or wider) result.

    XLA on the CPU multiplies narrow operands fast only where the sum runs along the rows of the first; it would fold a
    plain transposition into the product, and does not fold a padded one.
    """
    if _narrow_on_cpu(x.dtype) and jax.device_count() == 1:
        return transposed_outer(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))
    axes = tuple(range(x.ndim - 1))
    return product(x, y, (axes, axes))


def transposed_outer(x: Float[Array, "M I"], y: Float[Array, "M O"]) -> Float[Array, "I O"]:
    """`outer` of bfloat16 through a transposed copy of ``x``, padded with zeros along the sum."""
    padded = from_bits(jnp.pad(as_bits(x).T, ((0, 0), (0, _PADDING))), x.dtype)
    return _product(padded, jnp.pad(y, ((0, _PADDING), (0, 0))), 0)
