"""Autoregressive decoding: N candidates of every prompt from a model that enters as a callable."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_fraction
from tiltjax.samplers.logits import categorical_and_logp, greedy, processed, support_of
from tiltjax.types import Array, Bool, Float, Int, Key, UInt8

__all__ = ["Decoded", "Drawn", "blank", "candidate_keys", "decode", "decoded", "draw"]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Decoded:
    """N completions of every prompt, with the log-probabilities of what was drawn.

    Attributes:
      completion: Tokens, ``[B, N, T]``; padding after EOS.
      completion_mask: True up to and including EOS, ``[B, N, T]``.
      token_logp: Log-probability under the model at temperature 1, nats, ``[B, N, T]``; 0 on padding.
      sampled_token_logp: Log-probability under the distribution that was drawn from (temperature, top-k, top-p
        applied), nats, ``[B, N, T]``; 0 on padding.
      steps: Decode steps after the prompts, one entry per independent loop; None if they were not counted.
      support: The tokens that top-k and top-p left at every step, `tiltjax.samplers.logits.support_of`,
        ``[B, N, T, ceil(V / 8)]``; None where nothing was filtered.
    """

    completion: Int[Array, "..."]
    completion_mask: Bool[Array, "..."]
    token_logp: Float[Array, "..."]
    sampled_token_logp: Float[Array, "..."]
    steps: Int[Array, "..."] | None = None
    support: UInt8[Array, "..."] | None = None


Drawn = tuple[Array, ...]
"""A token, its log-probability at temperature 1, and that under the distribution that it was drawn from; under a filter
also the tokens that it left, ``[*batch, ceil(V / 8)]``."""

FILLS = (0.0, 0.0, 255)
"""What stands behind the end of a completion for all of `Drawn` but the token."""


def candidate_keys(key: Key[Array, "*given"], B: int, N: int) -> Key[Array, "B N"]:
    """One key per candidate, that of prompt i and candidate j alone: ``fold_in(fold_in(key, i), j)``.

    Args:
      key: One key for all prompts; or ``[B]``, what ``fold_in(key, i)`` would be for each; or ``[B, N]``, the result,
        where these are some of more candidates and have their keys already.
      B: Number of prompts.
      N: Candidates of each.

    Returns:
      Typed keys ``[B, N]``; the token at step t is drawn with ``fold_in(..., t)``.
    """
    if key.ndim == 2:
        chex.assert_shape(key, (B, N))
        return key
    each = jax.vmap(jax.random.fold_in, (None, 0))
    prompts = key if key.ndim else each(key, jnp.arange(B))
    return jax.vmap(each, (0, None))(prompts, jnp.arange(N))


def draw(
    key: Key[Array, "*keys"],
    t: Int[Array, "*steps"],
    logits: Float[Array, "*batch V"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Drawn:
    """Draws the token at step t of every candidate, from its own key.

    Args:
      key: One per candidate, `candidate_keys`.
      t: How many tokens each candidate has, or one number for all.
      logits: Of the next token.
      temperature: Softmax temperature; 0 is greedy.
      top_k: Keep the k most probable tokens.
      top_p: Keep the smallest set of tokens of this probability.

    Returns:
      `Drawn`: token, log-probability and log-probability as drawn, each ``[*batch]``, and the support under a filter.
      A greedy token has log-probability 0 as drawn, and no support.
    """
    if temperature == 0:
        token = greedy(logits)
        return token, _logp(logits, token), jnp.zeros(token.shape, logits.dtype)
    shaped = processed(logits, temperature=temperature, k=top_k, p=top_p)
    token, sampled = categorical_and_logp(jnp.vectorize(jax.random.fold_in)(key, t), shaped)
    if top_k is not None or top_p is not None:
        return token, _logp(logits, token), sampled, support_of(shaped)
    return token, sampled if temperature == 1 else _logp(logits, token), sampled


def blank(drawn: Sequence[Any], shape: tuple[int, ...], pad_id: int) -> tuple[Array, ...]:
    """Where completions are written: buffers like the fields of a `Drawn`, filled as behind the end of a completion.

    Args:
      drawn: `Drawn` of some ``[b, n]``, or its shapes; of it, the shapes behind them and types are read.
      shape: ``(B, N, T)``.
      pad_id: Of the token.

    Returns:
      One array per field, ``[B, N, T, ...]``.
    """
    return tuple(
        jnp.full((*shape, *x.shape[2:]), fill, x.dtype) for x, fill in zip(drawn, (pad_id, *FILLS), strict=False)
    )


def decode(
    key: Key[Array, "*given"],
    logits: Float[Array, "B V"],
    cache: Any,
    step: Callable[[Int[Array, "B N"], Any], tuple[Float[Array, "B N V"], Any]],
    *,
    num_candidates: int,
    max_tokens: int,
    eos_id: int | tuple[int, ...],
    pad_id: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Decoded:
    r"""Draws N completions per prompt, one token at a time, until every one has met EOS.

    .. math:: y_t \sim \mathrm{filter}(p(\cdot \mid x, y_{<t})^{1/\tau})

    The prompt's logits are given once and shared by its N candidates. The loop stops at the last live candidate.

    Args:
      key: Typed key, or one per prompt ``[B]`` or candidate ``[B, N]``: see `candidate_keys`. A token depends on the
        key of its prompt, its candidate and its step alone, whatever else is decoded beside it.
      logits: Of the first completion token, from the prefill.
      cache: Whatever ``step`` needs.
      step: ``(token, cache) -> (logits, cache)`` of the next token; `tiltjax.models.Transformer.decode_step` is one.
      num_candidates: N.
      max_tokens: T, the longest completion.
      eos_id: Token (or tokens) that end a completion; the EOS itself belongs to it.
      pad_id: Token that fills the rest.
      temperature: Softmax temperature; 0 is greedy.
      top_k: Keep the k most probable tokens.
      top_p: Keep the smallest set of tokens of this probability.

    Returns:
      `Decoded`.

    Raises:
      ValueError: If an option is out of range.
    """
    check_at_least("num_candidates", num_candidates, 1)
    check_at_least("max_tokens", max_tokens, 1)
    check_at_least("temperature", temperature, 0)
    check_at_least("top_k", top_k, 1)
    check_fraction("top_p", top_p)
    B, N, T = logits.shape[0], num_candidates, max_tokens
    stops = jnp.asarray(eos_id).reshape(-1)

    keys = candidate_keys(key, B, N)
    pick = functools.partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)

    def put(out, t, drawn, done):
        def at_step(buffer, new, fill):
            over = done.reshape(*done.shape, *[1] * (new.ndim - done.ndim))
            return buffer.at[:, :, t].set(jnp.where(over, jnp.asarray(fill, new.dtype), new))

        *fields, mask = out
        fields = map(at_step, fields, drawn, (pad_id, *FILLS))
        return *fields, mask.at[:, :, t].set(~done)

    def live(carry):
        t, done, *_ = carry
        return (t < T) & ~jnp.all(done)

    def advance(carry):
        t, done, token, cache, out = carry
        logits, cache = step(token, cache)
        drawn = pick(keys, t, logits)
        out = put(out, t, drawn, done)
        return t + 1, done | jnp.isin(drawn[0], stops), drawn[0], cache, out

    drawn = pick(keys, jnp.int32(0), jnp.broadcast_to(logits[:, None], (B, N, logits.shape[-1])))
    out = (*blank(drawn, (B, N, T), pad_id), jnp.zeros((B, N, T), bool))
    out = put(out, 0, drawn, jnp.zeros((B, N), bool))
    carry = (jnp.int32(1), jnp.isin(drawn[0], stops), drawn[0], cache, out)
    t, *_, (*fields, mask) = jax.lax.while_loop(live, advance, carry)
    return decoded(fields, mask, t - 1)


def decoded(fields: Sequence[Array], mask: Bool[Array, "B N T"], steps: Int[Array, ""]) -> Decoded:
    """`Decoded` from filled buffers of `blank`."""
    names = ("completion", "token_logp", "sampled_token_logp", "support")
    return Decoded(completion_mask=mask, steps=steps, **dict(zip(names, fields, strict=False)))


def _logp(logits: Array, token: Array) -> Array:
    return jnp.take_along_axis(logits, token[..., None], axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
