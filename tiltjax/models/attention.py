"""The one attention of the library: N completions that share their prompt's keys and values.

Scoring, training, prefill and decoding are four shapes of the same call; the prompt's keys and values are stored,
moved and read once, whatever N is.
"""

import chex
import jax
import jax.numpy as jnp

from tiltjax.ops.matmul import multiplies_bfloat16, product, scale_rows
from tiltjax.types import Array, Bool, Dtype, Float

__all__ = ["KeyValue", "Prefix", "attention", "causal_mask", "operand_dtype", "prefix_window"]

_MANY_ROWS = 16
"""From here on a batched bfloat16 product beats a float32 one on a CPU that has units for it."""


@chex.dataclass(frozen=True, mappable_dataclass=False)
class KeyValue:
    """Keys and values of ``U`` positions, heads before positions: ``[*batch, K, U, d]``."""

    key: Array
    value: Array


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Prefix:
    """A prompt that N completions attend to.

    Attributes:
      kv: Keys and values ``[B, K, S, d]``, one copy for all N.
      mask: Which prompt positions a query sees, ``[B, 1, S]``, or ``[B, T, S]`` where a window limits it;
        ``[B, N, T, S]`` where candidates differ.
    """

    kv: KeyValue
    mask: Bool[Array, "..."]


def attention(
    query: Float[Array, "B N H T d"],
    own: KeyValue,
    own_mask: Bool[Array, "T U"] | Bool[Array, "#B #N T U"],
    *,
    prefix: Prefix | None = None,
    cached: bool = False,
    dtype: Dtype = jnp.float32,
) -> Float[Array, "B N H T d"]:
    r"""Softmax attention of N completions over a shared prompt and their own prefix.

    .. math:: o = \frac{\sum_{s} e^{q k^p_s} v^p_s + \sum_{u} e^{q k_u} v_u}{\sum_{s} e^{q k^p_s} + \sum_{u} e^{q k_u}}

    Two blocks of scores under one softmax: the prompt's block is one matrix product for all N queries. Decoding
    weighs each block by its own maximum, so that neither waits for the other, and merges them by log-sum-exp. Scores
    are scaled by ``1 / sqrt(d)``; the softmax is float32 or wider.

    Args:
      query: H heads, a multiple of the K heads of the keys; consecutive queries share a key head.
      own: Keys and values of the completions themselves, ``[B, N, K, U, d]``.
      own_mask: Which own positions each query sees, of every candidate alike or of each; every query must see at least
        one.
      prefix: The shared prompt, or None (prefill, where the prompt is its own completion with N = 1).
      cached: Keys and values come as a cache holds them: all keys as ``[*batch, K, d, U]``, and what is the prompt's in
        the type to multiply in.
      dtype: Operand type of the matrix products.

    Returns:
      The attended values.
    """
    B, N, H, T, d = query.shape
    K = own.value.shape[2]
    chex.assert_is_divisible(H, K)
    G = H // K
    wide, dtype = jnp.promote_types(dtype, jnp.float32), operand_dtype(dtype)
    q = (query * d**-0.5).astype(dtype).reshape(B, N, K, G, T, d)
    own = _converted(own, dtype)

    # Products of [x, k, M, D] with [x, k, D, U] (or a key's [x, k, U, D]): XLA on the CPU is slow at most other forms.
    def dot(a, b, over):
        return product(a.astype(b.dtype), b, ((3,), (over,)), ((0, 1), (0, 1)))

    def turn(a):
        """``[B, N, K, ...]`` as ``[B, K, N, ...]`` and back: what is large stays in the order of its product."""
        return jnp.swapaxes(a, 1, 2)

    def scored(q, key, mask, shape):
        """Scores, -inf where a query does not see, and the largest of them."""
        scores = dot(q, key, 2 if cached else 3).reshape(*shape, mask.shape[-1])
        scores = jnp.where(mask, scores, -jnp.inf)
        return scores, jax.lax.stop_gradient(jnp.max(scores, axis=-1, initial=-jnp.inf))

    def weighted(scores, top, value):
        """What the weights sum to, and the values times their weights."""
        weights, rows = jnp.exp(scores - top[..., None]), top.size // (len(value) * K)
        out = dot(weights.reshape(*value.shape[:2], rows, value.shape[2]), value, 2)
        return jnp.sum(weights, axis=-1), out.reshape(*top.shape, d)

    alone = jax.tree.map(lambda a: a.reshape(B * N, *a.shape[2:]), own)
    seen = own_mask if own_mask.ndim == 2 else own_mask[:, :, None, None]
    scores, top = scored(q.reshape(B * N, K, G * T, d), alone.key, seen, (B, N, K, G, T))
    if prefix is None:
        total, out = weighted(scores, top, alone.value)
        return scale_rows(out, 1 / total).reshape(query.shape)
    kv = prefix.kv if cached else _converted(prefix.kv, dtype)
    seen = prefix.mask[:, None, None, None] if prefix.mask.ndim == 3 else prefix.mask[:, None, :, None]
    shared_scores, shared_top = scored(turn(q).reshape(B, K, N * G * T, d), kv.key, seen, (B, K, N, G, T))
    both = jnp.maximum(top, turn(shared_top))
    if cached:
        shared_top = jnp.maximum(shared_top, jnp.finfo(wide).min)  # Finite where a query sees nothing of the prompt.
    else:  # With a gradient one maximum for both is the cheaper way.
        top, shared_top = both, turn(both)
    total, out = weighted(scores, top, alone.value)
    shared_total, shared_out = map(turn, weighted(shared_scores, shared_top, kv.value))
    if cached:
        part, shared_part = jnp.exp(top - both), jnp.exp(turn(shared_top) - both)
        total, shared_total = total * part, shared_total * shared_part
        out, shared_out = out * part[..., None], shared_out * shared_part[..., None]
    return scale_rows(out + shared_out, 1 / (total + shared_total)).reshape(query.shape)


def operand_dtype(dtype: Dtype, *, rows: int = 0) -> Dtype:
    """Operand dtype of the attention matmuls; callers that already pass this dtype avoid a conversion.

    Args:
      dtype: Operand type of the matrix products.
      rows: Queries per head of the KV cache in one matmul when decoding; 0 where there is a gradient.

    Returns:
      ``dtype``; on a CPU float32 or wider, unless ``rows`` is large. There XLA supports batched bf16 x bf16 -> f32
      matmuls only in the layout of decoding; the transposed ones of the backward pass fail at run time.
    """
    if jax.default_backend() != "cpu" or (rows >= _MANY_ROWS and multiplies_bfloat16()):
        return dtype
    return jnp.promote_types(dtype, jnp.float32)


def _converted(kv: KeyValue, dtype: Dtype) -> KeyValue:
    return jax.tree.map(lambda a: a.astype(dtype), kv)


def causal_mask(queries: int, keys: int, *, window: int | None = None) -> Bool[Array, "T U"]:
    """Which of ``keys`` positions each of ``queries`` positions sees: itself and those before it.

    Args:
      queries: T.
      keys: U; position u of the keys is position u of the queries.
      window: How many positions back a query sees, itself included; None means all.

    Returns:
      True where query t sees key u.
    """
    distance = jnp.arange(queries)[:, None] - jnp.arange(keys)[None]
    return (distance >= 0) if window is None else (distance >= 0) & (distance < window)


def prefix_window(
    prompt_mask: Bool[Array, "B S"], position: Array, *, window: int | None = None
) -> Bool[Array, "B X S"]:
    """Which prompt positions completion queries see.

    Args:
      prompt_mask: True on real prompt tokens.
      position: Positions of the queries, ``[B, T]``, counted from the start of the prompt.
      window: How many positions back a query sees; None means all, and one row serves every query.

    Returns:
      ``[B, 1, S]`` without a window, else ``[B, T, S]``.
    """
    if window is None:
        return prompt_mask[:, None]
    near = position[:, :, None] - jnp.arange(prompt_mask.shape[1])[None, None] < window
    return prompt_mask[:, None] & near
