import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from tiltjax.ops.order import expected_max, pass_at_k, pass_at_k_bound, plackett_luce_logp

RNG = np.random.default_rng(0)
largest = jax.jit(expected_max, static_argnames="n")
passes = jax.jit(pass_at_k, static_argnames=("num_samples", "k"))
bound_of = jax.jit(pass_at_k_bound, static_argnames="k")
REWARD = RNG.normal(size=(4, 9)).astype(np.float32)
WHERE = np.array([[1] * 9, [1, 0, 1, 1, 0, 1, 1, 0, 1], [0, 0, 0, 1, 1, 1, 1, 0, 0], [1] + [0] * 8], bool)


def mean_of_maxima(row, n):
    return np.mean([max(row[list(s)]) for s in itertools.combinations(range(len(row)), n)])


class ExpectedMaxTest(chex.TestCase):
    @chex.variants(with_jit=True)
    @parameterized.parameters(1, 2, 5, 9)
    def test_is_the_mean_over_all_subsets(self, n):
        out = self.variant(lambda r: expected_max(r, n=n))(REWARD)
        np.testing.assert_allclose(out, [mean_of_maxima(r.astype(np.float64), n) for r in REWARD], rtol=1e-5)

    @chex.variants(with_jit=True)
    @parameterized.parameters(1, 3, 4)
    def test_masked_is_sliced_and_too_few_give_zero(self, n):
        dirty = np.where(WHERE, REWARD, RNG.choice([np.nan, np.inf, -np.inf, 7], size=REWARD.shape)).astype(np.float32)
        out = self.variant(lambda r, w: expected_max(r, n=n, where=w))(dirty, WHERE)
        rows = [r[w].astype(np.float64) for r, w in zip(REWARD, WHERE, strict=True)]
        expected = [mean_of_maxima(r, n) if len(r) >= n else 0 for r in rows]
        np.testing.assert_allclose(out, expected, rtol=1e-5)

    def test_vmaps_and_takes_any_leading_dimensions(self):
        flat = np.asarray(largest(REWARD, n=3))
        chex.assert_trees_all_close(jax.jit(jax.vmap(lambda r: expected_max(r, n=3)))(REWARD), flat)
        chex.assert_trees_all_close(largest(REWARD.reshape(2, 2, 9), n=3), flat.reshape(2, 2))


@pytest.mark.parametrize("n", [1, 100, 999, 1000])
def test_a_thousand_draws_against_exact_binomials(n):
    reward = RNG.normal(size=1000).astype(np.float32) + 1000
    ascending = np.sort(reward.astype(np.float64))
    weights = [math.comb(i, n - 1) / math.comb(1000, n) for i in range(1000)]
    np.testing.assert_allclose(sum(weights), 1, rtol=1e-12)
    out, exact = largest(reward, n=n), np.dot(weights, ascending)
    np.testing.assert_allclose(out, exact, rtol=2e-7)
    masked = largest(np.append(reward, np.float32(np.nan)), n=n, where=np.arange(1001) < 1000)
    np.testing.assert_allclose(masked, exact, rtol=2e-7)


def test_is_unbiased():
    # All 3^4 draws of 4 from a law on 3 points, against the expected maximum of 2 in closed form.
    law, points = np.array([0.5, 0.3, 0.2]), np.array([-1.0, 0.5, 4.0])
    draws = np.array(list(itertools.product(range(3), repeat=4)))
    mean = np.dot(law[draws].prod(-1), largest(np.float32(points[draws]), n=2))
    cdf = np.cumsum(law)
    np.testing.assert_allclose(mean, np.dot(np.diff(cdf**2, prepend=0), points), rtol=1e-5)


def test_gradient_of_the_largest_and_of_the_mean():
    row = REWARD[0]
    of_largest, of_mean = (jax.jit(jax.grad(lambda r, n=n: expected_max(r, n=n)))(row) for n in (9, 1))
    np.testing.assert_allclose(of_largest, np.eye(9)[REWARD[0].argmax()], atol=1e-6)
    np.testing.assert_allclose(of_mean, np.full(9, 1 / 9), rtol=1e-4)
    nothing = np.zeros(9, bool)
    bad = np.full(9, np.float32(np.nan))
    value, grad = jax.jit(jax.value_and_grad(lambda r: expected_max(r, n=2, where=nothing)))(bad)
    assert value == 0
    np.testing.assert_array_equal(grad, np.zeros(9))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (10, 1), (10, 3), (10, 10), (200, 100)])
def test_pass_at_k_is_the_ratio_of_binomials(n, k):
    c = np.arange(n + 1)
    expected = [1 - math.comb(n - i, k) / math.comb(n, k) for i in c]
    call = lambda c: pass_at_k(c, num_samples=n, k=k)
    for found in jax.jit(lambda c: (call(c), jax.vmap(call)(c)))(c):
        np.testing.assert_allclose(found, expected, rtol=2e-7)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    n, k, p = 10, 3, 0.3
    with jax.enable_x64(True):
        chance = np.array([math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)])
        unbiased = np.dot(chance, passes(np.arange(n + 1), num_samples=n, k=k))
    plug_in = np.dot(chance, 1 - (1 - np.arange(n + 1) / n) ** k)
    np.testing.assert_allclose(unbiased, 1 - (1 - p) ** k, atol=1e-12)
    assert round(plug_in - (1 - (1 - p) ** k), 3) == -0.043


@pytest.mark.parametrize("k", [1, 4, 7])
def test_pass_at_k_is_the_expected_largest_of_zeros_and_ones(k):
    correct = RNG.random((6, 9)) < np.linspace(0, 1, 6)[:, None]
    c = correct.sum(-1)
    out = largest(np.float32(correct), n=k)
    np.testing.assert_allclose(out, passes(c, num_samples=9, k=k), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [0, -1, 10])
def test_a_bad_size_is_named(bad):
    with pytest.raises(ValueError, match=rf"n must lie between 1 and the number of draws, 9, got {bad}"):
        expected_max(jnp.asarray(REWARD), n=bad)
    with pytest.raises(ValueError, match=rf"k must lie between 1 and num_samples, 9, got {bad}"):
        pass_at_k(jnp.asarray([1]), num_samples=9, k=bad)


def test_rankings_are_drawn_without_replacement():
    """Probabilities of all rankings of the real items sum to 1, and each is a product over the items left."""
    score, where = np.array([0.5, np.nan, -1.0, 2.0], np.float32), np.array([True, False, True, True])
    rankings = np.array(list(itertools.permutations([0, 2, 3])), np.int32)
    full = np.insert(rankings, 1, 1, axis=-1)  # The masked item stands second, wherever that is.
    logp = jax.jit(plackett_luce_logp)(np.tile(score, (6, 1)), full, where=np.tile(where, (6, 1)))
    a, b, c = np.moveaxis(np.exp(score.astype(np.float64))[rankings], -1, 0)
    np.testing.assert_allclose(np.exp(logp), a / (a + b + c) * b / (b + c), rtol=1e-6)
    np.testing.assert_allclose(np.exp(logp).sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("k", [2, 3, 4, 16, 2.5])
def test_pass_at_k_bound_holds_for_every_law_of_the_pass_rate(k):
    rate, law = RNG.random((50, 6)) ** 2, RNG.dirichlet(np.ones(6), size=50)
    mean = (law * rate).sum(-1)
    variance = (law * rate**2).sum(-1) - mean**2
    exact = (law * (1 - (1 - rate) ** k)).sum(-1)
    with jax.enable_x64(True):
        bound = np.asarray(bound_of(mean, variance, k=k))
    assert (bound >= exact - 1e-12).all()
    assert (bound <= 1).all()
    if k == 2:
        np.testing.assert_allclose(bound, exact, rtol=1e-12)
    else:
        assert (bound - exact).max() > 1e-3
    # Prompts of one and the same pass rate, small ones included, in single precision.
    even = np.float32([0, 1e-6, 1e-3, 0.4, 1])
    expected = -np.expm1(k * np.log1p(-even[:-1].astype(np.float64)))
    np.testing.assert_allclose(bound_of(even, np.zeros_like(even), k=k), [*expected, 1], rtol=1e-6)


def test_pass_at_k_bound_turns_round_at_one_draw():
    # Rates 0 and 2/3 with equal chance: the mean is 1/3, the formula at k = 1 says less.
    assert 1 - np.sqrt((1 - 1 / 3) ** 2 + 1 / 9) < 1 / 3 - 0.07
    for k in (1, 0, 1.5):
        with pytest.raises(ValueError, match=rf"k must be at least 2, got {k}"):
            pass_at_k_bound(jnp.float32(1 / 3), jnp.float32(1 / 9), k=k)
    gradient = jax.jit(jax.grad(lambda m, v: pass_at_k_bound(m, v, k=4), (0, 1)))(1.0, 0.0)
    np.testing.assert_array_equal(gradient, [0, 0])
