import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import Mesh, PartitionSpec
from scipy.optimize import brentq
from scipy.special import expit, softmax

from tests.compiled import compiled
from tests.losses.tabular import minimiser
from tiltjax.losses.binary import bco_loss, bco_shift, info_nca_loss, kto_loss, nca_loss, nca_pair_loss
from tiltjax.losses.preference import dpo_loss
from tiltjax.ops.masked import Average

bco_loss, bco_shift, dpo_loss, info_nca_loss, kto_loss, nca_loss, nca_pair_loss = map(
    compiled, (bco_loss, bco_shift, dpo_loss, info_nca_loss, kto_loss, nca_loss, nca_pair_loss)
)

RNG = np.random.default_rng(0)
LOGP = (-3 * RNG.gamma(2.0, size=(5, 16))).astype(np.float32)
REF_LOGP = (LOGP + RNG.normal(size=(5, 16))).astype(np.float32)
REWARD = RNG.normal(size=(5, 16)).astype(np.float32)
DESIRABLE = RNG.random((5, 16)) < 0.5
REF = np.array([0.30, 0.25, 0.20, 0.15, 0.07, 0.03])
REWARD6 = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])


class KTOTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    @parameterized.parameters(0.0, 1.7)
    def test_at_the_reference_point_the_loss_is_half_of_lambda(self, point):
        mismatched = np.full((5, 4), point, np.float32)
        options = {"beta": 0.3, "lambda_desirable": 1.4, "lambda_undesirable": 0.6}
        out = self.variant(lambda *arrays: kto_loss(*arrays, **options))(
            REF_LOGP + np.float32(point), REF_LOGP, DESIRABLE, mismatched
        )
        np.testing.assert_allclose(out, np.where(DESIRABLE, 0.7, 0.3), rtol=1e-5)

    @chex.variants(with_jit=True)
    def test_the_reference_point_is_a_mean_that_is_not_negative(self):
        run = self.variant(lambda m, w: kto_loss(LOGP, REF_LOGP, DESIRABLE, m, beta=0.3, mismatched_where=w))
        mismatched, where = np.float32([[-9.0, 3.0, 1.0]] * 5), np.array([[False, True, True]] * 5)
        gain = 0.3 * (LOGP - REF_LOGP - 2.0)
        np.testing.assert_allclose(run(mismatched, where), expit(np.where(DESIRABLE, -gain, gain)), rtol=1e-5)
        gain = 0.3 * (LOGP - REF_LOGP)
        for w in (~np.zeros_like(where), np.zeros_like(where)):  # A negative mean, and no pair at all.
            np.testing.assert_allclose(run(mismatched, w), expit(np.where(DESIRABLE, -gain, gain)), rtol=1e-5)


def test_kto_averages_over_devices_before_the_maximum():
    mismatched = np.float32([8.0, -4.0] * 4)  # Mean 2; the mean of the maxima would be 4.
    logp, ref_logp = LOGP[0, :8], REF_LOGP[0, :8]
    expected = kto_loss(logp, ref_logp, DESIRABLE[0, :8], jnp.asarray([2.0]), beta=0.3)
    run = lambda *arrays: kto_loss(*arrays, beta=0.3, axis_name="n")
    arrays = logp, ref_logp, DESIRABLE[0, :8], mismatched
    mesh, rows = Mesh(np.array(jax.devices()), ("n",)), PartitionSpec("n")
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 4, out_specs=rows)
    np.testing.assert_allclose(jax.jit(sharded)(*arrays), expected, rtol=1e-6)
    pmapped = jax.pmap(run, axis_name="n")(*(x[:, None] for x in arrays))
    np.testing.assert_allclose(np.asarray(pmapped)[:, 0], expected, rtol=1e-6)


def test_kto_follows_the_majority_to_the_end():
    # 60 % find a desirable, 40 % do not, and the reverse for b: DPO settles at pi(a) = 0.106 from this reference.
    ref_logp, majority = jnp.log(jnp.array([0.05, 0.95])), np.array([0.6, 0.4])

    def loss(logit):
        logp = jax.nn.log_softmax(jnp.stack([logit, jnp.zeros(())]))
        good, bad = (kto_loss(logp, ref_logp, jnp.full(2, d), jnp.zeros(1), beta=0.5) for d in (True, False))
        return (majority * good + (1 - majority) * bad).sum()

    slopes = jax.vmap(jax.grad(loss))(jnp.linspace(-4.0, 8.0, 25))
    assert (slopes < 0).all()


class BCOTest(chex.TestCase):
    @chex.variants(with_jit=True)
    @parameterized.parameters(-2.0, 0.0, 0.3)
    def test_bounds_dpo_from_above(self, shift):
        pair = jnp.broadcast_to(jnp.array([True, False]), (5, 2))
        run = self.variant(lambda logp, ref, d: bco_loss(logp, ref, pair, d, beta=0.5).sum(-1))
        bound = run(LOGP[:, :2], REF_LOGP[:, :2], jnp.float32(shift))
        assert (bound > dpo_loss(LOGP[:, :2], REF_LOGP[:, :2], beta=0.5)).all()
        np.testing.assert_array_equal(run(LOGP[:, :2], REF_LOGP[:, :2], shift), bound)

    @chex.variants(with_jit=True)
    def test_gradient_is_a_classifier_error(self):
        run = jax.grad(lambda x, d: bco_loss(x, REF_LOGP, DESIRABLE, d, beta=0.5).sum(), argnums=(0, 1))
        grad, shift_grad = self.variant(run)(jnp.asarray(LOGP), jnp.full(5, 0.4))
        expected = 0.5 * (expit(0.5 * (LOGP - REF_LOGP) - 0.4) - DESIRABLE)
        np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(shift_grad, np.zeros(5))


def test_bco_shift_is_the_mean_of_all_batches_and_devices():
    where = RNG.random((5, 16)) < 0.6
    shift = Average(total=jnp.zeros(()), count=jnp.zeros(()))
    assert float(shift.mean) == 0
    for rows in (slice(0, 1), slice(1, 5)):
        shift = bco_shift(shift, LOGP[rows], REF_LOGP[rows], beta=0.5, where=where[rows])
    expected = 0.5 * (LOGP - REF_LOGP)[where].astype(np.float64).mean()
    np.testing.assert_allclose(shift.mean, expected, rtol=1e-5)
    update = lambda *arrays: bco_shift(
        Average(total=jnp.float32(2), count=jnp.float32(1)), *arrays[:2], beta=0.5, where=arrays[2], axis_name="n"
    )
    out = jax.pmap(update, axis_name="n")(*(np.moveaxis(x.reshape(5, 8, 2), 1, 0) for x in (LOGP, REF_LOGP, where)))
    third = jax.tree.map(lambda x: x[3], out)
    np.testing.assert_allclose(third.mean, (2 + expected * where.sum()) / (1 + where.sum()), rtol=1e-5)
    grad = jax.grad(lambda x: bco_shift(shift, x, REF_LOGP, beta=0.5).mean)(jnp.asarray(LOGP))
    np.testing.assert_array_equal(grad, np.zeros((5, 16)))


@pytest.mark.parametrize("loss", [nca_loss, info_nca_loss])
def test_noise_contrastive_losses_fit_the_tilt(loss):
    # 100 candidates in the exact proportions of the reference.
    arm, alpha = np.repeat(np.arange(6), np.round(100 * REF).astype(int)), 0.4
    beta = 1.0 if loss is nca_loss else 0.5  # InfoNCA is a tilt of strength alpha beta; NCA only at beta 1.
    objective = lambda logp: loss(logp[arm], np.log(REF)[arm], REWARD6[arm], beta=beta, alpha=alpha)
    expected = REF * np.exp(REWARD6 / (alpha * beta))
    np.testing.assert_allclose(minimiser(objective, REF), expected / expected.sum(), atol=1e-8)


class HardTargetTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    def test_pairs_are_the_limit_of_a_hard_target(self):
        reward = np.broadcast_to(np.float32([1.0, 0.0]), (5, 2))

        def losses(logp, ref_logp, reward):
            return tuple(f(logp, ref_logp, reward, beta=0.5, alpha=1e-3) for f in (nca_loss, info_nca_loss))

        nca, info = self.variant(losses)(LOGP[:, :2], REF_LOGP[:, :2], reward)
        np.testing.assert_allclose(nca, nca_pair_loss(LOGP[:, :2], REF_LOGP[:, :2], beta=0.5), rtol=1e-5)
        np.testing.assert_allclose(info, dpo_loss(LOGP[:, :2], REF_LOGP[:, :2], beta=0.5), rtol=1e-5)


def test_info_nca_gradient_is_the_gap_of_two_softmaxes():
    grad = jax.grad(lambda x: info_nca_loss(x, REF_LOGP, REWARD, beta=0.5, alpha=0.7).sum())(jnp.asarray(LOGP))
    expected = 0.5 * (softmax(0.5 * (LOGP - REF_LOGP), -1) - softmax(REWARD / 0.7, -1))
    np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=1e-6)


def test_nca_rests_at_a_finite_reward_of_the_chosen():
    slope = jax.jit(jax.grad(lambda a: nca_pair_loss(jnp.stack([a, jnp.float32(0)]), jnp.zeros(2), beta=0.5)))
    rest = brentq(lambda a: float(slope(jnp.float32(a))), -10, 10)
    np.testing.assert_allclose(0.5 * rest, np.log(2), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda **o: kto_loss(LOGP, REF_LOGP, DESIRABLE, LOGP, **o), "beta must be a finite number above 0, got 0.0"),
        (lambda **o: bco_loss(LOGP, REF_LOGP, DESIRABLE, 0.0, **o), "beta must be a finite number above 0, got 0.0"),
        (lambda **o: nca_loss(LOGP, REF_LOGP, REWARD, alpha=1.0, **o), "beta must be a finite number above 0, got 0.0"),
        (lambda beta: info_nca_loss(LOGP, REF_LOGP, REWARD, beta=1.0, alpha=-1.0), "alpha must be a finite number"),
        (
            lambda beta: kto_loss(LOGP, REF_LOGP, DESIRABLE, LOGP, beta=0.1, lambda_desirable=-1.0),
            "lambda_desirable must be at least 0, got -1.0",
        ),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(beta=0.0)
