import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import PartitionSpec
from scipy.special import logsumexp, softmax

from tests.grids import each_grid, mesh_over
from tiltjax.tilt.weights import tilt

REWARD = np.random.default_rng(0).normal(size=(5, 16)).astype(np.float32)
WHERE = np.random.default_rng(1).random((5, 16)) < 0.6


class TiltTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    @parameterized.parameters(0.05, 1.0, 30.0)
    def test_is_the_float64_softmax(self, beta):
        out = self.variant(lambda r: tilt(r, beta=beta))(jnp.asarray(REWARD))
        x = REWARD.astype(np.float64) / beta
        np.testing.assert_allclose(out.weights, softmax(x, -1), rtol=2e-5)
        np.testing.assert_allclose(out.log_z, logsumexp(x, -1) - np.log(16), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(out.ess, 1 / np.square(softmax(x, -1)).sum(-1), rtol=2e-5)

    @chex.variants(with_jit=True)
    def test_masked_is_sliced(self):
        out = self.variant(lambda r, w: tilt(r, beta=0.3, where=w))(jnp.asarray(REWARD), jnp.asarray(WHERE))
        for row in range(5):
            sliced = tilt(jnp.asarray(REWARD[row][WHERE[row]]), beta=0.3)
            np.testing.assert_allclose(out.weights[row][WHERE[row]], sliced.weights, rtol=1e-5)
            np.testing.assert_array_equal(out.weights[row][~WHERE[row]], 0)
            np.testing.assert_allclose([out.log_z[row], out.ess[row]], [sliced.log_z, sliced.ess], rtol=1e-5)


@pytest.mark.parametrize("scale", [1e5, -1e5])
def test_exact_where_reward_over_beta_is_huge(scale):
    reward = jnp.asarray([scale, scale - 1.0, scale - 2.0])
    out = tilt(reward, beta=1.0)
    np.testing.assert_allclose(out.weights, softmax([0.0, -1.0, -2.0]), rtol=1e-6)
    assert abs(float(out.weights.sum()) - 1) < 1e-6
    np.testing.assert_allclose(out.log_z, scale + logsumexp([0.0, -1, -2]) - np.log(3), rtol=1e-7)
    small = jnp.asarray([1.0, 1 - 2.0**-17, 1 - 2.0**-16])
    np.testing.assert_allclose(tilt(small, beta=2.0**-17).weights, out.weights, rtol=1e-6)


def test_no_candidate_gives_zeros_and_finite_gradients():
    where = jnp.zeros((2, 4), bool)
    bad = jnp.full((2, 4), jnp.nan)
    out = tilt(bad, beta=1.0, where=where)
    chex.assert_trees_all_equal(out.weights, jnp.zeros((2, 4)))
    chex.assert_trees_all_equal((out.log_z, out.ess), (jnp.zeros(2), jnp.zeros(2)))
    grad = jax.grad(
        lambda r: (tilt(r, beta=1.0, where=where).log_z + tilt(r, beta=1.0, where=where).weights.sum(-1)).sum()
    )(bad)
    chex.assert_trees_all_equal(grad, jnp.zeros((2, 4)))


def test_gradient_of_log_z_is_the_weights():
    grad = jax.grad(lambda r: tilt(r, beta=0.7).log_z.sum())(jnp.asarray(REWARD))
    np.testing.assert_allclose(grad * 0.7, tilt(jnp.asarray(REWARD), beta=0.7).weights, rtol=1e-4, atol=1e-7)


def test_beta_per_prompt_is_each_prompt_alone():
    beta = jnp.asarray([0.1, 0.3, 1.0, 3.0, 10.0])
    out = tilt(jnp.asarray(REWARD), beta=beta)
    chex.assert_trees_all_close(out, jax.vmap(lambda r, b: tilt(r, beta=b))(jnp.asarray(REWARD), beta), rtol=1e-6)


@each_grid
def test_candidates_over_eight_devices(names):
    mesh = mesh_over(names)
    spec = PartitionSpec(None, names)
    out_specs = (spec, PartitionSpec(), PartitionSpec())

    def fields(reward, where, axis_name=None):
        out = tilt(reward, beta=0.3, where=where, axis_name=axis_name)
        return out.weights, out.log_z, out.ess

    sharded = jax.shard_map(lambda r, w: fields(r, w, names), mesh=mesh, in_specs=(spec, spec), out_specs=out_specs)
    chex.assert_trees_all_close(jax.jit(sharded)(REWARD, WHERE), fields(REWARD, WHERE), rtol=1e-5)


@pytest.mark.parametrize("beta", [0.0, -1.0, float("inf")])
def test_bad_beta_is_named(beta):
    with pytest.raises(ValueError, match=r"beta must be a finite number above 0, got"):
        tilt(jnp.zeros(3), beta=beta)
