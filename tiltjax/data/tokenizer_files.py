"""Tokenizers on disk: Hugging Face directories, GGUF files, hub ids."""

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from tiltjax.data.gguf_tokenizer import gguf_tokenizer
from tiltjax.files import TOKENIZER_FILES, adapter_base, read_json, resolve

__all__ = ["load_tokenizer"]

_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def load_tokenizer(source: str | os.PathLike) -> Any:
    """Loads a tokenizer without running anyone's code and without writing a file of its own.

    Args:
      source: A Hugging Face directory, a GGUF file, or a hub id. An adapter without a tokenizer has that of its base
        model.

    Returns:
      A Hugging Face tokenizer that knows `tiltjax.data.text.end_ids`.

    Raises:
      FileNotFoundError: If there is nothing of that name, or no tokenizer there.
      ValueError: In one line, with the path: the tokenizer is damaged, or needs its own code, or the model's files name
        as an end what is no token id.
      ImportError: If reading it needs a package that is not installed; the message says how to install it.
    """
    return _load(source, None)


def _load(source: str | os.PathLike, revision: str | None) -> Any:
    where = resolve(source, files=TOKENIZER_FILES, revision=revision)
    if where.suffix == ".gguf":
        return gguf_tokenizer(where)
    if not any((where / name).is_file() for name in _VOCABULARIES):
        base = adapter_base(where)
        if base is not None and Path(base[0]) != where:
            return _load(*base)
        raise FileNotFoundError(f"{source}: no tokenizer there: none of {', '.join(_VOCABULARIES)}")
    _check_settings(where)
    if not (where / "tokenizer.json").is_file() and (where / "tokenizer.model").is_file():
        _check_sentencepiece(where / "tokenizer.model")
    kind = _kind(where, str(source))
    from transformers import AutoTokenizer

    ends = _ends(where)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(where), config=kind, trust_remote_code=False)
    except BaseException as error:  # The Rust below raises nothing narrower, and where it panics not even an Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = next(iter(str(error).strip().splitlines()), "")
        raise ValueError(f"{source}: the tokenizer cannot be read: {type(error).__name__}: {reason}") from None
    tokenizer.model_ends = ends
    return tokenizer


def _kind(where: Path, name: str) -> Any:
    """What transformers chooses a tokenizer's class by, without building the configuration of a model."""
    from transformers import AutoConfig, PreTrainedConfig

    path = where / "config.json"
    hf = read_json(path) if path.is_file() else {}
    for field in ("model_type", "tokenizer_class"):
        if not isinstance(hf.get(field), str | None):
            raise ValueError(f"{path}: {field} must be a text, got {hf[field]!r}")
    try:
        config = AutoConfig.for_model(hf.get("model_type") or "")
    except ValueError:  # Not one that transformers knows.
        config = PreTrainedConfig()
    config.tokenizer_class, config.name_or_path = hf.get("tokenizer_class"), name
    return config


def _ends(where: Path) -> tuple[int, ...]:
    """The ends that the files of the model name; of an adapter, where its directory lacks one, those of its base."""
    folders = [where]
    if (base := adapter_base(where)) is not None:
        with contextlib.suppress(OSError, ValueError):  # Who reads the model says so.
            folders.append(resolve(base[0], files=(), revision=base[1]))
    ends: list[int] = []
    for name in ("generation_config.json", "config.json"):
        found = [folder / name for folder in folders if (folder / name).is_file()]
        ends += _ends_in(found[0]) if found else []
    return tuple(ends)


def _ends_in(file: Path) -> list[int]:
    """What ``eos_token_id`` says in a file of settings: none, one id or several; of a composed model, its text part."""
    facts = read_json(file)
    inner = facts.get("text_config")
    said = facts.get("eos_token_id", inner.get("eos_token_id") if isinstance(inner, dict) else None)
    ends = said if isinstance(said, list) else [] if said is None else [said]
    for end in ends:
        if type(end) is not int or end < 0:
            raise ValueError(f"{file}: eos_token_id must be a token id or a list of them, got {said!r}")
    return ends


def _check_settings(where: Path) -> None:
    """The small files beside the vocabulary: objects, whose special tokens are texts."""
    for file in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        path = where / file
        if not path.is_file():
            continue
        for field, value in read_json(path).items():
            content = value.get("content") if isinstance(value, dict) else value
            if field in _SPECIAL and not (isinstance(content, str) or value is None):
                raise ValueError(
                    f"{path}: {field} must be a text, an object with a text as content, or null; got {value!r}"
                )


def _check_sentencepiece(path: Path) -> None:
    """Vocabularies that transformers reads with a package which may not be there."""
    with path.open("rb") as file:
        binary = file.read(1) == b"\n"
    packages = ("sentencepiece", "google.protobuf") if binary else ("tiktoken",)
    names = {"google.protobuf": "protobuf"}
    for package in packages:
        top = package.partition(".")[0]
        if importlib.util.find_spec(top) is None or importlib.util.find_spec(package) is None:
            wanted = " ".join(names.get(name, name) for name in packages)
            raise ImportError(f"{path}: the only vocabulary there, which is read with: pip install {wanted}")
