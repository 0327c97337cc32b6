import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy.optimize import brentq
from scipy.special import expit, lambertw, log_expit, log_softmax, softmax

from tests.compiled import compiled
from tests.losses.tabular import minimiser, ordered_pairs
from tiltjax.losses import preference
from tiltjax.losses.preference import (
    chi_po_loss,
    divergence_link,
    dpo_loss,
    dpo_nll_loss,
    dpop_loss,
    implicit_reward,
    robust_dpo_loss,
)

chi_po_loss, divergence_link, dpo_loss, dpo_nll_loss, dpop_loss, implicit_reward, robust_dpo_loss = map(
    compiled, (chi_po_loss, divergence_link, dpo_loss, dpo_nll_loss, dpop_loss, implicit_reward, robust_dpo_loss)
)

RNG = np.random.default_rng(0)
LOGP = (-3 * RNG.gamma(2.0, size=(7, 2))).astype(np.float32)
REF_LOGP = (LOGP + RNG.normal(size=(7, 2))).astype(np.float32)


class DPOTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    @parameterized.parameters(0.1, 2.0)
    def test_at_the_reference_the_loss_is_log_two(self, beta):
        out = self.variant(lambda logp, ref: dpo_loss(logp, ref, beta=beta))(LOGP, LOGP)
        np.testing.assert_allclose(out, np.full(7, np.log(2)), rtol=1e-6)
        grad = jax.grad(lambda x: dpo_loss(x, LOGP, beta=beta).sum())(jnp.asarray(LOGP))
        np.testing.assert_allclose(grad, np.broadcast_to([-beta / 2, beta / 2], (7, 2)), rtol=1e-6)

    @chex.variants(with_jit=True)
    def test_smoothing_is_the_expected_loss_of_flipped_labels(self):
        smooth = self.variant(lambda logp, ref, eps: dpo_loss(logp, ref, beta=0.3, label_smoothing=eps))
        plain = dpo_loss(LOGP, REF_LOGP, beta=0.3)
        flipped = dpo_loss(LOGP[:, ::-1], REF_LOGP[:, ::-1], beta=0.3)
        np.testing.assert_array_equal(smooth(LOGP, REF_LOGP, 0.0), plain)
        np.testing.assert_allclose(smooth(LOGP, REF_LOGP, 0.2), 0.8 * plain + 0.2 * flipped, rtol=1e-5)

    @chex.variants(with_jit=True)
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


GENERATORS = {
    ("reverse_kl", 0.5): lambda u: u * np.log(u),
    ("forward_kl", 0.5): lambda u: -np.log(u),
    ("js", 0.5): lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
    ("alpha", 0.3): lambda u: (u**0.7 - 0.7 * u - 0.3) / (0.3 * -0.7),
    ("alpha", 0.7): lambda u: (u**0.3 - 0.3 * u - 0.7) / (0.7 * -0.3),
}
every_divergence = pytest.mark.parametrize(("divergence", "alpha"), list(GENERATORS))


@every_divergence
def test_links_are_the_derivatives_of_their_divergences(divergence, alpha):
    f = GENERATORS[divergence, alpha]
    log_ratio = np.linspace(-3, 3, 13)
    derivative = lambda u: (f(u + 1e-6 * u) - f(u - 1e-6 * u)) / (2e-6 * u)
    link = divergence_link(jnp.float32(log_ratio), divergence=divergence, alpha=alpha)
    np.testing.assert_allclose(link, derivative(np.exp(log_ratio)) - derivative(1.0), rtol=1e-5, atol=1e-6)
    assert float(divergence_link(jnp.float32(0), divergence=divergence, alpha=alpha)) == 0


def test_alpha_runs_from_reverse_to_forward_kl():
    for alpha, divergence, rtol in ((1e-6, "reverse_kl", 1e-4), (1.0, "forward_kl", 1e-6)):
        out = dpo_loss(LOGP, REF_LOGP, beta=0.5, divergence="alpha", alpha=alpha)
        np.testing.assert_allclose(out, dpo_loss(LOGP, REF_LOGP, beta=0.5, divergence=divergence), rtol=rtol)


@pytest.mark.parametrize(
    ("divergence", "alpha", "inverse"),
    [
        ("reverse_kl", 0.5, lambda z: np.exp(z)),
        ("forward_kl", 0.5, lambda z: 1 / (1 - z)),
        ("js", 0.5, lambda z: 1 / (2 * np.exp(-z) - 1)),
        ("alpha", 0.5, lambda z: (1 - 0.5 * z) ** -2),
        ("chi_po", None, lambda z: lambertw(np.exp(z)).real),
    ],
)
def test_the_population_minimiser_holds_the_normaliser_inside_the_link(divergence, alpha, inverse):
    arms, beta = 4, 0.5
    rng = np.random.default_rng(5)
    ref, reward, pairs = rng.dirichlet(3 * np.ones(arms)), rng.normal(size=arms), ordered_pairs(arms)
    mass = expit(reward[pairs[:, 0]] - reward[pairs[:, 1]])

    def loss(logp):
        arrays = logp[pairs], np.log(ref)[pairs]
        if divergence == "chi_po":
            return jnp.sum(mass * chi_po_loss(*arrays, beta=beta))
        return jnp.sum(mass * dpo_loss(*arrays, beta=beta, divergence=divergence, alpha=alpha))

    # p_ref (f')^-1((r - lambda) / beta) with lambda from sum = 1; above the pole of (f')^-1.
    total = lambda shift: (ref * inverse((reward - shift) / beta)).sum() - 1
    pole = {"forward_kl": 1.0, "js": np.log(2), "alpha": 2.0}.get(divergence, 10.0)
    shift = brentq(total, reward.max() - beta * pole + 1e-9, reward.max() + 50, xtol=1e-14)
    expected = ref * inverse((reward - shift) / beta)
    np.testing.assert_allclose(minimiser(loss, ref), expected, atol=1e-8)
    if divergence not in ("reverse_kl", "chi_po"):  # An outside normaliser gives another policy.
        shifted = ref * inverse((reward - reward.max()) / beta)
        assert 0.5 * np.abs(shifted / shifted.sum() - expected).sum() > 0.01


def test_robust_loss_of_flipped_labels_is_the_clean_loss_on_average():
    robust = lambda logp, ref: robust_dpo_loss(logp, ref, beta=0.3, label_smoothing=0.2)
    mean = 0.8 * robust(LOGP, REF_LOGP) + 0.2 * robust(LOGP[:, ::-1], REF_LOGP[:, ::-1])
    np.testing.assert_allclose(mean, dpo_loss(LOGP, REF_LOGP, beta=0.3), rtol=1e-5)
    clean = robust_dpo_loss(LOGP, REF_LOGP, beta=0.3, label_smoothing=0.0)
    np.testing.assert_array_equal(clean, dpo_loss(LOGP, REF_LOGP, beta=0.3))
    assert float(robust(jnp.array([100.0, 0.0]), jnp.zeros(2))) < -9  # No lower bound.


def test_chi_po_has_no_gradient_outside_its_clip():
    def both(logp, bound):
        return jax.value_and_grad(lambda x: chi_po_loss(x, jnp.zeros(2), beta=1.0, reward_bound=bound))(logp)

    value, grad = both(jnp.array([-1.0, -5.0]), 1.0)
    np.testing.assert_allclose(value, -log_expit(2.0), rtol=1e-6)
    np.testing.assert_array_equal(grad, [0.0, 0.0])
    value, grad = both(jnp.array([-1.0, -5.0]), 10.0)
    ratio = np.array([-1.0, -5.0])
    margin = np.exp(ratio[0]) - np.exp(ratio[1]) + 4
    np.testing.assert_allclose(value, -log_expit(margin), rtol=1e-5)
    np.testing.assert_allclose(grad, expit(-margin) * (1 + np.exp(ratio)) * [-1, 1], rtol=1e-5)


def test_dpop_is_dpo_until_the_chosen_falls_below_the_reference():
    ref = jnp.array([[-5.0, -5.0], [-5.0, -5.0], [-5.0, -5.0]])
    logp = jnp.array([[-4.0, -6.0], [-5.0, -7.0], [-5.5, -7.0]])
    out = dpop_loss(logp, ref, beta=0.3, penalty=50.0)
    np.testing.assert_array_equal(out[:2], dpo_loss(logp, ref, beta=0.3)[:2])
    np.testing.assert_allclose(out[2], -log_expit(0.3 * (1.5 - 50 * 0.5)), rtol=1e-6)
    grad = jax.grad(lambda x: dpop_loss(x, ref, beta=0.3, penalty=50.0).sum())(logp)
    np.testing.assert_allclose(grad[1], jax.grad(lambda x: dpo_loss(x, ref, beta=0.3).sum())(logp)[1], rtol=1e-6)
    np.testing.assert_allclose(grad[2, 0], -0.3 * 51 * expit(-0.3 * (1.5 - 25)), rtol=1e-5)


def test_dpo_nll_weighs_every_chosen_token_of_its_own_completion():
    length = np.arange(1, 15).reshape(7, 2)
    grad = jax.grad(lambda x, n: dpo_nll_loss(x, REF_LOGP, n, beta=0.5, nll_weight=2.0).sum())
    plain = jax.grad(lambda x: dpo_loss(x, REF_LOGP, beta=0.5).sum())(jnp.asarray(LOGP))
    for tokens in (jnp.int32(length), jnp.float32(length)):
        extra = np.asarray(grad(jnp.asarray(LOGP), tokens) - plain)
        np.testing.assert_allclose(extra[:, 0], -2.0 / length[:, 0], rtol=1e-4)
        np.testing.assert_allclose(extra[:, 1], 0, atol=1e-7)
    nothing = dpo_nll_loss(LOGP, REF_LOGP, jnp.zeros((7, 2), jnp.int32), beta=0.5, where=jnp.zeros((7, 2), bool))
    np.testing.assert_array_equal(nothing, np.zeros(7))


def test_exponents_of_a_lost_completion_are_clamped():
    logp = jnp.array([-300.0, 0.0])
    for loss in (
        lambda x: dpo_loss(x, jnp.zeros(2), beta=0.1, divergence="forward_kl"),
        lambda x: chi_po_loss(-x, jnp.zeros(2), beta=0.1),
    ):
        value, grad = jax.value_and_grad(loss)(logp)
        assert np.isfinite(value)
        assert np.isfinite(grad).all()


@pytest.mark.parametrize("weighting", ["uniform", "random"])
def test_the_population_minimiser_is_the_tilt(weighting):
    # Every ordered pair of five completions, weighted by its share among comparisons times its Bradley-Terry label.
    arms, beta = 5, 0.4
    rng = np.random.default_rng(3)
    ref, reward = rng.dirichlet(np.ones(arms)), rng.normal(size=arms)
    pairs = ordered_pairs(arms)
    share = rng.random((arms, arms)) if weighting == "random" else np.ones((arms, arms))
    share = (share + share.T)[pairs[:, 0], pairs[:, 1]]
    mass = share * expit(reward[pairs[:, 0]] - reward[pairs[:, 1]])
    ref_logp = np.log(ref)

    def loss(logp):
        return jnp.sum(mass / mass.sum() * dpo_loss(logp[pairs], ref_logp[pairs], beta=beta))

    found = minimiser(loss, ref)
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
    for call in (dpo_loss, implicit_reward, chi_po_loss, dpop_loss):
        with pytest.raises(ValueError, match="beta must be a finite number above 0, got 0"):
            call(LOGP, REF_LOGP, beta=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dpo_loss(LOGP, REF_LOGP, beta=0.1, divergence="kl"), "divergence must be one of alpha, forward_kl"),
        (lambda: dpo_loss(LOGP, REF_LOGP, beta=0.1, divergence="alpha", alpha=0.0), r"alpha must lie in \(0, 1\]"),
        (lambda: robust_dpo_loss(LOGP, REF_LOGP, beta=0.1, label_smoothing=0.5), "label_smoothing must lie"),
        (lambda: chi_po_loss(LOGP, REF_LOGP, beta=0.1, reward_bound=-1.0), "reward_bound must be a finite number"),
        (lambda: dpop_loss(LOGP, REF_LOGP, beta=0.1, penalty=-1.0), "penalty must be at least 0, got -1.0"),
        (lambda: dpo_nll_loss(LOGP, REF_LOGP, LOGP, beta=0.1, nll_weight=-1.0), "nll_weight must be at least 0"),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_beta_may_differ_between_pairs():
    beta = jnp.linspace(0.1, 2.0, 7)
    for loss in (dpo_loss, chi_po_loss, dpop_loss, preference.hinge_loss, preference.apo_zero_loss):
        out = loss(LOGP, REF_LOGP, beta=beta)
        alone = [loss(LOGP[i], REF_LOGP[i], beta=float(beta[i])) for i in range(7)]
        np.testing.assert_allclose(out, alone, rtol=1e-6)
