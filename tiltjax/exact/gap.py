"""The generation-verification gap where everything is known: one prompt, ``K = 2^H`` completions of ``H`` bits.

Preferences are drawn from a reference and labelled by Bradley-Terry with a reward that depends on few features of the
completion (how many ones it has, say). A *verifier* fits a reward of those features, and reinforcement learning on it
is the tilt by the fitted reward. A *generator* fits a policy directly, as DPO does: a policy over completions is a free
table of rewards, so it has ``K - 1`` numbers to learn where the verifier has as many as there are features. Both are
maximum likelihood on the same pairs; what differs is the class, and the law below says by how much. With one token, or
with a reward that is itself a lookup table, the two classes are the same and so is every number.

Pure functions, in the precision they are given; use ``jax.enable_x64(True)`` for digits beyond the sixth.

References:
  Swamy et al., 2025, arXiv:2503.01067, Sections 3.2 to 3.4.
"""

import chex
import jax
import jax.numpy as jnp

from tiltjax.exact.bandit import kl, tilted
from tiltjax.exact.tree import completions, mean_pair_loss, minimise, sample_wins, strongly_connected
from tiltjax.losses.reward_model import bradley_terry_loss
from tiltjax.ops.checks import check_positive
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Bool, Float, Int, Numeric, PRNGKey

__all__ = [
    "Gap",
    "Law",
    "excess_nll",
    "fit_linear_reward",
    "level_features",
    "sample_gap",
    "statistical_law",
]


def level_features(horizon: int) -> Float[Array, "K D"]:
    """Indicators of how many ones a completion has: the features of a verifier that only counts, ``D = horizon + 1``.

    Args:
      horizon: Binary tokens per completion.

    Returns:
      One row per completion in the order of `tiltjax.exact.tree.completions`, float32.

    Raises:
      ValueError: If ``horizon`` is below 1.

    Example:
      >>> level_features(2).tolist()
      [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    ones = jnp.sum(completions(vocab_size=2, horizon=horizon), axis=-1)
    return jax.nn.one_hot(ones, horizon + 1, dtype=jnp.float32)


def fit_linear_reward(
    wins: Float[Array, "K K"] | Int[Array, "K K"], features: Float[Array, "K D"]
) -> Float[Array, " K"]:
    r"""The reward of largest Bradley-Terry likelihood among those linear in the features.

    .. math:: \max_\theta \sum_{ij} \mathrm{wins}_{ij} \log \sigma(r_i - r_j), \qquad r = \Phi \theta

    Where no maximum exists the result is finite, but still on its way; `tiltjax.exact.tree.strongly_connected` says so
    of a free table, and of a reward that is constant on levels for the summed wins of the levels.

    Args:
      wins: How often each completion was preferred to each other one, as from `tiltjax.exact.tree.sample_wins`.
      features: ``Phi``; the identity fits a free table.

    Returns:
      The fitted reward ``[K]``, of mean 0: preferences say nothing about a constant.
    """
    features = as_float(features)

    def loss(theta: Array) -> Array:
        return mean_pair_loss(wins, bradley_terry_loss, features @ theta)

    reward = features @ minimise(loss, jnp.zeros(features.shape[1], features.dtype)).params
    return reward - jnp.mean(reward)


def excess_nll(
    ref: Float[Array, "*batch K"], reward: Float[Array, "*batch K"], fitted: Float[Array, "*batch K"]
) -> Float[Array, "*batch"]:
    """How much worse than the truth a fitted reward predicts new pairs from the reference, nats per pair.

    Args:
      ref: Probability of every completion, summing to 1.
      reward: The true reward, reward units.
      fitted: The fitted one.

    Returns:
      ``E KL(Bernoulli(true) || Bernoulli(fitted))`` over pairs, ``[*batch]``; never negative.
    """
    chex.assert_equal_shape([ref, reward, fitted])
    ref = as_float(ref)
    true, guess = (jax.nn.sigmoid(jnp.stack([d, -d], axis=-1)) for d in map(_differences, (reward, fitted)))
    return jnp.sum(ref[..., :, None] * ref[..., None, :] * kl(true, guess), axis=(-2, -1))


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Law:
    """What maximum likelihood on ``n`` pairs comes to, in expectation and to leading order in ``1 / n``.

    Attributes:
      dimension: Numbers that the class can learn from preferences (a constant is not one of them), scalar.
      excess_nll: ``n`` times the excess negative log-likelihood of new pairs: ``dimension / 2``, nats.
      kl: ``n`` times the KL from the policy of the fitted reward to the true optimum, either way round, nats.
    """

    dimension: Float[Array, ""]
    excess_nll: Float[Array, ""]
    kl: Float[Array, ""]


def statistical_law(
    ref: Float[Array, " K"], reward: Float[Array, " K"], features: Float[Array, "K D"], *, beta: Numeric
) -> Law:
    r"""The asymptotic law of `fit_linear_reward` and of the tilt by what it finds.

    .. math:: n\, E\,\mathrm{KL}(\hat\pi \| p^*) \to \frac{1}{2\beta^2}
              \operatorname{tr}\bigl[ \Phi (\Phi^\top I \Phi)^{+} \Phi^\top (\operatorname{diag} p^* - p^* p^{*\top})
              \bigr]

    with ``I`` the Fisher information of one pair about a table of rewards: a smooth function of a maximum-likelihood
    estimate has the curvature of the tilt, ``Var_p* / beta^2``, times the inverse information. The true reward must
    lie in the span of the features.

    Args:
      ref: Probability of every completion, summing to 1.
      reward: The true reward, reward units.
      features: Of the class; the identity is a free table.
      beta: Strength of the KL term, > 0, reward units.

    Returns:
      `Law`.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> law = statistical_law(jnp.ones(8) / 8, jnp.zeros(8), jnp.eye(8), beta=1.0)
      >>> round(float(law.dimension)), round(float(law.excess_nll), 3), round(float(law.kl), 3)  # KL: K - 1
      (7, 3.5, 7.0)
    """
    check_positive("beta", beta)
    ref, reward, features = as_float(ref), as_float(reward), as_float(features)
    information = _laplacian(ref[:, None] * ref[None, :] * _slope(reward)) * 2
    reduced = features.T @ information @ features
    inverse = _pinv(reduced)
    covariance = features @ inverse @ features.T
    optimum = tilted(ref, reward, beta=beta)
    curvature = jnp.diag(optimum) - optimum[:, None] * optimum[None, :]
    dimension = jnp.trace(inverse @ reduced)
    return Law(dimension=dimension, excess_nll=dimension / 2, kl=jnp.sum(covariance * curvature) / (2 * beta**2))


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Gap:
    """One data set's verifier and generator, against the truth.

    Attributes:
      global_excess: Excess negative log-likelihood of the verifier on new pairs, nats, scalar.
      local_excess: The generator's.
      online_kl: KL from the tilt by the verifier's reward to the true optimum, nats: reinforcement learning on it.
      offline_kl: KL from the generator itself, the DPO policy.
      exists: Whether the generator's estimate exists (`tiltjax.exact.tree.strongly_connected`).
    """

    global_excess: Float[Array, ""]
    local_excess: Float[Array, ""]
    online_kl: Float[Array, ""]
    offline_kl: Float[Array, ""]
    exists: Bool[Array, ""]


def sample_gap(
    key: PRNGKey,
    ref: Float[Array, " K"],
    reward: Float[Array, " K"],
    features: Float[Array, "K D"],
    *,
    n: int,
    beta: Numeric,
) -> Gap:
    """Draws ``n`` preferences, fits a verifier of the features and a generator on them, and measures both.

    Args:
      key: Consumed; `jax.vmap` over keys repeats the experiment.
      ref: Probability of every completion, summing to 1.
      reward: The true reward, in the span of the features, reward units.
      features: Of the verifier.
      n: How many pairs.
      beta: Strength of the KL term, > 0, reward units.

    Returns:
      `Gap`.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite, or ``n`` below 1.
    """
    ref, reward, features = as_float(ref), as_float(reward), as_float(features)
    wins = sample_wins(key, reward, ref, n=n)
    table = jnp.eye(ref.shape[0], dtype=features.dtype)
    verifier, generator = fit_linear_reward(wins, features), fit_linear_reward(wins, table)
    optimum = tilted(ref, reward, beta=beta)
    return Gap(
        global_excess=excess_nll(ref, reward, verifier),
        local_excess=excess_nll(ref, reward, generator),
        online_kl=kl(tilted(ref, verifier, beta=beta), optimum),
        offline_kl=kl(tilted(ref, generator, beta=beta), optimum),
        exists=strongly_connected(wins),
    )


def _differences(reward: Array) -> Array:
    """``r_i - r_j``."""
    reward = as_float(reward)
    return reward[..., :, None] - reward[..., None, :]


def _slope(reward: Array) -> Array:
    """Derivative of the win probability in the difference."""
    difference = _differences(reward)
    return jax.nn.sigmoid(difference) * jax.nn.sigmoid(-difference)


def _laplacian(weight: Array) -> Array:
    """``sum_{i<j} weight_ij (e_i - e_j)(e_i - e_j)'`` of symmetric weights."""
    return jnp.diag(jnp.sum(weight, axis=1)) - weight


def _pinv(matrix: Array) -> Array:
    """Constants, and features that no pair tells apart, are directions without information."""
    return jnp.linalg.pinv(matrix, hermitian=True, rtol=1e3 * jnp.finfo(matrix.dtype).eps)
