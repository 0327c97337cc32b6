"""The law that candidates are drawn from, in an experiment's flags, and what is done with those that are cut.

A completion that has ``max_tokens`` tokens and no end is cut: it keeps what it has, and no end is made up for it.
"""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from tiltjax.data import candidates as batches
from tiltjax.data.candidates import Candidates
from tiltjax.ops.checks import check_at_least, check_fraction, check_positive
from tiltjax.train.config import field
from tiltjax.train.method import Method

__all__ = [
    "LAW",
    "check_law",
    "described",
    "eval_temperature_field",
    "filtered",
    "law",
    "mask_truncated_field",
    "report_cut",
    "share_cut",
    "temperature_field",
    "temperatures",
    "top_k_field",
    "top_p_field",
]

_LOG = logging.getLogger(__name__)

LAW = ("temperature", "top_k", "top_p", "eval_temperature")
"""Flags of the law."""


def temperature_field() -> Any:
    """The field ``temperature`` of an experiment that draws."""
    return field(
        None,
        "Softmax temperature at which completions are drawn, above 0. Losses and KL take the log-probabilities of the "
        "law that drew, filters included. By default that of the method's record (1, unless its paper says otherwise).",
    )


def eval_temperature_field() -> Any:
    """The field ``eval_temperature`` of an experiment that draws."""
    return field(
        None,
        "Softmax temperature at which completions of held-out prompts are drawn, above 0; filters are those of "
        "training. By default --temperature.",
    )


def top_k_field() -> Any:
    """The field ``top_k`` of an experiment that draws."""
    return field(0, "Draw among the k most probable tokens only; 0 draws among all.")


def top_p_field() -> Any:
    """The field ``top_p`` of an experiment that draws."""
    return field(
        1.0,
        "Draw among the most probable tokens of this mass only, in (0, 1]; 1 draws among all. With it or --top_k, one "
        "bit per vocabulary entry and drawn token is kept, for the losses.",
    )


def mask_truncated_field() -> Any:
    """The field ``mask_truncated`` of an experiment that trains by a method."""
    return field(
        False,
        "Whether completions that --max_tokens cut (drawn, demonstrated or of the corpus) are left out of the loss. "
        "Rewards, baselines and labels still see them.",
    )


def temperatures(config: Any, record: Method | None) -> dict[str, float]:
    """What the two temperatures of a configuration mean where they say nothing."""
    own = 1.0 if record is None else record.temperature
    drawn = own if config.temperature is None else config.temperature
    return {"temperature": drawn, "eval_temperature": config.eval_temperature or drawn}


def check_law(config: Any) -> None:
    """Raises ValueError if a flag of the law is out of its range."""
    for name in ("temperature", "eval_temperature"):
        check_positive(name, getattr(config, name))
    check_at_least("top_k", config.top_k, 0)
    check_fraction("top_p", config.top_p)


def law(config: Any, *, evaluation: bool = False) -> dict[str, Any]:
    """The law as `tiltjax.train.rollout.make_sampler` takes it.

    Args:
      config: With the fields of `LAW`, temperatures resolved.
      evaluation: Whether of held-out prompts.

    Returns:
      ``temperature``, ``top_k`` and ``top_p``; None for a filter that is off.
    """
    temperature = config.eval_temperature if evaluation else config.temperature
    return {
        "temperature": temperature,
        "top_k": config.top_k or None,
        "top_p": None if config.top_p == 1 else config.top_p,
    }


def filtered(config: Any) -> bool:
    """Whether a filter is on."""
    return bool(config.top_k) or config.top_p < 1


def described(config: Any, *, evaluation: bool = False) -> str:
    """The law in words, such as "temperature 0.7, top-p 0.9"."""
    facts = law(config, evaluation=evaluation)
    filters = [f"top-{name[-1]} {facts[name]:g}" for name in ("top_k", "top_p") if facts[name] is not None]
    return ", ".join([f"temperature {facts['temperature']:g}", *filters])


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
