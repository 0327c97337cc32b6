"""The prompt that two texts begin with, where the data has no column for it.

It ends at the last mark of the assistant's turn that both texts have; where there is none, at the end of a word. So no
word is cut in two, and no token of a tokenizer that splits texts in front of words, as nearly all do. (Some join a sign
of punctuation with the line breaks behind it: where those differ, the cut is between them.)
"""

import re

__all__ = ["split"]

_SPOKEN = r"(?:^|(?<=\n))[ \t]*(?:#{1,6}[ \t]*)?(?:\*\*)?(?:%s):(?:\*\*)?"
_ANSWERED = re.compile(
    "|".join(
        [
            _SPOKEN % "assistant|gpt|chatgpt|bot|response",
            r"<\|im_start\|>assistant|<\|start_header_id\|>assistant<\|end_header_id\|>|<\|assistant\|>|<｜Assistant｜>",
            r"<start_of_turn>model|\[/INST\]",
        ]
    ),
    re.IGNORECASE,
)
"""Where the assistant's turn begins, in the ways in which dialogues are written."""
_ASKED = re.compile(
    "|".join(
        [
            _SPOKEN % "human|user|system|instruction",
            r"<\|im_start\|>(?!assistant)|<\|start_header_id\|>(?!assistant)|<\|(?:user|system)\|>|<｜User｜>",
            r"<start_of_turn>(?!model)|\[INST\]",
        ]
    ),
    re.IGNORECASE,
)
"""Where somebody else's does."""

_BREAKS = r"\s*[\r\n]+"
_ALONE = "\u3001-\u303f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff"
"""Han, kana and their punctuation: written without blanks, every character may end a word."""
_MARKS = "\u3099\u309a\ufe00-\ufe0f\U000e0100-\U000e01ef"
_BLANK = r"[^\S\r\n]"
_PIECE = re.compile(rf"\s+(?={_BLANK}\S|\Z)|\s*[\r\n](?=\S)|{_BLANK}?(?:[{_ALONE}][{_MARKS}]*|[^\s{_ALONE}]+)")
"""A word with the blank before it, or what is blank before that: joined they are the text."""


def split(chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""Cuts two texts where they part.

    Args:
      chosen: Prompt and preferred answer.
      rejected: The same prompt and the other answer.

    Returns:
      Prompt, chosen and rejected answer; joined again, they are the texts.

    Raises:
      ValueError: If the texts do not begin with the same word, or part in another turn than the assistant's.

    Example:
      >>> split("The sky is blue.", "The sky is black.")
      ('The sky is', ' blue.', ' black.')
      >>> split("\n\nHuman: Hi.\n\nAssistant: I can't.", "\n\nHuman: Hi.\n\nAssistant: I cannot.")
      ('\n\nHuman: Hi.\n\nAssistant:', " I can't.", ' I cannot.')
    """
    size = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    size = min(len(chosen), len(rejected)) if size is None else size
    answered = [turn.end() for turn in _ANSWERED.finditer(chosen, 0, size)]
    asked = [turn.end() for turn in _ASKED.finditer(chosen, 0, size)]
    if max(asked, default=0) > max(answered, default=0) and (_ANSWERED.search(chosen) or _ANSWERED.search(rejected)):
        raise ValueError("no prompt: chosen and rejected part in a turn that is not the assistant's")
    cut = _after_breaks(chosen, rejected, answered[-1]) if answered else _common(chosen, rejected)
    if not chosen[:cut].strip():
        raise ValueError("no prompt: chosen and rejected do not begin alike, word by word; add a column 'prompt'")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _common(one: str, other: str) -> int:
    """Where the last of the leading pieces ends that are the same."""
    cut = 0
    for a, b in zip(_PIECE.finditer(one), _PIECE.finditer(other), strict=False):
        if a[0] != b[0]:
            break
        cut = a.end()
    return cut


def _after_breaks(one: str, other: str, cut: int) -> int:
    """The place behind the line breaks that follow in both, if they are the same: they belong to the mark."""
    breaks = [re.compile(_BREAKS).match(text, cut) for text in (one, other)]
    same = breaks[0] and breaks[1] and breaks[0][0] == breaks[1][0]
    return breaks[0].end() if same and breaks[0] else cut
