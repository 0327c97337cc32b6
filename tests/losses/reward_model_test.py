import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy.optimize import minimize
from scipy.special import expit, log_expit, log_softmax

from tests.compiled import compiled
from tiltjax.losses.preference import dpo_loss, plackett_luce_dpo_loss
from tiltjax.losses.reward_model import (
    bradley_terry_loss,
    cost_model_loss,
    labelled_steps,
    outcome_loss,
    plackett_luce_loss,
    process_class_loss,
    process_loss,
)

(
    bradley_terry_loss,
    cost_model_loss,
    dpo_loss,
    labelled_steps,
    outcome_loss,
    plackett_luce_dpo_loss,
    plackett_luce_loss,
    process_class_loss,
    process_loss,
) = map(
    compiled,
    (
        bradley_terry_loss,
        cost_model_loss,
        dpo_loss,
        labelled_steps,
        outcome_loss,
        plackett_luce_dpo_loss,
        plackett_luce_loss,
        process_class_loss,
        process_loss,
    ),
)

RNG = np.random.default_rng(0)
REWARD = (2 * RNG.normal(size=(6, 2))).astype(np.float32)
MARGIN = RNG.random(6).astype(np.float32)
LABEL = np.float32([0.0, 0.25, 0.5, 0.75, 1.0, 0.9])
LOGIT = RNG.normal(size=(4, 5, 3)).astype(np.float32)  # Completions, positions, classes.
STEP_LABEL = np.array([[-100, 2, -100, 0, 1], [0, 1, 2, 0, 1], [-100, -100, -100, -100, 2], [-100] * 5], np.int32)


def fit(loss, start):
    """Minimiser of ``loss`` in float64."""
    with jax.enable_x64(True):
        both = jax.jit(jax.value_and_grad(loss))
        objective = lambda x: tuple(np.asarray(v) for v in both(jnp.asarray(x)))
        return minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-9}).x


class BradleyTerryTest(chex.TestCase):
    @chex.variants(with_jit=True)
    @parameterized.parameters(-3.0, 0.7, 100.0)
    def test_knows_nothing_of_a_constant_of_the_prompt(self, constant):
        loss = self.variant(lambda r: bradley_terry_loss(r, margin=jnp.asarray(MARGIN), label=jnp.asarray(LABEL)))
        np.testing.assert_allclose(loss(REWARD + np.float32(constant)), loss(REWARD), rtol=1e-4, atol=1e-5)

    @chex.variants(with_jit=True)
    def test_margins_make_it_harder(self):
        loss = self.variant(lambda r, m: bradley_terry_loss(r, margin=m))
        d = (REWARD[:, 0] - REWARD[:, 1]).astype(np.float64)
        np.testing.assert_allclose(loss(REWARD, MARGIN), -log_expit(d - MARGIN), rtol=1e-5)
        np.testing.assert_allclose(loss(REWARD, 0.3), -log_expit(d - 0.3), rtol=1e-5)
        assert (loss(REWARD, MARGIN) > bradley_terry_loss(REWARD)).all()

    @chex.variants(with_jit=True)
    def test_gradient_is_the_chance_of_the_other_order(self):
        grad = self.variant(jax.grad(lambda r: bradley_terry_loss(r).sum()))(REWARD)
        wrong = expit(REWARD[:, 1] - REWARD[:, 0])
        np.testing.assert_allclose(grad, np.stack([-wrong, wrong], -1), rtol=1e-5, atol=1e-6)
        more = jax.grad(lambda r: bradley_terry_loss(r, centring=0.01).sum())(REWARD) - grad
        np.testing.assert_allclose(more, 0.02 * REWARD.sum(-1, keepdims=True).repeat(2, -1), rtol=1e-4, atol=1e-6)

    @chex.variants(with_jit=True)
    def test_a_soft_label_is_the_mean_of_both_orders(self):
        loss = self.variant(lambda r, q: bradley_terry_loss(r, label=q, margin=MARGIN, centring=0.1))
        one, other = loss(REWARD, np.ones(6, np.float32)), loss(REWARD[:, ::-1], np.ones(6, np.float32))
        np.testing.assert_allclose(loss(REWARD, LABEL), LABEL * one + (1 - LABEL) * other, rtol=1e-5)
        np.testing.assert_allclose(one, bradley_terry_loss(REWARD, margin=MARGIN, centring=0.1), rtol=1e-6)


def test_comparisons_fit_the_reward_and_centring_its_constant():
    """Three completions, every pair labelled by Bradley-Terry itself; shares of annotators in place of draws."""
    truth, first, second = np.array([1.0, -0.5, 2.0]), np.array([0, 0, 1]), np.array([1, 2, 2])
    label = expit(truth[first] - truth[second])
    pairs = lambda r: jnp.stack([r[first], r[second]], -1)
    found = fit(lambda r: bradley_terry_loss(pairs(r), label=label).sum(), np.array([3.0, 3.0, 3.0]))
    np.testing.assert_allclose(found - found.mean(), truth - truth.mean(), atol=1e-6)
    np.testing.assert_allclose(found.mean(), 3, atol=1e-6)  # Where it began: nothing moves the constant.
    centred = fit(lambda r: bradley_terry_loss(pairs(r), label=label, centring=1e-3).sum(), np.array([3.0, 3.0, 3.0]))
    np.testing.assert_allclose(centred, truth - truth.mean(), atol=2e-2)
    tie = fit(lambda r: bradley_terry_loss(r, label=np.array(0.5), margin=0.8), np.array([1.0, 0.0]))
    np.testing.assert_allclose(tie, [0.5, 0.5], atol=1e-6)


class PlackettLuceTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_two_candidates_are_bradley_terry(self):
        loss = self.variant(lambda r, order: plackett_luce_loss(r, order))
        order = np.broadcast_to(np.array([1, 0], np.int32), (6, 2))
        expected = bradley_terry_loss(REWARD[:, ::-1])
        np.testing.assert_allclose(loss(REWARD, order), expected, rtol=1e-5, atol=1e-7)

    @chex.variants(with_jit=True)
    def test_the_loss_of_a_ranking_is_drawn_without_replacement(self):
        reward, where = RNG.normal(size=(3, 5)).astype(np.float32), np.ones((3, 5), bool)
        where[1, 2] = where[2, 1:] = False
        ranking = np.stack([RNG.permutation(5) for _ in range(3)]).astype(np.int32)
        dirty = np.where(where, reward, np.nan)
        out = self.variant(lambda r, t, w: plackett_luce_loss(r, t, where=w))(dirty, ranking, where)
        expected = np.zeros(3)
        for row in range(3):
            mass = [np.exp(np.float64(reward[row, i])) for i in ranking[row] if where[row, i]]
            expected[row] = -sum(np.log(mass[k] / sum(mass[k:])) for k in range(len(mass)))
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)
        assert out[2] == 0

    def test_of_implicit_rewards_is_direct_alignment(self):
        logp, ref_logp = -RNG.gamma(2.0, size=(2, 4, 3)).astype(np.float32)
        expected = plackett_luce_dpo_loss(logp, ref_logp, beta=0.3)
        np.testing.assert_allclose(plackett_luce_loss(np.float32(0.3) * (logp - ref_logp)), expected, rtol=1e-5)
        pair = bradley_terry_loss(np.float32(0.3) * (logp - ref_logp)[:, :2])
        np.testing.assert_allclose(pair, dpo_loss(logp[:, :2], ref_logp[:, :2], beta=0.3), rtol=1e-5)


class ProcessTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_is_the_mean_over_the_labelled_positions(self):
        label, where = labelled_steps(jnp.minimum(STEP_LABEL, 1))
        out = self.variant(lambda s, c, w: process_loss(s, c, where=w))(LOGIT[..., 0], label, where)
        for row in range(4):
            real = STEP_LABEL[row] != -100
            s, good = LOGIT[row, real, 0].astype(np.float64), STEP_LABEL[row][real] > 0
            expected = -log_expit(np.where(good, s, -s)).mean() if real.any() else 0
            np.testing.assert_allclose(out[row], expected, rtol=1e-5)
        classes = np.stack([np.zeros_like(LOGIT[..., 0]), LOGIT[..., 0]], -1)
        np.testing.assert_allclose(process_class_loss(classes, label, where=where), out, rtol=1e-5)
        with_bool = process_loss(LOGIT[..., 0], label > 0, where=where)
        np.testing.assert_array_equal(with_bool, process_loss(LOGIT[..., 0], label, where=where))

    @chex.variants(with_jit=True)
    def test_every_token_may_predict_the_outcome(self):
        correct, mask = np.array([True, False, True, False]), np.arange(5) < np.array([[5], [3], [1], [0]])
        every = np.broadcast_to(correct[:, None], (4, 5))
        out = self.variant(lambda s, c, w: outcome_loss(s, c, where=w))(LOGIT[..., 0], every, mask)
        s = LOGIT[..., 0].astype(np.float64)
        np.testing.assert_allclose(out, np.where(mask, -log_expit(np.where(every, s, -s)), 0), rtol=1e-5)
        np.testing.assert_allclose(out[0, -1], outcome_loss(LOGIT[0, -1, :1], np.array([True]))[0], rtol=1e-6)


def class_formula(logit, label):
    """Mean cross-entropy of the labelled positions, 0 without one."""
    out = np.zeros(len(logit))
    for row in range(len(logit)):
        real = label[row] != -100
        if real.any():
            logp = log_softmax(logit[row][real].astype(np.float64), -1)
            out[row] = -np.take_along_axis(logp, label[row][real][:, None], -1).mean()
    return out


def test_classes_under_the_properties_of_every_loss():
    label, where = labelled_steps(STEP_LABEL)
    run = jax.jit(jax.value_and_grad(lambda s, c, w: process_class_loss(s, c, where=w).sum()))
    clean, grad = run(LOGIT, label, where)
    expected = class_formula(LOGIT, STEP_LABEL)
    loss = process_class_loss(LOGIT, STEP_LABEL, where=where)  # Labels of -100 that are masked are never read.
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-7)
    dirty, dirty_grad = run(np.where(where[..., None], LOGIT, np.nan), label, where)
    np.testing.assert_array_equal(dirty, clean)
    np.testing.assert_array_equal(dirty_grad, grad)
    p = np.exp(log_softmax(LOGIT.astype(np.float64), -1))
    share = np.asarray(where) / np.maximum(np.asarray(where).sum(-1, keepdims=True), 1)
    np.testing.assert_allclose(grad, share[..., None] * (p - np.eye(3)[np.asarray(label)]), rtol=1e-4, atol=1e-6)
    assert np.isfinite(run(1e4 * np.sign(LOGIT), label, where)[1]).all()
    low = process_class_loss(jnp.asarray(LOGIT, jnp.bfloat16), label, where=where)
    assert low.dtype == jnp.float32
    wide = np.asarray(jnp.asarray(LOGIT, jnp.bfloat16), np.float32)
    np.testing.assert_allclose(low, class_formula(wide, STEP_LABEL), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        jax.pmap(lambda s, c, w: process_class_loss(s, c, where=w))(LOGIT, label, where), expected, rtol=1e-5, atol=1e-7
    )


class CostTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_is_the_papers_with_the_pair_turned_round(self):
        harmful = np.array([[False, True], [False, False], [True, True]] * 2)
        out = self.variant(cost_model_loss)(REWARD, harmful)
        safer, more_harmful = np.moveaxis(REWARD.astype(np.float64), -1, 0)  # y_l and y_w of the paper.
        s_l, s_w = np.moveaxis(np.where(harmful, 1, -1), -1, 0)
        expected = -log_expit(more_harmful - safer) - log_expit(s_w * more_harmful) - log_expit(s_l * safer)
        np.testing.assert_allclose(out, expected, rtol=1e-5)

    @chex.variants(with_jit=True)
    def test_gradient_lowers_the_cost_of_the_safer_and_of_the_safe(self):
        grad = self.variant(jax.grad(lambda c: cost_model_loss(c, np.array([False, True]))))(jnp.zeros(2))
        np.testing.assert_allclose(grad, [1.0, -1.0], rtol=1e-6)


def test_costs_are_above_zero_where_harm_is():
    """Four completions in every order, harmful ones among them: the fit ranks them and puts 0 in between."""
    order = np.array([[i, j] for i in range(4) for j in range(i + 1, 4)])
    harmful = np.array([False, False, True, True])
    loss = lambda c: cost_model_loss(c[order], harmful[order]).sum() + 0.01 * jnp.square(c).sum()
    cost = fit(loss, np.zeros(4))
    assert (np.diff(cost) > 0).all()
    np.testing.assert_array_equal(cost > 0, harmful)
    shifted = bradley_terry_loss(-cost[order]), bradley_terry_loss(-cost[order] - 7)
    np.testing.assert_allclose(*shifted, rtol=1e-4)  # A comparison alone would not know where 0 is.


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"centring must be at least 0, got -0\.1"):
        bradley_terry_loss(REWARD, centring=-0.1)
