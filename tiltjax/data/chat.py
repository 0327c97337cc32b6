"""Conversations as text: what a message may hold, what the chat template makes of a prompt and of a completion."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tiltjax.data.notes import warn_once
from tiltjax.data.template import render_template

__all__ = [
    "Conversation",
    "Message",
    "Segment",
    "Text",
    "added_turns",
    "open_turn",
    "plain_message",
    "prompt_text",
    "render",
    "transcript",
    "without_nulls",
]

_LOG = logging.getLogger(__name__)

Message = dict[str, Any]
"""``{"role": ..., "content": ...}``."""

Conversation = list[Message]
"""Messages, the oldest first."""

Text = str | Conversation
"""A prompt or a completion."""

Segment = tuple[str, bool]
"""A part of a completion's text, and whether the assistant wrote it: the rest is not learned from."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
"""Names under which messages carry their thoughts; templates read the first, or the second."""

_OPENED = re.compile(r"[<\[](\w+)[>\]](\s*)$")
"""A tag that a prompt leaves open for the answer, such as ``<think>``, and the blanks behind it."""

_MARK = "\ue000\ue001"
"""Characters of the private use area, which no message has."""


def without_nulls(value: Any) -> Any:
    """The value without the entries of its objects that are null, at every depth.

    A table stores objects of different keys as one type and fills in a null for every key that another row has.

    Example:
      >>> without_nulls({"arguments": {"city": "Oslo", "zone": None}, "parts": [{"text": "a", "image": None}]})
      {'arguments': {'city': 'Oslo'}, 'parts': [{'text': 'a'}]}
    """
    if isinstance(value, Mapping):
        return {str(key): without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(part) for part in value]
    return value.item() if isinstance(value, np.generic) else value


def plain_message(name: str, message: Mapping[str, Any]) -> Message:
    """A message as templates and rewards read it: without nulls, its content one text.

    Args:
      name: Of the message, for errors.
      message: Role, content and whatever else. The content may be a list of parts ``{"type": "text", "text": ...}``,
        which are joined.

    Returns:
      A new message.

    Raises:
      ValueError: If a part of the content is not text; it is named.
    """
    plain = without_nulls(message)
    content = plain.get("content")
    if isinstance(content, list):
        for i, part in enumerate(content):
            kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise ValueError(f"{name}.content[{i}] is a part of type {kind!r}; only parts of text are read")
        plain["content"] = "".join(part["text"] for part in content)
    return plain


def prompt_text(prompt: Text) -> str:
    """The prompt as rewards read it: a text as it is; of a conversation, the last message of the user.

    Example:
      >>> prompt_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
      'Hello'
    """
    if isinstance(prompt, str):
        return prompt
    said = [_content(message) for message in prompt if message["role"] == "user"]
    return said[-1] if said else ""


def transcript(prompt: Text) -> str:
    r"""The whole prompt for a reader: a text as it is; of a conversation, every message after the name of its role.

    Example:
      >>> transcript([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}])
      'system: Be brief.\n\nuser: Hello'
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return _content(prompt[0])
    return "\n\n".join(f"{message['role']}: {_content(message)}" for message in prompt)


def _content(message: Mapping[str, Any]) -> str:
    return plain_message("message", message).get("content", "")


def open_turn(tokenizer: Any, prompt: Conversation, name: str, options: Mapping[str, Any] | None = None) -> str:
    """The text of a prompt, up to where the assistant writes.

    If the last message is the assistant's, the text ends with it, for the completion to continue.

    Args:
      tokenizer: With a chat template.
      prompt: Messages.
      name: Of the prompt, for errors.
      options: What the template is given beside the messages, such as ``tools``.

    Returns:
      The text.

    Raises:
      ValueError: If there is no chat template, or it refuses the conversation.
    """
    if not prompt or prompt[-1].get("role") != "assistant":
        return render(tokenizer, prompt, name, options, add_generation_prompt=True)
    last = plain_message(name, prompt[-1])
    marked = {**last, "content": f"{last.get('content', '')}{_MARK} "}
    text = render(tokenizer, [*prompt[:-1], marked], name, options)
    before, mark, after = text.rpartition(_MARK)
    if not mark:
        raise ValueError(f"{name}: the chat template leaves out the assistant's message that is to be continued")
    # A template that strips its messages strips the space behind the mark, and would strip the message's own.
    return before if after.startswith(" ") else before.rstrip()


def added_turns(
    tokenizer: Any,
    prompt: Text | None,
    completion: Conversation,
    name: str,
    options: Mapping[str, Any] | None = None,
) -> list[Segment]:
    """What a completion adds to the text of its prompt: the template of both, less that of the prompt.

    An answer is learned as it is written. Templates that leave out the thoughts of past answers do not write it whole:
    such an answer follows the open turn of its prompt as it is, less what the prompt has opened already.

    Args:
      tokenizer: With a chat template.
      prompt: Messages.
      completion: Messages, the assistant's first.
      name: Of the completion, for errors.
      options: As for `open_turn`.

    Returns:
      Segments of text, in order, those of the assistant marked. Each is encoded apart: at their borders others write.

    Raises:
      ValueError: If the prompt is no conversation, the completion is not the assistant's, or the template writes
        neither the prompt nor an answer as it is.
    """
    if prompt is None or isinstance(prompt, str):
        raise ValueError(f"{name} is a conversation, so its prompt must be given as a conversation")
    if not completion or completion[0].get("role") != "assistant":
        raise ValueError(f"{name} must begin with a message of the assistant")
    before = open_turn(tokenizer, prompt, name, options)
    turns = [plain_message(name, message) for message in completion]
    whole = render(tokenizer, _followed(prompt, turns), name, options)
    continues = whole.startswith(before)
    if len(turns) > 1:
        if not continues:
            raise ValueError(
                f"{name}: the chat template does not begin the first answer as it opens it: {before[-30:]!r}"
            )
        return _segments(tokenizer, prompt, turns, whole, len(before), name, options)
    if continues and _left_out(whole, len(before), len(whole), turns[0]) is None:
        return [(whole[len(before) :], True)]
    return [(_as_written(before, turns[0], name), True)]


def _followed(prompt: Conversation, turns: Conversation) -> Conversation:
    """Prompt and completion; an assistant's message that the prompt has begun is one message with what continues it."""
    if turns and prompt and prompt[-1].get("role") == "assistant":
        begun = plain_message("prompt", prompt[-1])
        joined = {**begun, **turns[0], "content": begun.get("content", "") + turns[0].get("content", "")}
        return [*prompt[:-1], joined, *turns[1:]]
    return [*prompt, *turns]


def _left_out(text: str, start: int, end: int, turn: Message) -> str | None:
    """What the assistant says in a turn and a part of a text does not have, blanks aside; None if it has all of it."""
    opened = _OPENED.search(text[:start])
    shown = "".join(text[start if opened is None else opened.start() : end].split())
    for key in ("content", *_REASONING):
        said = turn.get(key)
        if isinstance(said, str) and "".join(said.split()) not in shown:
            return key
    return None


def _as_written(before: str, turn: Message, name: str) -> str:
    content = turn.get("content", "")
    if left_out := [key for key in ("tool_calls", *_REASONING) if turn.get(key)]:
        raise ValueError(f"{name}: the chat template leaves out its {left_out[0]}")
    opened = _OPENED.search(before)
    if opened is None:
        return content
    tag = opened[0].rstrip()
    if content.lstrip().startswith(tag):
        return content.lstrip().removeprefix(tag).removeprefix(opened[2])
    closing = f"{tag[0]}/{tag[1:]}"
    if closing not in content:
        raise ValueError(
            f"{name}: the chat template opens {tag} for the answer, and the answer has neither {tag} nor {closing}; "
            "write its thoughts, or have the template open none by chat_template_kwargs"
        )
    return content


def _segments(
    tokenizer: Any,
    prompt: Conversation,
    turns: Conversation,
    whole: str,
    start: int,
    name: str,
    options: Mapping[str, Any] | None,
) -> list[Segment]:
    """Cuts the text of several turns into those of the assistant, each with its end, and all that is between."""
    spoken = [k for k, turn in enumerate(turns) if turn["role"] == "assistant"]
    starts = [start]
    for k in spoken[1:]:
        opened = render(tokenizer, _followed(prompt, turns[:k]), name, options, add_generation_prompt=True)
        if not whole.startswith(opened):
            raise ValueError(f"{name}: the chat template writes what is before turn {k} otherwise once more follow")
        starts.append(len(opened))
    ends = _end_marks(tokenizer, prompt, name, options)
    segments: list[Segment] = []
    for k, at, limit in zip(spoken, starts, [*starts[1:], len(whole)], strict=True):
        end = limit
        if k < len(turns) - 1:
            alone = render(tokenizer, _followed(prompt, turns[: k + 1]), name, options).rstrip()
            end = len(alone) if whole.startswith(alone) else at + _end_of_turn(ends, whole[at:limit], k, name)
        if missing := _left_out(whole, at, end, turns[k]):
            raise ValueError(
                f"{name}: the chat template leaves out the {missing} of turn {k} where more follow; give each answer a "
                "row of its own"
            )
        segments += [(whole[at:end], True), (whole[end:limit], False)]
    return [segment for segment in segments if segment[0]]


def _end_marks(tokenizer: Any, prompt: Conversation, name: str, options: Mapping[str, Any] | None) -> list[str]:
    """Special tokens with which a turn may end: all but those that open one of the assistant."""
    asked = prompt[:-1] if prompt and prompt[-1].get("role") == "assistant" else prompt
    if not asked:
        return []
    closed, opened = (
        tokenizer.encode(render(tokenizer, asked, name, options, add_generation_prompt=opens), add_special_tokens=False)
        for opens in (False, True)
    )
    same = next((i for i, (a, b) in enumerate(zip(closed, opened, strict=False)) if a != b), len(closed))
    opening = opened[same:]
    return [tokenizer.convert_ids_to_tokens(i) for i in tokenizer.all_special_ids if i not in opening]


def _end_of_turn(marks: Sequence[str], text: str, k: int, name: str) -> int:
    """How much of a text that begins with turn k is the turn, its end included, where that is written another way."""
    ends = [text.find(mark) + len(mark) for mark in marks if mark in text]
    if not ends:
        raise ValueError(f"{name}: the chat template does not say where turn {k} ends")
    return min(ends)


def render(
    tokenizer: Any,
    messages: Sequence[Message],
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    add_generation_prompt: bool = False,
) -> str:
    """The text that the chat template makes of messages.

    Args:
      tokenizer: With a chat template.
      messages: At least one.
      name: Of the conversation, for errors.
      options: As for `open_turn`.
      add_generation_prompt: Whether the assistant's turn is opened at the end.

    Returns:
      The text.

    Raises:
      ValueError: If there is no chat template, or it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise ValueError(f"{name} is a conversation, but the tokenizer has no chat template")
    plain = [_with_thoughts(plain_message(f"{name}[{i}]", message)) for i, message in enumerate(messages)]
    if not plain:
        raise ValueError(f"{name} is a conversation without messages")
    given = {"tools": None, "documents": None, **without_nulls(options or {})}
    variables = {
        **tokenizer.special_tokens_map,
        **given,
        "messages": plain,
        "add_generation_prompt": add_generation_prompt,
    }
    template = tokenizer.get_chat_template(None, given["tools"])
    for option in given:
        if given[option] is not None and option not in template:
            warn_once(_LOG, f"the chat template has no use for {option!r}: it is not read")
    try:
        return render_template(template, variables)
    except ValueError as error:
        raise ValueError(f"{name}: the chat template refuses the conversation: {error}") from None


def _with_thoughts(message: Message) -> Message:
    thoughts = next((message[key] for key in _REASONING if key in message), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}
