"""How many operations a training step needs, by the mathematics and with what the backward pass computes again."""

import dataclasses
import math
from typing import Any

import jax

from tiltjax.models.config import TransformerConfig

__all__ = ["Shape", "StepFlops", "num_parameters", "step_flops"]

_CHUNK, _ROWS = 3072, 2048
"""Vocabulary entries and positions (per device) that `tiltjax.ops.tokens.token_logp` takes at a time."""


def num_parameters(tree: Any) -> int:
    """How many numbers a pytree of arrays or of their shapes holds."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one global batch: ``B`` prompts of ``S`` tokens with ``N`` completions of ``T``."""

    B: int
    N: int
    S: int
    T: int


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """Operations of the matrix products of one training step on a global batch, 2 per multiply-add.

    Attributes:
      model: Three times the forward pass: what the mathematics needs (less for adapters, whose kernels have no
        gradient).
      executed: With what the backward pass computes again.
    """

    model: float
    executed: float


def step_flops(
    config: TransformerConfig, shape: Shape, *, lora_rank: int = 0, devices: int = 1, gathered: bool = False
) -> StepFlops:
    """Counts the products of `tiltjax.train.step.train_step` on a `tiltjax.models.transformer.Transformer`.

    The prompt goes through the blocks once for its N completions, of which all tokens but the last do. Scores are
    counted in full, as the plain attention computes them. The vocabulary projection is computed again in the backward
    pass, unless one chunk is all of it: then the compiler sees that both are the same, where each pass has not gathered
    the projection for itself. Of a block, all is computed again but the products on whose results no gradient depends.

    Args:
      config: Of the policy.
      shape: Of the batch.
      lora_rank: Rank of the adapters; 0 trains all parameters.
      devices: Over which the batch is spread.
      gathered: Whether the features of the vocabulary projection are spread over devices.

    Returns:
      `StepFlops`.
    """
    c, s = config, shape
    own = s.T - 1
    tokens = s.B * (s.S + s.N * own)
    width, narrow = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    sides = {
        "query": (c.features, width),
        "key": (c.features, narrow),
        "value": (c.features, narrow),
        "out": (width, c.features),
        "up": (c.features, c.mlp_features),
        "down": (c.mlp_features, c.features),
    }
    sides |= {"gate": sides["up"]} if c.gated else {}  # fmt: skip
    kernels = {name: 2.0 * tokens * a * b for name, (a, b) in sides.items()}
    down_adapters = {name: 2.0 * tokens * a * lora_rank for name, (a, _) in sides.items()}
    up_adapters = {name: 2.0 * tokens * b * lora_rank for name, (_, b) in sides.items()}
    scores = 4.0 * s.B * width * (s.S**2 + s.N * own * (s.S + own))
    kernel, adapter = sum(kernels.values()), sum(down_adapters.values()) + sum(up_adapters.values())
    backward = 2 * (scores + adapter) + kernel * (1 if lora_rank else 2)
    # Nothing needs the output of a block again, nor in a parallel one that of its attention.
    unused = ("down", "out") if c.parallel_residual else ("down",)
    again = {
        "none": 0.0,
        "dots": scores,
        "full": kernel + scores + adapter - sum(kernels[name] + up_adapters[name] for name in unused),
    }[c.remat]
    forward = kernel + scores + adapter
    head = 2.0 * s.B * s.N * s.T * c.vocab_size * c.features
    head_backward = head * (1 if lora_rank else 2)
    twice = gathered or c.vocab_size > _CHUNK or _ROWS * devices < s.B * s.N * s.T
    return StepFlops(
        model=c.num_layers * (forward + backward) + head + head_backward,
        executed=c.num_layers * (forward + backward + again) + (1 + twice) * head + head_backward,
    )
