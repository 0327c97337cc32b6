import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from jax.sharding import NamedSharding, PartitionSpec
from scipy.special import softmax

from tests.grids import mesh_over
from tiltjax.samplers.best_of_n import best_of_n, init, merge, merge_over, soft_best_of_n, update

REF = np.array([0.30, 0.25, 0.20, 0.15, 0.07, 0.03])
REWARD = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(64, 16)).astype(np.float32)
WHERE = RNG.random((64, 16)) < 0.7


def exact_law(N, beta):
    """P(winner = x) by enumeration of all N-tuples of candidates."""
    law = np.zeros(6)
    for draw in itertools.product(range(6), repeat=N):
        np.add.at(law, list(draw), REF[list(draw)].prod() * softmax(REWARD[list(draw)] / beta))
    return law


soft = jax.jit(soft_best_of_n)  # One program for every beta.


def chi_square(drawn, law):
    expected = law * len(drawn)
    return float((np.square(np.bincount(drawn, minlength=len(law)) - expected) / expected).sum())


def stream(key, reward, chunk, **options):
    """The winner of candidates that arrive ``chunk`` at a time."""
    parts = jnp.moveaxis(jnp.reshape(reward, (*reward.shape[:-1], -1, chunk)), -2, 0)

    def step(winner, part):
        return (update(key, winner, part, **options), None)

    return jax.lax.scan(step, init(reward.shape[:-1]), parts)[0]


class BestOfNTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    def test_is_argmax(self):
        np.testing.assert_array_equal(self.variant(best_of_n)(jnp.asarray(ROWS)), ROWS.argmax(-1))

    @chex.variants(with_jit=True)
    def test_masked_candidates_never_win(self):
        reward = jnp.where(WHERE, ROWS, np.where(RNG.random((64, 16)) < 0.5, np.nan, 1e30))
        out = self.variant(lambda r, w: best_of_n(r, where=w))(reward, jnp.asarray(WHERE))
        np.testing.assert_array_equal(out, np.where(WHERE, ROWS, -np.inf).argmax(-1))

    @chex.variants(with_jit=True)
    def test_first_wins_ties_and_no_candidate_is_zero(self):
        best = self.variant(lambda r, w: best_of_n(r, where=w))
        reward = jnp.asarray([[0.0, 1.0, 1.0], [2.0, 1.0, 2.0], [3.0, 3.0, 3.0], [5.0, 5.0, 5.0]])
        where = jnp.asarray([[True, True, True], [False, True, True], [False, False, False], [True, True, True]])
        np.testing.assert_array_equal(best(reward, where), [1, 2, 0, 0])

    @parameterized.parameters("n", ("pmap",), (("data", "fsdp"),))
    def test_candidates_over_devices_give_the_global_first(self, names):
        reward = np.round(ROWS)  # Many ties, on different devices.
        where = WHERE.copy()
        where[0] = False
        expected = np.where(where, reward, -np.inf).argmax(-1)

        def call(r, w):
            return best_of_n(r, where=w, axis_name=names)

        if names == "pmap":
            parts = [np.moveaxis(x.reshape(64, 8, 2), 1, 0) for x in (reward, where)]
            out = jax.pmap(call, axis_name=names)(*parts)
            np.testing.assert_array_equal(out, np.broadcast_to(expected, (8, 64)))
        else:
            spec = PartitionSpec(None, names)
            over = jax.shard_map(call, mesh=mesh_over(names), in_specs=(spec, spec), out_specs=PartitionSpec())
            np.testing.assert_array_equal(jax.jit(over)(reward, where), expected)


class SoftBestOfNTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    def test_variants_draw_the_same(self):
        draw = self.variant(lambda k, r, w: soft_best_of_n(k, r, beta=0.5, where=w))
        out = np.asarray(draw(jax.random.key(1), ROWS, WHERE))
        np.testing.assert_array_equal(out, soft(jax.random.key(1), ROWS, beta=0.5, where=WHERE))
        assert WHERE[np.arange(64), out].all()


def test_huge_exponents_follow_the_softmax():
    for scale, beta in ((1e5, 1.0), (-1e5, 1.0), (1.0, 1e-5), (1e5, 1e5), (1.6e7, 1.0)):
        reward = jnp.broadcast_to(jnp.asarray(np.float32([scale, scale - beta, scale - 2 * beta])), (20000, 3))
        out = soft(jax.random.key(3), reward, beta=beta)
        law = softmax(np.asarray(reward[0], np.float64) / beta)
        assert chi_square(np.asarray(out), law) < 16, (scale, beta)


def test_masked_is_sliced_and_no_candidate_is_zero():
    where = np.broadcast_to(np.arange(16) < 9, (64, 16)).copy()
    where[0] = False
    out = soft(jax.random.key(1), np.where(where, ROWS, np.nan), beta=0.5, where=where)
    sliced = soft(jax.random.key(1), jnp.asarray(ROWS[:, :9]), beta=0.5)
    np.testing.assert_array_equal(out[1:], sliced[1:])
    assert int(out[0]) == 0


@pytest.mark.parametrize(("N", "beta"), [(1, 0.5), (2, 0.2), (4, 0.2), (4, 1.0)])
def test_law_of_the_standard_bandit(N, beta):
    law = exact_law(N, beta)
    drawn = np.random.default_rng(5 + N).choice(6, size=(200_000, N), p=REF)
    index = soft(jax.random.key(N), jnp.asarray(REWARD[drawn], jnp.float32), beta=beta)
    statistic = chi_square(drawn[np.arange(len(drawn)), np.asarray(index)], law)
    assert statistic < 25, statistic
    if N == 4 and beta == 0.2:  # The test has power: neither the tilt nor the softmax without reference passes.
        tilt = REF * np.exp(REWARD / beta)
        assert chi_square(drawn[np.arange(len(drawn)), np.asarray(index)], tilt / tilt.sum()) > 1000


def test_limits_of_beta():
    reward = jnp.asarray(ROWS)
    cold = soft(jax.random.key(0), reward, beta=1e-6)
    np.testing.assert_array_equal(cold, best_of_n(reward))
    hot = soft(jax.random.key(0), jnp.broadcast_to(reward[0], (20000, 16)), beta=1e6)
    assert chi_square(np.asarray(hot), np.full(16, 1 / 16)) < 45  # 15 df


def test_beta_per_prompt():
    beta = jnp.where(jnp.arange(64) < 32, 0.1, 5.0)
    out = soft(jax.random.key(0), jnp.asarray(ROWS), beta=beta)
    np.testing.assert_array_equal(out[:32], soft(jax.random.key(0), jnp.asarray(ROWS), beta=0.1)[:32])
    np.testing.assert_array_equal(out[32:], soft(jax.random.key(0), jnp.asarray(ROWS), beta=5.0)[32:])


def arrangements():
    """Programs ``(key, reward [128, 32], where, beta) -> index`` over devices and over time."""

    def over(k, r, w, beta, names="n"):
        return soft_best_of_n(k, r, beta=beta, where=w, axis_name=names)

    def mapped(names):
        spec, whole = PartitionSpec(None, names), PartitionSpec()
        run = functools.partial(over, names=names)
        return jax.jit(jax.shard_map(run, mesh=mesh_over(names), in_specs=(whole, spec, spec, whole), out_specs=whole))

    def split(x):
        return np.moveaxis(np.reshape(x, (128, 8, 4)), 1, 0)

    pmapped = jax.pmap(over, axis_name="n", in_axes=(None, 0, 0, None))
    sharding = NamedSharding(mesh_over("n"), PartitionSpec(None, "n"))

    def put(x):
        return jax.device_put(x, sharding)

    def chunked(chunk):
        run = jax.jit(lambda k, r, beta: stream(k, r, chunk, beta=beta).index)
        return lambda k, r, w, beta: run(k, np.where(w, r, np.nan), beta)

    return {
        "shard_map": mapped("n"),
        "shard_map over two axes": mapped(("data", "fsdp")),
        "all of pmap": lambda k, r, w, beta: pmapped(k, split(r), split(w), beta),
        "sharded jit": lambda k, r, w, beta: soft(k, put(r), beta=beta, where=put(w)),
        "chunks of 1": chunked(1),
        "chunks of 16": chunked(16),
    }


def test_winners_are_identical_in_every_arrangement():
    programs = arrangements()
    for shift, beta in [(0.0, 0.3), (1e5, 1.0), (0.0, 1e-5), (-3e4, 0.3)]:
        rng = np.random.default_rng(7)
        # Rewards on a grid: many exact ties, which only the noise decides.
        reward = (shift + np.round(rng.normal(size=(128, 32)) * 2) * max(beta, 2.0**-7)).astype(np.float32)
        where = rng.random((128, 32)) < 0.9
        once = np.asarray(soft(jax.random.key(11), reward, beta=beta, where=where))
        assert len(set(once)) > 5
        for name, program in programs.items():
            out = program(jax.random.key(11), reward, where, jnp.float32(beta))
            np.testing.assert_array_equal(
                out, np.broadcast_to(once, out.shape), err_msg=f"{name}, shift {shift}, beta {beta}"
            )


def test_payload_follows_the_winner_and_merge_is_order_free():
    key = jax.random.key(2)
    reward = jnp.asarray(ROWS)
    tokens = jnp.asarray(RNG.integers(0, 99, (64, 16, 5)), jnp.int32)
    done = tokens[..., 0] % 2 == 0
    like = {"tokens": tokens[:, 0], "done": done[:, 0]}

    @jax.jit
    def both_orders(reward, payload):
        def part(low, high):
            part = jax.tree.map(lambda x: x[:, low:high], payload)
            return update(key, init((64,), start=low, payload=like), reward[:, low:high], beta=0.4, payload=part)

        a, b, c = part(0, 3), part(3, 10), part(10, 16)
        return merge(merge(a, b), c), merge(c, merge(b, a)), merge(init((64,), payload=like), b), b

    winner, other, with_none, alone = both_orders(reward, {"tokens": tokens, "done": done})
    chex.assert_trees_all_equal(winner, other)
    chex.assert_trees_all_equal(with_none, alone)
    index = np.asarray(soft(key, reward, beta=0.4))
    np.testing.assert_array_equal(winner.index, index)
    np.testing.assert_array_equal(winner.payload["tokens"], tokens[np.arange(64), index])
    np.testing.assert_array_equal(winner.payload["done"], done[np.arange(64), index])
    assert int(winner.count) == 16


def test_streams_on_eight_devices_agree_on_one_winner():
    key = jax.random.key(4)
    reward = jnp.asarray(np.concatenate([ROWS] * 4, axis=1))  # 64 candidates: 8 devices, 2 chunks.
    tokens = jnp.asarray(RNG.integers(0, 99, (64, 64, 3)), jnp.int32)

    def device(reward, tokens):
        start = jax.lax.axis_index("n") * 8
        winner = init((64,), start=start, payload=tokens[:, 0])
        for chunk in (slice(0, 5), slice(5, 8)):
            winner = update(key, winner, reward[:, chunk], beta=0.4, payload=tokens[:, chunk])
        return merge_over(winner, axis_name="n")

    parts = [jnp.moveaxis(x.reshape(64, 8, 8, *x.shape[2:]), 1, 0) for x in (reward, tokens)]
    winner = jax.pmap(device, axis_name="n")(*parts)
    index = np.asarray(soft(key, reward, beta=0.4))
    for device_index in (0, 7):
        np.testing.assert_array_equal(winner.index[device_index], index)
        np.testing.assert_array_equal(winner.payload[device_index], tokens[np.arange(64), index])
        np.testing.assert_array_equal(winner.reward[device_index], reward[np.arange(64), index])
    nobody = jax.pmap(lambda x: merge_over(init((3,), payload=x), axis_name="n"), axis_name="n")(np.zeros((8, 3)))
    chex.assert_trees_all_equal((nobody.index, nobody.payload), (jnp.zeros((8, 3), jnp.int32), jnp.zeros((8, 3))))


def test_memory_of_the_stream_does_not_grow():
    step = jax.jit(lambda key, winner, reward: update(key, winner, reward, beta=1.0))
    shapes = jax.eval_shape(step, jax.random.key(0), init((3,)), jnp.zeros((3, 1000)))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, init((3,)))


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_bad_beta_is_named(beta):
    with pytest.raises(ValueError, match=r"beta must be a finite number above 0, got"):
        soft_best_of_n(jax.random.key(0), jnp.zeros(3), beta=beta)
