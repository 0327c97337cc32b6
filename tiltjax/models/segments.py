"""Who sees whom, and who stands where, when several prompts share one row with all of their completions.

Prompts stand one after another along S, their completions side by side along N. A prompt position sees its own prompt
only, a completion its own prompt and itself, and everyone counts positions from the start of the own prompt: every
number is that of the prompt alone in its row.
"""

import chex
import jax.numpy as jnp

from tiltjax.models.attention import prefix_window
from tiltjax.types import Array, Bool, Int

__all__ = ["Arrangement", "Segments", "arrange"]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Segments:
    """Which prompt of its row everything belongs to.

    Attributes:
      prompt: Of every prompt position, ``[B, S]``; each prompt's positions are consecutive. What stands in the padding
        does not matter.
      completion: Of every completion, ``[B, N]``; a prompt that is in the row.
    """

    prompt: Int[Array, "B S"]
    completion: Int[Array, "B N"]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Arrangement:
    """Positions and masks of one batch; axes of size 1 stand for all.

    Attributes:
      prompt_position: Of every prompt token, ``[B or 1, S]``.
      prompt_sees: Beyond causality, which prompt positions see which, ``[B, 1, S, S]``; None means all.
      position: Of every completion token, ``[B, N or 1, T]``.
      sees: Which prompt positions completion tokens see, as `tiltjax.models.attention.Prefix` wants it.
      last: Place of the last token of the own prompt, ``[B, N or 1]``.
    """

    prompt_position: Int[Array, "#B S"]
    prompt_sees: Bool[Array, "B 1 S S"] | None
    position: Int[Array, " B #N T"]
    sees: Bool[Array, "..."]
    last: Int[Array, " B #N"]


def arrange(
    prompt_mask: Bool[Array, "B S"], length: int, *, segments: Segments | None = None, window: int | None = None
) -> Arrangement:
    """Positions and masks of prompts and their completions.

    Args:
      prompt_mask: True on real prompt tokens.
      length: T, completion tokens that attend.
      segments: Where several prompts share a row; None means one prompt per row.
      window: How many positions back a token sees, itself included; None means all.

    Returns:
      `Arrangement`.
    """
    place, step = jnp.arange(prompt_mask.shape[1]), jnp.arange(length)
    if segments is None:
        size = jnp.sum(prompt_mask, axis=-1)
        position = size[:, None] + step[None]
        sees = prefix_window(prompt_mask, position, window=window)
        return Arrangement(
            prompt_position=place[None],
            prompt_sees=None,
            position=position[:, None],
            sees=sees,
            last=size[:, None] - 1,
        )
    chex.assert_equal_shape([segments.prompt, prompt_mask])
    same = segments.prompt[:, :, None] == segments.prompt[:, None]
    # The first place of a prompt is where the earliest position of the same prompt stands.
    prompt_position = place[None] - jnp.argmax(same, axis=-1)
    mine = prompt_mask[:, None] & (segments.completion[:, :, None] == segments.prompt[:, None])
    size = jnp.sum(mine, axis=-1)
    last = jnp.argmax(jnp.where(mine, place[None, None], -1), axis=-1)
    position = size[..., None] + step[None, None]
    sees = mine[:, :, None]
    if window is not None:
        sees = sees & (position[..., None] - prompt_position[:, None, None] < window)
    return Arrangement(
        prompt_position=prompt_position, prompt_sees=same[:, None], position=position, sees=sees, last=last
    )
