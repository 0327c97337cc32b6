"""Rotary positions as Hugging Face and GGUF files describe them: base and scaling."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tiltjax.models.fields import Fields

__all__ = ["read_rope", "scaling_from_factors", "scaling_to_hf"]


def read_rope(hf: Fields, whole: float) -> tuple[float, tuple[Any, ...] | None, float]:
    """Rotary positions of a ``config.json``; transformers 5 keeps them in ``rope_parameters``.

    Args:
      hf: The file.
      whole: Rotating fraction of a head where the file does not say.

    Returns:
      ``(base, scaling, fraction)``, the scaling as in `tiltjax.models.config.TransformerConfig`.

    Raises:
      ValueError: If a field is of another type, or the scaling is not supported.
    """
    old, new = hf.group("rope_scaling"), hf.group("rope_parameters")
    if any(isinstance(value, Mapping) and name.endswith("_attention") for name, value in new.values.items()):
        raise ValueError("rope_parameters that differ between layers are not supported")
    rope = Fields({**old.values, **new.values}, hf.name, new.prefix if new.values else old.prefix)

    def first(*places: tuple[Fields, str]) -> float | None:
        found = (fields.positive(name, None, null=True) for fields, name in places)
        return next((value for value in found if value is not None), None)

    theta = first((rope, "rope_theta"), (hf, "rope_theta"), (hf, "rotary_emb_base")) or 10000.0
    fraction = first((rope, "partial_rotary_factor"), (hf, "partial_rotary_factor"), (hf, "rotary_pct")) or whole
    if fraction > 1:
        raise ValueError(f"partial_rotary_factor (or rotary_pct) must be at most 1, got {fraction}")
    kind = rope.text("rope_type", None, null=True) or rope.text("type", None, null=True) or "default"
    if kind == "default":
        return theta, None, fraction
    if kind == "linear":
        return theta, ("linear", rope.positive("factor")), fraction
    if kind == "llama3":
        keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        scaling = [rope.positive(key) for key in keys]
        if scaling[2] <= scaling[1]:
            raise ValueError(
                f"{rope.prefix}high_freq_factor must be above low_freq_factor={scaling[1]}, got {scaling[2]}"
            )
        return theta, ("llama3", *scaling), fraction
    raise ValueError(f"rope_type must be default, linear or llama3; got {kind!r}")


def scaling_to_hf(scaling: tuple[Any, ...] | None) -> dict[str, Any] | None:
    """What ``rope_scaling`` of a ``config.json`` says of a scaling."""
    if scaling is None:
        return None
    if scaling[0] == "linear":
        return {"rope_type": "linear", "factor": scaling[1]}
    _, factor, low, high, original = scaling
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": int(original),
    }


def scaling_from_factors(factors: np.ndarray, theta: float) -> tuple[Any, ...] | None:
    r"""The scaling of Llama 3 whose frequencies are divided by ``factors``, as llama.cpp keeps them.

    .. math:: 1 / f_i = s_i + (1 - s_i) / f, \quad s_i = \mathrm{clip}((t_i - 1) / 3), \quad
       t_i = L \theta^{-2i/d} / 2 \pi

    The factor f is the largest of them; the original length L is the power of two that gives the others.

    Args:
      factors: Of every frequency, ``[d / 2]``.
      theta: Base of the angles.

    Returns:
      ``("llama3", factor, 1, 4, L)``, or None where every factor is 1.

    Raises:
      ValueError: If they are those of another scaling.
    """
    factors = np.asarray(factors, np.float64)
    if np.all(factors == 1):
        return None
    frequency = theta ** (-np.arange(len(factors)) / len(factors))
    factor, low, high = float(np.float32(factors.max())), 1.0, 4.0
    for power in range(4, 31):
        smooth = np.clip((2.0**power * frequency / (2 * np.pi) - low) / (high - low), 0, 1)
        if np.allclose(1 / factors, smooth + (1 - smooth) / factor, rtol=1e-4, atol=0):
            return "llama3", factor, low, high, 2.0**power
    raise ValueError("the factors of rope_freqs.weight are not those of Llama 3 (low 1, high 4, a power of two)")
