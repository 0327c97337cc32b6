"""What a step changes: nothing else is state."""

import chex
import jax.numpy as jnp
import optax

from tiltjax.types import Array, Int, Params

__all__ = ["TrainState", "init_state"]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class TrainState:
    """Step, parameters and optimizer state: a pytree.

    Attributes:
      step: How many updates were made, scalar.
      params: What is trained: a whole model, or the trained part of `tiltjax.models.lora.partition`.
      opt_state: State of the optax transformation, of the same structure.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState


def init_state(params: Params, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first step.

    Args:
      params: What is trained.
      tx: An optax gradient transformation.

    Returns:
      `TrainState` at step 0.
    """
    return TrainState(step=jnp.int32(0), params=params, opt_state=tx.init(params))
