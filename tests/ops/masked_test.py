import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from tiltjax.ops.masked import Average, as_float, average, masked_mean, masked_sum, masked_var

RNG = np.random.default_rng(0)
X = RNG.normal(size=(5, 16)).astype(np.float32)
WHERE = RNG.random((5, 16)) < 0.6
DIRTY = np.where(WHERE, X, RNG.choice([np.nan, np.inf, -np.inf], size=X.shape)).astype(np.float32)
FUNCTIONS = [masked_sum, masked_mean, masked_var, functools.partial(masked_var, ddof=1)]
REFERENCES = [np.sum, np.mean, np.var, functools.partial(np.var, ddof=1)]


class MaskedTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    def test_are_numpy_without_a_mask(self):
        for function, reference in zip(FUNCTIONS, REFERENCES, strict=True):
            out = self.variant(function)(jnp.asarray(X))
            np.testing.assert_allclose(out, reference(X.astype(np.float64), axis=-1), rtol=2e-5, atol=1e-6)

    @chex.variants(with_jit=True)
    def test_masked_is_sliced_whatever_the_mask_hides(self):
        for function, reference in zip(FUNCTIONS, REFERENCES, strict=True):
            out = self.variant(function)(jnp.asarray(DIRTY), jnp.asarray(WHERE))
            expected = [reference(x[w].astype(np.float64)) for x, w in zip(X, WHERE, strict=True)]
            np.testing.assert_allclose(out, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_entry_gives_zero_and_zero_gradient(function):
    bad, nothing = jnp.full((2, 4), jnp.nan), jnp.zeros((2, 4), bool)
    np.testing.assert_array_equal(function(bad, nothing), np.zeros(2))
    np.testing.assert_array_equal(jax.grad(lambda x: function(x, nothing).sum())(bad), np.zeros((2, 4)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_stay_finite_beside_masked_garbage(function):
    grad = jax.grad(lambda x: function(x, jnp.asarray(WHERE)).sum())(jnp.asarray(DIRTY))
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(np.asarray(grad)[~WHERE], 0)


def test_one_entry_has_no_sample_variance():
    assert float(masked_var(jnp.array([3.0, 9.0]), jnp.array([True, False]), ddof=1)) == 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_entries_over_eight_devices(function):
    spec = PartitionSpec(None, "n")
    mesh = Mesh(np.array(jax.devices()), ("n",))
    mapped = functools.partial(function, axis_name="n")
    sharded = jax.shard_map(mapped, mesh=mesh, in_specs=(spec, spec), out_specs=PartitionSpec())
    expected = function(jnp.asarray(X), jnp.asarray(WHERE))
    np.testing.assert_allclose(jax.jit(sharded)(DIRTY, WHERE), expected, rtol=2e-5, atol=1e-6)

    def split(x):
        return x.reshape(5, 8, 2).swapaxes(0, 1)

    pmapped = jax.pmap(mapped, axis_name="n")(split(DIRTY), split(WHERE))
    np.testing.assert_allclose(pmapped, np.tile(expected, (8, 1)), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(("given", "inside"), [("bfloat16", "float32"), ("float32", "float32"), ("int32", "float32")])
def test_works_in_float32_or_wider(given, inside):
    assert as_float(jnp.ones(3, given)).dtype == inside
    with jax.enable_x64(True):
        assert as_float(jnp.ones(3, jnp.float64)).dtype == jnp.float64


def test_average_of_unequal_parts_is_the_average_of_all():
    cuts = np.split(np.arange(16), [3, 4, 11])
    parts = [average(jnp.asarray(DIRTY[:, c]), jnp.asarray(WHERE[:, c])) for c in cuts]
    total = functools.reduce(Average.__add__, parts)
    np.testing.assert_allclose(total.mean, X[WHERE].astype(np.float64).mean(), rtol=1e-5)
    assert float(total.count) == WHERE.sum()


def test_average_over_devices_weighs_by_count():
    out = jax.pmap(lambda x, w: average(x, w).psum("d").mean, axis_name="d")(
        np.resize(X, (8, 10)), np.resize(WHERE, (8, 10))
    )
    np.testing.assert_allclose(out, np.full(8, np.resize(X, (8, 10))[np.resize(WHERE, (8, 10))].mean()), rtol=1e-5)


def test_average_of_nothing_is_zero_with_zero_gradient():
    nothing = jnp.zeros(3, bool)
    assert float(average(jnp.full(3, jnp.nan), nothing).mean) == 0
    grad = jax.grad(lambda x: average(x, nothing).mean)(jnp.full(3, jnp.nan))
    np.testing.assert_array_equal(grad, np.zeros(3))
