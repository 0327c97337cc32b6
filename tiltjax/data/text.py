"""Text to tokens and back: tokenizers from Hugging Face folders or GGUF files, chat templates, BOS, PAD and what ends.

A prompt or a completion is a text or a conversation (a list of ``{"role", "content"}``). The two are encoded apart, as
they meet when a model writes a completion after a prompt, so no token straddles their border.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tiltjax.data.chat import Conversation, Message, Segment, Text, added_turns, open_turn, prompt_text, render
from tiltjax.data.continuation import decode_continuation, encode_continuation
from tiltjax.data.limits import check_ids, check_positions
from tiltjax.data.notes import warn_once
from tiltjax.data.template import TODAY
from tiltjax.data.tokenizer_files import load_tokenizer
from tiltjax.types import Array, Bool, Int

__all__ = [
    "Conversation",
    "Message",
    "Text",
    "Tokenizer",
    "decode_completions",
    "encode_completions",
    "encode_completions_masked",
    "encode_prompts",
    "end_ids",
    "eos_id",
    "load_tokenizer",
    "pad_id",
    "prompt_text",
    "tokenizer_fingerprint",
]

# transformers advises everybody without torch to install it; the library uses its tokenizers only.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_LOG = logging.getLogger(__name__)

Tokenizer = Any
"""A Hugging Face tokenizer (`transformers.PreTrainedTokenizerBase`)."""


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Every id that ends a completion, each once.

    Chat models end a turn with another token than a text: ``<|im_end|>``, where the tokenizer's EOS is
    ``<|endoftext|>``. A completion ends at the first of any of them, which belongs to it.

    Args:
      tokenizer: From `load_tokenizer`.

    Returns:
      The tokenizer's EOS, then the ids that ``generation_config.json`` and ``config.json`` name under
      ``eos_token_id``; of a GGUF file those of its EOS, end of turn and end of message.

    Raises:
      ValueError: If there is none.
    """
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ends = tuple(dict.fromkeys([*own, *getattr(tokenizer, "model_ends", ())]))
    if not ends:
        raise ValueError("the tokenizer has no EOS token; set tokenizer.eos_token")
    return ends


def eos_id(tokenizer: Tokenizer) -> int:
    """The id that ends a text: EOS, or the first of `end_ids` in a tokenizer without; ValueError if there is none."""
    return end_ids(tokenizer)[0]


def _turn_end(tokenizer: Tokenizer) -> int:
    """The id of `end_ids` with which the chat template ends an assistant's turn; EOS where it writes none of them."""
    if len(end_ids(tokenizer)) > 1 and tokenizer.chat_template:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        try:
            end = _ending(tokenizer, render(tokenizer, turns, "a turn"))[1]
        except ValueError:
            end = None  # A template that wants other messages.
        return eos_id(tokenizer) if end is None else end
    return eos_id(tokenizer)


def _ending(tokenizer: Tokenizer, text: str) -> tuple[str, int | None]:
    """The text up to the one of `end_ids` that stands last in it, blanks apart, and that id; None where none does."""
    bare = text.rstrip()
    for end in end_ids(tokenizer):
        name = tokenizer.convert_ids_to_tokens(end)
        if name and bare.endswith(name):
            return bare.removesuffix(name), end
    return text, None


def pad_id(tokenizer: Tokenizer) -> int:
    """The id written where there is no token: PAD, or EOS in a tokenizer without PAD."""
    return eos_id(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def encode_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[Text],
    *,
    templates: Sequence[Mapping[str, Any]] | None = None,
    places: Sequence[str] | None = None,
    max_tokens: int = 0,
) -> list[list[int]]:
    """Token ids of every prompt.

    A text is encoded as it is, after BOS where the tokenizer begins its texts with one; the empty text, where there
    is a BOS token, is BOS alone. A conversation goes through the chat template, up to where the assistant's turn
    begins; if the last message is the assistant's, the completion continues it.

    Args:
      tokenizer: From `load_tokenizer`.
      prompts: B texts or conversations.
      templates: What the chat template is given beside the messages of each, such as ``tools``: `Row.template`.
      places: Where each was read, file and line, for messages: `Row.place`.
      max_tokens: How many tokens are to follow a prompt, for the check of positions.

    Returns:
      B lists of ids, none of them empty.

    Raises:
      ValueError: If a prompt encodes to nothing or is no valid text; is a conversation that the tokenizer's chat
        template refuses; or has an id or a position beyond the limits of the model (`limit`).
    """
    _check_number("templates", templates, "prompts", len(prompts))
    names, texts = _names("prompt", len(prompts), places), []
    for i, prompt in enumerate(prompts):
        options = None if templates is None else templates[i]
        unread = [name for name, value in (options or {}).items() if value is not None and isinstance(prompt, str)]
        if unread:
            warn_once(_LOG, f"prompts that are texts go through no chat template: {', '.join(unread)} are not read")
        texts.append(prompt if isinstance(prompt, str) else open_turn(tokenizer, prompt, names[i], options))
    _check_text(texts, names)
    bos = tokenizer.bos_token_id
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []
    begins = bos is not None and tokenizer.encode("")[:1] == [bos]
    for i, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
        if isinstance(prompt, str) and bos is not None and ids[:1] != [bos] and (begins or prompt == ""):
            ids.insert(0, bos)
        if not ids:
            raise ValueError(f"{names[i]} encodes to no token: {prompt!r}")
    check_ids(tokenizer, encoded, names)
    check_positions(tokenizer, [len(ids) + max_tokens for ids in encoded], names)
    return encoded


def encode_completions(
    tokenizer: Tokenizer,
    completions: Sequence[Text],
    *,
    prompts: Sequence[Text] | None = None,
    templates: Sequence[Mapping[str, Any]] | None = None,
    places: Sequence[str] | None = None,
    eos: bool = True,
) -> list[list[int]]:
    """Token ids of every completion, ending in one of `end_ids`: those of `encode_completions_masked`."""
    return encode_completions_masked(
        tokenizer, completions, prompts=prompts, templates=templates, places=places, eos=eos
    )[0]


def encode_completions_masked(
    tokenizer: Tokenizer,
    completions: Sequence[Text],
    *,
    prompts: Sequence[Text] | None = None,
    templates: Sequence[Mapping[str, Any]] | None = None,
    places: Sequence[str] | None = None,
    eos: bool = True,
) -> tuple[list[list[int]], list[list[bool]]]:
    """Token ids of every completion, ending in one of `end_ids`, and which of them are the assistant's.

    A text is encoded as it is, as it continues its prompt. A conversation is what the chat template adds to its prompt
    (`tiltjax.data.chat.added_turns`); anything blank after the last end is dropped. After an end, none is written: else
    EOS, or after a text that answers a conversation, what the chat template ends a turn with; and none after a turn
    that is not the assistant's.

    Args:
      tokenizer: From `load_tokenizer`.
      completions: Texts or conversations.
      prompts: The prompt of every completion; needed for conversations only.
      templates: As for `encode_prompts`.
      places: Likewise.
      eos: Whether an end is written where a completion has none; False leaves it open, for one that was cut short.

    Returns:
      A list of ids per completion; and as many bools, False on the answers of tools, on other turns that are not the
      assistant's, and on the headers of turns: they are read, and not learned from.

    Raises:
      ValueError: If a completion is no valid text; is a conversation without its prompt, or one that the chat template
        does not write as it is; or has an id beyond the vocabulary of the model (`limit`). Who puts a completion behind
        its prompt, cut or whole, checks the positions of both (`tiltjax.data.limits.check_positions`).
    """
    _check_number("prompts", prompts, "completions", len(completions))
    _check_number("templates", templates, "completions", len(completions))
    names = _names("completion", len(completions), places)
    ends, of_text, of_turn = end_ids(tokenizer), eos_id(tokenizer), _turn_end(tokenizer)
    flat: list[tuple[int, str, bool]] = []
    last: list[int | None] = []
    for i, completion in enumerate(completions):
        prompt, options = None if prompts is None else prompts[i], None if templates is None else templates[i]
        usual = of_text if prompt is None or isinstance(prompt, str) else of_turn
        segments: list[Segment] = []
        if isinstance(completion, str):
            segments = [(completion, True)]
            last.append(usual)
        else:
            segments = added_turns(tokenizer, prompt, completion, names[i], options)
            bare, written = _ending(tokenizer, segments[-1][0])
            segments[-1] = (bare, segments[-1][1])
            last.append(None if not segments[-1][1] else usual if written is None else written)
        flat += [(i, part, said) for part, said in segments]
    _check_text([part for _, part, _ in flat], [names[i] for i, _, _ in flat])
    encoded: list[list[int]] = [[] for _ in completions]
    masks: list[list[bool]] = [[] for _ in completions]
    for (i, _, said), ids in zip(flat, encode_continuation(tokenizer, [part for _, part, _ in flat]), strict=True):
        encoded[i] += ids
        masks[i] += [said] * len(ids)
    for ids, mask, end in zip(encoded, masks, last, strict=True):
        if eos and end is not None and not set(ids[-1:]) & set(ends):
            ids.append(end)
            mask.append(True)
    check_ids(tokenizer, encoded, names)
    return encoded, masks


def _check_number(name: str, values: Sequence[Any] | None, others: str, wanted: int) -> None:
    if values is not None and len(values) != wanted:
        raise ValueError(f"{name} must be as many as {others} ({wanted}), got {len(values)}")


def _names(kind: str, num: int, places: Sequence[str] | None) -> list[str]:
    """What each text is called in messages: by where it was read, else by its number."""
    _check_number("places", places, f"{kind}s", num)
    read = [""] * num if places is None else places
    return [f"{place}: {kind}" if place else f"{kind} {i}" for i, place in enumerate(read)]


def _check_text(texts: Sequence[str], names: Sequence[str]) -> None:
    """Refuses what no encoder reads: half of a surrogate pair, which JSON can hold."""
    for name, one in zip(names, texts, strict=True):
        try:
            one.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{name} is no valid text: half of a surrogate pair, {one[error.start]!r}, after "
                f"{one[max(0, error.start - 20) : error.start]!r}"
            ) from None


def decode_completions(
    tokenizer: Tokenizer, tokens: Int[Array, "B N T"], mask: Bool[Array, "B N T"]
) -> list[list[str]]:
    """The text of every candidate, as rewards read it.

    Left out are the tokens that frame what is said: `end_ids`, BOS, PAD and whatever else the tokenizer has a name for,
    and the special tokens that the chat template writes around past messages. Every other token is shown: a ``<think>``
    that the model wrote is text, special token or not.

    Args:
      tokenizer: From `load_tokenizer`.
      tokens: Completions, ``[B, N, T]``.
      mask: True on real tokens, ``[B, N, T]``.

    Returns:
      N texts for each of B prompts.
    """
    frame = _frame(tokenizer)

    def decode(row: np.ndarray, real: np.ndarray) -> str:
        return decode_continuation(tokenizer, [token for token in row[real].tolist() if token not in frame])

    groups = zip(np.asarray(tokens), np.asarray(mask), strict=True)
    return [[decode(row, real) for row, real in zip(*group, strict=True)] for group in groups]


_FRAMING = ("bos", "cls", "eos", "mask", "pad", "sep", "unk")
"""Special tokens that a tokenizer has a name for."""


def _frame(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that `decode_completions` leaves out."""
    frame = {getattr(tokenizer, f"{name}_token_id", None) for name in _FRAMING} | set(end_ids(tokenizer))
    if tokenizer.chat_template:
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        system, user, assistant = ({"role": role, "content": "a"} for role in ("system", "user", "assistant"))
        for past in ([system, user, assistant, user], [user, assistant, user], [user]):
            try:
                written = render(tokenizer, past, "a conversation")
            except ValueError:  # A template that wants other messages.
                continue
            frame |= special & set(tokenizer.encode(written, add_special_tokens=False))
    return frozenset(i for i in frame if i is not None)


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """16 hex digits of the sha256 of all that decides which ids a text becomes: kept with data that was tokenised.

    That is vocabulary, merges, normaliser and splitting, special ids, those of every end, and chat template, with the
    date that a template is told that asks for one.
    """
    special = [tokenizer.bos_token_id, pad_id(tokenizer), *end_ids(tokenizer)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = {} if backend is None else json.loads(backend.to_str())
    rules = [parts.get("normalizer"), parts.get("pre_tokenizer"), parts.get("model", {}).get("merges")]
    template = json.dumps(tokenizer.chat_template, sort_keys=True)
    facts = [sorted(tokenizer.get_vocab().items()), special, tokenizer.chat_template, rules]
    facts += [TODAY.isoformat()] if "strftime_now" in template else []
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
