"""Regression of the log-ratio on what the tilt says it should be: squared errors, minimised by the policy itself.

The tilt obeys ``log(p / p_ref) = r / beta - log Z(x)``. These losses differ in the reward (a win rate, a reward) and in
how they deal with log Z: approximated, cancelled between two completions, or estimated. ``logp`` is a sum over tokens,
in nats. Where the papers write a step size ``eta``, this library writes ``beta = 1 / eta``.
"""

import jax
import jax.numpy as jnp

from tiltjax.losses.preference.pairs import gap, pairs, ratio_gap
from tiltjax.ops.checks import check_choice, check_positive
from tiltjax.ops.logspace import divide, log_weight
from tiltjax.ops.masked import as_float, check_alike
from tiltjax.types import Array, Bool, Float, Numeric

__all__ = ["log_ratio_regression_loss", "rebel_loss", "sppo_loss"]


def sppo_loss(
    logp: Float[Array, "*batch N"],
    ref_logp: Float[Array, "*batch N"],
    win_rate: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch N"]:
    r"""Self-play preference optimisation: the log-ratio to the last policy regressed on its win rate.

    .. math:: \left( \log \frac{\pi(y)}{\pi_t(y)} - \frac{\hat P(y \succ \pi_t) - 1/2}{\beta} \right)^2

    Inverts the tilt of :math:`\pi_t` by the win rate, one step of multiplicative weights, with :math:`\log Z`
    approximated by :math:`1/(2 \beta)`. Pitfalls: at the paper's ``beta`` of 1e-3 the targets are up to 500 nats, and
    only a tiny learning rate keeps the policy sane; the official code halves the sum over best and worst of five
    (their mean), TRL's ``sppo_hard`` adds them up with win rates 1 and 0.

    Args:
      logp: Policy's log-probability of every candidate, nats.
      ref_logp: That of the policy they were drawn from, which is the reference here, nats; no gradient.
      win_rate: Estimated probability that a candidate beats one of that policy, in [0, 1]; no gradient. The official
        code averages over all K candidates, itself included at 1/2.
      beta: Strength of the KL term, > 0, in units of preference probability: ``1 / eta`` of the paper. A number, or
        one per prompt.
      where: True for real candidates; None means all.

    Returns:
      Loss per candidate ``[*batch, N]``, nats squared; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> sppo_loss(jnp.array([-3.0, -6.0]), jnp.array([-5.0, -5.0]), jnp.array([1.0, 0.0]), beta=0.25).tolist()
      [0.0, 1.0]

    References:
      Wu et al., 2024, arXiv:2405.00675, Eqs. 4.4-4.7.
    """
    check_positive("beta", beta)
    return _regression(logp, ref_logp, divide(as_float(win_rate) - 0.5, beta), where)


def rebel_loss(
    logp: Float[Array, "*batch 2"],
    ref_logp: Float[Array, "*batch 2"],
    reward: Float[Array, "*batch 2"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    scale: str,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""REBEL: the difference of two rewards regressed by the difference of two log-ratios.

    .. math:: \left( \beta \left[ a_0 - a_1 \right] - \left[ r_0 - r_1 \right] \right)^2, \qquad
              a_i = \log \frac{\pi(y_i)}{\pi_t(y_i)}

    Inverts the tilt of :math:`\pi_t`: log Z cancels in the difference. The order of the two completions is without
    meaning. Pitfall: the official code divides the error by ``beta``, so its loss is :math:`1/\beta^2` times the
    paper's and learning rates do not carry over; ``scale`` has no default.

    Args:
      logp: Policy's log-probability of two candidates, nats.
      ref_logp: That of the policy they were drawn from, which is the reference here, nats; no gradient.
      reward: Their rewards, reward units; no gradient.
      beta: Strength of the KL term, > 0, reward units: ``1 / eta`` of the paper, whose code has ``eta`` 1 or 1e6. A
        number, or one per prompt.
      scale: "paper", in reward units squared, or "code", in nats squared.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite, or ``scale`` is unknown.

    Example:
      >>> arrays = jnp.array([-3.0, -6.0]), jnp.array([-5.0, -5.0]), jnp.array([1.0, 0.0])
      >>> [float(rebel_loss(*arrays, beta=0.5, scale=scale)) for scale in ("paper", "code")]
      [0.25, 1.0]

    References:
      Gao et al., 2024, arXiv:2404.16767, Eq. 1.
    """
    check_positive("beta", beta)
    check_choice("scale", scale, ("paper", "code"))
    real, logp, ref_logp, reward = pairs(where, logp, ref_logp, reward, beta=beta)
    h, reward_gap = ratio_gap(logp, ref_logp), gap(reward)
    return jnp.where(real, jnp.square(beta * h - reward_gap if scale == "paper" else h - reward_gap / beta), 0)


def log_ratio_regression_loss(
    logp: Float[Array, "*batch N"],
    ref_logp: Float[Array, "*batch N"],
    reward: Float[Array, "*batch N"],
    log_z: Float[Array, "*batch"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
) -> Float[Array, "*batch N"]:
    r"""The log-ratio regressed on the tilt's own, with an estimate of log Z.

    .. math:: \left( \log \frac{\pi(y)}{p_\text{ref}(y)} - \frac{r(y)}{\beta} + \log Z(x) \right)^2

    Inverts the tilt pointwise: with the exact :math:`\log Z` its minimum is the tilt for candidates of any distribution
    that covers it. Pitfalls: an error in ``log_z`` moves every log-ratio of its prompt, which a normalised policy
    cannot follow; an estimate from the candidates is biased low (see `tiltjax.tilt.partition`).

    Args:
      logp: Policy's log-probability of every candidate, nats.
      ref_logp: The reference's, nats; no gradient.
      reward: Reward of every candidate, reward units; no gradient.
      log_z: Log-partition of every prompt, nats; no gradient.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      where: True for real candidates; None means all.

    Returns:
      Loss per candidate ``[*batch, N]``, nats squared; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> reward = jnp.array([0.0, jnp.log(3.0)])  # log Z = log 2 under a uniform reference
      >>> logp, ref_logp = jnp.log(jnp.array([0.25, 0.75])), jnp.log(jnp.array([0.5, 0.5]))
      >>> bool((log_ratio_regression_loss(logp, ref_logp, reward, jnp.log(2.0), beta=1.0) < 1e-12).all())
      True

    References:
      Rafailov et al., 2023, arXiv:2305.18290, Eq. 5, as a regression.
    """
    check_positive("beta", beta)
    return _regression(logp, ref_logp, log_weight(reward, log_z, beta=beta), where)


def _regression(logp: Array, ref_logp: Array, target: Array, where: Array | None) -> Array:
    real, ratio, target = _prepare(logp, ref_logp, target, where)
    return jnp.where(real, jnp.square(ratio - target), 0)


def _prepare(logp: Array, ref_logp: Array, target: Array, where: Array | None) -> tuple[Array, Array, Array]:
    """Which entries are real, their log-ratio, and their target without gradient; 0 where they are not."""
    logp, ref_logp, target = as_float(logp), *(jax.lax.stop_gradient(x) for x in (as_float(ref_logp), target))
    check_alike(where, logp, ref_logp, target)
    real = jnp.full(logp.shape, True) if where is None else where
    logp, ref_logp, target = (jnp.where(real, x, 0) for x in (logp, ref_logp, target))
    return real, logp - ref_logp, target
