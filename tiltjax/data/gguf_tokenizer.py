"""Byte-level BPE tokenizers out of GGUF files, rebuilt in memory from the file's metadata."""

import os
from dataclasses import dataclass
from typing import Any

from tiltjax.files import gguf_parts

__all__ = ["PRE_TOKENIZERS", "PreTokenizer", "gguf_tokenizer"]

_WORD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is cut before its bytes are merged.

    Attributes:
      split: Pieces as a regular expression; None is GPT-2's own.
      single_digits: Whether every digit is a piece of its own, apart from ``split``.
      ignore_merges: Whether a piece that is a token is taken whole.
      nfc: Whether the text is brought to Unicode's composed form first.
      adds_bos: Whether a text begins with BOS where the file does not say.
    """

    split: str | None = None
    single_digits: bool = False
    ignore_merges: bool = False
    nfc: bool = False
    adds_bos: bool = False


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(),
    "llama-bpe": PreTokenizer(rf"{_WORD}|\p{{N}}{{1,3}}|{_REST}", ignore_merges=True, adds_bos=True),
    "qwen2": PreTokenizer(rf"{_WORD}|\p{{N}}|{_REST}", nfc=True),
    "smollm": PreTokenizer(single_digits=True),
}
"""By the name that a GGUF file gives under ``tokenizer.ggml.pre``."""

_CONTROL, _USER_DEFINED = 3, 4


def gguf_tokenizer(path: str | os.PathLike) -> Any:
    """Builds the tokenizer that a GGUF file describes; nothing is written.

    Args:
      path: GGUF file with a byte-level BPE vocabulary (``tokenizer.ggml.model`` is ``gpt2``) whose pre-tokenizer is in
        `PRE_TOKENIZERS`; any part of a split one.

    Returns:
      A Hugging Face tokenizer, with chat template, BOS, EOS, PAD and UNK as the file names them; its attribute
      ``model_ends`` has every id that the file names as an end: of a text, a turn or a message.

    Raises:
      FileNotFoundError: If there is no such file, or a part is missing.
      ImportError: If the package ``gguf`` is not installed.
      ValueError: In one line, with the path: not a whole GGUF file, or a vocabulary or pre-tokenizer of another kind.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    path = gguf_parts(path)[0]
    facts = _read_metadata(path)
    kind, pre = facts.get("ggml.model"), facts.get("ggml.pre")
    if kind != "gpt2":
        raise ValueError(f"{path}: tokenizer model {kind!r}; only byte-level BPE ('gpt2') is read")
    if pre not in PRE_TOKENIZERS:
        raise ValueError(f"{path}: pre-tokenizer {pre!r}; known: {', '.join(PRE_TOKENIZERS)}")
    cut, tokens = PRE_TOKENIZERS[pre], facts["ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in facts.get("ggml.merges", [])]
    vocab = {token: i for i, token in enumerate(tokens)}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=cut.ignore_merges))
    except Exception as error:  # the package raises nothing narrower
        raise ValueError(f"{path}: vocabulary and merges do not fit each other: {error}") from None
    tokenizer.pre_tokenizer = _pre_tokenizer(cut)
    tokenizer.decoder = decoders.ByteLevel()
    if cut.nfc:
        tokenizer.normalizer = normalizers.NFC()
    types = facts.get("ggml.token_type", [])
    marked = {mark: [t for t, k in zip(tokens, types, strict=False) if k == mark] for mark in (_CONTROL, _USER_DEFINED)}
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in marked[_CONTROL]])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in marked[_USER_DEFINED]])
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {name: facts.get(f"ggml.{key}_token_id") for name, key in names.items()}
    built = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        add_bos_token=facts.get("ggml.add_bos_token", cut.adds_bos),
        add_eos_token=facts.get("ggml.add_eos_token", False),
        chat_template=facts.get("chat_template"),
        clean_up_tokenization_spaces=False,
        **{name: tokens[i] for name, i in ids.items() if i is not None},
    )
    ends = [facts.get(f"ggml.{key}_token_id") for key in ("eos", "eot", "eom")]
    built.model_ends = tuple(int(end) for end in ends if end is not None)
    return built


def _read_metadata(path: str | os.PathLike) -> dict[str, Any]:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ImportError("a GGUF file is read with the package gguf: pip install 'gguf>=0.17'") from None
    with open(path, "rb") as file:
        if file.read(4) != b"GGUF":
            raise ValueError(f"{path}: not a GGUF file")
    try:
        reader = GGUFReader(path)
        facts = {k.removeprefix("tokenizer."): f for k, f in reader.fields.items() if k.startswith("tokenizer.")}
        facts = {name: field.contents() for name, field in facts.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path}: GGUF file cut short or damaged: {' '.join(str(error).split())}") from None
    if missing := [name for name in ("ggml.model", "ggml.tokens") if name not in facts]:
        raise ValueError(f"{path}: no tokenizer in this GGUF file (tokenizer.{missing[0]} is missing)")
    return facts


def _pre_tokenizer(cut: PreTokenizer) -> Any:
    from tokenizers import Regex, pre_tokenizers

    steps: list[Any] = [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut.split is None)]
    if cut.split is not None:
        steps.insert(0, pre_tokenizers.Split(Regex(cut.split), behavior="isolated"))
    if cut.single_digits:
        steps.insert(0, pre_tokenizers.Digits(individual_digits=True))
    return pre_tokenizers.Sequence(steps)
