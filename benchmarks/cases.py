"""What is measured: shapes of a model, cases of work, and the arithmetic that each cannot do without."""

import dataclasses
from typing import Any

__all__ = ["CASES", "SHAPES", "Case", "Shape", "case_named", "cases_of"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama-like decoder with tied embedding, gated MLP and rotary positions."""

    vocab_size: int
    features: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_features: int

    @property
    def layer_parameters(self) -> int:
        """Of one block's matrices."""
        attention = self.features * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)
        return attention + 3 * self.features * self.mlp_features

    def forward_flops(self, positions: float, context: float, heads: float) -> float:
        """Of the matrix products of one forward pass.

        Args:
          positions: How many go through the blocks.
          context: How many keys each of them attends to, on average.
          heads: How many go through the vocabulary projection.

        Returns:
          Multiplications plus additions.
        """
        layer = 2 * self.layer_parameters + 4 * self.num_heads * self.head_dim * context
        return self.num_layers * layer * positions + 2 * self.features * self.vocab_size * heads


SHAPES = {
    "135m": Shape(49152, 576, 30, 9, 3, 64, 1536),  # SmolLM2-135M
    "mini": Shape(8192, 256, 6, 4, 2, 64, 704),
    "tiny": Shape(128, 32, 2, 2, 1, 16, 64),
}
"""By name; "tiny" is for the tests."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One piece of work: B prompts of S tokens with N completions of T tokens each.

    Attributes:
      name: Of the case, unique.
      module: Which of the modules ``sft``, ``dpo``, ``group``, ``generate`` and ``best_of_n`` runs it.
      work: "train", "score" or "decode".
      B: Prompts.
      N: Completions of each.
      S: Tokens of a prompt.
      T: Tokens of a completion.
      reference: "none", "precomputed", or "in_step" (its forward pass is part of the step).
      goal: How many times faster than the fastest setting of a peer, None where no goal was set.
      text: What a reader is told.
    """

    name: str
    module: str
    work: str
    B: int
    N: int
    S: int
    T: int
    reference: str = "none"
    goal: float | None = None
    text: str = ""

    def flops(self, shape: Shape, *, shared: bool = True) -> float:
        """What the case cannot do without: recomputation, padding and masked scores are not counted.

        Args:
          shape: Of the model.
          shared: Whether a prompt is computed once for its N completions, or N times.

        Returns:
          Multiplications plus additions of one step.
        """
        prompts, all_tokens = self.B if shared else self.B * self.N, self.B * self.N * self.T
        decoding = self.work == "decode"
        forward = shape.forward_flops(prompts * self.S, (self.S + 1) / 2, prompts if decoding else 0)
        # The last token of a completion is predicted and never read.
        positions = self.B * self.N * (self.T - 1)
        forward += shape.forward_flops(positions, self.S + self.T / 2, positions if decoding else all_tokens)
        passes = 3 if self.work == "train" else 1
        return forward * (passes + (self.reference == "in_step"))

    def shrunk(self) -> "Case":
        """The same work at a size that a test can afford."""
        return dataclasses.replace(self, B=min(self.B, 2), N=min(self.N, 4), S=min(self.S, 5), T=min(self.T, 6))


def _dpo(S: int, T: int, goals: tuple[float | None, float | None], text: str) -> list[Case]:
    name = f"dpo_{S}_{T}"
    sizes: dict[str, Any] = {"module": "dpo", "work": "train", "B": 4, "N": 2, "S": S, "T": T}
    return [
        Case(f"{name}_precomputed", **sizes, reference="precomputed", goal=goals[0], text=f"{text}, ref precomputed"),
        Case(f"{name}_in_step", **sizes, reference="in_step", goal=goals[1], text=f"{text}, ref in the step"),
    ]


CASES = (
    Case("sft_8x128", "sft", "train", 8, 1, 1, 127, goal=1.5, text="SFT step, 8 x 128 tokens"),
    *_dpo(64, 64, (2.0, 2.3), "DPO step, 4 pairs, prompt 64 + 2 x 64"),
    *_dpo(96, 32, (None, None), "DPO step, 4 pairs, prompt 96 + 2 x 32"),
    *_dpo(1, 127, (None, None), "DPO step, 4 pairs, 2 x 128 with no prompt to share"),
    Case("group_step", "group", "train", 1, 16, 256, 64, goal=4.0, text="GRPO step, 1 prompt of 256, 16 x 64"),
    Case("group_score", "group", "score", 1, 16, 256, 64, text="log-probabilities, 1 prompt of 256, 16 x 64"),
    Case("generate_16", "generate", "decode", 16, 1, 64, 64, goal=2.0, text="generation, 16 x (64 + 64)"),
    Case("best_of_16", "best_of_n", "decode", 4, 16, 64, 64, goal=3.0, text="best-of-16, 4 x 16 x (64 + 64)"),
    Case("best_of_16_long", "best_of_n", "decode", 1, 16, 512, 64, text="best-of-16, 1 x 16 x (512 + 64)"),
    Case("best_of_64_long", "best_of_n", "decode", 1, 64, 512, 64, goal=15.0, text="best-of-64, 1 x 64 x (512 + 64)"),
)
"""Every case; goals are against the fastest of the peer's settings in the same run, at the 135M shape."""


def case_named(name: str) -> Case:
    """The case of that name.

    Raises:
      ValueError: If there is none.
    """
    found = {case.name: case for case in CASES}
    if name not in found:
        raise ValueError(f"case must be one of {', '.join(found)}; got {name!r}")
    return found[name]


def cases_of(module: str) -> tuple[Case, ...]:
    """The cases that a module runs."""
    return tuple(case for case in CASES if case.module == module)
