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
from tiltjax.train import offline
from tiltjax.train.method import Feedback, View
from tiltjax.train.methods import METHODS as RECORDS
from tiltjax.train.objectives import candidate_weights, likelihood_objective, packed_objective, sft_objective
from tiltjax.train.policy import model_objective
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
    spoilt["ref_logp"][4, 1] = 0
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


def view_of(logp, mask):
    """What has these log-probabilities of whole completions."""
    first = mask & (np.cumsum(mask, axis=-1) == 1)
    token_logp = jnp.where(first, jnp.asarray(logp, jnp.float32)[..., None], 0)
    return View(token_logp=token_logp, entropy=jnp.zeros(mask.shape), self_certainty=jnp.zeros(mask.shape))


def record(method, **changes):
    """The record without its label: candidates are in order."""
    return dataclasses.replace(RECORDS[method], label=None, **changes)


def labelled(method, part):
    """The candidates as the record's loss takes them, at `BETA`."""
    ref = None if part.ref_logp is None else view_of(part.ref_logp, part.completion_mask)
    told = Feedback(reward=part.reward)
    return offline.labelled(record(method), part, told, jax.random.key(0), seen=ref, beta=BETA)


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
def test_losses_are_their_formulas_and_masked_is_left_out(method):
    part, mask = labelled(method, batch()), batch().completion_mask
    spoilt = jnp.asarray(np.where(WHERE, logp(), np.nan), jnp.float32)

    @jax.jit
    def total(x):
        loss = record(method).loss(view_of(x, mask), part, BETA)
        return loss.total, loss.count

    (value, count), grad = jax.value_and_grad(total, has_aux=True)(spoilt)
    each = [EXPECTED[method](*r) for r in rows() if len(r[0])]
    assert count == (sum(len(r[0]) == 2 for r in rows()) if method == "dpo" else len(each))
    assert value == pytest.approx(sum(each), rel=1e-5)
    assert np.isfinite(grad).all()
    assert not np.asarray(grad)[~WHERE].any()
    assert np.asarray(grad)[0].any()


def test_prompts_without_a_candidate_do_not_count():
    part = labelled("tilted_mle", batch())
    loss, count, metrics = evaluated(model_objective(record("tilted_mle"), beta=BETA), part)
    real = [row for row in rows() if len(row[0])]
    assert count == len(real) == 5
    assert loss == pytest.approx(np.mean([EXPECTED["tilted_mle"](*row) for row in real]), rel=1e-5)
    assert metrics["logp"] == pytest.approx(np.mean(np.concatenate([row[0][row[0] != 0] for row in real])), rel=1e-5)
    assert set(metrics) == {"logp", "entropy", "reward", "length"}  # Nobody asked the reference or the old policy.


WEIGHTS = {
    "sft": lambda r: np.full(len(r), 1 / len(r)),
    "tilted_mle": lambda r: softmax(r / BETA),
    "best_of_n_sft": lambda r: r == r.max(),
    "var_importance": lambda r: importance_weights(r) / len(r),
}


@pytest.mark.parametrize("method", WEIGHTS)
def test_candidates_weigh_what_their_formula_says(method):
    part = labelled(method, dataclasses.replace(batch(), ref_logp=None))
    weights = np.asarray(candidate_weights(record(method), part, beta=BETA))
    for row, where, some, reward in zip(weights, WHERE, batch().completion_mask.any(-1), batch().reward, strict=True):
        if where.any():
            expected = WEIGHTS[method](np.float64(reward[where])) * some[where]  # One completion has no token.
            np.testing.assert_allclose(row[where], expected, rtol=1e-5)
        assert not row[~where].any()


def test_a_likelihood_is_that_of_the_tokens_that_are_learned_from():
    part = masked()
    stats = jax.jit(tiny_model().score)(part.prompt, part.prompt_mask, part.completion)
    told = np.where(part.loss_mask, np.asarray(stats.logp, np.float64), 0).sum(-1)
    real = part.where & part.loss_mask.any(-1)
    reward = [np.float64(row[where]) for row, where in zip(part.reward, real, strict=True) if where.any()]
    logp = [row[where] for row, where in zip(told, real, strict=True) if where.any()]
    loss, count, _ = evaluated(model_objective(record("tilted_mle"), beta=BETA), labelled("tilted_mle", part))
    assert count == len(logp)
    expected = [-(softmax(r / BETA) * row).sum() for r, row in zip(reward, logp, strict=True)]
    assert loss == pytest.approx(np.mean(expected), rel=1e-5)
    loss, count, _ = evaluated(sft_objective(), part)
    assert count == (part.loss_mask & part.where[..., None]).sum()
    assert loss == pytest.approx(-told[real].sum() / count, rel=1e-5)


@pytest.mark.parametrize("batch", [batch, masked])
def test_packed_rows_give_the_loss_and_the_gradient_of_the_candidates(batch):
    """Several sequences to a row, a row of nothing, what is masked left out, also inside a completion."""
    part = labelled("tilted_mle", batch())
    weights = np.asarray(candidate_weights(record("tilted_mle"), part, beta=BETA))
    rows = pack_sequences(batch(), weights, length=20, rows=8, pad_id=9)
    assert (rows.segment.max(axis=1) > 0).any()
    assert (rows.segment[-1] == -1).all()

    def both(objective, part):
        def total(model):
            loss, metrics = objective(model, None, part, jax.random.key(0))
            return loss.total, (loss, metrics["logp"])

        grad, (loss, seen) = jax.jit(jax.grad(total, has_aux=True))(tiny_model())
        return jax.tree.leaves((grad, loss)), float(seen.mean)

    (expected, _), (packed, mean) = (
        both(model_objective(record("tilted_mle"), beta=BETA), part),
        both(packed_objective(), rows),
    )
    for a, b in zip(packed, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6 * max(1, float(np.abs(b).max())))
    mass = np.where(batch().completion_mask.any(axis=-1), weights, 0).sum()
    assert mean == pytest.approx(-float(expected[-1]) / mass, rel=1e-5)


def test_dpo_at_the_reference():
    part = labelled("dpo", dataclasses.replace(ragged_candidates(6), ref_logp=np.full((6, 2), -3.0, np.float32)))
    for moved, margin, accuracy in ((0.0, 0.0, 0.0), (1.0, -BETA, 0.0), (-1.0, BETA, 1.0)):
        view = view_of(np.float32([[-3.0, -3.0 + moved]] * 6), part.candidates.completion_mask)
        loss, metrics = record("dpo").loss(view, part, BETA), record("dpo").measures(view, part, BETA)
        assert float(loss.mean) == pytest.approx(np.log1p(np.exp(-margin)), rel=1e-6)
        assert float(metrics["margin"].mean) == pytest.approx(margin, rel=1e-6)
        assert float(metrics["accuracy"].mean) == accuracy


def test_var_normalises_over_the_completions_of_other_prompts():
    rng = np.random.default_rng(1)
    part = dataclasses.replace(batch(), completion_mask=ragged_candidates(6).completion_mask)
    values = [np.float32(x) for x in (rng.normal(-3, 1, (6, 2)), rng.normal(size=(6, 2)))]
    for where in (np.ones((6, 2), bool), WHERE):
        told = labelled("var", dataclasses.replace(part, where=where, ref_logp=values[0], reward=values[1]))
        loss, count, metrics = evaluated(model_objective(record("var"), beta=BETA), told)
        logits = np.where(where, np.float64(values[0]) + np.float64(values[1]) / BETA, -np.inf)
        real = where[:, 0]
        weight = softmax(logits[real], axis=-1)[:, 0]
        logp = np.where(part.completion_mask, token_logp(), 0).sum(-1)[real, 0]
        assert count == real.sum()
        assert loss == pytest.approx((-weight * logp).mean(), rel=1e-5)
        assert metrics["weight"] == pytest.approx(weight.mean(), rel=1e-5)
        assert metrics["weight_below_1"] == pytest.approx((1 - weight).mean(), rel=1e-5)


def test_temperature_is_that_of_the_log_probabilities():
    part = dataclasses.replace(ragged_candidates(6), reward=np.zeros((6, 2), np.float32))
    model = tiny_model()
    hot = jax.jit(functools.partial(type(model).score, temperature=2.0))
    logp = hot(model, part.prompt, part.prompt_mask, part.completion).logp
    expected = -np.where(part.completion_mask, logp, 0).sum((1, 2)).mean() / 2
    objective = model_objective(record("tilted_mle", temperature=2.0), beta=BETA)
    assert evaluated(objective, labelled("tilted_mle", part))[0] == pytest.approx(expected, rel=1e-5)
    mean = likelihood_objective(lambda logp, batch: (-logp.mean(-1), {}), temperature=2.0)
    assert evaluated(mean, part)[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("method", ["dpo", "rwr"])  # One is not linear in the log-probabilities, one couples prompts.
def test_a_record_without_weights_of_its_own_has_no_packed_form(method):
    part = labelled(method, ragged_candidates(6))
    with pytest.raises(ValueError, match=f"method must be linear in the log-probabilities, such as sft; {method} is"):
        candidate_weights(record(method, linear=method == "dpo"), part, beta=BETA)


def test_a_method_cannot_have_a_beta_that_it_divides_by():
    part = ragged_candidates(6)
    told = Feedback(reward=part.reward)
    with pytest.raises(ValueError, match=r"beta must be a finite number above 0 .* for method tilted_mle, got 0.0"):
        offline.labelled(record("tilted_mle"), part, told, jax.random.key(0), seen=None, beta=0.0)


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
    widths = lengths(wide).max(axis=0).tolist()
    assert max(widths) < 8
    long = labelled(method, wide)
    short = offline.trim_batch(long, *widths)
    chex.assert_trees_all_equal(short.candidates, trim(long.candidates, *widths))
    if method == "var":
        assert short.ref.token_logp.shape == (4, 2, widths[1])
    tx, ends = optax.sgd(0.1), []
    objective = model_objective(record(method), beta=BETA)
    step = jax.jit(functools.partial(train_step, loss_fn=objective, tx=tx, microbatches=microbatches))
    for part in (long, short):
        ends.append(step(init_state(tiny_model(), tx), part, jax.random.key(0)))
    chex.assert_trees_all_close(*ends, atol=1e-6, rtol=1e-5)
    assert ends[0][1]["grad_norm"] > 0.1
