"""Weighted maximum likelihood: losses that fit the tilt by imitation, with weights that are never negative.

Each is ``-sum_i w_i logp_i`` and they differ in the weights: how the reward picks or weighs what is imitated. ``logp``
is a sum over tokens, in nats: only then is the loss a forward KL to the target. To average over tokens, divide the
summed loss by the number of tokens in the step, ``ops.masked.Average(total=loss.sum(), count=tokens)``. Weights never
carry gradient, and non-negative ones keep every loss bounded below.
"""

import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_per_row, check_positive
from tiltjax.ops.collectives import axis_index, axis_size, pmax, pmin, psum
from tiltjax.ops.logspace import divide, exp_sum, log_weight, scale
from tiltjax.ops.masked import as_float, check_alike, masked_mean, masked_sum
from tiltjax.tilt.weights import tilt
from tiltjax.types import Array, AxisName, Bool, Float, Int, Numeric

__all__ = [
    "advantage_weighted_regression_loss",
    "best_of_n_sft_loss",
    "reward_weighted_regression_loss",
    "sft_loss",
    "tilted_mle_loss",
    "var_importance_loss",
    "var_loss",
    "var_weights",
    "weighted_mle_loss",
]

# exp(70) times any log-probability is finite in float32.
_MAX_EXPONENT = 70.0


def sft_loss(
    logp: Float[Array, "*batch N"], *, where: Bool[Array, "*batch N"] | None = None, axis_name: AxisName = None
) -> Float[Array, "*batch"]:
    r"""Supervised fine-tuning: imitate every candidate alike.

    .. math:: -\frac1n \sum_i \log \pi(y_i)

    Fits the reference's data distribution: the tilt at ``beta -> inf``, no reward. The mean is over the ``n`` real
    candidates of a prompt, each a sum over its tokens, so long completions weigh more in the gradient than under a
    token mean (see the module's first paragraph for that one).

    Args:
      logp: Log-probability of every candidate, nats.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split; the result is global.

    Returns:
      Loss per prompt ``[*batch]``, nats; 0 without a real candidate.

    Example:
      >>> float(sft_loss(jnp.array([-1.0, -3.0])))
      2.0
    """
    return -masked_mean(logp, where, axis_name=axis_name)


def weighted_mle_loss(
    logp: Float[Array, "*batch N"],
    weights: Float[Array, "*batch N"],
    *,
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""Weighted maximum likelihood, the M-step that every loss of this module ends in.

    .. math:: -\sum_i \mathrm{sg}(w_i) \log \pi(y_i)

    Fits whatever the weighted candidates are distributed as. A candidate of weight 0 takes no part, even at ``logp``
    of -inf. The weights are not normalised here: their sum scales a prompt's share of the gradient.

    Args:
      logp: Log-probability of every candidate, nats.
      weights: Non-negative; never receive gradient.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split; the result is global.

    Returns:
      Loss per prompt ``[*batch]``; 0 without a real candidate.

    Example:
      >>> float(weighted_mle_loss(jnp.array([-1.0, -3.0]), jnp.array([0.25, 0.75])))
      2.5
    """
    return masked_sum(_weighted(logp, weights, where), axis_name=axis_name)


def tilted_mle_loss(
    logp: Float[Array, "*batch N"],
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""RL-free alignment: weighted maximum likelihood of the tilt, from N candidates of the reference.

    .. math:: -\sum_i \mathrm{sg}\!\left(\frac{e^{r_i/\beta}}{\sum_j e^{r_j/\beta}}\right) \log \pi(y_i)

    Fits the tilt: as N grows its minimiser is :math:`p_\text{ref} e^{r/\beta} / Z`, by a forward KL. Pitfalls: the
    candidates must come from the reference (from another sampler :math:`q`, add :math:`\beta \log(p_\text{ref}/q)` to
    the reward); the weights are normalised per prompt, since weights normalised over prompts multiply a prompt's share
    by its Z; with few candidates the target is the soft best-of-N law instead, and when the effective sample size
    falls towards 1 the loss is `best_of_n_sft_loss`. ``beta -> inf`` is `sft_loss`.

    Args:
      logp: Log-probability of every candidate, nats.
      reward: Reward of every candidate, reward units.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split; the result is global.

    Returns:
      Loss per prompt ``[*batch]``, nats; 0 without a real candidate.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> round(float(tilted_mle_loss(jnp.array([-1.0, -3.0]), jnp.array([0.0, jnp.log(3.0)]), beta=1.0)), 4)
      2.5

    References:
      Jiao, Chen, Li, 2025, arXiv:2509.04372, Eqs. 19-20.
    """
    reward = jax.lax.stop_gradient(reward)
    weights = tilt(reward, beta=beta, where=where, axis_name=axis_name).weights
    return weighted_mle_loss(logp, weights, where=where, axis_name=axis_name)


def var_loss(
    logp: Float[Array, "*batch B"],
    ref_logp: Float[Array, "*batch B M"],
    reward: Float[Array, "*batch B M"],
    *,
    beta: Numeric,
    matched: Int[Array, "*batch B"] | None = None,
    where: Bool[Array, "*batch B M"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch B"]:
    r"""VAR as printed: one completion per prompt, its weight normalised over the completions of the mini-batch.

    .. math:: -\mathrm{sg}(w_i) \log \pi(y_i | x_i), \qquad
              w_i = \frac{p_\text{ref}(y_i | x_i) e^{r(x_i, y_i)/\beta}}
                         {\sum_j p_\text{ref}(y_j | x_i) e^{r(x_i, y_j)/\beta}}

    Meant to fit the tilt. Pitfalls: on completions drawn from the reference its target is
    :math:`p_\text{ref}^2 e^{r/\beta}`, the reference entering twice; the sum over a mini-batch is not an estimate of Z;
    and it degenerates to SFT (see `var_weights`). `var_importance_loss` and `tilted_mle_loss` are consistent.

    Args:
      logp: Policy's log-probability of each prompt's own completion, nats. Rows are this device's prompts.
      ref_logp: Reference's log-probability of every completion ``j`` of the whole mini-batch, over all devices, under
        prompt ``i``, nats.
      reward: Reward of completion ``j`` under prompt ``i``, reward units.
      beta: Strength of the KL term, > 0, reward units. No default: its scale is the reward's.
      matched: Column of each prompt's own completion; None means ``arange(B) + axis_index(axis_name) * B``.
      where: True for real entries; a row whose matched entry is masked gives 0.
      axis_name: Mapped axis over which the prompts are split.

    Returns:
      Loss per prompt ``[*batch, B]``, of this device's prompts.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite, or if ``matched`` is None and there
        are fewer columns than prompts over all devices.

    References:
      Du et al., 2025, arXiv:2502.11026.
    """
    weights = var_weights(ref_logp, reward, beta=beta, matched=matched, where=where, axis_name=axis_name)
    own = None if where is None else _column(where, _matched(matched, where, axis_name))
    return _weighted(logp, weights, own)


def var_weights(
    ref_logp: Float[Array, "*batch B M"],
    reward: Float[Array, "*batch B M"],
    *,
    beta: Numeric,
    matched: Int[Array, "*batch B"] | None = None,
    where: Bool[Array, "*batch B M"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch B"]:
    r"""The weights of `var_loss`: :math:`\mathrm{softmax}_j(\log p_\text{ref}(y_j|x_i) + r(x_i, y_j)/\beta)_i`.

    Report their mean and spread. A completion is likelier under its own prompt than under another's by tens of nats,
    so on language the weight is 1 to rounding whatever the reward says, and the loss is SFT on all of the data.

    Args:
      ref_logp: As in `var_loss`.
      reward: As in `var_loss`.
      beta: As in `var_loss`.
      matched: As in `var_loss`.
      where: As in `var_loss`.
      axis_name: As in `var_loss`.

    Returns:
      Weights in [0, 1], ``[*batch, B]``, without gradient; 0 where the matched entry is masked.

    Raises:
      ValueError: As in `var_loss`.

    Example:
      >>> var_weights(jnp.zeros((2, 4)), jnp.ones((2, 4)), beta=0.1).tolist()
      [0.25, 0.25]
    """
    check_positive("beta", beta)
    check_per_row("beta", beta, ())
    check_alike(where, ref_logp, reward)
    matched = _matched(matched, reward, axis_name)

    def centred(x: Array) -> Array:
        # Differences from the matched entry: |reward / beta| of 1e5 costs no precision.
        x = jax.lax.stop_gradient(as_float(x))
        x = x if where is None else jnp.where(where, x, 0)
        own = _column(x, matched)[..., None]
        return x - jnp.where(jnp.isinf(own), 0, own)

    weights, total = exp_sum(centred(reward) / beta + centred(ref_logp), where=where)
    return _column(weights, matched) / jnp.where(total.mass == 0, 1, total.mass)


def var_importance_loss(
    logp: Float[Array, "*batch N"],
    reward: Float[Array, "*batch N"],
    log_z: Float[Array, "*batch"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""VAR with importance weights: the reference's factor left to the sampling, Z from candidates of the same prompt.

    .. math:: -\frac1n \sum_i \mathrm{sg}\!\left(e^{r_i/\beta - \log Z}\right) \log \pi(y_i)

    Fits the tilt, without bias where ``log_z`` is exact; with the plain estimate from the same candidates it is
    `tilted_mle_loss`. Pitfalls: the weights sum to n only on average, so an error in ``log_z`` scales a prompt's share;
    at ``|reward / beta|`` of 1e5 a float32 ``log_z`` is itself known to 4e-3 only. The exponent is capped at 70: a
    wrong ``log_z`` shows as a huge loss, not as an infinite one.

    Args:
      logp: Log-probability of every candidate, drawn from the reference, nats.
      reward: Reward of every candidate, reward units.
      log_z: Log-partition of every prompt, nats, from any estimator of `tiltjax.tilt.partition`; no gradient.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split; the result is global.

    Returns:
      Loss per prompt ``[*batch]``, nats; 0 without a real candidate.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Du et al., 2025, arXiv:2502.11026; Jiao, Chen, Li, 2025, arXiv:2509.04372, Eq. 19.
    """
    check_positive("beta", beta)
    exponent = log_weight(reward, log_z, beta=beta)
    count = masked_sum(jnp.ones_like(as_float(logp)), where, axis_name=axis_name)
    weights = jnp.exp(jnp.minimum(exponent, _MAX_EXPONENT))
    return weighted_mle_loss(logp, weights, where=where, axis_name=axis_name) / jnp.maximum(count, 1)


def best_of_n_sft_loss(
    logp: Float[Array, "*batch N"],
    reward: Float[Array, "*batch N"],
    *,
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""RAFT, or best-of-N distillation: imitate the candidate of largest reward.

    .. math:: -\log \pi(y_{i^*}), \qquad i^* = \arg\max_i r_i

    Fits the best-of-N law, the limit ``beta -> 0`` of `tilted_mle_loss`; the first candidate wins ties. Pitfall: it
    imitates the best candidate even where all of them are bad; mask such prompts by their reward.

    Args:
      logp: Log-probability of every candidate, nats.
      reward: Reward of every candidate, reward units.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split; the result is global.

    Returns:
      Loss per prompt ``[*batch]``, nats; 0 without a real candidate.

    Example:
      >>> float(best_of_n_sft_loss(jnp.array([-1.0, -2.0, -3.0]), jnp.array([0.0, 1.0, 1.0])))
      2.0

    References:
      Dong et al., 2023, arXiv:2304.06767.
    """
    reward = jax.lax.stop_gradient(as_float(reward))
    check_alike(where, reward)
    real = jnp.full(reward.shape, True) if where is None else where
    top = pmax(jnp.max(reward, axis=-1, keepdims=True, initial=-jnp.inf, where=real), axis_name)
    N = reward.shape[-1]
    place = (jnp.arange(N, dtype=jnp.int32) + axis_index(axis_name) * N).reshape((1,) * (reward.ndim - 1) + (N,))
    best = jnp.where(real & (reward == top), place, jnp.iinfo(jnp.int32).max)
    first = pmin(jnp.min(best, axis=-1, keepdims=True), axis_name)
    unknown = psum(jnp.sum(real & jnp.isnan(reward), axis=-1, keepdims=True), axis_name) > 0
    weights = jnp.where(unknown, jnp.nan, (place == first).astype(reward.dtype))
    return weighted_mle_loss(logp, weights, where=where, axis_name=axis_name)


def reward_weighted_regression_loss(
    logp: Float[Array, "*batch N"],
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch N"]:
    r"""RWR: every sample of the batch weighted by its exponentiated reward, normalised over the batch.

    .. math:: -\mathrm{sg}(w_i) \log \pi(y_i), \qquad w_i = \frac{e^{r_i/\beta}}{\frac1n \sum_j e^{r_j/\beta}}

    The last axis is the batch: samples of all prompts. Fits the tilt of the joint law of prompt and completion, and so
    multiplies the share of a prompt by its Z: prompts of high reward dominate. Where each prompt has several
    candidates, prefer `tilted_mle_loss`, or give rewards less the prompt's mean.

    Args:
      logp: Log-probability of every sample, nats.
      reward: Reward of every sample, reward units.
      beta: Strength of the KL term, > 0, reward units.
      where: True for real samples; None means all.
      axis_name: Mapped axis over which the samples are split; the normaliser is global.

    Returns:
      Loss per sample ``[*batch, N]``, nats; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> loss = reward_weighted_regression_loss(jnp.array([-1.0, -1.0]), jnp.array([0.0, jnp.log(3.0)]), beta=1.0)
      >>> [round(float(x), 4) for x in loss]
      [0.5, 1.5]

    References:
      Peters, Schaal, 2007, "Reinforcement learning by reward-weighted regression for operational space control", ICML.
    """
    weights = tilt(reward, beta=beta, where=where, axis_name=axis_name).weights
    count = masked_sum(jnp.ones_like(as_float(logp)), where, axis_name=axis_name)
    return _weighted(logp, weights * count[..., None], where)


def advantage_weighted_regression_loss(
    logp: Float[Array, "*batch N"],
    advantage: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    max_weight: Numeric = 20.0,
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch N"]:
    r"""AWR: every sample weighted by its exponentiated advantage, clipped, without a normaliser.

    .. math:: -\mathrm{sg}(w_i) \log \pi(y_i), \qquad w_i = \min\left(e^{A_i/\beta}, w_{\max}\right)

    Fits the tilt of the sampling policy, with the baseline :math:`V = r - A` in the place of
    :math:`\beta \log Z`, so weights are comparable over prompts; the clip bounds the variance and flattens the tilt
    above :math:`\beta \log w_{\max}`. For single-turn completions V is the mean reward of the prompt's candidates.
    Pitfall: the public implementation standardises advantages over the batch and then uses ``beta`` 1.

    Args:
      logp: Log-probability of every sample, nats.
      advantage: Reward less its baseline, reward units; no gradient.
      beta: Strength of the KL term, > 0, reward units.
      max_weight: Largest weight, > 0; clipped after the exponential.
      where: True for real samples; None means all.

    Returns:
      Loss per sample ``[*batch, N]``, nats; 0 where masked.

    Raises:
      ValueError: If ``beta`` or ``max_weight`` is a Python number that is not positive and finite.

    Example:
      >>> advantage_weighted_regression_loss(jnp.array([-1.0, -1.0]), jnp.array([0.0, 900.0]), beta=1.0).tolist()
      [1.0, 20.0]

    References:
      Peng et al., 2019, arXiv:1910.00177.
    """
    check_positive("beta", beta)
    check_positive("max_weight", max_weight)
    exponent = jnp.minimum(divide(as_float(advantage), beta), jnp.log(max_weight))
    return _weighted(logp, jnp.minimum(jnp.exp(exponent), max_weight), where)


def _weighted(logp: Array, weights: Array, where: Array | None) -> Array:
    """``-sg(w) logp`` per entry; 0, with gradient 0, where the entry is masked or its weight is 0."""
    logp, weights = as_float(logp), jax.lax.stop_gradient(as_float(weights))
    check_alike(where, logp, weights)
    if where is not None:
        logp, weights = jnp.where(where, logp, 0), jnp.where(where, weights, 0)
    # Weights are constants: the gradient of a skipped entry is its weight, 0, times 0, whatever logp is.
    return -scale(weights, logp)


def _matched(matched: Array | None, entries: Array, axis_name: AxisName) -> Array:
    """Columns of the prompts' own completions, ``[*batch, B]``."""
    *_, B, M = entries.shape
    if matched is None:
        devices = axis_size(axis_name)
        if B * devices > M:
            raise ValueError(f"matched must be given where {B * devices} prompts share {M} columns, got None")
        matched = jnp.arange(B, dtype=jnp.int32) + axis_index(axis_name) * B
    return jnp.broadcast_to(matched, entries.shape[:-1])


def _column(entries: Array, matched: Array) -> Array:
    return jnp.take_along_axis(entries, matched[..., None], axis=-1)[..., 0]
