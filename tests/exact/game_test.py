"""Papers that play the skew payoff A = 2 P - 1 have half these strengths, twice the step sizes and half the values."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit, softmax

from tests.losses.tabular import minimiser, ordered_pairs
from tiltjax.exact import bandit, game
from tiltjax.losses.game import dno_loss, inpo_loss, magnetic_kl_loss
from tiltjax.losses.regression import sppo_loss

RNG = np.random.default_rng(5)
ROCK_PAPER_SCISSORS = np.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
TUTORIAL = np.array([[0.0, 1, -1, 1], [-1, 0, 1, -1], [1, -1, 0, -1], [-1, 1, 1, 0]])
UNIFORM, START = np.full(3, 1 / 3), np.array([0.5, 0.3, 0.2])
NOISE = np.random.default_rng(21).normal(size=(3, 5, 5))
RANDOM = (1 + np.tanh(NOISE - np.swapaxes(NOISE, -1, -2))) / 2
REF, POLICY = RNG.dirichlet(np.ones(5), size=(2, 3))

solve, exploitability = jax.jit(game.regularised_equilibrium), jax.jit(game.exploitability)
mirror_descent, magnetic_descent = jax.jit(game.mirror_descent), jax.jit(game.magnetic_mirror_descent)
take_inpo, take_nash_md, take_sppo = jax.jit(game.inpo), jax.jit(game.nash_md), jax.jit(game.sppo)
take_dno = jax.jit(game.dno)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def kl(p, path):
    return np.sum(np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(path)), 0), axis=-1)


def normalised(logits):
    return softmax(logits, axis=-1)


class TestPreferences:
    def test_bradley_terry(self):
        reward = RNG.normal(size=(2, 4))
        np.testing.assert_allclose(
            jax.jit(game.bradley_terry)(reward), expit(reward[:, :, None] - reward[:, None]), rtol=1e-14
        )

    def test_win_rates_and_exploitability_of_many_policies(self):
        np.testing.assert_allclose(jax.jit(game.win_rates)(RANDOM[0], POLICY), POLICY @ RANDOM[0].T, rtol=1e-14)
        np.testing.assert_allclose(exploitability(RANDOM[0], POLICY), (POLICY @ RANDOM[0].T).max(-1) - 0.5)
        rock = np.array([1.0, 0, 0])
        assert float(exploitability((1 + ROCK_PAPER_SCISSORS) / 2, rock)) == 0.5

    @pytest.mark.parametrize("bad", [[[0.5, 0.6], [0.6, 0.5]], [[0.5, 1.5], [-0.5, 0.5]], [[0.5, np.nan], [0.5, 0.5]]])
    def test_what_is_no_preference_is_refused(self, bad):
        with pytest.raises(ValueError, match=r"preference must lie in \[0, 1\] and add up to 1 .* at \(0, 1\)"):
            game.minmax_winner(np.array(bad))
        with pytest.raises(ValueError, match="preference must lie in"):
            game.from_payoff(2 * jnp.array(bad) - 1)
        jax.jit(game.from_payoff)(2 * jnp.array(bad) - 1)  # Values of a traced matrix are not known.


class TestWinners:
    def test_copeland_is_a_set_and_minmax_a_mixture(self):
        preference = game.from_payoff(TUTORIAL)
        assert game.copeland_score(preference).tolist() == [1, -1, -1, 1]
        assert game.copeland_winners(preference).tolist() == [True, False, False, True]
        found = game.minmax_winner(preference)
        np.testing.assert_allclose(found.policy, [1 / 3, 0, 1 / 3, 1 / 3], atol=1e-9)
        np.testing.assert_allclose(found.value, 0.5, atol=1e-9)
        assert found.unique

    def test_copeland_by_counting(self):
        ties = np.round(RANDOM, 1)
        wins = ties > np.swapaxes(ties, -1, -2)
        np.testing.assert_array_equal(jax.jit(game.copeland_score)(ties), wins.sum(-1) - wins.sum(-2))

    def test_under_bradley_terry_both_are_the_highest_reward(self):
        reward = RNG.normal(size=(3, 4))
        best = np.eye(4)[reward.argmax(-1)]
        preference = expit(reward[:, :, None] - reward[:, None])
        found = game.minmax_winner(preference)
        np.testing.assert_allclose(found.policy, best, atol=1e-9)
        np.testing.assert_array_equal(game.copeland_winners(preference), best > 0)
        assert found.unique.tolist() == [True] * 3

    def test_clones_share_their_mass_anyhow(self):
        clone = [0, 1, 2, 0]
        preference = game.from_payoff(ROCK_PAPER_SCISSORS[np.ix_(clone, clone)])
        found = game.minmax_winner(preference)
        assert not found.unique
        np.testing.assert_allclose(found.low, [0, 1 / 3, 1 / 3, 0], atol=1e-9)
        np.testing.assert_allclose(found.high, [1 / 3] * 4, atol=1e-9)
        for share in (0.0, 0.25, 1.0):
            policy = np.array([share / 3, 1 / 3, 1 / 3, (1 - share) / 3])
            assert abs(float(exploitability(preference, policy))) < 1e-15
        assert game.minmax_winner(np.full((2, 2), 0.5)).high.tolist() == [1, 1]

    def test_no_arm_beats_a_winner(self):
        found = game.minmax_winner(RANDOM)
        np.testing.assert_allclose(exploitability(RANDOM, found.policy), 0, atol=1e-9)
        np.testing.assert_allclose(found.value, 0.5, atol=1e-9)
        assert ((found.low - 1e-9 <= found.policy) & (found.policy <= found.high + 1e-9)).all()


class TestRegularisedEquilibrium:
    def test_is_the_tilt_by_its_own_win_rates(self):
        for beta in ([10.0, 0.3, 0.05], [0.01, 1e-3, 1e-4]):
            found = np.asarray(solve(RANDOM, REF, beta=jnp.array(beta)))
            rates = np.einsum("bij,bj->bi", RANDOM, found)
            np.testing.assert_allclose(found, normalised(np.log(REF) + rates / np.array(beta)[:, None]), atol=1e-11)

    def test_ends(self):
        np.testing.assert_allclose(solve(RANDOM, REF, beta=np.full(3, 1e9)), REF, atol=1e-8)
        found = solve(RANDOM, REF, beta=np.full(3, 1e-4))
        assert (np.asarray(exploitability(RANDOM, found)) < 1e-3).all()
        without = np.where(np.arange(5) == 0, 0, REF)
        without /= without.sum(-1, keepdims=True)
        found = np.asarray(solve(RANDOM, without, beta=np.full(3, 0.2)))
        rates = np.einsum("bij,bj->bi", RANDOM, found)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(found, normalised(np.log(without) + rates / 0.2), atol=1e-13)
        assert (found[:, 0] == 0).all()


class UpdateTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_formulas(self):
        with jax.enable_x64(True):
            beta, step, eta = 0.2, 0.7, 0.9
            mirror, magnetic, inpo, nash = self.variant(
                lambda p, m, q: (
                    game.mirror_descent(q, p, beta=jnp.array([beta, step, eta])),
                    game.magnetic_mirror_descent(q, p, ref=m, beta=beta, step_size=step),
                    game.inpo(q, p, ref=m, beta=beta, eta=eta),
                    game.nash_md(q, p, ref=m, beta=beta, eta=eta),
                )
            )(RANDOM, REF, POLICY)
        against = lambda q: np.einsum("bij,bj->bi", RANDOM, q)
        log_q, log_m, rates = np.log(POLICY), np.log(REF), against(POLICY)
        expected = normalised(log_q + rates / np.array([beta, step, eta])[:, None])
        np.testing.assert_allclose(mirror, expected, rtol=1e-13)
        expected = normalised((log_q + step * beta * log_m + step * rates) / (1 + step * beta))
        np.testing.assert_allclose(magnetic, expected, rtol=1e-13)
        mixed = (1 - beta / eta) * log_q + beta / eta * log_m
        np.testing.assert_allclose(inpo, normalised(mixed + rates / eta), rtol=1e-13)
        np.testing.assert_allclose(nash, normalised(mixed + against(normalised(mixed)) / eta), rtol=1e-13)


def test_updates_are_one_another():
    beta, step = 0.2, 0.7
    magnetic = magnetic_descent(POLICY, RANDOM, ref=REF, beta=beta, step_size=step)
    inpo = take_inpo(POLICY, RANDOM, ref=REF, beta=beta, eta=beta + 1 / step)
    np.testing.assert_allclose(inpo, magnetic, rtol=1e-13)
    # Mirror descent on the regularised game, at step size s / (1 + beta s).
    reward = np.einsum("bij,bj->bi", RANDOM, POLICY) - beta * (np.log(POLICY) - np.log(REF))
    np.testing.assert_allclose(jax.jit(bandit.tilted)(POLICY, reward, beta=beta + 1 / step), magnetic, rtol=1e-13)
    mirror = mirror_descent(POLICY, RANDOM, beta=1 / step)
    for same in (
        magnetic_descent(POLICY, RANDOM, ref=REF, beta=0.0, step_size=step),
        take_inpo(POLICY, RANDOM, ref=REF, beta=0.0, eta=1 / step),
        take_nash_md(POLICY, RANDOM, ref=REF, beta=0.0, eta=1 / step),
        take_dno(POLICY, RANDOM, beta=1 / step),
    ):
        np.testing.assert_allclose(same, mirror, rtol=1e-13)
    # At eta = beta, where the schedule starts, the present policy is forgotten.
    assert float(game.harmonic_eta(0, beta=beta)) == beta
    forgot = take_nash_md(POLICY, RANDOM, ref=REF, beta=beta, eta=beta)
    np.testing.assert_allclose(forgot, mirror_descent(REF, RANDOM, beta=beta), rtol=1e-13)
    # An arm that the policy has lost comes back through the magnet only where the policy takes no part.
    lost = np.array([0.0, 0.5, 0.5])
    kept = take_inpo(lost, RANDOM[0, :3, :3], ref=UNIFORM, beta=0.5, eta=1.0)
    assert np.asarray(kept)[0] == 0
    back = take_inpo(lost, RANDOM[0, :3, :3], ref=UNIFORM, beta=0.5, eta=0.5)
    assert np.asarray(back)[0] > 0


class TestUpdatesMinimiseTheLibrarysLosses:
    """At 4 arms of one random game; the losses are summed over everything that the policy could draw."""

    preference, ref = RANDOM[0, :4, :4], normalised(np.log(REF[0, :4]))
    policy = normalised(np.log(POLICY[0, :4]))
    rates = preference @ policy

    def test_sppo(self):
        loss = lambda logp: jnp.sum(self.policy * sppo_loss(logp, np.log(self.policy), self.rates, beta=0.3))
        found = take_sppo(self.policy, self.preference, beta=0.3)
        np.testing.assert_allclose(minimiser(loss, self.policy), found, atol=1e-8)

    def test_dno(self):
        pairs = ordered_pairs(4)
        loss = lambda logp: jnp.sum(dno_loss(logp[pairs], np.log(self.policy)[pairs], self.rates[pairs], beta=0.3))
        found = take_dno(self.policy, self.preference, beta=0.3)
        np.testing.assert_allclose(minimiser(loss, self.policy), found, atol=1e-8)

    def test_inpo(self):
        pairs = ordered_pairs(4)
        drawn = self.policy[pairs].prod(-1) * self.preference[pairs[:, 0], pairs[:, 1]]
        old, ref = np.log(self.policy)[pairs], np.log(self.ref)[pairs]
        loss = lambda logp: jnp.sum(drawn * inpo_loss(logp[pairs], ref, old, beta=0.2, eta=0.5))
        found = take_inpo(self.policy, self.preference, ref=self.ref, beta=0.2, eta=0.5)
        np.testing.assert_allclose(minimiser(loss, self.policy), found, atol=1e-8)

    def test_magnetic_mirror_descent(self):
        def loss(logp):
            pulls = magnetic_kl_loss(logp, np.log(self.ref), np.log(self.policy), beta=0.2, step_size=0.7)
            return pulls - jnp.exp(logp) @ self.rates

        found = magnetic_descent(self.policy, self.preference, ref=self.ref, beta=0.2, step_size=0.7)
        np.testing.assert_allclose(minimiser(loss, self.policy), found, atol=1e-8)


def test_sppo_at_the_scale_of_its_code_and_its_normaliser():
    step = take_sppo
    for beta in (1e-3, 0.05, 1.0):
        found = np.asarray(step(POLICY, RANDOM, beta=np.full(3, beta)))
        target = (np.einsum("bij,bj->bi", RANDOM, POLICY) - 0.5) / beta
        ratio = np.log(found) - np.log(POLICY)
        multiplier = np.sum(POLICY * (target - ratio), -1, keepdims=True)
        np.testing.assert_allclose(ratio + multiplier * np.exp(ratio), target, rtol=1e-9, atol=1e-9)
        assert (multiplier > 0).all()
    # log Z less 1 / (2 beta) is half the variance of the win rates over beta^2.
    target = target / 100
    log_z = np.log(np.sum(POLICY * np.exp(target), -1))
    np.testing.assert_allclose(log_z, np.sum(POLICY * target**2, -1) / 2, rtol=2e-2)
    all_tied = step(POLICY, np.full((3, 5, 5), 0.5), beta=np.full(3, 0.1))
    np.testing.assert_allclose(all_tied, POLICY, rtol=1e-14)


def test_mirror_descent_circles_around_the_winner():
    preference, betas = (1 + ROCK_PAPER_SCISSORS) / 2, np.array([5.0, 500.0])
    run = jax.jit(lambda p: game.iterate(lambda p, _: game.mirror_descent(p, preference, beta=betas), p, 20_000))
    path = np.asarray(run(np.tile(START, (2, 1))))
    away = kl(UNIFORM, path)
    np.testing.assert_allclose(away[[0, 500, 5000], 0], [0.0702, 0.2549, 2.863], rtol=1e-3)
    np.testing.assert_allclose(away[-1, 1] / away[0, 1], 1.006, atol=5e-4)
    last, average = np.asarray(exploitability(preference, np.stack([path[5000, 0], path[:5000, 0].mean(0)])))
    np.testing.assert_allclose([2 * last, 2 * average], [0.992, 0.0088], atol=1e-3)


def test_average_of_mirror_descent_is_within_its_bound():
    betas, rounds = np.array([20.0, 5.0, 0.5]), np.arange(1, 1001)
    run = jax.jit(lambda p: game.iterate(lambda p, _: game.mirror_descent(p, RANDOM, beta=betas), p, 1000))
    average = np.cumsum(np.asarray(run(np.full((3, 5), 0.2)))[:-1], axis=0) / rounds[:, None, None]
    found = np.asarray(exploitability(RANDOM, average))
    bound = np.stack([game.mirror_descent_bound(rounds, arms=5, beta=float(b)) for b in np.asarray(betas)], -1)
    assert (found <= bound).all()
    assert (found > bound / 50).any()


def test_magnetic_mirror_descent_converges_at_its_rate_unless_the_step_is_long():
    preference = (1 + ROCK_PAPER_SCISSORS) / 2
    beta, step_size = np.array([0.05, 0.25, 0.05]), np.array([0.2, 1.0, 10.0])

    def run(beta, step_size):
        update = lambda p, _: game.magnetic_mirror_descent(
            p, preference, ref=jnp.asarray(UNIFORM), beta=beta, step_size=step_size
        )
        return game.iterate(update, jnp.asarray(START), 1000)

    away = kl(UNIFORM, np.asarray(jax.jit(jax.vmap(run))(beta, step_size)))
    # The linearised map turns by a right angle times its step: |1 + i s / (2 sqrt 3)|^2 / (1 + beta s)^2.
    rate = np.log1p(step_size**2 / 12) - 2 * np.log1p(beta * step_size)
    np.testing.assert_allclose(np.log(away[0, 400] / away[0, 300]) / 100, rate[0], rtol=1e-3)
    np.testing.assert_allclose(np.log(away[1, 50] / away[1, 30]) / 20, rate[1], rtol=1e-3)
    np.testing.assert_allclose(rate[:2], [-0.01657, -0.3663], atol=1e-4)
    for row, rounds in ((0, 400), (1, 60)):
        options = dict(beta=float(beta[row]), step_size=float(step_size[row]))
        bound = np.asarray(game.magnetic_mirror_descent_bound(away[row, 0], np.arange(rounds), **options))
        assert (away[row, :rounds] <= bound * (1 + 1e-12)).all()
        np.testing.assert_allclose(np.log(bound[1] / bound[0]), [-0.00995, -0.2231][row], atol=1e-4)
    assert rate[2] > 0
    assert (away[2, 500:] > 1).all()
    with pytest.raises(ValueError, match=r"step_size must be at most 4 beta, got 10.0 with beta 0.05"):
        game.magnetic_mirror_descent_bound(1.0, 3, beta=0.05, step_size=10.0)


@pytest.mark.parametrize("method", ["nash_md", "inpo"])
def test_bounds_at_the_harmonic_schedule(method):
    update, beta, rounds = getattr(game, method), 0.1, np.arange(1, 401)

    def run(policy):
        step = lambda p, t: update(p, RANDOM, ref=jnp.asarray(REF), beta=beta, eta=game.harmonic_eta(t, beta=beta))
        return game.iterate(step, policy, 400)

    path = np.asarray(jax.jit(run)(jnp.asarray(POLICY)))
    target = np.asarray(solve(RANDOM, REF, beta=np.full(3, beta)))
    away = np.sum(target * (np.log(target) - np.log(path)), -1)
    eta = np.asarray(jax.jit(game.harmonic_eta)(np.arange(400), beta=beta))[:, None]
    if method == "nash_md":
        bound, slack = np.asarray(game.nash_md_bound(rounds, beta=beta))[:, None], 2 / eta**2
    else:
        furthest = np.abs(np.log(path[1:]) - np.log(REF)).max()
        bound = np.asarray(game.inpo_bound(rounds, beta=beta, log_ratio=furthest))[:, None]
        slack = 8 * max(beta * furthest, 1) ** 2 / eta**2
    assert (away[1:] <= bound).all()
    assert (away[1:] <= (1 - beta / eta) * away[:-1] + slack).all()
    # Without noise both are faster than the bounds: about 1 / T^2, and 1 / T^4 for INPO.
    slope = np.log(away[400] / away[200]) / np.log(2)
    assert (slope < {"nash_md": -1.8, "inpo": -3.8}[method]).all()


def test_moving_the_magnet_reaches_the_winner_of_the_game_itself():
    winner = game.minmax_winner(RANDOM)
    assert winner.unique.all()

    def run(magnet, beta):
        exact = lambda m, _: game.regularised_equilibrium(RANDOM, m, beta=jnp.full(3, beta))
        rounds = lambda m, _: game.mpo(m, RANDOM, beta=beta, step_size=0.6, steps=150)
        return game.iterate(exact, magnet, 20), game.iterate(rounds, magnet, 20)

    run = jax.jit(run)
    solved, descended = (np.asarray(path) for path in run(REF, 0.15))
    for path in (solved, descended):
        assert (np.diff(kl(winner.policy, path), axis=0) < 0).all()
    np.testing.assert_allclose(descended, solved, atol=1e-5)
    assert (np.asarray(exploitability(RANDOM, solved[1])) > 0.01).all()
    assert (np.asarray(exploitability(RANDOM, np.asarray(run(REF, 0.003)[0])[-1])) < 1e-13).all()


def test_iterate_is_a_loop_and_a_batch_is_each_game_alone():
    update = lambda p, step: game.mirror_descent(p, RANDOM, beta=1.0 + step)
    path = jax.jit(lambda p: game.iterate(update, p, 3))(POLICY)
    assert path.shape == (4, 3, 5)
    p = POLICY
    for step in range(3):
        np.testing.assert_allclose(np.asarray(path)[step], p, rtol=1e-14)
        p = np.stack([mirror_descent(q, g, beta=1.0 + step) for q, g in zip(p, RANDOM, strict=True)])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, q: game.mirror_descent(q, p, beta=0.0), "beta must be a finite number above 0, got 0.0"),
        (lambda p, q: game.sppo(q, p, beta=-1.0), "beta must be a finite number above 0, got -1.0"),
        (lambda p, q: game.regularised_equilibrium(p, q, beta=0), "beta must be a finite number above 0, got 0"),
        (lambda p, q: game.magnetic_tilt(q, q, ref=q, beta=-1.0, step_size=1.0), "beta must be at least 0, got -1.0"),
        (
            lambda p, q: game.magnetic_tilt(q, q, ref=q, beta=1.0, step_size=0.0),
            "step_size must be .* above 0, got 0.0",
        ),
        (lambda p, q: game.inpo(q, p, ref=q, beta=0.5, eta=0.4), "eta must be at least beta, got 0.4 with beta 0.5"),
        (lambda p, q: game.nash_md(q, p, ref=q, beta=0.5, eta=0.4), "eta must be at least beta, got 0.4"),
        (
            lambda p, q: game.mpo(q, p, beta=0.0, step_size=1.0, steps=1),
            "beta must be a finite number above 0, got 0.0",
        ),
        (lambda p, q: game.mpo(q, p, beta=1.0, step_size=1.0, steps=0), "steps must be at least 1, got 0"),
        (lambda p, q: game.iterate(lambda x, _: x, q, 0), "steps must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(RANDOM[0], POLICY[0])
