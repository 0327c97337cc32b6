"""Logits of PyTorch, kept in golden/ by `python -m experiments.parity --write_golden`, against ours."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.models.config import FAMILIES
from tiltjax.models.pretrained import load
from tiltjax.ops.matmul import dot

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="module", params=FAMILIES)
def case(request):
    with np.load(GOLDEN / request.param / "expected.npz") as expected:
        batch = {name: jnp.asarray(expected[name]) for name in ("prompt", "prompt_mask", "completion")}
        return load(GOLDEN / request.param), batch, expected["logits"]


@jax.jit
def scored(model, batch):
    hidden = model.hidden(**batch)
    logits = dot(hidden.reshape(-1, hidden.shape[-1]), model.projection(), jnp.float32)
    return logits.reshape(*hidden.shape[:-1], -1), model.score(**batch, chunk=48)


def test_scored_over_the_shared_prompt(case):
    model, batch, logits = case
    ours, stats = scored(model, batch)
    np.testing.assert_allclose(ours, logits, atol=2e-4)
    wanted = logits - np.logaddexp.reduce(logits.astype(np.float64), axis=-1, keepdims=True)
    wanted = np.take_along_axis(wanted, np.asarray(batch["completion"])[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(stats.logp, wanted, atol=2e-4)


@jax.jit
def decoded(model, batch):
    B, N, T = batch["completion"].shape
    first, cache = model.prefill(batch["prompt"], batch["prompt_mask"], num_candidates=N, max_tokens=T)

    def step(cache, token):
        logits, cache = model.decode_step(token, cache)
        return cache, logits

    _, rest = jax.lax.scan(step, cache, jnp.moveaxis(batch["completion"][..., : T - 1], -1, 0))
    return jnp.stack([jnp.broadcast_to(first[:, None], (B, N, first.shape[-1])), *rest], axis=2)


def test_decoded_token_by_token(case):
    model, batch, logits = case
    np.testing.assert_allclose(decoded(model, batch), logits, atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_bfloat16_is_near(family):
    half = load(GOLDEN / family, dtype="bfloat16")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    assert half.config.compute_dtype == "bfloat16"
    with np.load(GOLDEN / family / "expected.npz") as expected:
        batch = {name: jnp.asarray(expected[name]) for name in ("prompt", "prompt_mask", "completion")}
        logits = expected["logits"]
    assert np.abs(scored(half, batch)[0] - logits).mean() < 0.02 * np.abs(logits).mean()
