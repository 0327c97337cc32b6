"""Losses on pairs without a reference: the policy's own likelihood, summed or per token, is the implicit reward.

Pairs are two candidates: index 0 chosen, index 1 rejected. Log-probabilities are sums over tokens, in nats, and
``length`` counts those tokens, the end token included.
"""

import math

import jax.numpy as jnp

from tiltjax.losses.preference.pairs import Beta, Length, gap, logistic, mean_logp, pairs
from tiltjax.ops.checks import check_at_least, check_positive
from tiltjax.ops.logspace import quotient, scale
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Bool, Float, Numeric

__all__ = ["cpo_loss", "local_reward_loss", "orpo_loss", "simpo_loss"]

# Mean log-probabilities nearer to 0 than this count as this: the odds of a certain completion stay finite.
_LEAST_NATS = 1e-7


def simpo_loss(
    logp: Float[Array, "*batch 2"],
    length: Length,
    *,
    beta: Beta,
    gamma: Numeric,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""SimPO: Bradley-Terry on the mean log-probability per token, less a target margin.

    .. math:: -\log \sigma\left( \beta \left[ \frac{\log \pi(y_0)}{|y_0|} - \frac{\log \pi(y_1)}{|y_1|} \right]
              - \gamma \right)

    Inverts no tilt: without a reference nothing but the learning rate keeps the policy near where it began. With
    ``gamma`` 0 and equal lengths ``n`` it is `dpo_loss` at ``beta / n`` against a flat reference. Pitfalls: ``logp``
    is the sum and is divided here; ``length`` counts the end token; code often states ``gamma / beta``.

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats.
      length: Number of tokens of each.
      beta: Scale of the reward, > 0: reward units per nat per token; 2 to 10 in the paper, 20 to 100 times DPO's.
        A number, or one per pair.
      gamma: Target margin, >= 0, reward units. The paper's ``gamma / beta`` is 0.1 to 0.8.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is not positive and finite or ``gamma`` negative, as Python numbers.

    Example:
      >>> round(float(simpo_loss(jnp.array([-4.0, -9.0]), jnp.array([4, 6]), beta=2.0, gamma=1.0)), 4)
      0.6931

    References:
      Meng et al., 2024, arXiv:2405.14734, Eq. 6.
    """
    check_positive("beta", beta)
    check_at_least("gamma", gamma, 0)
    real, logp, length = pairs(where, logp, length, beta=beta)
    mean, lost = quotient(logp, jnp.maximum(length, 1))
    return jnp.where(real, logistic(beta * (gap(mean) + gap(lost)) - gamma), 0)


def cpo_loss(
    logp: Float[Array, "*batch 2"],
    *,
    beta: Beta,
    nll_weight: Numeric = 1.0,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""Contrastive preference optimisation: DPO with a flat reference, plus the likelihood of the chosen completion.

    .. math:: -\log \sigma\left( \beta \left[ \log \pi(y_0) - \log \pi(y_1) \right] \right) - \alpha \log \pi(y_0)

    The second term stands for the reference: it keeps the policy on the chosen data. Pitfall: both terms are of sums
    over tokens; public code averages the second over the tokens of the batch (see ``nll_weight``).

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats.
      beta: Strength of the KL term, > 0. A number, or one per pair.
      nll_weight: ``alpha``, >= 0; 1 in the paper. A batch token mean is ``1 / tokens per chosen completion``.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is not positive and finite or ``nll_weight`` negative, as Python numbers.

    References:
      Xu et al., 2024, arXiv:2401.08417.
    """
    check_positive("beta", beta)
    check_at_least("nll_weight", nll_weight, 0)
    real, logp = pairs(where, logp, beta=beta)
    return jnp.where(real, logistic(beta * gap(logp)) - scale(nll_weight, logp[..., 0]), 0)


def local_reward_loss(
    logp: Float[Array, "*batch 2"], *, beta: Beta, where: Bool[Array, "*batch 2"] | None = None
) -> Float[Array, "*batch"]:
    r"""The local reward model: Bradley-Terry with the policy's own log-likelihood as the reward.

    .. math:: -\log \sigma\left( \beta \left[ \log \pi(y_0) - \log \pi(y_1) \right] \right)

    Fits the reward :math:`\beta \sum_t \log \pi(y_t)`, to be used as a scorer: a reward model of exactly the policies'
    class, for comparison with a scalar head and with `implicit_reward`. It is `dpo_loss` with a flat reference.

    Args:
      logp: Log-probability of chosen and rejected under the reward model, sums over tokens, nats.
      beta: Scale, > 0, reward units per nat: ``1 / H``, ``H`` the largest number of tokens generated (53 in the paper).
        A number, or one per pair.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Swamy et al., 2025, arXiv:2503.01067, Eqs. 1, 8-9.
    """
    check_positive("beta", beta)
    real, logp = pairs(where, logp, beta=beta)
    return jnp.where(real, logistic(beta * gap(logp)), 0)


def orpo_loss(
    logp: Float[Array, "*batch 2"],
    length: Length,
    nll: Float[Array, "*batch"] | None = None,
    *,
    odds_weight: Numeric = 0.1,
    where: Bool[Array, "*batch 2"] | None = None,
) -> Float[Array, "*batch"]:
    r"""ORPO: supervised fine-tuning on the chosen completion plus a preference for its odds.

    .. math:: -q_0 - \lambda \log \sigma\left( \log \frac{e^{q_0}}{1 - e^{q_0}} - \log \frac{e^{q_1}}{1 - e^{q_1}}
              \right), \qquad q_i = \frac{\log \pi(y_i)}{|y_i|}

    Imitates the chosen data and inverts no tilt: one stage, no reference. Pitfall: the official code and TRL take the
    first term over prompt and completion together, as a mean over the tokens of the batch; give that as ``nll``, while
    ``q`` is of the completion only. A mean log-probability above -1e-7 counts as -1e-7, without gradient of the odds.

    Args:
      logp: Policy's log-probability of chosen and rejected, sums over tokens, nats.
      length: Number of tokens of each.
      nll: What replaces the first term, per pair, nats; None means the chosen completion's own mean. It is trained.
      odds_weight: ``lambda``, >= 0; 0.1 in the official code's first recipe (0.05 in another) and in TRL.
      where: True for real candidates; a pair counts where both are.

    Returns:
      Loss per pair ``[*batch]``; 0 where masked.

    Raises:
      ValueError: If ``odds_weight`` is a negative Python number.

    Example:
      >>> round(float(orpo_loss(jnp.array([-4.0, -4.0]), jnp.array([4, 4]))), 4)  # 1 + 0.1 log 2
      1.0693

    References:
      Hong et al., 2024, arXiv:2403.07691, Eqs. 4-7.
    """
    check_at_least("odds_weight", odds_weight, 0)
    real, logp, length = pairs(where, logp, length, nll=nll)
    mean = mean_logp(logp, length)
    first = -mean[..., 0] if nll is None else jnp.where(real, as_float(nll), 0)
    return jnp.where(real, first + scale(odds_weight, logistic(gap(_log_odds(mean)))), 0)


def _log_odds(q: Array) -> Array:
    """``q - log(1 - exp q)`` for log-probabilities, each branch where it is precise."""
    q = jnp.minimum(q, -_LEAST_NATS)
    near = q > -math.log(2)
    certain = jnp.log(-jnp.expm1(jnp.where(near, q, -1)))
    return q - jnp.where(near, certain, jnp.log1p(-jnp.exp(jnp.where(near, -1, q))))
