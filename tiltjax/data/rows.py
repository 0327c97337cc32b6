"""Rows of training data, one type a kind, and what a record must have to become one.

The columns are the ones that TRL reads, standard (text) or conversational (lists of ``{"role", "content"}``):

    kind          columns
    prompt        prompt
    supervised    prompt, completion; or messages (the last turn is the completion); or text (the prompt is empty)
    pair          prompt, chosen, rejected; or chosen, rejected that begin with the same prompt; margin, if it is there
    unpaired      prompt, completion, label (true or false)
    ranked        prompt, completions, rewards (one number per completion, higher is better)

Texts without a column for their prompt are cut as `tiltjax.data.shared_prompt` says. A margin is a number >= 0, by how
much the chosen completion should lead, reward units. It is never made of the scores that some data have beside the
completions (``score_chosen``, ``score_rejected``, ``chosen_score``, ``rejected_score``), but scores that contradict the
choice are refused.

Other columns ride along. Two of them change what a conversation becomes: ``tools`` (JSON schemas) and
``chat_template_kwargs`` (an object), each as it is or as JSON text; `Row.template` is what the chat template is given.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tiltjax.data import shared_prompt
from tiltjax.data.chat import Text, plain_message
from tiltjax.ops.checks import check_choice

__all__ = ["KINDS", "ROLES", "PairRow", "PromptRow", "RankedRow", "Row", "SupervisedRow", "UnpairedRow", "parse_row"]

KINDS = ("pair", "prompt", "ranked", "supervised", "unpaired")
"""What a row can be."""

ROLES = ("assistant", "developer", "system", "tool", "user")
"""Who can say a message."""

_OURS = ("add_generation_prompt", "continue_final_message", "conversation", "messages", "tokenize", "tools")
"""Options of a chat template that the library sets itself."""


class _Template:
    """What every kind of row has beside its texts."""

    columns: dict[str, Any]

    @property
    def template(self) -> dict[str, Any]:
        """What the chat template is given beside the messages: ``tools`` and what ``chat_template_kwargs`` holds."""
        tools = {"tools": self.columns["tools"]} if self.columns.get("tools") else {}
        return tools | (self.columns.get("chat_template_kwargs") or {})


def _place() -> Any:
    # Where a row stands is no part of what it says: rows of a moved file are equal, and print alike.
    return dataclasses.field(default="", repr=False, compare=False)


@dataclass(frozen=True)
class PromptRow(_Template):
    """A prompt to complete.

    Attributes:
      prompt: Text or conversation.
      columns: Every other column, such as the right answer.
      place: Where it was read: file and line.
    """

    prompt: Text
    columns: dict[str, Any]
    place: str = _place()


@dataclass(frozen=True)
class SupervisedRow(_Template):
    """A prompt and the completion to imitate.

    Attributes:
      prompt: Text or conversation; the empty text where the data had none.
      completion: Text or conversation.
      columns: Every other column.
      place: Where it was read: file and line.
    """

    prompt: Text
    completion: Text
    columns: dict[str, Any]
    place: str = _place()


@dataclass(frozen=True)
class PairRow(_Template):
    """A prompt and two completions, one of them preferred.

    Attributes:
      prompt: Text or conversation.
      chosen: The preferred completion, without the prompt.
      rejected: The other one, without the prompt.
      columns: Every other column.
      margin: By how much the chosen one should lead, >= 0, reward units; None where the data does not say.
      place: Where it was read: file and line.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    columns: dict[str, Any]
    margin: float | None = None
    place: str = _place()


@dataclass(frozen=True)
class UnpairedRow(_Template):
    """A prompt and a completion that was judged alone.

    Attributes:
      prompt: Text or conversation.
      completion: Text or conversation.
      label: True if it is wanted.
      columns: Every other column.
      place: Where it was read: file and line.
    """

    prompt: Text
    completion: Text
    label: bool
    columns: dict[str, Any]
    place: str = _place()


@dataclass(frozen=True)
class RankedRow(_Template):
    """A prompt and N completions with a reward each.

    Attributes:
      prompt: Text or conversation.
      completions: N texts or conversations.
      rewards: N finite numbers, higher is better.
      columns: Every other column.
      place: Where it was read: file and line.
    """

    prompt: Text
    completions: list[Text]
    rewards: list[float]
    columns: dict[str, Any]
    place: str = _place()


Row = PromptRow | SupervisedRow | PairRow | UnpairedRow | RankedRow
"""A row of any kind."""


def parse_row(record: Any, kind: str, *, place: str = "") -> Row:
    """Checks one record and takes its prompt and completions out of its columns.

    Args:
      record: Column names and plain Python values.
      kind: One of `KINDS`.
      place: Where it was read, kept with the row.

    Returns:
      The row; columns that its kind does not use are in ``columns``.

    Raises:
      ValueError: With the reason, in one line, if the record is not a good row of this kind.

    Example:
      >>> row = parse_row({"chosen": "The sky is blue.", "rejected": "The sky is green.", "id": 7}, "pair")
      >>> row.prompt, row.chosen, row.rejected, row.columns
      ('The sky is', ' blue.', ' green.', {'id': 7})
    """
    check_choice("kind", kind, KINDS)
    if not isinstance(record, dict):
        raise ValueError(f"a row must be an object, got {_kind_of(record)}")
    columns = _with_template(dict(record))
    try:
        return dataclasses.replace(_PARSERS[kind](columns), place=place)
    except KeyError as missing:
        raise ValueError(f"no column {missing}; columns: {', '.join(record) or 'none'}") from None


def _with_template(columns: dict[str, Any]) -> dict[str, Any]:
    """The columns with ``tools`` and ``chat_template_kwargs`` as lists and objects, and without those that are null."""
    for name, form in (("tools", list), ("chat_template_kwargs", dict)):
        value = columns.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value or "null")
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{name} is a text, but not JSON: {error}") from None
        if value is None:
            columns.pop(name, None)
            continue
        if not isinstance(value, form):
            raise ValueError(f"{name} must be {_NAMES[form]}, got {_kind_of(value)}")
        columns[name] = value
    for i, tool in enumerate(columns.get("tools", [])):
        if not isinstance(tool, dict):
            raise ValueError(f"tools[{i}] must be an object, got {_kind_of(tool)}")
    for option in _OURS:
        if option in columns.get("chat_template_kwargs", {}):
            raise ValueError(f"chat_template_kwargs must not set {option!r}: the library does")
    return columns


def _parse_prompt(columns: dict[str, Any]) -> PromptRow:
    return PromptRow(_pop_prompt(columns), columns)


def _parse_supervised(columns: dict[str, Any]) -> SupervisedRow:
    if "completion" not in columns and "messages" in columns:
        messages = _pop_text(columns, "messages")
        if isinstance(messages, str) or len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise ValueError("messages must be a conversation that ends with the assistant's answer")
        return SupervisedRow(messages[:-1], messages[-1:], columns)
    if "completion" not in columns and "text" in columns:
        text = _pop_text(columns, "text")
        if not isinstance(text, str) or not text.strip():
            raise ValueError("text must be a text that is not empty")
        return SupervisedRow("", text, columns)
    prompt = _pop_prompt(columns)
    return SupervisedRow(prompt, _pop_completion(columns, "completion", prompt), columns)


def _parse_pair(columns: dict[str, Any]) -> PairRow:
    chosen, rejected = _pop_text(columns, "chosen"), _pop_text(columns, "rejected")
    if chosen == rejected:
        raise ValueError("chosen and rejected are equal")
    # Beside conversations that begin with the prompt, some datasets repeat it as text: that column rides along.
    if "prompt" in columns and (isinstance(chosen, str) or not isinstance(columns["prompt"], str)):
        prompt = _pop_prompt(columns)
    else:
        prompt, chosen, rejected = _split_prompt(chosen, rejected)
    for name, completion in (("chosen", chosen), ("rejected", rejected)):
        _check_completion(name, completion, prompt)
    _check_scores(columns)
    margin = columns.pop("margin", None)
    if margin is not None and _number("margin", margin) < 0:
        raise ValueError(f"margin must be at least 0, got {margin}: the chosen completion leads")
    return PairRow(prompt, chosen, rejected, columns, margin=None if margin is None else float(margin))


def _check_scores(columns: dict[str, Any]) -> None:
    for names in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
        scores = [columns.get(name) for name in names]
        if None in scores:
            continue
        high, low = (_number(name, score) for name, score in zip(names, scores, strict=True))
        if high < low:
            raise ValueError(f"{names[0]} = {high:g} is below {names[1]} = {low:g}: the pair is the wrong way round")


def _parse_unpaired(columns: dict[str, Any]) -> UnpairedRow:
    prompt = _pop_prompt(columns)
    completion, label = _pop_completion(columns, "completion", prompt), columns.pop("label")
    if not isinstance(label, bool):
        raise ValueError(f"label must be true or false, got {_kind_of(label)}")
    return UnpairedRow(prompt, completion, label, columns)


def _parse_ranked(columns: dict[str, Any]) -> RankedRow:
    prompt, completions, rewards = _pop_prompt(columns), columns.pop("completions"), columns.pop("rewards")
    for name, values in (("completions", completions), ("rewards", rewards)):
        if not isinstance(values, list) or not values:
            raise ValueError(f"{name} must be a list that is not empty, got {_kind_of(values)}")
    if len(completions) != len(rewards):
        raise ValueError(f"{len(completions)} completions but {len(rewards)} rewards")
    texts = [_text(f"completions[{i}]", value) for i, value in enumerate(completions)]
    for i, text in enumerate(texts):
        _check_completion(f"completions[{i}]", text, prompt)
    return RankedRow(prompt, texts, [_number(f"rewards[{i}]", reward) for i, reward in enumerate(rewards)], columns)


_PARSERS: dict[str, Callable[[dict[str, Any]], Row]] = {
    "pair": _parse_pair,
    "prompt": _parse_prompt,
    "ranked": _parse_ranked,
    "supervised": _parse_supervised,
    "unpaired": _parse_unpaired,
}


def _pop_text(columns: dict[str, Any], name: str) -> Text:
    return _text(name, columns.pop(name))


def _pop_prompt(columns: dict[str, Any]) -> Text:
    prompt = _pop_text(columns, "prompt")
    blank = [prompt] if isinstance(prompt, str) else [message.get("content", "") for message in prompt]
    if not any(text.strip() for text in blank):
        raise ValueError("prompt is empty")
    return prompt


def _pop_completion(columns: dict[str, Any], name: str, prompt: Text) -> Text:
    completion = _pop_text(columns, name)
    _check_completion(name, completion, prompt)
    return completion


def _check_completion(name: str, completion: Text, prompt: Text) -> None:
    if isinstance(completion, str):
        return
    if isinstance(prompt, str):
        raise ValueError(f"{name} is a conversation but prompt is a text")
    if not completion or completion[0]["role"] != "assistant":
        raise ValueError(f"{name} must begin with a message of the assistant")


def _text(name: str, value: Any) -> Text:
    if isinstance(value, str):
        return value
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        # TFDS stores a list of messages column by column.
        if len({len(column) for column in value.values()}) > 1:
            raise ValueError(f"{name} has columns of unequal lengths")
        value = [dict(zip(value, message, strict=True)) for message in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a text or a list of messages, got {_kind_of(value)}")
    return [_message(f"{name}[{i}]", message) for i, message in enumerate(value)]


def _message(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a message with role and content, got {_kind_of(value)}")
    message = plain_message(name, value)
    if message.get("role") not in ROLES:
        raise ValueError(f"{name} has unknown role {message.get('role')!r}; known: {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str) and not ("content" not in message and "tool_calls" in message):
        raise ValueError(f"{name} must have a text as content, got {_kind_of(message.get('content'))}")
    return message


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {_kind_of(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def _split_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    if isinstance(chosen, str) and isinstance(rejected, str):
        return shared_prompt.split(chosen, rejected)
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError("chosen and rejected must both be texts or both be conversations")
    size = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    size = min(len(chosen), len(rejected)) if size is None else size
    if not size:
        raise ValueError("no prompt: chosen and rejected do not begin alike")
    return chosen[:size], chosen[size:], rejected[size:]


_NAMES = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text"}
_NAMES |= {list: "a list", dict: "an object", bytes: "bytes"}


def _kind_of(value: Any) -> str:
    return _NAMES.get(type(value), type(value).__name__)
