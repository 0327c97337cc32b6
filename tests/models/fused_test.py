import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.models import fused
from tiltjax.models.attention import KeyValue, Prefix, attention, causal_mask
from tiltjax.models.config import TransformerConfig
from tiltjax.models.fused import choose, fused_attention, merge_attention
from tiltjax.models.transformer import Transformer
from tiltjax.train.sharding import make_mesh

B, N, H, K, T, S, D = 2, 3, 4, 2, 5, 7, 8
LENGTH = np.array([7, 2])
RNG = np.random.default_rng(0)
QUERY = 2 * RNG.normal(size=(B, N, H, T, D)).astype(np.float32)
OWN = [2 * RNG.normal(size=(B, N, K, T, D)).astype(np.float32) for _ in range(2)]
PREFIX = [2 * RNG.normal(size=(B, K, S, D)).astype(np.float32) for _ in range(2)]
COTANGENT = RNG.normal(size=QUERY.shape).astype(np.float32)


def plain(query, own, prefix):
    seen = jnp.asarray(np.arange(S) < LENGTH[:, None])[:, None]
    shared = None if prefix is None else Prefix(kv=KeyValue(key=prefix[0], value=prefix[1]), mask=seen)
    return attention(query, KeyValue(key=own[0], value=own[1]), causal_mask(T, T), prefix=shared)


def merged(query, own, prefix, implementation):
    shared = None if prefix is None else KeyValue(key=prefix[0], value=prefix[1])
    return fused_attention(query, KeyValue(key=own[0], value=own[1]), shared, LENGTH, implementation=implementation)


@pytest.mark.parametrize("prefix", [None, PREFIX])
def test_two_calls_merged_are_the_plain_attention(prefix):
    """Values and the gradients of queries, keys and values, with prompts of unequal length and grouped heads."""

    def both(function):
        total = lambda *x: (jnp.sum(COTANGENT * (out := function(*x))), out)
        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(QUERY, OWN, prefix)

    expected = both(plain)
    # The part of the kernel that is without a prefix is the second of the two calls with one, too.
    for implementation in ("xla", "pallas")[: 1 if prefix is None else 2]:
        chex.assert_trees_all_close(
            both(functools.partial(merged, implementation=implementation)), expected, rtol=1e-5, atol=2e-5
        )


def test_merging_is_the_softmax_over_the_union():
    """In float64, with its gradient through the log-sum-exps; a block where nothing was seen adds nothing."""
    scores, values = RNG.normal(size=(6, 9)) * 5, RNG.normal(size=(9, 4))
    cotangent = RNG.normal(size=(6, 4))

    def part(scores, where):
        return jax.nn.softmax(scores[:, where]) @ values[where], jax.nn.logsumexp(scores[:, where], axis=-1)

    def total(merge):
        def function(scores):
            if merge:
                return jnp.sum(cotangent * merge_attention(*part(scores, slice(4)), *part(scores, slice(4, 9)))[0])
            return jnp.sum(cotangent * part(scores, slice(9))[0])

        return jax.jit(jax.value_and_grad(function))

    with jax.enable_x64(True):
        chex.assert_trees_all_close(total(True)(scores), total(False)(scores), rtol=1e-10, atol=1e-12)
        one = part(jnp.asarray(scores), slice(4))
        nothing = jnp.full(6, -jnp.inf)
        chex.assert_trees_all_close(merge_attention(jnp.full((6, 4), jnp.nan), nothing, *one), one)
        out, lse = merge_attention(jnp.ones((6, 4)), nothing, jnp.ones((6, 4)), nothing)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


def test_a_model_with_fused_attention_is_the_same_function():
    options = dict(vocab_size=48, features=16, num_heads=4, num_kv_heads=2, head_dim=8, mlp_features=24, rotary_dim=8,
                   num_layers=1, remat="none")  # fmt: skip
    prompt, completion = jnp.asarray(RNG.integers(0, 48, (B, S))), jnp.asarray(RNG.integers(0, 48, (B, N, T)))
    mask = jnp.asarray(np.arange(S) < LENGTH[:, None])

    @functools.partial(jax.jit, static_argnums=0)
    def logp_and_grad(kind):
        model = Transformer(jax.random.key(0), TransformerConfig(**options, attention=kind))
        function = lambda m: (jnp.sum(COTANGENT[:, :, 0, :, 0] * (x := m.score(prompt, mask, completion).logp)), x)
        grad, logp = jax.grad(function, has_aux=True)(model)
        return jax.tree.leaves(grad), logp

    chex.assert_trees_all_close(logp_and_grad("fused"), logp_and_grad("plain"), rtol=1e-4, atol=1e-5)


def test_the_platform_chooses(monkeypatch):
    fits = {"head_dim": 64, "window": None, "dtype": "bfloat16"}
    assert [choose(kind, **fits) for kind in ("auto", "plain", "fused")] == [None, None, "xla"]
    with pytest.raises(ValueError, match="attention must be one of auto, fused, plain; got 'flash'"):
        choose("flash", **fits)
    with pytest.raises(ValueError, match="implementation must be one of cudnn, pallas, xla; got 'triton'"):
        fused_attention(QUERY, KeyValue(key=OWN[0], value=OWN[1]), implementation="triton")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(fused._kernels(), "check_cudnn_version", lambda: 91000)
    assert [choose(kind, **fits) for kind in ("auto", "plain", "fused")] == ["cudnn", None, "cudnn"]
    for change, reason in (
        ({"window": 4}, "a sliding window is not supported"),
        ({"dtype": "float32"}, "cuDNN takes bfloat16 and float16, not float32"),
        ({"head_dim": 20}, "multiple of 8 up to 128, got 20"),
    ):
        assert choose("auto", **fits | change) is None
        with pytest.raises(ValueError, match=reason):
            choose("fused", **fits | change)
    monkeypatch.delattr(fused._kernels(), fused._BACKWARD)
    assert choose("auto", **fits) is None


def test_a_tpu_takes_its_own_kernels_where_it_knows_the_parts_of_every_device(monkeypatch):
    fits = {"head_dim": 128, "window": None, "dtype": "bfloat16"}
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with jax.sharding.use_abstract_mesh(make_mesh("data:8").abstract_mesh):
        assert [choose(kind, **fits) for kind in ("auto", "plain", "fused")] == ["pallas", None, "pallas"]
        assert choose("auto", **fits | {"dtype": "float32"}) == "pallas"
        for change, reason in (
            ({"window": 4}, "a sliding window is not supported"),
            ({"dtype": "float16"}, "take bfloat16 and float32, not float16"),
            ({"head_dim": 512}, "a head_dim up to 256, got 512"),
        ):
            assert choose("auto", **fits | change) is None
            with pytest.raises(ValueError, match=reason):
                choose("fused", **fits | change)
    assert choose("auto", **fits) is None
    with pytest.raises(ValueError, match="must know the mesh"):
        choose("fused", **fits)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert choose("auto", **fits) == "pallas"


def test_the_calls_of_cudnn_are_well_formed(monkeypatch):
    """Traced for shapes and types, forward and backward, as far as a machine without a GPU can go."""
    monkeypatch.setattr(fused._kernels(), "check_cudnn_version", lambda: 91000)
    prefix = [x.astype("bfloat16") for x in PREFIX]

    def total(query, own, prefix):
        shared = KeyValue(key=prefix[0], value=prefix[1])
        own = KeyValue(key=own[0], value=own[1])
        return jnp.sum(fused_attention(query, own, shared, LENGTH, implementation="cudnn", dtype="bfloat16"))

    jaxpr = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(QUERY, OWN, prefix)
    assert [(x.shape, x.dtype.name) for x in jaxpr.out_avals] == [
        *((x.shape, "float32") for x in (QUERY, *OWN)),
        *((x.shape, "bfloat16") for x in prefix),
    ]
    text = str(jaxpr)
    assert (text.count("MaskType.CAUSAL"), text.count("MaskType.PADDING")) == (2, 2)
