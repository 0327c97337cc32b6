import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from tiltjax.train.evaluate import (
    best_of_n_frontier,
    estimate,
    policy_point,
    soft_best_of_n_frontier,
    tilt_frontier,
)

P, M, BETA = 4, 32, 0.5
REWARD = np.random.default_rng(0).normal(size=(P, M)).astype(np.float32)


def tilted(beta):
    """Weights, mean reward and KL of the tilt of every prompt's candidates in float64."""
    weights = softmax(REWARD.astype(np.float64) / beta, axis=-1)
    return weights, (weights * REWARD).sum(-1), (weights * np.log(M * weights)).sum(-1)


def test_estimates_are_their_formulas():
    out = estimate(REWARD, beta=BETA)
    x = REWARD.astype(np.float64) / BETA
    weights, reward, kl = tilted(BETA)
    log_z = logsumexp(x, axis=-1) - np.log(M)
    without = [logsumexp(np.delete(x, i, axis=1), axis=-1) - np.log(M - 1) for i in range(M)]
    expected = {
        "log_z": log_z,
        "log_z_jackknife": M * log_z - (M - 1) * np.mean(without, axis=0),
        "ess": 1 / np.square(weights).sum(-1),
        "tilted_reward": reward,
        "tilt_kl": kl,
    }
    for name, value in expected.items():
        assert isinstance(getattr(out, name), np.ndarray)
        np.testing.assert_allclose(getattr(out, name), value, rtol=1e-4, err_msg=name)
    assert out.pareto_k.shape == (P,)
    assert np.isfinite(out.pareto_k).all()
    assert np.isinf(estimate(REWARD[:, :8], beta=BETA).pareto_k).all()


def test_soft_best_of_n_goes_from_the_reference_to_the_tilt():
    points = soft_best_of_n_frontier(REWARD, beta=BETA, ns=[1, 4, 4000])
    assert [p.strength for p in points] == [1, 4, 4000]
    assert points[0].reward.mean == pytest.approx(REWARD.mean(), abs=1e-5)
    assert points[0].kl == (pytest.approx(0, abs=1e-6),) * 3
    _, reward, kl = tilted(BETA)
    assert points[2].reward.mean == pytest.approx(reward.mean(), abs=2e-3)
    assert points[2].kl.mean == pytest.approx(kl.mean(), abs=5e-3)
    (tilt,) = tilt_frontier(REWARD, betas=[BETA])
    assert (tilt.strength, tilt.name) == (BETA, "tilt")
    assert tilt.reward.mean == pytest.approx(reward.mean(), rel=1e-5)
    assert tilt.kl.mean == pytest.approx(kl.mean(), rel=1e-4)
    assert REWARD.mean() < points[1].reward.mean < tilt.reward.mean
    assert 0 < points[1].kl.mean < tilt.kl.mean


def test_soft_best_of_two_is_the_mean_over_all_pairs():
    """Two candidates with replacement, one of which is kept with odds exp(reward / beta)."""
    r = REWARD.astype(np.float64)
    first, second = np.broadcast_arrays(r[:, :, None], r[:, None, :])
    keep_first = softmax(np.stack([first, second]) / BETA, axis=0)[0]
    (point,) = soft_best_of_n_frontier(REWARD, beta=BETA, ns=[2])
    assert point.reward.mean == pytest.approx((keep_first * first + (1 - keep_first) * second).mean(), abs=1e-5)
    law = 2 * keep_first.sum(2) / M**2
    assert point.kl.mean == pytest.approx((law * np.log(law * M)).sum(-1).mean(), abs=1e-5)


def test_best_of_n():
    one, two = best_of_n_frontier(REWARD, ns=[1, 2])
    assert one.reward.mean == pytest.approx(REWARD.mean(), abs=1e-6)
    assert one.kl == (0, 0, 0)
    pairs = [np.maximum(REWARD[:, i], REWARD[:, j]) for i in range(M) for j in range(i)]
    assert two.reward.mean == pytest.approx(np.mean(pairs), abs=1e-5)
    assert two.kl.mean == pytest.approx(np.log(2) - 0.5, abs=1e-6)


def test_policy_point_averages_candidates_before_prompts():
    log_ratio = np.random.default_rng(1).normal(0.3, 1, (P, M)).astype(np.float32)
    point = policy_point("tuned", REWARD, log_ratio)
    assert (point.name, point.strength) == ("tuned", None)
    for interval, values in ((point.reward, REWARD), (point.kl, log_ratio)):
        means = values.mean(1)
        assert interval.mean == pytest.approx(values.mean(), abs=1e-6)
        assert means.min() <= interval.low < interval.mean < interval.high <= means.max()


@pytest.mark.parametrize(
    ("frontier", "options", "message"),
    [
        (soft_best_of_n_frontier, {"beta": BETA, "ns": [1, 0]}, "n must be at least 1, got 0"),
        (soft_best_of_n_frontier, {"beta": 0.0, "ns": [1]}, "beta must be a finite number above 0, got 0.0"),
        (best_of_n_frontier, {"ns": [M + 1]}, "n must lie between 1 and the number of draws, 32, got 33"),
        (tilt_frontier, {"betas": [1.0, -1.0]}, "beta must be a finite number above 0, got -1.0"),
    ],
)
def test_bad_options_are_named(frontier, options, message):
    with pytest.raises(ValueError, match=message):
        frontier(REWARD, **options)
