import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from scipy import stats

from tiltjax.ops.schedule import linear_schedule
from tiltjax.samplers.best_of_n import soft_best_of_n
from tiltjax.samplers.guidance import (
    classifier_free_guidance,
    classifier_guidance,
    guidance_weight_for,
    guided_denoiser,
    soft_best_of_n_denoise,
    soft_best_of_n_step,
)

X = np.random.default_rng(0).normal(size=(5, 2))


def gaussian(variance):
    return lambda x, alpha_bar: jnp.sqrt(1 - alpha_bar) * x / (alpha_bar * variance + 1 - alpha_bar)


def log_odds(x, alpha_bar):
    """log p_t(c | x) up to a constant, p = N(0, 2), p(. | c) = N(0, 1), one dimension."""
    return -(1 - 1 / (1 + alpha_bar)) * jnp.square(x[..., 0]) / 2


class ConventionsTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    def test_w_is_one_less_than_scale(self):
        conditional, unconditional = X, X[::-1].copy()
        by_w = self.variant(lambda a, b: classifier_free_guidance(a, b, w=2.5))(conditional, unconditional)
        by_scale = self.variant(lambda a, b: classifier_free_guidance(a, b, scale=3.5))(conditional, unconditional)
        np.testing.assert_allclose(by_w, 3.5 * conditional - 2.5 * unconditional, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(by_w, by_scale)
        for w, expected in ((0.0, conditional), (-1.0, unconditional)):
            out = classifier_free_guidance(conditional, unconditional, w=w)
            np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True)
    def test_a_classifiers_gradient_is_the_same_guidance(self):
        a = 0.4
        unconditional, conditional = (gaussian(v)(X[:, :1], a) for v in (2.0, 1.0))
        gradient = jax.grad(lambda x: jnp.sum(log_odds(x, a)))(jnp.asarray(X[:, :1]))
        of = self.variant(lambda e, g, s: classifier_guidance(e, g, a, strength=s))
        expected = classifier_free_guidance(conditional, unconditional, scale=3.0)
        np.testing.assert_allclose(of(unconditional, gradient, 3.0), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(of(conditional, gradient, 2.0), expected, rtol=1e-4, atol=1e-6)
        guided = guided_denoiser(gaussian(1.0), gaussian(2.0), w=2.0)
        np.testing.assert_allclose(guided(X[:, :1], a), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"w": 1.0, "scale": 2.0}])
def test_exactly_one_convention(options):
    with pytest.raises(ValueError, match=r"exactly one of w and scale \(= 1 \+ w\) must be given, got w="):
        classifier_free_guidance(X, X, **options)
    with pytest.raises(ValueError, match="exactly one of w and scale"):
        guided_denoiser(gaussian(1.0), gaussian(2.0), **options)


def test_correction_of_finite_n():
    assert guidance_weight_for(3.0, 2) == 6.0
    assert guidance_weight_for(3.0, 10) * (1 - 1 / 10) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="num_candidates must be at least 2, got 1"):
        guidance_weight_for(3.0, 1)


def test_step_follows_the_exact_law_of_two_candidates():
    """P(x') = 2 q(x') E_y[w(x') / (w(x') + w(y))], by quadrature in float64."""
    mean, std, slope = 0.3, 0.7, 2.0
    grid = np.linspace(mean - 8 * std, mean + 8 * std, 801)
    q = stats.norm.pdf(grid, mean, std)
    q /= q.sum()
    law = 2 * q * ((1 / (1 + np.exp(slope * (grid[None] - grid[:, None])))) @ q)
    drawn = jax.jit(
        lambda key: soft_best_of_n_step(
            key, jnp.full((40_000, 1), mean), jnp.float32(std), lambda x: 4 * x[:, 0], num_candidates=2, beta=2.0
        )
    )(jax.random.key(0))
    assert stats.kstest(np.asarray(drawn)[:, 0], lambda x: np.interp(x, grid, law.cumsum())).pvalue > 1e-3
    assert stats.kstest(np.asarray(drawn)[:, 0], stats.norm(mean, std).cdf).pvalue < 1e-12


def test_step_keeps_what_the_librarys_soft_best_of_n_chooses():
    weigh = lambda x: x[..., 0] - x[..., 1]

    @jax.jit
    def both(key, mean):
        draw, choose = jax.random.split(key)
        noise = jnp.stack([jax.random.normal(jax.random.fold_in(draw, i), mean.shape) for i in range(3)], axis=1)
        candidates = mean[:, None] + 0.5 * noise
        index = soft_best_of_n(choose, weigh(candidates), beta=0.3)
        chosen = jnp.take_along_axis(candidates, index[:, None, None], axis=1)[:, 0]
        return chosen, soft_best_of_n_step(key, mean, jnp.float32(0.5), weigh, num_candidates=3, beta=0.3)

    chosen, out = both(jax.random.key(3), X.astype(np.float32))
    np.testing.assert_allclose(out, chosen, rtol=1e-6)


def test_dead_weights_leave_the_kernel_and_nan_shows():
    weights = {
        "dead": lambda x: jnp.full(len(x), -jnp.inf),
        "some": lambda x: jnp.where(x[:, 0] > 0, 0.0, -jnp.inf),
        "bad": lambda x: jnp.full(len(x), jnp.nan),
    }

    @jax.jit
    def steps(key):
        kernel = jnp.zeros((2000, 1)), jnp.float32(1.0)
        return {name: soft_best_of_n_step(key, *kernel, weigh, num_candidates=25) for name, weigh in weights.items()}

    out = {name: np.asarray(x)[:, 0] for name, x in steps(jax.random.key(0)).items()}
    assert stats.kstest(out["dead"], stats.norm.cdf).pvalue > 1e-3
    assert (out["some"] > 0).all()
    assert np.isnan(out["bad"]).all()


def test_candidates_over_eight_devices_are_those_of_one():
    mesh, whole = Mesh(np.array(jax.devices()), ("n",)), PartitionSpec()
    schedule = linear_schedule(6)
    x = jax.random.normal(jax.random.key(1), (12, 1))

    def run(key, x, axis_name=None):
        weigh = lambda x, a: 6 * log_odds(x, a)
        return soft_best_of_n_denoise(key, gaussian(2.0), x, schedule, weigh, num_candidates=16, axis_name=axis_name)

    over = jax.shard_map(lambda k, x: run(k, x, "n"), mesh=mesh, in_specs=(whole, whole), out_specs=whole)
    key = jax.random.key(0)
    np.testing.assert_allclose(jax.jit(over)(key, x), jax.jit(run)(key, x), rtol=1e-5, atol=1e-6)


def test_chain_ends_in_the_variance_of_weakened_guidance():
    """Exact laws at 50 steps of the linear schedule; the limits are 0.75 and 0.3875."""

    @jax.jit
    def run(key, exponent):
        start, key = jax.random.split(key)
        x, weigh = jax.random.normal(start, (3000, 1)), lambda x, a: exponent * log_odds(x, a)
        return soft_best_of_n_denoise(key, gaussian(2.0), x, linear_schedule(50), weigh, num_candidates=2)

    for exponent, variance in ((3.0, 0.775), (guidance_weight_for(3.0, 2), 0.438)):
        assert abs(float(jnp.var(run(jax.random.key(1), exponent))) / variance - 1) < 0.16


def test_few_steps_weigh_candidates_at_the_level_that_they_reach():
    """Four coarse steps by quadrature: 0.376, where weights of the level that a step leaves would give 0.565."""
    levels, exponent, draws = np.asarray(linear_schedule(4), float), 6.0, 20_000
    grid = np.linspace(-9, 9, 601)
    law = stats.norm.pdf(grid) / stats.norm.pdf(grid).sum()
    for before, after in itertools.pairwise(levels[::-1]):
        noise = np.sqrt(1 - before) * grid / (1 + before)
        clean = (grid - np.sqrt(1 - before) * noise) / np.sqrt(before)
        variance = (1 - after) / (1 - before) * (1 - before / after)
        mean = np.sqrt(after) * clean + np.sqrt(1 - after - variance) * noise
        if after == 1:
            break
        kernel = np.exp(-((grid - mean[:, None]) ** 2) / (2 * variance))
        kernel /= kernel.sum(1, keepdims=True)
        weight = -exponent * (1 - 1 / (1 + after)) * grid**2 / 2
        win = 1 / (1 + np.exp(weight - weight[:, None]))
        law = law @ (2 * kernel * (kernel @ win.T))

    @jax.jit
    def run(key):
        start, key = jax.random.split(key)
        x, weigh = jax.random.normal(start, (draws, 1)), lambda x, a: exponent * log_odds(x, a)
        return soft_best_of_n_denoise(key, gaussian(2.0), x, linear_schedule(4), weigh, num_candidates=2)

    expected = law @ mean**2 - (law @ mean) ** 2
    assert expected == pytest.approx(0.3755, abs=1e-3)
    assert float(jnp.var(run(jax.random.key(0)))) == pytest.approx(expected, rel=0.04)


def test_bad_options_are_named():
    mean = jnp.zeros((2, 1))
    with pytest.raises(ValueError, match="num_candidates must be at least 1, got 0"):
        soft_best_of_n_step(jax.random.key(0), mean, jnp.float32(1.0), lambda x: x[:, 0], num_candidates=0)
    with pytest.raises(ValueError, match="beta must be a finite number above 0"):
        soft_best_of_n_step(jax.random.key(0), mean, jnp.float32(1.0), lambda x: x[:, 0], num_candidates=2, beta=0.0)
    over = jax.vmap(
        lambda _: soft_best_of_n_step(
            jax.random.key(0), mean, jnp.float32(1.0), lambda x: x[:, 0], num_candidates=3, axis_name="n"
        ),
        axis_name="n",
    )
    with pytest.raises(ValueError, match="num_candidates must be a multiple of the 2 devices, got 3"):
        over(jnp.zeros(2))
