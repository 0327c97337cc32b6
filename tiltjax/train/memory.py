"""What drawing completions takes of the memory, and how much there is: asked before anything is drawn."""

import dataclasses
import os
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tiltjax.models.config import TransformerConfig

__all__ = ["Drawing", "check_memory", "memory_limit"]

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where a container says how much of the machine's memory it may have."""


@dataclasses.dataclass(frozen=True)
class Drawing:
    """How much is drawn.

    Attributes:
      num_prompts: P, whose completions are kept.
      num_candidates: N per prompt.
      sample_batch: Prompts whose N candidates are decoded at a time.
      prompt_tokens: S, of the longest prompt.
      max_tokens: T, of the longest completion.
    """

    num_prompts: int
    num_candidates: int
    sample_batch: int
    prompt_tokens: int
    max_tokens: int

    def parts(self, config: TransformerConfig) -> dict[str, int]:
        """Bytes by what they hold; the arrays that live through the whole loop, so that no less will do.

        Args:
          config: Of the policy.

        Returns:
          Name -> bytes, over all devices.
        """
        slots = self.sample_batch * self.num_candidates
        positions = self.sample_batch * self.prompt_tokens + slots * self.max_tokens
        each = 2 * config.num_layers * config.num_kv_heads * config.head_dim * jnp.dtype(config.compute_dtype).itemsize
        return {
            "keys and values": positions * each,
            "logits": slots * config.vocab_size * 4,
            # A token, its mask and its log-probability.
            "completions": self.num_prompts * self.num_candidates * self.max_tokens * 9,
        }


def memory_limit() -> int | None:
    """Bytes that the devices of this run have together; None where they do not say.

    CPU devices share the memory of their host, of which a container may have a part.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        sizes = [(part.memory_stats() or {}).get("bytes_limit") for part in jax.local_devices()]
        return None if None in sizes else sum(sizes) * jax.process_count()  # type: ignore[arg-type]
    try:
        found = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    except (AttributeError, OSError, ValueError):
        return None
    for path in map(pathlib.Path, _LIMITS):
        text = path.read_text().strip() if path.is_file() else ""
        found += [int(text)] if text.isdigit() else []
    return min(found) * jax.process_count()


def check_memory(drawing: Drawing, config: TransformerConfig, *, held: int, limit: int | None) -> None:
    """Refuses a drawing for which there cannot be enough memory.

    Args:
      drawing: How much is drawn.
      config: Of the policy.
      held: Bytes that are taken already: the policy's weights.
      limit: Bytes that there are, of `memory_limit`; None lets everything pass.

    Raises:
      ValueError: If it needs more; one line that says of what, how much, and what would fit.
    """
    if limit is None:
        return

    def need(**changes: int) -> int:
        return held + sum(dataclasses.replace(drawing, **changes).parts(config).values())

    if need() <= limit:
        return
    largest = {
        name: _largest(lambda value: need(**{name: value}) <= limit, getattr(drawing, name))  # noqa: B023
        for name in ("num_candidates", "max_tokens", "sample_batch")
    }
    fits = " or ".join(f"{name}={value}" for name, value in largest.items() if value)
    of = ", ".join(f"{name} {_shown(size)}" for name, size in drawing.parts(config).items())
    raise ValueError(
        f"num_candidates={drawing.num_candidates} of max_tokens={drawing.max_tokens} need {_shown(need())} "
        f"({of}, weights {_shown(held)}), and there are {_shown(limit)}: {fits or 'no smaller number of one alone'} "
        "would fit"
    )


def _largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number in ``[1, most]`` that fits, by bisection; 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _shown(size: int) -> str:
    return f"{size / 1e9:,.1f} GB"
