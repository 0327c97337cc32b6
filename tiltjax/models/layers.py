"""Parts of a transformer: linear maps with optional low-rank adapters, norms, rotary positions."""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from tiltjax.ops.bits import as_bits, from_bits, part
from tiltjax.ops.matmul import matmul, scale_rows, turned_matmul
from tiltjax.types import Array, Dtype, Float, PRNGKey, PyTree

__all__ = ["ACTIVATIONS", "NARROW", "WIDEN", "Linear", "Norm", "entry", "rotary", "rotate", "scan_layers"]

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
"""Name -> the non-linearity of an MLP."""


WIDEN = ("query", "key", "value", "gate", "up")
"""Column-parallel projections: the output dimension is sharded over ``tensor``."""

NARROW = ("out", "down")
"""Row-parallel projections: the input dimension is sharded over ``tensor``."""


class Linear(nnx.Module):
    """``y = x W + b``, and with adapters ``y = x W + (x A) B * scale + b`` (LoRA).

    Attributes:
      kernel: ``[in, out]``.
      bias: ``[out]`` or None.
      lora_a: ``[in, rank]`` or None.
      lora_b: ``[rank, out]`` or None; zero at the start, so that adapters change nothing until trained.
      scale: ``alpha / rank``.
      turned: Whether the kernel is stored as ``[out, in]``, see `turn`.
    """

    def __init__(self, key: PRNGKey, features_in: int, features_out: int, *, bias: bool, std: float):
        self.kernel = nnx.Param(jax.random.normal(key, (features_in, features_out)) * std)
        self.bias = nnx.data(nnx.Param(jnp.zeros(features_out)) if bias else None)
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.scale = 1.0
        self.turned = False

    def __call__(self, x: Float[Array, "*batch I"], dtype: Dtype, *, keep: bool = False) -> Float[Array, "*batch O"]:
        """Operands in ``dtype``, result in float32 or wider; ``keep`` as in `tiltjax.ops.matmul.matmul`."""
        if self.turned:
            return self.columns(x.reshape(-1, x.shape[-1]), dtype).T.reshape(*x.shape[:-1], len(self.kernel))
        y = matmul(x, self.kernel[...], dtype, keep=keep)
        if self.lora_a is not None and self.lora_b is not None:
            y = y + matmul(matmul(x, self.lora_a[...], dtype), self.lora_b[...], dtype) * self.scale
        return y if self.bias is None else y + _along_last(self.bias[...], y)

    def columns(self, x: Float[Array, "_ _"], dtype: Dtype, *, axis: int = 1) -> Float[Array, "out _"]:
        """What a turned kernel gives of rows ``[R, in]`` or, with ``axis=0``, columns ``[in, R]``: columns."""
        y = turned_matmul(self.kernel[...], x, dtype, axis=axis)
        if self.lora_a is not None and self.lora_b is not None:
            rows = x if axis else x.T
            y = y + matmul(matmul(rows, self.lora_a[...], dtype), self.lora_b[...], dtype).T * self.scale
        return y if self.bias is None else y + self.bias[...][:, None]

    def turn(self) -> "Linear":
        """The same map with its kernel stored as `tiltjax.ops.matmul.turned_matmul` reads it."""
        other = jax.tree.map(lambda x: x, self)
        kernel = self.kernel[...]
        # Behind a barrier, lest XLA take the transposition into the product again.
        other.kernel = nnx.Param(from_bits(jax.lax.optimization_barrier(as_bits(kernel).T), kernel.dtype))
        other.turned = True
        return other


class Norm(nnx.Module):
    """RMS norm, or layer norm with a bias, over the last axis in float32 or wider.

    Attributes:
      scale: ``[D]``.
      bias: ``[D]``, None for RMS norm.
      eps: Added to the variance.
    """

    def __init__(self, features: int, *, kind: str, eps: float):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.data(nnx.Param(jnp.zeros(features)) if kind == "layer" else None)
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Normalises the last axis."""
        if self.bias is not None:
            x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = scale_rows(x, jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1) + self.eps))
        x = x * _along_last(self.scale[...], x)
        return x if self.bias is None else x + _along_last(self.bias[...], x)


@jax.custom_jvp
def entry(x: Array, index: Array) -> Array:
    """``x[index]``: one layer of a stack, or rows of an embedding, taken by `tiltjax.ops.bits.part`.

    Args:
      x: Any array.
      index: Into its first axis, any shape.

    Returns:
      ``[*index.shape, *x.shape[1:]]``.
    """
    return part(operator.getitem, x, index)


@entry.defjvp
def _entry_jvp(primals, tangents):
    return entry(*primals), tangents[0][primals[1]]


def scan_layers(
    layer: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]], x: PyTree, stack: PyTree
) -> tuple[PyTree, PyTree]:
    """`jax.lax.scan` over layers that are stacked along the first axis of their arrays, 16 bits taken by `entry`.

    Args:
      layer: ``(x, one layer) -> (x, what is collected)``.
      x: Before the first layer.
      stack: All layers.

    Returns:
      ``x`` after the last one, and what was collected, stacked.
    """
    arrays, form = jax.tree.flatten(stack)
    whole = [as_bits(a).dtype != a.dtype for a in arrays]

    def step(x, inputs):
        i, sliced = inputs
        one = [entry(a, i) if skip else b for a, b, skip in zip(arrays, sliced, whole, strict=True)]
        return layer(x, jax.tree.unflatten(form, one))

    sliced = [None if skip else a for a, skip in zip(arrays, whole, strict=True)]
    return jax.lax.scan(step, x, (jnp.arange(len(arrays[0])), sliced))


def rotary(
    position: Array, *, dim: int, theta: float, scaling: tuple | None = None
) -> tuple[Float[Array, "*batch R"], Float[Array, "*batch R"]]:
    """Cosines and sines of the rotary angles, ``R = dim / 2``.

    Args:
      position: Integer positions, any shape.
      dim: How many dimensions of a head rotate.
      theta: Base of the angles.
      scaling: See `tiltjax.models.config.TransformerConfig.rope_scaling`.

    Returns:
      ``(cos, sin)``, each ``[*position, dim / 2]``.

    References:
      Su et al., 2021, arXiv:2104.09864, Eq. 15.
    """
    frequency = theta ** (-jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
    if scaling is not None:
        frequency = frequency / scaling[1] if scaling[0] == "linear" else _llama3(frequency, *scaling[1:])
    angle = position[..., None].astype(jnp.float32) * _along_last(frequency, position[..., None])
    return jnp.cos(angle), jnp.sin(angle)


def rotate(
    x: Float[Array, "*batch L d"], cos: Float[Array, "*#batch L R"], sin: Float[Array, "*#batch L R"]
) -> Float[Array, "*batch L d"]:
    """Rotates the first ``2 R`` dimensions of every head by its position (the two halves are the pairs)."""
    R = cos.shape[-1]
    first, second, rest = x[..., :R], x[..., R : 2 * R], x[..., 2 * R :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _llama3(frequency: Array, factor: float, low: float, high: float, original: float) -> Array:
    """Slow dimensions are stretched by ``factor``, fast ones kept, those between interpolated (Llama 3.1)."""
    turns = original * frequency / (2 * jnp.pi)
    smooth = jnp.clip((turns - low) / (high - low), 0, 1)
    return frequency * (smooth + (1 - smooth) / factor)


def _along_last(vector: Array, like: Array) -> Array:
    """``vector [D]`` with leading ones, so that nothing is promoted implicitly."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)
