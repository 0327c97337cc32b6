"""What every loss on pairs begins and ends with: precision, masks, log-ratios and the logistic of a margin."""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from tiltjax.ops.masked import as_float
from tiltjax.tilt.f_divergence import MAX_EXPONENT
from tiltjax.types import Array, Float, Int, Numeric

__all__ = ["MAX_EXPONENT", "Beta", "Length", "check_smoothing", "gap", "logistic", "mean_logp", "pairs"]

Beta = Numeric | Float[Array, "*batch"]
"""Strength of the KL term: a number, or one per pair."""

Length = Int[Array, "*batch N"] | Float[Array, "*batch N"]
"""Number of tokens of every candidate, the end token included."""


def pairs(where: Array | None, logp: Array, *constants: Array) -> tuple[Array, ...]:
    """Floats of at least 32 bits, 0 in masked pairs; ``constants`` lose their gradient.

    Args:
      where: True for real candidates, ``[*batch, 2]``; a pair counts where both are. None means all.
      logp: The trained array, ``[*batch, 2]``.
      *constants: Others of the same shape.

    Returns:
      Whether each pair counts, ``[*batch]``; then the arrays.
    """
    arrays = [as_float(logp), *(jax.lax.stop_gradient(as_float(x)) for x in constants)]
    chex.assert_equal_shape(arrays if where is None else [*arrays, where])
    real = jnp.full(arrays[0].shape[:-1], True) if where is None else jnp.all(where, axis=-1)
    return real, *(jnp.where(real[..., None], x, 0) for x in arrays)


def gap(x: Float[Array, "*batch 2"]) -> Float[Array, "*batch"]:
    """Chosen less rejected."""
    return x[..., 0] - x[..., 1]


def mean_logp(logp: Float[Array, "*batch N"], length: Float[Array, "*batch N"]) -> Float[Array, "*batch N"]:
    """Nats per token; a length below 1 counts as 1."""
    return logp / jnp.maximum(length, 1)


def logistic(margin: Float[Array, "*batch"], smoothing: Numeric = 0.0) -> Float[Array, "*batch"]:
    """``-(1 - s) log sigma(m) - s log sigma(-m)``: the Bradley-Terry loss where a share ``s`` of labels is flipped."""
    agree, flipped = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
    return -(1 - smoothing) * agree - smoothing * flipped


def check_smoothing(value: Any, *, positive: bool = False) -> None:
    """Raises ValueError unless ``label_smoothing`` lies in [0, 0.5), or in (0, 0.5) if ``positive``; or is traced."""
    if isinstance(value, int | float) and not (0 <= value < 0.5 and (value > 0 or not positive)):
        raise ValueError(f"label_smoothing must lie in {'(' if positive else '['}0, 0.5), got {value!r}")
