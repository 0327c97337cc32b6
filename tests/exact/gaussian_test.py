import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from tiltjax.exact import gaussian
from tiltjax.ops.schedule import to_clean

RNG = np.random.default_rng(0)
WEIGHT = np.array([0.2, 0.5, 0.3])
MEAN = RNG.normal(size=(3, 2))
ROOT = RNG.normal(size=(3, 2, 2))
COVARIANCE = ROOT @ np.swapaxes(ROOT, -1, -2) + 0.3 * np.eye(2)
LABEL = np.array([0, 1, 1])
X = RNG.normal(size=(4, 2)) * 2
ALPHA_BAR = np.array([0.05, 0.4, 0.7, 0.95])


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def plane(float64):
    return gaussian.mixture(WEIGHT, MEAN, COVARIANCE, LABEL)


@pytest.fixture(scope="module")
def line(float64):
    mean, std = np.array([[-1.0], [0.8], [2.5]]), np.array([0.7, 0.5, 0.9])
    return gaussian.mixture(WEIGHT, mean, np.square(std)[:, None, None], LABEL)


def joint(x, alpha_bar, noise=None):
    """weight N(x) of every component by SciPy, under either noise."""
    a, s = (alpha_bar, 1 - alpha_bar) if noise is None else (1.0, noise)
    laws = [
        stats.multivariate_normal(np.sqrt(a) * m, a * c + s * np.eye(2)) for m, c in zip(MEAN, COVARIANCE, strict=True)
    ]
    return np.array([w * law.pdf(x) for w, law in zip(WEIGHT, laws, strict=True)])


def test_densities_scores_and_classes_are_scipys(plane):
    @jax.jit
    def everything(x, a):
        m = gaussian.noised(plane, a)
        gradient = jax.grad(lambda x: jnp.sum(gaussian.log_prob(m, x)))(x)
        given = gaussian.log_prob(gaussian.noised(gaussian.conditioned(plane, 1), a), x)
        blurred = gaussian.log_prob(gaussian.blurred(plane, (1 - a) / a), x / jnp.sqrt(a)[:, None])
        return gaussian.log_prob(m, x), gradient, gaussian.score(m, x), gaussian.log_class(m, x, 1), given, blurred

    logp, gradient, score, log_class, given, blurred = everything(X, ALPHA_BAR)
    for i, (x, a) in enumerate(zip(X, ALPHA_BAR, strict=True)):
        p = joint(x, a)
        np.testing.assert_allclose(logp[i], np.log(p.sum()), rtol=1e-10)
        np.testing.assert_allclose(log_class[i], np.log(p[1:].sum() / p.sum()), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(given[i], np.log(p[1:].sum() / WEIGHT[1:].sum()), rtol=1e-10)
        # Variance exploding: the same law on another scale, two dimensions.
        np.testing.assert_allclose(blurred[i], np.log(joint(x / np.sqrt(a), 1.0, (1 - a) / a).sum()), rtol=1e-10)
        np.testing.assert_allclose(blurred[i], logp[i] + np.log(a), rtol=1e-10)
    np.testing.assert_allclose(score, gradient, rtol=1e-9)


def test_denoiser_is_the_posterior_mean(plane):
    @jax.jit
    def both(x, a):
        law = gaussian.posterior(plane, x, a)
        mean = jnp.sum(jnp.exp(law.log_weight)[..., None] * law.mean, axis=-2)
        given = to_clean(x, gaussian.class_denoiser(plane, 0)(x, 0.4), 0.4)
        return to_clean(x, gaussian.denoiser(plane)(x, a), a), mean, gaussian.denoiser(plane)(x, a[1]), given

    clean, mean, scalar, given = both(X, ALPHA_BAR)
    np.testing.assert_allclose(clean, mean, rtol=1e-9)
    np.testing.assert_allclose(scalar[1], (X[1] - np.sqrt(0.4) * clean[1]) / np.sqrt(0.6), rtol=1e-9)
    # The class is one Gaussian: x_0 by linear regression.
    gain = np.sqrt(0.4) * COVARIANCE[0] @ np.linalg.inv(0.4 * COVARIANCE[0] + 0.6 * np.eye(2))
    np.testing.assert_allclose(given, MEAN[0] + (X - np.sqrt(0.4) * MEAN[0]) @ gain.T, rtol=1e-9, atol=1e-12)


def test_posterior_is_bayes_rule(plane):
    """Its density at any x_0 is p(x_0) N(x; x_0) / p(x)."""
    a, x, clean = 0.6, X[0], X[1:]
    found = jax.jit(lambda: gaussian.log_prob(gaussian.posterior(plane, x, a), clean))()
    prior = np.log([joint(c, 1.0).sum() for c in clean])
    likelihood = [stats.multivariate_normal(np.sqrt(a) * c, (1 - a) * np.eye(2)).logpdf(x) for c in clean]
    np.testing.assert_allclose(found, prior + likelihood - np.log(joint(x, a).sum()), rtol=1e-9)


def test_soft_values_are_integrals(line):
    """E[exp(r(x_0) / beta) | x] by adaptive quadrature: linear, quadratic, and a power of the class's probability."""
    beta, a = 0.8, 0.3
    rewards = {
        "linear": lambda x: 1.5 * x[..., 0],
        "quadratic": lambda x: -0.7 * jnp.square(x[..., 0] - 1),
        "class": lambda x: 4 * gaussian.log_class(line, x, 1),
    }
    x = np.array([[-1.5], [0.3], [2.0]])
    linear = jax.jit(lambda: gaussian.linear_soft_value(line, x, a, np.array([1.5]), beta=beta))()
    found = jax.jit(
        lambda: {name: gaussian.soft_value(line, x, a, reward, beta=beta) for name, reward in rewards.items()}
    )()
    grid = np.linspace(-8, 10, 6001)
    for name, reward in rewards.items():
        weight = np.exp(np.asarray(reward(grid[:, None])) / beta)
        prior = sum(
            w * stats.norm.pdf(grid, m, s) for w, m, s in zip(WEIGHT, [-1.0, 0.8, 2.5], [0.7, 0.5, 0.9], strict=True)
        )
        for i in range(3):
            seen = prior * stats.norm.pdf(x[i], np.sqrt(a) * grid, np.sqrt(1 - a))
            expected = beta * np.log(integrate.simpson(weight * seen, x=grid) / integrate.simpson(seen, x=grid))
            np.testing.assert_allclose(found[name][i], expected, rtol=3e-5, err_msg=name)
    np.testing.assert_allclose(found["linear"], linear, rtol=1e-9)


def test_a_linear_reward_adds_its_slope_to_the_score():
    """p = N(0, 1), r = a x, beta = 1: the tilted score is -x + a sqrt(alpha_bar)."""
    m = gaussian.mixture(np.ones(1), np.zeros((1, 2)), np.eye(2)[None])
    slope = np.array([0.5, -2.0])
    value = lambda x: jnp.sum(gaussian.linear_soft_value(m, x, 0.49, slope, beta=1.0))
    gradient = jax.jit(jax.grad(value))(jnp.asarray(X))
    np.testing.assert_allclose(gradient, np.broadcast_to(0.7 * slope, X.shape), rtol=1e-10)


def test_draws_have_the_moments_of_the_mixture(plane):
    x, label = jax.jit(lambda key: gaussian.sample(key, plane, 20_000))(jax.random.key(0))
    mean = WEIGHT @ MEAN
    second = np.einsum("m,mij->ij", WEIGHT, COVARIANCE + MEAN[:, :, None] * MEAN[:, None])
    np.testing.assert_allclose(x.mean(0), mean, atol=0.06)
    np.testing.assert_allclose(np.cov(x.T), second - np.outer(mean, mean), rtol=0.06, atol=0.06)
    assert abs(float(label.mean()) - 0.8) < 0.012


def test_where_guidance_ends():
    scales = np.array([0.0, 0.5, 1.0, 2.0, 3.0])
    found = gaussian.guided_variance(2.0, 1.0, scales)
    np.testing.assert_allclose(found.ode, 2.0 ** (1 - scales), rtol=1e-12)
    np.testing.assert_allclose(found.tilt, 2 / (scales + 1), rtol=1e-12)
    np.testing.assert_allclose(np.asarray(found.sde)[[0, 2, 3, 4]], [2, 1, (2 - 0.25) / 3, 0.3875], rtol=1e-12)
    # Any variances, by solving the equations of the variances backwards in sigma^2.
    v, u, g = 1.7, 0.6, 2.5

    def slope(s, y):
        pull = (1 - g) / (v + s) + g / (u + s)
        return [2 * pull * y[0] - 1, pull * y[1]]

    end = integrate.solve_ivp(slope, (1e7, 0), [1e7, 1e7], rtol=1e-10, atol=1e-12, method="LSODA").y[:, -1]
    found = gaussian.guided_variance(v, u, g)
    chex.assert_trees_all_close((float(found.sde), float(found.ode)), tuple(end), rtol=1e-4)
    half = gaussian.guided_variance(v, u, 0.5)
    near = gaussian.guided_variance(v, u, 0.5 + 1e-7)
    np.testing.assert_allclose(half.sde, near.sde, rtol=1e-6)
