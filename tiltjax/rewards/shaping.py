"""Penalties on arrays, to be added to a reward: for length, for a broken format, for repetition.

All are 0 at best and without gradient: lengths, formats and tokens have none. The same ideas on text, as rewards of
their own, are in `tiltjax.rewards.text`.
"""

import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_boolean, check_per_row
from tiltjax.ops.masked import as_float, check_alike
from tiltjax.types import Array, Bool, Float, Int, Numeric

__all__ = ["format_penalty", "length_penalty", "overlong_penalty", "repetition_penalty"]


def overlong_penalty(
    length: Int[Array, "*batch"], *, max_length: int = 20480, cache: int = 4096
) -> Float[Array, "*batch"]:
    r"""DAPO's soft penalty for completions that come close to the generation budget.

    .. math:: r = \begin{cases} 0 & L \le L_{\max} - C \\ (L_{\max} - C - L) / C & L_{\max} - C < L \le L_{\max} \\
              -1 & L > L_{\max} \end{cases}

    Args:
      length: Tokens of every completion, EOS included.
      max_length: Generation budget, tokens, at least 1: a completion cut off there gets -1.
      cache: Over how many tokens before the budget the penalty grows, 1 to ``max_length``.

    Returns:
      One penalty per completion, float32, in [-1, 0].

    Raises:
      ValueError: If ``max_length < 1``, or ``cache`` is outside 1 to ``max_length``.

    Example:
      >>> overlong_penalty(jnp.array([10, 60, 70, 90, 100, 120]), max_length=100, cache=40).tolist()
      [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]

    References:
      Yu et al., 2025, arXiv:2503.14476, section 3.4.
    """
    check_at_least("max_length", max_length, 1)
    if not 1 <= cache <= max_length:
        raise ValueError(f"cache must lie in 1 to max_length = {max_length}, got {cache!r}")
    return jnp.clip(max_length - cache - _signed(length), -cache, 0) / cache


def length_penalty(
    length: Int[Array, "*batch"], *, coefficient: Numeric, target: int | Int[Array, "*batch"] = 0
) -> Float[Array, "*batch"]:
    r"""A price per token away from a target length; with the target 0, a price per token.

    .. math:: r = -c \, |L - L^*|

    A price on all tokens makes a wrong short completion as good as a right long one where ``c`` is too large: keep
    ``c`` times the spread of lengths below the spread of the reward it is added to.

    Args:
      length: Tokens of every completion, EOS included.
      coefficient: Price of a token, reward units, at least 0.
      target: Wanted length, tokens; a number, or one per completion.

    Returns:
      One penalty per completion, float32, not positive.

    Raises:
      ValueError: If ``coefficient`` is a Python number below 0.

    Example:
      >>> length_penalty(jnp.array([0, 4, 6]), coefficient=0.5, target=4).tolist()
      [-2.0, 0.0, -1.0]

    References:
      Aggarwal, Welleck, 2025, arXiv:2503.04697 (a target length given in the prompt, ``coefficient=0.0003``).
    """
    check_at_least("coefficient", coefficient, 0)
    check_per_row("target", target, jnp.shape(length))
    return jax.lax.stop_gradient(-coefficient * jnp.abs(_signed(length) - _signed(target)) + 0.0)


def format_penalty(valid: Bool[Array, "*batch"], *, penalty: Numeric = 1.0) -> Float[Array, "*batch"]:
    """A fixed penalty for completions of the wrong form: ``-penalty`` where not valid, else 0.

    Args:
      valid: True where the completion has the wanted form: an answer could be found in it, it ended by itself, ...
      penalty: Reward units, at least 0.

    Returns:
      One penalty per completion, float32.

    Raises:
      ValueError: If ``penalty`` is a Python number below 0.

    Example:
      >>> format_penalty(jnp.array([True, False]), penalty=0.5).tolist()
      [0.0, -0.5]
    """
    check_at_least("penalty", penalty, 0)
    check_boolean("valid", valid)
    return jax.lax.stop_gradient(jnp.where(valid, 0.0, -as_float(jnp.asarray(penalty))))


def repetition_penalty(
    tokens: Int[Array, "*batch T"], *, ngram: int, where: Bool[Array, "*batch T"] | None = None
) -> Float[Array, "*batch"]:
    r"""Minus the share of a completion's n-grams that have been there before.

    .. math:: r = \frac{\#\{\text{different n-grams}\}}{\#\{\text{n-grams}\}} - 1

    Only windows of n real tokens in a row count. The n-grams are sorted, so the cost is ``T log T`` per completion.

    Args:
      tokens: Token ids; masked ones may hold anything.
      ngram: Length n of the windows, at least 1. Small n also punishes ordinary text: 1 counts function words.
      where: True for real tokens; None means all.

    Returns:
      One penalty per completion, float32, in (-1, 0]; 0 for one shorter than ``ngram``.

    Raises:
      ValueError: If ``ngram < 1``.

    Example:
      >>> repetition_penalty(jnp.array([[1, 2, 1, 2, 1], [1, 2, 3, 4, 5]]), ngram=2).tolist()
      [-0.5, 0.0]

    References:
      Yeo et al., 2025, arXiv:2502.03373 (as a penalty on every repeating token).
    """
    check_at_least("ngram", ngram, 1)
    tokens = jnp.asarray(tokens)
    check_alike(where, tokens)
    where = jnp.ones(tokens.shape, bool) if where is None else jnp.asarray(where)
    windows = tokens.shape[-1] - ngram + 1
    if windows < 1:
        return jnp.zeros(tokens.shape[:-1])
    real = jnp.all(jnp.stack([where[..., i : i + windows] for i in range(ngram)]), axis=0)
    grams = [tokens[..., i : i + windows] for i in range(ngram)]
    # Equal n-grams become neighbours, the real ones in front.
    order = jnp.lexsort([*grams, ~real], axis=-1)
    ordered = [jnp.take_along_axis(gram, order, axis=-1) for gram in grams]
    repeated = jnp.all(jnp.stack([gram[..., 1:] == gram[..., :-1] for gram in ordered]), axis=0)
    repeated &= jnp.take_along_axis(real, order, axis=-1)[..., 1:]
    count = jnp.sum(real, axis=-1)
    return -(jnp.sum(repeated, axis=-1) / jnp.maximum(count, 1)) + 0.0


def _signed(length: int | Array) -> Array:
    """Lengths as floats: a difference of unsigned integers would wrap around."""
    return jnp.asarray(length, jnp.float32)
