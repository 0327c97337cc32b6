"""Per-token penalties that hold a policy near its reference, and what the gradient of each really is.

An estimator of the KL divergence can have the right value and the wrong gradient. With samples of the policy held
fixed and the log-probability differentiated, as in a loss, the expected gradients of the estimators are

| penalty | expected value | expected gradient as a loss |
| --- | --- | --- |
| `kl_k1` | KL(policy, ref) | 0 |
| `kl_k2` | not the KL | that of the reverse KL(policy, ref) |
| `kl_k3` | KL(policy, ref) | that of the forward KL(ref, policy) |
| `kl_k3_corrected` | KL(policy, ref) | that of the reverse KL(policy, ref), off-policy too |
| `full_vocabulary_kl` | KL(policy, ref) | that of the reverse KL(policy, ref), without sampling noise |

All of this is about one distribution. Where the log-probabilities are those of single tokens, it is the next token's
at a given prefix; a sum of the penalties over tokens leaves out how an early token changes the later prefixes. The
functions of log-probabilities work element by element, so pass those of whole completions (``mask`` of the same shape)
to penalise the divergence of whole completions, or put ``beta * kl_k1``, without gradient, into the reward.
"""

import jax
import jax.numpy as jnp

from tiltjax.ops.logspace import exp_remainder
from tiltjax.ops.masked import as_float, check_alike
from tiltjax.types import Array, Bool, Float

__all__ = ["entropy", "full_vocabulary_kl", "kl_k1", "kl_k2", "kl_k3", "kl_k3_corrected"]

# Log-ratios above this are cut before they are exponentiated, and give no gradient: exp(20) is 4.9e8.
_MAX_LOG_RATIO = 20.0


def kl_k1(
    token_logp: Float[Array, "*batch T"],
    ref_token_logp: Float[Array, "*batch T"],
    mask: Bool[Array, "*batch T"] | None = None,
) -> Float[Array, "*batch T"]:
    r"""The plain log-ratio.

    .. math:: k_1 = \log \pi(y) - \log p_\text{ref}(y)

    Its mean under the policy is the KL divergence. **Never add it to a loss**: its expected gradient there is 0, so it
    only adds noise. Its place is the reward, without gradient: then the policy gradient of its reward-to-go is exactly
    that of the reverse KL of whole completions (`tiltjax.advantages.token_reward`).

    Args:
      token_logp: Policy's log-probability of the sampled tokens, nats.
      ref_token_logp: The reference's, nats; no gradient.
      mask: True for real tokens; None means all.

    Returns:
      One value per token ``[*batch, T]``, nats, of either sign; 0 where masked.

    References:
      Schulman, 2020, "Approximating KL divergence"; Liu et al., 2025, arXiv:2510.01555.
    """
    return _log_ratio(token_logp, ref_token_logp, mask)


def kl_k2(
    token_logp: Float[Array, "*batch T"],
    ref_token_logp: Float[Array, "*batch T"],
    mask: Bool[Array, "*batch T"] | None = None,
) -> Float[Array, "*batch T"]:
    r"""Half the squared log-ratio: a biased value with the right gradient.

    .. math:: k_2 = \tfrac12 \left( \log \pi(y) - \log p_\text{ref}(y) \right)^2

    As a loss on samples of the policy its expected gradient is exactly that of the reverse KL(policy, ref), although
    its value is not the KL: report another one.

    Args:
      token_logp: As in `kl_k1`.
      ref_token_logp: As in `kl_k1`.
      mask: As in `kl_k1`.

    Returns:
      One value per token ``[*batch, T]``, not negative; 0 where masked.

    References:
      Schulman, 2020, "Approximating KL divergence"; Liu et al., 2025, arXiv:2510.01555.
    """
    return jnp.square(_log_ratio(token_logp, ref_token_logp, mask)) / 2


def kl_k3(
    token_logp: Float[Array, "*batch T"],
    ref_token_logp: Float[Array, "*batch T"],
    mask: Bool[Array, "*batch T"] | None = None,
) -> Float[Array, "*batch T"]:
    r"""GRPO's estimator: unbiased and never negative, with the gradient of the other KL.

    .. math:: k_3 = \frac{p_\text{ref}(y)}{\pi(y)} - 1 - \log \frac{p_\text{ref}(y)}{\pi(y)}

    On samples of the policy its mean is the reverse KL(policy, ref) and, as a loss, its expected gradient is that of
    the **forward** KL(ref, policy): it pulls the policy over all that the reference does, and never asks it to leave
    what the reference avoids. `kl_k3_corrected` has the reverse gradient. Neither statement holds off-policy. Accurate
    to rounding at small log-ratios; ``ref / policy`` is cut at exp(20), beyond which it gives no gradient.

    Args:
      token_logp: As in `kl_k1`.
      ref_token_logp: As in `kl_k1`.
      mask: As in `kl_k1`.

    Returns:
      One value per token ``[*batch, T]``, nats, not negative; 0 where masked.

    Example:
      >>> [round(float(k), 4) for k in kl_k3(jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.25, 0.75])))]
      [0.1931, 0.0945]

    References:
      Schulman, 2020, "Approximating KL divergence"; Shao et al., 2024, arXiv:2402.03300, Eq. 4; Liu et al., 2025,
      arXiv:2510.01555.
    """
    return exp_remainder(jnp.minimum(-_log_ratio(token_logp, ref_token_logp, mask), _MAX_LOG_RATIO))


def kl_k3_corrected(
    token_logp: Float[Array, "*batch T"],
    ref_token_logp: Float[Array, "*batch T"],
    old_token_logp: Float[Array, "*batch T"],
    mask: Bool[Array, "*batch T"] | None = None,
) -> Float[Array, "*batch T"]:
    r"""`kl_k3` times the importance ratio, with gradient through the ratio.

    .. math:: \frac{\pi(y)}{\pi_\text{old}(y)} \left( \frac{p_\text{ref}(y)}{\pi(y)} - 1
              - \log \frac{p_\text{ref}(y)}{\pi(y)} \right)

    On samples of the old policy, and so on-policy too, both its mean and its expected gradient as a loss are those of
    the reverse KL(policy, ref). With the old policy as the reference, value and gradient are 0 for every sample where
    the two agree. Both ratios are cut at exp(20).

    Args:
      token_logp: As in `kl_k1`.
      ref_token_logp: As in `kl_k1`.
      old_token_logp: Log-probability under the policy that drew the tokens, nats; no gradient. On-policy, pass
        ``token_logp``.
      mask: As in `kl_k1`.

    Returns:
      One value per token ``[*batch, T]``, nats, not negative; 0 where masked.

    References:
      Liu et al., 2025, arXiv:2510.01555.
    """
    ratio = jnp.exp(jnp.minimum(_log_ratio(token_logp, old_token_logp, mask), _MAX_LOG_RATIO))
    return ratio * kl_k3(token_logp, ref_token_logp, mask)


def full_vocabulary_kl(
    logits: Float[Array, "*batch V"],
    ref_logits: Float[Array, "*batch V"],
    mask: Bool[Array, "*batch"] | None = None,
) -> Float[Array, "*batch"]:
    r"""The reverse KL of the next token, summed over the vocabulary.

    .. math:: \mathrm{KL}(\pi \,\|\, p_\text{ref}) = \sum_v \pi(v) \log \frac{\pi(v)}{p_\text{ref}(v)}

    Its gradient as a loss is exactly that of the reverse KL at the given prefix, whoever drew the prefix, without
    sampling noise. It needs all logits in memory. Entries of ``logits`` that are -inf take no part; where the reference
    alone is -inf the divergence is infinite and has no gradient.

    Args:
      logits: Policy's logits.
      ref_logits: The reference's (or, for mirror descent, the previous policy's); no gradient.
      mask: True for real positions; None means all.

    Returns:
      The divergence per position ``[*batch]``, nats, not negative up to rounding; 0 where masked.

    Example:
      >>> round(float(full_vocabulary_kl(jnp.zeros(2), jnp.log(jnp.array([0.25, 0.75])))), 4)
      0.1438
    """
    check_alike(None, logits, ref_logits)
    logp, possible = _log_softmax(logits, mask)
    ref_logp, ref_possible = _log_softmax(jax.lax.stop_gradient(ref_logits), mask)
    gap = logp - jnp.where(ref_possible | ~possible, ref_logp, -jnp.inf)
    return jnp.sum(jnp.where(possible, jnp.exp(logp) * gap, 0), axis=-1)


def entropy(logits: Float[Array, "*batch V"], mask: Bool[Array, "*batch"] | None = None) -> Float[Array, "*batch"]:
    r"""Entropy of the next token.

    .. math:: H(\pi) = -\sum_v \pi(v) \log \pi(v) = \log V - \mathrm{KL}(\pi \,\|\, \mathrm{uniform})

    Subtracted from a loss, its gradient is exactly that of the next token's entropy at the given prefix, without
    sampling noise. The mean of ``-token_logp`` has the same value and, as a loss, no expected gradient: see `kl_k1`.
    For entropies without logits in memory, see `tiltjax.ops.tokens.token_logp`.

    Args:
      logits: Policy's logits; -inf entries take no part.
      mask: True for real positions; None means all.

    Returns:
      Entropy per position ``[*batch]``, nats; 0 where masked.

    Example:
      >>> round(float(entropy(jnp.zeros(8))), 4)
      2.0794
    """
    logp, possible = _log_softmax(logits, mask)
    value = -jnp.sum(jnp.where(possible, jnp.exp(logp) * logp, 0), axis=-1)
    return value if mask is None else jnp.where(mask, value, 0)


def _log_ratio(token_logp: Array, ref_token_logp: Array, mask: Array | None) -> Array:
    """``logp - sg(ref_logp)``, and 0 where masked: every penalty of a log-ratio of 0 is 0."""
    logp, ref_logp = as_float(token_logp), jax.lax.stop_gradient(as_float(ref_token_logp))
    check_alike(mask, logp, ref_logp)
    return logp - ref_logp if mask is None else jnp.where(mask, logp, 0) - jnp.where(mask, ref_logp, 0)


def _log_softmax(logits: Array, mask: Array | None) -> tuple[Array, Array]:
    """Log-probabilities, 0 in place of -inf, and where they were finite; logits are all 0 where masked."""
    logits = as_float(logits)
    check_alike(mask, logits[..., 0])
    if mask is not None:
        logits = jnp.where(mask[..., None], logits, 0)
    logp = jax.nn.log_softmax(logits)
    possible = logp != -jnp.inf
    return jnp.where(possible, logp, 0), possible
