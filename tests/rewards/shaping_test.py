import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized

from tiltjax.rewards.shaping import format_penalty, length_penalty, overlong_penalty, repetition_penalty

RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 2, (12, 15))
WHERE = np.arange(15) < np.arange(0, 24, 2)[:, None]  # none, 2, 4, ..., all


class OverlongTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    def test_falls_from_0_to_minus_1_over_the_cache(self):
        length = np.array([0, 16383, 16384, 16385, 18432, 20479, 20480, 20481, 10**6])
        want = [0, 0, 0, -1 / 4096, -0.5, -4095 / 4096, -1, -1, -1]
        np.testing.assert_allclose(self.variant(overlong_penalty)(jnp.asarray(length)), want, rtol=1e-7)

    @parameterized.parameters((7, 7), (7, 1), (100, 33))
    def test_is_a_clipped_line(self, max_length, cache):
        length = np.arange(2 * max_length).reshape(2, -1)
        want = np.clip((max_length - cache - length) / cache, -1, 0)
        out = overlong_penalty(jnp.asarray(length), max_length=max_length, cache=cache)
        np.testing.assert_allclose(out, want, rtol=1e-6)


def test_a_price_per_token_away_from_the_target():
    length = jnp.asarray([[0, 3, 10], [4, 5, 6]])
    np.testing.assert_allclose(length_penalty(length, coefficient=0.1), -0.1 * length, rtol=1e-6)
    want = -0.1 * np.abs(np.asarray(length) - 5)
    np.testing.assert_allclose(length_penalty(length, coefficient=0.1, target=5), want, rtol=1e-6)
    target = np.array([[1, 3, 5], [9, 5, 0]])
    out = length_penalty(length, coefficient=0.1, target=jnp.asarray(target))
    np.testing.assert_allclose(out, -0.1 * np.abs(np.asarray(length) - target), rtol=1e-6)
    assert not np.signbit(np.asarray(out)[0, 1])
    assert float(jax.grad(lambda c: length_penalty(length, coefficient=c).sum())(0.1)) == 0


def test_a_broken_format_costs_the_penalty():
    out = format_penalty(jnp.asarray([[True, False], [False, True]]), penalty=0.25)
    np.testing.assert_array_equal(out, [[0, -0.25], [-0.25, 0]])
    assert format_penalty(jnp.asarray(False)).tolist() == -1.0


def repeated_share(tokens, where, n):
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1) if all(where[i : i + n])]
    return len(set(grams)) / len(grams) - 1 if grams else 0


class RepetitionTest(chex.TestCase):
    @chex.variants(with_jit=True)
    @parameterized.parameters(1, 2, 4)
    def test_is_the_count_over_sets_of_ngrams(self, ngram):
        dirty = np.where(WHERE, TOKENS, -7)
        out = self.variant(lambda t, w: repetition_penalty(t, ngram=ngram, where=w))(dirty, WHERE)
        want = [repeated_share(t, w, ngram) for t, w in zip(TOKENS, WHERE, strict=True)]
        np.testing.assert_allclose(out, want, rtol=1e-6, atol=1e-7)
        assert min(want) < -0.1
        assert float(out[0]) == 0
        assert out.dtype == np.float32


def test_a_window_across_a_hole_does_not_count():
    tokens, where = jnp.asarray([[1, 2, 9, 2, 1, 2]]), jnp.asarray([[True, True, False, True, True, True]])
    np.testing.assert_allclose(repetition_penalty(tokens, ngram=2, where=where), [-1 / 3], rtol=1e-6)
    np.testing.assert_allclose(repetition_penalty(tokens, ngram=2), [-1 / 5], rtol=1e-6)


def test_a_completion_shorter_than_the_ngram_repeats_nothing():
    compiled = jax.jit(repetition_penalty, static_argnames="ngram")
    for ngram, want in ((4, 0), (3, 0), (2, -1 / 2), (1, -2 / 3)):
        np.testing.assert_allclose(compiled(jnp.zeros((2, 3), int), ngram=ngram), [want] * 2, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: overlong_penalty(x, max_length=0), "max_length must be at least 1, got 0"),
        (lambda x: overlong_penalty(x, max_length=8, cache=9), "cache must lie in 1 to max_length = 8, got 9"),
        (lambda x: overlong_penalty(x, max_length=8, cache=0), "cache must lie in 1 to max_length = 8, got 0"),
        (lambda x: length_penalty(x, coefficient=-1), "coefficient must be at least 0, got -1"),
        (lambda x: format_penalty(x > 0, penalty=-0.5), "penalty must be at least 0, got -0.5"),
        (lambda x: repetition_penalty(x, ngram=0), "ngram must be at least 1, got 0"),
    ],
)
def test_bad_options(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros(3, int))
