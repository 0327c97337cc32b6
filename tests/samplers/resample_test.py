import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from tiltjax.samplers.resample import METHODS, counts, inverse_cdf, resample

WEIGHTS = np.array([0.0, 0.31, 0.0, 0.07, 0.25, 0.002, 0.368, 0.0])
NUM = 20


def counts_over_keys(method, keys):
    """Counts ``[keys, N]`` of as many draws."""
    draw = jax.vmap(lambda k: counts(resample(k, jnp.asarray(WEIGHTS, jnp.float32), num=NUM, method=method), 8))
    return np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(1), keys)))


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_unbiased(method):
    drawn = counts_over_keys(method, 20_000)
    assert (drawn.sum(-1) == NUM).all()
    assert (drawn[:, WEIGHTS == 0] == 0).all()
    error = np.abs(drawn.mean(0) - NUM * WEIGHTS)
    assert (error <= 4 * drawn.std(0) / np.sqrt(len(drawn)) + 1e-9).all(), error
    mean = NUM * WEIGHTS
    variance = {"multinomial": mean * (1 - WEIGHTS), "systematic": (mean % 1) * (1 - mean % 1)}
    if method in variance:
        np.testing.assert_allclose(drawn.var(0), variance[method], rtol=0.05, atol=1e-6)
    else:
        assert (drawn.var(0) <= 1.1 * variance["multinomial"] + 1e-9).all()
    spread = {"multinomial": NUM, "residual": NUM, "stratified": 2, "systematic": 1}[method]
    assert (np.abs(drawn - mean) < spread).all()
    if method == "residual":
        assert (drawn >= np.floor(mean)).all()


class ResampleTest(chex.TestCase):
    @chex.variants(with_jit=True)
    @parameterized.parameters("residual", "stratified")
    def test_leading_dims_and_any_sum(self, method):
        rng = np.random.default_rng(0)
        weights = (rng.random((3, 2, 40)) * (rng.random((3, 2, 40)) < 0.5)).astype(np.float32)
        weights[1, 1] = 0
        draw = self.variant(lambda k, w: resample(k, w, num=50, method=method))
        out = np.asarray(draw(jax.random.key(0), weights))
        assert out.shape == (3, 2, 50)
        assert out.dtype == np.int32
        assert (out[1, 1] == 0).all()
        chosen = np.take_along_axis(weights, out, -1)
        assert (np.delete(chosen.reshape(6, 50), 3, axis=0) > 0).all()
        np.testing.assert_array_equal(out, draw(jax.random.key(0), weights * 1024))


def test_systematic_counts_stay_within_one():
    weights = jnp.asarray(np.random.default_rng(3).dirichlet(np.full(300, 0.2), size=200), jnp.float32)
    draw = jax.jit(lambda k, w: counts(resample(k, w, num=1000), 300))
    mean = 1000 * np.asarray(weights, np.float64) / np.asarray(weights, np.float64).sum(-1, keepdims=True)
    assert (np.abs(np.asarray(draw(jax.random.key(0), weights)) - mean) < 1 + 2e-4).all()


def test_points_at_the_ends_and_zero_weights():
    weights = jnp.asarray([[0.0, 0.0, 0.2, 0.0, 0.7, 0.1, 0.0], [0.0] * 7, [0.0] * 6 + [3.0]], jnp.float32)
    points = jnp.broadcast_to(jnp.asarray([0.0, 0.19, 0.21, 0.95, 1 - 2.0**-24, 1.0], jnp.float32), (3, 6))
    expected = [[2, 2, 4, 5, 5, 5], [0] * 6, [6] * 6]
    np.testing.assert_array_equal(jax.jit(inverse_cdf)(weights, points), expected)


def test_a_zero_weight_is_never_chosen_however_sums_round():
    rng = np.random.default_rng(8)
    weights = (rng.random((4, 5000)) * (rng.random((4, 5000)) < 0.3)).astype(np.float32)
    # Points where the cumulative sum has its steps, as float32 rounds them.
    steps = np.cumsum(weights, -1)
    points = np.clip(np.concatenate([steps / steps[:, -1:], np.nextafter(steps / steps[:, -1:], 2)], -1), 0, 1)
    out = np.asarray(jax.jit(inverse_cdf)(weights, points))
    assert (np.take_along_axis(weights, out, -1) > 0).all()
    exact = np.array([np.searchsorted(s, p, "right") for s, p in zip(steps, points * steps[:, -1:], strict=True)])
    assert np.abs(out - exact).max() < 30  # Float32 sums of 5000 terms move a step by a few of them at most.


def test_counts_is_bincount():
    indices = np.random.default_rng(0).integers(0, 9, (3, 5, 40))
    expected = np.apply_along_axis(np.bincount, -1, indices, minlength=9)
    np.testing.assert_array_equal(counts(indices, 9), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "num must be at least 1, got 0"),
        ({"num": 3, "method": "bootstrap"}, "method must be one of .*got 'bootstrap'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        resample(jax.random.key(0), jnp.ones(3), **options)
