import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, logsumexp

from tests.compiled import compiled
from tiltjax.losses.preference import length_desensitised_logp, wpo_weights

length_desensitised_logp, wpo_weights = map(compiled, (length_desensitised_logp, wpo_weights))

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 2, 6, 5))
TOKENS = RNG.integers(0, 5, size=(3, 2, 6, 1))
LENGTH = np.array([[2, 6], [5, 3], [4, 4]])
MASK = np.arange(6) < LENGTH[..., None]
TOKEN_LOGP = np.take_along_axis(log_softmax(LOGITS, -1), TOKENS, -1)[..., 0].astype(np.float32)


class LengthTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    def test_tokens_beyond_the_shorter_length_count_less(self):
        dirty = np.where(MASK, TOKEN_LOGP, np.nan)
        out = self.variant(lambda x, m: length_desensitised_logp(x, m, alpha=0.3))(dirty, MASK)
        for row in range(3):
            shorter = LENGTH[row].min()
            for k in range(2):
                own = TOKEN_LOGP[row, k, : LENGTH[row, k]].astype(np.float64)
                np.testing.assert_allclose(out[row, k], own[:shorter].sum() + 0.3 * own[shorter:].sum(), rtol=1e-5)

    @chex.variants(with_jit=True)
    def test_weights_are_products_of_geometric_means(self):
        probability = np.exp(log_softmax(LOGITS, -1))
        ratio = np.exp(TOKEN_LOGP) / np.square(probability).sum(-1)
        expected = [
            np.prod([ratio[row, k, : LENGTH[row, k]].prod() ** (1 / LENGTH[row, k]) for k in range(2)])
            for row in range(3)
        ]
        collision = logsumexp(2 * log_softmax(LOGITS, -1), -1).astype(np.float32)
        dirty = np.where(MASK, TOKEN_LOGP, np.nan)
        np.testing.assert_allclose(self.variant(wpo_weights)(dirty, collision, MASK), expected, rtol=1e-5)


def test_plain_sums_are_the_limit():
    out = length_desensitised_logp(TOKEN_LOGP, MASK, alpha=1.0)
    np.testing.assert_allclose(out, np.where(MASK, TOKEN_LOGP, 0).sum(-1), rtol=1e-6)
    with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1\], got 1.5"):
        length_desensitised_logp(TOKEN_LOGP, MASK, alpha=1.5)


def test_weights_carry_no_gradient_and_nothing_weighs_one():
    grad = jax.grad(lambda x: wpo_weights(x, jnp.zeros((3, 2, 6)), MASK).sum())(jnp.asarray(TOKEN_LOGP))
    np.testing.assert_array_equal(grad, np.zeros((3, 2, 6)))
    out = wpo_weights(TOKEN_LOGP, jnp.zeros((3, 2, 6)), jnp.zeros((3, 2, 6), bool))
    np.testing.assert_array_equal(out, np.ones(3))
