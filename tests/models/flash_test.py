import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tiltjax.models import flash
from tiltjax.models.attention import KeyValue, Prefix, attention, causal_mask
from tiltjax.models.flash import flash_backward, flash_forward
from tiltjax.models.fused import fused_attention
from tiltjax.train.sharding import BATCH, make_mesh

RNG = np.random.default_rng(0)


@pytest.fixture
def small_tiles(monkeypatch):
    """So that few tokens fill several tiles, the last of them partly."""
    monkeypatch.setattr(flash, "_QUERIES", 16)
    monkeypatch.setattr(flash, "_KEYS", 128)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def oracle(query, key, value, seen):
    """Output and log-sum-exp in float64, one head at a time."""
    X, L, H, d = query.shape
    out, lse = np.zeros((X, L, H, d)), np.full((X, L, H), -np.inf)
    for x, t, h in np.ndindex(X, L, H):
        k, v = (a[x, seen[x, t], h * a.shape[2] // H].astype(np.float64) for a in (key, value))
        if len(k):
            scores = k @ query[x, t, h].astype(np.float64) / np.sqrt(d)
            mass = np.exp(scores - scores.max())
            out[x, t, h], lse[x, t, h] = mass @ v / mass.sum(), scores.max() + np.log(mass.sum())
    return out, lse


def test_a_block_of_many_tiles_is_the_softmax_over_what_is_seen(small_tiles):
    """Prompts that fill three tiles, one, and none; and a causal block, with two heads of queries per key head."""
    X, L, U, H, K, d = 3, 20, 300, 4, 2, 8
    length = np.array([300, 100, 0], np.int32)
    query, key, value = normal(X, L, H, d), normal(X, U, K, d), normal(X, U, K, d)
    seen = np.broadcast_to((np.arange(U) < length[:, None])[:, None], (X, L, U))
    causal = np.broadcast_to(np.tri(L, dtype=bool), (X, L, L))
    own = (3 * key[:, :L], value[:, :L])
    out = jax.jit(lambda: (flash_forward(query, key, value, length), flash_forward(query, *own, None)))()
    expected = oracle(query, key, value, seen), oracle(query, *own, causal)
    chex.assert_trees_all_close(out, jax.tree.map(np.float32, expected), rtol=1e-5, atol=1e-5)


def test_gradients_over_many_tiles_are_those_of_the_plain_attention(small_tiles):
    B, N, H, K, T, S, d = 2, 2, 4, 2, 150, 200, 8
    length = np.array([200, 90])
    query, cotangent = normal(B, N, H, T, d), normal(B, N, H, T, d)
    own, prefix = [normal(B, N, K, T, d) for _ in range(2)], [normal(B, K, S, d) for _ in range(2)]

    def plain(query, own, prefix):
        seen = jnp.asarray(np.arange(S) < length[:, None])[:, None]
        shared = Prefix(kv=KeyValue(key=prefix[0], value=prefix[1]), mask=seen)
        return attention(query, KeyValue(key=own[0], value=own[1]), causal_mask(T, T), prefix=shared)

    def tiled(query, own, prefix):
        shared, own = KeyValue(key=prefix[0], value=prefix[1]), KeyValue(key=own[0], value=own[1])
        return fused_attention(query, own, shared, length, implementation="pallas")

    def both(function):
        total = lambda *x: (jnp.sum(cotangent * (out := function(*x))), out)
        return jax.jit(jax.grad(total, argnums=(0, 1, 2), has_aux=True))(query, own, prefix)

    chex.assert_trees_all_close(both(tiled), both(plain), rtol=1e-4, atol=2e-5)


def test_every_device_runs_its_own_part():
    """Rows over data and fsdp, heads over tensor, without any communication; where they do not divide, whole."""
    mesh, length = make_mesh("data:2,fsdp:2,tensor:2"), np.array([7, 3, 1, 5], np.int32)

    def run(query, key, value, length):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            out = flash_forward(query, key, value, length)
            return out, flash_backward(query, key, value, length, *out, query)

    arrays = normal(4, 6, 4, 8), normal(4, 7, 2, 8), normal(4, 7, 2, 8), length
    odd = tuple(x[:3] if x.ndim == 1 else x[:3, :, : x.shape[2] // 2] for x in arrays)
    place = NamedSharding(mesh, BATCH)
    split = jax.jit(run, in_shardings=place).lower(*arrays).compile()
    assert "all-" not in split.as_text()
    parts = split(*jax.device_put(arrays, place))
    alone = jax.jit(run, in_shardings=NamedSharding(mesh, PartitionSpec()))(*odd)
    chex.assert_trees_all_close(alone, jax.tree.map(lambda x: x[:3, :, : x.shape[2] // 2], parts), atol=1e-6)


def test_the_kernels_lower_for_a_tpu():
    """Ahead of time, without one: three kernels for each of two blocks, and no trace of the interpreter."""
    B, N, H, K, T, S, d = 2, 4, 8, 2, 127, 600, 64

    def total(query, own, prefix, length):
        out = fused_attention(query, own, prefix, length, implementation="pallas", dtype="bfloat16")
        return jnp.sum(out)

    def keys(*shape):
        return KeyValue(key=jnp.zeros(shape), value=jnp.zeros(shape))

    arguments = jnp.zeros((B, N, H, T, d)), keys(B, N, K, T, d), keys(B, K, S, d), jnp.ones(B, int)
    traced = jax.jit(jax.grad(total, argnums=(0, 1, 2))).trace(*arguments)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 6
    assert "stablehlo.while" not in text
