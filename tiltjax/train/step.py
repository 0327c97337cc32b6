"""One pure train step: the same function on one device, under `jax.pmap`, and under a sharded `jax.jit`."""

from collections.abc import Callable, Mapping

import chex
import jax
import jax.numpy as jnp
import optax

from tiltjax.ops.checks import check_at_least
from tiltjax.ops.collectives import pmean
from tiltjax.ops.masked import Average
from tiltjax.train.state import TrainState
from tiltjax.types import Array, AxisName, Float, Params, PRNGKey, PyTree

__all__ = ["LossFn", "train_step"]

LossFn = Callable[[Params, Params, PyTree, PRNGKey], tuple[Average, Mapping[str, Average]]]
"""``(params, frozen, batch, key) -> (loss, metrics)``, every one an `Average` over this part of the batch."""


def train_step(
    state: TrainState,
    batch: PyTree,
    key: PRNGKey,
    frozen: Params = None,
    *,
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    axis_name: AxisName = None,
    microbatches: int = 1,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    r"""One update on one batch.

    .. math:: \theta' = \theta + \mathrm{tx}\Big(\frac{\nabla \sum_d \sum_m \mathrm{total}_{dm}(\theta)}
                                                       {\sum_d \sum_m \mathrm{count}_{dm}}\Big)

    Losses are averaged once, by (total, count) over devices d and microbatches m: parts of unequal size (in prompts or
    in tokens) give the gradient of the one big batch. A loss that couples the prompts of a batch couples those of a
    microbatch only.

    Args:
      state: `TrainState`.
      batch: Pytree of arrays whose leading axis is prompts.
      key: Handed to ``loss_fn``; microbatch m gets ``fold_in(key, m)``.
      frozen: What the loss reads and never changes (reference parameters, the untrained part of a model).
      loss_fn: `LossFn`.
      tx: Optimizer, with clipping and schedule inside.
      axis_name: Mapped axis over which ``batch`` is split.
      microbatches: Gradient accumulation: how many parts, computed one after the other; divides the number of prompts.

    Returns:
      The next state, and scalars: ``loss``, ``grad_norm`` and the means of the loss's own metrics.

    Raises:
      ValueError: If ``microbatches`` < 1.
      AssertionError: If it does not divide the number of prompts.
    """
    check_at_least("microbatches", microbatches, 1)

    def total(params, part, key):
        # The value is global before it is differentiated, so that pmean of the gradients is right under pmap as under
        # shard_map, also where the loss communicates.
        loss, metrics = loss_fn(params, frozen, part, key)
        loss = loss.psum(axis_name)
        # Of one part the mean, which saves a pass over all gradients to divide them.
        return loss.mean if microbatches == 1 else loss.total, {**metrics, "loss": loss}

    grad_fn = jax.grad(total, has_aux=True)
    if microbatches == 1:
        grads, metrics = grad_fn(state.params, batch, key)
    else:
        parts = jax.tree.map(lambda x: _split(x, microbatches), batch)
        keys = jax.vmap(lambda m: jax.random.fold_in(key, m))(jnp.arange(microbatches))
        shapes = jax.eval_shape(grad_fn, state.params, jax.tree.map(lambda x: x[0], parts), keys[0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def accumulate(carry, inputs):
            return jax.tree.map(jnp.add, carry, grad_fn(state.params, *inputs)), None

        (grads, metrics), _ = jax.lax.scan(accumulate, zeros, (parts, keys))
        count = jnp.maximum(metrics["loss"].count, jnp.finfo(jnp.float32).tiny)
        grads = jax.tree.map(lambda g: g / count.astype(g.dtype), grads)
    loss = metrics.pop("loss")
    grads = pmean(grads, axis_name)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    scalars = {name: value.psum(axis_name).mean for name, value in metrics.items()}
    scalars |= {"loss": loss.mean, "grad_norm": optax.tree.norm(grads)}
    return TrainState(step=state.step + 1, params=params, opt_state=opt_state), scalars


def _split(x: Array, parts: int) -> Array:
    """``[B, ...] -> [parts, B / parts, ...]``, strided: a sharded prompt axis stays where it is."""
    chex.assert_is_divisible(x.shape[0], parts)
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)
