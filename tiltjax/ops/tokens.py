"""Token log-probabilities from hidden states, without ever holding ``[..., T, V]``.

The vocabulary projection is walked in chunks, forward and backward; the peak is one chunk of logits.
"""

import functools

import chex
import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_positive
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Bool, Dtype, Float, Int

__all__ = ["TokenStats", "dot", "eos_mask", "sequence_logp", "token_logp"]


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


def dot(x: Float[Array, "M D"], w: Float[Array, "C D"], dtype: Dtype) -> Float[Array, "M C"]:
    """``x w^T`` with operands in ``dtype`` and a float32 result: the fast path of every matrix unit."""
    dimensions = (((1,), (1,)), ((), ()))
    wide = jnp.promote_types(dtype, jnp.float32)
    return jax.lax.dot_general(x.astype(dtype), w.astype(dtype), dimensions, preferred_element_type=wide)


def token_logp(
    hidden: Float[Array, "*batch D"],
    head: Float[Array, "V D"],
    token: Int[Array, "*batch"],
    *,
    temperature: float = 1.0,
    chunk: int = 8192,
    dtype: Dtype | None = None,
) -> TokenStats:
    r"""Log-probability, entropy and self-certainty of every position, one chunk of the vocabulary at a time.

    .. math:: z = h W^\top / \tau, \quad \log p(y) = z_y - \log\sum_v e^{z_v}, \quad H = -\sum_v p_v \log p_v

    The gradient recomputes the chunks, so neither pass stores more than ``[*batch, chunk]`` logits.

    Args:
      hidden: Last hidden state at the position that predicts ``token``.
      head: Vocabulary projection, one row per token.
      token: The token that follows.
      temperature: Softmax temperature, > 0.
      chunk: Vocabulary entries per step; V need not be a multiple.
      dtype: Operand type of the matrix products (None: that of ``hidden``); sums are float32 or wider.

    Returns:
      `TokenStats`, every field ``[*batch]``.

    Raises:
      ValueError: If ``temperature`` or ``chunk`` is out of range.

    Example:
      >>> stats = token_logp(jnp.zeros((2, 4)), jnp.zeros((8, 4)), jnp.array([0, 5]))
      >>> bool(jnp.allclose(stats.logp, -jnp.log(8.0))), bool(jnp.allclose(stats.entropy, jnp.log(8.0)))
      (True, True)
    """
    check_positive("temperature", temperature)
    check_at_least("chunk", chunk, 1)
    chex.assert_equal_shape_prefix([hidden, token], token.ndim)
    flat = hidden.reshape(-1, hidden.shape[-1])
    walk = _Walk(chunk=min(chunk, head.shape[0]), temperature=temperature, dtype=jnp.dtype(dtype or hidden.dtype))
    fields = _token_stats(walk, flat, head, token.reshape(-1))
    return TokenStats(**{name: value.reshape(token.shape) for name, value in fields.items()})


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


@chex.dataclass(frozen=True, mappable_dataclass=False)
class _Walk:
    """How to go through the vocabulary; static."""

    chunk: int
    temperature: float
    dtype: jnp.dtype

    def __hash__(self):
        return hash((self.chunk, self.temperature, self.dtype))

    def over(self, body, carry, head):
        """Scans ``body(carry, first, rows) -> (carry, out)`` over the rows of ``head``; ``out``: one row per token."""
        full, tail = divmod(head.shape[0], self.chunk)

        def step(carry, i):
            rows = jax.lax.dynamic_slice_in_dim(head, i * self.chunk, self.chunk)
            return body(carry, i * self.chunk, rows)

        carry, out = jax.lax.scan(step, carry, jnp.arange(full))
        out = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), out)
        if tail:
            carry, last = body(carry, full * self.chunk, head[full * self.chunk :])
            out = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), out, last)
        return carry, out

    def logits(self, hidden, rows):
        return dot(hidden, rows, self.dtype) / self.temperature


def _forward(walk, hidden, head, token):
    def body(carry, first, rows):
        top, mass, moment, total, chosen = carry
        z = walk.logits(hidden, rows)
        new_top = jnp.maximum(top, jnp.max(z, axis=-1))
        p, scale = jnp.exp(z - new_top[:, None]), jnp.exp(top - new_top)
        mass, moment = mass * scale + jnp.sum(p, -1), moment * scale + jnp.sum(p * z, -1)
        mine = first + jnp.arange(rows.shape[0])[None] == token[:, None]
        return (new_top, mass, moment, total + jnp.sum(z, -1), chosen + jnp.sum(jnp.where(mine, z, 0), -1)), None

    zero = jnp.zeros_like(hidden[:, 0], jnp.promote_types(walk.dtype, jnp.float32))
    (top, mass, moment, total, chosen), _ = walk.over(body, (zero - jnp.inf, zero, zero, zero, zero), head)
    log_norm = top + jnp.log(mass)
    size = head.shape[0]
    stats = {
        "logp": chosen - log_norm,
        "entropy": log_norm - moment / mass,
        "self_certainty": log_norm - total / size - jnp.log(size).astype(zero.dtype),
    }
    return stats, log_norm


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_stats(walk, hidden, head, token):
    return _forward(walk, hidden, head, token)[0]


def _token_stats_fwd(walk, hidden, head, token):
    stats, log_norm = _forward(walk, hidden, head, token)
    return stats, (hidden, head, token, log_norm, stats["entropy"])


def _token_stats_bwd(walk, saved, grad):
    hidden, head, token, log_norm, entropy = saved
    size = head.shape[0]

    def body(grad_hidden, first, rows):
        logq = walk.logits(hidden, rows) - log_norm[:, None]
        p = jnp.exp(logq)
        mine = first + jnp.arange(rows.shape[0])[None] == token[:, None]
        dz = grad["logp"][:, None] * (jnp.where(mine, 1.0, 0.0) - p)
        dz -= grad["entropy"][:, None] * p * (logq + entropy[:, None])
        dz += grad["self_certainty"][:, None] * (p - 1 / size)
        dz /= walk.temperature
        grad_rows = dot(dz.T, hidden.T, walk.dtype)
        return grad_hidden + dot(dz, rows.T, walk.dtype), grad_rows

    wide = jnp.promote_types(walk.dtype, jnp.float32)
    grad_hidden, grad_head = walk.over(body, jnp.zeros(hidden.shape, wide), head)
    return grad_hidden.astype(hidden.dtype), grad_head.astype(head.dtype), None


_token_stats.defvjp(_token_stats_fwd, _token_stats_bwd)
