import jax
import numpy as np
import pytest
from scipy.special import logsumexp, rel_entr

from tests.exact.tree.worlds import TOKENS, H, K, V, random_levels, random_reward, sequence_logp, tilt, x64  # noqa: F401
from tiltjax.exact import bandit, tree
from tiltjax.losses.process import implicit_q

soft_values, tilted_policy = jax.jit(tree.soft_values), jax.jit(tree.tilted_policy)
mean_values, max_values = jax.jit(tree.mean_values), jax.jit(tree.max_values)
implicit_values, regularised_reward = jax.jit(tree.implicit_values), jax.jit(tree.regularised_reward)
log_partition, token_sum = jax.jit(bandit.log_partition), jax.jit(tree.sequence_logp)

REF, REWARD = random_levels(0), random_reward(1)
REF_LOGP = sequence_logp(REF)


def given_prefix(ref_logp, fn, t):
    """``fn(law of the completions, their indices)`` of every prefix of ``t`` tokens."""
    p = np.exp(ref_logp).reshape(V**t, -1)
    return np.array([fn(row / row.sum(), slice(i * p.shape[1], (i + 1) * p.shape[1])) for i, row in enumerate(p)])


@pytest.mark.usefixtures("x64")
class TestValues:
    @pytest.mark.parametrize("beta", [0.05, 0.7, 20.0])
    def test_soft_values_are_conditional_log_partitions(self, beta):
        values = soft_values(REF, REWARD, beta=beta)
        assert [v.shape for v in values] == [(V**t,) for t in range(H + 1)]
        for t in range(H + 1):
            expected = given_prefix(REF_LOGP, lambda p, y: beta * logsumexp(REWARD[y] / beta, b=p), t)
            np.testing.assert_allclose(values[t], expected, atol=1e-13)
        log_z = log_partition(np.exp(REF_LOGP), REWARD, beta=beta)
        np.testing.assert_allclose(np.asarray(values[0])[0], beta * log_z, atol=1e-13)

    def test_mean_and_max_values_and_the_limits_of_the_soft_ones(self):
        mean, best = mean_values(REF, REWARD), max_values(REF, REWARD)
        cold, hot = (soft_values(REF, REWARD, beta=beta) for beta in (1e-4, 1e8))
        for t in range(H + 1):
            np.testing.assert_allclose(mean[t], given_prefix(REF_LOGP, lambda p, y: p @ REWARD[y], t), atol=1e-14)
            np.testing.assert_array_equal(best[t], REWARD.reshape(V**t, -1).max(-1))
            np.testing.assert_allclose(cold[t], best[t], atol=5e-3)
            np.testing.assert_allclose(hot[t], mean[t], atol=1e-6)

    def test_rewards_per_token_are_the_textbook_recursion_on_what_is_still_to_come(self):
        rng, beta = np.random.default_rng(5), 0.6
        tokens = [rng.normal(size=level.shape) for level in REF]
        to_go, expected_policy = np.zeros(K), []
        to_go_levels = [to_go]
        for logp, r in zip(REF[::-1], tokens[::-1], strict=True):
            q = r + to_go.reshape(r.shape)
            to_go = beta * logsumexp(logp + q / beta, axis=-1)
            expected_policy.insert(0, logp + (q - to_go[:, None]) / beta)
            to_go_levels.insert(0, to_go)
        total, earned = jax.jit(lambda tokens: (tree.total_reward(tokens), tree.path_sums(tokens)))(tokens)
        values = soft_values(REF, total, beta=beta)
        for value, before, after in zip(values, earned, to_go_levels, strict=True):
            np.testing.assert_allclose(value, np.asarray(before) + after, atol=1e-13)
        for found, level in zip(tilted_policy(REF, values, beta=beta), expected_policy, strict=True):
            np.testing.assert_allclose(found, level, atol=1e-13)

    def test_impossible_tokens_are_never_read(self):
        hole = [level.copy() for level in REF]
        hole[1][2] = [np.log(0.25), np.log(0.75), -np.inf]
        reward = REWARD.copy()
        reward[[24, 25, 26]] = 1e3
        p = np.exp(sequence_logp(hole))
        assert p[24:].sum() == 0
        real = np.where(p > 0, reward, 0)
        for t in (0, 1):
            soft = given_prefix(sequence_logp(hole), lambda q, y: 0.5 * logsumexp(real[y] / 0.5, b=q), t)
            np.testing.assert_allclose(soft_values(hole, reward, beta=0.5)[t], soft, atol=1e-13)
            mean = given_prefix(sequence_logp(hole), lambda q, y: q @ real[y], t)
            np.testing.assert_allclose(mean_values(hole, reward)[t], mean, atol=1e-13)
            best = given_prefix(sequence_logp(hole), lambda q, y: reward[y][q > 0].max(), t)
            np.testing.assert_array_equal(max_values(hole, reward)[t], best)

    def test_a_batch_is_its_rows(self):
        ref, reward = random_levels(3, batch=(2,)), random_reward(4, batch=(2,))
        both = tilted_policy(ref, soft_values(ref, reward, beta=0.5), beta=0.5)
        for row in range(2):
            one = [level[row] for level in ref]
            alone = tilted_policy(one, soft_values(one, reward[row], beta=0.5), beta=0.5)
            for found, level in zip(both, alone, strict=True):
                np.testing.assert_allclose(np.asarray(found)[row], level, atol=1e-14)


@pytest.mark.usefixtures("x64")
class TestOptimum:
    @pytest.mark.parametrize("beta", [0.05, 1.0])
    def test_tilting_every_token_tilts_the_completion(self, beta):
        values = soft_values(REF, REWARD, beta=beta)
        logp = token_sum(tilted_policy(REF, values, beta=beta))
        np.testing.assert_allclose(np.exp(logp), tilt(REF_LOGP, REWARD, beta), atol=2e-15)
        whole = jax.jit(bandit.tilted)(np.exp(REF_LOGP), REWARD, beta=beta)
        np.testing.assert_allclose(np.exp(logp), whole, atol=2e-15)

    def test_log_ratios_telescope_to_differences_of_values(self):
        values = soft_values(REF, REWARD, beta=0.3)
        optimum = tilted_policy(REF, values, beta=0.3)
        values = [np.asarray(value) for value in values]
        for q, value in zip(implicit_values(optimum, REF, beta=0.3), values, strict=True):
            np.testing.assert_allclose(q, value - values[0], atol=1e-14)

    def test_gibbs_identity(self):
        target = tilt(REF_LOGP, REWARD, 0.8)
        best = 0.8 * log_partition(np.exp(REF_LOGP), REWARD, beta=0.8)
        for seed in range(4):
            logp = sequence_logp(random_levels(10 + seed, scale=2.0))
            gain = regularised_reward(logp, REF_LOGP, REWARD, beta=0.8)
            p = np.exp(logp)
            np.testing.assert_allclose(gain, p @ REWARD - 0.8 * p @ (logp - REF_LOGP), atol=1e-13)
            np.testing.assert_allclose(gain, best - 0.8 * rel_entr(p, target).sum(), atol=1e-12)
        np.testing.assert_allclose(regularised_reward(np.log(target), REF_LOGP, REWARD, beta=0.8), best, atol=1e-13)

    def test_a_vertex_has_its_own_reward_and_surprise(self):
        vertex = np.where(np.arange(K) == 5, 0.0, -np.inf)
        found = regularised_reward(vertex, REF_LOGP, REWARD, beta=0.8)
        np.testing.assert_allclose(found, REWARD[5] + 0.8 * REF_LOGP[5], rtol=1e-14)

    def test_controlled_decoding_by_mean_values_is_right_to_first_order_only(self):
        def away(beta):
            logp = token_sum(tilted_policy(REF, mean_values(REF, REWARD), beta=beta))
            return np.abs(np.exp(logp) - tilt(REF_LOGP, REWARD, beta)).sum() / 2

        np.testing.assert_allclose(away(50.0) / away(100.0), 4, rtol=0.03)
        assert away(0.5) > 0.05


@pytest.mark.usefixtures("x64")
class TestImplicitValues:
    POLICY = random_levels(7, scale=1.5)

    def test_are_the_soft_values_of_the_implicit_reward(self):
        q = [np.asarray(level) for level in implicit_values(self.POLICY, REF, beta=0.4)]
        outcome = 0.4 * (sequence_logp(self.POLICY) - REF_LOGP)
        np.testing.assert_allclose(q[-1], outcome, atol=1e-14)
        lower, upper = ([np.asarray(v) for v in values(REF, outcome)] for values in (mean_values, max_values))
        for found, soft, low, high in zip(q, soft_values(REF, outcome, beta=0.4), lower, upper, strict=True):
            np.testing.assert_allclose(found, soft, atol=1e-14)
            assert ((low <= found + 1e-14) & (found <= high + 1e-14)).all()
        # A reward that a policy implies has log Z = 0: a bias cannot be expressed.
        np.testing.assert_allclose(q[0], 0, atol=1e-15)
        # Conditioned on the tokens before the t-th one, the expectation is another number.
        assert max(np.abs(q[t + 1] - np.repeat(q[t], V)).max() for t in range(H)) > 0.3

    def test_agree_with_the_process_rewards_of_token_log_probabilities(self):
        def tokens(levels):
            places = np.cumsum(TOKENS * V ** np.arange(H)[::-1], -1) // V ** np.arange(H)[::-1]
            return np.stack([levels[t].ravel()[places[:, t]] for t in range(H)], -1)

        found = np.asarray(jax.jit(implicit_q)(tokens(self.POLICY), tokens(REF), beta=0.4))
        q = [np.asarray(level) for level in implicit_values(self.POLICY, REF, beta=0.4)]
        for t in range(H):
            np.testing.assert_allclose(found[:, t], np.repeat(q[t + 1], V ** (H - t - 1)), atol=1e-14)

    def test_tokens_that_nobody_writes(self):
        hole = [np.log([[0.5, 0.5, 1.0]]) + np.array([0, 0, -np.inf])]
        policy = [np.log([[0.1, 0.9, 1.0]]) + np.array([0, 0, -np.inf])]
        expected = [np.log(0.2), np.log(1.8), 0]
        np.testing.assert_allclose(implicit_values(policy, hole, beta=1.0)[1], expected, atol=1e-15)


def test_bad_beta_is_named():
    calls = [
        lambda: tree.soft_values(REF, REWARD, beta=0.0),
        lambda: tree.tilted_policy(REF, [np.zeros(V**t) for t in range(H + 1)], beta=-1.0),
        lambda: tree.implicit_values(REF, REF, beta=float("inf")),
        lambda: tree.regularised_reward(REF_LOGP, REF_LOGP, REWARD, beta=0),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="beta must be a finite number above 0, got"):
            call()
