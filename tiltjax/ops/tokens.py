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
import numpy as np
from jax.custom_derivatives import SymbolicZero

from tiltjax.ops.bits import part
from tiltjax.ops.checks import check_at_least, check_positive
from tiltjax.ops.collectives import alike, num_parts
from tiltjax.ops.masked import masked_sum
from tiltjax.ops.matmul import dot, matmul, outer
from tiltjax.types import Array, Bool, Dtype, Float, Int, UInt8

__all__ = ["TokenStats", "eos_mask", "sequence_logp", "token_logp"]

_ROWS = 2048


@chex.dataclass(frozen=True, mappable_dataclass=False)
class TokenStats:
    """What one pass over the vocabulary tells about every position.

    Attributes:
      logp: Log-probability of the given token, nats.
      entropy: ``-sum_v p_v log p_v``, nats.
      self_certainty: ``KL(uniform || p) = logsumexp(z) - mean(z) - log V``, nats.
      ref_logp: Log-probability of the given token under the reference, nats; None without one.
      kl: ``KL(p || q) = sum_v p_v (log p_v - log q_v)`` to the reference ``q``, nats, >= 0 up to rounding; likewise.
    """

    logp: Float[Array, "*batch"]
    entropy: Float[Array, "*batch"]
    self_certainty: Float[Array, "*batch"]
    ref_logp: Float[Array, "*batch"] | None = None
    kl: Float[Array, "*batch"] | None = None


def token_logp(
    hidden: Float[Array, "*batch D"],
    head: Float[Array, "V D"],
    token: Int[Array, "*batch"],
    *,
    reference: tuple[Float[Array, "*batch E"], Float[Array, "V E"]] | None = None,
    support: UInt8[Array, "*batch bytes"] | None = None,
    temperature: float = 1.0,
    chunk: int = 3072,
    rows: int | None = None,
    dtype: Dtype | None = None,
) -> TokenStats:
    r"""Log-probability, entropy, self-certainty and divergence of every position, the vocabulary in chunks.

    .. math:: z = h W^\top / \tau, \quad \log p(y) = z_y - \log\sum_v e^{z_v}, \quad H = -\sum_v p_v \log p_v, \quad
       \mathrm{KL} = \sum_v p_v (\log p_v - \log q_v)

    With ``support`` every law is that of the softmax restricted to some of the tokens, K, as top-k and top-p leave
    them: the sums run over K alone, and K is held fixed in the gradient.

    The gradient recomputes the chunks, so neither pass stores more than ``[rows, chunk]`` logits of each model. It is
    that of both models; what a frozen reference does not need is not computed.

    Args:
      hidden: Last hidden state at the position that predicts ``token``.
      head: Vocabulary projection, one row per token.
      token: The token that follows.
      reference: Last hidden states at the same positions and vocabulary projection of the model that gives ``q``; its
        width may differ.
      support: The tokens of K at each position, one bit a token, the lowest first, ``ceil(V / 8)`` bytes; the same for
        the reference. None means all of them.
      temperature: Softmax temperature of both, > 0.
      chunk: Vocabulary entries per step; V need not be a multiple.
      rows: Most positions per step; their number need not be a multiple. None means 2048 on each device, also where a
        sharded `jax.jit` spreads a block over the devices as it does the batch.
      dtype: Operand type of the matrix products (None: that of ``hidden``); sums are float32 or wider.

    Returns:
      `TokenStats`, every field ``[*batch]``; ``ref_logp`` and ``kl`` are None without a reference. Of a token outside
      of K the log-probability is -inf, and has no gradient.

    Raises:
      ValueError: If ``temperature``, ``chunk`` or ``rows`` is out of range.

    Example:
      >>> stats = token_logp(jnp.zeros((2, 4)), jnp.zeros((8, 4)), jnp.array([0, 5]))
      >>> bool(jnp.allclose(stats.logp, -jnp.log(8.0))), bool(jnp.allclose(stats.entropy, jnp.log(8.0)))
      (True, True)
      >>> reference = jnp.ones((2, 1)), jnp.arange(8.0)[:, None] % 2  # Odd tokens are e times as likely as even ones.
      >>> stats = token_logp(jnp.zeros((2, 4)), jnp.zeros((8, 4)), jnp.array([0, 5]), reference=reference)
      >>> bool(jnp.allclose(stats.kl, jnp.log((1 + jnp.e) / 2) - 0.5)), bool(jnp.allclose(jnp.diff(stats.ref_logp), 1))
      (True, True)
    """
    chex.assert_equal_shape_prefix([hidden, token], token.ndim)
    if reference is not None:
        chex.assert_shape(reference[0], (*token.shape, None))
        chex.assert_equal(head.shape[0], reference[1].shape[0])
    walk = _walk(hidden, token.size, head, temperature, chunk, rows, dtype)
    if support is not None:
        chex.assert_shape(support, (*token.shape, -(-head.shape[0] // 8)))
        (support,) = alike(hidden, support)[1:]
    hidden, head, token, *other = alike(hidden, head, token, *(reference or ()))
    states = tuple(walk.split(x, token.ndim) for x in (hidden, *other[:1]))
    kept = None if support is None else walk.split(support, token.ndim)
    fields = _token_stats(walk, states, (head, *other[1:]), walk.split(token, token.ndim), kept)
    stats = {name: walk.join(value, token.shape) for name, value in fields.items()}
    if support is not None:
        possible = jnp.take_along_axis(support, token[..., None] >> 3, axis=-1)[..., 0] >> (token & 7) & 1 > 0
        stats |= {name: jnp.where(possible, stats[name], -jnp.inf) for name in ("logp", "ref_logp") if name in stats}
    return TokenStats(**stats)


def sequence_logp(token_logp: Float[Array, "*batch T"], mask: Bool[Array, "*batch T"]) -> Float[Array, "*batch"]:
    """Log-probability of the whole completion: the sum over its real tokens, nats.

    Args:
      token_logp: Per token, nats; masked entries may hold anything.
      mask: True on completion tokens up to and including EOS.

    Returns:
      One sum per completion; 0 for an empty one.
    """
    return masked_sum(token_logp, mask)


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


_NEVER = -1e30
"""The logit of a token outside of the support: far below all others, and finite, so that no product of it is NaN."""


def _kept(support, first, rows):
    """Which tokens of a chunk are in the support, ``[positions, chunk]``; None where all are."""
    if support is None:
        return None
    index = first + jnp.arange(rows.shape[0])
    bits = jnp.take(support, index >> 3, axis=1) >> (index & 7).astype(support.dtype)[None]
    return bits & 1 > 0


def _restrict(kept, logits):
    return logits if kept is None else tuple(jnp.where(kept, z, _NEVER) for z in logits)


def _support_size(support, V):
    """How many tokens of the vocabulary are in the support; behind the last of them, bits may be anything."""
    if support is None:
        return V
    last = np.full(support.shape[-1], 255, np.uint8)
    last[-1] >>= -V % 8
    return jnp.maximum(jnp.sum(jax.lax.population_count(support & last[None]), axis=-1, dtype=jnp.int32), 1)


def _chosen(first, rows, token):
    return first + jnp.arange(rows.shape[0])[None] == token[:, None]


def _forward(walk, states, heads, token, support):
    def block(carry, inputs):
        states, token, support = inputs

        def body(carry, first, rows):
            (norm, moment, total, chosen), theirs = carry
            kept = _kept(support, first, rows[0])
            z, *others = _restrict(kept, tuple(map(walk.logits, states, rows)))
            norm, scale, p = _log_norm(norm, z)
            moment = moment * scale + jnp.sum(p * z, -1)
            here = _chosen(first, rows[0], token)
            chosen = chosen + jnp.sum(jnp.where(here, z, 0), -1)
            for ref_z in others:
                ref_norm, ref_chosen, gap = theirs
                gap = gap * scale + jnp.sum(p * (z - ref_z), -1)
                theirs = (_log_norm(ref_norm, ref_z)[0], ref_chosen + jnp.sum(jnp.where(here, ref_z, 0), -1), gap)
            return (norm, moment, total + jnp.sum(z if kept is None else jnp.where(kept, z, 0), -1), chosen), theirs

        zero, size = jnp.zeros_like(states[0][:, 0], walk.wide), _support_size(support, heads[0].shape[0])
        norm = (zero - jnp.inf, zero)
        start = ((norm, zero, zero, zero), (norm, zero, zero) if len(states) > 1 else ())
        ((top, mass), moment, total, chosen), theirs = walk.over_vocabulary(body, start, heads)
        log_norm = top + jnp.log(mass)
        stats = {
            "logp": chosen - log_norm,
            "entropy": log_norm - moment / mass,
            "self_certainty": log_norm - total / size - jnp.log(size).astype(zero.dtype),
        }
        if not theirs:
            return carry, (stats, (log_norm,))
        (ref_top, ref_mass), ref_chosen, gap = theirs
        ref_log_norm = ref_top + jnp.log(ref_mass)
        stats |= {"ref_logp": ref_chosen - ref_log_norm, "kl": gap / mass - log_norm + ref_log_norm}
        return carry, (stats, (log_norm, ref_log_norm))

    return walk.over_positions(block, (), (states, token, support))[1]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_stats(walk, states, heads, token, support):
    return _forward(walk, states, heads, token, support)[0]


def _token_stats_fwd(walk, states, heads, token, support):
    perturbed = tuple(s.perturbed or w.perturbed for s, w in zip(states, heads, strict=True))
    states, heads, token, support = jax.tree.map(lambda x: x.value, (states, heads, token, support))
    stats, log_norms = _forward(walk, states, heads, token, support)
    needed = {name: stats[name] for name in ("entropy", "kl") if name in stats}
    return stats, (states, heads, token, support, log_norms, needed, _Static(perturbed))


def _token_stats_bwd(walk, saved, grad):
    states, heads, token, support, log_norms, stats, perturbed = saved
    grad = {name: g for name, g in grad.items() if not isinstance(g, SymbolicZero)}
    used = (bool(grad.keys() - {"ref_logp"}), not grad.keys().isdisjoint({"ref_logp", "kl"}))
    moved = tuple(a and b for a, b in zip(perturbed.value, used, strict=False))
    read = len(moved) if moved[-1] or "kl" in grad else 1
    unread = (None,) * (len(moved) - read)
    moved, states, heads, log_norms = moved[:read], states[:read], heads[:read], log_norms[:read]

    def zeros(arrays):
        return tuple(jnp.zeros_like(x, walk.wide) if move else None for x, move in zip(arrays, moved, strict=True))

    def like(arrays, grads):
        return tuple(None if g is None else g.astype(x.dtype) for x, g in zip(arrays, grads, strict=True))

    def block(grad_heads, inputs):
        states, token, support, log_norms, stats, grad = inputs
        size = _support_size(support, heads[0].shape[0])

        def body(grads, first, rows):
            kept = _kept(support, first, rows[0])
            logits = _restrict(kept, tuple(map(walk.logits, states, rows)))
            logps = [z - norm[:, None] for z, norm in zip(logits, log_norms, strict=True)]
            uniform = 1 / size if kept is None else jnp.where(kept, 1 / size[:, None], 0)
            dz = _logit_gradients(grad, stats, uniform, _chosen(first, rows[0], token), *logps)
            return tuple(
                walk.pull(g, first, d, state, row) if move else g
                for g, d, state, row, move in zip(grads, dz, states, rows, moved, strict=True)
            )

        grads = walk.over_vocabulary(body, tuple(zip(zeros(states), grad_heads, strict=True)), heads)
        grad_states, grad_heads = zip(*grads, strict=True)
        return grad_heads, like(states, grad_states)

    grad_heads, grad_states = walk.over_positions(block, zeros(heads), (states, token, support, log_norms, stats, grad))
    return grad_states + unread, like(heads, grad_heads) + unread, None, None


_token_stats.defvjp(_token_stats_fwd, _token_stats_bwd, symbolic_zeros=True)


def _logit_gradients(grad, stats, uniform, chosen, logp, *others):
    """What the gradients of the fields mean for a block of the policy's logits, and of the reference's if read."""
    here, p, dz = jnp.where(chosen, 1.0, 0.0), jnp.exp(logp), jnp.zeros_like(logp)
    if "logp" in grad:
        dz += grad["logp"][:, None] * (here - p)
    if "entropy" in grad:
        dz -= grad["entropy"][:, None] * p * (logp + stats["entropy"][:, None])
    if "self_certainty" in grad:
        dz += grad["self_certainty"][:, None] * (p - uniform)
    if not others:
        return (dz,)
    (logq,), ref_dz = others, jnp.zeros_like(logp)
    q = jnp.exp(logq)
    if "ref_logp" in grad:
        ref_dz += grad["ref_logp"][:, None] * (here - q)
    if "kl" in grad:
        dz += grad["kl"][:, None] * p * (logp - logq - stats["kl"][:, None])
        ref_dz += grad["kl"][:, None] * (q - p)
    return dz, ref_dz


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Static:
    """A Python value that a custom gradient saves."""

    value: Any
