"""A reference that follows the policy: soft and hard updates of its parameters, as pure functions.

Update after the optimiser's step. Reference log-probabilities computed before an update are those of the old reference
from then on. Updated too often, the reference no longer holds the policy anywhere.
"""

import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_fraction
from tiltjax.types import Array, Int, Numeric, Params

__all__ = ["hard_update", "soft_update", "update_reference"]


def hard_update(ref_params: Params, params: Params) -> Params:
    r"""The reference becomes the policy: :math:`\theta_\text{ref} \leftarrow \theta`.

    Args:
      ref_params: The reference's parameters.
      params: The policy's, the same structure.

    Returns:
      New reference: copies, in buffers of their own (donating ``params`` later leaves them intact) and in the
      reference's precision.

    References:
      Gorbatovski et al., 2024, arXiv:2404.09656, section 3.
    """
    return jax.tree.map(lambda old, new: jnp.array(new, jnp.result_type(old), copy=True), ref_params, params)


def soft_update(ref_params: Params, params: Params, *, alpha: Numeric = 0.6) -> Params:
    r"""The reference moves towards the policy.

    .. math:: \theta_\text{ref} \leftarrow \alpha \theta + (1 - \alpha) \theta_\text{ref}

    Mixed in float32 or wider and kept in the reference's precision. Leaves that are not floating are copied.

    Args:
      ref_params: The reference's parameters.
      params: The policy's, the same structure.
      alpha: Share of the policy, in (0, 1]; 1 is `hard_update`. The paper favours 0.5 to 0.6.

    Returns:
      New reference, in buffers of its own.

    Raises:
      ValueError: If ``alpha`` is a Python number outside (0, 1].

    Example:
      >>> soft_update({"w": jnp.array([0.0, 2.0])}, {"w": jnp.array([1.0, 4.0])}, alpha=0.5)["w"].tolist()
      [0.5, 3.0]

    References:
      Gorbatovski et al., 2024, arXiv:2404.09656, section 3.
    """
    check_fraction("alpha", alpha)

    def mix(old, new):
        dtype = jnp.result_type(old)
        if not jnp.issubdtype(dtype, jnp.floating):
            return jnp.array(new, dtype, copy=True)
        wide = jnp.promote_types(dtype, jnp.float32)
        return (alpha * jnp.asarray(new, wide) + (1 - alpha) * jnp.asarray(old, wide)).astype(dtype)

    return jax.tree.map(mix, ref_params, params)


def update_reference(
    ref_params: Params, params: Params, step: int | Int[Array, ""], *, every: int, alpha: Numeric = 0.6
) -> Params:
    """`soft_update` at every ``every``-th step, nothing in between: TR-DPO.

    Args:
      ref_params: The reference's parameters.
      params: The policy's after the optimiser's step, the same structure.
      step: How many optimiser steps have been taken, 1 after the first; may be traced.
      every: Steps between updates, >= 1; the paper favours 256 to 512.
      alpha: As in `soft_update`; 1 is the hard variant.

    Returns:
      The reference for the next step.

    Raises:
      ValueError: If ``every`` or ``alpha`` is out of its range.

    References:
      Gorbatovski et al., 2024, arXiv:2404.09656, section 3.
    """
    check_at_least("every", every, 1)
    check_fraction("alpha", alpha)
    due = jnp.asarray(step) % every == 0
    return jax.lax.cond(
        due, lambda old, new: soft_update(old, new, alpha=alpha), lambda old, _: old, ref_params, params
    )
