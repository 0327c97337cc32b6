"""Losses on completions judged one by one: desirable or not, or with a reward each, against a noise distribution.

Throughout, ``a = log(pi / p_ref)`` of a completion, a sum over its tokens in nats, ``r = beta a`` its implicit reward,
and ``sigma`` the logistic function. `kto_loss` and `bco_loss` know no prompts: their last axis is the batch.
"""

import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_boolean, check_pair, check_per_row, check_positive
from tiltjax.ops.logspace import centred_difference, log_softmax, over_row, scale
from tiltjax.ops.masked import Average, as_float, average, check_alike, masked_mean, masked_sum
from tiltjax.tilt.weights import tilt
from tiltjax.types import Array, AxisName, Bool, Float, Numeric

__all__ = ["bco_loss", "bco_shift", "info_nca_loss", "kto_loss", "nca_loss", "nca_pair_loss"]


def kto_loss(
    logp: Float[Array, "*batch N"],
    ref_logp: Float[Array, "*batch N"],
    desirable: Bool[Array, "*batch N"],
    mismatched_log_ratio: Float[Array, "*batch M"],
    *,
    beta: Numeric,
    lambda_desirable: Numeric = 1.0,
    lambda_undesirable: Numeric = 1.0,
    where: Bool[Array, "*batch N"] | None = None,
    mismatched_where: Bool[Array, "*batch M"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch N"]:
    r"""Kahneman-Tversky optimisation: a value function, concave in gains and convex in losses, of one completion.

    .. math:: \lambda_y - v = \begin{cases} \lambda_D \left[ 1 - \sigma(\beta (a - z_0)) \right] & \text{desirable} \\
              \lambda_U \left[ 1 - \sigma(\beta (z_0 - a)) \right] & \text{undesirable} \end{cases}, \qquad
              z_0 = \mathrm{sg} \max\Bigl( 0, \frac1M \sum_j a'_j \Bigr)

    The reference point :math:`z_0` estimates :math:`\mathrm{KL}(\pi || p_\text{ref})` from completions under other
    prompts of the batch, cheaply and with bias. Inverts no tilt: on contradictory labels it goes to the majority for
    certain, where DPO can settle on the minority. Pitfalls: the mean of :math:`a'` is taken over all devices before
    the maximum; ``beta`` multiplies :math:`a - z_0`, not :math:`a` alone; gradients vanish far from the reference
    point on either side; average the loss over all examples, not per class; a batch of one has no mismatched pair.

    Args:
      logp: Policy's log-probability of every example, nats. The last axis is the batch, examples of all prompts.
      ref_logp: The reference's, nats; no gradient.
      desirable: Whether each example is desirable.
      mismatched_log_ratio: ``log(pi / p_ref)`` of completions of other prompts, such as the batch's own shifted by
        one, under the prompts of the batch, nats; no gradient.
      beta: Scale of the reward, > 0, per nat; 0.1 in the official code.
      lambda_desirable: Weight of desirable examples, >= 0. The paper advises a ratio of ``lambda_desirable`` times
        their number to the same of the undesirable ones between 1 and 4/3.
      lambda_undesirable: Weight of undesirable examples, >= 0.
      where: True for real examples.
      mismatched_where: True for real mismatched pairs; with none, the reference point is 0.
      axis_name: Mapped axis over which examples and mismatched pairs are split; the reference point is global.

    Returns:
      Loss per example ``[*batch, N]``, in ``[0, lambda]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is not positive and finite or a ``lambda`` is negative, as Python numbers.

    Example:
      >>> good = jnp.array([True, False])
      >>> kto_loss(jnp.array([-4.0, -4.0]), jnp.array([-6.0, -6.0]), good, jnp.array([1.0, 3.0]), beta=0.1).tolist()
      [0.5, 0.5]

    References:
      Ethayarajh et al., 2024, arXiv:2402.01306, Eqs. 7-8.
    """
    check_positive("beta", beta)
    check_at_least("lambda_desirable", lambda_desirable, 0)
    check_at_least("lambda_undesirable", lambda_undesirable, 0)
    check_per_row("beta", beta, ())
    check_boolean("desirable", desirable)
    check_alike(where, logp, desirable)
    real, ratio = _log_ratio(logp, ref_logp, where)
    # Without gradient before the mean, so that none crosses the devices.
    mismatched = jax.lax.stop_gradient(as_float(mismatched_log_ratio))
    point = jnp.maximum(masked_mean(mismatched, mismatched_where, axis_name=axis_name), 0)
    gain = beta * (ratio - over_row("the mean of mismatched_log_ratio", point, ratio))
    good = lambda_desirable * jax.nn.sigmoid(-gain)
    return jnp.where(real, jnp.where(desirable, good, lambda_undesirable * jax.nn.sigmoid(gain)), 0)


def bco_loss(
    logp: Float[Array, "*batch N"],
    ref_logp: Float[Array, "*batch N"],
    desirable: Bool[Array, "*batch N"],
    shift: Numeric | Float[Array, "*batch"],
    *,
    beta: Numeric,
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch N"]:
    r"""Binary classifier optimisation: the implicit reward as the logit of "desirable".

    .. math:: -\log \sigma(r - \delta) \ \text{ if desirable, else } \ -\log \sigma(\delta - r)

    The two losses of a pair bound DPO's from above, whatever the shift :math:`\delta`, and most closely when it lies
    between the two rewards; `bco_shift` keeps the running mean of all rewards for it. The reward of one completion is
    known up to a constant of its prompt, which a common shift cannot remove: inverts the tilt only where that constant
    hardly varies. On pairs without a shift (``bco_pair`` in TRL), pass ``desirable`` (True, False), ``shift`` 0 and add
    up.

    Args:
      logp: Policy's log-probability of every example, nats. The last axis is the batch, examples of all prompts.
      ref_logp: The reference's, nats; no gradient.
      desirable: Whether each example is desirable.
      shift: ``delta``, reward units; no gradient.
      beta: Scale of the reward, > 0, per nat.
      where: True for real examples.

    Returns:
      Loss per example ``[*batch, N]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Jung et al., 2024, arXiv:2404.04656.
    """
    check_positive("beta", beta)
    check_per_row("beta", beta, ())
    check_boolean("desirable", desirable)
    check_alike(where, logp, desirable)
    real, ratio = _log_ratio(logp, ref_logp, where)
    shift = over_row("shift", jax.lax.stop_gradient(as_float(shift)), ratio)
    logit = jnp.where(real, beta * ratio - shift, 0)
    return jnp.where(real, -jax.nn.log_sigmoid(jnp.where(desirable, logit, -logit)), 0)


def bco_shift(
    running: Average,
    logp: Float[Array, "*batch N"],
    ref_logp: Float[Array, "*batch N"],
    *,
    beta: Numeric,
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Average:
    r"""The running mean of the implicit reward over every example seen: the shift of `bco_loss`.

    Update it with a batch, then use its ``mean`` for that batch: the first shift is the first batch's mean.

    Args:
      running: What was seen before; at first ``Average(total=0, count=0)``, in float32 arrays.
      logp: Policy's log-probability of every example, nats.
      ref_logp: The reference's, nats.
      beta: Scale of the reward, > 0, per nat.
      where: True for real examples.
      axis_name: Mapped axis over which the examples are split; the mean is global.

    Returns:
      The updated `Average`, without gradient.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> nothing = Average(total=jnp.zeros(()), count=jnp.zeros(()))
      >>> float(bco_shift(nothing, jnp.array([-4.0, -2.0]), jnp.array([-5.0, -5.0]), beta=0.5).mean)
      1.0

    References:
      Jung et al., 2024, arXiv:2404.04656.
    """
    check_positive("beta", beta)
    check_per_row("beta", beta, ())
    _, ratio = _log_ratio(logp, ref_logp, where)
    return running + average(jax.lax.stop_gradient(beta * ratio), where).psum(axis_name)


def nca_loss(
    logp: Float[Array, "*batch N"],
    ref_logp: Float[Array, "*batch N"],
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric,
    alpha: Numeric,
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""Noise contrastive alignment of N candidates with explicit rewards.

    .. math:: -\sum_i \mathrm{sg}\!\left( \frac{e^{R_i/\alpha}}{\sum_j e^{R_j/\alpha}} \right) \log \sigma(r_i)
              - \frac1n \sum_i \log \sigma(-r_i)

    Each candidate is told apart from the reference's by itself, so the absolute likelihood of good ones does not fall,
    as it may in DPO. Fits the tilt: with ``beta`` 1, candidates of the reference and N large, the minimiser is
    :math:`p_\text{ref} e^{R/\alpha} / Z`.

    Args:
      logp: Policy's log-probability of every candidate, nats.
      ref_logp: The reference's, nats; no gradient.
      reward: Reward ``R`` of every candidate, reward units; no gradient.
      beta: Scale of the implicit reward ``r``, > 0, per nat.
      alpha: What divides the reward, > 0, reward units: the tilt of the candidates.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split; the result is global.

    Returns:
      Loss per prompt ``[*batch]``; 0 without a real candidate.

    Raises:
      ValueError: If ``beta`` or ``alpha`` is a Python number that is not positive and finite.

    References:
      Chen et al., 2024, arXiv:2402.05369.
    """
    check_positive("beta", beta)
    check_positive("alpha", alpha)
    check_per_row("beta", beta, ())
    check_per_row("alpha", alpha, ())
    _, ratio = _log_ratio(logp, ref_logp, where)
    weights = _target(reward, alpha, where, axis_name)
    drawn = -masked_sum(scale(weights, jax.nn.log_sigmoid(beta * ratio)), where, axis_name=axis_name)
    return drawn - masked_mean(jax.nn.log_sigmoid(-beta * ratio), where, axis_name=axis_name)


def nca_pair_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    *,
    beta: Numeric,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Noise contrastive alignment of a pair: index 0 chosen, index 1 rejected.

    .. math:: -\log \sigma(r_0) - \tfrac12 \log \sigma(-r_0) - \tfrac12 \log \sigma(-r_1)

    The limit ``alpha -> 0`` of `nca_loss` with two candidates: all of the weight is the chosen one's, whose own minimum
    is the finite :math:`r_0 = \log 2`.

    Args:
      logp: Policy's log-probability of chosen and rejected, nats.
      ref_logp: The reference's, nats; no gradient.
      beta: Scale of the implicit reward ``r``, > 0, per nat.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Chen et al., 2024, arXiv:2402.05369.
    """
    check_positive("beta", beta)
    check_per_row("beta", beta, ())
    check_pair("logp", logp)
    check_alike(where, logp)
    both = None if where is None else jnp.broadcast_to(jnp.all(where, axis=-1, keepdims=True), where.shape)
    real, ratio = _log_ratio(logp, ref_logp, both)
    noise = -masked_mean(jax.nn.log_sigmoid(-beta * ratio), both)
    return jnp.where(real[..., 0], noise - jax.nn.log_sigmoid(beta * ratio[..., 0]), 0)


def info_nca_loss(
    logp: Float[Array, "*batch N"],
    ref_logp: Float[Array, "*batch N"],
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric,
    alpha: Numeric,
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""InfoNCA: the softmax of implicit rewards matched to the softmax of explicit ones.

    .. math:: -\sum_i \mathrm{sg}\!\left( \frac{e^{R_i/\alpha}}{\sum_j e^{R_j/\alpha}} \right)
              \log \frac{e^{r_i}}{\sum_j e^{r_j}}

    Inverts the tilt: its minimum is :math:`\beta \log(\pi / p_\text{ref}) = R / \alpha` up to a constant of the prompt,
    so the policy is the tilt of strength :math:`\alpha \beta`, whatever candidates were drawn. With two candidates and
    ``alpha -> 0`` it is `tiltjax.losses.preference.dpo_loss`. Pitfall: only differences are fitted, so all likelihoods
    may fall together; `nca_loss` prevents it.

    Args:
      logp: Policy's log-probability of every candidate, nats.
      ref_logp: The reference's, nats; no gradient.
      reward: Reward ``R`` of every candidate, reward units; no gradient.
      beta: Scale of the implicit reward ``r``, > 0, per nat.
      alpha: What divides the reward, > 0, reward units.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split; the result is global.

    Returns:
      Cross-entropy per prompt ``[*batch]``, nats; 0 without a real candidate.

    Raises:
      ValueError: If ``beta`` or ``alpha`` is a Python number that is not positive and finite.

    References:
      Chen et al., 2024, arXiv:2402.05369.
    """
    check_positive("beta", beta)
    check_positive("alpha", alpha)
    check_per_row("beta", beta, ())
    check_per_row("alpha", alpha, ())
    logp, ref_logp = as_float(logp), jax.lax.stop_gradient(as_float(ref_logp))
    ratio = centred_difference(logp, ref_logp, where=where, axis_name=axis_name)
    weights = _target(reward, alpha, where, axis_name)
    log_share = log_softmax(ratio, factor=beta, where=where, axis_name=axis_name)
    return -masked_sum(scale(weights, log_share), where, axis_name=axis_name)


def _log_ratio(logp: Array, ref_logp: Array, where: Array | None) -> tuple[Array, Array]:
    """Whether each entry is real, and ``log(pi / p_ref)``, 0 where it is not."""
    logp, ref_logp = as_float(logp), jax.lax.stop_gradient(as_float(ref_logp))
    check_alike(where, logp, ref_logp)
    real = jnp.full(logp.shape, True) if where is None else where
    return real, jnp.where(real, logp, 0) - jnp.where(real, ref_logp, 0)


def _target(reward: Array, alpha: Numeric, where: Array | None, axis_name: AxisName) -> Array:
    return tilt(jax.lax.stop_gradient(as_float(reward)), beta=alpha, where=where, axis_name=axis_name).weights
