"""Held to scipy's optimiser, enumeration over pairs in NumPy, DPO token by token, and the asymptotic law."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_expit, softmax

from tiltjax.exact import bandit, gap, tree

RNG = np.random.default_rng(5)
ONES = {H: np.array([bin(i).count("1") for i in range(2**H)]) for H in (1, 3, 4)}

fit = jax.jit(gap.fit_linear_reward)
law_of = jax.jit(gap.statistical_law, static_argnames="beta")
level_features = jax.jit(gap.level_features, static_argnums=0)
strongly_connected = jax.jit(tree.strongly_connected)
excess = jax.jit(gap.excess_nll)
sample_wins = jax.jit(tree.sample_wins, static_argnames="n")
WORLD = (np.ones(2) / 2, np.zeros(2), np.eye(2))


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def world(H):
    """A reference that is not flat, and a reward of the number of ones."""
    ref = softmax(0.3 * RNG.normal(size=2**H))
    return ref, -np.abs(ONES[H] - 2 * H / 3), np.eye(H + 1)[ONES[H]]


def repeated(H, *, n, beta, features, repeats):
    ref, reward, _ = world(H)

    @jax.jit
    def run(key):
        sample = lambda key: gap.sample_gap(key, ref, reward, features, n=n, beta=beta)
        return jax.vmap(sample)(jax.random.split(key, repeats))

    return jax.tree.map(np.asarray, run(jax.random.key(1))), ref, reward


def test_four_tokens_cost_the_verifier_its_dimension_and_the_generator_its_own():
    n, beta, repeats = 4000, 1.0, 20
    features = world(4)[-1]
    np.testing.assert_array_equal(level_features(4), features)
    seen, ref, reward = repeated(4, n=n, beta=beta, features=features, repeats=repeats)
    verifier, generator = (law_of(ref, reward, x, beta=beta) for x in (features, np.eye(16)))
    np.testing.assert_allclose([verifier.dimension, generator.dimension], [4, 15], rtol=1e-9)
    np.testing.assert_allclose([verifier.excess_nll, generator.excess_nll], [2, 7.5], rtol=1e-9)
    # Twice n times the excess loss is chi-squared with as many degrees of freedom as dimensions.
    for law, found in ((verifier, seen.global_excess), (generator, seen.local_excess)):
        error = np.sqrt(law.dimension / 2 / repeats)
        assert abs(n * found.mean() - law.dimension / 2) < 4 * error
    np.testing.assert_allclose(n * seen.online_kl.mean(), verifier.kl, rtol=0.5)
    np.testing.assert_allclose(n * seen.offline_kl.mean(), generator.kl, rtol=0.2)
    assert seen.exists.all()
    assert (seen.offline_kl > 2 * seen.online_kl).all()
    assert generator.kl > 4 * verifier.kl


@pytest.mark.parametrize("H", [1, 3])
def test_classes_that_are_the_same_end_the_same(H):
    # One token: a single number, the reward of token 1 or a policy's log-odds. More: a lookup table, in any basis.
    features = np.array([[0.0], [1.0]]) if H == 1 else RNG.normal(size=(8, 8))
    seen, *_ = repeated(H, n=40 if H == 1 else 300, beta=0.5, features=features, repeats=4)
    assert seen.exists.all()
    np.testing.assert_allclose(seen.online_kl, seen.offline_kl, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(seen.global_excess, seen.local_excess, rtol=1e-9, atol=1e-15)
    assert (seen.offline_kl > 1e-8).all()


def test_law_is_the_enumerated_one():
    ref, reward, features = world(3)
    beta, K = 0.7, 8
    r, p = reward, ref
    for phi in (features, np.eye(K)):
        information = np.zeros((phi.shape[1],) * 2)
        for i in range(K):
            for j in range(K):
                x = phi[i] - phi[j]
                information += p[i] * p[j] * expit(r[i] - r[j]) * expit(r[j] - r[i]) * np.outer(x, x)
        covariance = phi @ np.linalg.pinv(information, rcond=1e-10) @ phi.T
        optimum = p * np.exp(r / beta) / np.sum(p * np.exp(r / beta))
        variance = np.trace(covariance @ (np.diag(optimum) - np.outer(optimum, optimum)))
        law = law_of(ref, reward, phi, beta=beta)
        np.testing.assert_allclose(law.dimension, np.linalg.matrix_rank(information, tol=1e-10), rtol=1e-9)
        np.testing.assert_allclose(law.kl, variance / (2 * beta**2), rtol=1e-9)


@pytest.mark.parametrize("linear", [True, False])
def test_fit_is_the_maximum_of_the_likelihood(linear):
    ref, reward, features = world(3)
    wins = sample_wins(jax.random.key(2), reward, ref, n=600)
    phi = features if linear else np.eye(8)
    assert bool(strongly_connected(wins))

    def nll(theta):
        r = phi @ theta
        return -np.sum(np.asarray(wins) * log_expit(r[:, None] - r[None]))

    best = phi @ minimize(nll, np.zeros(phi.shape[1]), tol=1e-12).x
    fitted = np.asarray(fit(wins, phi))
    np.testing.assert_allclose(fitted, best - best.mean(), atol=1e-4)
    np.testing.assert_allclose(fitted.mean(), 0, atol=1e-14)


def test_the_generator_is_where_dpo_ends():
    ref, reward, _ = world(3)
    beta = 0.4
    wins = sample_wins(jax.random.key(3), reward, ref, n=600)

    @jax.jit
    def both(wins, ref):
        dpo = tree.fit_dpo(wins, tree.conditionals(jnp.log(ref), vocab_size=2), beta=beta).params
        return bandit.tilted(ref, gap.fit_linear_reward(wins, jnp.eye(8)), beta=beta), tree.sequence_logp(dpo)

    generator, logp = both(wins, ref)
    np.testing.assert_allclose(generator, np.exp(logp), rtol=1e-7)


def test_excess_is_the_enumerated_divergence():
    p = softmax(RNG.normal(size=5))
    r, fitted = RNG.normal(size=(2, 5))
    true, guess = (expit(x[:, None] - x[None]) for x in (r, fitted))
    divergence = true * np.log(true / guess) + (1 - true) * np.log((1 - true) / (1 - guess))
    expected = np.sum(p[:, None] * p[None] * divergence)
    np.testing.assert_allclose(excess(p, r, fitted), expected, rtol=1e-12)
    np.testing.assert_allclose(excess(p, r, r + 3), 0, atol=1e-15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gap.level_features(0), "horizon must be at least 1, got 0"),
        (lambda: gap.sample_gap(jax.random.key(0), *WORLD, n=0, beta=1.0), "n must be at least 1, got 0"),
        (lambda: gap.statistical_law(*WORLD, beta=0.0), "beta must be a finite"),
    ],
)  # fmt: skip
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
