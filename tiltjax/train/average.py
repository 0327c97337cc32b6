"""An exponential moving average of the parameters that travels in the optimizer's state.

So it is checkpointed, restored, sharded and donated with everything else, and the train step need not know of it.
"""

from typing import NamedTuple

import jax.numpy as jnp
import optax

from tiltjax.train.reference import hard_update, soft_update
from tiltjax.types import Array, Int, Params

__all__ = ["AveragedState", "averaged"]


class AveragedState(NamedTuple):
    """State of `averaged`.

    Attributes:
      inner: Of the optimizer itself.
      average: The averaged parameters.
      count: How many updates are in it, scalar.
    """

    inner: optax.OptState
    average: Params
    count: Int[Array, ""]


def averaged(tx: optax.GradientTransformation, *, decay: float = 0.999) -> optax.GradientTransformation:
    r"""An optimizer that also averages the parameters it leads to.

    .. math:: \bar\theta \leftarrow d_t \bar\theta + (1 - d_t)\, \theta, \qquad
              d_t = \min\left(\text{decay}, \frac{1 + t}{10 + t}\right)

    The start of the run is forgotten quickly, whatever ``decay`` is.

    Args:
      tx: The optimizer; its updates are left as they are.
      decay: In [0, 1); 1 / (1 - decay) steps are remembered.

    Returns:
      A transformation whose state is an `AveragedState`; it needs ``params``.

    Raises:
      ValueError: If ``decay`` lies outside of [0, 1).

    Example:
      >>> tx = averaged(optax.sgd(1.0), decay=0.5)
      >>> params = {"w": jnp.array(0.0)}
      >>> _, state = tx.update({"w": jnp.array(-1.0)}, tx.init(params), params)
      >>> round(float(state.average["w"]), 4)
      0.9
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay must lie in [0, 1), got {decay!r}")

    def init(params: Params) -> AveragedState:
        return AveragedState(inner=tx.init(params), average=hard_update(params, params), count=jnp.int32(0))

    def update(updates: Params, state: AveragedState, params: Params = None) -> tuple[Params, AveragedState]:
        updates, inner = tx.update(updates, state.inner, params)
        alpha = 1 - jnp.minimum(decay, (1.0 + state.count) / (10.0 + state.count))
        average = soft_update(state.average, optax.apply_updates(params, updates), alpha=alpha)
        return updates, AveragedState(inner=inner, average=average, count=state.count + 1)

    return optax.GradientTransformation(init, update)
