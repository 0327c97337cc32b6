"""Whole laws of reverse chains: what guidance, soft best-of-N and the tilt make of known mixtures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.exact import bandit, chain, gaussian
from tiltjax.ops.schedule import cosine_schedule, linear_schedule
from tiltjax.samplers.denoise import ddim
from tiltjax.samplers.guidance import guided_denoiser


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def normal(variance):
    return gaussian.mixture(np.ones(1), np.zeros((1, 1)), np.full((1, 1, 1), variance))


def log_odds(scale):
    def log_weight(x, a):
        law = [gaussian.log_prob(gaussian.noised(normal(v), a), x) for v in (1.0, 2.0)]
        return scale * (law[0] - law[1])

    return log_weight


def end_variance(scale, n, num_steps, points):
    """Of soft best-of-n with odds p(c | x')^scale, p = N(0, 2), p(. | c) = N(0, 1)."""
    schedule = linear_schedule(num_steps, first=2.0, last=14.0)
    kernel = chain.soft_best_of_n_kernel(chain.exact_kernel(normal(2.0)), log_odds(scale), n=n)
    start = chain.law_of(gaussian.noised(normal(2.0), schedule[-1]), points)
    return chain.variance(chain.run_chain(kernel, points, schedule, start), points)


@functools.partial(jax.jit, static_argnums=0)
def variances(num_steps, points):
    """Of infinitely many candidates, at scales 1 and 3."""
    return jax.vmap(lambda scale: end_variance(scale, None, num_steps, points))(jnp.array([1.0, 3.0]))


def test_infinitely_many_candidates_give_the_conditional_law_at_scale_one_and_tend_to_guidance():
    points = np.linspace(-9, 9, 150)
    (one, coarse), (also_one, fine) = (np.asarray(variances(k, points)) for k in (32, 64))
    np.testing.assert_allclose([one, also_one], 1, rtol=2e-6)
    assert 2 * fine - coarse == pytest.approx(0.3875, rel=4e-3)
    assert coarse > fine > 0.3875


def test_finitely_many_candidates_guide_as_one_minus_one_over_n():
    with jax.enable_x64(False):  # The quadrature over candidates is six times cheaper.
        points = np.linspace(-7, 7, 64, dtype=np.float32)
        run = jax.jit(end_variance, static_argnums=2)
        limit = lambda scale, n: (
            2 * float(run(scale, np.int32(n), 24, points)) - float(run(scale, np.int32(n), 12, points))
        )
        law = jax.jit(lambda scale: gaussian.guided_variance(2.0, 1.0, scale).sde)
        for n in (2, 4):
            assert limit(3.0, n) == pytest.approx(float(law((1 - 1 / n) * 3)), rel=0.04)


def test_one_small_step_moves_by_one_minus_one_over_n():
    std = 0.02
    points = np.linspace(-8 * std, 8 * std, 121)

    def base(points, before, after):
        return chain.gaussian_kernel(points, jnp.zeros(121), std)

    @jax.jit
    def moved(n):
        kernel = chain.soft_best_of_n_kernel(base, lambda x, a: 3 * x[:, 0], n=n)
        return (kernel(points, jnp.asarray(0.5), jnp.asarray(0.6)) @ points)[0] / (3 * std**2)

    for n in (2, 8):
        assert float(moved(np.int32(n))) == pytest.approx(1 - 1 / n, rel=2e-3)


def test_linear_variance_is_that_of_the_samplers_and_of_its_limits():
    x = np.random.default_rng(0).normal(size=(4000, 1))

    @jax.jit
    def run(x):
        guided = guided_denoiser(gaussian.denoiser(normal(1.0)), gaussian.denoiser(normal(2.0)), scale=3.0)
        both = jax.vmap(lambda schedule, eta: chain.linear_variance(guided, schedule, eta=eta), in_axes=(None, 0))
        coarse, fine = (both(linear_schedule(k), jnp.array([1.0, 0.0])) for k in (1000, 2000))
        schedule = cosine_schedule(40)
        drawn = ddim(jax.random.key(1), guided, x, schedule, eta=1.0)
        return 2 * fine - coarse, jnp.var(drawn), chain.linear_variance(guided, schedule)

    limits, drawn, exact = run(x)
    np.testing.assert_allclose(limits, [0.3875, 0.25], rtol=4e-3)
    assert float(drawn) == pytest.approx(float(exact), rel=0.1)


def test_on_a_mixture_only_the_soft_value_ends_in_the_tilt():
    scale, points, schedule = 4.0, np.linspace(-6, 6, 160), linear_schedule(40)
    m = gaussian.mixture(
        np.array([0.4, 0.35, 0.25]), np.array([[-1.0], [0.8], [2.5]]), np.full((3, 1, 1), 0.49), np.array([0, 1, 1])
    )
    tv = bandit.total_variation

    def odds(scale):
        return lambda x, a: scale * gaussian.log_class(gaussian.noised(m, a), x, 1)

    def soft(x, a):
        return gaussian.soft_value(m, x, a, lambda y: scale * gaussian.log_class(m, y, 1), beta=1.0)

    @jax.jit
    def laws():
        base, start = chain.law_of(m, points), chain.law_of(gaussian.noised(m, schedule[-1]), points)
        tilted = lambda law, weight, a: bandit.tilted(law, weight(points[:, None], a), beta=1.0)
        run = lambda weight, first: chain.run_chain(
            chain.soft_best_of_n_kernel(chain.exact_kernel(m), weight, n=None), points, schedule, first
        )
        guided = guided_denoiser(gaussian.class_denoiser(m, 1), gaussian.denoiser(m), scale=scale)
        target = tilted(base, odds(scale), 1.0)
        return {
            "soft value": tv(run(soft, tilted(start, soft, schedule[-1])), target),
            "class": tv(run(odds(scale), start), target),
            "flow": tv(chain.flow_law(guided, points, schedule, num_quantiles=1001), target),
            "guidance": tv(chain.run_chain(chain.guided_kernel(guided), points, schedule, start), target),
            "conditional": tv(
                run(odds(1.0), tilted(start, odds(1.0), schedule[-1])), chain.law_of(gaussian.conditioned(m, 1), points)
            ),
            "inverse": tilted(base, odds(1.0), 1.0) @ jnp.exp(-odds(1.0)(points[:, None], 1.0)),
        }

    found = {name: float(value) for name, value in laws().items()}
    assert found["soft value"] < 1e-5
    assert found["conditional"] < 1e-5
    assert found["inverse"] == pytest.approx(1 / 0.6, rel=1e-5)
    assert found["class"] == pytest.approx(0.23, abs=0.02)
    assert found["guidance"] == pytest.approx(0.24, abs=0.03)
    assert found["flow"] == pytest.approx(0.47, abs=0.03)


def test_bad_n_is_named():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        chain.soft_best_of_n_kernel(chain.exact_kernel(normal(1.0)), log_odds(1.0), n=0)
