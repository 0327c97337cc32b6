"""What a record may need besides prompts and a reward: demonstrations, a corpus, a cost.

`tiltjax.align.settings.NEEDS` says which setting a record cannot do without; `load_inputs` reads what they name.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from tiltjax.align.law import report_cut
from tiltjax.align.settings import NEEDS, Settings
from tiltjax.data import text
from tiltjax.data.candidates import Candidates, alike, pad, supervised, take
from tiltjax.data.datasets import DataError, read, with_columns
from tiltjax.data.rows import parse_row
from tiltjax.rewards.gate import required_columns
from tiltjax.rewards.registry import load_reward, reward_code
from tiltjax.train.learned_reward import LearnedReward, load_reward_model
from tiltjax.train.method import Feedback, Method
from tiltjax.types import Array, Bool, Int, PRNGKey

__all__ = [
    "LEARNED",
    "Inputs",
    "load_cost",
    "load_inputs",
    "needed_columns",
    "read_inputs",
]

LEARNED = "model:"
"""Before the directory of a reward model of `experiments.reward_model`."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the settings of `tiltjax.align.settings.NEEDS` name.

    Attributes:
      demonstrations: Token ids of the demonstrations of every training prompt, or None.
      learned: For each of their tokens whether it is learned from; None means all.
      corpus: One completion for each of its own prompts, or None.
      cost: A reward whose values above 0 mean harm, or None.
      fingerprint: Of all of it; empty where there is nothing.
    """

    demonstrations: list[list[list[int]]] | None = None
    learned: list[list[list[bool]]] | None = None
    corpus: Candidates | None = None
    cost: Any = None
    fingerprint: str = ""

    def demonstrated(self, key: PRNGKey, rows: Int[Array, " B"], prompts: Candidates, num: int) -> Candidates:
        """``num`` demonstrations of each of the training prompts ``rows``, in an order that the key decides."""
        assert self.demonstrations is not None
        rng = _generator(key)
        each = [np.resize(rng.permutation(len(self.demonstrations[row])), num).tolist() for row in rows]
        picked = [(int(row), i) for row, places in zip(rows, each, strict=True) for i in places]
        return self._undrawn(prompts, picked, (len(rows), num))

    def each(self, prompts: Candidates) -> tuple[Candidates, Int[np.ndarray, " R"]]:
        """Every demonstration of every training prompt as a row of its own, with its prompt; and whose each is."""
        assert self.demonstrations is not None
        picked = [(row, i) for row, told in enumerate(self.demonstrations) for i in range(len(told))]
        rows = np.array([row for row, _ in picked])
        return self._undrawn(take(prompts, rows), picked, (len(picked), 1)), rows

    def _undrawn(self, prompts: Candidates, picked: list[tuple[int, int]], shape: tuple[int, int]) -> Candidates:
        """Those demonstrations ``(row, place)`` as candidates, cut at the width of the completions."""
        assert self.demonstrations is not None
        T = prompts.completion.shape[-1]
        tokens, mask = pad([self.demonstrations[row][i] for row, i in picked], length=T, truncate="right")
        loss_mask = None
        if self.learned is not None:
            rows = [np.asarray(self.learned[row][i], np.int32) for row, i in picked]
            loss_mask = (pad(rows, length=T, truncate="right")[0] > 0).reshape(*shape, T)
        return Candidates(
            prompt=prompts.prompt,
            prompt_mask=prompts.prompt_mask,
            completion=tokens.reshape(*shape, T),
            completion_mask=mask.reshape(*shape, T),
            loss_mask=loss_mask,
            old_token_logp=np.zeros((*shape, T), np.float32),
        )

    def mixed_in(self, key: PRNGKey, place: Bool[np.ndarray, " N"], drawn: Candidates, told: Feedback) -> tuple:
        """Appends one row of the corpus per prompt, at the corpus's candidate index; its other candidates are masked.

        Args:
          key: Decides which texts.
          place: True where a place is the corpus's.
          drawn: Candidates; what stands in those places does not count.
          told: Of them.

        Returns:
          Candidates and feedback of twice the rows.
        """
        assert self.corpus is not None
        B, N, T = drawn.completion.shape
        S = max(drawn.prompt.shape[1], self.corpus.prompt.shape[1])
        support, mine = drawn.support, dataclasses.replace(drawn, support=None)
        drawn, corpus = alike([mine, self.corpus])
        text_ = take(corpus, _generator(key).integers(len(self.corpus.prompt), size=B))
        wide = lambda x: np.pad(x, [(0, 0), (0, S - x.shape[1])])  # noqa: E731
        every = lambda x: np.broadcast_to(x, (B, N, T))  # noqa: E731
        where = np.stack([np.broadcast_to(~place, (B, N)), np.broadcast_to(place, (B, N))])
        both = lambda a, b: np.concatenate([a, b])  # noqa: E731
        mask = both(drawn.completion_mask, every(text_.completion_mask)) & where.reshape(2 * B, N, 1)
        batch = Candidates(
            prompt=both(wide(drawn.prompt), wide(text_.prompt)),
            prompt_mask=both(wide(drawn.prompt_mask), wide(text_.prompt_mask)),
            completion=both(drawn.completion, every(text_.completion)),
            completion_mask=mask,
            old_token_logp=both(drawn.old_token_logp, np.zeros((B, N, T), np.float32)),
            where=where.reshape(2 * B, N),
            loss_mask=None if drawn.loss_mask is None else both(drawn.loss_mask, every(text_.loss_mask)),
            support=None if support is None else both(support, np.full_like(support, 255)),
        )
        return batch, jax.tree.map(lambda x: both(x, np.zeros_like(x)), told)


def read_inputs(settings: Settings, record: Method | None, rows: Sequence[Any]) -> dict[str, Any]:
    """The texts of what the record needs; nothing else is opened.

    Args:
      settings: Of the session.
      record: None for a method that is no record.
      rows: The training prompts.

    Returns:
      Setting -> the demonstrations of every prompt, or the rows of the corpus.

    Raises:
      ValueError: In one line, if a demonstration or a column is missing, or a row is bad.
      OSError: If there is no such file.
    """
    wanted = _wanted(record)
    with_columns(rows, needed_columns(settings, record, rows), source=settings.prompts)
    found: dict[str, Any] = {}
    if "demonstrations" in wanted:
        found["demonstrations"] = _demonstrations(settings, rows)
    if "corpus" in wanted:
        found["corpus"] = read(settings.corpus, "supervised", skip_bad=settings.skip_bad_rows)
    return found


def load_inputs(
    settings: Settings,
    record: Method | None,
    rows: Sequence[Any],
    tokenizer: text.Tokenizer,
    texts: dict[str, Any] | None = None,
) -> Inputs:
    """What the record needs, as tokens and as functions.

    Args:
      settings: Of the session.
      record: None for a method that is no record.
      rows: The training prompts.
      tokenizer: Of the policy.
      texts: From `read_inputs`; None reads them.

    Returns:
      `Inputs`.

    Raises:
      ValueError: In one line, if a demonstration or a column is missing, or a model is not one of a cost.
      OSError: If there is no such file.
    """
    texts = read_inputs(settings, record, rows) if texts is None else texts
    found: dict[str, Any] = {}
    parts: list[str] = []
    if "demonstrations" in texts:
        told = texts["demonstrations"]
        prompts = [row.prompt for row, group in zip(rows, told, strict=True) for _ in group]
        templates = [row.template for row, group in zip(rows, told, strict=True) for _ in group]
        places = [row.place for row, group in zip(rows, told, strict=True) for _ in group]
        options: dict[str, Any] = {"prompts": prompts, "templates": templates, "places": places}
        both = text.encode_completions_masked(tokenizer, [one for group in told for one in group], **options)
        report_cut("demonstrations", both[0], settings.max_tokens, masked=settings.mask_truncated)
        ends = np.cumsum([len(group) for group in told]).tolist()
        found["demonstrations"], learned = (
            [flat[end - len(group) : end] for end, group in zip(ends, told, strict=True)] for flat in both
        )
        found["learned"] = None if all(all(bools) for bools in both[1]) else learned
        parts.append(repr(told))
    if "corpus" in texts:
        found["corpus"] = _corpus(settings, texts["corpus"], tokenizer)
        parts.append(hashlib.sha256(found["corpus"].completion.tobytes()).hexdigest())
    if "cost" in _wanted(record):
        cost = found["cost"] = load_cost(
            settings.cost, None if settings.compute_dtype == "auto" else settings.compute_dtype
        )
        parts.append(getattr(cost, "fingerprint", "") or f"{settings.cost} {reward_code(settings.cost)}")
    print_ = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16] if parts else ""
    return Inputs(fingerprint=print_, **found)


def _wanted(record: Method | None) -> list[str]:
    return [] if record is None else [name for name, needs in NEEDS.items() if needs(record)]


def needed_columns(settings: Settings, record: Method | None, rows: Sequence[Any]) -> dict[str, str]:
    """Columns that every prompt must have for what the record is given, and what needs them.

    Args:
      settings: Of the session.
      record: None for a method that is no record.
      rows: Prompts, to know whether the demonstrations are a column of them.

    Returns:
      Column -> what needs it.
    """
    wanted = _wanted(record)
    needs: dict[str, str] = {}
    if "cost" in wanted and not settings.cost.startswith(LEARNED):
        needs |= dict.fromkeys(required_columns(load_reward(settings.cost)), f"cost {settings.cost!r}")
    if "demonstrations" in wanted and _is_column(settings.demonstrations, rows):
        needs[settings.demonstrations] = "--demonstrations"
    return needs


def _is_column(name: str, rows: Sequence[Any]) -> bool:
    return any(name in row.columns for row in rows)


def _demonstrations(settings: Settings, rows: Sequence[Any]) -> list[list[text.Text]]:
    """Of every training prompt: from a column of the prompts, or from a file by its prompts."""
    source = settings.demonstrations
    if _is_column(source, rows):
        return [[_told(row, source)] for row in rows]
    known: dict[str, list] = {}
    try:
        said: list[Any] = read(source, "supervised", skip_bad=settings.skip_bad_rows)
    except FileNotFoundError as error:
        columns = ", ".join(sorted({name for row in rows for name in row.columns})) or "none"
        raise ValueError(
            f"demonstrations must be a column of {settings.prompts} ({columns}) or a file, got {source!r}: {error}"
        ) from None
    for row in said:
        known.setdefault(json.dumps(row.prompt), []).append(row.completion)
    for row in rows:
        if json.dumps(row.prompt) not in known:
            raise ValueError(f"{source}: no completion of the prompt of {row.place}: {row.prompt!r:.80}")
    return [known[json.dumps(row.prompt)] for row in rows]


def _told(row: Any, column: str) -> text.Text:
    """What a column of a prompt has as its demonstration; a number is the text that it is written as."""
    value = row.columns[column]
    value = value if isinstance(value, str | list | dict) else str(value)
    try:
        told: Any = parse_row({"prompt": row.prompt, "completion": value}, "supervised")
    except ValueError as error:
        raise DataError(f"{row.place}: column {column!r} is no demonstration: {error}") from None
    if isinstance(told.completion, str) and not told.completion.strip():
        raise DataError(f"{row.place}: column {column!r} is empty: nothing to learn from")
    return told.completion


def _corpus(settings: Settings, rows: Sequence[Any], tokenizer: text.Tokenizer) -> Candidates:
    """A completion for each of its own prompts; text without one follows BOS, or EOS where the tokenizer has no BOS."""
    start = [tokenizer.bos_token_id if tokenizer.bos_token_id is not None else text.eos_id(tokenizer)]
    asked = [row for row in rows if row.prompt]
    options: dict[str, Any] = {"templates": [row.template for row in asked], "places": [row.place for row in asked]}
    encoded = iter(
        text.encode_prompts(tokenizer, [row.prompt for row in asked], max_tokens=settings.max_tokens, **options)
    )
    prompts = [next(encoded) if row.prompt else start for row in rows]
    options = {"prompts": [row.prompt for row in rows], "templates": [row.template for row in rows]}
    options["places"] = [row.place for row in rows]
    said, learned = text.encode_completions_masked(tokenizer, [row.completion for row in rows], **options)
    report_cut("corpus", said, settings.max_tokens, masked=settings.mask_truncated)
    options = {"pad_id": text.pad_id(tokenizer), "completion_length": settings.max_tokens, "loss_mask": learned}
    return supervised(prompts, said, truncate=True, **options)


def load_cost(spec: str, compute_dtype: str | None = None) -> Callable[..., Any]:
    """A cost by name: a reward whose values above 0 mean harm, or the learned cost of ``model:<directory>``."""
    if not spec.startswith(LEARNED):
        return load_reward(spec)
    model = load_reward_model(spec.removeprefix(LEARNED), compute_dtype=compute_dtype)
    if model.spec.kind != "cost":
        raise ValueError(f"cost {spec!r} must be a reward model of kind 'cost', got kind {model.spec.kind!r}")

    return _LearnedCost(model)


@dataclasses.dataclass(frozen=True)
class _LearnedCost:
    """What a model of kind cost says, in place of the reward that it is made into."""

    model: LearnedReward

    @property
    def fingerprint(self) -> str:
        return self.model.fingerprint

    def __call__(
        self,
        prompts: list[str],
        completions: list[str],
        prompt: list[text.Text] | None = None,
        tools: list | None = None,
        chat_template_kwargs: list | None = None,
    ) -> list[float]:
        rewards = self.model(prompts, completions, prompt, tools, chat_template_kwargs)
        return [-(reward + self.model.spec.offset) for reward in rewards]


def _generator(key: PRNGKey) -> np.random.Generator:
    return np.random.default_rng(np.asarray(jax.random.key_data(key)).tolist())
