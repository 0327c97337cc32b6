import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.exact import game, kuhn

RNG = np.random.default_rng(3)

value, exploitability = jax.jit(kuhn.value), jax.jit(kuhn.exploitability)
action_values = jax.jit(kuhn.action_values, static_argnames="conditional")
magnetic, mirror_descent = jax.jit(kuhn.magnetic_mirror_descent), jax.jit(kuhn.mirror_descent)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def random_policy(cards, *batch):
    bet = RNG.random((*batch, 2, cards, 2))
    return np.stack([1 - bet, bet], -1)


def walk(history, cards, policy):
    """What the first player wins from a history of checks/folds (p) and bets/calls (b), by the rules alone."""
    higher = 1 if cards[0] > cards[1] else -1
    over = {"pp": higher, "pbp": -1, "pbb": 2 * higher, "bp": 1, "bb": 2 * higher}
    if history in over:
        return over[history]
    player, situation = {"": (0, 0), "pb": (0, 1), "p": (1, 0), "b": (1, 1)}[history]
    chance = policy[player, cards[player], situation]
    return sum(chance[a] * walk(history + move, cards, policy) for a, move in enumerate("pb"))


def deals(policy):
    return list(itertools.permutations(range(policy.shape[1]), 2))


def played(policy):
    return np.mean([walk("", cards, policy) for cards in deals(policy)])


def best_reply(policy, player):
    """Most that the first player can win (or lose least to the second), over all pure policies of one player."""
    values = []
    for moves in itertools.product((0, 1), repeat=2 * policy.shape[1]):
        pure = policy.copy()
        pure[player] = np.eye(2)[np.array(moves)].reshape(policy.shape[1:])
        values.append(played(pure))
    return max(values) if player == 0 else min(values)


@pytest.mark.parametrize("cards", [3, 4])
def test_value_and_action_values_by_the_rules(cards):
    policies = random_policy(cards, 2)
    np.testing.assert_allclose(value(policies), [played(p) for p in policies], rtol=1e-12)
    found, raw = action_values(policies), action_values(policies, conditional=False)
    for policy, values, counterfactual in zip(policies, np.asarray(found), np.asarray(raw), strict=True):
        for player, card, situation in itertools.product((0, 1), range(cards), (0, 1)):
            history = (("", "pb"), ("p", "b"))[player][situation]
            # The opponent's own move on the way there; chance deals it one of the other cards.
            dealt = [c for c in deals(policy) if c[player] == card]
            moves = {"": None, "pb": policy[1, :, 0, 1], "p": policy[0, :, 0, 0], "b": policy[0, :, 0, 1]}[history]
            reach = np.array([1 if moves is None else moves[c[1 - player]] for c in dealt]) / len(deals(policy))
            for a, move in enumerate("pb"):
                won = (1, -1)[player] * np.array([walk(history + move, c, policy) for c in dealt])
                np.testing.assert_allclose(counterfactual[player, card, situation, a], reach @ won, atol=1e-15)
                np.testing.assert_allclose(values[player, card, situation, a], reach @ won / reach.sum(), atol=1e-14)


def test_exploitability_by_every_pure_reply():
    policy = random_policy(3)
    gains = best_reply(policy, 0) - best_reply(policy, 1)
    np.testing.assert_allclose(exploitability(policy), gains, rtol=1e-12)


def test_uniform_play_and_the_equilibria():
    uniform = kuhn.uniform_policy()
    np.testing.assert_allclose([exploitability(uniform), value(uniform)], [11 / 12, 1 / 8], rtol=1e-14)
    for bluff in (0.0, 0.2, 1 / 3):
        policy = kuhn.equilibrium(bluff)
        np.testing.assert_allclose(exploitability(policy), 0, atol=1e-15)
        np.testing.assert_allclose(value(policy), -1 / 18, rtol=1e-14)
    off = np.array(kuhn.equilibrium(0.2))
    off[0, 0, 0] = 0.5
    assert float(exploitability(off)) > 0.01


def test_a_situation_that_never_comes_up_is_worth_nothing_and_stays():
    policy = random_policy(3)
    policy[0, :, 0] = [1, 0]
    assert (np.asarray(action_values(policy))[1, :, 1] == 0).all()
    after = mirror_descent(policy, beta=1.0)
    np.testing.assert_allclose(np.asarray(after)[1, :, 1], policy[1, :, 1], rtol=1e-14)


def test_updates_are_the_bandits_at_every_information_set():
    policy, ref = random_policy(3, 2)
    values = np.asarray(action_values(policy))
    unnormalised = (policy * ref**0.02 * np.exp(0.2 * values)) ** (1 / 1.02)
    after = magnetic(policy, ref=ref, beta=0.1, step_size=0.2)
    np.testing.assert_allclose(after, unnormalised / unnormalised.sum(-1, keepdims=True), rtol=1e-13)
    same = magnetic(policy, ref=ref, beta=0.0, step_size=0.2)
    np.testing.assert_allclose(mirror_descent(policy, beta=5.0), same, rtol=1e-13)
    twice = magnetic(policy, ref=policy, beta=0.1, step_size=0.2)
    twice = magnetic(twice, ref=policy, beta=0.1, step_size=0.2)
    found = jax.jit(kuhn.mpo, static_argnames="steps")(policy, beta=0.1, step_size=0.2, steps=2)
    np.testing.assert_allclose(found, twice, rtol=1e-13)


def test_only_a_vanishing_or_moving_magnet_finds_the_equilibrium():
    # 3000 steps from uniform play: mirror descent, a fixed magnet, and one whose strength and step fall together.
    uniform = kuhn.uniform_policy()

    @functools.partial(jax.vmap, in_axes=(0, 0, 0))
    def run(beta, step_size, falls):
        def update(policy, step):
            fall = jnp.where(falls, jax.lax.rsqrt(step + 1.0), 1.0)
            return kuhn.magnetic_mirror_descent(policy, ref=uniform, beta=fall * beta, step_size=fall * step_size)

        return game.iterate(update, uniform, 3000)[-1]

    rows = np.array([0.0, 0.05, 1.0]), np.array([0.1, 0.1, 1.0]), np.array([False, False, True])
    mirror, fixed, annealed = np.asarray(exploitability(jax.jit(run)(*rows)))
    moved = np.asarray(
        jax.jit(lambda p: game.iterate(lambda p, _: kuhn.mpo(p, beta=0.1, step_size=0.1, steps=150), p, 20)[-1])(
            uniform
        )
    )
    np.testing.assert_allclose([mirror, fixed, annealed], [0.321, 0.0144, 0.0047], rtol=0.02)
    assert float(exploitability(moved)) < 1e-7
    np.testing.assert_allclose(value(moved), -1 / 18, atol=1e-8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: kuhn.uniform_policy(1), "cards must be at least 2, got 1"),
        (lambda p: kuhn.equilibrium(0.5), r"bluff must lie in \[0, 1/3\], got 0.5"),
        (lambda p: kuhn.mirror_descent(p, beta=0.0), "beta must be a finite number above 0, got 0.0"),
        (lambda p: kuhn.mpo(p, beta=0.0, step_size=1.0, steps=1), "beta must be a finite number above 0, got 0.0"),
        (lambda p: kuhn.mpo(p, beta=1.0, step_size=1.0, steps=0), "steps must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, np.full((2, 3, 2, 2), 0.5))
