"""Other functions of the margin: squared, hinge, matched to a soft label, learned, and of the batch's order statistics.

Pairs are two candidates: index 0 chosen, index 1 rejected. Throughout, ``a = log(pi / p_ref)`` of a completion, a sum
over its tokens in nats, ``m = beta (a_0 - a_1)`` the margin, and ``sigma`` the logistic function.
"""

import jax
import jax.numpy as jnp

from tiltjax.losses.preference.pairs import (
    MAX_EXPONENT,
    Beta,
    Length,
    check_smoothing,
    gap,
    logistic,
    mean_logp,
    pairs,
    ratio_gap,
)
from tiltjax.ops.checks import check_at_least, check_per_row, check_positive
from tiltjax.ops.collectives import axis_index, axis_size, psum
from tiltjax.ops.logspace import scale
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, AxisName, Bool, Float, Numeric

__all__ = [
    "aot_loss",
    "aot_unpaired_loss",
    "apo_down_loss",
    "apo_zero_loss",
    "discopop_loss",
    "exo_loss",
    "hinge_loss",
    "ipo_loss",
    "slic_loss",
]


# Where the logistic function is 0 or 1 in float64 too.
_FURTHEST = 1000.0


def ipo_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    length: Length | None = None,
    *,
    beta: Beta,
    length_average: bool,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Identity preference optimisation: the gap of log-ratios regressed on a constant.

    .. math:: \left( h - \frac{1}{2 \beta} \right)^2, \qquad
              h = a_0 - a_1 \ \text{ or } \ \frac{a_0}{|y_0|} - \frac{a_1}{|y_1|}

    Inverts the tilt of a bounded reward: with sums, over pairs drawn from :math:`\mu`, its minimiser is
    :math:`p_\text{ref} \exp(E_{y' \sim \mu} P(y \succ y') / \beta) / Z`, so labels without noise do not push the
    policy to a vertex as they do in `dpo_loss`. Pitfall: sums and averages are not interchangeable. At ``beta`` 0.1
    the target is 5 nats a completion, or 5 nats a token. Neither is a default: the paper and the code of DPO, OpenRLHF
    and XPO sum; TRL's trainer and HALOs average, and TRL reports that the authors confirm the average for their
    published results.

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats.
      ref_logp: The reference's, nats; no gradient.
      length: Number of tokens of each; needed for the average only.
      beta: Strength of the KL term, > 0, in units of preference probability; the paper's ``tau``. A number, or one per
        pair.
      length_average: Whether log-ratios are divided by the length.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite, or ``length`` is None with
        ``length_average``.

    Example:
      >>> logp, ref_logp = jnp.array([-4.0, -8.0]), jnp.array([-6.0, -5.0])
      >>> float(ipo_loss(logp, ref_logp, beta=0.25, length_average=False))  # (5 - 2)^2
      9.0
      >>> float(ipo_loss(logp, ref_logp, jnp.array([2, 3]), beta=0.25, length_average=True))  # (2 - 2)^2
      0.0

    References:
      Azar et al., 2023, arXiv:2310.12036, Eq. 17.
    """
    check_positive("beta", beta)
    if length_average and length is None:
        raise ValueError("length must be given with length_average=True, got None")
    real, logp, ref_logp, *rest = pairs(where, logp, ref_logp, *([length] if length_average else []), beta=beta)
    h = gap(mean_logp(logp - ref_logp, rest[0])) if length_average else ratio_gap(logp, ref_logp)
    return jnp.where(real, jnp.square(h - 1 / (2 * beta)), 0)


def hinge_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    *,
    beta: Beta,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""The hinge of rejection sampling optimisation (RSO): no gradient once the margin is met.

    .. math:: \max\left( 0, 1 - m \right)

    Stops at a gap of log-ratios of :math:`1/\beta`, so it inverts no tilt exactly. Pitfall: the paper pairs it with
    completions sampled from the estimated optimum; on pairs of another source it is SLiC with a reference.

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats.
      ref_logp: The reference's, nats; no gradient.
      beta: Strength of the KL term, > 0. A number, or one per pair.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Liu et al., 2023, arXiv:2309.06657.
    """
    check_positive("beta", beta)
    real, logp, ref_logp = pairs(where, logp, ref_logp, beta=beta)
    return jnp.where(real, jax.nn.relu(1 - beta * ratio_gap(logp, ref_logp)), 0)


def slic_loss(
    logp: Float[Array, "*batch 2"],
    target_logp: Float[Array, "*batch"] | None = None,
    *,
    margin: Numeric = 1.0,
    nll_weight: Numeric = 0.1,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""SLiC-HF: calibrates likelihoods by a hinge, without a reference, and imitates a target.

    .. math:: \max\left( 0, \delta - \log \pi(y_0) + \log \pi(y_1) \right) - \lambda \log \pi(y_\text{sft})

    Inverts no tilt; the second term stands for the reference. Pitfall: ``margin`` is in nats of the whole completion.

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats.
      target_logp: Policy's log-probability of the completion to imitate, per pair, nats; it is trained too. None means
        the chosen one.
      margin: ``delta``, >= 0, nats; 1 in the paper and in HALOs.
      nll_weight: ``lambda``, >= 0; 0.1 in HALOs.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``margin`` or ``nll_weight`` is a negative Python number.

    References:
      Zhao et al., 2023, arXiv:2305.10425.
    """
    check_at_least("margin", margin, 0)
    check_at_least("nll_weight", nll_weight, 0)
    real, logp = pairs(where, logp, target_logp=target_logp)
    target = logp[..., 0] if target_logp is None else jnp.where(real, as_float(target_logp), 0)
    return jnp.where(real, jax.nn.relu(margin - gap(logp)) - scale(nll_weight, target), 0)


def exo_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    *,
    beta: Beta,
    label_smoothing: Numeric,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Efficient exact optimisation on pairs: the reverse KL from the policy's preference to the smoothed label.

    .. math:: \sigma(m) \left[ \log \sigma(m) - \log(1 - \varepsilon) \right]
              + \sigma(-m) \left[ \log \sigma(-m) - \log \varepsilon \right]

    A pair's minimum is the finite margin :math:`\sigma(m) = 1 - \varepsilon`, as with `dpo_loss` and that smoothing, by
    the reverse instead of the forward divergence. Where a share ``p`` of the labels prefers one completion it rests at
    :math:`m = (2p - 1) \log((1 - \varepsilon)/\varepsilon)`: a tilt, but not by the Bradley-Terry reward. Pitfall: it
    diverges as :math:`\varepsilon \to 0`, and its gradient vanishes at a large margin of the wrong sign, too.

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats.
      ref_logp: The reference's, nats; no gradient.
      beta: Strength of the KL term, > 0. A number, or one per pair.
      label_smoothing: Share of flipped labels, in (0, 0.5).
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``, nats; 0 where masked.

    Raises:
      ValueError: If ``beta`` is not positive and finite or ``label_smoothing`` outside (0, 0.5), as Python numbers.

    References:
      Ji et al., 2024, arXiv:2402.00856.
    """
    check_positive("beta", beta)
    check_smoothing(label_smoothing, positive=True)
    real, logp, ref_logp = pairs(where, logp, ref_logp, beta=beta)
    # Beyond the bound both terms are constant in every precision, and an infinite margin would be 0 times infinity.
    bound = jnp.asarray(_FURTHEST, logp.dtype)
    m = jax.lax.clamp(-bound, beta * ratio_gap(logp, ref_logp), bound)
    agree = jax.nn.sigmoid(m) * (jax.nn.log_sigmoid(m) - jnp.log1p(-label_smoothing))
    flipped = jax.nn.sigmoid(-m) * (jax.nn.log_sigmoid(-m) - jnp.log(label_smoothing))
    return jnp.where(real, agree + flipped, 0)


def apo_zero_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    *,
    beta: Beta,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Anchored preference optimisation, zero: chosen above the reference, rejected below it.

    .. math:: 1 - \sigma(\beta a_0) + \sigma(\beta a_1)

    For chosen completions better than what the policy would write. Inverts no tilt: each log-ratio is anchored at 0 by
    itself. Pitfall: gradients vanish far from the reference in either direction, and as it is no function of the
    margin, its reward would not be free of the constant of the prompt.

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats.
      ref_logp: The reference's, nats; no gradient.
      beta: Scale of the reward, > 0, per nat. A number, or one per pair.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``, in [0, 2]; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      D'Oosterlinck et al., 2024, arXiv:2408.06266.
    """
    check_positive("beta", beta)
    real, logp, ref_logp = pairs(where, logp, ref_logp, beta=beta)
    ratio = logp - ref_logp
    return jnp.where(real, jax.nn.sigmoid(-beta * ratio[..., 0]) + jax.nn.sigmoid(beta * ratio[..., 1]), 0)


def apo_down_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    *,
    beta: Beta,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Anchored preference optimisation, down: both completions below the reference, the rejected further.

    .. math:: \sigma(\beta a_0) + 1 - \sigma(m)

    For chosen completions worse than what the policy would write. Otherwise as `apo_zero_loss`.

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats.
      ref_logp: The reference's, nats; no gradient.
      beta: Scale of the reward, > 0, per nat. A number, or one per pair.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``, in [0, 2]; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      D'Oosterlinck et al., 2024, arXiv:2408.06266.
    """
    check_positive("beta", beta)
    real, logp, ref_logp = pairs(where, logp, ref_logp, beta=beta)
    raised = logp[..., 0] - ref_logp[..., 0]
    return jnp.where(real, jax.nn.sigmoid(beta * raised) + jax.nn.sigmoid(-beta * ratio_gap(logp, ref_logp)), 0)


def discopop_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    *,
    beta: Beta,
    tau: Numeric = 0.05,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""DiscoPOP, the log-ratio modulated loss: logistic below the margin 0, exponential above it.

    .. math:: -(1 - g) \log \sigma(m) + g\, e^{-m}, \qquad g = \sigma(m / \tau)

    Found by a language model's search over losses. Inverts no tilt exactly. Pitfall: it is not convex: a local maximum
    just above the margin 0, a local minimum just below it, where a pair of the wrong order can rest. The second term is
    formed in log space, as ``e^-m`` overflows where ``g`` vanishes.

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats.
      ref_logp: The reference's, nats; no gradient.
      beta: Strength of the KL term, > 0. A number, or one per pair.
      tau: Width of the change, > 0, units of the margin; 0.05 in the paper.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` or ``tau`` is a Python number that is not positive and finite.

    References:
      Lu et al., 2024, arXiv:2406.08414.
    """
    check_positive("beta", beta)
    check_positive("tau", tau)
    real, logp, ref_logp = pairs(where, logp, ref_logp, beta=beta)
    m = beta * ratio_gap(logp, ref_logp)
    exponential = jnp.exp(jnp.minimum(jax.nn.log_sigmoid(m / tau) - m, MAX_EXPONENT))
    return jnp.where(real, jax.nn.sigmoid(-m / tau) * logistic(m) + exponential, 0)


def aot_loss(
    logp: Float[Array, "*batch B 2"],
    ref_logp: Float[Array, "*batch B 2"],
    *,
    beta: Numeric,
    label_smoothing: Numeric = 0.0,
    where: Bool[Array, "*batch B 2"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch B"]:
    r"""Alignment by optimal transport, paired: the policy's gaps dominate the reference's, quantile by quantile.

    .. math:: -\log \sigma\left( \beta \left[ d_i - d^\text{ref}_{(k_i)} \right] \right), \qquad
              d = \log \pi(y_0) - \log \pi(y_1), \quad k_i = \mathrm{rank}(d_i)

    Both gaps are sorted over the batch, so a pair is compared with the reference's gap of the same rank, not of its
    own prompt: first-order stochastic dominance of the distributions. Depends on the batch; a pair's loss stands at
    its own place, so that permuting the batch permutes the losses. The ranks carry no gradient.

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats. The second last axis is the batch.
      ref_logp: The reference's, nats; no gradient.
      beta: Strength of the KL term, > 0.
      label_smoothing: Share of flipped labels, in [0, 0.5).
      where: True for real candidates; a pair counts where both are.
      axis_name: Mapped axis over which the batch is split; the quantiles are global.

    Returns:
      Loss per pair ``[*batch, B]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is not positive and finite or ``label_smoothing`` outside [0, 0.5), as Python numbers.

    References:
      Melnyk et al., 2024, arXiv:2406.05882.
    """
    check_positive("beta", beta)
    check_smoothing(label_smoothing)
    check_per_row("beta", beta, ())
    real, logp, ref_logp = pairs(where, logp, ref_logp)
    other = _of_same_rank(gap(logp), gap(ref_logp), real, axis_name)
    return jnp.where(real, logistic(beta * (gap(logp) - other), label_smoothing), 0)


def aot_unpaired_loss(
    logp: Float[Array, "*batch B 2"],
    ref_logp: Float[Array, "*batch B 2"],
    *,
    beta: Numeric,
    label_smoothing: Numeric = 0.0,
    where: Bool[Array, "*batch B 2"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch B"]:
    r"""Alignment by optimal transport, unpaired: chosen log-ratios dominate the rejected ones, quantile by quantile.

    .. math:: -\log \sigma\left( \beta \left[ a_{0,i} - a_{1,(k_i)} \right] \right), \qquad
              k_i = \mathrm{rank}(a_{0,i})

    Chosen and rejected need not share a prompt: only the two sets of log-ratios matter. Depends on the batch; the loss
    of a chosen completion stands at its own place, and its gradient reaches the rejected one of the same rank.

    Args:
      logp: Policy's log-probability of a chosen and a rejected completion, sums over tokens, nats. The second last
        axis is the batch.
      ref_logp: The reference's, nats; no gradient.
      beta: Strength of the KL term, > 0.
      label_smoothing: Share of flipped labels, in [0, 0.5).
      where: True for real candidates; a row counts where both are, so that both sets have one size.
      axis_name: Mapped axis over which the batch is split; the quantiles are global.

    Returns:
      Loss per chosen completion ``[*batch, B]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is not positive and finite or ``label_smoothing`` outside [0, 0.5), as Python numbers.

    References:
      Melnyk et al., 2024, arXiv:2406.05882.
    """
    check_positive("beta", beta)
    check_smoothing(label_smoothing)
    check_per_row("beta", beta, ())
    real, logp, ref_logp = pairs(where, logp, ref_logp)
    ratio = logp - ref_logp
    other = _of_same_rank(ratio[..., 0], ratio[..., 1], real, axis_name)
    return jnp.where(real, logistic(beta * (ratio[..., 0] - other), label_smoothing), 0)


def _of_same_rank(x: Array, others: Array, real: Array, axis_name: AxisName) -> Array:
    """For every entry of ``x [*batch, B]``, the entry of ``others`` with its rank in the batch over all devices."""
    x, others = (jnp.where(real, v, 0) for v in (jax.lax.stop_gradient(x), others))
    x, others, masked = (_over_devices(v, axis_name) for v in (x, others, (~real).astype(x.dtype)))
    # Masked entries sort last in both, so the ranks of real ones match.
    order, theirs = (jnp.lexsort((jax.lax.stop_gradient(v), masked), axis=-1) for v in (x, others))
    rank = jnp.argsort(order, axis=-1)
    matched = jnp.take_along_axis(others, jnp.take_along_axis(theirs, rank, axis=-1), axis=-1)
    B = real.shape[-1]
    matched = jax.lax.dynamic_slice_in_dim(matched, axis_index(axis_name) * B, B, axis=-1)
    unknown = jnp.any(jnp.isnan(x) | jnp.isnan(others), axis=-1, keepdims=True)
    return jnp.where(real, jnp.where(unknown, jnp.nan, matched), 0)


def _over_devices(x: Array, axis_name: AxisName) -> Array:
    """All devices' entries of the last axis, side by side."""
    if axis_name is None:
        return x
    B = x.shape[-1]
    whole = jnp.zeros((*x.shape[:-1], B * axis_size(axis_name)), x.dtype)
    return psum(jax.lax.dynamic_update_slice_in_dim(whole, x, axis_index(axis_name) * B, axis=-1), axis_name)
