import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy.optimize import brentq
from scipy.special import expit, log_expit, log_softmax, softmax

from tiltjax.losses.preference import dpo_loss, implicit_reward

RNG = np.random.default_rng(0)
LOGP = (-3 * RNG.gamma(2.0, size=(7, 2))).astype(np.float32)
REF_LOGP = (LOGP + RNG.normal(size=(7, 2))).astype(np.float32)


class DPOTest(chex.TestCase):
    @chex.all_variants(with_pmap=True)
    @parameterized.parameters(0.1, 2.0)
    def test_at_the_reference_the_loss_is_log_two(self, beta):
        out = self.variant(lambda logp, ref: dpo_loss(logp, ref, beta=beta))(LOGP, LOGP)
        np.testing.assert_allclose(out, np.full(7, np.log(2)), rtol=1e-6)
        grad = jax.grad(lambda x: dpo_loss(x, LOGP, beta=beta).sum())(jnp.asarray(LOGP))
        np.testing.assert_allclose(grad, np.broadcast_to([-beta / 2, beta / 2], (7, 2)), rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_smoothing_is_the_expected_loss_of_flipped_labels(self):
        smooth = self.variant(lambda logp, ref, eps: dpo_loss(logp, ref, beta=0.3, label_smoothing=eps))
        plain = dpo_loss(LOGP, REF_LOGP, beta=0.3)
        flipped = dpo_loss(LOGP[:, ::-1], REF_LOGP[:, ::-1], beta=0.3)
        np.testing.assert_array_equal(smooth(LOGP, REF_LOGP, 0.0), plain)
        np.testing.assert_allclose(smooth(LOGP, REF_LOGP, 0.2), 0.8 * plain + 0.2 * flipped, rtol=1e-5)

    @chex.variants(with_jit=True, without_jit=True)
    def test_gradient_formula(self):
        grad = self.variant(jax.grad(lambda x: dpo_loss(x, REF_LOGP, beta=0.5).sum()))(jnp.asarray(LOGP))
        ratio = LOGP.astype(np.float64) - REF_LOGP
        pull = 0.5 * expit(-0.5 * (ratio[:, 0] - ratio[:, 1]))
        np.testing.assert_allclose(grad, np.stack([-pull, pull], -1), rtol=1e-5)


@pytest.mark.parametrize("eps", [0.05, 0.3])
def test_smoothing_stops_at_a_finite_margin(eps):
    def slope(margin):
        logp = jnp.asarray([margin, 0.0], jnp.float32)
        return float(jax.grad(lambda x: dpo_loss(x, jnp.zeros(2), beta=1.0, label_smoothing=eps))(logp)[0])

    np.testing.assert_allclose(brentq(slope, -20, 20, xtol=1e-6), np.log((1 - eps) / eps), atol=1e-4)


def test_margin_keeps_its_precision_at_long_completions():
    # Log-ratios of a few nats on log-probabilities of thousands: differences are taken of like with like.
    ref = np.float32([[-8000.0, -4000.0]])
    logp = ref + np.float32([[0.25, -0.5]])
    np.testing.assert_allclose(dpo_loss(logp, ref, beta=1.0), -log_expit([0.75]), rtol=1e-6)


def test_a_pair_counts_where_both_candidates_are_real():
    where = np.ones((7, 2), bool)
    where[1, 0] = where[2, 1] = False
    out = dpo_loss(LOGP, REF_LOGP, beta=0.3, where=where)
    np.testing.assert_array_equal(out, np.where(where.all(-1), dpo_loss(LOGP, REF_LOGP, beta=0.3), 0))


@pytest.mark.parametrize("weighting", ["uniform", "random"])
def test_the_population_minimiser_is_the_tilt(weighting):
    # Every ordered pair of five completions, weighted by its share among comparisons times its Bradley-Terry label.
    arms, beta = 5, 0.4
    rng = np.random.default_rng(3)
    ref, reward = rng.dirichlet(np.ones(arms)), rng.normal(size=arms)
    pairs = np.array(list(itertools.permutations(range(arms), 2)))
    share = rng.random((arms, arms)) if weighting == "random" else np.ones((arms, arms))
    share = (share + share.T)[pairs[:, 0], pairs[:, 1]]
    mass = share * expit(reward[pairs[:, 0]] - reward[pairs[:, 1]])
    mass, ref_logp = mass / mass.sum(), np.log(ref)
    with jax.enable_x64(True):

        def loss(logits):
            logp = jax.nn.log_softmax(logits)
            return jnp.sum(mass * dpo_loss(logp[pairs], jnp.asarray(ref_logp[pairs]), beta=beta))

        # Convex in the logits: a few Newton steps from the reference, the flat direction left out.
        newton = jax.jit(lambda z: z - jnp.linalg.pinv(jax.hessian(loss)(z), rtol=1e-8) @ jax.grad(loss)(z))
        logits = jnp.asarray(ref_logp)
        for _ in range(12):
            logits = newton(logits)
        found = softmax(np.asarray(logits))
    np.testing.assert_allclose(found, softmax(ref_logp + reward / beta), atol=1e-9)


def test_contradictory_labels_can_leave_the_minority_on_top():
    # 60 % prefer a, the reference all but excludes it: beta log(pi_a ref_b / (pi_b ref_a)) = log(0.6 / 0.4).
    ref, beta = np.array([0.05, 0.95]), 0.5

    def slope(logit):
        def loss(logit):
            logp = jax.nn.log_softmax(jnp.stack([logit, jnp.zeros(())]))
            ref_logp = jnp.asarray(np.log(ref), jnp.float32)
            return 0.6 * dpo_loss(logp, ref_logp, beta=beta) + 0.4 * dpo_loss(logp[::-1], ref_logp[::-1], beta=beta)

        return float(jax.grad(loss)(jnp.float32(logit)))

    np.testing.assert_allclose(expit(brentq(slope, -10, 10)), 0.105882, atol=1e-5)


def test_implicit_reward_inverts_the_tilt_and_carries_no_gradient():
    ref, reward = log_softmax(RNG.normal(size=9)), RNG.normal(size=9)
    logp = log_softmax(ref + reward / 0.3)
    out = np.asarray(implicit_reward(jnp.float32(logp), jnp.float32(ref), beta=0.3))
    np.testing.assert_allclose(out - out[0], reward - reward[0], atol=1e-5)
    grad = jax.grad(lambda x: implicit_reward(x, jnp.float32(ref), beta=0.3).sum())(jnp.float32(logp))
    np.testing.assert_array_equal(grad, np.zeros(9))


@pytest.mark.parametrize("eps", [-0.1, 0.5, 1.0, float("nan")])
def test_bad_label_smoothing_is_named(eps):
    with pytest.raises(ValueError, match=r"label_smoothing must lie in \[0, 0.5\), got"):
        dpo_loss(LOGP, REF_LOGP, beta=0.1, label_smoothing=eps)


def test_bad_beta_is_named():
    for call in (dpo_loss, implicit_reward):
        with pytest.raises(ValueError, match="beta must be a finite number above 0, got 0"):
            call(LOGP, REF_LOGP, beta=0)
