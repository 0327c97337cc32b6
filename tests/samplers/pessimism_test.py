import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

from tiltjax.samplers.pessimism import inference_time_pessimism

REF = np.array([0.4, 0.3, 0.2, 0.1])
REWARD = np.array([0.0, 0.4, 0.7, 1.0])
RNG = np.random.default_rng(0)

choose = jax.jit(inference_time_pessimism)


def exact_law(N, beta, reward_max, ref=REF):
    """P(chosen = x): every N-tuple of draws, the first N - 1 tried in order, the last one the fallback."""
    law = np.zeros(len(ref))
    for draw in itertools.product(range(len(ref)), repeat=N):
        chance, reward = ref[list(draw)].prod(), REWARD[list(draw[:-1])]
        if N > 1:
            surplus = lambda lam, r=reward: np.maximum(r - lam, 0).mean() / beta - 1
            lam = brentq(surplus, reward.max() - N * beta - 1e-9, reward.max(), xtol=1e-14)
            for arm, r in zip(draw, reward, strict=False):
                accept = min(max(r - lam, 0) / (reward_max - lam), 1)
                law[arm] += chance * accept
                chance *= 1 - accept
        law[draw[-1]] += chance
    return law


def chi_square(drawn, law):
    expected = law * len(drawn)
    return float((np.square(np.bincount(drawn, minlength=len(law)) - expected) / expected).sum())


@pytest.mark.parametrize(("N", "beta", "reward_max"), [(1, 0.3, 1.0), (2, 0.3, 1.5), (5, 0.15, 1.0), (5, 0.5, 0.6)])
def test_law_by_enumeration(N, beta, reward_max):
    law = exact_law(N, beta, reward_max)
    np.testing.assert_allclose(law.sum(), 1, rtol=1e-12)
    drawn = np.random.default_rng(N).choice(4, size=(200_000, N), p=REF)
    index = np.asarray(choose(jax.random.key(N), REWARD[drawn].astype(np.float32), beta=beta, reward_max=reward_max))
    chosen = drawn[np.arange(len(drawn)), index]
    assert chi_square(chosen, law) < 20, chi_square(chosen, law)  # 3 df
    if N == 5:  # The test has power: the reference, and a sixth candidate, have other laws.
        assert chi_square(chosen, REF) > 100
        assert chi_square(chosen, exact_law(6, beta, reward_max)) > 100


def test_many_candidates_follow_the_pessimistic_optimum():
    drawn = RNG.choice(4, size=(20_000, 64), p=REF)
    index = np.asarray(choose(jax.random.key(3), REWARD[drawn].astype(np.float32), beta=0.3, reward_max=1.0))
    lam = brentq(lambda lam: REF @ np.maximum(REWARD - lam, 0) / 0.3 - 1, -1, 1)
    optimum = REF * np.maximum(REWARD - lam, 0) / 0.3
    law = np.bincount(drawn[np.arange(len(drawn)), index], minlength=4) / len(drawn)
    assert np.abs(law - optimum).max() < 0.015


def test_masked_is_sliced_and_the_last_real_candidate_is_the_fallback():
    reward = RNG.normal(size=(200, 9)).astype(np.float32)
    where = np.broadcast_to(np.arange(9) < 6, (200, 9)).copy()
    where[:2] = False
    where[1, 4] = True
    dirty = np.where(where, reward, RNG.choice([np.nan, np.inf, 1e30], size=where.shape)).astype(np.float32)
    out = np.asarray(choose(jax.random.key(0), dirty, beta=0.3, reward_max=3.0, where=where))
    sliced = choose(jax.random.key(0), reward[:, :6], beta=0.3, reward_max=3.0)
    np.testing.assert_array_equal(out[2:], sliced[2:])
    assert out[:2].tolist() == [0, 4]
    assert set(out[2:]) == set(range(6))
    # No candidate can be accepted: a best possible reward out of reach.
    none = choose(jax.random.key(0), reward, beta=0.3, reward_max=1e12, where=where)
    np.testing.assert_array_equal(none[2:], np.full(198, 5))


class InferenceTimePessimismTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_one_beta_and_bound_per_prompt_and_large_rewards(self):
        reward = RNG.normal(size=(50, 8)).astype(np.float32)
        reward = np.round(reward * 64) / 64  # so that the shift is exact
        beta, bound = np.linspace(0.1, 1, 50, dtype=np.float32), np.linspace(2, 4, 50, dtype=np.float32)
        draw = self.variant(lambda k, r, b, m: inference_time_pessimism(k, r, beta=b, reward_max=m))
        out = np.asarray(draw(jax.random.key(5), reward, beta, bound))
        assert out.dtype == np.int32
        far = draw(jax.random.key(5), reward + 2.0**15, beta, bound + 2.0**15)
        assert np.mean(np.asarray(far) == out) > 0.95
        assert len(set(out)) > 4
        high = draw(jax.random.key(5), reward, beta, bound - 100)  # Every lead is above the bound: the first wins.
        first = [
            int(np.argmax(np.maximum(r[:7] - _threshold(r[:7], b), 0) > 0)) for r, b in zip(reward, beta, strict=True)
        ]
        np.testing.assert_array_equal(high, first)


def _threshold(row, beta):
    row, beta = row.astype(np.float64), float(beta)
    return brentq(lambda lam: np.maximum(row - lam, 0).mean() / beta - 1, row.max() - 8 * beta, row.max())


def test_bad_beta_is_named():
    with pytest.raises(ValueError, match=r"beta must be a finite number above 0, got 0.0"):
        inference_time_pessimism(jax.random.key(0), jnp.zeros(3), beta=0.0, reward_max=1.0)
