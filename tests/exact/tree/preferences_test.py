"""Likelihoods by double loops, optima by their score equations, and the equivalences of likelihood and RLHF."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components
from scipy.special import log_expit, log_softmax

from tests.exact.tree.worlds import H, K, V, random_levels, random_reward, sequence_logp, tilt, x64  # noqa: F401
from tiltjax.exact import bandit, tree
from tiltjax.losses.game import spin_loss
from tiltjax.losses.mle import weighted_mle_loss
from tiltjax.losses.preference import dpo_loss, local_reward_loss
from tiltjax.losses.reward_model import bradley_terry_loss

PROMPTS = 2
REF = random_levels(0, batch=(PROMPTS,), scale=0.5)
REWARD = random_reward(1, batch=(PROMPTS,))
REF_LOGP = sequence_logp(REF)
SAMPLER = np.exp(sequence_logp(random_levels(2, batch=(PROMPTS,), scale=0.3)))

fit_reward, fit_dpo = jax.jit(tree.fit_reward), jax.jit(tree.fit_dpo)
fit_local = jax.jit(tree.fit_local, static_argnames="vocab_size")
sample_wins = jax.jit(tree.sample_wins, static_argnames="n")
sequence = jax.jit(tree.sequence_logp)


def gaps(table):
    return table[..., :, None] - table[..., None, :]


def likelihood(wins, table):
    """Mean negative log-likelihood of every prompt."""
    return -(wins * log_expit(gaps(table))).sum((-2, -1)) / wins.sum((-2, -1))


@pytest.fixture(scope="module")
def wins():
    with jax.enable_x64(True):
        return np.asarray(sample_wins(jax.random.key(0), REWARD, SAMPLER, n=4000), float)


@pytest.mark.usefixtures("x64")
class TestData:
    def test_expected_wins_are_the_population(self):
        wins = np.asarray(tree.expected_wins(REWARD, SAMPLER))
        for i, j in ((0, 0), (3, 17), (17, 3)):
            odds = 1 / (1 + np.exp(REWARD[:, j] - REWARD[:, i]))
            np.testing.assert_allclose(wins[:, i, j], 2 * SAMPLER[:, i] * SAMPLER[:, j] * odds, rtol=1e-14)
        np.testing.assert_allclose(wins.sum((-2, -1)), 1, rtol=1e-14)

    def test_samples_have_the_law_of_the_population(self, wins):
        np.testing.assert_array_equal(wins.sum((-2, -1)), 4000)
        expected = 4000 * np.asarray(tree.expected_wins(REWARD, SAMPLER))
        # Sums over 7 classes by reward, so that every cell is well filled.
        group = np.floor((REWARD.argsort().argsort()) / 4).astype(int)
        for prompt in range(PROMPTS):
            one = np.eye(7)[group[prompt]]
            seen, hoped = one.T @ wins[prompt] @ one, one.T @ expected[prompt] @ one
            assert ((seen - hoped) ** 2 / hoped).sum() < 93  # chi-squared of 48 degrees of freedom, p = 1e-4
        repeated = sample_wins(jax.random.key(0), REWARD, SAMPLER, n=4000)
        np.testing.assert_array_equal(wins, repeated)

    def test_mean_losses_are_double_loops(self, wins):
        policy = sequence_logp(random_levels(3, batch=(PROMPTS,)))
        found = {
            "reward": tree.mean_pair_loss(wins, bradley_terry_loss, REWARD),
            "dpo": tree.mean_pair_loss(wins, partial(dpo_loss, beta=0.3), policy, REF_LOGP),
            "local": tree.mean_pair_loss(wins, partial(local_reward_loss, beta=0.5), policy),
        }
        tables = {"reward": REWARD, "dpo": 0.3 * (policy - REF_LOGP), "local": 0.5 * policy}
        for name, table in tables.items():
            np.testing.assert_allclose(found[name], likelihood(wins, table), rtol=1e-13)

    def test_a_loss_that_is_infinite_where_nothing_was_seen_does_not_count(self):
        logp = jnp.log(jnp.array([0.5, 0.5, 0.0]))
        found = tree.mean_pair_loss(jnp.zeros((3, 3)).at[0, 1].set(2.0), lambda x: -x[..., 0] - x[..., 1], logp)
        np.testing.assert_allclose(found, 2 * np.log(2), rtol=1e-14)

    def test_strongly_connected_is_one_component_of_the_graph(self):
        graphs = np.random.default_rng(4).random((60, 6, 6)) < np.linspace(0.1, 0.5, 60)[:, None, None]
        found = np.asarray(tree.strongly_connected(graphs.astype(float)))
        expected = [connected_components(g, connection="strong")[0] == 1 for g in graphs]
        np.testing.assert_array_equal(found, expected)
        assert 10 < found.sum() < 50
        chain = np.eye(9, k=1)
        assert not bool(tree.strongly_connected(chain))
        chain[8, 0] = 1
        assert bool(tree.strongly_connected(chain))


@pytest.mark.usefixtures("x64")
class TestLikelihoodIsRlhf:
    """All roads lead to likelihood: equal classes, exact optimisation, data with a maximum."""

    def test_the_fitted_reward_solves_the_score_equations(self, wins):
        assert bool(tree.strongly_connected(wins).all())
        found = fit_reward(wins)
        reward = np.asarray(found.params)
        games = wins + np.swapaxes(wins, -1, -2)
        expected = (games / (1 + np.exp(-gaps(reward)))).sum(-1)
        np.testing.assert_allclose(expected, wins.sum(-1) + 0.0, atol=1e-9)
        np.testing.assert_allclose(reward.mean(-1), 0, atol=1e-13)
        np.testing.assert_allclose(found.value, likelihood(wins, reward).sum(), rtol=1e-13)
        assert found.gradient < 1e-14

    def test_rewards_and_policies_have_one_likelihood_and_one_optimum(self, wins):
        """Theorem 2.2: soft RL with an entropy bonus on the fitted reward is the policy fitted to the same pairs."""
        reward, local = fit_reward(wins), fit_local(wins, vocab_size=V)
        logp = np.asarray(sequence(local.params))
        np.testing.assert_allclose(local.value, reward.value, rtol=1e-13)
        np.testing.assert_allclose(np.exp(logp), np.exp(log_softmax(reward.params, -1)), atol=1e-12)
        # Rewards of policies are normalised; the classes are equal up to a constant of the prompt only.
        constant = logp - np.asarray(reward.params)
        np.testing.assert_allclose(constant, constant[:, :1] + np.zeros((1, K)), atol=1e-9)
        assert (np.abs(constant[:, 0]) > 1).all()

    @pytest.mark.parametrize("beta", [1.0, 0.3])
    def test_dpo_is_rlhf(self, wins, beta):
        """Theorem 2.3."""
        reward, dpo = fit_reward(wins), fit_dpo(wins, REF, beta=beta)
        np.testing.assert_allclose(dpo.value, reward.value, rtol=1e-13)
        rlhf = bandit.tilted(jnp.exp(REF_LOGP), reward.params, beta=beta)
        np.testing.assert_allclose(jnp.exp(sequence(dpo.params)), rlhf, atol=1e-12)

    def test_the_population_optimum_is_the_tilt_by_the_true_reward_whatever_the_sampler(self):
        sampler = np.random.default_rng(6).dirichlet(np.ones(K), size=PROMPTS)
        for weights in (SAMPLER, sampler):
            found = fit_dpo(tree.expected_wins(REWARD, weights), REF, beta=0.3)
            np.testing.assert_allclose(jnp.exp(sequence(found.params)), tilt(REF_LOGP, REWARD, 0.3), atol=1e-11)

    def test_a_simple_reward_is_likelihood_over_the_policies_it_has_as_optima(self, wins):
        """Theorem 3.1, and how it fails where the policies of the class cannot follow the reward."""
        features = np.random.default_rng(7).normal(size=(K, 4))
        wins, ref = wins[0], REF_LOGP[0]
        reward_of = lambda params: jnp.asarray(features) @ params

        @jax.jit
        def fits(wins):
            fit = lambda fn: tree.minimise(fn, jnp.zeros(4))
            verifier = fit(lambda params: tree.mean_pair_loss(wins, bradley_terry_loss, reward_of(params)))
            optima = lambda params: tree.log_linear(params, ref, features / 0.5)
            policy = fit(lambda params: tree.mean_pair_loss(wins, partial(dpo_loss, beta=0.5), optima(params), ref))
            return verifier, optima(policy.params), policy.value

        verifier, policy, value = fits(wins)
        np.testing.assert_allclose(value, verifier.value, rtol=1e-13)
        rlhf = tilt(ref, features @ np.asarray(verifier.params), 0.5)
        np.testing.assert_allclose(jnp.exp(policy), rlhf, atol=1e-12)

        @jax.jit
        def lossy(wins, rlhf_logp):
            memoryless = lambda logits: tree.sequence_logp(tree.memoryless(jax.nn.log_softmax(logits)))
            loss = lambda logp: tree.mean_pair_loss(wins, partial(dpo_loss, beta=0.5), logp, ref)
            start = tree.memoryless_marginals(rlhf_logp, vocab_size=V)
            likeliest = tree.minimise(lambda logits: loss(memoryless(logits)), start)
            nearest = tree.project(rlhf_logp, memoryless, start, direction="reverse")
            return likeliest.value, loss(nearest.logp), likeliest.gradient, nearest.gradient

        best, projected, *slopes = lossy(wins, np.log(rlhf))
        assert projected > best + 1e-4
        assert max(slopes) < 1e-13


@pytest.mark.usefixtures("x64")
class TestSelfPlay:
    """Theorem 2.4: self-play with a linear link is supervised fine-tuning, while the opponent is the policy itself."""

    POLICY = tuple(level[0] for level in REF)

    @staticmethod
    @partial(jax.jit, static_argnames="link")
    def self_play(policy, data, opponent_logp, *, link):
        def loss(logits):
            logp = tree.sequence_logp([jax.nn.log_softmax(level) for level in logits])
            pairs = data[:, None] * jnp.exp(opponent_logp)[None]
            return tree.mean_pair_loss(pairs, partial(spin_loss, beta=1.0, link=link), logp, opponent_logp)

        return jax.flatten_util.ravel_pytree(jax.grad(loss)(policy))[0]

    def test_gradients(self):
        data = np.exp(sequence_logp(random_levels(8)))
        own, other = jnp.asarray(REF_LOGP[0]), jnp.asarray(sequence_logp(random_levels(9)))

        @jax.jit
        def scores(policy):
            fn = lambda logits: tree.sequence_logp([jax.nn.log_softmax(level) for level in logits])
            imitate = jax.grad(lambda logits: weighted_mle_loss(fn(logits), data))(policy)
            every = [x.reshape(K, -1) for x in jax.jacrev(fn)(policy)]
            return jax.flatten_util.ravel_pytree(imitate)[0], jnp.concatenate(every, -1)

        sft, score = map(np.asarray, scores(self.POLICY))
        linear = np.asarray(self.self_play(self.POLICY, data, own, link="linear"))
        np.testing.assert_allclose(linear, sft, atol=1e-15)
        assert np.linalg.norm(sft) > 0.1
        stale = np.asarray(self.self_play(self.POLICY, data, other, link="linear"))
        assert np.linalg.norm(stale - sft) > 0.1
        # At the opponent itself the logistic link halves the linear one's gradient, so only its length differs there.
        logistic = np.asarray(self.self_play(self.POLICY, data, own, link="logistic"))
        np.testing.assert_allclose(logistic, sft / 2, atol=1e-15)
        # Pair by pair it is noisier than imitation by the trace of the Fisher information.
        p = np.exp(REF_LOGP[0])
        pair = (score[None] - score[:, None]).reshape(-1, score.shape[-1])
        weight = (data[:, None] * p[None]).ravel()
        total = weight @ (pair**2).sum(-1) - ((weight @ pair) ** 2).sum()
        of_data = data @ (score**2).sum(-1) - ((data @ score) ** 2).sum()
        # Of softmax logits it is the sum of p(prefix) p (1 - p) over all rows.
        levels = [np.exp(level) for level in self.POLICY]
        reach = [np.exp(path)[:, None] for path in tree.path_sums(self.POLICY)]
        fisher = sum((r * q * (1 - q)).sum() for r, q in zip(reach[:-1], levels, strict=True))
        np.testing.assert_allclose(total - of_data, fisher, rtol=1e-13)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        tree.sample_wins(jax.random.key(0), jnp.zeros(4), jnp.ones(4) / 4, n=0)
    with pytest.raises(ValueError, match="beta must be a finite number above 0, got 0"):
        tree.fit_dpo(jnp.ones((4, 4)), [jnp.zeros((1, 4))], beta=0)
    with pytest.raises(ValueError, match="beta must be a finite number above 0, got 0"):
        tree.fit_local(jnp.ones((4, 4)), vocab_size=4, beta=0)
    with pytest.raises(ValueError, match="as a power; got 3"):
        tree.fit_local(jnp.ones((4, 4)), vocab_size=3)
