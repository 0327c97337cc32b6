import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from tiltjax.samplers.guarded import cap_weights, guarded_resample

RNG = np.random.default_rng(0)
REWARD = (3 * RNG.normal(size=(6, 16))).astype(np.float32)
WHERE = RNG.random((6, 16)) < 0.7


def water(weights, cap):
    """The same projection by a root-finder."""
    weights = np.asarray(weights, np.float64) / np.sum(weights)
    cap = max(cap, 1 / (weights > 0).sum())
    gap = lambda c: np.minimum(c * weights, cap).sum() - 1
    top = cap / weights[weights > 0].min() * 1.001
    return np.minimum((optimize.brentq(gap, 0, top, xtol=1e-15) if gap(top) > 0 else top) * weights, cap)


class CapTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    def test_is_the_nearest_capped_law(self):
        weights = np.exp(np.where(WHERE, REWARD, -np.inf))
        for cap in (0.9, 0.3, 0.12, 0.01):
            out = np.asarray(self.variant(lambda w, c: cap_weights(w, cap=c))(weights, cap))
            np.testing.assert_allclose(out, [water(row, cap) for row in weights], rtol=1e-4, atol=1e-7)
            np.testing.assert_allclose(out.sum(-1), 1, rtol=1e-5)
            assert (out[~WHERE] == 0).all()


def test_nothing_to_weigh_stays_zero():
    np.testing.assert_array_equal(jax.jit(lambda w: cap_weights(w, cap=0.5))(jnp.zeros((2, 3))), np.zeros((2, 3)))
    dead = jnp.full((1, 4), jnp.nan), jnp.zeros((1, 4), bool)
    out = jax.jit(lambda key, r, w: guarded_resample(key, r, num=3, beta=1.0, max_copies=1, where=w))(
        jax.random.key(0), *dead
    )
    assert (float(out.ess[0]), out.indices.tolist()) == (0.0, [[0, 0, 0]])


def test_copies_are_capped_and_unbiased_below_the_cap():
    run = jax.jit(
        jax.vmap(lambda key: guarded_resample(key, REWARD, num=12, beta=0.8, max_copies=2, where=WHERE)),
    )
    out = run(jax.random.split(jax.random.key(0), 600))
    copies = (np.asarray(out.indices)[..., None] == np.arange(16)).sum(-2)
    assert copies.max() == 2
    np.testing.assert_array_equal(out.most, copies.max(-1))
    np.testing.assert_array_equal(out.distinct, (copies > 0).sum(-1))
    expected = [water(np.exp(np.where(w, r, -np.inf) / 0.8), 2 / 12) for r, w in zip(REWARD, WHERE, strict=True)]
    np.testing.assert_allclose(copies.mean(0) / 12, expected, atol=0.01)
    np.testing.assert_allclose(out.ess[0], 1 / np.square(expected).sum(-1), rtol=1e-3)


def test_beta_leaves_the_wanted_sample_size():
    out = jax.jit(lambda key: guarded_resample(key, REWARD, num=16, ess=8.0))(jax.random.key(1))
    np.testing.assert_allclose(out.ess, 8, rtol=1e-3)
    weights = np.exp((REWARD - REWARD.max(-1, keepdims=True)) / np.asarray(out.beta)[:, None])
    np.testing.assert_allclose(out.weights, weights / weights.sum(-1, keepdims=True), rtol=1e-3, atol=1e-6)


def test_bad_options_are_named():
    run = lambda **options: guarded_resample(jax.random.key(0), REWARD, **({"num": 4, "beta": 1.0} | options))
    for options, message in (
        ({"num": 0}, "num must be at least 1, got 0"),
        ({"max_copies": 0}, "max_copies must be at least 1, got 0"),
        ({"ess": 2.0}, "exactly one of beta and ess must be given, got beta=1.0, ess=2.0"),
        ({"beta": None}, "exactly one of beta and ess must be given, got beta=None, ess=None"),
        ({"beta": None, "ess": 0.5}, "ess must be at least 1.0, got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            run(**options)
    with pytest.raises(ValueError, match="cap must be a finite number above 0"):
        cap_weights(jnp.ones(3), cap=0.0)
