import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy.optimize import brentq

from tiltjax.tilt.pessimism import pessimistic_threshold, pessimistic_weights

RNG = np.random.default_rng(0)
REWARD = np.concatenate([RNG.normal(size=(3, 12)), np.round(RNG.normal(size=(2, 12))), np.full((1, 12), 2.5)])
REWARD = REWARD.astype(np.float32)
WHERE = RNG.random(REWARD.shape) < 0.7


def threshold(row, beta):
    """Root of the definition, float64."""
    row = row.astype(np.float64)
    surplus = lambda lam: np.maximum(row - lam, 0).mean() / beta - 1
    return brentq(surplus, row.max() - 1.01 * len(row) * beta - 1e-9, row.max(), xtol=1e-14, rtol=1e-14)


def both(reward, beta, where):
    options = {"beta": beta, "where": where}
    return pessimistic_threshold(reward, **options), pessimistic_weights(reward, **options)


class PessimismTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    @parameterized.parameters(1e-3, 0.3, 50.0)
    def test_masked_is_the_root_for_the_real_candidates(self, beta):
        dirty = np.where(WHERE, REWARD, RNG.choice([np.nan, np.inf, -np.inf, 1e30], size=WHERE.shape))
        lam, weights = self.variant(both)(jnp.asarray(dirty, jnp.float32), jnp.float32(beta), jnp.asarray(WHERE))
        for row, where, found, w in zip(REWARD, WHERE, np.asarray(lam), np.asarray(weights), strict=True):
            exact = threshold(row[where], np.float64(np.float32(beta)))
            np.testing.assert_allclose(found, exact, rtol=2e-6, atol=2e-6)
            dense = np.maximum(row[where] - exact, 0) / np.float32(beta)
            np.testing.assert_allclose(w[where], dense, rtol=1e-4, atol=2e-4)
            np.testing.assert_allclose(w[where].mean(), 1, rtol=1e-5)
            np.testing.assert_array_equal(w[~where], 0)


def test_weights_are_the_optimum():
    rng = np.random.default_rng(1)
    reward, beta = rng.normal(size=(4, 9)), np.array([0.05, 0.3, 1.0, 10.0])
    with jax.enable_x64(True):
        lam, weights = jax.jit(both)(reward, beta, None)
    weights = np.asarray(weights)
    np.testing.assert_allclose(weights.mean(-1), 1, rtol=1e-14)
    np.testing.assert_allclose(lam, [threshold(*row) for row in zip(reward, beta, strict=True)], atol=1e-12)
    assert [int((w > 0).sum()) for w in weights] == sorted((weights > 0).sum(-1))
    assert (weights[0] == 0).any()
    assert (weights[3] > 0).all()

    def objective(u):
        return (u * reward).mean(-1) - beta / 2 * ((u - 1) ** 2).mean(-1)

    best = objective(weights)
    for size in (1e-4, 1e-2, 1.0):
        for _ in range(300):
            moved = np.maximum(weights + size * rng.normal(size=weights.shape) * rng.integers(0, 2, weights.shape), 0)
            moved /= np.maximum(moved.mean(-1, keepdims=True), 1e-9)
            # The gap is at least the strong concavity at the optimum.
            least = beta / 2 * ((moved - weights) ** 2).mean(-1)
            assert (best - objective(moved) >= least * (moved.mean(-1) > 0.5) - 1e-12).all()


def test_precision_at_large_rewards_and_limits_of_beta():
    reward = np.float32([[0, -1, 0.5, 0.25], [1e4, -1e4, 9e3, 0], [-1e4, -1e4, 1e4, 1e4], [0, 1, 2, 3]])
    call = jax.jit(lambda r, beta: both(r, beta, None))
    here, there = call(reward[:1], 0.3), call(reward[:1] + 2.0**17, 0.3)
    np.testing.assert_array_equal(here[1], there[1])
    lam, weights = call(reward, jnp.float32([1e-6, 1e-3, 1e-3, 1e6]))
    np.testing.assert_allclose(weights[:3], [[0, 0, 4, 0], [4, 0, 0, 0], [0, 0, 2, 2]], rtol=1e-6)
    np.testing.assert_allclose(weights[3], np.ones(4), rtol=1e-5)
    chex.assert_tree_all_finite(lam)


def test_gradient_and_rows_without_a_candidate():
    reward = np.where([[True], [False]], REWARD[:2], np.nan).astype(np.float32)
    where = np.broadcast_to([[True], [False]], (2, 12))

    def value(r):
        lam, weights = both(r, 0.3, where)
        return jnp.sum(lam) + jnp.sum(jnp.square(weights)), (lam, weights)

    gradient, (lam, weights) = jax.jit(jax.grad(value, has_aux=True))(reward)
    np.testing.assert_array_equal(lam[1], 0)
    np.testing.assert_array_equal(weights[1], np.zeros(12))
    np.testing.assert_array_equal(gradient[1], np.zeros(12))
    # lambda is the mean of the rewards kept, less a constant; a weight is its own lead over it.
    kept, w = np.asarray(weights[0]) > 0, np.asarray(weights[0])
    mean = kept / kept.sum()
    np.testing.assert_allclose(gradient[0], mean + 2 * (w - kept * w.sum() / kept.sum()) / 0.3, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", [pessimistic_threshold, pessimistic_weights])
def test_bad_beta_is_named(call):
    with pytest.raises(ValueError, match=r"beta must be a finite number above 0, got -1.0"):
        call(jnp.zeros(3), beta=-1.0)
