"""From logits to a token: filters (logits in, logits out, -inf where removed), greedy choice and an exact draw.

``temperature`` is that of decoding, which also moves the reference: completions drawn at a temperature other than 1 or
under a filter are not samples of the model at temperature 1. They are samples of its law at that temperature,
restricted to the tokens that the filter left (`support_of`): that is the law whose log-probabilities belong in a loss.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least, check_fraction, check_positive
from tiltjax.ops.masked import as_float
from tiltjax.samplers.resample import inverse_cdf
from tiltjax.types import Array, Float, Int, Key, Numeric, UInt8

__all__ = [
    "categorical",
    "categorical_and_logp",
    "greedy",
    "min_p",
    "processed",
    "support_of",
    "temper",
    "top_k",
    "top_p",
]

_BLOCK = 256


def temper(logits: Float[Array, "*batch V"], *, temperature: Numeric) -> Float[Array, "*batch V"]:
    """``logits / temperature``.

    Args:
      logits: Unnormalised log-probabilities, nats.
      temperature: Above 0; 1 changes nothing. For the limit 0 use `greedy`.

    Returns:
      Logits ``[*batch, V]``, float32 or wider.

    Raises:
      ValueError: If ``temperature`` is a Python number that is not positive and finite.
    """
    check_positive("temperature", temperature)
    return as_float(logits) / temperature


def top_k(logits: Float[Array, "*batch V"], *, k: int) -> Float[Array, "*batch V"]:
    """Keeps the ``k`` largest logits, exactly ``k`` of them: among equals the lowest index stays.

    Args:
      logits: Unnormalised log-probabilities, nats.
      k: At least 1; V or more keeps everything.

    Returns:
      Logits ``[*batch, V]``, -inf where removed.

    Raises:
      ValueError: If ``k`` is below 1.

    Example:
      >>> top_k(jnp.array([1.0, 3.0, 2.0, 2.0]), k=2).tolist()
      [-inf, 3.0, 2.0, -inf]

    References:
      Fan, Lewis, Dauphin, 2018, arXiv:1805.04833.
    """
    check_at_least("k", k, 1)
    logits = as_float(logits)
    if k >= logits.shape[-1]:
        return logits
    keep = jnp.vectorize(
        lambda row: jnp.full_like(row, False, bool).at[jax.lax.top_k(row, k)[1]].set(True), signature="(v)->(v)"
    )
    return jnp.where(keep(logits), logits, -jnp.inf)


def top_p(logits: Float[Array, "*batch V"], *, p: Numeric) -> Float[Array, "*batch V"]:
    """Keeps the most probable tokens whose mass reaches ``p`` (nucleus): the smallest such set that splits no tie.

    Tokens as probable as the last one kept are kept with it. The threshold is found without a sort, by bisection on the
    bits of a float, so it is exact; the mass is a float32 sum, so ``p`` within 1e-6 of a boundary may fall either side.

    Args:
      logits: Unnormalised log-probabilities, nats.
      p: In (0, 1]; 1 keeps everything. The most probable token is kept whatever ``p`` is.

    Returns:
      Logits ``[*batch, V]``, -inf where removed.

    Raises:
      ValueError: If ``p`` is a Python number outside (0, 1].

    Example:
      >>> (top_p(jnp.log(jnp.array([0.1, 0.5, 0.25, 0.15])), p=0.7) > -jnp.inf).tolist()
      [False, True, True, False]

    References:
      Holtzman et al., 2020, arXiv:1904.09751.
    """
    check_fraction("p", p)
    logits = as_float(logits)
    mass = _masses(logits)[0].astype(jnp.float32)
    # Positive floats are ordered as their bits are; the largest mass is exp(0) = 1.
    bits = jax.lax.bitcast_convert_type(mass, jnp.int32)
    total = jnp.sum(mass, axis=-1, keepdims=True)

    def halve(_: Array | int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # The mass at or above `low` reaches p; above `high` it does not.
        middle = low + (high - low + 1) // 2
        reached = jnp.sum(jnp.where(bits >= middle, mass, 0), axis=-1, keepdims=True) >= p * total
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle - 1)

    low = jnp.zeros_like(bits, shape=total.shape)
    high = jnp.max(bits, axis=-1, keepdims=True)
    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jnp.where((bits >= low) | (jnp.asarray(p) >= 1), logits, -jnp.inf)


def min_p(logits: Float[Array, "*batch V"], *, p: Numeric) -> Float[Array, "*batch V"]:
    """Keeps the tokens at least ``p`` times as probable as the most probable one.

    Args:
      logits: Unnormalised log-probabilities, nats.
      p: In (0, 1]; 1 keeps only the most probable token and those tied with it.

    Returns:
      Logits ``[*batch, V]``, -inf where removed.

    Raises:
      ValueError: If ``p`` is a Python number outside (0, 1].

    Example:
      >>> (min_p(jnp.log(jnp.array([0.1, 0.5, 0.25, 0.15])), p=0.4) > -jnp.inf).tolist()
      [False, True, True, False]

    References:
      Nguyen et al., 2024, arXiv:2407.01082.
    """
    check_fraction("p", p)
    logits = as_float(logits)
    return jnp.where(logits >= jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p), logits, -jnp.inf)


def processed(
    logits: Float[Array, "*batch V"], *, temperature: Numeric = 1.0, k: int | None = None, p: Numeric | None = None
) -> Float[Array, "*batch V"]:
    """`temper`, then `top_k`, then `top_p`; None leaves a filter out.

    Args:
      logits: Unnormalised log-probabilities, nats.
      temperature: See `temper`.
      k: See `top_k`.
      p: See `top_p`; the mass is that of the tokens that ``k`` left.

    Returns:
      Logits ``[*batch, V]``, -inf where removed.

    Raises:
      ValueError: As the three filters do.
    """
    logits = temper(logits, temperature=temperature)
    if k is not None:
        logits = top_k(logits, k=k)
    return logits if p is None else top_p(logits, p=p)


def support_of(logits: Float[Array, "*batch V"]) -> UInt8[Array, "*batch bytes"]:
    """Which tokens the filters left, one bit a token: what `tiltjax.ops.tokens.token_logp` takes as ``support``.

    Args:
      logits: Of `processed`, -inf where removed.

    Returns:
      ``ceil(V / 8)`` bytes; the lowest bit is that of the first token.

    Example:
      >>> support_of(top_k(jnp.array([1.0, 3.0, 2.0, 0.0]), k=2)).tolist()
      [6]
    """
    return jnp.packbits(logits > -jnp.inf, axis=-1, bitorder="little")


def greedy(logits: Float[Array, "*batch V"]) -> Int[Array, "*batch"]:
    """Index of the largest logit; the lowest index wins ties."""
    block = jnp.argmax(_by_block(jnp.max, logits), axis=-1, keepdims=True)
    return _index(block, jnp.argmax(_inside(logits, block, -jnp.inf), axis=-1, keepdims=True))


def categorical(key: Key[Array, "*keys"], logits: Float[Array, "*batch V"]) -> Int[Array, "*batch"]:
    r"""Draws one token per row with probability ``softmax(logits)``, from two uniforms per row.

    .. math:: P(\text{token}) = P(\text{block}) \, P(\text{token} \mid \text{block})

    The vocabulary is cut into blocks of 256: one uniform picks a block through the cumulative block masses, an
    independent one picks a token inside it. That is one exponential per logit and short cumulative sums, where
    Gumbel-max needs a random number and two logarithms per logit.

    Args:
      key: Consumed: one key, or one per row ``[*batch]``, where each row's draw depends on its own key only.
      logits: Unnormalised log-probabilities, nats; finite or -inf.

    Returns:
      Token ``[*batch]``, never one of probability 0; 0 for a row that is -inf everywhere.

    Example:
      >>> int(categorical(jax.random.key(0), jnp.array([-jnp.inf, 5.0, -jnp.inf])))
      1
    """
    return categorical_and_logp(key, logits)[0]


def categorical_and_logp(
    key: Key[Array, "*keys"], logits: Float[Array, "*batch V"]
) -> tuple[Int[Array, "*batch"], Float[Array, "*batch"]]:
    """`categorical`, and the log-probability of what it drew from the same exponentials.

    Args:
      key: As in `categorical`.
      logits: Likewise.

    Returns:
      Token and ``log softmax(logits)[token]``, nats, each ``[*batch]``.
    """
    logits = as_float(logits)
    mass, top = _masses(logits)
    batch = mass.shape[:-1]
    if key.ndim:
        uniform = jnp.vectorize(lambda k: jax.random.uniform(k, (2,), mass.dtype), signature="()->(u)")(key)
        for_block, for_token = uniform[..., :1], uniform[..., 1:]
    else:
        for_block, for_token = (jax.random.uniform(k, (*batch, 1), mass.dtype) for k in jax.random.split(key))
    masses = _by_block(jnp.sum, mass)
    block = inverse_cdf(masses, for_block)
    token = _index(block, inverse_cdf(_inside(mass, block, 0.0), for_token))
    drawn = jnp.take_along_axis(logits, token[..., None], axis=-1) - top
    return token, (drawn - jnp.log(jnp.sum(masses, axis=-1, keepdims=True)))[..., 0]


def _masses(logits: Array) -> tuple[Array, Array]:
    """``exp(logits - max)``, at most 1 and 0 throughout a row of -inf, and the ``max [*batch, 1]``."""
    top = jnp.max(logits, axis=-1, keepdims=True)
    top = jnp.where(jnp.isfinite(top), top, 0)
    return jnp.exp(logits - top), top


def _by_block(reduce: Callable[..., Array], x: Array) -> Array:
    """``reduce`` over every block; the rest is one of its own, since padding the vocabulary would cost more."""
    whole = x.shape[-1] - x.shape[-1] % _BLOCK
    blocks = reduce(x[..., :whole].reshape(*x.shape[:-1], whole // _BLOCK, _BLOCK), axis=-1)
    if whole == x.shape[-1]:
        return blocks
    return jnp.concatenate([blocks, reduce(x[..., whole:], axis=-1, keepdims=True)], axis=-1)


def _inside(x: Array, block: Array, fill: float) -> Array:
    """The entries ``[*batch, 256]`` of one block per row, ``[*batch, 1]``; ``fill`` behind the last."""
    V = x.shape[-1]
    place = block * _BLOCK + jnp.arange(_BLOCK, dtype=block.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    return jnp.where(place < V, jnp.take_along_axis(x, jnp.minimum(place, V - 1), axis=-1), fill)


def _index(block: Array, place: Array) -> Array:
    return (block * _BLOCK + place)[..., 0].astype(jnp.int32)
