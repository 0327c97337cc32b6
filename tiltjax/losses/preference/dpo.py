"""Direct alignment on preference pairs: losses that invert the tilt, so that the policy is its own reward model.

The tilt of the reference towards ``r`` obeys ``r = beta log(p / p_ref) + beta log Z(x)``, and log Z cancels between two
completions of one prompt. Pairs are two candidates: index 0 chosen, index 1 rejected.
"""

import chex
import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_positive
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Bool, Float, Numeric

__all__ = ["dpo_loss", "implicit_reward"]


def dpo_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    label_smoothing: Numeric = 0.0,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Direct preference optimisation: the Bradley-Terry likelihood of the implicit reward.

    .. math:: -(1 - \varepsilon) \log \sigma(m) - \varepsilon \log \sigma(-m), \qquad
              m = \beta \left( \log \frac{\pi(y_0)}{p_\text{ref}(y_0)} - \log \frac{\pi(y_1)}{p_\text{ref}(y_1)} \right)

    Inverts the tilt: over pairs labelled by Bradley-Terry with reward ``r``, its minimiser is
    :math:`p_\text{ref} e^{r/\beta} / Z`, whatever the weights of the pairs, as long as they connect the completions.
    ``label_smoothing`` (cDPO) is the assumed share of flipped labels: the loss then stops at the finite margin
    :math:`\sigma(m) = 1 - \varepsilon`. Pitfalls: log-probabilities are sums over tokens, not means; both likelihoods
    may fall while the margin grows, as only their difference is fitted; at separable labels the margin grows without
    bound.

    Args:
      logp: Policy's log-probability of chosen and rejected, nats.
      ref_logp: The reference's, nats; no gradient.
      beta: Strength of the KL term, > 0, reward units per nat; 0.1 in the paper. A number, or one per pair.
      label_smoothing: Share of flipped labels, in [0, 0.5).
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is not positive and finite or ``label_smoothing`` outside [0, 0.5), as Python numbers.

    Example:
      >>> round(float(dpo_loss(jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0]), beta=0.5)), 4)
      0.3133

    References:
      Rafailov et al., 2023, arXiv:2305.18290, Eq. 7; Mitchell, 2023, "A note on DPO with noisy preferences", Eq. 3.
    """
    check_positive("beta", beta)
    if isinstance(label_smoothing, int | float) and not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing!r}")
    logp, ref_logp = as_float(logp), jax.lax.stop_gradient(as_float(ref_logp))
    chex.assert_equal_shape([logp, ref_logp] if where is None else [logp, ref_logp, where])
    real = True if where is None else jnp.all(where, axis=-1)
    ratio = jnp.where(jnp.expand_dims(real, -1), logp, 0) - jnp.where(jnp.expand_dims(real, -1), ref_logp, 0)
    margin = beta * (ratio[..., 0] - ratio[..., 1])
    agree, flipped = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return jnp.where(real, -(1 - label_smoothing) * agree - label_smoothing * flipped, 0)


def implicit_reward(
    logp: Float[Array, "*batch"], ref_logp: Float[Array, "*batch"], *, beta: Numeric
) -> Float[Array, "*batch"]:
    r"""The reward whose tilt the policy is, up to a constant per prompt: :math:`\beta \log (\pi / p_\text{ref})`.

    Compare it only between completions of one prompt. A metric: it carries no gradient.

    Args:
      logp: Policy's log-probability, nats.
      ref_logp: The reference's, nats.
      beta: Strength of the KL term, > 0.

    Returns:
      Implicit reward, reward units, the shape of ``logp``.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Rafailov et al., 2023, arXiv:2305.18290, section 4.
    """
    check_positive("beta", beta)
    return jax.lax.stop_gradient(beta * (as_float(logp) - as_float(ref_logp)))
