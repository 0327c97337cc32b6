import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from absl.testing import parameterized
from jax.sharding import Mesh, PartitionSpec

from tiltjax.ops import logspace
from tiltjax.ops.logspace import empty, exp_remainder, exp_sum, logmeanexp, logsumexp, merge

RNG = np.random.default_rng(0)
X = (3 * RNG.normal(size=(5, 16))).astype(np.float32)
WHERE = RNG.random((5, 16)) < 0.6
DIRTY = np.where(WHERE, X, RNG.choice([np.nan, np.inf, -np.inf, 1e30], size=X.shape)).astype(np.float32)


def fields(total):
    return total.log_sum, total.log_mean, total.ess, total.count


class LogSumExpTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    @parameterized.parameters(0.0, 1e4, -1e4, 3e38, -3e38)
    def test_is_scipys(self, offset):
        x = (X + np.float32(offset)).astype(np.float32)
        expected = scipy.special.logsumexp(x.astype(np.float64), axis=-1)
        np.testing.assert_allclose(self.variant(logsumexp)(jnp.asarray(x)), expected, rtol=3e-7)
        np.testing.assert_allclose(self.variant(logmeanexp)(jnp.asarray(x)), expected - np.log(16), rtol=1e-6)

    @chex.variants(with_jit=True)
    def test_masked_is_sliced_whatever_the_mask_hides(self):
        out = self.variant(lambda x, w: logsumexp(x, where=w))(jnp.asarray(DIRTY), jnp.asarray(WHERE))
        mean = self.variant(lambda x, w: logmeanexp(x, where=w))(jnp.asarray(DIRTY), jnp.asarray(WHERE))
        expected = [scipy.special.logsumexp(x[w].astype(np.float64)) for x, w in zip(X, WHERE, strict=True)]
        np.testing.assert_allclose(out, expected, rtol=1e-6)
        np.testing.assert_allclose(mean, expected - np.log(WHERE.sum(-1)), rtol=1e-6)


def test_minus_infinity_is_a_term_of_no_mass():
    x = np.float32([[-np.inf, 2.0, -np.inf], [-np.inf, -np.inf, -np.inf]])
    run = lambda x: (logsumexp(x), logmeanexp(x), exp_sum(x)[1].ess, jax.grad(lambda x: logsumexp(x)[0])(x))
    total, mean, ess, grad = jax.jit(run)(x)
    np.testing.assert_allclose(total, [2.0, -np.inf])
    np.testing.assert_allclose(mean, [2.0 - np.log(3), -np.inf], rtol=1e-6)
    np.testing.assert_allclose(ess, [1.0, 0.0])
    np.testing.assert_allclose(grad, [[0, 1, 0], [0, 0, 0]])


def test_no_term_at_all():
    nothing = jnp.zeros((2, 3), bool)
    bad = jnp.full((2, 3), jnp.nan)
    total = lambda x: logmeanexp(x, where=nothing).sum() + exp_sum(x, where=nothing)[1].ess.sum()
    run = lambda x: (logsumexp(x, where=nothing), logmeanexp(x, where=nothing), jax.grad(total)(x))
    found, mean, grad = jax.jit(run)(bad)
    np.testing.assert_array_equal(found, np.full(2, -np.inf))
    np.testing.assert_array_equal(mean, np.zeros(2))
    np.testing.assert_array_equal(grad, np.zeros((2, 3)))


def test_a_real_nan_is_not_hidden():
    x = jnp.array([1.0, jnp.nan, 500.0])
    for where in (None, jnp.ones(3, bool)):
        total = exp_sum(x, where=where)[1]
        assert np.isnan([float(v) for v in fields(total)[:3]]).all()
        assert np.isnan(float(merge(total, empty()).log_sum))
        assert np.isnan(float(merge(exp_sum(x[:1])[1], total).log_mean))


@pytest.mark.parametrize("beta", [1e-5, 0.5, 1e5])
def test_beta_divides_after_the_shift(beta):
    x = X + np.float32(1000)
    weights, total = exp_sum(jnp.asarray(x), beta=beta)
    exact = x.astype(np.float64) / beta
    np.testing.assert_allclose(weights, np.exp(exact - exact.max(-1, keepdims=True)), rtol=1e-4, atol=1e-30)
    np.testing.assert_allclose(total.log_sum, scipy.special.logsumexp(exact, -1), rtol=1e-6)
    np.testing.assert_allclose(total.ess, 1 / np.square(scipy.special.softmax(exact, -1)).sum(-1), rtol=1e-4)


def test_gradients_are_softmax_and_tilted_mean():
    grad = jax.jit(jax.grad(lambda x: logsumexp(x, where=WHERE).sum()))(DIRTY)
    expected = scipy.special.softmax(np.where(WHERE, X, -np.inf), axis=-1)
    np.testing.assert_allclose(grad, expected, rtol=1e-5, atol=1e-7)
    # d/dbeta log sum exp(x / beta) = -E[x] / beta^2, through the shift too.
    slope = jax.jit(jax.grad(lambda b: exp_sum(jnp.asarray(X[0]), beta=b)[1].log_sum))(2.0)
    np.testing.assert_allclose(slope, -(scipy.special.softmax(X[0] / 2) * X[0]).sum() / 4, rtol=1e-5)


def test_merge_is_a_commutative_monoid():
    cuts = np.split(np.arange(16), [1, 4, 11])
    scale = np.array([1.0, 1e3, 1e-3, 1.0, 30.0], np.float32)[:, None]
    x = X * scale
    merge, total_of = jax.jit(logspace.merge), jax.jit(lambda x, w: exp_sum(x, where=w)[1])
    parts = [total_of(x[:, c], WHERE[:, c]) for c in cuts]
    whole = fields(total_of(x, WHERE))
    for order in itertools.permutations(parts):
        left = functools.reduce(merge, order)
        right = functools.reduce(lambda a, b: merge(b, a), order[::-1])
        balanced = merge(merge(order[0], order[1]), merge(order[2], order[3]))
        for total in (left, right, balanced):
            chex.assert_trees_all_close(fields(total), whole, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(merge(empty((5,)), parts[0]), parts[0])
    chex.assert_trees_all_equal(merge(parts[0], empty((5,))), parts[0])
    chex.assert_trees_all_equal(fields(merge(empty(), empty())), fields(empty()))
    assert [float(v) for v in fields(empty())] == [-np.inf, 0, 0, 0]


def test_empty_is_a_scan_carry_that_gradients_pass_through():
    def streamed(x):
        def step(carry, part):
            return merge(carry, exp_sum(part, beta=0.7)[1]), None

        return jax.lax.scan(step, empty(), x.reshape(4, 4))[0].log_mean

    x = jnp.asarray(X[0])
    value, grad = jax.jit(jax.value_and_grad(streamed))(x)
    np.testing.assert_allclose(value, scipy.special.logsumexp(X[0] / 0.7) - np.log(16), rtol=1e-6)
    np.testing.assert_allclose(grad, scipy.special.softmax(X[0] / 0.7) / 0.7, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_terms_over_eight_devices(masked):
    def kernel(x, w, axis_name=None):
        weights, total = exp_sum(x, beta=0.3, where=w if masked else None, axis_name=axis_name)
        return weights, fields(total)

    x = DIRTY if masked else X
    expected = kernel(jnp.asarray(x), jnp.asarray(WHERE))
    spec, whole = PartitionSpec(None, "n"), PartitionSpec()
    mesh = Mesh(np.array(jax.devices()), ("n",))
    mapped = functools.partial(kernel, axis_name="n")
    sharded = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=(spec, spec), out_specs=(spec, whole)))
    chex.assert_trees_all_close(sharded(x, WHERE), expected, rtol=1e-5)

    def split(x):
        return np.asarray(x).reshape(5, 8, 2).swapaxes(0, 1)

    weights, totals = jax.pmap(mapped, axis_name="n")(split(x), split(WHERE))
    np.testing.assert_allclose(weights, split(expected[0]), rtol=1e-5)
    chex.assert_trees_all_close(totals, jax.tree.map(lambda v: jnp.tile(v, (8, 1)), expected[1]), rtol=1e-5)


def test_half_precision_sums_in_float32():
    x = jnp.zeros(4096, jnp.bfloat16)
    assert float(logsumexp(x)) == pytest.approx(np.log(4096), rel=1e-6)


@pytest.mark.parametrize(("wide", "rtol"), [(False, 5e-7), (True, 2e-15)])
def test_exp_remainder_keeps_its_digits(wide, rtol):
    with jax.enable_x64(wide):
        x = np.concatenate([s * np.logspace(-9, 1.5, 60) for s in (-1, 1)]).astype(np.float64 if wide else np.float32)
        # The defining series for small x, long double elsewhere.
        long = x.astype(np.longdouble)
        series = sum(long**k / scipy.special.factorial(k) for k in range(2, 30))
        expected = np.where(np.abs(x) < 1, series, np.expm1(long) - long).astype(np.float64)
        ends = [0.0, np.inf, -np.inf, np.nan]
        run = jax.jit(lambda x: (exp_remainder(x), jax.vmap(jax.grad(exp_remainder))(x)))
        found, grad = (np.asarray(y) for y in run(np.concatenate([x, ends], dtype=x.dtype)))
        np.testing.assert_allclose(found[:-4], expected, rtol=rtol)
        np.testing.assert_array_equal(found[-4:], [0.0, np.inf, np.inf, np.nan])
        grad = grad[:-4]
        np.testing.assert_allclose(grad, np.expm1(x.astype(np.float64)), rtol=4 * rtol)
