"""What every loss on pairs begins and ends with: precision, masks, log-ratios and the logistic of a margin."""

from typing import Any

import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_pair, check_per_row, is_number
from tiltjax.ops.logspace import difference, scale
from tiltjax.ops.masked import as_float, check_alike
from tiltjax.tilt.f_divergence import MAX_EXPONENT
from tiltjax.types import Array, Float, Int, Numeric

__all__ = ["MAX_EXPONENT", "Beta", "Length", "check_smoothing", "gap", "logistic", "mean_logp", "pairs", "ratio_gap"]

Beta = Numeric | Float[Array, "*batch"]
"""Strength of the KL term: a number, or one per pair."""

Length = Int[Array, "*batch N"] | Float[Array, "*batch N"]
"""Number of tokens of every candidate, the end token included."""


def pairs(where: Array | None, logp: Array, *constants: Array, **per_pair: Any) -> tuple[Array, ...]:
    """Floats of at least 32 bits, 0 in masked pairs; ``constants`` lose their gradient.

    Args:
      where: True for real candidates, ``[*batch, 2]``; a pair counts where both are. None means all.
      logp: The trained array, ``[*batch, 2]``.
      *constants: Others of the same shape.
      **per_pair: Options by name, each a number or one per pair: only their shapes are looked at.

    Returns:
      Whether each pair counts, ``[*batch]``; then the arrays.

    Raises:
      ValueError: If the last axis is not a pair, or an option has another shape.
    """
    check_pair("logp", logp)
    logp = as_float(logp)
    arrays = [logp, *(jax.lax.stop_gradient(_in_precision_of(logp, x)) for x in constants)]
    check_alike(where, *arrays)
    for name, value in per_pair.items():
        check_per_row(name, value, logp.shape[:-1])
    real = jnp.full(arrays[0].shape[:-1], True) if where is None else jnp.all(where, axis=-1)
    return real, *(jnp.where(real[..., None], x, 0) for x in arrays)


def _in_precision_of(logp: Array, x: Array) -> Array:
    """Floats keep their own precision; whole numbers, which are lengths, do not widen the loss."""
    return as_float(x) if jnp.issubdtype(jnp.result_type(x), jnp.inexact) else jnp.asarray(x, logp.dtype)


def gap(x: Float[Array, "*batch 2"]) -> Float[Array, "*batch"]:
    """Chosen less rejected."""
    return x[..., 0] - x[..., 1]


def ratio_gap(logp: Float[Array, "*batch 2"], ref_logp: Float[Array, "*batch 2"]) -> Float[Array, "*batch"]:
    """Log-ratio of the chosen less that of the rejected, to rounding where both log-ratios are large."""
    ratio, lost = difference(logp, ref_logp)
    return gap(ratio) + gap(lost)


def mean_logp(logp: Float[Array, "*batch N"], length: Float[Array, "*batch N"]) -> Float[Array, "*batch N"]:
    """Nats per token; a length below 1 counts as 1."""
    return logp / jnp.maximum(length, 1)


def logistic(margin: Float[Array, "*batch"], smoothing: Numeric = 0.0) -> Float[Array, "*batch"]:
    """``-(1 - s) log sigma(m) - s log sigma(-m)``: the Bradley-Terry loss where a share ``s`` of labels is flipped."""
    # An infinite margin of the right sign costs nothing, unless labels are flipped.
    return -(1 - smoothing) * jax.nn.log_sigmoid(margin) - scale(smoothing, jax.nn.log_sigmoid(-margin))


def check_smoothing(value: Any, *, positive: bool = False) -> None:
    """Raises ValueError unless ``label_smoothing`` lies in [0, 0.5), or in (0, 0.5) if ``positive``; or is traced."""
    if is_number(value) and not (0 <= value < 0.5 and (value > 0 or not positive)):
        raise ValueError(f"label_smoothing must lie in {'(' if positive else '['}0, 0.5), got {float(value)!r}")
