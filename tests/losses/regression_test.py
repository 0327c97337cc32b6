import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy.special import log_softmax, logsumexp

from tests.losses.tabular import minimiser, ordered_pairs
from tiltjax.losses.regression import log_ratio_regression_loss, rebel_loss, sppo_loss

RNG = np.random.default_rng(0)
LOGP = (-3 * RNG.gamma(2.0, size=(5, 8))).astype(np.float32)
REF_LOGP = (LOGP + RNG.normal(size=(5, 8))).astype(np.float32)
REWARD = RNG.normal(size=(5, 8)).astype(np.float32)


class SPPOTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    @parameterized.parameters(0.001, 0.5)
    def test_published_code(self, beta):
        # Official: half of the sum over best and worst; TRL's hard labels: the sum, at win rates 1 and 0.
        logp, ref = LOGP[:, :2], REF_LOGP[:, :2]
        win_rate = RNG.random((5, 2), np.float32)
        run = self.variant(lambda logp, ref, p: sppo_loss(logp, ref, p, beta=beta))
        a, eta = (logp - ref).astype(np.float64), 1 / beta
        official = ((a[:, 0] - eta * (win_rate[:, 0] - 0.5)) ** 2 + (a[:, 1] - eta * (win_rate[:, 1] - 0.5)) ** 2) / 2
        np.testing.assert_allclose(run(logp, ref, win_rate).mean(-1), official, rtol=1e-4)
        hard = run(logp, ref, np.broadcast_to(np.float32([1, 0]), (5, 2)))
        np.testing.assert_allclose(hard.sum(-1), (a[:, 0] - eta / 2) ** 2 + (a[:, 1] + eta / 2) ** 2, rtol=1e-4)


def test_sppo_fits_multiplicative_weights_where_log_z_is_half_of_eta():
    # The mean win rate is a half and beta is large: log Z -> 1 / (2 beta).
    ref, win_rate, beta = np.full(4, 0.25), np.array([0.8, 0.6, 0.4, 0.2]), 40.0
    loss = lambda logp: jnp.sum(ref * sppo_loss(logp, np.log(ref), win_rate, beta=beta))
    expected = ref * np.exp(win_rate / beta)
    np.testing.assert_allclose(minimiser(loss, ref), expected / expected.sum(), atol=1e-6)


class REBELTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    def test_the_scales_differ_by_a_constant(self):
        def both(logp, ref, reward):
            return tuple(rebel_loss(logp, ref, reward, beta=0.2, scale=scale) for scale in ("paper", "code"))

        paper, code = self.variant(both)(LOGP[:, :2], REF_LOGP[:, :2], REWARD[:, :2])
        np.testing.assert_allclose(code, paper / 0.2**2, rtol=1e-4)

    @chex.variants(with_jit=True)
    def test_neither_order_nor_level_matters(self):
        run = self.variant(lambda *arrays: rebel_loss(*arrays, beta=0.2, scale="paper"))
        arrays = LOGP[:, :2], REF_LOGP[:, :2], REWARD[:, :2]
        np.testing.assert_allclose(run(*(x[:, ::-1] for x in arrays)), run(*arrays), rtol=1e-6)
        np.testing.assert_allclose(run(*arrays[:2], arrays[2] + np.float32(3)), run(*arrays), rtol=1e-4)


def test_rebel_gradient():
    grad = jax.grad(lambda x: rebel_loss(x, REF_LOGP[:, :2], REWARD[:, :2], beta=0.2, scale="paper").sum())
    ratio = (LOGP - REF_LOGP)[:, :2]
    error = 0.2 * (ratio[:, 0] - ratio[:, 1]) - (REWARD[:, 0] - REWARD[:, 1])
    np.testing.assert_allclose(grad(jnp.asarray(LOGP[:, :2])), np.stack([0.4 * error, -0.4 * error], -1), rtol=1e-3)


@pytest.mark.parametrize("loss", ["rebel_paper", "rebel_code", "log_ratio"])
def test_the_minimiser_is_the_tilt_whatever_the_sampler(loss):
    rng = np.random.default_rng(3)
    arms, beta = 5, 0.4
    ref, reward, sampler = rng.dirichlet(np.ones(arms)), rng.normal(size=arms), rng.dirichlet(np.ones(arms))
    log_z, pairs = logsumexp(reward / beta, b=ref), ordered_pairs(arms)

    def objective(logp):
        if loss == "log_ratio":
            arrays = logp, np.log(ref), reward, jnp.asarray(log_z)
            return jnp.sum(sampler * log_ratio_regression_loss(*arrays, beta=beta))
        arrays = (x[pairs] for x in (logp, np.log(ref), reward))
        return jnp.sum(sampler[pairs].prod(-1) * rebel_loss(*arrays, beta=beta, scale=loss.removeprefix("rebel_")))

    expected = ref * np.exp(reward / beta - log_z)
    np.testing.assert_allclose(minimiser(objective, ref), expected, atol=1e-8)


def test_the_log_ratio_of_the_tilt_has_no_error():
    ref_logp = log_softmax(RNG.normal(size=(3, 6)), -1)
    reward, beta = RNG.normal(size=(3, 6)), np.array([0.2, 1.0, 5.0])
    exponent = reward / beta[:, None]
    log_z = logsumexp(ref_logp + exponent, -1)
    arrays = (ref_logp + exponent - log_z[:, None], ref_logp, reward, log_z)
    out = log_ratio_regression_loss(*(jnp.float32(x) for x in arrays), beta=jnp.float32(beta))
    np.testing.assert_allclose(out, np.zeros((3, 6)), atol=1e-9)
    moved = log_ratio_regression_loss(
        *(jnp.float32(x) for x in arrays[:3]), jnp.float32(log_z + 0.5), beta=jnp.float32(beta)
    )
    np.testing.assert_allclose(moved, np.full((3, 6), 0.25), rtol=1e-4)


def test_a_masked_completion_unmakes_the_pair():
    where = np.ones((5, 2), bool)
    where[1, 0] = where[2, 1] = False
    arrays = LOGP[:, :2], REF_LOGP[:, :2], REWARD[:, :2]
    out = rebel_loss(*arrays, beta=0.2, scale="paper", where=where)
    expected = np.where(where.all(-1), rebel_loss(*arrays, beta=0.2, scale="paper"), 0)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda *a: rebel_loss(*a, beta=1.0, scale="trl"), ValueError, "scale must be one of code, paper; got 'trl'"),
        (lambda *a: rebel_loss(*a, beta=1.0), TypeError, "scale"),
        (
            lambda *a: rebel_loss(*a, beta=0.0, scale="code"),
            ValueError,
            "beta must be a finite number above 0, got 0.0",
        ),
        (lambda *a: sppo_loss(*a, beta=0.0), ValueError, "beta must be a finite number above 0, got 0.0"),
    ],
)
def test_bad_options_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(LOGP[:, :2], REF_LOGP[:, :2], REWARD[:, :2])
