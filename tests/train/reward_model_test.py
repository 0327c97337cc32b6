"""Every kind against a float64 formula, and each learns what it is told."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.worlds import ragged_candidates, tiny_model
from tiltjax.models.heads import preference_logits
from tiltjax.train.reward_model import (
    KINDS,
    Labelled,
    RewardSpec,
    make_reader,
    new_model,
    read,
    reward_objective,
    step_ends,
)
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step

B, N = 4, 3
PAIR = np.array([[[0, 1], [2, 0]], [[1, 2], [0, 2]], [[2, 1], [0, 1]], [[0, 2], [1, 0]]])
PAIR_WHERE = np.array([[True, True], [True, False], [False, False], [True, True]])
RNG = np.random.default_rng(5)
LABEL = RNG.random((B, N)) < 0.5


def spec_of(kind):
    return RewardSpec(kind=kind, beta=0.3, step_tokens=2)


@functools.cache
def labelled():
    candidates = ragged_candidates(B, N)
    ends = np.asarray(step_ends(spec_of("process"), candidates.completion, candidates.completion_mask))
    step_label = np.where(ends, (candidates.completion % 2).astype(np.int32), -100)
    return Labelled(candidates=candidates, pair=PAIR, pair_where=PAIR_WHERE, label=LABEL, step_label=step_label)


class Said:
    """A model whose every answer is known."""

    def __init__(self, kind):
        shape = (*labelled().candidates.completion.shape, 2 if kind == "preference" else 1)
        self.raw = np.random.default_rng(2).normal(size=shape).astype(np.float32)
        self.mask = np.asarray(labelled().candidates.completion_mask)

    def score(self, *asked):
        return types.SimpleNamespace(logp=jnp.asarray(self.raw[..., 0]))

    def scores(self, *asked):
        return jnp.asarray(self.raw)

    def last(self, *asked):
        return jnp.asarray(at_last(self.raw, self.mask))

    def reward(self, *asked):
        return self.last()[..., 0]


@pytest.mark.parametrize("kind", ["global", "preference", "local"])
def test_a_margin_moves_the_loss_of_the_kinds_that_take_one(kind):
    margin = np.abs(RNG.normal(size=PAIR_WHERE.shape)).astype(np.float32)
    batch, model = labelled(), Said(kind)
    plain, out = (read(spec_of(kind), model, b) for b in (batch, dataclasses.replace(batch, margin=margin)))
    np.testing.assert_array_equal(out.nll, plain.nll)
    if kind == "local":
        np.testing.assert_array_equal(out.loss, plain.loss)
        return
    if kind == "global":
        lead = np.subtract(*chosen_and_rejected(np.asarray(out.reward, np.float64)))
    else:
        logits = preference_logits(model.last())
        lead = np.asarray(logits)[np.arange(B)[:, None], PAIR[..., 0], PAIR[..., 1]]
    np.testing.assert_allclose(out.loss, mean(-log_sigmoid(lead - margin), PAIR_WHERE), rtol=1e-5)


def log_sigmoid(x):
    return -np.logaddexp(0, -np.asarray(x, np.float64))


def chosen_and_rejected(x):
    return (np.take_along_axis(x, PAIR[..., k], axis=1) for k in (0, 1))


def mean(x, where):
    return np.where(where, x, 0).sum(1) / np.maximum(where.sum(1), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_is_the_formula(kind):
    batch, model = labelled(), Said(kind)
    c, mask = batch.candidates, model.mask
    out = read(spec_of(kind), model, batch, centring=0.02)
    raw, where, extra = np.asarray(model.raw, np.float64), PAIR_WHERE, 0.0
    if kind in ("local", "dpo"):
        reward = 0.3 * (np.where(mask, raw[..., 0], 0).sum(-1) - (0 if kind == "local" else np.asarray(c.ref_logp)))
    elif kind == "process":
        where = np.asarray(batch.step_label) != -100
        good = np.where(where, batch.step_label, 0)
        nll = -mean_last(log_sigmoid(np.where(good == 1, 1, -1) * raw[..., 0]), where).mean(1)
        right = mean_last((raw[..., 0] > 0) == (good == 1), where).mean(1)
        reward = at_last(raw[..., 0], mask)
    else:
        last = at_last(raw, mask)
        reward = -last[..., 0] if kind == "cost" else last[..., 0]
    if kind == "preference":
        one, other = 1 + last[..., 0], last[..., 1]
        logits = other[:, :, None] * one[:, None] - one[:, :, None] * other[:, None]
        margin = logits[np.arange(B)[:, None], PAIR[..., 0], PAIR[..., 1]]
        reward = logits.mean(-1)
        np.testing.assert_allclose(preference_logits(jnp.asarray(last, jnp.float32)), logits, rtol=1e-4, atol=1e-5)
    else:
        margin = np.subtract(*chosen_and_rejected(reward))
    if kind == "outcome":
        nll, right = -log_sigmoid(np.where(LABEL, reward, -reward)).mean(1), ((reward > 0) == LABEL).mean(1)
        where = np.full((B, N), True)
    elif kind != "process":
        nll, right = mean(-log_sigmoid(margin), where), mean(margin > 0, where)
        if kind == "cost":
            harm = log_sigmoid(np.where(LABEL, -reward, reward))
            extra = mean(-sum(chosen_and_rejected(harm)), where)
        if kind == "global":
            extra = mean(0.02 * sum(chosen_and_rejected(reward)) ** 2, where)
    np.testing.assert_allclose(out.reward, reward, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.nll, nll, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.loss, nll + extra, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out.accuracy, right, rtol=1e-5)
    np.testing.assert_array_equal(out.where, where.any(axis=tuple(range(1, where.ndim))))


def at_last(x, mask):
    at = mask.sum(-1) - 1
    return x[np.arange(B)[:, None], np.arange(N)[None], at]


def mean_last(x, where):
    return np.where(where, x, 0).sum(-1) / np.maximum(where.sum(-1), 1)


def test_training_fits_the_labels_and_ignores_pairs_that_are_not_real():
    spec, batch, tx = spec_of("preference"), labelled(), optax.adam(3e-2)
    step = jax.jit(functools.partial(train_step, loss_fn=reward_objective(spec), tx=tx))
    state, losses = init_state(new_model(spec, tiny_model()), tx), []
    for i in range(25):
        state, scalars = step(state, batch, jax.random.key(i))
        losses.append(float(scalars["loss"]))
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert losses[-1] < 0.05
    assert scalars["accuracy"] == 1
    garbled = np.where(PAIR_WHERE[..., None], PAIR, PAIR[..., ::-1])
    reader = make_reader(spec)
    again = reader(state.params, dataclasses.replace(batch, pair=garbled))
    np.testing.assert_array_equal(again.loss, reader(state.params, batch).loss)


def test_steps_end_by_number_or_by_separator_and_at_the_end():
    completion = np.array([[[5, 9, 6, 9, 7, 0]]])
    mask = completion > 0
    for options, ends in (({"step_tokens": 2}, [0, 1, 0, 1, 1, 0]), ({"separators": (9,)}, [0, 1, 0, 1, 1, 0]),
                          ({"step_tokens": 3}, [0, 0, 1, 0, 1, 0]), ({}, [0, 0, 0, 0, 1, 0])):  # fmt: skip
        found = step_ends(RewardSpec(kind="process", **options), completion, mask)
        np.testing.assert_array_equal(found[0, 0], np.array(ends, bool))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "hunch"}, "kind must be one of"),
        ({"kind": "local", "beta": 0.0}, "beta must be a finite number above 0"),
        ({"kind": "process", "aggregate": "product"}, "aggregate must be one of last, mean, min"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RewardSpec(**options)


def test_missing_labels_are_named():
    bare = Labelled(candidates=dataclasses.replace(labelled().candidates, ref_logp=None), pair=PAIR,
                    pair_where=PAIR_WHERE)  # fmt: skip
    for kind, name in (("outcome", "label"), ("process", "step_label"), ("cost", "label"), ("dpo", "ref_logp")):
        with pytest.raises(ValueError, match=f"{name} must be given for a reward model of kind '{kind}', got None"):
            read(spec_of(kind), Said(kind), bare)
