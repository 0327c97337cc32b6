import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_expit

from tests.compiled import compiled
from tests.losses.tabular import minimiser
from tiltjax.losses.preference import dpo_loss, ipl_loss, plackett_luce_dpo_loss

dpo_loss, ipl_loss, plackett_luce_dpo_loss = map(compiled, (dpo_loss, ipl_loss, plackett_luce_dpo_loss))

RNG = np.random.default_rng(0)
LOGP = (-3 * RNG.gamma(2.0, size=(7, 4))).astype(np.float32)
REF_LOGP = (LOGP + RNG.normal(size=(7, 4))).astype(np.float32)
RANKINGS = np.array(list(itertools.permutations(range(4))), np.int32)


class PlackettLuceTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    def test_two_candidates_are_dpo(self):
        out = self.variant(lambda logp, ref: plackett_luce_dpo_loss(logp, ref, beta=0.5))(LOGP[:, :2], REF_LOGP[:, :2])
        np.testing.assert_allclose(out, dpo_loss(LOGP[:, :2], REF_LOGP[:, :2], beta=0.5), rtol=1e-5, atol=1e-7)

    @chex.variants(with_jit=True)
    def test_the_probabilities_of_all_rankings_add_up_to_one(self):
        one = lambda logp, ref, ranking: plackett_luce_dpo_loss(logp, ref, ranking, beta=0.5)
        every = self.variant(jax.vmap(jax.vmap(one, in_axes=(None, None, 0)), in_axes=(0, 0, None)))
        losses = np.asarray(every(LOGP, REF_LOGP, RANKINGS), np.float64)
        np.testing.assert_allclose(np.exp(-losses).sum(-1), np.ones(7), rtol=1e-5)
        assert (losses > 0).all()


def test_a_ranking_is_the_order_of_the_candidates():
    ranking = np.stack([RNG.permutation(4) for _ in range(7)]).astype(np.int32)
    where = RNG.random((7, 4)) < 0.7
    order = lambda x: np.take_along_axis(x, ranking, -1)
    run = jax.jit(lambda x, ref, where, ranking=None: plackett_luce_dpo_loss(x, ref, ranking, beta=0.3, where=where))
    out = run(LOGP, REF_LOGP, where, ranking)
    np.testing.assert_allclose(out, run(order(LOGP), order(REF_LOGP), order(where)), rtol=1e-6)
    lone = run(LOGP, REF_LOGP, np.eye(4, dtype=bool)[[0, 1, 2, 3, 0, 1, 2]])
    np.testing.assert_array_equal(lone, np.zeros(7))


def test_rankings_invert_the_tilt():
    ref, reward, beta = RNG.dirichlet(3 * np.ones(4)), RNG.normal(size=4), 0.4
    left = np.cumsum(np.exp(reward)[RANKINGS][:, ::-1], -1)[:, ::-1]
    mass = (np.exp(reward)[RANKINGS] / left).prod(-1)

    def loss(logp):
        rows = (jnp.broadcast_to(x, (24, 4)) for x in (logp, np.log(ref)))
        return jnp.sum(mass * plackett_luce_dpo_loss(*rows, RANKINGS, beta=beta))

    expected = ref * np.exp(reward / beta)
    np.testing.assert_allclose(minimiser(loss, ref), expected / expected.sum(), atol=1e-9)


def test_beta_may_differ_between_prompts():
    beta = jnp.linspace(0.1, 2.0, 7)
    out = plackett_luce_dpo_loss(LOGP, REF_LOGP, beta=beta)
    alone = [plackett_luce_dpo_loss(LOGP[i], REF_LOGP[i], beta=float(beta[i])) for i in range(7)]
    np.testing.assert_allclose(out, alone, rtol=1e-5)


class IPLTest(chex.TestCase):
    @chex.variants(with_jit=True, without_device=True)
    def test_one_step_without_a_future_is_dpo(self):
        logp, ref = LOGP[:, :2], REF_LOGP[:, :2]

        def loss(logp, ref):
            return ipl_loss((0.3 * (logp - ref))[..., None], jnp.ones((*logp.shape, 1)), discount=0.0, penalty=0.0)

        np.testing.assert_allclose(self.variant(loss)(logp, ref), dpo_loss(logp, ref, beta=0.3), rtol=1e-5)

    @chex.variants(with_jit=True)
    def test_segments_of_unequal_length(self):
        q, value = RNG.normal(size=(2, 2, 5)).astype(np.float32)
        where = np.array([[True, True, False, False, False], [True, True, True, True, False]])
        run = self.variant(lambda q, v, y, w: ipl_loss(q, v, y, discount=0.5, penalty=2.0, where=w))
        reward = (q - 0.5 * value).astype(np.float64)
        margin = reward[0, :2].sum() - reward[1, :4].sum()
        penalty = 2 * np.square(reward[where]).mean()
        for label in (1.0, 0.8, 0.5):
            expected = -label * log_expit(margin) - (1 - label) * log_expit(-margin) + penalty
            out = run(np.where(where, q, np.nan), value, jnp.float32(label), where)
            np.testing.assert_allclose(out, expected, rtol=1e-5)
        certain = ipl_loss(q, value, discount=0.5, penalty=2.0, where=where)
        np.testing.assert_allclose(certain, -log_expit(margin) + penalty, rtol=1e-5)
        where = where & np.array([[False], [True]])  # A segment without a step is no comparison.
        assert float(run(q, value, jnp.float32(1), where)) == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plackett_luce_dpo_loss(LOGP, REF_LOGP, beta=0.0), "beta must be a finite number above 0, got 0.0"),
        (
            lambda: ipl_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), discount=1.5, penalty=0.5),
            r"discount must lie in \[0, 1\], got 1.5",
        ),
        (
            lambda: ipl_loss(jnp.zeros((2, 3)), jnp.zeros((2, 3)), discount=1.0, penalty=-0.5),
            "penalty must be at least 0, got -0.5",
        ),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
