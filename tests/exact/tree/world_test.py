import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.exact.tree.worlds import TOKENS, random_levels, sequence_logp, x64  # noqa: F401
from tiltjax.exact import tree

conditionals = jax.jit(tree.conditionals, static_argnames="vocab_size")


@pytest.mark.usefixtures("x64")
class TestPolicies:
    def test_completions_are_in_lexicographic_order(self):
        np.testing.assert_array_equal(tree.completions(vocab_size=3, horizon=3), TOKENS)
        expected = list(itertools.product(range(2), repeat=4))
        np.testing.assert_array_equal(tree.completions(vocab_size=2, horizon=4), expected)

    @pytest.mark.parametrize("batch", [(), (2, 1)])
    def test_a_completion_has_the_log_probabilities_of_its_tokens(self, batch):
        policy = random_levels(0, batch=batch)
        logp = tree.sequence_logp(policy)
        np.testing.assert_allclose(logp, sequence_logp(policy), rtol=1e-14)
        np.testing.assert_allclose(tree.total_reward(policy), logp, rtol=0)
        chex.assert_trees_all_close(conditionals(logp, vocab_size=3), list(map(jnp.asarray, policy)), atol=1e-14)

    def test_prefixes_have_the_mass_of_their_completions(self):
        policy = random_levels(1)
        p = np.exp(sequence_logp(policy))
        for t, prefix in enumerate(tree.path_sums(policy)):
            np.testing.assert_allclose(np.exp(prefix), p.reshape(3**t, -1).sum(-1), rtol=1e-13)

    def test_conditionals_of_a_law_with_holes_that_does_not_sum_to_one(self):
        with np.errstate(divide="ignore"):
            levels = conditionals(jnp.log(jnp.array([0.0, 0, 2, 6])), vocab_size=2)
        expected = [[[0.0, 1]], [[0.5, 0.5], [0.25, 0.75]]]
        for found, level in zip(levels, expected, strict=True):
            np.testing.assert_allclose(jnp.exp(found), level, atol=1e-15)

    def test_random_policies_are_normalised_independent_rows(self):
        policy = tree.random_policy(jax.random.key(0), vocab_size=3, horizon=3, batch=(2,), scale=0.5)
        assert [x.shape for x in policy] == [(2, 1, 3), (2, 3, 3), (2, 9, 3)]
        rows = np.concatenate([np.asarray(x).reshape(-1, 3) for x in policy])
        np.testing.assert_allclose(np.exp(rows).sum(-1), 1, rtol=1e-13)
        assert len(np.unique(rows[:, 0])) == 26
        assert 0.3 < (rows - rows.mean(-1, keepdims=True)).std() < 0.7


class VariantsTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_there_and_back(self):
        policy = [x.astype(np.float32) for x in random_levels(2, batch=(4,))]
        back = self.variant(lambda p: tree.conditionals(tree.sequence_logp(p), vocab_size=3))(policy)
        chex.assert_trees_all_close(back, [jnp.asarray(x) for x in policy], atol=1e-6)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match=r"vocab_size must have the number of completions, 26, as a power; got 3"):
        tree.conditionals(jnp.zeros(26), vocab_size=3)
    with pytest.raises(ValueError, match=r"as a power; got 3"):
        tree.horizon(1, vocab_size=3)
    with pytest.raises(ValueError, match=r"vocab_size must be at least 2, got 1"):
        tree.horizon(8, vocab_size=1)
    with pytest.raises(ValueError, match=r"horizon must be at least 1, got 0"):
        tree.completions(vocab_size=2, horizon=0)
    with pytest.raises(ValueError, match=r"horizon must be at least 1, got 0"):
        tree.random_policy(jax.random.key(0), vocab_size=2, horizon=0)
    with pytest.raises(AssertionError):
        tree.sequence_logp([jnp.zeros((1, 3)), jnp.zeros((2, 3))])
