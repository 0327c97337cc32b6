import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy.special import log_expit

from tests.compiled import compiled
from tiltjax.losses.preference import cpo_loss, dpo_loss, local_reward_loss, orpo_loss, simpo_loss

cpo_loss, dpo_loss, local_reward_loss, orpo_loss, simpo_loss = map(
    compiled, (cpo_loss, dpo_loss, local_reward_loss, orpo_loss, simpo_loss)
)

RNG = np.random.default_rng(0)
LOGP = (-3 * RNG.gamma(2.0, size=(7, 2))).astype(np.float32)
FLAT = np.zeros((7, 2), np.float32)


class AgainstDPOTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    @parameterized.parameters(1, 12)
    def test_simpo_without_target_is_reference_free_dpo(self, tokens):
        length = np.full((7, 2), tokens, np.int32)
        out = self.variant(lambda logp, length: simpo_loss(logp, length, beta=2.0, gamma=0.0))(LOGP, length)
        np.testing.assert_allclose(out, dpo_loss(LOGP, FLAT, beta=2.0 / tokens), rtol=1e-5)

    @chex.variants(with_jit=True)
    def test_the_local_reward_is_dpo_against_a_flat_reference(self):
        expected = dpo_loss(LOGP, FLAT, beta=1 / 53)
        np.testing.assert_allclose(self.variant(lambda x: local_reward_loss(x, beta=1 / 53))(LOGP), expected, rtol=1e-6)
        out = self.variant(lambda x: cpo_loss(x, beta=1 / 53, nll_weight=0.0))(LOGP)
        np.testing.assert_allclose(out, expected, rtol=1e-6)


def test_simpo_gradient_is_per_token():
    length = RNG.integers(1, 20, size=(7, 2)).astype(np.int32)
    grad = jax.grad(lambda x: simpo_loss(x, length, beta=2.0, gamma=0.5).sum())(jnp.asarray(LOGP))
    np.testing.assert_allclose(grad * length, np.stack([-1, 1]) * np.abs(grad * length)[:, :1], rtol=1e-5)
    margin = 2 * (LOGP / length)[:, 0] - 2 * (LOGP / length)[:, 1] - 0.5
    np.testing.assert_allclose(-grad[:, 0] * length[:, 0], 2 * np.exp(log_expit(-margin)), rtol=1e-4)


@pytest.mark.parametrize("loss", [lambda x, n: simpo_loss(x, n, beta=2.0, gamma=0.5), orpo_loss])
def test_a_length_of_zero_counts_as_one(loss):
    zero = loss(LOGP, jnp.zeros((7, 2), jnp.int32))
    np.testing.assert_array_equal(zero, loss(LOGP, jnp.ones((7, 2), jnp.float32)))


def odds_gap(q):
    """What ORPO adds at chosen ``q`` and rejected -1, per unit of its weight: its margin, in float32."""
    pair = jnp.asarray([q, -1.0], jnp.float32)
    both = orpo_loss(pair, jnp.ones(2, jnp.int32), jnp.float32(0), odds_weight=1.0)
    return -np.log(np.expm1(np.float64(both)))


@pytest.mark.parametrize("q", [-5e-7, -1e-4, -0.6, -0.7, -3.0, -12.0])
def test_log_odds_are_precise_from_certain_to_hopeless(q):
    q = np.float64(np.float32(q))
    exact = q - np.log(-np.expm1(q)) + 1 + np.log(-np.expm1(-1.0))
    np.testing.assert_allclose(odds_gap(q), exact, rtol=1e-4, atol=1e-4)


def test_certainty_is_clamped():
    value, grad = jax.value_and_grad(lambda x: orpo_loss(x, jnp.ones(2, jnp.int32)))(jnp.zeros(2))
    np.testing.assert_allclose(value, 0.1 * np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(grad, [-1.0, 0.0])
    np.testing.assert_allclose(odds_gap(0.0), odds_gap(-1e-7), rtol=1e-6)


def test_orpo_trains_the_likelihood_it_is_given():
    length = np.full((7, 2), 5, np.int32)
    nll = jnp.asarray(RNG.random(7), jnp.float32)
    own = orpo_loss(LOGP, length)
    np.testing.assert_allclose(orpo_loss(LOGP, length, nll), own + LOGP[:, 0] / 5 + nll, rtol=1e-4)
    grad = jax.grad(lambda x: orpo_loss(LOGP, length, x).sum())(nll)
    np.testing.assert_array_equal(grad, np.ones(7))
    where = np.ones((7, 2), bool)
    where[2] = False
    assert float(orpo_loss(LOGP, length, nll.at[2].set(jnp.nan), where=where)[2]) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simpo_loss(LOGP, LOGP, beta=2.0, gamma=-1.0), "gamma must be at least 0, got -1.0"),
        (lambda: cpo_loss(LOGP, beta=-2.0), "beta must be a finite number above 0, got -2.0"),
        (lambda: local_reward_loss(LOGP, beta=0.0), "beta must be a finite number above 0, got 0.0"),
        (lambda: orpo_loss(LOGP, LOGP, odds_weight=-1.0), "odds_weight must be at least 0, got -1.0"),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
