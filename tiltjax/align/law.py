"""The law that candidates are drawn from, and what is done with those that are cut.

A completion that has ``max_tokens`` tokens and no end is cut: it keeps what it has, and no end is made up for it.
"""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from tiltjax.data import candidates as batches
from tiltjax.data.candidates import Candidates
from tiltjax.ops.checks import check_at_least, check_fraction, check_positive
from tiltjax.train.config import field
from tiltjax.train.method import Method

__all__ = ["Law", "report_cut", "share_cut", "temperatures"]

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Law:
    """Settings of the law that candidates are drawn from; `temperatures` resolves those that are None."""

    temperature: float = field(
        None,
        "Softmax temperature at which completions are drawn, above 0. Losses and KL take the log-probabilities of the "
        "law that drew, filters included. By default that of the method's record (1, unless its paper says otherwise).",
    )
    top_k: int = field(0, "Draw among the k most probable tokens only; 0 draws among all.")
    top_p: float = field(
        1.0,
        "Draw among the most probable tokens of this mass only, in (0, 1]; 1 draws among all. With it or --top_k, one "
        "bit per vocabulary entry and drawn token is kept, for the losses.",
    )
    eval_temperature: float = field(
        None,
        "Softmax temperature at which completions of held-out prompts are drawn, above 0; filters are those of "
        "training. By default --temperature.",
    )

    def check_law(self) -> None:
        """Raises ValueError if a setting of the law is out of its range."""
        for name in ("temperature", "eval_temperature"):
            check_positive(name, getattr(self, name))
        check_at_least("top_k", self.top_k, 0)
        check_fraction("top_p", self.top_p)

    def law(self, *, evaluation: bool = False) -> dict[str, Any]:
        """The law as `tiltjax.train.rollout.make_sampler` takes it.

        Args:
          evaluation: Whether of held-out prompts.

        Returns:
          ``temperature``, ``top_k`` and ``top_p``; None for a filter that is off.
        """
        return {
            "temperature": self.eval_temperature if evaluation else self.temperature,
            "top_k": self.top_k or None,
            "top_p": None if self.top_p == 1 else self.top_p,
        }

    @property
    def filtered(self) -> bool:
        """Whether a filter is on."""
        return bool(self.top_k) or self.top_p < 1

    def describe_law(self, *, evaluation: bool = False) -> str:
        """The law in words, such as "temperature 0.7, top-p 0.9"."""
        facts = self.law(evaluation=evaluation)
        filters = [f"top-{name[-1]} {facts[name]:g}" for name in ("top_k", "top_p") if facts[name] is not None]
        return ", ".join([f"temperature {facts['temperature']:g}", *filters])


def temperatures(law: Law, record: Method | None) -> dict[str, float]:
    """What the two temperatures of a law mean where they say nothing: the record's, or 1 where nothing is trained."""
    own = 1.0 if record is None else record.temperature
    drawn = own if law.temperature is None else law.temperature
    return {"temperature": drawn, "eval_temperature": drawn if law.eval_temperature is None else law.eval_temperature}


def share_cut(drawn: Candidates, ends: Sequence[int], record: Method | None = None) -> float:
    """Share of the real candidates that are cut; of a record's, those that a policy wrote."""
    where = np.ones(drawn.completion.shape[:2], bool) if drawn.where is None else np.asarray(drawn.where)
    if record is not None and record.cross == 1:
        where = where & [source not in ("data", "corpus") for source, num in record.draw for _ in range(num)]
    return float(np.mean(batches.truncated(drawn, ends), where=where)) if where.any() else 0.0


def report_cut(name: str, completions: Sequence[Sequence[int]], max_tokens: int, *, masked: bool) -> None:
    """One line if completions that somebody wrote are longer than ``max_tokens``: how many, how long, what becomes.

    Args:
      name: What they are.
      completions: Token ids, the end included.
      max_tokens: At which they are cut.
      masked: Whether those are left out of the loss.
    """
    sizes = np.array([len(tokens) for tokens in completions], int)
    if cut := int(np.sum(sizes > max_tokens)):
        fate = "are left out of the loss" if masked else "are learned without an end"
        _LOG.warning(
            "%s: %d of %d completions have more than max_tokens=%d tokens, the longest %d; they are cut there and %s",
            name, cut, len(sizes), max_tokens, sizes.max(), fate,
        )  # fmt: skip
