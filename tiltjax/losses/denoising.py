r"""Diffusion losses: fit the score of the data, fit the score of the tilt, or climb the reward along the reverse chain.

A completion is an image here, flattened to D features; its prompt is what it is conditioned on. Denoising score
matching bounds its negative log-likelihood from above (for the right weights over noise levels), so the weighted loss
is to diffusion what `tiltjax.losses.mle.tilted_mle_loss` is to language: RL-free fine-tuning. The reverse chain of K
Gaussian steps is a policy with K tokens: `transition_logp` and `transition_kl` are the log-probability and the KL of
each, `ddpo_loss` its policy gradient.
"""

import jax
import jax.numpy as jnp

from tiltjax.losses.mle import weighted_mle_loss
from tiltjax.losses.policy_gradient import ppo_clip_loss
from tiltjax.ops.checks import check_choice, check_per_row
from tiltjax.ops.masked import as_float, check_alike
from tiltjax.tilt.weights import tilt
from tiltjax.types import Array, AxisName, Bool, Float, Numeric

__all__ = ["ddpo_loss", "denoising_loss", "transition_kl", "transition_logp", "weighted_denoising_loss"]

_KINDS = ("clean", "noise", "velocity")


def denoising_loss(
    prediction: Float[Array, "*batch N D"],
    clean: Float[Array, "*batch N D"],
    noise: Float[Array, "*batch N D"],
    alpha_bar: Float[Array, "*batch N"],
    *,
    kind: str = "noise",
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch N"]:
    r"""Denoising score matching: the mean squared error of what the network predicts.

    .. math:: \frac1D \| f_\theta(x_t) - \mathrm{sg}(y) \|^2, \qquad
              x_t = \sqrt{\bar\alpha}\, x_0 + \sqrt{1 - \bar\alpha}\, \epsilon, \qquad
              y = \epsilon, \; x_0 \text{ or } \sqrt{\bar\alpha}\, \epsilon - \sqrt{1 - \bar\alpha}\, x_0

    for "noise", "clean" and "velocity". Fits the distribution of ``clean``: at the minimum the prediction is the
    conditional mean of its target, and the score is :math:`-E[\epsilon | x_t] / \sqrt{1 - \bar\alpha}`. The three
    differ in how noise levels weigh: a squared error of 1 in the image is one of SNR in the noise and of 1 + SNR in the
    velocity.

    Args:
      prediction: The network's output at ``x_t``, features last.
      clean: x0, no gradient.
      noise: Standard normal, no gradient.
      alpha_bar: Share of the signal's variance, in [0, 1].
      kind: What ``prediction`` stands for: "clean", "noise" or "velocity".
      where: True for real candidates; None means all.

    Returns:
      Loss per candidate ``[*batch, N]``; 0 where masked.

    Raises:
      ValueError: If ``kind`` is unknown.

    Example:
      >>> one = jnp.ones((1, 2))
      >>> denoising_loss(0 * one, 2 * one, one, jnp.array([0.36]), kind="velocity").round(4).tolist()
      [1.0]

    References:
      Vincent, 2011, "A connection between score matching and denoising autoencoders"; Ho et al., 2020,
      arXiv:2006.11239, Eq. 14; Salimans, Ho, 2022, arXiv:2202.00512, Appendix D (velocity).
    """
    check_choice("kind", kind, _KINDS)
    check_alike(None, prediction, clean, noise)
    check_alike(where, prediction[..., 0], alpha_bar)
    real = None if where is None else where[..., None]
    prediction, clean, noise = (as_float(x if real is None else jnp.where(real, x, 0)) for x in
                                (prediction, clean, noise))  # fmt: skip
    alpha_bar = as_float(alpha_bar if where is None else jnp.where(where, alpha_bar, 1))[..., None]
    velocity = jnp.sqrt(alpha_bar) * noise - jnp.sqrt(1 - alpha_bar) * clean
    target = jax.lax.stop_gradient({"clean": clean, "noise": noise, "velocity": velocity}[kind])
    value = jnp.mean(jnp.square(prediction - target), axis=-1)
    return value if where is None else jnp.where(where, value, 0)


def weighted_denoising_loss(
    prediction: Float[Array, "*batch N D"],
    clean: Float[Array, "*batch N D"],
    noise: Float[Array, "*batch N D"],
    alpha_bar: Float[Array, "*batch N"],
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    kind: str = "noise",
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""RL-free fine-tuning of a diffusion model: denoising score matching under the weights of the tilt.

    .. math:: \sum_i \mathrm{sg}\!\left(\frac{e^{r_i/\beta}}{\sum_j e^{r_j/\beta}}\right) l_i

    with :math:`l_i` of `denoising_loss`. Fits the tilt: as N grows its minimiser is the score of the noised
    :math:`p_\text{ref} e^{r/\beta} / Z`, for every noise level at once, which no guidance of the reference's score is.
    Pitfalls as in `tiltjax.losses.mle.tilted_mle_loss`: candidates of the reference only, enough of them for the
    effective sample size, and weights per prompt.

    Args:
      prediction: As in `denoising_loss`.
      clean: Candidates drawn from the reference; no gradient.
      noise: As in `denoising_loss`.
      alpha_bar: As in `denoising_loss`.
      reward: Of the clean candidates, reward units; no gradient.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      kind: As in `denoising_loss`.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split; the result is global.

    Returns:
      Loss per prompt ``[*batch]``; 0 without a real candidate.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite, or ``kind`` unknown.

    References:
      Jiao, Chen, Li, 2025, arXiv:2509.04372, section on diffusion; Lee et al., 2023, arXiv:2302.12192.
    """
    loss = denoising_loss(prediction, clean, noise, alpha_bar, kind=kind, where=where)
    weights = tilt(jax.lax.stop_gradient(reward), beta=beta, where=where, axis_name=axis_name).weights
    return weighted_mle_loss(-loss, weights, where=where, axis_name=axis_name)


def transition_logp(
    x: Float[Array, "*batch D"], mean: Float[Array, "*batch D"], std: Numeric | Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    r"""Log-density of one Gaussian step: :math:`-\frac{\|x - \mu\|^2}{2 \sigma^2} - D \log(\sigma \sqrt{2\pi})`.

    Args:
      x: Where the step went; no gradient.
      mean: Mean of the step under a policy.
      std: Its standard deviation, > 0; a number, or one per step.

    Returns:
      Nats, ``[*batch]``.

    Example:
      >>> round(float(transition_logp(jnp.zeros(2), jnp.ones(2), 1.0)), 4)
      -2.8379
    """
    x, mean = jax.lax.stop_gradient(as_float(x)), as_float(mean)
    check_per_row("std", std, mean.shape[:-1])
    std = jnp.broadcast_to(jnp.asarray(std, mean.dtype), mean.shape[:-1])
    square = jnp.sum(jnp.square((x - mean) / std[..., None]), axis=-1)
    return -square / 2 - mean.shape[-1] * (jnp.log(std) + jnp.log(2 * jnp.pi) / 2)


def transition_kl(
    mean: Float[Array, "*batch D"], ref_mean: Float[Array, "*batch D"], std: Numeric | Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    r"""KL of one Gaussian step to the reference's of equal width: :math:`\|\mu - \mu_\text{ref}\|^2 / 2 \sigma^2`.

    Summed over the steps of chains that the policy drew, its mean is the KL of the two laws of the whole chain, and
    so a bound, from above, on that of the images.

    Args:
      mean: Mean of the step under the policy.
      ref_mean: Under the reference, at the same point of the chain; no gradient.
      std: Standard deviation of both, > 0; a number, or one per step.

    Returns:
      Nats, ``[*batch]``.

    Example:
      >>> float(transition_kl(jnp.ones(2), jnp.zeros(2), 0.5))
      4.0
    """
    mean, ref_mean = as_float(mean), jax.lax.stop_gradient(as_float(ref_mean))
    check_per_row("std", std, mean.shape[:-1])
    std = jnp.broadcast_to(jnp.asarray(std, mean.dtype), mean.shape[:-1])
    return jnp.sum(jnp.square((mean - ref_mean) / std[..., None]), axis=-1) / 2


def ddpo_loss(
    step_logp: Float[Array, "*batch N K"],
    old_step_logp: Float[Array, "*batch N K"],
    advantage: Float[Array, "*batch N"],
    where: Bool[Array, "*batch N K"],
    *,
    clip: Numeric = 1e-4,
) -> Float[Array, "*batch N"]:
    r"""DDPO: PPO's clipped surrogate, the K reverse steps of an image in the place of the tokens.

    .. math:: \sum_k \max\left( -A \rho_k, -A\, \mathrm{clip}(\rho_k, 1 - \epsilon, 1 + \epsilon) \right), \qquad
              \rho_k = \frac{\pi(x_{k-1} | x_k)}{\pi_\text{old}(x_{k-1} | x_k)}

    Climbs the reward, and no more: there is no KL term in it. Take ``reward - beta KL`` of the chain
    (`transition_kl`) as the reward to climb to the tilt, or stop early. The gradient at the old policy is that of the
    expected reward over chains; ratios of many-dimensional Gaussians move fast, hence a clip three orders narrower
    than PPO's.

    Args:
      step_logp: Policy's `transition_logp` of every step, nats.
      old_step_logp: That of the policy that drew the chain, nats; no gradient.
      advantage: Per candidate, such as `tiltjax.advantages.group_normalised`; no gradient.
      where: True for the steps that count; a deterministic last step does not.
      clip: How far the ratio may move, in (0, 1]; 1e-4 in the paper.

    Returns:
      Loss per candidate ``[*batch, N]``; 0 where all is masked.

    Raises:
      ValueError: If ``clip`` is a Python number out of its range.

    References:
      Black et al., 2023, arXiv:2305.13301, section 4.3 (importance sampling); Fan et al., 2023, arXiv:2305.16381
      (with the KL).
    """
    return jnp.sum(ppo_clip_loss(step_logp, old_step_logp, advantage, where, clip_low=clip, clip_high=clip), axis=-1)
