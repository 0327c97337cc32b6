"""Token by token: what a pair weighs and what it counts, to be combined with any loss on pairs."""

import jax
import jax.numpy as jnp

from tiltjax.losses.preference.pairs import MAX_EXPONENT
from tiltjax.ops.checks import check_pair, check_within
from tiltjax.ops.logspace import scale
from tiltjax.ops.masked import as_float, check_alike, masked_mean, masked_sum
from tiltjax.types import Array, Bool, Float, Numeric

__all__ = ["length_desensitised_logp", "wpo_weights"]


def length_desensitised_logp(
    token_logp: Float[Array, "*batch 2 T"], token_mask: Bool[Array, "*batch 2 T"], *, alpha: Numeric
) -> Float[Array, "*batch 2"]:
    r"""LD-DPO: log-probabilities in which the tokens that only the longer completion has count less.

    .. math:: \sum_{t \le \ell} \log \pi(y_t) + \alpha \sum_{t > \ell} \log \pi(y_t), \qquad
              \ell = \min(|y_0|, |y_1|)

    Apply it to policy and reference alike and pass both to `dpo_loss`, whose pull towards length it damps. With
    ``alpha`` 1 it is the plain sum, and 0 cuts both completions to one length.

    Args:
      token_logp: Log-probability of every token of chosen and rejected, nats.
      token_mask: True for completion tokens, the end token included.
      alpha: Weight of the tokens beyond the shorter length, in [0, 1].

    Returns:
      ``[*batch, 2]``, nats.

    Raises:
      ValueError: If ``alpha`` is a Python number outside [0, 1].

    Example:
      >>> mask = jnp.array([[True, True, True], [True, False, False]])
      >>> length_desensitised_logp(-jnp.ones((2, 3)), mask, alpha=0.25).tolist()
      [-1.5, -1.0]

    References:
      Liu et al., 2024, arXiv:2409.06411.
    """
    check_within("alpha", alpha, 0, 1)
    check_pair("token_logp", token_logp, axis=-2)
    check_alike(token_mask, token_logp)
    place = jnp.cumsum(token_mask, axis=-1)
    shared = place <= jnp.min(place[..., -1:], axis=-2, keepdims=True)
    token_logp = as_float(token_logp)
    return masked_sum(token_logp, token_mask & shared) + scale(alpha, masked_sum(token_logp, token_mask & ~shared))


def wpo_weights(
    token_logp: Float[Array, "*batch 2 T"],
    log_collision: Float[Array, "*batch 2 T"],
    token_mask: Bool[Array, "*batch 2 T"],
) -> Float[Array, "*batch"]:
    r"""WPO: how likely the policy itself would be to write both completions of a pair; multiplies any loss on pairs.

    .. math:: \mathrm{sg} \prod_{k=0,1} \exp \frac{1}{|y_k|} \sum_t \Bigl[ \log \pi(y_{k,t})
              - \log \sum_v \pi(v | y_{k,<t})^2 \Bigr]

    Makes stale pairs count like fresh ones: a token drawn from the policy has weight about 1 whatever the entropy
    of its position, as the sum of squares is the mean probability of such a token. Pitfall: weights may exceed 1 where
    a completion is likelier than the policy's own; the exponent is clamped at 80.

    Args:
      token_logp: Policy's log-probability of every token of chosen and rejected, nats.
      log_collision: Log of the sum over the vocabulary of squared probabilities, at every token, nats, <= 0.
      token_mask: True for completion tokens.

    Returns:
      Weight per pair ``[*batch]``, without gradient; 1 for a pair without tokens.

    Example:
      >>> uniform = jnp.full((2, 3), jnp.log(0.25))  # Four tokens, all alike: sum of squares 1/4.
      >>> float(wpo_weights(uniform, uniform, jnp.ones((2, 3), bool)))
      1.0

    References:
      Zhou et al., 2024, arXiv:2406.11827.
    """
    check_pair("token_logp", token_logp, axis=-2)
    check_alike(token_mask, token_logp, log_collision)
    excess = masked_mean(as_float(token_logp) - as_float(log_collision), token_mask)
    return jax.lax.stop_gradient(jnp.exp(jnp.minimum(jnp.sum(excess, axis=-1), MAX_EXPONENT)))
