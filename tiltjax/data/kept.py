"""Whether a kept batch of candidates is what was written: a digest of every field, and what the fields may hold.

The fields are those of `tiltjax.data.candidates.Candidates`.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["FORMS", "check_digests", "check_values", "digests"]

FORMS = {
    "prompt": ("i", "BS"),
    "prompt_mask": ("b", "BS"),
    "completion": ("i", "BNT"),
    "completion_mask": ("b", "BNT"),
    "reward": ("f", "BN"),
    "ref_logp": ("f", "BN"),
    "old_token_logp": ("f", "BNT"),
    "where": ("b", "BN"),
    "loss_mask": ("b", "BNT"),
    "support": ("u", "BNTW"),
}
"""Field -> kind of its type, as NumPy writes it, and its axes."""

_KINDS = {"i": "integers", "b": "booleans", "f": "floats", "u": "unsigned integers"}


def digests(arrays: Mapping[str, np.ndarray]) -> str:
    """The sha256 of type, shape and contents of every array, as JSON.

    Args:
      arrays: By name.

    Returns:
      ``{"name": "hex", ...}``.
    """

    def one(array: np.ndarray) -> str:
        form = f"{array.dtype.str}{array.shape}".encode()
        return hashlib.sha256(form + np.ascontiguousarray(array).tobytes()).hexdigest()

    return json.dumps({name: one(array) for name, array in sorted(arrays.items())})


def check_digests(arrays: Mapping[str, np.ndarray], kept: Any) -> None:
    """Refuses arrays that are not the ones that were written.

    Args:
      arrays: By name, as they are now.
      kept: What `digests` said when they were written; None where the file has none.

    Raises:
      ValueError: With the field.
    """
    if kept is None:
        raise ValueError("no digest of its fields: written by another version, or edited")
    try:
        then = dict(json.loads(str(kept)))
    except (ValueError, TypeError):
        raise ValueError("the digest of its fields cannot be read") from None
    now = json.loads(digests(arrays))
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            what = "is missing" if name not in now else "was added" if name not in then else "was changed"
            raise ValueError(f"field {name} {what} after it was written")


def check_values(arrays: Mapping[str, np.ndarray], vocab_size: int | None = None) -> None:
    """Refuses fields that no batch of candidates can have, whoever wrote them.

    Args:
      arrays: Fields by name.
      vocab_size: Token ids lie below it; None does not ask.

    Raises:
      ValueError: With the field: of another type or shape than the others ask for; ids outside the vocabulary; masks
        that are not padded on the right; a prompt without tokens; rewards and log-probabilities that are not finite.
    """
    sizes: dict[str, int] = {} if vocab_size is None else {"W": -(-vocab_size // 8)}
    for name, array in arrays.items():
        kind, axes = FORMS[name]
        if array.dtype.kind != kind or array.ndim != len(axes):
            raise ValueError(
                f"field {name} must be {_KINDS[kind]} of {len(axes)} axes, got {array.dtype} of shape {array.shape}"
            )
        for axis, size in zip(axes, array.shape, strict=True):
            if sizes.setdefault(axis, size) != size:
                raise ValueError(f"field {name} has {size} along axis {axis}, where {sizes[axis]} are expected")
    for name in ("prompt", "completion"):
        _refuse(name, arrays[name] < 0, "a negative token id")
        if vocab_size is not None:
            _refuse(name, arrays[name] >= vocab_size, f"a token id that is not below vocab_size={vocab_size}")
        mask = arrays[f"{name}_mask"]
        _refuse(f"{name}_mask", mask[..., 1:] & ~mask[..., :-1], "a token behind padding")
    _refuse("prompt_mask", ~arrays["prompt_mask"].any(axis=-1), "a prompt without tokens")
    real = np.asarray(arrays.get("where", True))
    for name, where in (("reward", real), ("ref_logp", real), ("old_token_logp", arrays["completion_mask"])):
        if name in arrays:
            _refuse(name, np.logical_and(~np.isfinite(arrays[name]), where), "a value that is not finite")


def _refuse(name: str, bad: Any, what: str) -> None:
    if bad.any():
        raise ValueError(f"field {name} has {what}, at {np.argwhere(bad)[0].tolist()}")
