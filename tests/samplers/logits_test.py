import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy.special import log_softmax, softmax

from tiltjax.samplers.logits import categorical, categorical_and_logp, greedy, min_p, processed, temper, top_k, top_p

LOGITS = (np.random.default_rng(0).normal(size=(4, 501)) * 2).astype(np.float32)
INF = np.inf


def nucleus(logits, p):
    """The kept set by a float64 sort."""
    probs = softmax(logits.astype(np.float64), -1)
    order = np.argsort(-probs, axis=-1, kind="stable")
    before = np.cumsum(np.take_along_axis(probs, order, -1), -1) - np.take_along_axis(probs, order, -1)
    keep = np.zeros_like(probs, bool)
    np.put_along_axis(keep, order, before < p, -1)
    return keep


def check_kept(out, logits, keep):
    np.testing.assert_array_equal(np.asarray(out), np.where(keep, logits, -INF))


class FilterTest(chex.TestCase):
    @chex.variants(with_jit=True)
    @parameterized.parameters(1, 500, 501, 900)
    def test_top_k(self, k):
        rank = np.argsort(np.argsort(-LOGITS, -1, kind="stable"), -1)
        check_kept(self.variant(lambda x: top_k(x, k=k))(LOGITS), LOGITS, rank < k)

    @chex.variants(with_jit=True)
    def test_top_p_is_the_sorted_nucleus(self):
        filtered = self.variant(lambda x, p: top_p(x, p=p))
        for p in (1e-9, 0.1, 0.5, 0.9, 0.999, 1.0):
            keep = nucleus(LOGITS, p)
            check_kept(filtered(LOGITS, p), LOGITS, keep)
            probs = softmax(LOGITS.astype(np.float64), -1)
            assert (np.where(keep, probs, 0).sum(-1) >= p - 1e-6).all()
            assert keep.any(-1).all()

    @chex.variants(with_jit=True)
    def test_min_p(self):
        probs = softmax(LOGITS.astype(np.float64), -1)
        check_kept(self.variant(lambda x: min_p(x, p=0.03))(LOGITS), LOGITS, probs >= 0.03 * probs.max(-1)[:, None])

    @chex.variants(with_jit=True)
    def test_processed_is_temperature_then_k_then_p(self):
        cold = LOGITS / np.float32(0.7)
        rank = np.argsort(np.argsort(-cold, -1, kind="stable"), -1)
        few = np.where(rank < 20, cold, -INF)
        out = self.variant(lambda x: processed(x, temperature=0.7, k=20, p=0.8))(LOGITS)
        keep = nucleus(few, 0.8)
        np.testing.assert_array_equal(np.isfinite(out), keep)
        np.testing.assert_allclose(np.asarray(out)[keep], cold[keep], rtol=1e-6)
        # The order matters: the nucleus of all tokens is a larger set.
        assert (nucleus(cold, 0.8) & (rank < 20)).sum() > keep.sum()
        np.testing.assert_array_equal(processed(LOGITS), LOGITS)


def test_ties_under_k_and_p():
    logits = jnp.log(jnp.asarray([0.2, 0.3, 0.2, 0.2, 0.1]))

    @jax.jit
    def kept(logits):
        of_k, of_p = [top_k(logits, k=k) for k in (2, 3)], jax.vmap(lambda p: top_p(logits, p=p))
        equal = top_p(jnp.zeros(5), p=0.1), min_p(jnp.zeros(5), p=1.0)
        return jnp.isfinite(jnp.stack([*of_k, *of_p(jnp.asarray([0.25, 0.4, 0.95])), *equal])).astype(int)

    assert kept(logits).tolist() == [
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [0, 1, 0, 0, 0],
        [1, 1, 1, 1, 0],  # A tie is not split.
        [1] * 5,
        [1] * 5,
        [1] * 5,
    ]


def test_removed_tokens_stay_removed_and_empty_rows_are_not_nan():
    logits = np.where(np.arange(501) % 3 == 0, LOGITS, -np.float32(INF))
    logits[0] = -INF

    @jax.jit
    def every(x):
        drawn = categorical(jax.random.key(0), x)
        return (top_k(x, k=400), top_p(x, p=0.999), min_p(x, p=0.01), temper(x, temperature=2.0)), drawn

    filtered, drawn = every(logits)
    for out in map(np.asarray, filtered):
        assert not np.isnan(out).any()
        assert (out[:, 1::3] == -INF).all()
        assert (out[0] == -INF).all()
        assert np.isfinite(out)[1:].any(-1).all()
    assert int(drawn[0]) == 0


def test_filters_return_float32_and_accept_far_logits():
    low = jnp.asarray(LOGITS, jnp.bfloat16)
    for out in (temper(low, temperature=0.5), top_k(low, k=3), top_p(low, p=0.5), min_p(low, p=0.5)):
        assert out.dtype == jnp.float32
    far = jnp.asarray([1e4, 1e4 - 1, -1e4, 0.0])
    np.testing.assert_array_equal(np.isfinite(top_p(far, p=0.99)), [True, True, False, False])


def test_greedy_takes_the_first_of_equals():
    assert greedy(jnp.asarray([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])).tolist() == [1, 0]
    np.testing.assert_array_equal(jnp.argmax(top_k(LOGITS, k=1), -1), greedy(LOGITS))


@pytest.mark.parametrize("V", [1, 255, 256, 257, 1000])
def test_greedy_over_blocks_is_argmax(V):
    logits = np.random.default_rng(V).integers(0, 9, (50, V)).astype(np.float32)  # With many ties.
    logits[0], logits[1, : V // 2] = -INF, -INF
    np.testing.assert_array_equal(greedy(jnp.asarray(logits)), logits.argmax(-1))


@pytest.mark.parametrize("V", [1, 257, 1000])
def test_the_log_probability_is_that_of_what_was_drawn(V):
    logits = 3 * np.random.default_rng(V).normal(size=(40, V)).astype(np.float32)
    logits[:, np.arange(V) % 3 == 1] = -INF
    keys = jax.random.split(jax.random.key(0), 40)
    token, logp = jax.jit(categorical_and_logp)(keys, logits)
    np.testing.assert_array_equal(token, jax.jit(categorical)(keys, logits))
    expected = np.take_along_axis(log_softmax(logits, -1), np.asarray(token)[:, None], 1)[:, 0]
    np.testing.assert_allclose(logp, expected, rtol=1e-5, atol=1e-6)


draw_each = jax.jit(jax.vmap(categorical, in_axes=(0, None)))


def draws(row, n=10_000):
    """``n`` independent tokens of one row of logits."""
    return np.asarray(draw_each(jax.random.split(jax.random.key(0), n), jnp.asarray(row, jnp.float32)))


def chi_square(drawn, law):
    expected = law * len(drawn)
    observed = np.bincount(drawn, minlength=len(law))
    assert (observed[law == 0] == 0).all()
    real = law > 0
    return float((np.square(observed[real] - expected[real]) / expected[real]).sum()), int(real.sum()) - 1


class CategoricalTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_rows_draw_apart(self):
        logits = jnp.broadcast_to(jnp.asarray(LOGITS[0, :300]), (2000, 2, 300))
        out = np.asarray(self.variant(categorical)(jax.random.key(0), logits))
        assert out.shape == (2000, 2)
        assert out.dtype == np.int32
        assert abs(np.corrcoef(out[:, 0], out[:, 1])[0, 1]) < 0.08


@pytest.mark.parametrize("V", [1, 7, 257])
def test_law(V):
    row = np.random.default_rng(V).normal(size=V) + 1e3
    row[1 : V // 3] = -INF
    statistic, df = chi_square(draws(row), softmax(row.astype(np.float32).astype(np.float64)))
    assert statistic < df + 5 * np.sqrt(2 * df) + 1e-9, (statistic, df)


def test_law_over_a_large_vocabulary():
    V = 50257
    rng = np.random.default_rng(1)
    row = rng.normal(size=V) * 2.5
    drawn = draws(row)
    law = softmax(row.astype(np.float32).astype(np.float64))
    # Tokens pooled in 100 groups of 1 mass in three ways: at random, by block, and by place inside a block.
    for group in (rng.integers(0, 100, V), np.arange(V) // 256 % 100, np.arange(V) % 256 % 100):
        statistic, df = chi_square(group[drawn], np.bincount(group, law))
        assert statistic < df + 5 * np.sqrt(2 * df), (statistic, df)


def test_heavy_masks():
    V = 50257
    alive = np.array([3, 255, 256, 40_000, V - 1])
    row = np.full(V, -INF)
    row[alive] = [0.0, -1.0, 0.5, -12.0, 1.0]
    drawn = draws(row)
    assert np.isin(drawn, alive).all()
    statistic, _ = chi_square(np.searchsorted(alive, drawn), softmax(row[alive]))
    assert statistic < 25
    for token in (0, 255, 256, V - 1):
        row = np.full(V, -INF)
        row[token] = -50.0
        assert (draws(row) == token).all()


def test_a_token_of_probability_zero_is_never_returned():
    # exp underflows to 0 here: the last block, and most of the first, have no mass.
    row = np.full(257, -200.0)
    row[[30, 31, 60]] = 0.0
    assert set(draws(row)) == {30, 31, 60}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: temper(x, temperature=0.0), "temperature must be a finite number above 0, got 0.0"),
        (lambda x: top_k(x, k=0), "k must be at least 1, got 0"),
        (lambda x: top_p(x, p=0.0), r"p must lie in \(0, 1\], got 0.0"),
        (lambda x: min_p(x, p=1.5), r"p must lie in \(0, 1\], got 1.5"),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.zeros(4))
