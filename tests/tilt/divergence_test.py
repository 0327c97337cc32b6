import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import Mesh, PartitionSpec
from scipy.special import softmax

from tiltjax.tilt.divergence import (
    best_of_n_kl_bound,
    candidates_needed,
    chi_squared,
    chi_squared_bound,
    soft_best_of_n_kl_bound,
    tilt_kl,
    tilted_reward,
    weights_kl,
)
from tiltjax.tilt.weights import tilt

RNG = np.random.default_rng(0)
REWARD = RNG.normal(size=(5, 16)).astype(np.float32)
WHERE = RNG.random((5, 16)) < 0.6
DIRTY = np.where(WHERE, REWARD, RNG.choice([np.nan, np.inf, -np.inf, 1e30], size=REWARD.shape)).astype(np.float32)
ESTIMATORS = {"kl": tilt_kl, "chi2": chi_squared, "reward": tilted_reward}
COMPILED = {name: jax.jit(estimator) for name, estimator in ESTIMATORS.items()}  # One program for every beta.


def reference(name, row, beta):
    """In long double, from the definition."""
    x = row.astype(np.longdouble)
    u = np.exp((x - x.max()) / beta)
    w = u / u.sum()
    N = len(row)
    safe = np.where(w > 0, w, 1)
    value = {"kl": (w * np.log(N * safe)).sum(), "chi2": N * (w * w).sum() - 1, "reward": (w * x).sum()}[name]
    return float(value)


class EstimatorsTest(chex.TestCase):
    @chex.variants(with_jit=True)
    @parameterized.parameters(*ESTIMATORS)
    def test_is_its_definition_in_relative_terms(self, name):
        estimate = self.variant(lambda r, beta: ESTIMATORS[name](r, beta=beta))
        for beta in (1e-3, 0.05, 1.0, 30.0, 1e4):
            out = estimate(jnp.asarray(REWARD), jnp.float32(beta))
            np.testing.assert_allclose(out, [reference(name, row, beta) for row in REWARD], rtol=3e-5)

    @chex.variants(with_jit=True)
    @parameterized.parameters(*ESTIMATORS)
    def test_masked_is_sliced(self, name):
        out = self.variant(lambda r, w: ESTIMATORS[name](r, beta=0.3, where=w))(jnp.asarray(DIRTY), jnp.asarray(WHERE))
        expected = [reference(name, r[w], 0.3) for r, w in zip(REWARD, WHERE, strict=True)]
        np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_candidates_over_eight_devices():
    spec, mesh = PartitionSpec(None, "n"), Mesh(np.array(jax.devices()), ("n",))

    def every(r, w, beta, axis_name=None):
        return [f(r, beta=beta, where=w, axis_name=axis_name) for f in ESTIMATORS.values()]

    mapped = functools.partial(every, axis_name="n")
    specs = (spec, spec, PartitionSpec())
    sharded = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))
    pmapped, whole = jax.pmap(mapped, axis_name="n", in_axes=(0, 0, None)), jax.jit(every)

    def split(x):
        return x.reshape(5, 8, 2).swapaxes(0, 1)

    for beta in np.float32([0.01, 0.3, 50.0]):
        expected = np.stack(whole(DIRTY, WHERE, beta))
        np.testing.assert_allclose(sharded(DIRTY, WHERE, beta), expected, rtol=1e-5)
        out = pmapped(split(DIRTY), split(WHERE), beta)
        np.testing.assert_allclose(out, np.tile(expected[:, None], (1, 8, 1)), rtol=1e-5)


def test_no_candidate_gives_zero_and_zero_gradient():
    nothing, bad = np.zeros((2, 4), bool), np.full((2, 4), np.nan, np.float32)

    def both(estimator, reward):
        return jax.value_and_grad(lambda r: estimator(r, beta=0.5, where=nothing).sum())(reward)

    for value, grad in jax.jit(lambda r: [both(f, r) for f in ESTIMATORS.values()])(bad):
        assert float(value) == 0
        np.testing.assert_array_equal(grad, np.zeros((2, 4)))


@functools.partial(jax.jit, static_argnums=0)
def gradient(name, row, beta):
    return jax.grad(lambda r: ESTIMATORS[name](r, beta=beta))(row)


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("beta", [0.02, 0.7, 1e4])
def test_gradients_are_those_of_the_definition(name, beta):
    close = REWARD[0].copy()
    close[close.argsort()[-3:-1]] = close.max() - np.float32([0.03, 0.01])
    row = close.astype(np.float64)
    grad = gradient(name, close, beta)
    step = 1e-4 * beta
    finite = [
        (reference(name, row + step * e, beta) - reference(name, row - step * e, beta)) / (2 * step) for e in np.eye(16)
    ]
    np.testing.assert_allclose(grad, finite, rtol=2e-3, atol=2e-5 * np.abs(finite).max())


@pytest.mark.parametrize("name", ["kl", "chi2"])
def test_small_divergences_keep_their_digits_next_to_large_rewards(name):
    reward = (1000 + 0.25 * np.arange(64)).astype(np.float32)
    for beta in (1e3, 1e5):
        out = COMPILED[name](reward, beta=beta)
        np.testing.assert_allclose(out, reference(name, reward, beta), rtol=1e-5)
    # One outlier among many: both ways of summing meet at the same value.
    row = np.append(np.zeros(10_000, np.float32), np.float32(1))
    for d in (0.01, 5.0, 29.9, 30.1, 60.0):
        np.testing.assert_allclose(
            COMPILED[name](row, beta=1 / d), reference(name, row, 1 / d), rtol=1e-4, err_msg=str(d)
        )


def test_limits_and_identities():
    reward, weights_kl_ = jnp.asarray(REWARD), jax.jit(weights_kl)
    tilt_kl, chi_squared, tilted_reward = COMPILED.values()
    np.testing.assert_allclose(tilt_kl(reward, beta=1e-4), np.full(5, np.log(16)), rtol=1e-6)
    np.testing.assert_allclose(chi_squared(reward, beta=1e-4), np.full(5, 15.0), rtol=1e-6)
    np.testing.assert_allclose(tilted_reward(reward, beta=1e-4), REWARD.max(-1), rtol=1e-6)
    np.testing.assert_allclose(tilted_reward(reward, beta=1e6), REWARD.mean(-1), atol=1e-5)
    tied = jnp.asarray([1.0, 1.0, 0.0, 0.0])
    assert float(tilt_kl(tied, beta=1e-3)) == pytest.approx(np.log(2), rel=1e-6)
    assert float(tilt_kl(jnp.ones(4), beta=1e-3)) == 0
    # N / (1 + chi2) is the effective sample size; the KL is that of the weights.
    t = jax.jit(tilt)(reward, beta=0.4)
    np.testing.assert_allclose(16 / (1 + chi_squared(reward, beta=0.4)), t.ess, rtol=1e-5)
    np.testing.assert_allclose(weights_kl_(t.weights), tilt_kl(reward, beta=0.4), rtol=1e-5)
    # beta log Z = E r - beta KL of the tilt (the Gibbs identity), on the candidates.
    gibbs = tilted_reward(reward, beta=0.4) - 0.4 * tilt_kl(reward, beta=0.4)
    np.testing.assert_allclose(gibbs, 0.4 * t.log_z, rtol=1e-5, atol=1e-6)


def test_weights_kl_of_any_weights():
    weights = RNG.dirichlet(np.full(7, 0.3), size=4).astype(np.float32)
    weights[0], weights[1] = np.eye(7)[2], 1 / 7
    exact = [sum(w * np.log(7 * w) for w in row if w > 0) for row in weights.astype(np.float64)]
    kl = jax.jit(weights_kl)
    np.testing.assert_allclose(kl(weights), exact, rtol=1e-5, atol=1e-7)
    padded = np.concatenate([weights, np.full((4, 2), np.nan)], -1, dtype=np.float32)
    where = np.broadcast_to(np.arange(9) < 7, (4, 9))
    np.testing.assert_allclose(kl(padded, where=where), exact, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(kl(padded, where=np.zeros((4, 9), bool)), 0)
    spec, mesh = PartitionSpec("n"), Mesh(np.array(jax.devices()), ("n",))
    mapped = functools.partial(weights_kl, axis_name="n")
    eight = jnp.asarray(softmax(REWARD[0]))
    out = jax.jit(jax.shard_map(mapped, mesh=mesh, in_specs=spec, out_specs=PartitionSpec()))(eight)
    np.testing.assert_allclose(out, kl(eight), rtol=1e-5)


def test_biases_are_the_documented_ones(every_draw, truth):
    beta = 0.5
    t = truth(beta)
    chi2, gap = t["chi2"], t["half_beta_gap"]
    expected = {
        "kl": (chi2 - 2 * (1 + chi2) * gap / beta) / 2,
        "chi2": 3 * chi2**2 - chi2 - 2 * t["m3"],
        "reward": -(1 + chi2) * gap,
    }
    exact = {"kl": t["kl"], "chi2": chi2, "reward": t["mean"]}
    with jax.enable_x64(True):
        for name, estimator in ESTIMATORS.items():
            scaled = []
            for N in (30, 60):
                reward, chance = every_draw(N)
                value = jax.jit(estimator)(jnp.asarray(reward), beta=beta)
                scaled.append(N * (chance @ np.asarray(value) - exact[name]))
            np.testing.assert_allclose(2 * scaled[1] - scaled[0], expected[name], rtol=0.02, err_msg=name)


def test_best_of_n_bound():
    n = jnp.asarray([1, 2, 4, 16, 64])
    expected = [0, 0.1931472, 0.6362944, 1.8350887, 3.1745081]
    np.testing.assert_allclose(best_of_n_kl_bound(n), expected, rtol=1e-6, atol=1e-7)
    assert float(best_of_n_kl_bound(10**6)) == pytest.approx(np.log(1e6) - 1 + 1e-6, rel=1e-6)


def test_soft_best_of_n_bound():
    for n, span, beta in ((1, 1.0, 1.0), (16, 1.0, 0.2), (1000, 4.0, 0.01), (64, 1.0, 1e3)):
        exact = np.log(n / (1 + (n - 1) * np.exp(-span / beta)))
        np.testing.assert_allclose(
            soft_best_of_n_kl_bound(n, reward_range=span, beta=beta), exact, rtol=1e-4, atol=1e-7
        )


def test_chi_squared_bound_is_attained_by_two_levels_and_by_no_other():
    for span, beta in ((1.0, 1.0), (1.0, 0.2), (4.0, 0.5)):
        a = span / beta
        # The worst two-point law puts 1 / (1 + e^a) on the upper level.
        p = 1 / (1 + np.exp(a))
        w = np.exp(a)
        worst = p * (1 - p) * (w - 1) ** 2 / (1 + p * (w - 1)) ** 2
        bound = float(chi_squared_bound(reward_range=span, beta=beta))
        np.testing.assert_allclose(bound, worst, rtol=1e-5)
        uniform = np.linspace(0, span, 20_001, dtype=np.float32)
        estimate = float(chi_squared(jnp.asarray(uniform), beta=beta))
        np.testing.assert_allclose(estimate, a / 2 / np.tanh(a / 2) - 1, rtol=2e-3)
        assert estimate < bound


def test_candidates_needed_is_the_smallest_that_the_bound_allows():
    for chi2, kl in ((0.0, 0.1), (0.4, 1.0), (3.992, 0.01), (29.58, 1e-4)):
        n = float(candidates_needed(chi2, kl=kl))
        assert n == int(n) >= 1
        assert np.log1p(chi2 / n) <= kl * (1 + 1e-5)
        assert n == 1 or np.log1p(chi2 / (n - 1)) > kl * (1 - 1e-5)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("inf")])
def test_bad_options_are_named(bad):
    calls = [functools.partial(f, jnp.zeros(3)) for f in ESTIMATORS.values()]
    calls += [functools.partial(soft_best_of_n_kl_bound, 4, reward_range=1.0)]
    calls += [functools.partial(chi_squared_bound, reward_range=1.0)]
    for call in calls:
        with pytest.raises(ValueError, match="beta must be a finite number above 0, got"):
            call(beta=bad)
    for bound in (best_of_n_kl_bound, functools.partial(soft_best_of_n_kl_bound, reward_range=1.0, beta=1.0)):
        with pytest.raises(ValueError, match="n must be a finite number above 0, got"):
            bound(bad)
    with pytest.raises(ValueError, match="kl must be a finite number above 0, got"):
        candidates_needed(1.0, kl=bad)
