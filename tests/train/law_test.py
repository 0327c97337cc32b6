"""Losses compare log-probabilities of the law that drew: at its temperature, on the tokens that its filters left."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tiltjax.data.candidates import Candidates
from tiltjax.models.config import TransformerConfig
from tiltjax.models.transformer import Transformer
from tiltjax.ops.tokens import token_logp
from tiltjax.samplers.logits import processed, support_of
from tiltjax.train import rounds
from tiltjax.train.method import Feedback
from tiltjax.train.methods import get_method
from tiltjax.train.policy import kl_along_prefixes, model_sample, model_view

V, T, END, TEMPERATURE = 7, 2, 0, 0.7
FILTERS = {"k": 5, "p": 0.8}
LAW = {"temperature": TEMPERATURE, "top_k": FILTERS["k"], "top_p": FILTERS["p"]}
PROMPT = np.array([[3, 5]])
CONFIG = TransformerConfig(vocab_size=V, features=8, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=8,
                           mlp_features=8, rotary_dim=8)  # fmt: skip


@functools.cache
def policy(seed=0):
    return Transformer(jax.random.key(seed), CONFIG)


@functools.cache
def completions():
    """Every completion of at most T tokens, as one group of candidates."""
    whole = [(a, b) for a, b in itertools.product(range(1, V), range(V))]
    rows = np.array([(END, END), *whole])
    mask = np.stack([np.ones(len(rows), bool), rows[:, 0] != END], axis=1)
    return Candidates(prompt=PROMPT, prompt_mask=PROMPT > 0, completion=rows[None], completion_mask=mask[None])


def logits_of(model):
    batch = completions()
    return model.hidden(batch.prompt, batch.prompt_mask, batch.completion) @ model.projection().T


def law(model):
    """Probability of every completion under the law that draws, from whole logits."""
    batch = completions()
    logp = jax.nn.log_softmax(processed(logits_of(model), temperature=TEMPERATURE, **FILTERS))
    each = jnp.take_along_axis(logp, batch.completion[..., None], axis=-1)[..., 0]
    return jnp.exp(jnp.sum(jnp.where(batch.completion_mask, each, 0), axis=-1))[0]


@functools.cache
def possible():
    """Those that the law of the policy can draw, with what its filters left, and their probabilities."""
    batch, p = completions(), np.asarray(jax.jit(law)(policy()))
    kept = np.flatnonzero(p > 0)
    assert 4 < len(kept) < len(p) / 2
    assert p.sum() == pytest.approx(1, abs=1e-6)
    support = jax.jit(lambda m: support_of(processed(logits_of(m), temperature=TEMPERATURE, **FILTERS)))(policy())
    fields = {name: getattr(batch, name)[:, kept] for name in ("completion", "completion_mask")}
    batch = Candidates(prompt=PROMPT, prompt_mask=PROMPT > 0, support=np.asarray(support)[:, kept], **fields)
    return batch, p[kept]


def test_the_first_step_climbs_the_expected_reward_under_the_law_that_drew():
    """By enumeration: ratios are exactly 1, and the gradient is that of the expectation, not of another law's."""
    batch, p = possible()
    reward = np.random.default_rng(0).normal(size=len(p))
    both = np.zeros(len(completions().completion[0]))
    both[np.flatnonzero(np.asarray(jax.jit(law)(policy())) > 0)] = reward
    expected = jax.jit(jax.grad(lambda m: jnp.sum(law(m) * both)))(policy())

    @functools.partial(jax.jit, static_argnames="filtered")
    def climbed(model, filtered=True):
        seen = batch if filtered else batch.replace(support=None)

        def total(model):
            logp = model_view(temperature=TEMPERATURE)(model, seen).token_logp
            whole = jnp.sum(jnp.where(batch.completion_mask, logp, 0), axis=-1)[0]
            return jnp.sum(p * reward * whole), jnp.exp(whole) / p

        return jax.grad(total, has_aux=True)(model)

    grads, ratio = climbed(policy())
    np.testing.assert_allclose(ratio, 1, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (grads, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    others, ratio = climbed(policy(), filtered=False)
    assert float(np.max(ratio)) < 0.97  # Every step's mass of the kept tokens is lost.
    gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), others, expected)
    assert max(jax.tree.leaves(gaps)) > 5e-3


def test_every_policy_has_a_law_on_what_the_sampler_left():
    """Sums to 1 under any policy, so a drawn token never has probability 0, and the KL on it is finite and exact."""
    batch, p = possible()
    seen = jax.jit(model_view(temperature=TEMPERATURE))
    other = np.where(batch.completion_mask, seen(policy(1), batch).token_logp, 0).sum(-1)[0]
    q = np.exp(np.float64(other))
    assert q.sum() == pytest.approx(1, abs=1e-5)
    assert np.isfinite(other).all()

    @jax.jit
    def kl_of(*models):
        states = [model.hidden(batch.prompt, batch.prompt_mask, batch.completion) for model in models]
        options = {"reference": (states[1], models[1].projection()), "support": batch.support}
        return token_logp(
            states[0], models[0].projection(), jnp.asarray(batch.completion), temperature=TEMPERATURE, **options
        ).kl

    kl = kl_of(policy(), policy(1))
    each = np.where(batch.completion_mask, kl, 0).sum(-1)[0]
    assert (p * each).sum() == pytest.approx((p * (np.log(p) - other)).sum(), rel=1e-3)
    mean = jax.jit(functools.partial(kl_along_prefixes, temperature=TEMPERATURE))(policy(), policy(1), batch)["kl"].mean
    assert float(mean) == pytest.approx(each.mean(), rel=1e-4)


@pytest.mark.robustness(
    "Numbers",
    given="completions drawn at another temperature than 1, by top-k or by top-p",
    outcome="losses, ratios and KL are those of the law that drew: 1 and 0 on the policy's own completions",
)
@pytest.mark.parametrize("slots", [None, 6])
def test_ratios_and_kl_of_a_round_are_those_of_the_law_that_drew(slots):
    method, tx = get_method("rloo"), optax.sgd(0.1)
    players = rounds.init_players(method, policy(), tx)
    prompts = Candidates(
        prompt=np.array([[3, 5], [4, 4], [1, 2]]), prompt_mask=np.ones((3, 2), bool),
        completion=np.zeros((3, 0, T), np.int32), completion_mask=np.zeros((3, 0, T), bool),
    )  # fmt: skip
    sample = model_sample(max_tokens=T, eos_id=END, pad_id=END, slots=slots, **LAW)
    drawn = rounds.collect(method, players, prompts, jax.random.key(0), sample=sample)
    mask = np.asarray(drawn.completion_mask)

    @jax.jit
    def first(players, drawn):
        reward = jnp.sum(drawn.completion, axis=-1).astype(jnp.float32)
        options = {"view": model_view(temperature=TEMPERATURE), "beta": 0.5}
        _, batch = rounds.prepare(method, players, drawn, Feedback(reward=reward), jax.random.key(1), **options)
        _, metrics = rounds.objective(method, **options)(players.state.params, None, batch, jax.random.key(2))
        return batch, {name: metric.mean for name, metric in metrics.items()}

    batch, metrics = first(players, drawn)
    np.testing.assert_allclose(
        np.asarray(batch.old.token_logp)[mask], np.asarray(drawn.old_token_logp)[mask], atol=1e-5
    )
    for name in ("off_policy", "kl_k1", "kl_k3"):
        assert float(metrics[name]) == pytest.approx(0, abs=1e-5)
    np.testing.assert_allclose(batch.reward, jnp.sum(drawn.completion, axis=-1), atol=1e-4)  # No KL in it yet.
