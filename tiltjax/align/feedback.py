"""Everything that a record learns about candidates: rewards, costs, labels, votes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from tiltjax.align.session import Session
from tiltjax.data.candidates import Candidates
from tiltjax.rewards.internal import cluster_answers
from tiltjax.rewards.verifiers import as_number, extract_answer
from tiltjax.train.method import Feedback, Method
from tiltjax.types import Array, Int

__all__ = ["answer_ids", "feedback"]


def feedback(session: Session, record: Method, rows: Int[Array, " B"], drawn: Candidates) -> Feedback:
    """Everything that the record learns about candidates of the training prompts ``rows``, in NumPy.

    The reward is always there: what does not learn from it is measured by it. What the candidates have as their reward
    is not asked again.

    Args:
      session: Of the run.
      record: Of the method.
      rows: B indices of training prompts.
      drawn: Candidates of them.

    Returns:
      Feedback, ``[B, N]``.
    """
    settings, prompts, texts = session.settings, [session.rows["train"][i] for i in rows], session.texts(drawn)
    reward = np.float32(session.score(prompts, texts) if drawn.reward is None else drawn.reward)
    told: dict[str, Any] = {}
    if record.constrained:
        told["cost"] = np.float32(session.score(prompts, texts, reward=session.inputs.cost, name=settings.cost))
    if settings.desirable_above is not None:
        told["correct"] = reward > settings.desirable_above
    if record.feedback == "vote":
        told["answer"] = answer_ids(prompts, texts)
    return Feedback(reward=reward, **told)


def answer_ids(rows: Sequence[Any], texts: Sequence[Sequence[str]]) -> Int[np.ndarray, "B N"]:
    """Which candidates of a prompt give the same answer, -1 where there is none.

    The answer is found by the rule of `tiltjax.rewards.verifiers`. Where the rows have a column "answer", its form
    alone is used: that it is a number, how many lines it has.

    Args:
      rows: B prompt rows.
      texts: N completions of each.

    Returns:
      Ids, counted per prompt.
    """

    def group(row: Any, said: Sequence[str]) -> np.ndarray:
        gold = row.columns.get("answer")
        gold = None if gold is None else str(gold)
        found: list[str | None] = [extract_answer(one, gold) for one in said]
        if gold is not None and as_number(gold) is not None:
            found = [one if one is not None and as_number(one) is not None else None for one in found]
        return cluster_answers(found, equivalent=_same)

    return np.stack([group(row, said) for row, said in zip(rows, texts, strict=True)])


def _same(one: str, other: str) -> bool:
    value = as_number(one)
    return value == as_number(other) if value is not None else one.casefold().split() == other.casefold().split()
