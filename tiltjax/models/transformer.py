"""One decoder-only transformer by config; the prompt is computed once for all of its N completions."""

import dataclasses
import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx

from tiltjax.models.attention import KeyValue, Prefix, attention, causal_mask, operand_dtype, prefix_window
from tiltjax.models.config import TransformerConfig
from tiltjax.models.fused import choose, fused_attention
from tiltjax.models.layers import ACTIVATIONS, NARROW, WIDEN, Linear, Norm, entry, rotary, rotate, scan_layers
from tiltjax.models.segments import Segments, arrange
from tiltjax.ops.bits import KEPT, gradient_at_rounded
from tiltjax.ops.collectives import spread, whole
from tiltjax.ops.matmul import dot, turned_is_faster
from tiltjax.ops.tokens import TokenStats, token_logp
from tiltjax.types import Array, Bool, Dtype, Float, Int, PRNGKey, UInt8

__all__ = ["Block", "Cache", "Transformer"]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Cache:
    """Keys and values during decoding: the prompt's once, the completions' own per candidate.

    Keys stand as ``[..., d, S]``: there a step reads them in order (on a CPU two to three times as fast).

    Attributes:
      prefix: One per layer: keys ``[B, K, d, S]``, values ``[B, K, S, d]``, in the type that attention multiplies in.
      prompt_mask: ``[B, S]``.
      own: One per layer, ``[B N, K, d, T]`` and ``[B N, K, T, d]``, in the type that attention multiplies in, too: a
        ring of the last T tokens, updated in place under `jax.jit` (B and N in one axis, lest XLA drop one of length 1
        and copy the cache for it).
      angles: Cosines and sines of every position that a completion can reach, ``[S + T, R]`` each; None without rotary
        positions. A step would compute them in every layer again.
      step: How many tokens every candidate has appended, scalar; the next one goes to place ``step % T``.
    """

    prefix: tuple[KeyValue, ...]
    prompt_mask: Bool[Array, "..."]
    own: tuple[KeyValue, ...]
    angles: tuple[Array, Array] | None
    step: Int[Array, ""]


class Block(nnx.Module):
    """Attention and MLP with their norms; `Transformer` holds all blocks as one, stacked along a leading axis."""

    def __init__(self, key: PRNGKey, config: TransformerConfig):
        c, keys = config, jax.random.split(key, 7)
        norm = functools.partial(Norm, eps=c.norm_eps)
        narrow = c.features**-0.5
        self.attention_norm = norm(c.features, kind=c.norm)
        self.query = Linear(keys[0], c.features, c.num_heads * c.head_dim, bias=c.qkv_bias, std=narrow)
        self.key = Linear(keys[1], c.features, c.num_kv_heads * c.head_dim, bias=c.qkv_bias, std=narrow)
        self.value = Linear(keys[2], c.features, c.num_kv_heads * c.head_dim, bias=c.qkv_bias, std=narrow)
        self.query_norm = nnx.data(norm(c.head_dim, kind="rms") if c.qk_norm else None)
        self.key_norm = nnx.data(norm(c.head_dim, kind="rms") if c.qk_norm else None)
        out_std = (2 * c.num_layers * c.num_heads * c.head_dim) ** -0.5
        self.out = Linear(keys[3], c.num_heads * c.head_dim, c.features, bias=c.out_bias, std=out_std)
        self.mlp_norm = norm(c.features, kind=c.norm)
        gate = Linear(keys[4], c.features, c.mlp_features, bias=c.mlp_bias, std=narrow) if c.gated else None
        self.gate = nnx.data(gate)
        self.up = Linear(keys[5], c.features, c.mlp_features, bias=c.mlp_bias, std=narrow)
        down_std = (2 * c.num_layers * c.mlp_features) ** -0.5
        self.down = Linear(keys[6], c.mlp_features, c.features, bias=c.mlp_bias, std=down_std)
        self.config = c

    def project(self, x: Float[Array, "B N L D"], angles: tuple | None) -> tuple[Array, KeyValue]:
        """Queries ``[B, N, H, L, d]`` and keys and values ``[B, N, K, L, d]`` of a normalised input, rotated."""
        c, dtype = self.config, self.config.compute_dtype
        x = self.attention_norm(x)

        def heads(y):
            return jnp.moveaxis(y.reshape(*y.shape[:-1], y.shape[-1] // c.head_dim, c.head_dim), -2, -3)

        q, k, v = heads(self.query(x, dtype)), heads(self.key(x, dtype)), heads(self.value(x, dtype))
        if self.query_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        return q, KeyValue(key=k.astype(dtype), value=v.astype(dtype))

    def finish(self, x: Float[Array, "B N L D"], attended: Float[Array, "B N H L d"]) -> Float[Array, "B N L D"]:
        """Adds the attention output and the MLP to the residual stream."""
        c, dtype = self.config, self.config.compute_dtype
        merged = jnp.moveaxis(attended, -3, -2).reshape(*x.shape[:-1], c.num_heads * c.head_dim)
        after = x + self.out(merged, dtype)
        h = self.mlp_norm(x if c.parallel_residual else after)
        act = ACTIVATIONS[c.activation]

        def combine(*inner):
            """The hidden layer, of ``(gate, up)`` or of ``up``."""
            return gradient_at_rounded(lambda g, *u: act(g) * u[0] if u else act(g), dtype, *inner)

        maps = [self.up] if self.gate is None else [self.gate, self.up]
        if self.down.turned:
            rows = h.reshape(-1, c.features)
            hidden = combine(*(m.columns(rows, dtype) for m in maps))
            return after + self.down.columns(hidden, dtype, axis=0).T.reshape(after.shape)
        return after + self.down(combine(*(m(h, dtype) for m in maps)), dtype, keep=True)


class Transformer(nnx.Module):
    """A decoder-only language model: Llama, Mistral, Qwen2, Qwen3, GPT-NeoX or GPT-2, by its config.

    A pytree of float32 (or bfloat16) parameters: `jax.jit`, `jax.grad` and optax take it as it is.

    Attributes:
      embedding: ``[V, D]``.
      position_embedding: ``[positions, D]``, None with rotary positions.
      blocks: One `Block` whose arrays have a leading axis of ``num_layers``.
      norm: Final norm.
      head: Vocabulary projection ``[V, D]``, None when tied to the embedding.
      config: `TransformerConfig`, static.

    Example:
      >>> model = Transformer(jax.random.key(0), TransformerConfig(vocab_size=32))
      >>> prompt, completion = jnp.ones((1, 3), int), jnp.ones((1, 4, 5), int)
      >>> model.score(prompt, prompt > 0, completion).logp.shape
      (1, 4, 5)
    """

    def __init__(self, key: PRNGKey, config: TransformerConfig):
        c = config
        keys = jax.random.split(key, 4)
        self.embedding = nnx.Param(jax.random.normal(keys[0], (c.vocab_size, c.features)) * c.features**-0.5)
        learned = jax.random.normal(keys[1], (c.max_positions, c.features)) * 0.01 if c.rope_theta is None else None
        self.position_embedding: Any = nnx.data(None if learned is None else nnx.Param(learned))
        self.blocks: Any = jax.vmap(lambda k: Block(k, c))(jax.random.split(keys[2], c.num_layers))
        self.norm = Norm(c.features, kind=c.norm, eps=c.norm_eps)
        head = None if c.tied else nnx.Param(jax.random.normal(keys[3], (c.vocab_size, c.features)) * c.features**-0.5)
        self.head = nnx.data(head)
        self.config = c

    def score(
        self,
        prompt: Int[Array, "B S"],
        prompt_mask: Bool[Array, "B S"],
        completion: Int[Array, "B N T"],
        *,
        temperature: float = 1.0,
        support: UInt8[Array, "B N T bytes"] | None = None,
        chunk: int = 3072,
        segments: Segments | None = None,
    ) -> TokenStats:
        """Log-probability, entropy and self-certainty of every completion token.

        Args:
          prompt: Right-padded prompt tokens.
          prompt_mask: True on real prompt tokens; at least one per prompt.
          completion: N right-padded completions of each prompt; what stands in the padding moves no real position.
          temperature: Softmax temperature.
          support: Which tokens each law is restricted to, as for `tiltjax.ops.tokens.token_logp`; None means all.
          chunk: Vocabulary entries per step of it.
          segments: Where several prompts stand in one row: which of them each position and completion belongs to.

        Returns:
          `TokenStats`, each field ``[B, N, T]``; mask the padding before use.
        """
        hidden = self.hidden(prompt, prompt_mask, completion, segments=segments)
        options: dict[str, Any] = {"temperature": temperature, "support": support, "chunk": chunk}
        return token_logp(hidden, self.projection(), completion, dtype=self.config.compute_dtype, **options)

    def hidden(
        self,
        prompt: Int[Array, "B S"],
        prompt_mask: Bool[Array, "B S"],
        completion: Int[Array, "B N T"],
        *,
        segments: Segments | None = None,
    ) -> Float[Array, "B N T D"]:
        """Last hidden states, each at the position that predicts the completion token of the same index.

        Args:
          prompt: Right-padded prompt tokens.
          prompt_mask: True on real prompt tokens.
          completion: N right-padded completions of each prompt.
          segments: As in `score`.

        Returns:
          The state after the prompt for the first token, after token ``t - 1`` for token ``t``.
        """
        c = self.config
        (B, S), (N, T) = prompt.shape, completion.shape[1:]
        U = T - 1
        place = arrange(prompt_mask, U, segments=segments, window=c.sliding_window)

        # A prompt and its completions stand in one row: every matrix multiplies both at once.
        def row(of_prompt, of_completions):
            completions = jnp.broadcast_to(of_completions, (B, N, U)).reshape(B, N * U)
            return jnp.concatenate([jnp.broadcast_to(of_prompt, (B, S)), completions], axis=1)[:, None]

        token, position = row(prompt, completion[..., :U]), row(place.prompt_position, place.position)
        x, angles = self._embed(token, position), self._angles(position)
        own_mask = causal_mask(U, U, window=c.sliding_window)
        fused = None
        if segments is None and U > 0:
            fused = choose(c.attention, head_dim=c.head_dim, window=c.sliding_window, dtype=c.compute_dtype)

        def parts(heads):
            """``[B, 1, H, S + N U, d]`` as that of the prompt, and of the completions, ``[B, N, H, U, d]``."""
            of_prompt, own = jnp.split(heads, [S], axis=3)
            return of_prompt, jnp.swapaxes(own.reshape(B, own.shape[2], N, U, c.head_dim), 1, 2)

        def layer(x, block):
            x, block = spread(x), _gathered(block)
            query, kv = block.project(x, angles)
            (prompt_query, query), keys, values = parts(query), parts(kv.key), parts(kv.value)
            kv, own = KeyValue(key=keys[0], value=values[0]), KeyValue(key=keys[1], value=values[1])
            attended = [self._attend_prompt(prompt_query, kv, place.prompt_sees)]
            kv = jax.tree.map(lambda a: a[:, 0], kv)
            if fused:
                length = place.last[:, 0] + 1
                y = fused_attention(query, own, kv, length, implementation=fused, dtype=c.compute_dtype)
            else:
                y = attention(query, own, own_mask, prefix=Prefix(kv=kv, mask=place.sees), dtype=c.compute_dtype)
            attended += [jnp.swapaxes(y, 1, 2).reshape(B, 1, c.num_heads, N * U, c.head_dim)]
            return block.finish(x, jnp.concatenate(attended, axis=3)), None

        x, _ = scan_layers(_REMAT[c.remat](layer), x, self.blocks)
        last = jax.vmap(lambda x, i: x[i])(x[:, 0, :S], place.last)[:, :, None]
        first = jnp.broadcast_to(last, (B, N, 1, c.features))
        return self.norm(jnp.concatenate([first, x[:, 0, S:].reshape(B, N, U, c.features)], axis=2))

    def score_sequences(
        self, token: Int[Array, "B L"], segment: Int[Array, "B L"], *, temperature: float = 1.0, chunk: int = 3072
    ) -> TokenStats:
        """Log-probability, entropy and self-certainty of the tokens of whole sequences that share rows.

        Args:
          token: Sequences one after another.
          segment: Which sequence of its row a token belongs to; the tokens of a sequence are consecutive.
          temperature: Softmax temperature.
          chunk: As in `score`.

        Returns:
          `TokenStats`, each field ``[B, L - 1]``: entry l is of token ``l + 1``, after those of its own sequence
          before it. Of a sequence's first token it says nothing.
        """
        c = self.config
        nobody = Segments(prompt=segment, completion=jnp.zeros((len(segment), 0), segment.dtype))
        place = arrange(jnp.ones(segment.shape, bool), 0, segments=nobody)
        position = place.prompt_position[:, None]
        x, angles = self._embed(token[:, None], position), self._angles(position)

        def layer(x, block):
            x, _ = self._prompt_layer(_gathered(block), spread(x), angles, place.prompt_sees)
            return x, None

        x, _ = scan_layers(_REMAT[c.remat](layer), x, self.blocks)
        hidden = self.norm(x[:, 0, :-1])
        options: dict[str, Any] = {"temperature": temperature, "chunk": chunk, "dtype": c.compute_dtype}
        return token_logp(hidden, self.projection(), token[:, 1:], **options)

    def prefill(
        self, prompt: Int[Array, "B S"], prompt_mask: Bool[Array, "B S"], *, num_candidates: int, max_tokens: int
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Runs the prompt once and makes room for N completions of it.

        Args:
          prompt: Right-padded prompt tokens.
          prompt_mask: True on real prompt tokens.
          num_candidates: N.
          max_tokens: Longest completion.

        Returns:
          Logits of the first completion token, and the cache that `decode_step` advances.
        """
        c = self.config
        x, angles = self._embed_prompt(prompt)
        x, kv = scan_layers(lambda x, block: self._prompt_layer(block, x, angles), x, self.blocks)
        # Kept as attention reads it, so that no step converts it again.
        rows = num_candidates * (c.num_heads // c.num_kv_heads)
        kv = _by_feature(jax.tree.map(lambda a: a.astype(operand_dtype(c.compute_dtype, rows=rows)), kv))
        prefix = tuple(jax.tree.map(lambda a: a[i, :, 0], kv) for i in range(c.num_layers))  # noqa: B023
        shape = (prompt.shape[0] * num_candidates, c.num_kv_heads, max_tokens, c.head_dim)
        empty = jnp.zeros(shape, operand_dtype(c.compute_dtype))
        own = (_by_feature(KeyValue(key=empty, value=empty)),) * c.num_layers
        last = self.norm(_at(x[:, 0], jnp.sum(prompt_mask, axis=-1) - 1))
        reach = jnp.arange(prompt.shape[1] + max_tokens)[None, None]
        reach = jax.tree.map(lambda a: a[0, 0, 0], self._angles(reach))
        cache = Cache(prefix=prefix, prompt_mask=prompt_mask, own=own, angles=reach, step=jnp.int32(0))
        return dot(last, self.projection(), c.compute_dtype), cache

    def refill(
        self, cache: Cache, row: Int[Array, " R"], prompt: Int[Array, "R S"], prompt_mask: Bool[Array, "R S"]
    ) -> tuple[Float[Array, "R V"], Cache]:
        """Runs R new prompts once and puts them in the place of others; the caller counts their candidates from 0.

        Args:
          cache: From `prefill`, of prompts of the same padded length.
          row: Which of its B prompts to replace, each at most once; B or more replaces nothing.
          prompt: Right-padded prompt tokens.
          prompt_mask: True on real prompt tokens.

        Returns:
          Logits of the first completion token, and the cache for `decode_step` with ``length``.
        """
        logits, new = self.prefill(prompt, prompt_mask, num_candidates=1, max_tokens=0)
        old = (cache.prefix, cache.prompt_mask)
        put = functools.partial(jax.tree.map, lambda a, b: a.at[row].set(b.astype(a.dtype), mode="drop"))
        prefix, mask = put(old, (new.prefix, new.prompt_mask))
        return logits, dataclasses.replace(cache, prefix=prefix, prompt_mask=mask)

    def decode_step(
        self, token: Int[Array, "B N"], cache: Cache, length: Int[Array, "B N"] | None = None
    ) -> tuple[Float[Array, "B N V"], Cache]:
        """Appends one token to every completion.

        In a loop, call it on `unstacked`: slicing a layer out of the stack costs more than computing it.

        Candidates that began at different steps share the place that is written: rotated keys know their position, so
        the order in which a ring holds them does not matter, and ``length`` says how many of the last ones are theirs.

        Args:
          token: The token that was just chosen.
          cache: From `prefill` or an earlier step.
          length: How many tokens of its completion each candidate has appended before this one, less than T; None
            where all began with the cache.

        Returns:
          Logits of the next token, and the advanced cache.
        """
        c = self.config
        t = cache.step if length is None else length
        position = jnp.sum(cache.prompt_mask, axis=-1)[:, None] + t
        y = self._embed(token[..., None], position[..., None])
        angles = jax.tree.map(lambda a: a[position][:, :, None, None], cache.angles)
        places = cache.own[0].value.shape[-2]
        place = cache.step % places
        age = ((place - jnp.arange(places)) % places).reshape((1,) * (t.ndim + 1) + (-1,))
        own_mask = age <= t[..., None, None]
        if c.sliding_window is not None:
            own_mask &= age < c.sliding_window
        seen = prefix_window(cache.prompt_mask, position, window=c.sliding_window)
        if t.ndim and c.sliding_window is not None:
            seen = seen[:, :, None]
        filled = []
        for block, prefix, own in zip(self.unstacked().blocks, cache.prefix, cache.own, strict=True):
            query, new = block.project(y, angles)
            own = _put(own, new, place)
            kv = jax.tree.map(lambda a: a.reshape(*token.shape, *a.shape[1:]), own)
            shared = Prefix(kv=prefix, mask=seen)
            attended = attention(query, kv, own_mask, prefix=shared, cached=True, dtype=c.compute_dtype)
            y = block.finish(y, attended)
            filled.append(own)
        state = self.norm(y[:, :, 0])
        logits = dot(state.reshape(-1, state.shape[-1]), self.projection(), c.compute_dtype)
        return logits.reshape(*token.shape, -1), dataclasses.replace(cache, own=tuple(filled), step=cache.step + 1)

    def projection(self) -> Float[Array, "V D"]:
        """The vocabulary projection: the head, or the embedding it is tied to."""
        return self.embedding[...] if self.head is None else self.head[...]

    def cast(self, dtype: Dtype) -> "Transformer":
        """The same model with its matrices in ``dtype`` (for decoding, where reading them is the cost)."""

        def convert(path, leaf):
            return leaf.astype(dtype) if any(getattr(k, "name", None) in _MATRICES for k in path) else leaf

        return jax.tree_util.tree_map_with_path(convert, self)

    def unstacked(self, rows: int | None = None) -> "Transformer":
        """The same model with its blocks as a list, one per layer: the form to decode with.

        Args:
          rows: How many tokens a step decodes at once; where it is given, kernels are stored as so many are multiplied
            fastest.

        Returns:
          A model for `decode_step`; itself if it is one already.
        """
        if isinstance(self.blocks, nnx.List):
            return self
        model, dtype = jax.tree.map(lambda x: x, self), self.config.compute_dtype
        blocks = [_layer_of(self.blocks, jnp.int32(i)) for i in range(self.config.num_layers)]
        for block, name in itertools.product(blocks, (*WIDEN, *NARROW)):
            linear = getattr(block, name)
            if rows is None or linear is None:
                continue
            features_in, features_out = linear.kernel.shape
            if turned_is_faster(rows, features_in, features_out, dtype):
                setattr(block, name, linear.turn())
        model.blocks = nnx.List(blocks)
        return model

    def _prompt_layer(self, block, x, angles, sees=None):
        query, kv = block.project(x, angles)
        return block.finish(x, self._attend_prompt(query, kv, sees)), kv

    def _attend_prompt(self, query, kv, sees=None):
        c = self.config
        fused = None
        if sees is None:
            fused = choose(c.attention, head_dim=c.head_dim, window=c.sliding_window, dtype=c.compute_dtype)
        if fused:
            return fused_attention(query, kv, implementation=fused, dtype=c.compute_dtype)
        mask = causal_mask(query.shape[3], query.shape[3], window=c.sliding_window)
        mask = mask if sees is None else mask[None, None] & sees
        return attention(query, kv, mask, dtype=c.compute_dtype)

    def _embed_prompt(self, prompt):
        position = jnp.arange(prompt.shape[1])[None, None]
        return self._embed(prompt[:, None], position), self._angles(position)

    def _embed(self, token, position):
        """Embeddings ``[B, N, L, D]``."""
        c = self.config
        # Rounded like every operand, so that `cast` changes no number.
        wide = jnp.promote_types(c.compute_dtype, jnp.float32)
        x = entry(self.embedding[...], token).astype(c.compute_dtype).astype(wide)
        learned = self.position_embedding
        return x if learned is None else x + learned[...][position].astype(x.dtype)

    def _angles(self, position):
        """Cosines and sines ``[B or 1, N or 1, 1, L, R]``, the same for all heads; None without rotary positions."""
        c = self.config
        if c.rope_theta is None:
            return None
        cos, sin = rotary(position, dim=c.rotary_dim, theta=c.rope_theta, scaling=c.rope_scaling)
        return cos[:, :, None], sin[:, :, None]


_DOTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(KEPT)
)

_REMAT: dict[str, Any] = {
    "none": lambda layer: layer,
    "full": jax.checkpoint,
    "dots": functools.partial(jax.checkpoint, policy=_DOTS),
}

_MATRICES = frozenset({"kernel", "embedding", "head", "lora_a", "lora_b"})


def _gathered(block: Block) -> Block:
    """The block with its parameters brought together, once for prompts and completions alike."""

    def gather(path, leaf):
        owner, name = [key.name for key in path][:2]
        last = {"kernel": owner in WIDEN, "bias": owner in WIDEN, "lora_b": owner in WIDEN}.get(name, False)
        first = name in ("kernel", "lora_a") and owner in NARROW
        return whole(leaf, split=leaf.ndim - 1 if last else 0 if first else None)

    return jax.tree_util.tree_map_with_path(gather, block)


def _layer_of(blocks: Block, i: Int[Array, ""]) -> Block:
    return jax.tree.map(lambda x: entry(x, i), blocks)


def _put(cache: KeyValue, new: KeyValue, place: Int[Array, ""]) -> KeyValue:
    """The cache of a layer with one more key and value, ``new [B, N, K, 1, d]``, of every candidate."""
    new = _by_feature(jax.tree.map(lambda a: a.astype(cache.key.dtype).reshape(-1, *a.shape[2:]), new))
    put = jax.lax.dynamic_update_slice_in_dim
    return KeyValue(key=put(cache.key, new.key, place, axis=-1), value=put(cache.value, new.value, place, axis=-2))


def _by_feature(kv: KeyValue) -> KeyValue:
    """Keys ``[..., U, d]`` as the cache holds them, ``[..., d, U]``."""
    return KeyValue(key=jnp.swapaxes(kv.key, -1, -2), value=kv.value)


def _at(x: Float[Array, "B S D"], index: Int[Array, " B"]) -> Float[Array, "B D"]:
    return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
