"""Low-rank adapters as transformations of the parameter pytree: add, split off, merge."""

from collections.abc import Collection

import jax
import jax.numpy as jnp
from flax import nnx

from tiltjax.models.layers import Linear
from tiltjax.models.transformer import Transformer
from tiltjax.ops.checks import check_at_least, check_choice
from tiltjax.ops.matmul import matmul
from tiltjax.types import Array, Params, PRNGKey

__all__ = ["TARGETS", "add", "combine", "is_adapter", "merge", "partition"]

TARGETS = ("query", "key", "value", "out", "gate", "up", "down")
"""The linear maps of a block that may have an adapter."""


def add(
    key: PRNGKey, model: Transformer, *, rank: int, alpha: int | float | None = None, targets: Collection[str] = TARGETS
) -> Transformer:
    r"""The same model with a pair of low-rank matrices beside every targeted kernel.

    .. math:: W' = W + \frac{\alpha}{r} A B, \qquad A \sim N(0, 1/\mathrm{in}), \quad B = 0

    Args:
      key: Draws A.
      model: A `tiltjax.models.transformer.Transformer`.
      rank: r, at least 1.
      alpha: Scale; None means ``rank``, a factor of 1.
      targets: Which linear maps of a block get one.

    Returns:
      A new model with the same outputs; the given one is not changed.

    Raises:
      ValueError: If ``rank`` < 1 or a target is unknown.

    References:
      Hu et al., 2021, arXiv:2106.09685, Eq. 3.
    """
    check_at_least("rank", rank, 1)
    model = jax.tree.map(lambda x: x, model)
    for i, name in enumerate(sorted(targets)):
        check_choice("targets", name, TARGETS)
        linear: Linear | None = getattr(model.blocks, name)
        if linear is None:
            continue
        layers, features_in, features_out = linear.kernel.shape
        a = jax.random.normal(jax.random.fold_in(key, i), (layers, features_in, rank)) * features_in**-0.5
        linear.lora_a = nnx.data(nnx.Param(a.astype(linear.kernel.dtype)))
        linear.lora_b = nnx.data(nnx.Param(jnp.zeros((layers, rank, features_out), linear.kernel.dtype)))
        linear.scale = 1.0 if alpha is None else alpha / rank
    return model


def merge(model: Transformer) -> Transformer:
    """The same function without adapters: every ``A B`` is added to its kernel in float32.

    Args:
      model: A model, with adapters or without.

    Returns:
      A new model whose linear maps are plain.
    """
    model = jax.tree.map(lambda x: x, model)
    for name in TARGETS:
        linear = getattr(model.blocks, name)
        if linear is None or linear.lora_a is None:
            continue
        linear.kernel = nnx.Param(_merged(linear.kernel[...], linear.lora_a[...], linear.lora_b[...], linear.scale))
        linear.lora_a = linear.lora_b = nnx.data(None)
        linear.scale = 1.0
    return model


@jax.jit
def _merged(kernel: Array, a: Array, b: Array, scale: float | Array) -> Array:
    product = jax.vmap(lambda a, b: matmul(a, b, jnp.float32))(a, b)
    return (kernel + product * scale).astype(kernel.dtype)


def is_adapter(path: tuple) -> bool:
    """Whether a parameter path (of `jax.tree_util`) leads into an adapter."""
    return any(getattr(k, "name", None) in ("lora_a", "lora_b") for k in path)


def partition(params: Params, trainable) -> tuple[Params, Params]:
    """Splits a pytree into a trained and a frozen part of the same structure, None where the other has the leaf.

    Args:
      params: Any pytree of arrays.
      trainable: ``path -> bool``, for instance `is_adapter`.

    Returns:
      ``(trained, frozen)``; `combine` is the inverse.
    """
    trained = jax.tree_util.tree_map_with_path(lambda p, x: x if trainable(p) else None, params)
    frozen = jax.tree_util.tree_map_with_path(lambda p, x: None if trainable(p) else x, params)
    return trained, frozen


def combine(trained: Params, frozen: Params) -> Params:
    """Puts the two halves of `partition` together again."""
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)
