import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtri

from tiltjax.tilt.tails import pareto_k, pareto_k_limit, pareto_smooth

# Values of ArviZ 0.23.4's psislw in float64: k, effective sample size, largest and third largest log-weight.
ARVIZ = {
    ("normal", 25): (0.5302029682, 7.3597075602, -1.2245201950, -2.3088588102),
    ("exponential", 25): (0.6306057312, 14.2980411196, -1.7110997391, -2.6217152053),
    ("uniform", 25): (0.2150709689, 19.2645200757, -2.4433065828, -2.6045467647),
    ("wide", 25): (5.6407171602, 1.0043241650, -0.0021594949, -9.1007645756),
    ("normal", 64): (0.5016119205, 13.8084488716, -1.6125237125, -2.5845183617),
    ("exponential", 64): (0.5480513384, 22.6824131085, -1.9000844802, -2.8801231305),
    ("uniform", 64): (-0.1597185833, 48.5959363918, -3.3555516925, -3.3555516925),
    ("wide", 64): (9.5069864971, 1.0000586896, -0.0000293444, -15.3009340016),
    ("normal", 256): (0.4541845712, 48.1622739353, -2.4936653384, -3.1766847989),
    ("exponential", 256): (0.7366363204, 38.0816607316, -2.0704594131, -3.2634825113),
    ("uniform", 256): (-0.6035159368, 193.8609272684, -4.7158083547, -4.7158083547),
    ("wide", 256): (13.3316369443, 1.0000008724, -0.0000004362, -21.4564423692),
    ("normal", 4000): (0.4354114628, 511.4064324686, -4.0441189440, -4.5504487656),
    ("exponential", 4000): (0.7396899415, 225.8591639929, -3.1607689998, -3.9780185008),
    ("uniform", 4000): (-0.8761898244, 3045.9068496996, -7.4559196887, -7.4559196887),
    ("wide", 4000): (12.1488793394, 1.0000036809, -0.0000018404, -19.4135139703),
}

smooth, tail_shape = jax.jit(pareto_smooth), jax.jit(pareto_k)  # One program for every shape.


def golden(N):
    """Equidistributed in (0, 1), in no order."""
    return np.modf(np.arange(1, N + 1) * 0.6180339887498949)[0]


def sample(name, N):
    u = golden(N)
    laws = {"normal": 1.5 * ndtri(u), "exponential": -0.8 * np.log(u), "uniform": 2 * u, "wide": 40 * ndtri(u)}
    return laws[name]


@pytest.mark.parametrize(
    ("N", "wide", "rtol"),
    [(25, True, 1e-9), (64, True, 1e-9), (256, True, 1e-9), (4000, True, 1e-9), (64, False, 2e-4), (4000, False, 2e-4)],
)
def test_agrees_with_arviz(N, wide, rtol):
    names = ["normal", "exponential", "uniform", "wide"]
    with jax.enable_x64(wide):
        x = np.stack([sample(name, N) for name in names])
        out = smooth(jnp.asarray(x))
        rank = np.argsort(x, -1)
        largest, third = (np.take_along_axis(np.asarray(out.log_weights), rank[:, i, None], -1)[:, 0] for i in (-1, -3))
        ess = 1 / np.exp(2 * np.asarray(out.log_weights, np.float64)).sum(-1)
        expected = np.array([ARVIZ[name, N] for name in names])
        np.testing.assert_allclose(np.stack([out.k, ess], -1), expected[:, :2], rtol=rtol, atol=1e-9)
        np.testing.assert_allclose(np.stack([largest, third], -1), expected[:, 2:], rtol=rtol, atol=2e-6)


def test_finds_the_shape_of_a_pareto_law():
    # Exact quantiles of a generalised Pareto law, so no sampling noise: 3 sqrt N = 949 of them are the tail.
    shape = np.array([-0.5, 0.3, 0.5, 0.8, 1.5])
    p = (np.arange(100_000) + 0.5) / 100_000
    weights = 1 + np.expm1(-shape[:, None] * np.log1p(-p)) / shape[:, None]
    k = tail_shape(jnp.asarray(np.log(weights), jnp.float32))
    # The prior draws 949 tail points towards 1/2 by 10 / 959 of the distance.
    np.testing.assert_allclose(k, shape, atol=0.05)


def test_k_does_not_depend_on_scale_and_grows_with_one_over_beta():
    x = jnp.asarray(sample("normal", 256), jnp.float32)
    np.testing.assert_allclose(tail_shape(x + 50), tail_shape(x), atol=2e-4)
    ks = [float(tail_shape(x / beta)) for beta in (4.0, 2.0, 1.0, 0.5)]
    assert ks == sorted(ks)
    assert ks[0] < 0.5
    assert ks[-1] > 0.7


class ParetoTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_rows_are_independent_and_normalised(self):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 60)), jnp.float32)
        out = self.variant(pareto_smooth)(x)
        np.testing.assert_allclose(jnp.exp(out.log_weights).sum(-1), np.ones(3), rtol=1e-5)
        alone = jax.jit(jax.vmap(pareto_smooth))(x)
        chex.assert_trees_all_close((out.log_weights, out.k), (alone.log_weights, alone.k), rtol=1e-4)
        chex.assert_trees_all_close(tail_shape(x), out.k, rtol=1e-4)
        deep = smooth(x[None])
        chex.assert_trees_all_close((deep.log_weights[0], deep.k[0]), (out.log_weights, out.k), rtol=1e-4)

    @chex.variants(with_jit=True)
    def test_masked_is_sliced(self):
        rng = np.random.default_rng(1)
        x = (2 * rng.normal(size=(4, 90))).astype(np.float32)
        where = rng.random((4, 90)) < np.array([0.9, 0.5, 0.3, 0.1])[:, None]
        dirty = np.where(where, x, rng.choice([np.nan, np.inf, -np.inf, 1e30], size=x.shape)).astype(np.float32)
        out = self.variant(lambda x, w: smooth(x, where=w))(jnp.asarray(dirty), jnp.asarray(where))
        for row in range(4):
            alone = smooth(jnp.asarray(x[row][where[row]]))
            np.testing.assert_allclose(out.k[row], alone.k, rtol=1e-4)
            np.testing.assert_allclose(np.asarray(out.log_weights)[row][where[row]], alone.log_weights, rtol=1e-4)
            np.testing.assert_array_equal(np.asarray(out.log_weights)[row][~where[row]], -np.inf)
        assert np.isfinite(out.k[0])
        assert np.isinf(out.k[3])


@pytest.mark.parametrize("N", [1, 2, 20])
def test_too_few_candidates_have_no_tail(N):
    x = jnp.asarray(sample("normal", N), jnp.float32)
    out = smooth(x)
    assert float(out.k) == np.inf
    np.testing.assert_allclose(jnp.exp(out.log_weights), jax.nn.softmax(x), rtol=1e-5)


def test_ties_and_impossible_weights():
    assert float(tail_shape(jnp.zeros(100))) == np.inf
    two_levels = jnp.where(jnp.arange(100) < 30, 1.0, 0.0)
    out = smooth(two_levels)
    assert float(out.k) == np.inf
    np.testing.assert_allclose(jnp.exp(out.log_weights), jax.nn.softmax(two_levels), rtol=1e-5)
    x = jnp.asarray(np.append(sample("normal", 64), np.full(36, -np.inf)), jnp.float32)
    out = smooth(x)
    assert np.isfinite(out.k)
    np.testing.assert_array_equal(out.log_weights[64:], np.full(36, -np.inf))
    np.testing.assert_allclose(jnp.exp(out.log_weights).sum(), 1, rtol=1e-5)


@pytest.mark.parametrize("N", [4, 64])
def test_no_candidate(N):
    out = smooth(jnp.full((2, N), jnp.nan), where=jnp.zeros((2, N), bool))
    np.testing.assert_array_equal(out.log_weights, np.full((2, N), -np.inf))
    np.testing.assert_array_equal(out.k, np.full(2, np.inf))


def test_spreads_beyond_the_float_range_stay_finite_and_alarming():
    for scale in (1e2, 1e3, 1e4):
        out = smooth(jnp.asarray(scale * sample("normal", 256), jnp.float32))
        assert np.isfinite(np.asarray(out.log_weights)).all()
        assert 0.7 < float(out.k) < np.inf


def test_smoothing_keeps_the_order_and_lowers_nothing_below_the_cutoff():
    x = jnp.asarray(sample("exponential", 256), jnp.float32)
    out = smooth(x)
    order = np.argsort(x)
    assert (np.diff(np.asarray(out.log_weights)[order]) >= 0).all()
    body = order[: 256 - 48]  # 3 sqrt 256 = 48 are the tail
    shift = np.asarray(out.log_weights - x)[body]
    np.testing.assert_allclose(shift, np.full(208, shift[0]), rtol=1e-5)


def test_carries_no_gradient():
    x = jnp.asarray(sample("normal", 64), jnp.float32)
    np.testing.assert_array_equal(jax.grad(lambda x: smooth(x).log_weights.sum())(x), np.zeros(64))


def test_the_limit_of_a_small_sample():
    np.testing.assert_allclose(
        pareto_k_limit(jnp.asarray([10, 100, 1000, 2200, 10**6])), [0, 0.5, 2 / 3, 0.7, 0.7], atol=1e-3
    )
