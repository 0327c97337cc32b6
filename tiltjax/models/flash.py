"""Flash attention over one block of keys for TPUs, in Pallas: no matrix of scores is ever stored.

The forward kernel returns the log-sum-exp of the scores beside the output, so that blocks can be merged. The backward
kernels take the log-sum-exp and the output of all blocks together, as `tiltjax.models.fused` keeps them.
Queries of heads that share a key head stand below each other, so that one matrix product serves them all. Away from
TPUs the same kernels are interpreted, which serves tests and nothing else.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tiltjax.ops.collectives import in_parts
from tiltjax.types import Array, Float, Int

__all__ = ["flash_backward", "flash_forward"]

_QUERIES, _KEYS = 256, 512
"""Most rows of a tile: two tiles of scores in float32 take 1 MB of the 16 MB beside a core."""


@chex.dataclass(frozen=True, mappable_dataclass=False)
class _Tiles:
    """How queries ``[X, K, G L, d]`` and keys ``[X, K, U, d]`` are cut, all static.

    Attributes:
      queries: Rows of a tile of queries, a divisor of L.
      keys: Rows of a tile of keys, a divisor of U.
      rounds: Tiles of one head's L queries.
      heads: G, queries' heads per key head.
      columns: Tiles of the U keys.
      causal: Whether query t sees keys 0 to t only.
      scale: Of the scores.
    """

    queries: int
    keys: int
    rounds: int
    heads: int
    columns: int
    causal: bool
    scale: float

    def first(self, i: Int[Array, ""]) -> Int[Array, ""]:
        """Position of the first query of tile i in its completion."""
        return jax.lax.rem(i, self.rounds) * self.queries

    def visible(self, length: Int[Array, ""], i: Int[Array, ""]) -> Int[Array, ""]:
        """How many tiles of keys some query of tile i sees."""
        seen = jnp.minimum(length, self.first(i) + self.queries) if self.causal else length
        return jax.lax.div(seen + self.keys - 1, self.keys)


def flash_forward(
    query: Float[Array, "X L H d"], key: Float[Array, "X U K d"], value: Float[Array, "X U K d"], length: Array | None
) -> tuple[Float[Array, "X L H d"], Float[Array, "X L H"]]:
    r"""Attention of L queries to U keys, with its normaliser.

    .. math:: \ell_t = \log \sum_u e^{q_t k_u / \sqrt d}, \qquad o_t = \sum_u e^{q_t k_u / \sqrt d - \ell_t} v_u

    Args:
      query: H heads, a multiple of K; consecutive queries share a key head.
      key: Of K heads.
      value: Likewise.
      length: How many keys are real, ``[X]``; None: query t sees keys 0 to t, and L is U.

    Returns:
      Output, in the type of the queries, and log-sum-exp, nats, float32; 0 and -inf where nothing is seen.

    References:
      Dao, 2023, arXiv:2307.08691, algorithm 1.
    """
    tiles, length, (q,), keys = _cut(length, key, [query], [key, value])
    rows, (X, K, R, d) = tiles.queries, q.shape
    out, lse = _call(
        _forward_kernel,
        tiles,
        outputs=[(q.shape, query.dtype, "query"), ((X, K, R, 1), jnp.float32, "query")],
        scratch=[(rows, 1), (rows, 1), (rows, d)],
        inner="key",
    )(length, q, *keys)
    return _heads_last(out, query), _heads_last(lse, query)[..., 0]


def flash_backward(
    query: Float[Array, "X L H d"],
    key: Float[Array, "X U K d"],
    value: Float[Array, "X U K d"],
    length: Array | None,
    out: Float[Array, "X L H d"],
    lse: Float[Array, "X L H"],
    grad: Float[Array, "X L H d"],
) -> tuple[Array, Array, Array]:
    r"""Gradients of attention to these keys among others.

    .. math::
      p_{tu} = e^{q_t k_u / \sqrt d - \ell_t}, \qquad s_{tu} = p_{tu} (g_t v_u - g_t o_t) / \sqrt d, \qquad
      \dot q_t = \sum_u s_{tu} k_u, \quad \dot k_u = \sum_t s_{tu} q_t, \quad \dot v_u = \sum_t p_{tu} g_t

    Args:
      query: As in `flash_forward`.
      key: Likewise.
      value: Likewise.
      length: Likewise.
      out: Output over all keys, these and others.
      lse: Log-sum-exp of the scores of all keys, nats.
      grad: Gradient of the loss with respect to ``out``.

    Returns:
      Gradients of queries, keys and values, float32.

    References:
      Dao, 2023, arXiv:2307.08691, algorithm 2.
    """
    delta = jnp.sum(grad.astype(lse.dtype) * out.astype(lse.dtype), axis=-1, keepdims=True)
    tiles, length, rows, keys = _cut(length, key, [query, grad, lse[..., None], delta], [key, value])
    shape, of_key, d = rows[0].shape, keys[0].shape, query.shape[-1]
    (dq,) = _call(
        _query_kernel,
        tiles,
        outputs=[(shape, jnp.float32, "query")],
        scratch=[(tiles.queries, d)],
        inner="key",
    )(length, *rows, *keys)
    dk, dv = _call(
        _key_kernel,
        tiles,
        outputs=[(of_key, jnp.float32, "key")] * 2,
        scratch=[(tiles.keys, d)] * 2,
        inner="query",
    )(length, *rows, *keys)
    return _heads_last(dq, query), *(jnp.swapaxes(x[:, :, : key.shape[1]], 1, 2) for x in (dk, dv))


def _cut(
    length: Array | None, key: Array, queries: Sequence[Array], keys: Sequence[Array]
) -> tuple[_Tiles, Array, list[Array], list[Array]]:
    """Tiles, lengths, and the arrays with their heads first, padded with zeros to whole tiles."""
    (X, L, H, d), (U, K) = queries[0].shape, key.shape[1:3]
    rounds, columns = pl.cdiv(L, _QUERIES), pl.cdiv(U, _KEYS)
    rows, places = _round_up(pl.cdiv(L, rounds), 16), _round_up(pl.cdiv(U, columns), 128)
    tiles = _Tiles(queries=rows, keys=places, rounds=rounds, heads=H // K, columns=columns,
                   causal=length is None, scale=d**-0.5)  # fmt: skip
    length = jnp.full(X, U, jnp.int32) if length is None else length

    def of_query(x):
        x = jnp.moveaxis(x.reshape(X, L, K, H // K, -1), 1, 3)
        x = jnp.pad(x, [(0, 0)] * 3 + [(0, rounds * rows - L), (0, 0)])
        return x.reshape(X, K, -1, x.shape[-1])

    def of_key(x):
        return jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0)] * 2 + [(0, columns * places - U), (0, 0)])

    return tiles, length, [of_query(x) for x in queries], [of_key(x) for x in keys]


def _heads_last(x: Array, query: Array) -> Array:
    """``[X, K, G L', e] -> [X, L, H, e]``, without the padding."""
    X, L, H, _ = query.shape
    K = x.shape[1]
    x = x.reshape(X, K, H // K, -1, x.shape[-1])[:, :, :, :L]
    return jnp.moveaxis(x, 3, 1).reshape(X, L, H, -1)


def _round_up(n: int, step: int) -> int:
    return -(-n // step) * step


def _call(
    kernel: Callable, tiles: _Tiles, *, outputs: Sequence[tuple], scratch: Sequence[tuple[int, int]], inner: str
) -> Callable:
    """The kernel over a grid of (row, key head, outer tile, inner tile); what it sums up runs along the inner ones."""
    sizes = {"query": tiles.heads * tiles.rounds, "key": tiles.columns}
    outer = "query" if inner == "key" else "key"

    def place(kind):
        def index(x, k, a, b, length):
            i, j = (a, b) if outer == "query" else (b, a)
            if kind == "query":
                return x, k, i, 0
            # A tile that nobody sees is not fetched: the last one stays.
            last = jnp.maximum(tiles.visible(length[x], i), 1) - 1
            return x, k, jnp.minimum(j, last) if inner == "key" else j, 0

        return index

    def spec(kind, width):
        return pl.BlockSpec((None, None, getattr(tiles, "queries" if kind == "query" else "keys"), width), place(kind))

    def run(interpret, length, *arrays):
        kinds = ["query"] * (len(arrays) - 2) + ["key"] * 2
        X, K = arrays[0].shape[:2]
        shapes = [jax.ShapeDtypeStruct((X, K, *shape[2:]), dtype) for shape, dtype, _ in outputs]
        return pl.pallas_call(
            functools.partial(kernel, tiles),
            out_shape=shapes,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(X, K, sizes[outer], sizes[inner]),
                in_specs=[spec(kind, x.shape[-1]) for kind, x in zip(kinds, arrays, strict=True)],
                out_specs=[spec(kind, shape[-1]) for shape, _, kind in outputs],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
            interpret=interpret,
        )(length, *arrays)

    def on_device(*arrays):
        return jax.lax.platform_dependent(
            *arrays, tpu=functools.partial(run, False), default=functools.partial(run, True)
        )

    return lambda *arrays: in_parts(on_device, *arrays)


def _forward_kernel(tiles, length, q, k, v, out, lse, top, total, mean):
    x, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        top[...] = jnp.full(top.shape, -jnp.inf, top.dtype)
        total[...] = jnp.zeros(total.shape, total.dtype)
        mean[...] = jnp.zeros(mean.shape, mean.dtype)

    @pl.when(j < tiles.visible(length[x], i))
    def _():
        scores, seen = _scores(tiles, length[x], i, j, q[...], k[...])
        scores = jnp.where(seen, scores, -jnp.inf)
        highest = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
        shift = jnp.where(highest == -jnp.inf, 0, highest)
        p, keep = jnp.exp(scores - shift), jnp.exp(top[...] - shift)
        top[...] = highest
        total[...] = keep * total[...] + jnp.sum(p, axis=1, keepdims=True)
        mean[...] = keep * mean[...] + _dot(p.astype(v.dtype), v[...], 1, 0)

    @pl.when(j == tiles.columns - 1)
    def _():
        nothing = total[...] == 0
        mass = jnp.where(nothing, 1, total[...])
        out[...] = (mean[...] / mass).astype(out.dtype)
        lse[...] = jnp.where(nothing, -jnp.inf, top[...] + jnp.log(mass))


def _query_kernel(tiles, length, q, grad, lse, delta, k, v, dq, sum_q):
    x, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(j == 0)
    def _():
        sum_q[...] = jnp.zeros(sum_q.shape, sum_q.dtype)

    @pl.when(j < tiles.visible(length[x], i))
    def _():
        _, ds = _slopes(tiles, length[x], i, j, q, grad, lse, delta, k, v)
        sum_q[...] += _dot(ds.astype(k.dtype), k[...], 1, 0)

    @pl.when(j == tiles.columns - 1)
    def _():
        dq[...] = sum_q[...]


def _key_kernel(tiles, length, q, grad, lse, delta, k, v, dk, dv, sum_k, sum_v):
    x, j, i = pl.program_id(0), pl.program_id(2), pl.program_id(3)

    @pl.when(i == 0)
    def _():
        sum_k[...] = jnp.zeros(sum_k.shape, sum_k.dtype)
        sum_v[...] = jnp.zeros(sum_v.shape, sum_v.dtype)

    @pl.when(j < tiles.visible(length[x], i))
    def _():
        p, ds = _slopes(tiles, length[x], i, j, q, grad, lse, delta, k, v)
        sum_k[...] += _dot(ds.astype(q.dtype), q[...], 0, 0)
        sum_v[...] += _dot(p.astype(grad.dtype), grad[...], 0, 0)

    @pl.when(i == tiles.heads * tiles.rounds - 1)
    def _():
        dk[...] = sum_k[...]
        dv[...] = sum_v[...]


def _slopes(tiles, length, i, j, q, grad, lse, delta, k, v):
    """Probabilities of a tile and the gradient of the loss with respect to its products ``q k``."""
    scores, seen = _scores(tiles, length, i, j, q[...], k[...])
    p = jnp.where(seen, jnp.exp(jnp.where(seen, scores, 0) - lse[...]), 0)
    return p, p * (_dot(grad[...], v[...], 1, 1) - delta[...]) * tiles.scale


def _scores(tiles, length, i, j, q, k) -> tuple[Any, Any]:
    """Scores of a tile, and which of them count."""
    scores = _dot(q, k, 1, 1) * tiles.scale
    key = j * tiles.keys + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    seen = key < length
    if tiles.causal:
        seen &= key <= tiles.first(i) + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    return scores, seen


def _dot(a, b, of_a: int, of_b: int):
    """Sums over dimension ``of_a`` of ``a`` and ``of_b`` of ``b``, in float32."""
    return jax.lax.dot_general(a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32)
