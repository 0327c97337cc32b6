import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.models import lora
from tiltjax.models.attention import operand_dtype
from tiltjax.models.config import TransformerConfig
from tiltjax.models.transformer import Transformer

SMALL = dict(vocab_size=48, features=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, mlp_features=24,
             rotary_dim=8)  # fmt: skip
ARCHITECTURES = {
    "llama": SMALL,
    "windowed": SMALL | dict(family="mistral", sliding_window=2),
    "qwen3": SMALL | dict(family="qwen3", qk_norm=True, rope_scaling=("llama3", 8.0, 1.0, 4.0, 16.0)),
    "neox": SMALL | dict(family="gpt_neox", norm="layer", gated=False, parallel_residual=True, rotary_dim=2, tied=False,
                         num_kv_heads=4, qkv_bias=True, out_bias=True, mlp_bias=True, activation="gelu"),
    "gpt2": SMALL | dict(family="gpt2", norm="layer", gated=False, rope_theta=None, rotary_dim=0, num_kv_heads=4,
                         qkv_bias=True, out_bias=True, mlp_bias=True, activation="gelu_tanh", max_positions=32),
}  # fmt: skip
B, N, S, T = 2, 3, 5, 4
LENGTHS = np.array([5, 2])
ENDS = np.array([[4, 1, 3], [2, 4, 1]])


@functools.cache
def world(name):
    model = Transformer(jax.random.key(0), TransformerConfig(**ARCHITECTURES[name]))
    rng = np.random.default_rng(0)
    # Biases and scales away from 0 and 1, so that a forgotten one shows.
    model = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), model)
    prompt, completion = rng.integers(0, 48, (B, S)), rng.integers(0, 48, (B, N, T))
    prompt_mask = np.arange(S) < LENGTHS[:, None]
    mask = np.arange(T) < ENDS[..., None]
    return model, jnp.asarray(prompt), jnp.asarray(prompt_mask), jnp.asarray(completion), jnp.asarray(mask)


def apart(model, prompt, completion):
    """Every completion after its own copy of its prompt, as six plain sequences without anything shared."""
    rows = np.zeros((B * N, S + T), int)
    for i in range(B * N):
        b, n = divmod(i, N)
        rows[i, : LENGTHS[b] + ENDS[b, n]] = [*prompt[b, : LENGTHS[b]], *completion[b, n, : ENDS[b, n]]]
    rows = jnp.asarray(rows)
    logp = model.score(rows[:, :1], jnp.ones((B * N, 1), bool), rows[:, None, 1:]).logp[:, 0]
    start = np.repeat(LENGTHS, N)[:, None] - 1 + np.arange(T)[None]
    return jnp.take_along_axis(logp, jnp.asarray(np.minimum(start, S + T - 2)), axis=1).reshape(B, N, T)


def total(logp, mask):
    weights = np.random.default_rng(1).normal(size=(B, N, T)).astype(np.float32)
    return jnp.sum(jnp.where(mask, weights * logp, 0)), jnp.where(mask, logp, 0)


@jax.jit
def score_and_grad(model, prompt, prompt_mask, completion, mask):
    """``(total, logp), grad``; one program for each config."""
    run = lambda m: total(m.score(prompt, prompt_mask, completion).logp, mask)
    return jax.value_and_grad(run, has_aux=True)(model)


@jax.jit
def score(model, prompt, prompt_mask, completion):
    return model.score(prompt, prompt_mask, completion).logp


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_n_completions_together_equal_n_runs_alone(name):
    """Forward and gradient, with ragged lengths on both sides: prompt once, completions N. Padding moves nothing."""
    model, prompt, prompt_mask, completion, mask = world(name)
    found = score_and_grad(model, prompt, prompt_mask, completion, mask)
    dirty = np.where(prompt_mask, prompt, 7), np.where(mask, completion, 9)
    chex.assert_trees_all_equal(score_and_grad(model, dirty[0], prompt_mask, dirty[1], mask), found)
    tokens = (np.asarray(prompt), np.asarray(completion))
    (_, logp), grad = found
    alone = lambda m: total(apart(m, *tokens), mask)
    if name in ("qwen3", "gpt2"):  # What these two have of their own is before or after what is shared.
        np.testing.assert_allclose(logp, jax.jit(alone)(model)[1], atol=1e-5)
        return
    (_, expected), expected_grad = jax.jit(jax.value_and_grad(alone, has_aux=True))(model)
    np.testing.assert_allclose(logp, expected, atol=1e-5)
    chex.assert_trees_all_close(grad, expected_grad, atol=1e-5, rtol=1e-4)


def in_type(name, dtype, **changes):
    model = world(name)[0]
    config = TransformerConfig(**ARCHITECTURES[name] | dict(compute_dtype=dtype) | changes)
    return jax.tree.unflatten(
        jax.tree.structure(jax.eval_shape(lambda: Transformer(jax.random.key(0), config))), jax.tree.leaves(model)
    )


@functools.partial(jax.jit, static_argnames="rows")
def scored_and_decoded(model, prompt, prompt_mask, completion, *, rows):
    """Log-probabilities of the scorer, and of prefill and steps with kernels for each of ``rows``; the first cache."""
    B, N, T = completion.shape
    logits, first = model.prefill(prompt, prompt_mask, num_candidates=N, max_tokens=T)
    logits = jnp.broadcast_to(logits[:, None], (B, N, logits.shape[-1]))
    found = []
    for r in rows:
        steps = model.unstacked(r)

        def step(cache, token, steps=steps):
            logits, cache = steps.decode_step(token, cache)
            return cache, logits

        later = jax.lax.scan(step, first, jnp.moveaxis(completion[..., :-1], 2, 0))[1]
        every = jnp.moveaxis(jnp.concatenate([logits[None], later]), 0, 2)
        found.append(jnp.take_along_axis(jax.nn.log_softmax(every), completion[..., None], -1)[..., 0])
    return model.score(prompt, prompt_mask, completion).logp, found, first


@pytest.mark.parametrize(
    ("name", "dtype", "atol"), [*((name, "float32", 1e-5) for name in ARCHITECTURES), ("llama", "bfloat16", 0.03)]
)
def test_prefill_and_steps_give_the_scorers_log_probabilities(name, dtype, atol):
    """Also with kernels stored the other way round, and a cache of 16 bits."""
    _, prompt, prompt_mask, completion, _ = world(name)
    model = in_type(name, dtype).cast(dtype)
    for rows in (None, B * N, 64):
        turned = jax.eval_shape(lambda m, rows=rows: m.unstacked(rows), model).blocks[0].up.turned
        assert turned == (rows is not None and (dtype == "float32" or rows == 64))
    kinds = (None, 64) if name in ("llama", "neox") else (64,)  # A kernel is turned alike with and without a window.
    expected, found, _ = scored_and_decoded(model, prompt, prompt_mask, completion, rows=kinds)
    for logp in found:
        np.testing.assert_allclose(logp, expected, atol=atol)


@pytest.mark.robustness(
    "Methods",
    given="adapters that are not merged, 16-bit operands, on a CPU",
    outcome="candidates are drawn; no product is written that the backend cannot run",
)
@pytest.mark.parametrize(("name", "dtype", "atol"), [("neox", "float32", 1e-5), ("llama", "bfloat16", 0.1)])
def test_steps_with_adapters_give_the_scorers_log_probabilities(name, dtype, atol):
    _, prompt, prompt_mask, completion, _ = world(name)
    model = in_type(name, dtype)
    model = lora.add(jax.random.key(1), model, rank=16, alpha=32, targets=("query", "up", "down"))
    trained, frozen = lora.partition(model, lora.is_adapter)
    model = lora.combine(jax.tree.map(lambda x: x + 0.01, trained), frozen)
    expected, found, _ = scored_and_decoded(model, prompt, prompt_mask, completion, rows=(None, 64))
    for logp in found:
        np.testing.assert_allclose(logp, expected, atol=atol)


@pytest.mark.parametrize(("kv_heads", "num_prompts"), [(1, 1), (1, 2), (2, 2), (4, 1)])
def test_many_candidates_read_the_prompt_in_16_bits(kv_heads, num_prompts):
    """On a CPU too, in any order of heads, where it has the units; a length of 1 is dropped from a product."""
    config = TransformerConfig(**SMALL | dict(num_kv_heads=kv_heads, num_layers=1, compute_dtype="bfloat16"))
    model, rng = Transformer(jax.random.key(0), config), np.random.default_rng(0)
    prompt = rng.integers(0, 48, (num_prompts, S))
    prompt_mask = np.arange(S) < LENGTHS[:num_prompts, None]
    completion = rng.integers(0, 48, (num_prompts, 17, T))
    expected, (logp,), cache = scored_and_decoded(model, prompt, prompt_mask, completion, rows=(None,))
    assert cache.prefix[0].key.dtype == operand_dtype("bfloat16", rows=17)
    np.testing.assert_allclose(logp, expected, atol=0.03)


@pytest.mark.parametrize(
    ("dtype", "kinds", "rtol", "atol"),
    [("float32", ("full", "dots"), 1e-5, 1e-6), ("bfloat16", ("dots",), 0.02, 0.02)],
)
def test_rematerialisation_changes_no_number(dtype, kinds, rtol, atol):
    _, *data = world("llama")
    grads = [score_and_grad(in_type("llama", dtype, remat=kind), *data)[1] for kind in ("none", *kinds)]
    for grad in grads[1:]:
        chex.assert_trees_all_close(*map(jax.tree.leaves, (grad, grads[0])), rtol=rtol, atol=atol)


def test_bfloat16_operands_keep_float32_results():
    model, *data = world("llama")
    mask = data[-1]
    other = in_type("llama", "bfloat16")
    (_, exact), _ = score_and_grad(model, *data)
    rounded = score(other, *data[:3])
    assert rounded.dtype == jnp.float32
    assert 1e-5 < np.abs(exact - np.where(mask, rounded, 0)).max() < 0.1
    cast = other.cast("bfloat16")
    assert cast.blocks.up.kernel.dtype == jnp.bfloat16
    assert cast.norm.scale.dtype == jnp.float32
    np.testing.assert_array_equal(score(cast, *data[:3]), rounded)


def test_one_token_completions():
    model, prompt, prompt_mask, completion, mask = world("llama")
    one = score(model, prompt, prompt_mask, completion[..., :1])
    (_, expected), _ = score_and_grad(model, prompt, prompt_mask, completion, mask)
    np.testing.assert_allclose(one, expected[..., :1], atol=1e-6)


def test_adapters_start_at_zero_and_merge_exactly():
    model, *data = world("neox")
    adapted = lora.add(jax.random.key(1), model, rank=3, alpha=6, targets=("query", "down"))
    plain, start = (score(m, *data[:3]) for m in (model, adapted))
    np.testing.assert_allclose(start, plain, atol=1e-6)
    trained, frozen = lora.partition(adapted, lora.is_adapter)
    assert len(jax.tree.leaves(trained)) == 4
    trained = jax.tree.map(lambda x: x + 0.05, trained)
    adapted = lora.combine(trained, frozen)
    merged = lora.merge(adapted)
    moved = score(adapted, *data[:3])
    assert np.abs(moved - plain).max() > 1e-2
    np.testing.assert_allclose(score(merged, *data[:3]), moved, atol=1e-5)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    a, b = (np.asarray(x[...]) for x in (adapted.blocks.down.lora_a, adapted.blocks.down.lora_b))
    delta = np.asarray(merged.blocks.down.kernel[...]) - np.asarray(model.blocks.down.kernel[...])
    np.testing.assert_allclose(delta, 2.0 * np.einsum("lir,lro->lio", a, b), atol=1e-6)


def test_bad_adapters_are_refused():
    model = world("llama")[0]
    with pytest.raises(ValueError, match="rank must be at least 1"):
        lora.add(jax.random.key(0), model, rank=0)
    with pytest.raises(ValueError, match="targets must be one of"):
        lora.add(jax.random.key(0), model, rank=1, targets=("keys",))


def test_no_prompt_sized_array_is_made_n_times():
    """The compiled scorer holds no array that has both the candidate axis and the prompt axis times a width."""
    model, N, S = world("llama")[0], 37, 53
    prompt, completion = jnp.ones((2, S), int), jnp.ones((2, N, 3), int)
    jaxpr = jax.make_jaxpr(lambda m: m.score(prompt, prompt > 0, completion).logp)(model)
    scores = 0
    for shape in _shapes(jaxpr.jaxpr):
        if N in shape and S in shape:
            scores += 1
            assert int(np.prod(shape)) <= 2 * 4 * N * 2 * S, f"{shape} is larger than the attention scores"
    assert scores


def _shapes(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars)
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "jaxpr"):
                    yield from _shapes(inner.jaxpr)
                elif hasattr(inner, "eqns"):
                    yield from _shapes(inner)
