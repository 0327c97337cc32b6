import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.exact.tree.worlds import random_levels, random_reward, sequence_logp, x64  # noqa: F401
from tiltjax.exact import bandit, tree

V, H, K, WORLDS = 3, 4, 81, 48
REF, REWARD = random_levels(0, H=H, batch=(WORLDS,)), random_reward(1, K=K, batch=(WORLDS,))
BEST = REWARD.max(-1)

beam_search = jax.jit(tree.beam_search, static_argnames="width")
lookahead_search = jax.jit(tree.lookahead_search, static_argnames="depth")
blockwise_law = jax.jit(tree.blockwise_best_of_n_law, static_argnames="block")


@pytest.fixture(scope="module")
def values():
    with jax.enable_x64(True):
        mean, best = jax.jit(lambda *w: (tree.mean_values(*w), tree.max_values(*w)))(REF, REWARD)
        return {"mean": mean, "max": best}


def reward_of(found):
    return np.take_along_axis(REWARD, np.asarray(found)[:, None], -1)[:, 0]


def beam_by_hand(values, width):
    beam = [()]
    for t in range(1, H + 1):
        place = lambda s: int(np.dot(s, V ** np.arange(len(s))[::-1]))
        children = [(*s, z) for s in beam for z in range(V)]
        beam = sorted(children, key=lambda s: -values[t][place(s)])[:width]
    return place(beam[0])


def lookahead_by_hand(values, depth):
    s = ()
    for t in range(H):
        reach = min(depth, H - t - 1)

        place = V ** np.arange(t + 1 + reach)[::-1]
        ends = list(itertools.product(range(V), repeat=reach))
        promise = [max(values[t + 1 + reach][np.dot((*s, z, *e), place)] for e in ends) for z in range(V)]
        s = (*s, int(np.argmax(promise)))
    return int(np.dot(s, V ** np.arange(H)[::-1]))


@pytest.mark.usefixtures("x64")
class TestBeamAndLookahead:
    def test_are_what_a_loop_finds(self, values):
        worlds = [[np.asarray(v)[world] for v in values["mean"]] for world in range(12)]
        for width in (1, 2, 5, 100):
            found = beam_search(values["mean"], width=width)
            np.testing.assert_array_equal(found[:12], [beam_by_hand(one, width) for one in worlds])
        for depth in (0, 1, 7):
            found = lookahead_search(values["mean"], depth=depth)
            np.testing.assert_array_equal(found[:12], [lookahead_by_hand(one, depth) for one in worlds])

    def test_with_the_largest_reachable_reward_greedy_search_is_exact(self, values):
        np.testing.assert_array_equal(reward_of(beam_search(values["max"], width=1)), BEST)
        np.testing.assert_array_equal(reward_of(lookahead_search(values["max"], depth=0)), BEST)

    def test_with_mean_values_it_falls_short_and_breadth_or_depth_mends_it(self, values):
        beams = [reward_of(beam_search(values["mean"], width=w)) for w in (1, 3, V ** (H - 1))]
        depths = [reward_of(lookahead_search(values["mean"], depth=d)) for d in (0, 1, H - 1)]
        np.testing.assert_array_equal(beams[0], depths[0])
        for searches in (beams, depths):
            np.testing.assert_array_equal(searches[-1], BEST)
            assert searches[0].mean() + 0.05 < searches[1].mean() < BEST.mean() - 0.05

    def test_a_forbidden_prefix_is_taken_only_where_there_is_no_other(self):
        values = [jnp.zeros(1), jnp.array([-jnp.inf, -1.0]), jnp.array([9.0, 9.0, -2.0, -jnp.inf])]
        assert int(beam_search(values, width=1)) == 2
        assert int(lookahead_search(values, depth=0)) == 2


@pytest.mark.usefixtures("x64")
class TestBlockwise:
    REF, REWARD = random_levels(2, V=2, H=4), random_reward(3, K=16)
    VALUES = (np.array([0.0]), *(np.random.default_rng(t).normal(size=2**t) for t in (1, 2, 3)), REWARD)

    def test_is_the_enumeration_of_all_draws(self):
        """Blocks of three tokens and then of one, the best of two draws each time."""
        p = np.exp(sequence_logp(self.REF))
        first = p.reshape(8, 2).sum(-1)
        expected = np.zeros(16)
        for a, b in itertools.product(range(8), repeat=2):
            s = a if self.VALUES[3][a] >= self.VALUES[3][b] else b
            for c, d in itertools.product(range(2), repeat=2):
                y = max(2 * s + c, 2 * s + d, key=lambda y: self.REWARD[y])
                expected[y] += first[a] * first[b] * p[2 * s + c] * p[2 * s + d] / first[s] ** 2
        found = blockwise_law(self.REF, self.VALUES, n=2, block=3)
        np.testing.assert_allclose(found, expected, atol=1e-15)

    def test_whole_completions_are_best_of_n_and_one_draw_is_the_reference(self):
        p = jnp.exp(sequence_logp(self.REF))
        law = lambda n, block: blockwise_law(self.REF, self.VALUES, n=n, block=block)
        np.testing.assert_allclose(law(5, 4), jax.jit(bandit.best_of_n_law)(p, self.REWARD, n=5), atol=1e-15)
        np.testing.assert_allclose(law(1, 1), p, atol=1e-15)
        assert law(1000, 1)[int(beam_search(self.VALUES, width=1))] > 0.999


@pytest.mark.usefixtures("x64")
class TestUct:
    @staticmethod
    @jax.jit
    def search(ref, reward, num_simulations):
        one = lambda key: tree.uct_search(key, ref, reward, num_simulations=num_simulations, exploration=4.0)
        return jax.vmap(one)(jax.random.split(jax.random.key(0), 16))

    def test_comes_to_the_optimum(self):
        # A world where the tokens best on average lead away from the best completion.
        world = int(np.argmin(reward_of(beam_search(jax.jit(tree.mean_values)(REF, REWARD), width=1)) - BEST))
        ref, reward = [jnp.asarray(level[world]) for level in REF], jnp.asarray(REWARD[world])
        means = [float(reward[self.search(ref, reward, n)].mean()) for n in (1, 30, 3000)]
        assert means[0] < means[1] < means[2]
        np.testing.assert_allclose(means[2], BEST[world], atol=0.02)

    def test_never_writes_what_the_reference_cannot(self):
        ref = [level[0].copy() for level in REF]
        ref[1][:, 0] = -np.inf
        ref[1] -= np.log(np.exp(ref[1]).sum(-1, keepdims=True))
        possible = np.arange(K) // 9 % 3 != 0
        reward = jnp.where(possible, REWARD[0], 100.0)
        for n in (2, 3000):
            assert possible[np.asarray(self.search([jnp.asarray(x) for x in ref], reward, n))].all()
        found = np.asarray(reward)[np.asarray(self.search([jnp.asarray(x) for x in ref], reward, 3000))]
        assert found.mean() > REWARD[0][possible].max() - 0.1


def test_bad_options_are_named():
    values = [jnp.zeros(2**t) for t in range(3)]
    ref = [jnp.zeros((2**t, 2)) - jnp.log(2.0) for t in range(2)]
    key = jax.random.key(0)
    calls = {
        "width must be at least 1, got 0": lambda: tree.beam_search(values, width=0),
        "depth must be at least 0, got -1": lambda: tree.lookahead_search(values, depth=-1),
        "n must be at least 1, got 0": lambda: tree.blockwise_best_of_n_law(ref, values, n=0, block=1),
        "block must be at least 1, got 0": lambda: tree.blockwise_best_of_n_law(ref, values, n=1, block=0),
        "num_simulations must be at least 1, got 0": lambda: tree.uct_search(
            key, ref, values[2], num_simulations=0, exploration=1.0
        ),
        "exploration must be a finite number above 0, got 0.0": lambda: tree.uct_search(
            key, ref, values[2], num_simulations=1, exploration=0.0
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message):
            call()
