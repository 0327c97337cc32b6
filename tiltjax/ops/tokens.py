"""Token log-probabilities and divergences from hidden states, without ever holding ``[..., T, V]``.

The vocabulary projection is walked in blocks of positions and chunks of vocabulary, forward and backward; the peak is
one block of one chunk of logits, whatever the number of positions and the size of the vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp

from tiltjax.ops.bits import part
from tiltjax.ops.checks import check_at_least, check_positive
from tiltjax.ops.collectives import alike, num_parts
from tiltjax.ops.masked import as_float
from tiltjax.ops.matmul import dot, matmul, outer
from tiltjax.types import Array, Bool, Dtype, Float, Int

__all__ = ["TokenStats", "chunked_kl", "eos_mask", "sequence_logp", "token_logp"]

_ROWS = 2048


@chex.dataclass(frozen=True, mappable_dataclass=False)
class TokenStats:
    """What one pass over the vocabulary tells about every position.

    Attributes:
      logp: Log-probability of the given token, nats.
      entropy: ``-sum_v p_v log p_v``, nats.
      self_certainty: ``KL(uniform || p) = logsumexp(z) - mean(z) - log V``, nats.
    """

    logp: Float[Array, "*batch"]
    entropy: Float[Array, "*batch"]
    self_certainty: Float[Array, "*batch"]


def token_logp(
    hidden: Float[Array, "*batch D"],
    head: Float[Array, "V D"],
    token: Int[Array, "*batch"],
    *,
    temperature: float = 1.0,
    chunk: int = 3072,
    rows: int | None = None,
    dtype: Dtype | None = None,
) -> TokenStats:
    r"""Log-probability, entropy and self-certainty of every position, one chunk of the vocabulary at a time.

    .. math:: z = h W^\top / \tau, \quad \log p(y) = z_y - \log\sum_v e^{z_v}, \quad H = -\sum_v p_v \log p_v

    The gradient recomputes the chunks, so neither pass stores more than ``[rows, chunk]`` logits.

    Args:
      hidden: Last hidden state at the position that predicts ``token``.
      head: Vocabulary projection, one row per token.
      token: The token that follows.
      temperature: Softmax temperature, > 0.
      chunk: Vocabulary entries per step; V need not be a multiple.
      rows: Most positions per step; their number need not be a multiple. None means 2048 on each device, also where a
        sharded `jax.jit` spreads a block over the devices as it does the batch.
      dtype: Operand type of the matrix products (None: that of ``hidden``); sums are float32 or wider.

    Returns:
      `TokenStats`, every field ``[*batch]``.

    Raises:
      ValueError: If ``temperature``, ``chunk`` or ``rows`` is out of range.

    Example:
      >>> stats = token_logp(jnp.zeros((2, 4)), jnp.zeros((8, 4)), jnp.array([0, 5]))
      >>> bool(jnp.allclose(stats.logp, -jnp.log(8.0))), bool(jnp.allclose(stats.entropy, jnp.log(8.0)))
      (True, True)
    """
    chex.assert_equal_shape_prefix([hidden, token], token.ndim)
    walk = _walk(hidden, token.size, head, temperature, chunk, rows, dtype)
    hidden, head, token = alike(hidden, head, token)
    fields = _token_stats(walk, walk.split(hidden, token.ndim), head, walk.split(token, token.ndim))
    return TokenStats(**{name: walk.join(value, token.shape) for name, value in fields.items()})


def chunked_kl(
    hidden: Float[Array, "*batch D"],
    head: Float[Array, "V D"],
    ref_hidden: Float[Array, "*batch E"],
    ref_head: Float[Array, "V E"],
    *,
    temperature: float = 1.0,
    chunk: int = 3072,
    rows: int | None = None,
    dtype: Dtype | None = None,
) -> Float[Array, "*batch"]:
    r"""Divergence of the policy's next-token distribution from the reference's, over the whole vocabulary.

    .. math:: \mathrm{KL}(p \| q) = \sum_v p_v (\log p_v - \log q_v), \qquad
       \frac{\partial}{\partial z_v} = p_v (\log p_v - \log q_v - \mathrm{KL}), \qquad
       \frac{\partial}{\partial z^q_v} = q_v - p_v

    Walked as in `token_logp`, both models together, so no ``[*batch, V]`` array exists in either pass. It is
    differentiable in both pairs; what a frozen reference does not need is not computed.

    Args:
      hidden: Last hidden states of the policy.
      head: Its vocabulary projection, one row per token.
      ref_hidden: Last hidden states of the reference at the same positions; its width may differ.
      ref_head: Its vocabulary projection, of the same V tokens.
      temperature: Softmax temperature of both, > 0.
      chunk: Vocabulary entries per step; V need not be a multiple.
      rows: Most positions per step, as in `token_logp`.
      dtype: Operand type of the matrix products (None: that of ``hidden``); sums are float32 or wider.

    Returns:
      Nats per position, >= 0 up to rounding.

    Raises:
      ValueError: If ``temperature``, ``chunk`` or ``rows`` is out of range.

    Example:
      >>> hidden, head = jnp.ones((3, 4)), jnp.arange(32.0).reshape(8, 4) / 9
      >>> float(chunked_kl(hidden, head, hidden, head)[0]), bool(chunked_kl(hidden, head, hidden, -head)[0] > 1)
      (0.0, True)
    """
    shape = hidden.shape[:-1]
    chex.assert_shape(ref_hidden, (*shape, None))
    chex.assert_equal(head.shape[0], ref_head.shape[0])
    walk = _walk(hidden, math.prod(shape), head, temperature, chunk, rows, dtype)
    hidden, head, ref_hidden, ref_head = alike(hidden, head, ref_hidden, ref_head)
    states = (walk.split(hidden, len(shape)), walk.split(ref_hidden, len(shape)))
    return walk.join(_kl(walk, states, (head, ref_head)), shape)


def sequence_logp(token_logp: Float[Array, "*batch T"], mask: Bool[Array, "*batch T"]) -> Float[Array, "*batch"]:
    """Log-probability of the whole completion: the sum over its real tokens, nats.

    Args:
      token_logp: Per token, nats; masked entries may hold anything.
      mask: True on completion tokens up to and including EOS.

    Returns:
      One sum per completion; 0 for an empty one.
    """
    return jnp.sum(jnp.where(mask, as_float(token_logp), 0), axis=-1)


def eos_mask(token: Int[Array, "*batch T"], eos_id: int | tuple[int, ...]) -> Bool[Array, "*batch T"]:
    """True up to and including the first EOS of every row.

    Example:
      >>> eos_mask(jnp.array([5, 2, 7, 2]), 2).tolist()
      [True, True, False, False]
    """
    is_eos = jnp.isin(token, jnp.asarray(eos_id))
    return jnp.cumsum(is_eos, axis=-1) - is_eos == 0


@dataclasses.dataclass(frozen=True)
class _Walk:
    """How to go through positions and vocabulary; static.

    Positions stand as ``[size, blocks, ...]``, a block being every ``blocks``-th of them: where the batch is split over
    devices, each block is too.
    """

    blocks: int
    size: int
    chunk: int
    temperature: float
    dtype: jnp.dtype

    @property
    def wide(self):
        return jnp.promote_types(self.dtype, jnp.float32)

    def split(self, x, leading):
        """``[*batch, ...] -> [size, blocks, ...]``."""
        x = x.reshape(-1, *x.shape[leading:])
        missing = self.size * self.blocks - x.shape[0]
        if missing:
            x = jnp.pad(x, [(0, missing), *[(0, 0)] * (x.ndim - 1)])
        return x.reshape(self.size, self.blocks, *x.shape[1:])

    def join(self, x, shape):
        """``[size, blocks] -> [*batch]``."""
        return x.reshape(-1)[: math.prod(shape)].reshape(shape)

    def over_positions(self, body, carry, inputs):
        """Runs ``body(carry, block) -> (carry, out)`` on every block of ``inputs``; ``out`` is laid out as they are."""
        if self.blocks == 1:
            carry, out = body(carry, jax.tree.map(lambda x: x[:, 0], inputs))
            return carry, jax.tree.map(lambda x: x[:, None], out)
        shapes = jax.eval_shape(body, carry, jax.tree.map(lambda x: x[:, 0], inputs))[1]
        # Like each of them, where devices differ too: under `jax.shard_map` a loop may change no array in that.
        whole = jax.tree.map(lambda s: jnp.zeros_like(s, shape=(s.shape[0], self.blocks, *s.shape[1:])), shapes)

        def step(i, both):
            carry, whole = both
            block = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False), inputs)
            carry, out = body(carry, block)
            # Written where it belongs, so that no second copy of the whole is ever made.
            return carry, jax.tree.map(lambda w, x: jax.lax.dynamic_update_index_in_dim(w, x, i, 1), whole, out)

        return jax.lax.fori_loop(0, self.blocks, step, (carry, whole))

    def over_vocabulary(self, body, carry, heads):
        """Runs ``body(carry, first, rows) -> carry`` over the rows of ``heads``."""
        size = jax.tree.leaves(heads)[0].shape[0]
        full, tail = divmod(size, self.chunk)

        def cut(w, first):
            return jax.lax.dynamic_slice_in_dim(w, first, self.chunk)

        def step(i, carry):
            first = i * self.chunk
            rows = jax.tree.map(lambda w: part(cut, w, first), heads)
            return body(carry, first, rows)

        carry = jax.lax.fori_loop(0, full, step, carry)
        return body(carry, full * self.chunk, jax.tree.map(lambda w: w[full * self.chunk :], heads)) if tail else carry

    def logits(self, hidden, rows):
        return dot(hidden, rows, self.dtype) / self.temperature

    def pull(self, grads, first, dz, hidden, rows):
        """Adds what ``dz``, the gradient of one block of logits, means for the hidden states and the head."""
        grad_hidden, grad_head = grads
        dz = dz / self.temperature
        old = jax.lax.dynamic_slice_in_dim(grad_head, first, rows.shape[0])
        new = old + outer(dz.astype(self.dtype), hidden.astype(self.dtype))
        return grad_hidden + matmul(dz, rows, self.dtype), jax.lax.dynamic_update_slice_in_dim(grad_head, new, first, 0)


def _walk(hidden, positions, head, temperature, chunk, rows, dtype):
    check_positive("temperature", temperature)
    check_at_least("chunk", chunk, 1)
    check_at_least("rows", rows, 1)
    parts = num_parts(hidden)
    least = max(1, -(-positions // (_ROWS * parts if rows is None else rows)))
    # A number of blocks that all devices share evenly, or that needs no padding, if there is one near.
    near = range(least, 2 * least)
    blocks = next((n for each in (parts, 1) for n in near if positions % (n * each) == 0), least)
    return _Walk(
        blocks=blocks,
        size=-(-positions // blocks),
        chunk=min(chunk, head.shape[0]),
        temperature=temperature,
        dtype=jnp.dtype(dtype or hidden.dtype),
    )


def _log_norm(state, z):
    """The running (largest logit, mass of ``exp(z - largest)``), the factor that rescales old sums, the new terms."""
    top, mass = state
    new_top = jnp.maximum(top, jnp.max(z, axis=-1))
    p, scale = jnp.exp(z - new_top[:, None]), jnp.exp(top - new_top)
    return (new_top, mass * scale + jnp.sum(p, -1)), scale, p


def _chosen(first, rows, token):
    return first + jnp.arange(rows.shape[0])[None] == token[:, None]


def _forward(walk, hidden, head, token):
    def block(carry, inputs):
        hidden, token = inputs

        def body(carry, first, rows):
            norm, moment, total, chosen = carry
            z = walk.logits(hidden, rows)
            norm, scale, p = _log_norm(norm, z)
            moment = moment * scale + jnp.sum(p * z, -1)
            chosen = chosen + jnp.sum(jnp.where(_chosen(first, rows, token), z, 0), -1)
            return norm, moment, total + jnp.sum(z, -1), chosen

        zero = jnp.zeros_like(hidden[:, 0], walk.wide)
        start = ((zero - jnp.inf, zero), zero, zero, zero)
        (top, mass), moment, total, chosen = walk.over_vocabulary(body, start, head)
        log_norm, size = top + jnp.log(mass), head.shape[0]
        stats = {
            "logp": chosen - log_norm,
            "entropy": log_norm - moment / mass,
            "self_certainty": log_norm - total / size - jnp.log(size).astype(zero.dtype),
        }
        return carry, (stats, log_norm)

    return walk.over_positions(block, (), (hidden, token))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_stats(walk, hidden, head, token):
    return _forward(walk, hidden, head, token)[0]


def _token_stats_fwd(walk, hidden, head, token):
    stats, log_norm = _forward(walk, hidden, head, token)
    return stats, (hidden, head, token, log_norm, stats["entropy"])


def _token_stats_bwd(walk, saved, grad):
    hidden, head, token, log_norm, entropy = saved

    def block(grad_head, inputs):
        hidden, token, log_norm, entropy, grad = inputs

        def body(grads, first, rows):
            logq = walk.logits(hidden, rows) - log_norm[:, None]
            p = jnp.exp(logq)
            dz = grad["logp"][:, None] * (jnp.where(_chosen(first, rows, token), 1.0, 0.0) - p)
            dz -= grad["entropy"][:, None] * p * (logq + entropy[:, None])
            dz += grad["self_certainty"][:, None] * (p - 1 / head.shape[0])
            return walk.pull(grads, first, dz, hidden, rows)

        grads = (jnp.zeros_like(hidden, walk.wide), grad_head)
        grad_hidden, grad_head = walk.over_vocabulary(body, grads, head)
        return grad_head, grad_hidden.astype(hidden.dtype)

    zeros = jnp.zeros_like(head, walk.wide)
    grad_head, grad_hidden = walk.over_positions(block, zeros, (hidden, token, log_norm, entropy, grad))
    return grad_hidden, grad_head.astype(head.dtype), None


_token_stats.defvjp(_token_stats_fwd, _token_stats_bwd)


def _kl_forward(walk, states, heads):
    def block(carry, states):
        def body(carry, first, rows):
            norm, ref_norm, moment = carry
            z, ref_z = map(walk.logits, states, rows)
            norm, scale, p = _log_norm(norm, z)
            ref_norm = _log_norm(ref_norm, ref_z)[0]
            return norm, ref_norm, moment * scale + jnp.sum(p * (z - ref_z), -1)

        zero = jnp.zeros_like(states[0][:, 0], walk.wide)
        start = ((zero - jnp.inf, zero), (zero - jnp.inf, zero), zero)
        (top, mass), (ref_top, ref_mass), moment = walk.over_vocabulary(body, start, heads)
        log_norm, ref_log_norm = top + jnp.log(mass), ref_top + jnp.log(ref_mass)
        return carry, (moment / mass - log_norm + ref_log_norm, log_norm, ref_log_norm)

    return walk.over_positions(block, (), states)[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _kl(walk, states, heads):
    return _kl_forward(walk, states, heads)[0]


def _kl_fwd(walk, states, heads):
    values = _kl_forward(walk, *jax.tree.map(lambda x: x.value, (states, heads)))
    perturbed = tuple(s.perturbed or w.perturbed for s, w in zip(states, heads, strict=True))
    return values[0], (*jax.tree.map(lambda x: x.value, (states, heads)), values, _Static(perturbed))


def _kl_bwd(walk, saved, grad):
    states, heads, values, moved = saved

    def block(grad_heads, inputs):
        states, (value, *norms), grad = inputs

        def body(grads, first, rows):
            logp, logq = (
                walk.logits(state, row) - norm[:, None] for state, row, norm in zip(states, rows, norms, strict=True)
            )
            p, q = jnp.exp(logp), jnp.exp(logq)
            dz = (p * (logp - logq - value[:, None]), q - p)
            return tuple(
                walk.pull(g, first, grad[:, None] * d, state, row) if move else g
                for g, d, state, row, move in zip(grads, dz, states, rows, moved.value, strict=True)
            )

        zeros = tuple(jnp.zeros_like(s, walk.wide) for s in states)
        grads = walk.over_vocabulary(body, tuple(zip(zeros, grad_heads, strict=True)), heads)
        grad_states, grad_heads = zip(*grads, strict=True)
        return grad_heads, tuple(g.astype(s.dtype) for g, s in zip(grad_states, states, strict=True))

    zeros = tuple(jnp.zeros_like(w, walk.wide) for w in heads)
    grad_heads, grad_states = walk.over_positions(block, zeros, (states, values, grad))
    return grad_states, tuple(g.astype(w.dtype) for g, w in zip(grad_heads, heads, strict=True))


_kl.defvjp(_kl_fwd, _kl_bwd, symbolic_zeros=True)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A Python value that a custom gradient saves."""

    value: Any
