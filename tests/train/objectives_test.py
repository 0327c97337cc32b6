import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.special import expit, log_softmax, softmax

from tests.train.worlds import ragged_candidates, tiny_model
from tiltjax.data.candidates import lengths, trim
from tiltjax.data.packing import pack_sequences
from tiltjax.train.objectives import (
    VarBatch,
    candidate_weights,
    likelihood_objective,
    method_kernel,
    packed_objective,
    sft_objective,
    var_objective,
)
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step

METHODS = ("tilted_mle", "best_of_n_sft", "dpo", "var_importance")
BETA = 0.7
WHERE = np.array([[1, 1], [1, 0], [0, 1], [0, 0], [1, 1], [1, 1]], bool)


@functools.cache
def batch():
    """Six prompts with two completions each, some of them masked and what is masked spoilt; one is empty."""
    whole = ragged_candidates(6)
    mask = whole.completion_mask.copy()
    mask[4, 1] = False
    spoilt = {name: np.where(WHERE, getattr(whole, name), np.nan) for name in ("reward", "ref_logp")}
    return dataclasses.replace(whole, completion_mask=mask, where=WHERE, **spoilt)


@functools.cache
def masked():
    """The same; every third token is not learned from, of one completion none."""
    loss_mask = batch().completion_mask & (np.arange(7) % 3 != 1)
    loss_mask[0, 1] = False
    return dataclasses.replace(batch(), loss_mask=loss_mask)


@functools.cache
def token_logp():
    """Log-probability of every completion token in float64, from whole logits, ``[B, N, T]``."""
    model, c = tiny_model(), batch()
    hidden = np.asarray(jax.jit(type(model).hidden)(model, c.prompt, c.prompt_mask, c.completion), np.float64)
    logp = log_softmax(hidden @ np.asarray(model.projection(), np.float64).T, axis=-1)
    return np.take_along_axis(logp, c.completion[..., None], axis=-1)[..., 0]


def logp():
    return np.where(batch().completion_mask, token_logp(), 0).sum(-1)


def evaluated(objective, part):
    loss, metrics = jax.jit(lambda model, part: objective(model, None, part, jax.random.key(0)))(tiny_model(), part)
    return float(loss.mean), float(loss.count), {name: float(m.mean) for name, m in metrics.items()}


def test_sft_is_the_cross_entropy_over_all_tokens():
    real = batch().completion_mask & WHERE[..., None]
    assert len(set(real.sum((1, 2)).tolist())) > 3
    loss, count, _ = evaluated(sft_objective(), batch())
    assert loss == pytest.approx(-token_logp()[real].mean(), rel=1e-5)
    assert count == real.sum()


def rows():
    """Real candidates of every prompt: ``(logp, ref_logp, reward)``, each of 0, 1 or 2 numbers."""
    each = zip(logp(), batch().ref_logp, batch().reward, WHERE, strict=True)
    return [tuple(np.float64(x[w]) for x in (l, q, r)) for l, q, r, w in each]


def importance_weights(reward):
    others = [np.delete(reward, i) for i in range(len(reward))]
    log_z = [np.log(np.mean(np.exp(other / BETA))) if other.size else 0.0 for other in others]
    return np.exp(reward / BETA - log_z)


EXPECTED = {
    "tilted_mle": lambda l, q, r: -(softmax(r / BETA) * l).sum(),
    "best_of_n_sft": lambda l, q, r: -l[r.argmax()],
    "var_importance": lambda l, q, r: -(importance_weights(r) * l).mean(),
    "dpo": lambda l, q, r: -np.log(expit(BETA * ((l - q)[0] - (l - q)[1]))) if len(l) == 2 else 0.0,
}


@pytest.mark.parametrize("method", METHODS)
def test_kernels_are_their_formulas_and_masked_is_left_out(method):
    kernel = method_kernel(method, beta=BETA)
    logp_, values = (
        np.float32(np.where(WHERE, logp(), np.nan)),
        [EXPECTED[method](*r) if len(r[0]) else 0 for r in rows()],
    )
    np.testing.assert_allclose(kernel(jnp.asarray(logp_), batch())[0], values, rtol=1e-5)
    grad = jax.grad(lambda x: jnp.sum(kernel(x, batch())[0]))(jnp.asarray(logp_))
    assert np.isfinite(grad).all()
    assert not np.asarray(grad)[~WHERE].any()
    assert np.asarray(grad)[0].any()


def test_prompts_without_a_candidate_do_not_count():
    loss, count, metrics = evaluated(likelihood_objective(method_kernel("tilted_mle", beta=BETA)), batch())
    real = [row for row in rows() if len(row[0])]
    assert count == len(real) == 5
    assert loss == pytest.approx(np.mean([EXPECTED["tilted_mle"](*row) for row in real]), rel=1e-5)
    assert metrics == {"logp": pytest.approx(np.mean([row[0].mean() for row in real]), rel=1e-5)}


WEIGHTS = {
    "sft": lambda r: np.full(len(r), 1 / len(r)),
    "tilted_mle": lambda r: softmax(r / BETA),
    "best_of_n_sft": lambda r: r == r.max(),
    "var_importance": lambda r: importance_weights(r) / len(r),
}


@pytest.mark.parametrize("method", WEIGHTS)
def test_candidates_weigh_what_their_formula_says(method):
    weights = np.asarray(candidate_weights(method_kernel(method, beta=BETA), batch()))
    for row, where, reward in zip(weights, WHERE, batch().reward, strict=True):
        if where.any():
            np.testing.assert_allclose(row[where], WEIGHTS[method](np.float64(reward[where])), rtol=1e-5)
        assert not row[~where].any()


def test_a_likelihood_is_that_of_the_tokens_that_are_learned_from():
    part = masked()
    stats = jax.jit(tiny_model().score)(part.prompt, part.prompt_mask, part.completion)
    told = np.where(part.loss_mask, np.asarray(stats.logp, np.float64), 0).sum(-1)
    real = part.where & part.loss_mask.any(-1)
    reward = [np.float64(row[where]) for row, where in zip(part.reward, real, strict=True) if where.any()]
    logp = [row[where] for row, where in zip(told, real, strict=True) if where.any()]
    loss, count, _ = evaluated(likelihood_objective(method_kernel("tilted_mle", beta=BETA)), part)
    assert count == len(logp)
    expected = [-(softmax(r / BETA) * row).sum() for r, row in zip(reward, logp, strict=True)]
    assert loss == pytest.approx(np.mean(expected), rel=1e-5)
    loss, count, _ = evaluated(sft_objective(), part)
    assert count == (part.loss_mask & part.where[..., None]).sum()
    assert loss == pytest.approx(-told[real].sum() / count, rel=1e-5)


@pytest.mark.parametrize("batch", [batch, masked])
def test_packed_rows_give_the_loss_and_the_gradient_of_the_candidates(batch):
    """Several sequences to a row, a row of nothing, what is masked left out, also inside a completion."""
    kernel = method_kernel("tilted_mle", beta=BETA)
    weights = np.asarray(candidate_weights(kernel, batch()))
    rows = pack_sequences(batch(), weights, length=20, rows=8, pad_id=9)
    assert (rows.segment.max(axis=1) > 0).any()
    assert (rows.segment[-1] == -1).all()

    def both(objective, part):
        def total(model):
            loss, metrics = objective(model, None, part, jax.random.key(0))
            return loss.total, (loss, metrics["logp"])

        grad, (loss, seen) = jax.jit(jax.grad(total, has_aux=True))(tiny_model())
        return jax.tree.leaves((grad, loss)), float(seen.mean)

    (expected, _), (packed, mean) = both(likelihood_objective(kernel), batch()), both(packed_objective(), rows)
    for a, b in zip(packed, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * max(1, float(np.abs(b).max())))
    mass = np.where(batch().completion_mask.any(axis=-1), weights, 0).sum()
    assert mean == pytest.approx(-float(expected[-1]) / mass, rel=1e-5)


def test_dpo_at_the_reference():
    part = dataclasses.replace(ragged_candidates(6), ref_logp=np.full((6, 2), -3.0, np.float32))
    loss, metrics = method_kernel("dpo", beta=BETA)(jnp.asarray(part.ref_logp), part)
    np.testing.assert_allclose(loss, np.log(2), rtol=1e-6)
    np.testing.assert_array_equal(metrics["margin"], 0)
    _, metrics = method_kernel("dpo", beta=BETA)(jnp.asarray(part.ref_logp + np.array([[0.0, 1.0]], np.float32)), part)
    np.testing.assert_allclose(metrics["margin"], -BETA, rtol=1e-6)
    np.testing.assert_array_equal(metrics["accuracy"], 0)


def test_var_normalises_every_candidate_index_over_the_prompts():
    rng = np.random.default_rng(1)
    part = dataclasses.replace(batch(), where=None, completion_mask=ragged_candidates(6).completion_mask)
    ref_logp, reward = rng.normal(-3, 1, (6, 2, 6)), rng.normal(size=(6, 2, 6))
    values = [np.float32(x) for x in (ref_logp, reward)]
    whole = VarBatch(candidates=part, ref_logp=values[0], reward=values[1], own=np.arange(6))
    objective = jax.jit(var_objective(beta=BETA))
    loss, metrics = objective(tiny_model(), None, whole, jax.random.key(0))
    own = softmax(ref_logp + reward / BETA, axis=-1)[np.arange(6), :, np.arange(6)]
    logp = np.where(part.completion_mask, token_logp(), 0).sum(-1)
    assert float(loss.mean) == pytest.approx((-own * logp).mean(), rel=1e-5)
    assert float(metrics["weight"].mean) == pytest.approx(own.mean(), rel=1e-5)
    assert float(metrics["weight_below_1"].mean) == pytest.approx((1 - own).mean(), rel=1e-5)
    # A device or a microbatch holds some of the rows, and all of the columns.
    odd, _ = objective(tiny_model(), None, jax.tree.map(lambda x: x[1::2], whole), jax.random.key(0))
    assert float(odd.mean) == pytest.approx((-own * logp)[1::2].mean(), rel=1e-5)
    # A completion that does not count, under no prompt.
    where = np.ones((6, 2), bool)
    where[2, 0] = False
    crossed = np.broadcast_to(where.T[None], (6, 2, 6))
    loss, _ = objective(tiny_model(), None, dataclasses.replace(whole, where=crossed), jax.random.key(0))
    logits = np.where(crossed, ref_logp + reward / BETA, -np.inf)
    own = softmax(logits, axis=-1)[np.arange(6), :, np.arange(6)]
    assert float(loss.mean) == pytest.approx((-own * logp).sum() / where.sum(), rel=1e-5)


def test_temperature_is_that_of_the_log_probabilities():
    part = dataclasses.replace(ragged_candidates(6), reward=np.zeros((6, 2), np.float32))
    model = tiny_model()
    hot = jax.jit(functools.partial(type(model).score, temperature=2.0))
    logp = hot(model, part.prompt, part.prompt_mask, part.completion).logp
    objective = likelihood_objective(method_kernel("tilted_mle", beta=BETA), temperature=2.0)
    loss, _ = jax.jit(lambda m: objective(m, None, part, jax.random.key(0)))(model)
    assert float(loss.mean) == pytest.approx(-np.where(part.completion_mask, logp, 0).sum((1, 2)).mean() / 2, rel=1e-5)


def test_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"method must be one of .*; got 'ppo'"):
        method_kernel("ppo", beta=0.1)
    with pytest.raises(ValueError, match="kernel must be linear in the log-probabilities"):
        candidate_weights(method_kernel("dpo", beta=0.1), ragged_candidates(6))
    with pytest.raises(ValueError, match=r"beta must be a finite number above 0, got 0\.0"):
        method_kernel("tilted_mle", beta=0.0)(jnp.zeros((6, 2)), ragged_candidates(6))


# A kernel sees log-probabilities of whole completions: one of them stands for all.
@pytest.mark.parametrize(("method", "microbatches"), [("sft", 2), ("tilted_mle", 1), ("var", 2)])
def test_a_step_does_not_change_with_its_padding(method, microbatches):
    """Whatever stands in it."""
    rng = np.random.default_rng(0)
    wide = ragged_candidates(4)
    extra = {"prompt": [(0, 0), (0, 10)], "completion": [(0, 0), (0, 0), (0, 9)]}
    for name, width in extra.items():
        mask = np.pad(getattr(wide, f"{name}_mask"), width)
        tokens = np.where(mask, np.pad(getattr(wide, name), width), rng.integers(1, 32, mask.shape)).astype(np.int32)
        wide = dataclasses.replace(wide, **{name: tokens, f"{name}_mask": mask})
    short = trim(wide, *lengths(wide).max(axis=0).tolist())
    assert max(short.prompt.shape[1], short.completion.shape[2]) < 8
    objective = likelihood_objective(method_kernel(method, beta=BETA)) if method != "var" else var_objective(beta=BETA)
    cross = {name: rng.normal(size=(4, 2, 4)).astype(np.float32) for name in ("ref_logp", "reward")}
    tx, ends = optax.sgd(0.1), []
    step = jax.jit(functools.partial(train_step, loss_fn=objective, tx=tx, microbatches=microbatches))
    for part in (wide, short):
        part = VarBatch(candidates=part, own=np.arange(4), **cross) if method == "var" else part
        ends.append(step(init_state(tiny_model(), tx), part, jax.random.key(0)))
    chex.assert_trees_all_close(*ends, atol=1e-6, rtol=1e-5)
    assert ends[0][1]["grad_norm"] > 0.1
