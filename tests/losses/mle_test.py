import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import softmax

from tiltjax.losses import mle
from tiltjax.tilt.weights import tilt

REF = np.array([0.30, 0.25, 0.20, 0.15, 0.07, 0.03])
REWARD6 = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
RNG = np.random.default_rng(0)
LOGP = (-3 * RNG.gamma(2.0, size=(5, 12))).astype(np.float32)
REWARD = RNG.normal(size=(5, 12)).astype(np.float32)
WHERE = RNG.random((5, 12)) < 0.7

sft_loss, best_of_n_sft_loss = jax.jit(mle.sft_loss), jax.jit(mle.best_of_n_sft_loss)
tilted_mle_loss, weighted_mle_loss = jax.jit(mle.tilted_mle_loss), jax.jit(mle.weighted_mle_loss)
reward_weighted_regression_loss = jax.jit(mle.reward_weighted_regression_loss)
var_loss, var_weights = jax.jit(mle.var_loss), jax.jit(mle.var_weights)
var_importance_loss = jax.jit(mle.var_importance_loss)


def test_beta_to_infinity_is_sft():
    np.testing.assert_allclose(tilted_mle_loss(LOGP, REWARD, beta=1e7), sft_loss(LOGP), rtol=1e-5)


def test_beta_to_zero_is_best_of_n():
    out = tilted_mle_loss(LOGP, REWARD, beta=1e-6)
    np.testing.assert_allclose(out, best_of_n_sft_loss(LOGP, REWARD), rtol=1e-6)
    np.testing.assert_allclose(out, -LOGP[np.arange(5), REWARD.argmax(-1)], rtol=1e-6)


def test_importance_weights_with_the_plain_log_z_are_the_tilt():
    @jax.jit
    def both(logp, reward, where):
        log_z = tilt(reward, beta=0.4, where=where).log_z
        return (
            mle.var_importance_loss(logp, reward, log_z, beta=0.4, where=where),
            mle.tilted_mle_loss(logp, reward, beta=0.4, where=where),
        )

    chex.assert_trees_all_close(*both(LOGP, REWARD, WHERE), rtol=1e-5)


def test_one_candidate_is_sft_whatever_its_reward():
    logp, reward = LOGP[:, :1], 1e4 * REWARD[:, :1]
    for loss in (tilted_mle_loss(logp, reward, beta=0.1), best_of_n_sft_loss(logp, reward)):
        np.testing.assert_allclose(loss, -logp[:, 0], rtol=1e-6)


def test_rewards_count_up_to_a_constant_per_prompt():
    shifted = REWARD + np.float32([[512.0], [-64.0], [0.0], [1.0], [2.0]])
    rounded = np.round(REWARD * 64) / 64  # So that the shift is exact in float32.
    shifted = rounded + (shifted - REWARD).round()
    np.testing.assert_allclose(
        tilted_mle_loss(LOGP, shifted, beta=0.3), tilted_mle_loss(LOGP, rounded, beta=0.3), rtol=1e-5
    )


def test_beta_per_prompt():
    beta = np.float32([0.1, 0.2, 0.5, 1.0, 5.0])
    out = np.asarray(tilted_mle_loss(LOGP, REWARD, beta=beta))
    for row in range(5):
        np.testing.assert_allclose(out[row], tilted_mle_loss(LOGP[row], REWARD[row], beta=float(beta[row])), rtol=1e-6)


def minimiser(loss, arms):
    """The tabular policy that minimises ``loss(log pi)``, in float64."""
    both = jax.jit(jax.value_and_grad(lambda logits: loss(jax.nn.log_softmax(logits))))

    def objective(logits):
        return tuple(np.asarray(x) for x in both(logits))

    return softmax(minimize(objective, np.zeros(arms), jac=True, method="BFGS", options={"gtol": 1e-9}).x)


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_the_minimiser_is_the_tilt(beta):
    # 100 candidates in the exact proportions of the reference: the population of Eq. 20.
    arm = np.repeat(np.arange(6), np.round(REF * 100).astype(int))
    with jax.enable_x64(True):
        found = minimiser(lambda logp: mle.tilted_mle_loss(logp[arm], REWARD6[arm], beta=beta), 6)
    target = REF * np.exp(REWARD6 / beta)
    np.testing.assert_allclose(found, target / target.sum(), atol=1e-7)


def test_normalisation_over_prompts_multiplies_a_prompt_by_its_z():
    # Two prompts with one reward gap but different levels, shared parameters: the share of each in the gradient.
    reward = np.float32([[0.0, 1.0], [2.0, 3.0]])
    logp = np.full((2, 2), -1, np.float32)
    joint = np.asarray(reward_weighted_regression_loss(logp.reshape(4), reward.reshape(4), beta=1.0)).reshape(2, 2)
    alone = np.asarray(tilted_mle_loss(logp, reward, beta=1.0))
    np.testing.assert_allclose(alone, [1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(joint.sum(-1)[1] / joint.sum(-1)[0], np.exp(2.0), rtol=1e-5)


def test_reward_weighted_regression_weights_have_mean_one():
    where = WHERE.reshape(-1)
    weights = np.asarray(reward_weighted_regression_loss(-np.ones(60), REWARD.reshape(-1), beta=0.2, where=where))
    np.testing.assert_allclose(weights.sum(), where.sum(), rtol=1e-5)


def test_advantage_weights_clip_without_overflow():
    advantage = np.float32([-1e4, -1.0, 0.0, 1.0, 2.9, 3.1, 1e4])

    def loss(logp, beta):
        value = mle.advantage_weighted_regression_loss(logp, advantage, beta=beta, max_weight=20.0)
        return value.sum(), value

    run = jax.jit(jax.grad(loss, has_aux=True))
    for beta in (1.0, 1e-30):
        grad, value = run(np.full(7, -1, np.float32), beta)
        expected = np.minimum(np.exp(np.minimum(advantage.astype(np.float64) / beta, 100)), 20)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(grad, -expected, rtol=1e-5)
        assert np.asarray(value).max() == 20.0


def test_best_of_n_takes_the_first_of_equals_on_any_device():
    logp = -np.arange(1, 17, dtype=np.float32)
    reward = np.float32(np.isin(np.arange(16), [5, 9, 13]))
    assert float(best_of_n_sft_loss(logp, reward)) == 6.0
    assert float(best_of_n_sft_loss(logp, reward, where=np.arange(16) != 5)) == 10.0
    parts = [x.reshape(8, 2) for x in (logp, reward)]
    out = jax.pmap(lambda l, r: mle.best_of_n_sft_loss(l, r, axis_name="n"), axis_name="n")(*parts)
    np.testing.assert_array_equal(out, np.full(8, 6.0))


def test_a_weight_of_zero_takes_no_part():
    logp, weights = np.float32([-1.0, -np.inf]), np.float32([1.0, 0.0])
    value, grad = jax.jit(jax.value_and_grad(mle.weighted_mle_loss))(logp, weights)
    assert float(value) == 1.0
    np.testing.assert_array_equal(grad, [-1.0, 0.0])


def test_rows_of_the_var_softmax_sum_to_one():
    ref_logp, reward = (-5 * RNG.random((4, 6))).astype(np.float32), RNG.normal(size=(4, 6)).astype(np.float32)
    columns = [var_weights(ref_logp, reward, beta=0.3, matched=np.full(4, k, np.int32)) for k in range(6)]
    weights = np.stack(columns, -1)
    np.testing.assert_allclose(weights.sum(-1), np.ones(4), rtol=1e-6)
    np.testing.assert_allclose(weights, softmax(ref_logp.astype(np.float64) + reward / 0.3, -1), rtol=1e-4)


def test_equal_var_scores_weigh_one_over_the_batch():
    weights = var_weights(np.full((4, 4), -40, np.float32), np.full((4, 4), 3, np.float32), beta=0.1)
    np.testing.assert_allclose(weights, np.full(4, 1 / 4), rtol=1e-6)


def test_var_degenerates_to_sft_where_prompts_share_no_completions():
    ref_logp = np.full((4, 4), -120.0, np.float32)
    np.fill_diagonal(ref_logp, -60.0)
    reward = np.random.default_rng(2).normal(size=(4, 4)).astype(np.float32)
    logp = -np.arange(1.0, 5.0, dtype=np.float32)
    np.testing.assert_array_equal(var_weights(ref_logp, reward, beta=0.5), np.ones(4))
    np.testing.assert_array_equal(var_loss(logp, ref_logp, reward, beta=0.5), -logp)


def test_var_as_printed_fits_the_reference_twice():
    # One prompt, its six completions enumerated; the data are drawn from the reference.
    beta, tilted = 0.5, REF * np.exp(REWARD6 / 0.5)
    ref_logp, reward = np.broadcast_to(np.log(REF), (6, 6)), np.broadcast_to(REWARD6, (6, 6))
    log_z = np.full(6, np.log(tilted.sum()))

    def printed(logp):
        return jnp.sum(REF * mle.var_loss(logp, ref_logp, reward, beta=beta))

    def importance(logp):
        return jnp.sum(REF * mle.var_importance_loss(logp[:, None], REWARD6[:, None], log_z, beta=beta))

    with jax.enable_x64(True):
        np.testing.assert_allclose(minimiser(printed, 6), REF * tilted / (REF * tilted).sum(), atol=1e-7)
        np.testing.assert_allclose(minimiser(importance, 6), tilted / tilted.sum(), atol=1e-7)


def test_var_is_exact_where_rewards_over_beta_are_huge():
    reward = np.float32([[1e5, 1e5 - 1.0, 1e5 - 2.0]] * 3)
    weights = var_weights(np.zeros((3, 3), np.float32), reward, beta=1.0)
    np.testing.assert_allclose(weights, softmax([0.0, -1.0, -2.0]), rtol=1e-6)
    ref_logp = np.float32([[-0.11, -0.22, -0.33]] * 3)
    weights = var_weights(ref_logp, np.full((3, 3), 1e5, np.float32), beta=1.0)
    np.testing.assert_allclose(weights, softmax([-0.11, -0.22, -0.33]), rtol=1e-6)


def test_var_masks_columns_and_rows():
    rng = np.random.default_rng(4)
    ref_logp, reward, logp = rng.normal(size=(3, 5)), rng.normal(size=(3, 5)), -np.ones(3)
    where = np.ones((3, 5), bool)
    where[:, 4] = False
    where[1, 1] = False  # Prompt 1 has lost its own completion.
    ref_logp[~where] = np.nan
    out = var_loss(*(np.float32(x) for x in (logp, ref_logp, reward)), beta=1.0, where=where)
    expected = [softmax((ref_logp + reward)[row, :4])[row] for row in (0, 2)]
    np.testing.assert_allclose(out, [expected[0], 0.0, expected[1]], rtol=1e-5)


def test_var_needs_a_column_for_every_prompt():
    with pytest.raises(ValueError, match="matched must be given where 4 prompts share 3 columns, got None"):
        var_loss(-np.ones(4, np.float32), *np.zeros((2, 4, 3), np.float32), beta=1.0)
    matched = np.int32([0, 1, 2, 0])
    out = var_loss(-np.ones(4, np.float32), *np.zeros((2, 4, 3), np.float32), beta=1.0, matched=matched)
    np.testing.assert_allclose(out, np.full(4, 1 / 3), rtol=1e-6)


def test_a_wrong_log_z_is_huge_but_finite():
    out = var_importance_loss(np.float32([-1e4]), np.float32([1e4]), np.float32(0), beta=1.0)
    assert 1e30 < float(out) < np.inf


@pytest.mark.parametrize(
    "call",
    [
        lambda beta: mle.tilted_mle_loss(LOGP, REWARD, beta=beta),
        lambda beta: mle.var_loss(LOGP[0, :5], LOGP[:, :5], REWARD[:, :5], beta=beta),
        lambda beta: mle.var_importance_loss(LOGP, REWARD, REWARD[:, 0], beta=beta),
        lambda beta: mle.reward_weighted_regression_loss(LOGP, REWARD, beta=beta),
        lambda beta: mle.advantage_weighted_regression_loss(LOGP, REWARD, beta=beta),
    ],
)
def test_bad_beta_is_named(call):
    with pytest.raises(ValueError, match="beta must be a finite number above 0, got -1"):
        call(-1.0)


def test_bad_max_weight_is_named():
    with pytest.raises(ValueError, match="max_weight must be a finite number above 0, got 0"):
        mle.advantage_weighted_regression_loss(LOGP, REWARD, beta=1.0, max_weight=0.0)
