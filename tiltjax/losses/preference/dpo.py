"""The logistic family: Bradley-Terry likelihoods of an implicit reward, its divergences, noise models and anchors.

The tilt of the reference towards ``r`` obeys ``r = beta log(p / p_ref) + beta log Z(x)``, and log Z cancels between two
completions of one prompt. Pairs are two candidates: index 0 chosen, index 1 rejected. Log-probabilities are sums over
the completion's tokens, in nats; reference and policy see the same template and truncation, dropout off in both.
"""

import jax
import jax.numpy as jnp

from tiltjax.losses.preference.pairs import Beta, Length, check_smoothing, gap, logistic, mean_logp, pairs, ratio_gap
from tiltjax.ops.checks import check_at_least, check_choice, check_per_row, check_positive
from tiltjax.ops.logspace import scale
from tiltjax.ops.masked import as_float, check_alike
from tiltjax.tilt.f_divergence import divergence_link
from tiltjax.types import Array, Bool, Float, Numeric

__all__ = [
    "chi_po_loss",
    "divergence_link",
    "dpo_loss",
    "dpo_nll_loss",
    "dpop_loss",
    "implicit_reward",
    "robust_dpo_loss",
]

# Those whose link is infinite at 0, so that the reward can be recovered. Mixed chi-squared is `chi_po_loss`.
_DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")


def dpo_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    *,
    beta: Beta,
    divergence: str = "reverse_kl",
    alpha: Numeric = 0.5,
    label_smoothing: Numeric = 0.0,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Direct preference optimisation: the Bradley-Terry likelihood of the implicit reward.

    .. math:: -(1 - \varepsilon) \log \sigma(m) - \varepsilon \log \sigma(-m), \qquad
              m = \beta \left( f'(u_0) - f'(u_1) \right), \quad u_i = \frac{\pi(y_i)}{p_\text{ref}(y_i)}

    where :math:`f'(u) = \log u` for the default, reverse KL, and `divergence_link` for the others (f-DPO). Inverts the
    tilt: over pairs labelled by Bradley-Terry with reward ``r``, its minimiser is :math:`p_\text{ref} e^{r/\beta} / Z`,
    whatever the weights of the pairs, as long as they connect the completions; for other divergences it is
    :math:`p_\text{ref} (f')^{-1}((r - \lambda) / \beta)`, the normaliser ``lambda`` inside the inverse.
    ``label_smoothing`` (cDPO) is the assumed share of flipped labels: the loss then stops at the finite margin
    :math:`\sigma(m) = 1 - \varepsilon`. Pitfalls: log-probabilities are sums over tokens, not means (for the
    length-normalised variant, divide both by the length first); both likelihoods may fall while the margin grows, as
    only their difference is fitted; at separable labels the margin grows without bound.

    Args:
      logp: Policy's log-probability of chosen and rejected, nats.
      ref_logp: The reference's, nats; no gradient.
      beta: Strength of the KL term, > 0, reward units per nat; 0.1 in the paper. A number, or one per pair.
      divergence: "reverse_kl", "forward_kl", "js" (Jensen-Shannon) or "alpha".
      alpha: Of the alpha divergence, in (0, 1]: 0 is the limit reverse KL, 1 is forward KL. The paper's convention;
        TRL since 0.29 writes ``1 - alpha``. The default is where both agree.
      label_smoothing: Share of flipped labels, in [0, 0.5).
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is not positive and finite, ``label_smoothing`` outside [0, 0.5) or ``alpha`` outside
        (0, 1], as Python numbers; or if ``divergence`` is unknown.

    Example:
      >>> round(float(dpo_loss(jnp.array([-4.0, -6.0]), jnp.array([-5.0, -5.0]), beta=0.5)), 4)
      0.3133

    References:
      Rafailov et al., 2023, arXiv:2305.18290, Eq. 7; Mitchell, 2023, "A note on DPO with noisy preferences", Eq. 3;
      Wang et al., 2023, arXiv:2309.16240 (f-DPO).
    """
    check_positive("beta", beta)
    check_smoothing(label_smoothing)
    check_choice("divergence", divergence, _DIVERGENCES)
    real, logp, ref_logp = pairs(where, logp, ref_logp, beta=beta)
    if divergence == "reverse_kl":
        margin = beta * ratio_gap(logp, ref_logp)
    else:
        margin = beta * gap(divergence_link(logp - ref_logp, divergence=divergence, alpha=alpha))
    return jnp.where(real, logistic(margin, label_smoothing), 0)


def robust_dpo_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    *,
    beta: Beta,
    label_smoothing: Numeric,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Robust DPO: an unbiased estimate, from flipped labels, of the loss on clean ones.

    .. math:: \frac{-(1 - \varepsilon) \log \sigma(m) + \varepsilon \log \sigma(-m)}{1 - 2 \varepsilon}

    with the margin ``m`` of `dpo_loss`. Inverts the tilt of the clean labels where a share :math:`\varepsilon` of them
    is flipped at random. Pitfalls: the loss has no lower bound, as it falls with :math:`-\varepsilon m / (1 -
    2 \varepsilon)`, so negative values are no fault and its variance grows as :math:`\varepsilon \to 1/2`; it is not
    the smoothing of `dpo_loss`, which stops at a finite margin.

    Args:
      logp: Policy's log-probability of chosen and rejected, nats.
      ref_logp: The reference's, nats; no gradient.
      beta: Strength of the KL term, > 0. A number, or one per pair.
      label_smoothing: Share of flipped labels, in [0, 0.5); 0 is `dpo_loss`.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is not positive and finite or ``label_smoothing`` outside [0, 0.5), as Python numbers.

    References:
      Chowdhury et al., 2024, arXiv:2403.00409.
    """
    check_positive("beta", beta)
    check_smoothing(label_smoothing)
    real, logp, ref_logp = pairs(where, logp, ref_logp, beta=beta)
    margin = beta * ratio_gap(logp, ref_logp)
    # log sigma(-m) = log sigma(m) - m: no difference of large numbers.
    loss = -jax.nn.log_sigmoid(margin) - scale(label_smoothing / (1 - 2 * label_smoothing), margin)
    return jnp.where(real, loss, 0)


def chi_po_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    *,
    beta: Beta,
    reward_bound: Numeric | None = None,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Chi-squared preference optimisation: DPO whose regulariser is chi-squared plus KL, hence pessimistic.

    .. math:: -\log \sigma\left( \mathrm{clip}_{[-2R, 2R]}\, \beta \left[ \phi(u_0) - \phi(u_1) \right] \right),
              \qquad \phi(u) = u + \log u

    Inverts the tilt of the divergence :math:`f(u) = (u - 1)^2 / 2 + u \log u`: its optimum is
    :math:`p_\text{ref} W(e^{(r - \lambda)/\beta})` with Lambert's W, which grows like the reward and not like its
    exponential. Pitfalls: the clip is part of the analysed algorithm, and a pair outside it has no gradient; without
    it :math:`\phi` grows with the probability ratio itself, and its exponent is clamped at 80.

    Args:
      logp: Policy's log-probability of chosen and rejected, nats.
      ref_logp: The reference's, nats; no gradient.
      beta: Strength of the divergence, > 0, reward units. A number, or one per pair.
      reward_bound: ``R``, the largest absolute reward, > 0; None leaves out the clip.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` or ``reward_bound`` is a Python number that is not positive and finite.

    References:
      Huang et al., 2024, arXiv:2407.13399.
    """
    check_positive("beta", beta)
    check_positive("reward_bound", reward_bound)
    real, logp, ref_logp = pairs(where, logp, ref_logp, beta=beta)
    margin = beta * gap(divergence_link(logp - ref_logp, divergence="mixed_chi_squared"))
    if reward_bound is not None:
        margin = jnp.clip(margin, -2 * reward_bound, 2 * reward_bound)
    return jnp.where(real, logistic(margin), 0)


def dpop_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    *,
    beta: Beta,
    penalty: Numeric = 50.0,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""DPO-positive (Smaug): DPO that may not lower the likelihood of the chosen completion.

    .. math:: -\log \sigma\left( \beta \left[ a_0 - a_1 - \lambda \max(0, -a_0) \right] \right), \qquad
              a_i = \log \frac{\pi(y_i)}{p_\text{ref}(y_i)}

    Inverts the tilt only while the chosen completion is at least as likely as under the reference. Pitfall: the
    penalty stands inside the bracket that ``beta`` multiplies, as in the paper; where it is written outside, that
    weight is :math:`\beta \lambda`; and it is subtracted from the margin, not from the loss.

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats.
      ref_logp: The reference's, nats; no gradient.
      beta: Strength of the KL term, > 0; 0.3 in the paper. A number, or one per pair.
      penalty: ``lambda``, >= 0, per nat; 50 in the paper, which finds 5 and 500 alike.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is not positive and finite or ``penalty`` negative, as Python numbers.

    References:
      Pal et al., 2024, arXiv:2402.13228.
    """
    check_positive("beta", beta)
    check_at_least("penalty", penalty, 0)
    real, logp, ref_logp = pairs(where, logp, ref_logp, beta=beta)
    fallen = jax.nn.relu(ref_logp[..., 0] - logp[..., 0])
    return jnp.where(real, logistic(beta * (ratio_gap(logp, ref_logp) - penalty * fallen)), 0)


def dpo_nll_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    length: Length,
    *,
    beta: Beta,
    nll_weight: Numeric = 1.0,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""DPO plus the likelihood of the chosen completion: the loss of iterative reasoning preference optimisation.

    .. math:: -\log \sigma(m) - \alpha \frac{\log \pi(y_0)}{|y_0|}

    with the margin ``m`` of `dpo_loss`. The second term imitates the chosen completion, so its likelihood cannot
    collapse while the margin grows. Pitfall: each chosen completion is averaged over its own tokens, as in the paper;
    code that averages over the tokens of the batch instead weighs long completions more.

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats.
      ref_logp: The reference's, nats; no gradient.
      length: Number of tokens of each.
      beta: Strength of the KL term, > 0; 0.1 in the paper. A number, or one per pair.
      nll_weight: ``alpha``, >= 0; 1 in the paper.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is not positive and finite or ``nll_weight`` negative, as Python numbers.

    References:
      Pang et al., 2024, arXiv:2404.19733, Eq. 1.
    """
    check_positive("beta", beta)
    check_at_least("nll_weight", nll_weight, 0)
    real, logp, ref_logp, length = pairs(where, logp, ref_logp, length, beta=beta)
    loss = logistic(beta * ratio_gap(logp, ref_logp)) - scale(nll_weight, mean_logp(logp, length)[..., 0])
    return jnp.where(real, loss, 0)


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
    check_per_row("beta", beta, ())
    check_alike(None, logp, ref_logp)
    return jax.lax.stop_gradient(beta * (as_float(logp) - as_float(ref_logp)))
