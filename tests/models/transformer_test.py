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
    "windowed": SMALL | dict(family="mistral", sliding_window=3),
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


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_n_completions_together_equal_n_runs_alone(name):
    """Forward and gradient, with ragged lengths on both sides: prompt once, completions N."""
    model, prompt, prompt_mask, completion, mask = world(name)
    tokens = (np.asarray(prompt), np.asarray(completion))
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(B, N, T)).astype(np.float32))

    def total(logp):
        return jnp.sum(jnp.where(mask, weights * logp, 0)), jnp.where(mask, logp, 0)

    together = jax.jit(jax.value_and_grad(lambda m: total(m.score(prompt, prompt_mask, completion).logp), has_aux=True))
    alone = jax.jit(jax.value_and_grad(lambda m: total(apart(m, *tokens)), has_aux=True))
    (_, logp), grad = together(model)
    (_, expected), expected_grad = alone(model)
    np.testing.assert_allclose(logp, expected, atol=1e-5)
    chex.assert_trees_all_close(grad, expected_grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_moves_nothing(name):
    model, prompt, prompt_mask, completion, mask = world(name)
    score = jax.jit(lambda p, c: jnp.where(mask, model.score(p, prompt_mask, c).logp, 0))
    other_prompt = jnp.where(prompt_mask, prompt, 7)
    other_completion = jnp.where(mask, completion, 9)
    chex.assert_trees_all_equal(score(prompt, completion), score(other_prompt, other_completion))


def in_type(name, dtype):
    model, config = world(name)[0], TransformerConfig(**ARCHITECTURES[name] | dict(compute_dtype=dtype))
    return jax.tree.unflatten(
        jax.tree.structure(jax.eval_shape(lambda: Transformer(jax.random.key(0), config))), jax.tree.leaves(model)
    )


def decoded(model, prompt, prompt_mask, completion, rows=None):
    """Log-probabilities of the completions from prefill and steps, and the cache after the prompt."""

    @jax.jit
    def run(model):
        B, N, T = completion.shape
        logits, first = model.prefill(prompt, prompt_mask, num_candidates=N, max_tokens=T)
        chosen, cache = [jnp.broadcast_to(logits[:, None], (B, N, logits.shape[-1]))], first
        steps = model.unstacked(rows)
        for t in range(T - 1):
            logits, cache = steps.decode_step(completion[:, :, t], cache)
            chosen.append(logits)
        logp = jnp.take_along_axis(jax.nn.log_softmax(jnp.stack(chosen, 2)), completion[..., None], -1)[..., 0]
        return logp, first

    return run(model)


@pytest.mark.parametrize("rows", [None, B * N, 64])
@pytest.mark.parametrize(
    ("name", "dtype", "atol"), [*((name, "float32", 1e-5) for name in ARCHITECTURES), ("llama", "bfloat16", 0.03)]
)
def test_prefill_and_steps_give_the_scorers_log_probabilities(name, dtype, atol, rows):
    """Also with kernels stored the other way round, and a cache of 16 bits."""
    _, prompt, prompt_mask, completion, _ = world(name)
    model = in_type(name, dtype).cast(dtype)
    assert model.unstacked(rows).blocks[0].up.turned == (rows is not None and (dtype == "float32" or rows == 64))
    logp, _ = decoded(model, prompt, prompt_mask, completion, rows)
    np.testing.assert_allclose(logp, model.score(prompt, prompt_mask, completion).logp, atol=atol)


@pytest.mark.robustness(
    "Methods",
    given="adapters that are not merged, 16-bit operands, on a CPU",
    outcome="candidates are drawn; no product is written that the backend cannot run",
)
@pytest.mark.parametrize("rows", [None, 64])
@pytest.mark.parametrize(
    ("name", "dtype", "atol"), [("neox", "float32", 1e-5), ("neox", "bfloat16", 0.1), ("llama", "bfloat16", 0.1)]
)
def test_steps_with_adapters_give_the_scorers_log_probabilities(name, dtype, atol, rows):
    _, prompt, prompt_mask, completion, _ = world(name)
    model = in_type(name, dtype)
    model = lora.add(jax.random.key(1), model, rank=16, alpha=32, targets=("query", "up", "down"))
    trained, frozen = lora.partition(model, lora.is_adapter)
    model = lora.combine(jax.tree.map(lambda x: x + 0.01, trained), frozen)
    logp, _ = decoded(model, prompt, prompt_mask, completion, rows)
    np.testing.assert_allclose(logp, model.score(prompt, prompt_mask, completion).logp, atol=atol)


@pytest.mark.parametrize("num_prompts", [1, 2])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_many_candidates_read_the_prompt_in_16_bits(kv_heads, num_prompts):
    """On a CPU too, in any order of heads, where it has the units."""
    config = TransformerConfig(**SMALL | dict(num_kv_heads=kv_heads, compute_dtype="bfloat16"))
    model, rng = Transformer(jax.random.key(0), config), np.random.default_rng(0)
    prompt = jnp.asarray(rng.integers(0, 48, (num_prompts, S)))
    prompt_mask = jnp.asarray(np.arange(S) < LENGTHS[:num_prompts, None])
    completion = jnp.asarray(rng.integers(0, 48, (num_prompts, 17, T)))
    logp, cache = decoded(model, prompt, prompt_mask, completion)
    assert cache.prefix[0].key.dtype == operand_dtype("bfloat16", rows=17)
    np.testing.assert_allclose(logp, model.score(prompt, prompt_mask, completion).logp, atol=0.03)


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [("float32", 1e-5, 1e-6), ("bfloat16", 0.02, 0.02)])
def test_rematerialisation_changes_no_number(dtype, rtol, atol):
    model, prompt, prompt_mask, completion, _ = world("llama")

    def grad(remat):
        config = TransformerConfig(**ARCHITECTURES["llama"] | dict(remat=remat, compute_dtype=dtype))
        other = Transformer(jax.random.key(0), config)
        other = jax.tree.unflatten(jax.tree.structure(other), jax.tree.leaves(model))
        return jax.tree.leaves(jax.jit(jax.grad(lambda m: m.score(prompt, prompt_mask, completion).logp.sum()))(other))

    for remat in ("full", "dots"):
        chex.assert_trees_all_close(grad(remat), grad("none"), rtol=rtol, atol=atol)


def test_bfloat16_operands_keep_float32_results():
    model, prompt, prompt_mask, completion, _ = world("llama")
    other = in_type("llama", "bfloat16")
    exact, rounded = (m.score(prompt, prompt_mask, completion).logp for m in (model, other))
    assert rounded.dtype == jnp.float32
    assert 1e-5 < float(jnp.abs(exact - rounded).max()) < 0.1
    cast = other.cast("bfloat16")
    assert cast.blocks.up.kernel.dtype == jnp.bfloat16
    assert cast.norm.scale.dtype == jnp.float32
    chex.assert_trees_all_equal(cast.score(prompt, prompt_mask, completion).logp, rounded)


def test_one_token_completions():
    model, prompt, prompt_mask, completion, _ = world("llama")
    one = model.score(prompt, prompt_mask, completion[..., :1]).logp
    np.testing.assert_allclose(one, model.score(prompt, prompt_mask, completion).logp[..., :1], atol=1e-6)


def test_adapters_start_at_zero_and_merge_exactly():
    model, prompt, prompt_mask, completion, _ = world("neox")
    adapted = lora.add(jax.random.key(1), model, rank=3, alpha=6, targets=("query", "down"))
    score = jax.jit(lambda m: m.score(prompt, prompt_mask, completion).logp)
    np.testing.assert_allclose(score(adapted), score(model), atol=1e-6)
    trained, frozen = lora.partition(adapted, lora.is_adapter)
    assert len(jax.tree.leaves(trained)) == 4
    trained = jax.tree.map(lambda x: x + 0.05, trained)
    adapted = lora.combine(trained, frozen)
    merged = lora.merge(adapted)
    assert float(jnp.abs(score(adapted) - score(model)).max()) > 1e-2
    np.testing.assert_allclose(score(merged), score(adapted), atol=1e-5)
    assert jax.tree.structure(merged) == jax.tree.structure(model)
    a, b = adapted.blocks.down.lora_a[...], adapted.blocks.down.lora_b[...]
    delta = merged.blocks.down.kernel[...] - model.blocks.down.kernel[...]
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
