"""Tokens of a text that continues another: tokenizers that put a space before every text must not put one there.

SentencePiece writes a space as part of the word behind it, and gives the first word of a text one too. A completion is
no first word. And as the decoder takes that space away again, " blue" drawn after a prompt would be read as "blue".
"""

import json
import re
from typing import Any

__all__ = ["decode_continuation", "encode_continuation"]

_CACHED = "_tiltjax_continuation"


def encode_continuation(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of texts, each as it continues another text.

    Args:
      tokenizer: A Hugging Face tokenizer.
      texts: Any texts.

    Returns:
      Ids, without BOS and EOS.
    """
    backend = _without_space(tokenizer)
    if backend is None or not texts:
        return _encode(tokenizer, texts)
    # Behind a special token nothing is continued: there the tokenizer does what it does.
    marks = sorted(tokenizer.added_tokens_encoder, key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, marks)) or "(?!)")
    cuts = [found.start() if (found := pattern.search(text)) else len(text) for text in texts]
    heads = backend.encode_batch([text[:cut] for text, cut in zip(texts, cuts, strict=True)], add_special_tokens=False)
    tails = _encode(tokenizer, [text[cut:] for text, cut in zip(texts, cuts, strict=True)])
    return [head.ids + tail for head, tail in zip(heads, tails, strict=True)]


def decode_continuation(tokenizer: Any, ids: list[int]) -> str:
    """The text of ids that continue another text, special tokens and first space included."""
    backend = _without_space(tokenizer)
    if backend is not None:
        return backend.decode(ids, skip_special_tokens=False)
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []


def _without_space(tokenizer: Any) -> Any:
    """The same tokenizer without its space before a text; None where it has none to put."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    size, cached = len(tokenizer), getattr(tokenizer, _CACHED, None)
    if cached is None or cached[0] != size:  # Tokens may have been added since.
        cached = (size, _edited(backend))
        setattr(tokenizer, _CACHED, cached)
    return cached[1]


def _edited(backend: Any) -> Any:
    from tokenizers import Tokenizer

    parts = json.loads(backend.to_str())
    names = ("normalizer", "pre_tokenizer", "decoder")
    edited = {**parts, **{name: _edit(parts.get(name), decodes=name == "decoder") for name in names}}
    return None if edited == parts else Tokenizer.from_str(json.dumps(edited, ensure_ascii=False))


def _edit(step: dict[str, Any] | None, *, decodes: bool) -> dict[str, Any] | None:
    """A step of the tokenizer, and those inside of it, without what writes or removes the first space."""
    if step is None:
        return None
    for name in ("normalizers", "pretokenizers", "decoders"):
        if name in step:
            inside = [_edit(part, decodes=decodes) for part in step[name]]
            return {**step, name: [part for part in inside if part is not None]}
    match step["type"]:
        case "Prepend":
            return None
        case "Metaspace":
            return {**step, "prepend_scheme": "never"}
        case "ByteLevel" if not decodes:
            return {**step, "add_prefix_space": False}
        case "Strip" if step.get("content") == " ":
            return {**step, "start": 0}
    return step
