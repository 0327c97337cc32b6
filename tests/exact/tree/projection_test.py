from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import expit, log_softmax

from tests.exact.tree.worlds import TOKENS, H, K, V, random_levels, random_reward, sequence_logp, tilt, x64  # noqa: F401
from tiltjax.exact import bandit, tree

REF_LOGP, REWARD, BETA = sequence_logp(random_levels(0)), random_reward(1), 0.7
TARGET = tilt(REF_LOGP, REWARD, BETA)
TARGET_LOGP = np.log(TARGET)


def product_logp(table):
    return sum(table[t, TOKENS[:, t]] for t in range(H))


compiled_projection = jax.jit(tree.memoryless_projection, static_argnames=("vocab_size", "direction", "stationary"))


def memoryless_projection(direction, *, stationary=False):
    return compiled_projection(TARGET_LOGP, vocab_size=V, direction=direction, stationary=stationary)


FEATURES = np.random.default_rng(5).normal(size=(K, 4))


@partial(jax.jit, static_argnames="direction")
def log_linear_projection(target, direction):
    policy = lambda params: tree.log_linear(params, REF_LOGP, FEATURES)
    return tree.project(target, policy, jnp.zeros(4), direction=direction)


@pytest.mark.usefixtures("x64")
class TestMemoryless:
    def test_a_table_is_the_policy_of_its_rows(self):
        table = log_softmax(np.random.default_rng(2).normal(size=(2, H, V)), -1)
        logp = tree.sequence_logp(tree.memoryless(table))
        for row in range(2):
            np.testing.assert_allclose(logp[row], product_logp(table[row]), atol=1e-14)

    def test_forward_projection_is_the_marginals(self):
        found = memoryless_projection("forward")
        expected = np.array([[TARGET[TOKENS[:, t] == z].sum() for z in range(V)] for t in range(H)])
        np.testing.assert_allclose(jnp.exp(found.params), expected, atol=1e-14)
        np.testing.assert_allclose(found.logp, product_logp(np.log(expected)), atol=1e-13)
        # The divergence of a law from the product of its marginals.
        entropies = -np.sum(expected * np.log(expected)) + TARGET @ TARGET_LOGP
        np.testing.assert_allclose(found.divergence, entropies, atol=1e-13)
        assert found.gradient < 1e-14

    def test_a_stationary_forward_projection_is_their_mean(self):
        found = memoryless_projection("forward", stationary=True)
        expected = np.array([np.mean(z == TOKENS, axis=1) @ TARGET for z in range(V)])
        np.testing.assert_allclose(jnp.exp(found.params), np.tile(expected, (H, 1)), atol=1e-14)
        np.testing.assert_allclose(found.divergence, bandit.kl(jnp.asarray(TARGET), jnp.exp(found.logp)), atol=1e-13)
        assert found.gradient < 1e-14

    def test_reverse_projection_is_where_soft_reinforcement_learning_ends(self):
        """Lemma 2.1: the search of an independent optimiser for the largest J of the class ends in the same policy."""
        found = memoryless_projection("reverse")
        assert found.gradient < 1e-14
        np.testing.assert_allclose(found.divergence, bandit.kl(jnp.exp(found.logp), jnp.asarray(TARGET)), atol=1e-13)

        def loss(logits):
            logp = product_logp(log_softmax(logits.reshape(H, V), -1))
            terms = np.exp(logp) * (REWARD - BETA * (logp - REF_LOGP))
            # J's slope at p is r - beta log(p / ref); the chain rule takes it to the logits.
            slope, p = np.zeros((H, V)), np.exp(logp)
            gain = p * (REWARD - BETA * (logp - REF_LOGP) - terms.sum())
            for t in range(H):
                slope[t] = [gain[TOKENS[:, t] == z].sum() for z in range(V)]
            return -terms.sum(), -slope.ravel()

        rng = np.random.default_rng(3)
        ends = [minimize(loss, rng.normal(size=H * V), jac=True, options={"gtol": 1e-9}) for _ in range(8)]
        best = min(ends, key=lambda end: end.fun)
        log_z = bandit.log_partition(jnp.exp(REF_LOGP), REWARD, beta=BETA)
        np.testing.assert_allclose(-best.fun, BETA * (log_z - found.divergence), atol=1e-12)
        table = log_softmax(best.x.reshape(H, V), -1)
        np.testing.assert_allclose(jnp.exp(found.params), np.exp(table), atol=2e-7)
        objective = tree.regularised_reward(found.logp, REF_LOGP, REWARD, beta=BETA)
        np.testing.assert_allclose(objective, -best.fun, atol=1e-12)
        forward = memoryless_projection("forward")
        assert bandit.total_variation(jnp.exp(found.logp), jnp.exp(forward.logp)) > 0.01
        assert found.divergence < bandit.kl(jnp.exp(forward.logp), jnp.asarray(TARGET)) - 1e-4

    def test_of_two_modes_reverse_takes_the_larger_and_forward_the_middle(self):
        target = np.log([0.298, 0.001, 0.001, 0.7])
        forward = tree.memoryless_marginals(target, vocab_size=2)
        np.testing.assert_allclose(jnp.exp(forward), [[0.299, 0.701]] * 2, atol=1e-14)
        reverse = compiled_projection(target, vocab_size=2, direction="reverse")
        assert jnp.exp(reverse.logp)[3] > 0.99
        np.testing.assert_allclose(reverse.divergence, -np.log(0.7), atol=5e-3)

    def test_no_product_law_is_nearer_than_the_reverse_projection(self):
        """Sixty random targets of three binary tokens against a grid; from one start four end in a worse minimum."""
        targets = log_softmax(2 * np.random.default_rng(0).normal(size=(60, 8)), -1)
        project = partial(tree.memoryless_projection, vocab_size=2, direction="reverse")
        found = jax.jit(lambda targets: jax.lax.map(lambda row: project(row).divergence, targets))(targets)
        # The law of the last token that suits those of the first two is known, and so is its divergence.
        law = np.stack([grid := expit(np.linspace(-12, 12, 97)), 1 - grid], -1)
        negentropy = np.sum(law * np.log(law), -1)
        score = np.einsum("ai,bj,nijk->nabk", law, law, targets.reshape(60, 2, 2, 2))
        others = negentropy[:, None] + negentropy - np.logaddexp(score[..., 0], score[..., 1])
        np.testing.assert_array_less(found, others.min((1, 2)) + 1e-12)

    def test_a_stationary_reverse_projection_obeys_the_mean_field_equation(self):
        found = memoryless_projection("reverse", stationary=True)
        table, p = np.asarray(found.params), np.exp(np.asarray(found.logp))
        np.testing.assert_array_equal(table[0], table[2])
        # The slope of E log(p / target) along the logits of the one law is 0.
        surprise = np.asarray(found.logp) - TARGET_LOGP
        counts = np.stack([np.sum(z == TOKENS, axis=1) for z in range(V)], -1)
        np.testing.assert_allclose(p * (surprise - p @ surprise) @ (counts - H * np.exp(table[0])), 0, atol=1e-13)
        assert found.divergence > memoryless_projection("reverse").divergence


@pytest.mark.usefixtures("x64")
class TestLogLinear:
    def test_forward_projection_matches_moments_and_reverse_balances_covariances(self):
        forward, reverse = log_linear_projection(TARGET_LOGP, "forward"), log_linear_projection(TARGET_LOGP, "reverse")
        expected = tilt(REF_LOGP, FEATURES @ np.asarray(forward.params), 1.0)
        np.testing.assert_allclose(jnp.exp(forward.logp), expected, atol=1e-15)
        np.testing.assert_allclose(expected @ FEATURES, TARGET @ FEATURES, atol=1e-14)
        p = np.exp(np.asarray(reverse.logp))
        surprise = np.asarray(reverse.logp) - TARGET_LOGP
        np.testing.assert_allclose((p * (surprise - p @ surprise)) @ FEATURES, 0, atol=1e-14)
        for name, ends in (("forward", (forward, reverse)), ("reverse", (reverse, forward))):
            order = (lambda q: (TARGET, jnp.exp(q))) if name == "forward" else (lambda q: (jnp.exp(q), TARGET))
            own, other = (float(bandit.kl(*map(jnp.asarray, order(end.logp)))) for end in ends)
            np.testing.assert_allclose(ends[0].divergence, own, atol=1e-13)
            assert own < other - 1e-4

    def test_a_target_of_the_class_is_found_in_both_directions(self):
        params = np.array([0.5, -1.0, 0.3, 2.0])
        target = np.asarray(tree.log_linear(params, REF_LOGP, FEATURES))
        for direction in ("forward", "reverse"):
            np.testing.assert_allclose(log_linear_projection(target, direction).params, params, atol=1e-12)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="direction must be one of forward, reverse; got 'both'"):
        tree.memoryless_projection(jnp.zeros(4), vocab_size=2, direction="both")
    with pytest.raises(ValueError, match="direction must be one of forward, reverse; got 'both'"):
        tree.project(jnp.zeros(4), jax.nn.log_softmax, jnp.zeros(4), direction="both")
    with pytest.raises(ValueError, match="as a power; got 3"):
        tree.memoryless_marginals(jnp.zeros(4), vocab_size=3)
