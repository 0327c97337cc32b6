import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import parameterized
from scipy.optimize import minimize
from scipy.special import expit, softmax

from tests.compiled import compiled
from tiltjax.losses.binary import nca_loss, nca_pair_loss
from tiltjax.losses.preference import dpo_loss
from tiltjax.losses.process import (
    aggregate_steps,
    implicit_prm_ce_loss,
    implicit_prm_dpo_loss,
    implicit_prm_kto_loss,
    implicit_prm_nca_loss,
    implicit_process_reward,
    implicit_q,
    step_index,
    step_reward,
)

(
    aggregate_steps,
    dpo_loss,
    implicit_prm_ce_loss,
    implicit_prm_dpo_loss,
    implicit_prm_kto_loss,
    implicit_prm_nca_loss,
    implicit_process_reward,
    implicit_q,
    nca_loss,
    nca_pair_loss,
    step_index,
    step_reward,
) = map(
    compiled,
    (
        aggregate_steps,
        dpo_loss,
        implicit_prm_ce_loss,
        implicit_prm_dpo_loss,
        implicit_prm_kto_loss,
        implicit_prm_nca_loss,
        implicit_process_reward,
        implicit_q,
        nca_loss,
        nca_pair_loss,
        step_index,
        step_reward,
    ),
)

RNG = np.random.default_rng(0)
V, H, BETA = 3, 4, 0.7
TREE = np.array(list(itertools.product(range(V), repeat=H)))  # All 81 completions, [81, 4].
LOGP, REF_LOGP = -RNG.gamma(2.0, size=(2, 5, 4)).astype(np.float32)
MASK = RNG.random((5, 4)) < 0.6
MASK[0] = False
AGGREGATES = {"min": np.min, "product": np.prod, "last": lambda x: x[-1], "mean": np.mean, "sum": np.sum}


def tree_logp(scale):
    """Token log-probabilities of every completion under a random policy, [81, 4]."""
    out = np.empty(TREE.shape)
    for t in range(H):
        tables = {prefix: np.log(softmax(scale * RNG.normal(size=V))) for prefix in set(map(tuple, TREE[:, :t]))}
        out[:, t] = [tables[tuple(y[:t])][y[t]] for y in TREE]
    return out


TOKEN_LOGP, REF_TOKEN_LOGP = tree_logp(1.5), tree_logp(1.0)
REWARD = BETA * (TOKEN_LOGP - REF_TOKEN_LOGP).sum(-1)
REF = np.exp(REF_TOKEN_LOGP.sum(-1))


def given(t, i, f):
    """``E_ref[f(y) | y_<=t]`` at the first ``t`` tokens of completion ``i``, by enumeration."""
    same = (TREE[:, :t] == TREE[i, :t]).all(-1)
    return REF[same] @ f[same] / REF[same].sum()


def test_the_log_ratio_of_a_prefix_is_its_soft_value():
    np.testing.assert_allclose(REF.sum(), 1, rtol=1e-12)
    with jax.enable_x64(True):
        q = np.asarray(implicit_q(TOKEN_LOGP, REF_TOKEN_LOGP, beta=BETA))
        r = np.asarray(implicit_process_reward(TOKEN_LOGP, REF_TOKEN_LOGP, beta=BETA))
    assert q.dtype == np.float64
    for i, t in itertools.product(range(len(TREE)), range(H)):
        value = BETA * np.log(given(t + 1, i, np.exp(REWARD / BETA)))
        np.testing.assert_allclose(q[i, t], value, rtol=0, atol=1e-12)
        before = BETA * np.log(given(t, i, np.exp(REWARD / BETA)))  # Without token t: another number.
        np.testing.assert_allclose(r[i, t], value - before, rtol=0, atol=1e-12)
        assert given(t + 1, i, REWARD) <= q[i, t] + 1e-12
        assert q[i, t] <= REWARD[(TREE[:, : t + 1] == TREE[i, : t + 1]).all(-1)].max() + 1e-12
    np.testing.assert_allclose(q[:, -1], REWARD, atol=1e-12)
    np.testing.assert_allclose(r.sum(-1), REWARD, atol=1e-12)
    assert np.abs(r).max() > 1  # Conditioning on y_<t would be wrong by as much.


class TokenTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_masked_tokens_take_no_part(self):
        dirty = np.where(MASK, LOGP, np.nan)
        run = self.variant(
            lambda a, b, m: tuple(f(a, b, beta=0.5, where=m) for f in (implicit_q, implicit_process_reward))
        )
        q, r = run(dirty, REF_LOGP, MASK)
        expected = np.where(MASK, 0.5 * (LOGP - REF_LOGP), 0)
        np.testing.assert_allclose(r, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(q, np.where(MASK, expected.cumsum(-1), 0), rtol=1e-5, atol=1e-6)

    @chex.variants(with_jit=True)
    def test_steps_are_the_sums_of_exactly_their_tokens(self):
        last = RNG.random((5, 4)) < 0.5
        dirty = np.where(MASK, LOGP, np.nan)

        def run(r, ends, m):
            return step_reward(r, step_index(ends), num_steps=3, where=m)

        reward, real = self.variant(run)(dirty, last, MASK)
        for row in range(5):
            steps, k = [[] for _ in range(5)], 0
            for t in range(4):
                steps[k] += [LOGP[row, t]] if MASK[row, t] else []
                k += last[row, t]
            np.testing.assert_allclose(reward[row], [sum(s) for s in steps[:3]], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(real[row], [bool(s) for s in steps[:3]])

    @chex.variants(with_jit=True)
    @parameterized.parameters(*AGGREGATES)
    def test_aggregation(self, mode):
        expected = AGGREGATES[mode]
        p = RNG.random((5, 4)).astype(np.float32)
        run = self.variant(lambda x, w: aggregate_steps(x, mode=mode, where=w))
        formula = [expected(p[row][MASK[row]].astype(np.float64)) if MASK[row].any() else 0 for row in range(5)]
        np.testing.assert_allclose(run(np.where(MASK, p, np.nan), MASK), formula, rtol=1e-5)
        np.testing.assert_allclose(aggregate_steps(p, mode=mode), [expected(row) for row in p], rtol=1e-5)
        grad = jax.grad(lambda x: run(x, MASK).sum())(jnp.where(MASK, p, jnp.nan))
        assert np.isfinite(grad).all()
        assert (grad[~MASK] == 0).all()


def test_steps_add_up_and_strangers_belong_to_none():
    reward = implicit_process_reward(LOGP, REF_LOGP, beta=0.5)
    step = step_index(np.array([[True, False, True, False]] * 5))
    steps, real = step_reward(reward, step, num_steps=3)
    assert bool(real.all())
    np.testing.assert_allclose(aggregate_steps(steps, mode="sum", where=real), reward.sum(-1), rtol=1e-5)
    some, real = step_reward(reward, jnp.where(step == 1, -1, step + 2), num_steps=4)
    np.testing.assert_array_equal(real, np.broadcast_to([False, False, True, False], (5, 4)))
    np.testing.assert_allclose(some[:, 2], reward[:, 0], rtol=1e-6)


def fit(loss, size):
    """Minimiser over log-probabilities (of ``size`` completions) and a bias, in float64."""
    with jax.enable_x64(True):
        both = jax.jit(jax.value_and_grad(lambda x: loss(jax.nn.log_softmax(x[:-1]), x[-1])))
        objective = lambda x: tuple(np.asarray(v) for v in both(jnp.asarray(x)))
        x = minimize(objective, np.zeros(size + 1), jac=True, method="BFGS", options={"gtol": 1e-10}).x
        return x[:-1] - np.log(np.exp(x[:-1]).sum()), x[-1]


REF6 = RNG.dirichlet(2 * np.ones(6))
ODDS = RNG.normal(1.0, 1.5, size=6)  # True log-odds of correctness.


def expected_ce(logp, bias):
    """Cross-entropy on labels of every completion, in proportion to reference and odds."""
    terms = (
        p * implicit_prm_ce_loss(logp, np.log(REF6), np.full(6, c), beta=BETA, bias=bias)
        for c, p in ((True, expit(ODDS)), (False, expit(-ODDS)))
    )
    return jnp.sum(REF6 * sum(terms))


def test_cross_entropy_needs_a_bias_to_fit_the_odds():
    logp, bias = fit(expected_ce, 6)
    reward = BETA * (logp - np.log(REF6))
    np.testing.assert_allclose(reward + bias, ODDS, atol=1e-5)
    np.testing.assert_allclose(bias, BETA * np.log(REF6 @ np.exp(ODDS / BETA)), atol=1e-5)
    without, _ = fit(lambda logp, bias: expected_ce(logp, 0.0) + bias**2, 6)
    reward = BETA * (without - np.log(REF6))
    np.testing.assert_allclose(REF6 @ np.exp(reward / BETA), 1, atol=1e-10)
    assert np.abs(reward - ODDS).mean() > 0.5


def test_pairs_fit_the_odds_up_to_a_constant():
    """Two completions at a time, each labelled on its own: only pairs of one correct and one wrong teach."""
    pair = np.array(list(itertools.permutations(range(6), 2)))
    labels = np.array([[True, True], [True, False], [False, True], [False, False]])

    def loss(logp, bias):
        total = bias**2
        for label in labels:
            chance = expit(np.where(label, 1, -1) * ODDS[pair]).prod(-1)
            rows = logp[pair], np.log(REF6)[pair], np.broadcast_to(label, pair.shape)
            total += jnp.sum(chance * implicit_prm_dpo_loss(*rows, beta=BETA))
        return total

    logp, _ = fit(loss, 6)
    constant = BETA * (logp - np.log(REF6)) - ODDS
    np.testing.assert_allclose(constant, constant.mean(), atol=1e-5)


def test_a_bias_for_every_prompt():
    bias, correct = np.linspace(-1, 1, 5, dtype=np.float32), RNG.random((5, 4)) < 0.5
    run = jax.jit(lambda x, ref, correct, bias: implicit_prm_ce_loss(x, ref, correct, beta=0.5, bias=bias))
    out = run(LOGP, REF_LOGP, correct, bias)
    for row in range(5):
        np.testing.assert_allclose(out[row], run(LOGP[row], REF_LOGP[row], correct[row], bias[row]), rtol=1e-6)
    total = lambda b: implicit_prm_ce_loss(LOGP, REF_LOGP, correct, beta=0.5, bias=b, where=MASK).sum()
    grad = jax.jit(jax.grad(total))(bias)
    error = expit(0.5 * (LOGP - REF_LOGP) + np.asarray(bias)[:, None]) - correct
    np.testing.assert_allclose(grad, np.where(MASK, error, 0).sum(-1), rtol=1e-4, atol=1e-6)


class PairTest(chex.TestCase):
    @chex.variants(with_jit=True)
    def test_one_right_and_one_wrong_are_the_losses_of_a_pair(self):
        arrays = LOGP[:, :2], REF_LOGP[:, :2], np.broadcast_to([True, False], (5, 2))
        run = self.variant(lambda *x: tuple(f(*x, beta=0.5) for f in (implicit_prm_dpo_loss, implicit_prm_nca_loss)))
        dpo, nca = run(*arrays)
        np.testing.assert_allclose(dpo, dpo_loss(*arrays[:2], beta=0.5), rtol=1e-5)
        np.testing.assert_allclose(nca, nca_pair_loss(*arrays[:2], beta=0.5), rtol=1e-5)


def test_noise_contrast_is_the_limit_of_hard_targets():
    correct = RNG.random((5, 4)) < 0.5
    correct[:, 0], correct[3] = True, False
    out = implicit_prm_nca_loss(LOGP, REF_LOGP, correct, beta=0.5)
    limit = nca_loss(LOGP, REF_LOGP, correct.astype(np.float32), beta=0.5, alpha=0.01)
    rows = [0, 1, 2, 4]
    np.testing.assert_allclose(out[np.array(rows)], limit[np.array(rows)], rtol=1e-5)
    grad = jax.grad(lambda x: implicit_prm_nca_loss(x, REF_LOGP, correct, beta=0.5)[3])(jnp.asarray(LOGP))
    assert (grad[3] > 0).all()  # Nothing correct: all candidates are pushed down.


def test_prompts_of_one_kind_teach_no_pair():
    run = jax.jit(jax.value_and_grad(lambda x, c: implicit_prm_dpo_loss(x, REF_LOGP, c, beta=0.5).sum()))
    for label in (True, False):
        value, grad = run(LOGP, np.full((5, 4), label))
        assert value == 0
        np.testing.assert_array_equal(grad, np.zeros((5, 4)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: implicit_q(LOGP, REF_LOGP, beta=0.0), "beta must be a finite number above 0, got 0.0"),
        (lambda: implicit_prm_ce_loss(LOGP, REF_LOGP, MASK, beta=-1.0), "beta must be a finite number above 0, got -1"),
        (lambda: implicit_prm_dpo_loss(LOGP, REF_LOGP, MASK, beta=0.0), "beta must be a finite number above 0"),
        (lambda: implicit_prm_kto_loss(LOGP, REF_LOGP, MASK, LOGP, beta=0.0), "beta must be a finite number above 0"),
        (lambda: implicit_prm_nca_loss(LOGP, REF_LOGP, MASK, beta=0.0), "beta must be a finite number above 0"),
        (lambda: aggregate_steps(LOGP, mode="max"), "mode must be one of last, mean, min, product, sum; got 'max'"),
        (lambda: step_reward(LOGP, np.zeros((5, 4), np.int32), num_steps=0), "num_steps must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
