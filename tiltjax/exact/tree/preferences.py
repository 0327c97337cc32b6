"""Bradley-Terry preferences over all completions: populations, samples, and maximum likelihood to rounding error.

Data are a table of wins: ``wins[i, j]`` says how often, or with what probability, completion ``i`` was preferred to
``j``. Any loss on pairs of the library is averaged over such a table by `mean_pair_loss`, so its population value and
its value on ``n`` sampled pairs are both exact, and its minimiser is had to all digits.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp

from tiltjax.exact.tree.newton import Minimum, minimise
from tiltjax.exact.tree.world import Levels, conditionals, sequence_logp
from tiltjax.losses.preference import dpo_loss, local_reward_loss
from tiltjax.losses.reward_model import bradley_terry_loss
from tiltjax.ops.checks import check_at_least, check_positive
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Bool, Float, Int, Numeric, PRNGKey

__all__ = [
    "expected_wins",
    "fit_dpo",
    "fit_local",
    "fit_reward",
    "mean_pair_loss",
    "sample_wins",
    "strongly_connected",
]


def expected_wins(reward: Float[Array, "*batch K"], sampler: Float[Array, "*batch K"]) -> Float[Array, "*batch K K"]:
    r"""Chance that a labelled pair is ``i`` preferred to ``j``: the whole population as one table.

    .. math:: W_{ij} = 2 \mu_i \mu_j\, \sigma(r_i - r_j)

    A completion may meet itself, on the diagonal; that pair teaches nothing.

    Args:
      reward: The labeller's reward of every completion, reward units.
      sampler: ``mu``, the probability of every completion in a pair, both drawn independently.

    Returns:
      ``[*batch, K, K]``, summing to 1.

    Example:
      >>> wins = expected_wins(jnp.array([jnp.log(3.0), 0.0]), jnp.array([0.5, 0.5]))
      >>> wins.round(4).tolist()
      [[0.25, 0.375], [0.125, 0.25]]
    """
    reward, sampler = as_float(reward), as_float(sampler)
    odds = jax.nn.sigmoid(reward[..., :, None] - reward[..., None, :])
    return 2 * sampler[..., :, None] * sampler[..., None, :] * odds


def sample_wins(
    key: PRNGKey, reward: Float[Array, "*batch K"], sampler: Float[Array, "*batch K"], *, n: int
) -> Int[Array, "*batch K K"]:
    """Counts of the labels of ``n`` sampled pairs: all that a likelihood of them depends on.

    Args:
      key: Consumed.
      reward: The labeller's reward of every completion, reward units.
      sampler: Probability of every completion in a pair, both drawn independently.
      n: Number of pairs, at least 1.

    Returns:
      How often ``i`` was preferred to ``j``, ``[*batch, K, K]``; sums to ``n``, its mean is ``n`` `expected_wins`.

    Raises:
      ValueError: If ``n`` is below 1.
    """
    check_at_least("n", n, 1)
    chex.assert_equal_shape([reward, sampler])
    pair_key, label_key = jax.random.split(key)
    K, batch = reward.shape[-1], reward.shape[:-1]
    logits = jnp.log(as_float(sampler))
    one, two = jax.random.categorical(pair_key, logits[None, None], shape=(2, n, *batch))
    margin = _take(reward, one) - _take(reward, two)
    first = jax.random.uniform(label_key, margin.shape, margin.dtype) < jax.nn.sigmoid(margin)
    cell = jnp.where(first, one, two) * K + jnp.where(first, two, one)
    counts = jax.vmap(partial(jnp.bincount, length=K * K), in_axes=1)(cell.reshape(n, -1))
    return counts.reshape(*batch, K, K)


def mean_pair_loss(
    wins: Float[Array, "*batch K K"] | Int[Array, "*batch K K"],
    loss: Callable[..., Array],
    *tables: Float[Array, "*batch K"],
) -> Float[Array, "*batch"]:
    """Mean of a loss on pairs over a table of wins.

    Args:
      wins: How often completion ``i`` was preferred to ``j``: counts or probabilities.
      loss: From arrays ``[*batch, K, K, 2]``, chosen first, to ``[*batch, K, K]``: any loss on pairs with its options
        bound.
      *tables: What ``loss`` takes, for every completion: rewards, or log-probabilities of policy and reference.

    Returns:
      ``[*batch]``: in nats for a likelihood.

    Example:
      >>> wins = jnp.array([[0, 3], [1, 0]])
      >>> reward = jnp.array([jnp.log(3.0), 0.0])
      >>> round(float(mean_pair_loss(wins, bradley_terry_loss, reward)), 4)  # the entropy of 3 : 1
      0.5623
    """
    shape = wins.shape

    def pairs(table):
        table = as_float(table)
        chosen = jnp.broadcast_to(table[..., :, None], shape)
        return jnp.stack([chosen, jnp.broadcast_to(table[..., None, :], shape)], axis=-1)

    values = loss(*map(pairs, tables))
    wins = jnp.asarray(wins, values.dtype)
    total = jnp.sum(jnp.where(wins > 0, wins * jnp.where(wins > 0, values, 0), 0), axis=(-2, -1))
    return total / jnp.sum(wins, axis=(-2, -1))


def strongly_connected(wins: Float[Array, "*batch K K"] | Int[Array, "*batch K K"]) -> Bool[Array, "*batch"]:
    """Whether each completion beat each other one through a chain of wins.

    Necessary and sufficient for the Bradley-Terry maximum-likelihood rewards to exist, and then they are unique up to
    a constant. Labels without noise never satisfy it.

    Args:
      wins: How often completion ``i`` was preferred to ``j``.

    Returns:
      ``[*batch]``.

    Example:
      >>> circle = jnp.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
      >>> bool(strongly_connected(circle)), bool(strongly_connected(circle.at[2, 0].set(0)))
      (True, False)

    References:
      Ford, 1957, "Solution of a ranking problem from binary comparisons".
    """
    K = wins.shape[-1]
    reach = jnp.maximum(wins > 0, jnp.broadcast_to(jnp.eye(K, dtype=bool), wins.shape)).astype(jnp.float32)
    # Paths of up to 2^k steps after k squarings.
    for _ in range((K - 1).bit_length()):
        reach = (reach @ reach > 0).astype(jnp.float32)
    return jnp.all(reach > 0, axis=(-2, -1))


def fit_reward(wins: Float[Array, "*batch K K"] | Int[Array, "*batch K K"]) -> Minimum:
    """The maximum-likelihood reward: one free number for every completion.

    Args:
      wins: How often completion ``i`` was preferred to ``j``; `strongly_connected`, or there is no maximum.

    Returns:
      `Minimum` whose parameters are the reward ``[*batch, K]``, of mean 0 (the constant is not identified), and whose
      value is the mean negative log-likelihood, nats, summed over the leading axes.
    """
    chex.assert_equal(wins.shape[-1], wins.shape[-2])
    start = jnp.zeros(wins.shape[:-1], jnp.result_type(float))
    found = minimise(lambda reward: jnp.sum(mean_pair_loss(wins, bradley_terry_loss, reward)), start)
    return replace(found, params=found.params - jnp.mean(found.params, axis=-1, keepdims=True))


def fit_dpo(wins: Float[Array, "*batch K K"] | Int[Array, "*batch K K"], ref: Levels, *, beta: Numeric) -> Minimum:
    """The policy whose implicit reward ``beta log(pi / ref)`` has the maximum likelihood, token by token.

    Args:
      wins: How often completion ``i`` was preferred to ``j``; `strongly_connected`, or there is no maximum.
      ref: The reference, H levels ``[*batch, V**t, V]`` of finite log-probabilities, nats.
      beta: Strength of the KL term, > 0, reward units.

    Returns:
      `Minimum` whose parameters are the policy, levels of log-probabilities like ``ref``, and whose value is the mean
      negative log-likelihood, nats, summed over the leading axes.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.
    """
    check_positive("beta", beta)
    ref_logp = sequence_logp(ref)
    return _fit_policy(wins, lambda logp: mean_pair_loss(wins, partial(dpo_loss, beta=beta), logp, ref_logp), ref)


def fit_local(
    wins: Float[Array, "*batch K K"] | Int[Array, "*batch K K"], *, vocab_size: int, beta: Numeric = 1.0
) -> Minimum:
    """The policy whose own log-likelihood, ``beta log pi``, has the maximum likelihood as a reward.

    Args:
      wins: How often completion ``i`` was preferred to ``j``; `strongly_connected`, or there is no maximum.
      vocab_size: ``V``.
      beta: Scale, > 0, reward units per nat.

    Returns:
      `Minimum` as from `fit_dpo`.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite, or ``wins`` not of the completions of
        a whole number of tokens.
    """
    check_positive("beta", beta)
    start = conditionals(jnp.zeros(wins.shape[:-1], jnp.result_type(float)), vocab_size=vocab_size)
    return _fit_policy(wins, lambda logp: mean_pair_loss(wins, partial(local_reward_loss, beta=beta), logp), start)


def _fit_policy(wins: Array, loss: Callable[[Array], Array], start: Levels) -> Minimum:
    chex.assert_equal(wins.shape[-1], wins.shape[-2])

    def policy(logits):
        return [jax.nn.log_softmax(level) for level in logits]

    found = minimise(lambda logits: jnp.sum(loss(sequence_logp(policy(logits)))), list(start))
    return replace(found, params=policy(found.params))


def _take(table: Array, index: Array) -> Array:
    """``table [*batch, K]`` at ``index [n, *batch]``."""
    return jnp.moveaxis(jnp.take_along_axis(as_float(table), jnp.moveaxis(index, 0, -1), axis=-1), -1, 0)
