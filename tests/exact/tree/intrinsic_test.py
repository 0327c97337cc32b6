import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

from tests.exact.tree.worlds import TOKENS, H, K, V, random_levels, random_reward, sequence_logp, tilt, x64  # noqa: F401
from tiltjax.exact import bandit, tree

REF = random_levels(0, scale=1.5)
REF_LOGP = sequence_logp(REF)
objective, certainty = jax.jit(tree.rlif_objective), jax.jit(tree.certainty)
conditionals = jax.jit(tree.conditionals, static_argnames="vocab_size")
optimum = jax.jit(tree.rlif_optimum, static_argnames="length")


@pytest.mark.usefixtures("x64")
class TestRlif:
    def test_certainty_is_the_mean_divergence_from_uniform_along_the_completion(self):
        found = certainty(REF)
        for y in (0, 5, 26):
            prefixes = [int(np.dot(TOKENS[y, :t], V ** np.arange(t)[::-1])) for t in range(H)]
            rows = [np.exp(REF[t][i]) for t, i in enumerate(prefixes)]
            np.testing.assert_allclose(found[y], np.mean([p @ np.log(p * V) for p in rows]), atol=1e-14)
        certain = [np.log([[1.0, 1e-300]]) * [1, np.inf]]
        np.testing.assert_allclose(certainty(certain), np.log(2), rtol=1e-14)

    def test_its_mean_is_log_v_less_entropy_per_token(self):
        for seed in (1, 2):
            policy = random_levels(seed, scale=2.0)
            p, logp = np.exp(sequence_logp(policy)), sequence_logp(policy)
            np.testing.assert_allclose(p @ np.asarray(certainty(policy)), np.log(V) + p @ logp / H, atol=1e-14)
            expected = np.log(V) + p @ logp / H - 0.6 * p @ (logp - REF_LOGP)
            np.testing.assert_allclose(objective(policy, REF, beta=0.6), expected, atol=1e-14)

    def test_the_optimum_is_where_ascent_of_the_objective_ends(self):
        policy = lambda logits: [jax.nn.log_softmax(level) for level in logits]
        ref = [jnp.asarray(level) for level in REF]

        @jax.jit
        def ascend(beta):
            return tree.minimise(lambda logits: -tree.rlif_objective(policy(logits), ref, beta=beta), ref)

        for beta in (0.6, 1.0, 3.0):
            found = ascend(beta)
            logp = sequence_logp([np.asarray(x) for x in policy(found.params)])
            np.testing.assert_allclose(np.exp(logp), np.exp(optimum(REF_LOGP, beta=beta, length=H)), atol=1e-12)
            power = H * beta / (H * beta - 1)
            np.testing.assert_allclose(np.exp(logp), np.exp(log_softmax(power * REF_LOGP)), atol=1e-12)

    @pytest.mark.parametrize("beta", [0.6, 1.0, 3.0])
    def test_is_rlhf_when_people_prefer_as_the_reference_writes(self, beta):
        rlif = jnp.exp(optimum(REF_LOGP, beta=beta, length=H))
        np.testing.assert_allclose(rlif, bandit.tilted(jnp.exp(REF_LOGP), REF_LOGP, beta=H * beta - 1), atol=1e-15)
        # If they prefer as its k-th power, the strength is k times that; a mean of the KL over tokens would drop the L.
        np.testing.assert_allclose(rlif, tilt(REF_LOGP, 2 * REF_LOGP, 2 * (H * beta - 1)), atol=1e-15)
        if beta > 1:
            assert bandit.total_variation(rlif, tilt(REF_LOGP, REF_LOGP, beta - 1)) > 0.01

    @pytest.mark.parametrize("beta", [0.25, 1 / 3])
    def test_collapses_where_beta_times_length_is_at_most_one(self, beta):
        vertex = np.exp(optimum(REF_LOGP, beta=beta, length=H))
        np.testing.assert_array_equal(vertex, np.arange(K) == REF_LOGP.argmax())
        supremum = np.log(V) + beta * REF_LOGP.max()
        # On the way to the vertex the objective rises to its supremum, above which no policy comes.
        way = [log_softmax(power * REF_LOGP) for power in (1.0, 4.0, 16.0, 200.0)]
        values = [objective(conditionals(logp, vocab_size=V), REF, beta=beta) for logp in way]
        assert values[0] < values[1] < values[2] <= values[3] + 1e-13 <= supremum + 2e-13
        np.testing.assert_allclose(values[3], supremum, atol=1e-9)
        for seed in range(4):
            other = random_levels(20 + seed, scale=4.0)
            assert objective(other, REF, beta=beta) < supremum

    def test_rows_collapse_alone_and_the_first_of_equal_modes_wins(self):
        both = optimum(np.log([[0.4, 0.2, 0.4], [0.1, 0.6, 0.3]]), beta=0.5, length=2)
        np.testing.assert_array_equal(np.exp(both), [[1, 0, 0], [0, 1, 0]])

    def test_distance_to_rlhf_where_people_prefer_otherwise(self):
        """With log-preferences of ``log p_ref + delta g``, one optimum is the tilt of the other by ``delta g``."""
        g, beta_if = random_reward(6), 1.0
        beta = H * beta_if - 1
        rlif = jnp.exp(optimum(REF_LOGP, beta=beta_if, length=H))
        mean = float(rlif @ g)
        variance = float(rlif @ (g - mean) ** 2)
        for delta in (1e-3, 0.1, 1.0, 3.0):
            preferred = log_softmax(REF_LOGP + delta * g)
            rlhf = bandit.tilted(jnp.exp(REF_LOGP), preferred, beta=beta)
            away = float(bandit.kl(rlif, rlhf))
            exact = bandit.log_partition(rlif, delta * g, beta=beta) - delta / beta * mean
            np.testing.assert_allclose(away, exact, atol=1e-13)
            gains = [tree.regularised_reward(jnp.log(p), REF_LOGP, preferred, beta=beta) for p in (rlhf, rlif)]
            np.testing.assert_allclose(gains[0] - gains[1], beta * away, atol=1e-13)
            second = (delta / beta) ** 2 * variance / 2
            np.testing.assert_allclose(away, second, rtol=delta + 1e-6)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="beta must be a finite number above 0, got 0"):
        tree.rlif_objective(REF, REF, beta=0)
    with pytest.raises(ValueError, match="beta must be a finite number above 0, got 0"):
        tree.rlif_optimum(REF_LOGP, beta=0, length=3)
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        tree.rlif_optimum(REF_LOGP, beta=1.0, length=0)
