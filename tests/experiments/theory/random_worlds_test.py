"""Claims of the pages in worlds that nobody chose: what a page says of its own world may be true there only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from experiments.theory import f_divergence, games, log_partition, search, soft_best_of_n, voting, weighted_mle
from experiments.theory.compiled import bandit
from tiltjax.exact import tree


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng(request):
    """Another one for every test."""
    return np.random.default_rng(np.frombuffer(request.node.name.encode(), np.uint8))


def test_the_rate_of_soft_best_of_n_is_that_of_its_third_moment(rng):
    """KL falls as N^-2 where the third moment of the weights exists, else as N^(1 - a); total variation as 1/N."""
    for index in (*rng.uniform(2.4, 2.75, 3), *rng.uniform(3.7, 6.0, 3)):
        slopes = soft_best_of_n.heavy_slopes(index)
        assert slopes["tv"] == pytest.approx(-1, abs=0.03)
        for name in ("forward", "reverse"):
            assert slopes[name] == pytest.approx(max(-2.0, 1 - index), abs=0.05)


def test_the_estimate_of_log_z_that_errs_least_is_told_by_two_moments(rng):
    found = []
    for share, mass in zip(rng.uniform(0.1, 0.5, 12), rng.uniform(0.05, 0.95, 12), strict=True):
        exact, limit = log_partition.second_order_of_two(share, mass)
        assert exact == pytest.approx(limit, rel=0.15, abs=0.02)
        found.append(exact > 0)
    assert 0 < sum(found) < 12


def test_the_price_of_weights_is_a_mean_in_which_an_arm_counts_by_one_less_the_tilt(rng):
    for ref, reward in zip(rng.dirichlet(5 * np.ones(3), 2), rng.normal(size=(2, 3)) / 4, strict=True):
        w = np.asarray(bandit.tilted(ref, reward, beta=weighted_mle.BETA)) / ref
        weighted, from_tilt = weighted_mle.exact_error(ref, reward)[16384]
        price = np.average(w, weights=1 - ref * w)
        assert weighted / from_tilt == pytest.approx(price, rel=0.02)
        assert abs(price / (ref @ w**2) - 1) > 0.05


def test_forward_kl_against_reverse_kl_at_one_large_beta(rng):
    """Reward by the skewness of the rewards, entropy by the covariance of their square with log ref."""
    positive = 0
    for ref in rng.dirichlet(2 * np.ones(6), 30):
        gain, cumulant, entropy, covariance = f_divergence.at_one_beta(ref, 1000.0)
        assert gain == pytest.approx(cumulant, abs=5e-5)
        assert entropy == pytest.approx(covariance, abs=5e-4)
        positive += cumulant > 0
    assert 5 < positive < 25


def test_at_equal_reward_the_tilt_is_nearest_to_the_reference_and_most_diverse_only_where_that_is_uniform(rng):
    gains = [max(x.max() for x in f_divergence.entropy_gains(ref).values()) for ref in rng.dirichlet(np.ones(6), 8)]
    assert max(gains) > 0.01
    assert max(x.max() for x in f_divergence.entropy_gains(np.full(6, 1 / 6)).values()) < 1e-6


def test_votes_help_a_second_answer_at_first_at_most(rng):
    """Where the likeliest answer is wrong, many votes are worse than few; a few may be better than one."""
    helped = 0
    for p in np.sort(rng.dirichlet(4 * np.ones(4), 12), axis=1):
        if p[3] - p[2] < 0.05:
            continue
        p = p[[2, 3, 0, 1]]
        chances = [voting.right_vote(p, n) for n in (1, 4, 40)]
        assert chances[2] < max(chances[:2])
        helped += chances[1] > chances[0]
    assert helped > 0


@pytest.mark.parametrize(("answers", "n"), [(3, 2), (4, 3), (5, 5), (3, 3), (3, 4), (2, 6)])
def test_the_mean_reward_of_empo(rng, answers, n):
    """Less than (1 + (N - 1) p) / N by the chance that no two agree, which is 0 with more candidates than answers."""
    p = rng.dirichlet(np.ones(answers))
    alone = voting.lonely(p, n)
    assert (alone.max() == 0) == (n > answers)
    np.testing.assert_allclose(voting._empo(p, n), (1 + (n - 1) * p - alone) / n, rtol=1e-12)


def test_a_weaker_magnet_is_nearer_in_kl_and_not_always_less_exploitable(rng):
    grown, nearer = games.weaker_magnets(rng, 60)
    assert 0 < grown < 24
    assert nearer < 1


def test_blocks_of_one_token_beat_best_of_n_for_few_draws_only(rng):
    """In other trees than those of the page, of another shape."""
    trees, V, H = 64, 4, 3
    ref = [special.log_softmax(rng.normal(size=(trees, V**t, V)), -1) for t in range(H)]
    reward = rng.normal(size=(trees, V**H))

    @jax.jit
    def gains(ref, reward):
        values = tree.mean_values(ref, reward)
        laws = [[tree.blockwise_best_of_n_law(ref, values, n=n, block=b) for b in (1, H)] for n in (2, 4, 64)]
        return [jnp.mean(jnp.sum((one - whole) * reward, -1)) for one, whole in laws]

    few, some, many = map(float, gains(ref, reward))
    assert min(few, some) > 0.05
    assert many < -0.05


def test_the_constant_of_decoding_by_mean_values_takes_what_is_left_given_the_past(rng):
    for _ in range(4):
        ref = [special.log_softmax(rng.normal(size=(search.V**t, search.V)), -1) for t in range(search.H)]
        found = search.decoded(ref, rng.normal(size=search.K))
        assert search.BETAS[-1] ** 2 * found["mean"][-1] == pytest.approx(found["constant"], rel=0.03)
