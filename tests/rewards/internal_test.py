import collections
import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy.special import log_softmax, softmax

from tiltjax.ops.tokens import token_logp
from tiltjax.rewards.internal import (
    cluster_answers,
    empo_reward,
    majority_vote,
    self_certainty,
    semantic_entropy,
    sequence_entropy_reward,
    token_entropy_reward,
    token_mean,
    ttrl_reward,
)
from tiltjax.rewards.verifiers import math_reward

DIRECTIONS = ("policy_to_uniform", "uniform_to_policy")
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 3, 4, 7)) * 2
WHERE = np.arange(4) < np.array([[0, 1, 4], [2, 3, 4]])[..., None]
ANSWER = RNG.integers(-1, 3, (40, 6))
REAL = RNG.random((40, 6)) < 0.7
REAL[0] = False


def kl(p, q):
    return np.sum(p * np.log(p / q), axis=-1)


def certainty(logits, direction):
    p = softmax(np.float64(logits), axis=-1)
    uniform = np.full_like(p, 1 / p.shape[-1])
    return kl(p, uniform) if direction == "policy_to_uniform" else kl(uniform, p)


def row_mean(value, where):
    return np.sum(np.where(where, value, 0), -1) / np.maximum(where.sum(-1), 1)


class SelfCertaintyTest(chex.TestCase):
    @chex.variants(with_jit=True)
    @parameterized.parameters(*DIRECTIONS)
    def test_is_the_mean_divergence_over_the_real_tokens_and_the_real_vocabulary(self, direction):
        dirty = np.where(WHERE[..., None], np.concatenate([LOGITS, np.full((2, 3, 4, 2), 50.0)], -1), np.nan)
        call = self.variant(lambda x, w: self_certainty(x, direction=direction, where=w, vocabulary=7))
        out = call(np.float32(dirty), WHERE)
        np.testing.assert_allclose(out, row_mean(certainty(LOGITS, direction), WHERE), rtol=1e-5, atol=1e-6)
        assert out[0, 0] == 0
        assert np.abs(np.asarray(out).ravel()[1:]).min() > 0.1
        order = [8, 3, 1, 0, 7, 2, 6, 4, 5]
        real = jnp.asarray([v < 7 for v in order])
        shuffled = self_certainty(np.float32(dirty[..., order]), direction=direction, where=WHERE, vocabulary=real)
        np.testing.assert_allclose(shuffled, out, rtol=1e-5, atol=1e-6)


def test_the_two_directions_differ_and_only_one_is_bounded():
    logits = jnp.asarray([[0.0, 0.0, -300.0]])
    assert abs(float(self_certainty(logits, direction="uniform_to_policy")) - (100 + np.log(2) - np.log(3))) < 1e-4
    assert abs(float(self_certainty(logits, direction="policy_to_uniform")) - np.log(1.5)) < 1e-6
    impossible = jnp.asarray([[0.0, 0.0, -jnp.inf]])
    assert float(self_certainty(impossible, direction="uniform_to_policy")) == np.inf
    assert abs(float(self_certainty(impossible, direction="policy_to_uniform")) - np.log(1.5)) < 1e-6


def test_padding_left_in_the_vocabulary_is_taken_for_certainty():
    padded = jnp.concatenate([jnp.zeros((1, 4)), jnp.full((1, 4), -1e4)], axis=-1)
    for direction, wrong in (("uniform_to_policy", 5000 - np.log(2)), ("policy_to_uniform", np.log(2))):
        np.testing.assert_allclose(self_certainty(padded, direction=direction), wrong, rtol=1e-6)
        np.testing.assert_allclose(self_certainty(padded, direction=direction, vocabulary=4), 0, atol=1e-6)


def test_the_fields_of_one_pass_over_the_vocabulary_give_the_same_rewards():
    hidden, head = np.float32(RNG.normal(size=(3, 4, 5))), np.float32(RNG.normal(size=(7, 5)))
    token, where = RNG.integers(0, 7, (3, 4)), jnp.asarray(WHERE[0])
    stats = jax.jit(token_logp)(hidden, head, token)
    logits = hidden @ head.T
    intuitor = self_certainty(logits, direction="uniform_to_policy", where=where)
    np.testing.assert_allclose(token_mean(stats.self_certainty, where=where), intuitor, rtol=1e-4, atol=1e-6)
    sharp = self_certainty(logits, direction="policy_to_uniform", where=where)
    mean = token_entropy_reward(stats.entropy, where=where)
    np.testing.assert_allclose(np.log(7) + np.asarray(mean)[1:], sharp[1:], rtol=1e-4)
    total = token_entropy_reward(stats.entropy, where=where, reduce="sum")
    np.testing.assert_allclose(total, mean * where.sum(-1), rtol=1e-5)
    assert float(mean[0]) == 0
    np.testing.assert_allclose(token_entropy_reward(stats.entropy), -stats.entropy.mean(-1), rtol=1e-6)


def test_every_reward_of_the_policy_is_detached():
    where = jnp.asarray(WHERE[0])

    def total(x):
        parts = [self_certainty(x, direction=direction, where=where) for direction in DIRECTIONS]
        parts += [token_entropy_reward(x[..., 0], where=where, reduce=reduce) for reduce in ("mean", "sum")]
        return jnp.sum(jnp.stack([*parts, token_mean(x[..., 1]), sequence_entropy_reward(x[:, 0, 2])]))

    chex.assert_trees_all_equal(jax.jit(jax.grad(total))(jnp.full((3, 4, 7), jnp.nan)), jnp.zeros((3, 4, 7)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": "forward"}, "direction must be one of policy_to_uniform, uniform_to_policy; got 'forward'"),
        ({"direction": DIRECTIONS[0], "vocabulary": 8}, "vocabulary must lie in 1 to 7, .*; got 8"),
        ({"direction": DIRECTIONS[0], "vocabulary": 0}, "vocabulary must lie in 1 to 7, .*; got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        self_certainty(jnp.zeros((2, 7)), **options)


def test_bad_reduction():
    with pytest.raises(ValueError, match="reduce must be one of mean, sum; got 'max'"):
        token_entropy_reward(jnp.zeros((2, 7)), reduce="max")
    with pytest.raises(TypeError, match="direction"):
        self_certainty(jnp.zeros((2, 7)))


# A policy on all completions of length 3 over 3 tokens: logits of the 1 + 3 + 9 prefixes.
PATHS = np.array(list(itertools.product(range(3), repeat=3)))
NODES = np.stack([np.zeros(27, int), 1 + PATHS[:, 0], 4 + 3 * PATHS[:, 0] + PATHS[:, 1]], axis=-1)
TREE = np.random.default_rng(1).normal(size=(13, 3)) * 3


def tree_logp(table):
    return log_softmax(table, axis=-1)[NODES, PATHS].sum(-1)


def mean_certainty(policy, rewarding, direction):
    """``E_policy u`` with ``u`` that of another policy, in NumPy."""
    return np.exp(tree_logp(policy)) @ certainty(rewarding[NODES], direction).mean(-1)


def numerical_gradient(function, at, step=1e-5):
    out = np.zeros_like(at)
    for index in np.ndindex(*at.shape):
        e = np.zeros_like(at)
        e[index] = step
        out[index] = (function(at + e) - function(at - e)) / (2 * step)
    return out


def expected_policy_gradient(reward):
    """Gradient of ``sum_y pi(y) reward(pi)(y)``, as an RL step with infinitely many samples takes it."""

    def objective(table):
        logp = jax.nn.log_softmax(table)[NODES, PATHS].sum(-1)
        return jnp.sum(jnp.exp(logp) * reward(table, logp))

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(objective))(jnp.asarray(TREE)))


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_detached_certainty_has_the_right_mean_and_a_part_of_the_gradient(direction):
    value, grad = expected_policy_gradient(lambda table, _: self_certainty(table[NODES], direction=direction))
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, mean_certainty(TREE, TREE, direction), rtol=1e-12)
    if direction == "policy_to_uniform":
        entropy = -np.exp(tree_logp(TREE)) @ tree_logp(TREE)
        np.testing.assert_allclose(value, np.log(3) - entropy / 3, rtol=1e-12)
    partial = numerical_gradient(lambda policy: mean_certainty(policy, TREE, direction), TREE)
    whole = numerical_gradient(lambda policy: mean_certainty(policy, policy, direction), TREE)
    np.testing.assert_allclose(grad, partial, atol=1e-9)
    assert np.abs(grad - whole).max() > np.abs(grad).max() / 2 > 0.01
    # No token after the last position: nothing is learned there, nor from completions of one token.
    np.testing.assert_allclose(grad[4:], 0, atol=1e-15)
    assert np.abs(whole[4:]).max() > 0.01


def test_the_detached_log_probability_has_the_gradient_of_minus_the_entropy():
    value, grad = expected_policy_gradient(lambda _, logp: sequence_entropy_reward(logp))
    negentropy = lambda table: np.exp(tree_logp(table)) @ tree_logp(table)
    np.testing.assert_allclose(value, negentropy(TREE), rtol=1e-12)
    np.testing.assert_allclose(grad, numerical_gradient(negentropy, TREE), atol=1e-9)
    assert np.abs(grad).max() > 0.1


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_completions_of_one_token_teach_nothing(direction):
    def objective(logits):
        every = jnp.broadcast_to(logits, (5, 1, 5))  # the same position, whichever token follows
        return jnp.sum(jax.nn.softmax(logits) * self_certainty(every, direction=direction))

    logits = jnp.asarray(np.float32(RNG.normal(size=5)))
    np.testing.assert_allclose(jax.jit(jax.grad(objective))(logits), 0, atol=1e-7)


def counted(answer, real):
    """The four kernels on one row, by `collections.Counter`."""
    seen = [int(a) for a, r in zip(answer, real, strict=True) if r]
    counts = collections.Counter(a for a in seen if a >= 0)
    winner, most = counts.most_common(1)[0] if counts else (-1, 0)
    n = max(len(seen), 1)
    sizes = [*counts.values(), *[1] * sum(a < 0 for a in seen)]
    entropy = sum(-s / n * math.log(s / n) for s in sizes)
    shares = [counts[int(a)] / n if r and most > 1 else 0 for a, r in zip(answer, real, strict=True)]
    return (
        winner,
        most / n,
        entropy,
        shares,
        [float(r and a >= 0 and a == winner) for a, r in zip(answer, real, strict=True)],
    )


def every_kernel(answer, where=None):
    vote = majority_vote(answer, where=where)
    shares, hits = empo_reward(answer, where=where), ttrl_reward(answer, where=where)
    return vote.answer, vote.share, semantic_entropy(answer, where=where), shares, hits


class VoteTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_is_a_count(self):
        out = self.variant(every_kernel)(jnp.asarray(ANSWER), jnp.asarray(REAL))
        for row, want in enumerate(counted(a, r) for a, r in zip(ANSWER, REAL, strict=True)):
            for value, exact in zip(out, want, strict=True):
                np.testing.assert_allclose(value[row], exact, rtol=1e-6, atol=1e-6)
        assert {x.dtype for x in out[1:]} == {np.dtype("float32")}

    def test_unparsable_never_win_whatever_their_ids(self):
        answer = jnp.asarray([[-2, -2, -2, 4], [-1, -1, -1, -1]])
        winner, share, entropy, shares, hits = jax.jit(every_kernel)(answer)
        assert (winner.tolist(), share.tolist()) == ([4, -1], [0.25, 0.0])
        assert hits.tolist() == [[0.0, 0.0, 0.0, 1.0], [0.0] * 4]
        np.testing.assert_allclose(entropy, np.log(4), rtol=1e-6)
        assert not np.any(shares)


def test_thresholds_are_strict_and_work_on_whole_groups():
    cluster = jnp.asarray([[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 2, 3]])
    entropy = np.asarray(jax.jit(semantic_entropy)(cluster))
    assert entropy[0] == 0
    compiled = jax.jit(empo_reward)
    kept = lambda **limits: np.asarray(compiled(cluster, **limits)).any(-1).tolist()
    assert kept() == [True, True, True, False]
    assert kept(min_entropy=jnp.float32(0)) == [False, True, True, False]
    assert kept(max_entropy=1.0) == [True, True, False, False]
    assert kept(min_entropy=0.5, max_entropy=1.2) == [False, True, True, False]


def vote_law(p, N):
    """Chance that the majority of N draws is arm 0, and the share of right rewards, over multinomial counts."""
    label = reward = 0.0
    for counts in itertools.product(range(N + 1), repeat=len(p)):
        if sum(counts) == N:
            ways = math.factorial(N) / math.prod(map(math.factorial, counts))
            chance = ways * math.prod(q**c for q, c in zip(p, counts, strict=True))
            tied = [k for k, c in enumerate(counts) if c == max(counts)]
            for winner in tied:  # exchangeable draws: each of them is seen first equally often
                right = N if winner == 0 else N - counts[0] - counts[winner]
                label, reward = label + chance / len(tied) * (winner == 0), reward + chance / len(tied) * right / N
    return label, reward


@pytest.fixture(scope="module")
def votes_of():
    """``votes_of(K)``: all sequences of 8 answers of K kinds, and whether label and rewards are right if 0 is."""

    def outcome(answer):
        hits = ttrl_reward(answer)
        return majority_vote(answer).answer == 0, jnp.mean(jnp.where(hits == (answer == 0), 1.0, 0.0), axis=-1)

    def of(K):
        draws = np.stack(np.unravel_index(np.arange(K**8), (K,) * 8), axis=-1).astype(np.int32)
        return draws, *map(np.asarray, jax.jit(outcome)(draws))

    known = {K: of(K) for K in (2, 5)}
    return known.__getitem__


@pytest.mark.parametrize(
    ("p", "figures"),
    [
        ((0.3, 0.4, 0.1, 0.1, 0.1), (0.3261, 0.5237)),
        ((0.2,) * 5, (0.2000, 0.5617)),
        ((0.4, 0.6), (0.2898, 0.2898)),  # no third answer, so no lucky hit
        ((0.25, 0.15, 0.3, 0.2, 0.1), None),
        ((0.7, 0.3), None),
    ],
)
def test_accuracy_of_labels_and_rewards_over_all_draws(p, figures, votes_of):
    draws, label, reward = votes_of(len(p))
    chance = np.asarray(p)[draws].prod(-1)
    out = chance @ label, chance @ np.float64(reward)
    np.testing.assert_allclose(out, vote_law(p, 8), rtol=1e-6)
    if figures is not None:
        np.testing.assert_allclose(out, figures, atol=5.1e-5)


def test_answers_become_ids_in_order_of_first_appearance():
    ids = cluster_answers(["b", None, "a", " b ", "", "a", "\n", "c"])
    assert ids.tolist() == [0, -1, 1, 0, -1, 1, -1, 2]
    assert ids.dtype == np.int32
    assert cluster_answers([]).shape == (0,)


def test_equivalence_is_asked_of_the_first_member_of_each_cluster_once_per_text():
    asked = []

    def close(a, b):
        asked.append((a, b))
        return abs(int(a) - int(b)) <= 1

    assert cluster_answers(["1", "2", "3", "2", "3", None], equivalent=close).tolist() == [0, 0, 1, 0, 1, -1]
    assert asked == [("1", "2"), ("1", "3")]


def test_the_mathematics_verifier_is_an_equivalence():
    verify = math_reward()
    same = lambda a, b: verify([""], [f"<answer>{b}</answer>"], [a]) == [1.0]
    ids = cluster_answers([r"\frac{1}{2}", "0.5", "2", None, r"\frac{2}{4}"], equivalent=same)
    assert ids.tolist() == [0, 0, 1, -1, 0]
    assert ttrl_reward(jnp.asarray(ids)).tolist() == [1.0, 1.0, 0.0, 0.0, 1.0]
