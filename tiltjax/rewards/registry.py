"""From a name to a reward.

A spec is ``name`` or ``name?option=value&option=value``, and a name is one of

* a shipped reward: ``sentiment``, ``length?target=40``, ``exact_match``, ...;
* ``reasoning_gym:task``, with the options of the task: ``reasoning_gym:chain_sum?min_terms=2&max_terms=3``;
* ``package.module:attribute`` or ``path/to/file.py:attribute``, which runs that code: the attribute is the reward. With
  options it is what makes the reward: ``my.rewards:parity?base=3`` is ``my.rewards.parity(base=3)``.

What is run is what was named on purpose. A lone file of the current directory counts by its path only
(``rewards.py:f``, not ``rewards:f``, which would be whatever lies there), and nothing of Python's own library is a
reward.

A reward is called with two lists, ``(prompts, completions)``, and with columns of the prompt rows by the names of its
further parameters; ``prompt`` among them is the whole conversation (`tiltjax.rewards.gate` says more):

    def polite(prompts, completions, prompt):  # prompts: the last message of the user; prompt: all messages
        return [float(len(messages) == len(completion)) for messages, completion in zip(prompt, completions)]

A value is read as JSON (``3``, ``0.5``, ``true``, ``["+", "-"]``), and as plain text where it is no JSON.
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

from tiltjax.ops.checks import did_you_mean
from tiltjax.rewards.extras import import_extra

__all__ = ["SHIPPED", "function_code", "load_object", "load_reward", "object_code", "parse_spec", "reward_code"]

SHIPPED: dict[str, tuple[str, str, str | None]] = {
    "brevity": ("tiltjax.rewards.text", "brevity_reward", None),
    "exact_match": ("tiltjax.rewards.verifiers", "exact_match", None),
    "imdb": ("tiltjax.rewards.classifier", "imdb_reward", "sklearn"),
    "length": ("tiltjax.rewards.text", "length_reward", None),
    "math": ("tiltjax.rewards.verifiers", "math_reward", "math_verify"),
    "rouge_l": ("tiltjax.rewards.text", "rouge_l", "rouge_score"),
    "sentiment": ("tiltjax.rewards.sentiment", "sentiment", "vaderSentiment"),
}
"""Name of every shipped reward: its module, its attribute and the optional package it needs."""

_PUZZLE = "reasoning_gym:"
_FILE = ".py"


def _known() -> str:
    return f"{', '.join(sorted(SHIPPED))}, {_PUZZLE}task, package.module:attribute, or file.py:attribute"


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Splits ``name?option=value&option=value``.

    Args:
      spec: Of a reward, or of anything that is named the same way.

    Returns:
      The name, and the options; values are read as JSON, else as text.

    Raises:
      ValueError: If an option is malformed or given twice.

    Example:
      >>> parse_spec("length?target=2")
      ('length', {'target': 2})
    """
    name, question, rest = spec.partition("?")
    return name, _parse_options(spec, rest) if question else {}


def _parse_options(spec: str, text: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for part in text.split("&"):
        key, equals, value = part.partition("=")
        if not key.isidentifier() or not equals or key in options:
            raise ValueError(
                f"options of a reward must read key=value&key=value, each key once; got {part!r} in {spec!r}"
            )
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def _split(name: str) -> tuple[str, str]:
    """What is run, a module or a file, and the attribute; the second is empty where the name is neither."""
    file, ends, path = name.rpartition(f"{_FILE}:")
    if ends:
        return f"{file}{_FILE}", path
    module_name, _, path = name.partition(":")
    return (module_name, path) if module_name else ("", "")


def _import(spec: str, source: str, what: str = "reward") -> Any:
    try:
        return _import_file(source) if source.endswith(_FILE) else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        kind = "file" if source.endswith(_FILE) else "module"
        raise ValueError(
            f"{what} {spec!r}: {kind} {source!r} cannot be imported: {type(error).__name__}: {error}"
        ) from error


def _import_file(source: str) -> Any:
    path = pathlib.Path(source).expanduser().resolve(strict=True)
    name = f"{path.stem}_{hashlib.sha256(bytes(path)).hexdigest()[:8]}"
    if name not in sys.modules:
        found = importlib.util.spec_from_file_location(name, path)
        assert found is not None
        assert found.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(found)  # Before it runs: dataclasses look it up.
        try:
            found.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _check_named_on_purpose(spec: str, source: str, what: str) -> None:
    top, _, inner = source.partition(".")
    if top in sys.stdlib_module_names:
        raise ValueError(f"{what} {spec!r}: {top} is Python's own library, which has no {what}s")
    found = None if inner or not top or top in sys.modules else importlib.util.find_spec(top)
    if found is None or not found.origin or found.submodule_search_locations is not None:
        return
    here = pathlib.Path(found.origin).parent == pathlib.Path.cwd()
    if here and not any(pathlib.Path(p).resolve() == pathlib.Path.cwd() for p in _python_path()):
        raise ValueError(
            f"{what} {spec!r}: {top} is a file of the current directory; name it, "
            f"{spec.replace(f'{top}:', f'{top}{_FILE}:', 1)}"
        )


def _python_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def _attribute(spec: str, module: Any, source: str, path: str, what: str = "reward") -> Any:
    value = module
    for part in path.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as error:
            raise ValueError(f"{what} {spec!r}: module {source!r} has no attribute {path!r}") from error
        if inspect.ismodule(value):
            raise ValueError(f"{what} {spec!r}: {path} goes through another module; name that one")
    owner = getattr(value, "__module__", None) or ""
    if (inspect.isroutine(value) or inspect.isclass(value)) and owner.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{what} {spec!r}: {path} is of Python's own library ({owner}), which has no {what}s")
    return value


def _call_factory(spec: str, factory: Callable[..., Any], options: dict[str, Any]) -> Any:
    try:
        signature = inspect.signature(factory)
        signature.bind(**options)
    except TypeError as error:
        raise ValueError(f"reward {spec!r}: {error}; its options are {signature}") from error
    for key, value in options.items():
        if key in signature.parameters and signature.parameters[key].annotation is int and type(value) is not int:
            raise ValueError(f"reward {spec!r}: {key} must be an integer, got {value!r}")
    try:
        return factory(**options)
    except (ValueError, ImportError, OSError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ValueError(f"reward {spec!r}: {type(error).__name__}: {error}") from error


def load_reward(spec: str) -> Callable[..., Any]:
    """The reward that a spec names; the top of this module has the syntax.

    Args:
      spec: ``name`` or ``name?option=value&option=value``.

    Returns:
      A reward ``(prompts, completions, ...) -> floats``; `tiltjax.rewards.gate.score` calls it.

    Raises:
      ValueError: If the name is unknown (the message lists the known ones), the module cannot be imported, it has no
        such attribute, the attribute is no callable or of Python's own library, or an option is malformed, unknown or
        refused.
      ImportError: If a shipped reward needs a package that is not installed.

    Example:
      >>> load_reward("length?target=2")(["Say hi."], ["Hi."])
      [-0.5]
    """
    name, options = parse_spec(spec)
    if name.startswith(_PUZZLE):
        from tiltjax.rewards.puzzles import puzzle_reward

        return puzzle_reward(name.removeprefix(_PUZZLE), **options)
    if name in SHIPPED:
        module_name, attribute, package = SHIPPED[name]
        if package is not None:
            import_extra(package)
        shipped = getattr(importlib.import_module(module_name), attribute)
        if attribute.endswith("_reward"):
            return _call_factory(spec, shipped, options)
        if options:
            raise ValueError(f"reward {name!r} has no options; got {', '.join(sorted(options))}")
        return shipped
    if not _split(name)[1]:
        hint = did_you_mean(name, list(SHIPPED))
        raise ValueError(f"unknown reward {name!r}; it must be one of {_known()}{hint}")
    reward = load_object(spec, what="reward")
    if callable(reward) and options:
        reward = _call_factory(spec, reward, options)
    if not callable(reward):
        raise ValueError(f"reward {spec!r} must be callable, got {type(reward).__name__}")
    return reward


def load_object(spec: str, *, what: str) -> Any:
    """What ``package.module:attribute`` or ``path/to/file.py:attribute`` names; its code is run.

    Args:
      spec: As above; options behind a ``?`` are the caller's.
      what: Noun for messages, such as "reward".

    Returns:
      The attribute.

    Raises:
      ValueError: If the spec has another form, the module cannot be imported or is Python's own or a file of the
        current directory that is not named as one, or it has no such attribute.
    """
    source, path = _split(parse_spec(spec)[0])
    if not path:
        raise ValueError(f"{what} must read package.module:attribute or file.py:attribute, got {spec!r}")
    if not source.endswith(_FILE):
        _check_named_on_purpose(spec, source, what)
    return _attribute(spec, _import(spec, source, what), source, path, what)


def object_code(spec: str, *, what: str) -> str:
    """Fingerprint of the code that `load_object` runs for a spec, as of `reward_code`.

    Args:
      spec: As for `load_object`, which has been called with it.
      what: Noun for messages.

    Returns:
      16 hexadecimal digits.
    """
    source, path = _split(parse_spec(spec)[0])
    return _code_of(spec, source, path, what)


def reward_code(spec: str) -> str:
    """Fingerprint of the code that `load_reward` runs for a spec: what was rewarded by other code is told apart.

    It is of the text of the module's file, of the file in which the attribute is defined, and of the files that these
    import from their own folder or below.

    Args:
      spec: As for `load_reward`, which has been called with it.

    Returns:
      16 hexadecimal digits.

    Raises:
      ValueError: If the spec names nothing.
    """
    name, _ = parse_spec(spec)
    source, path = _split(name)
    if name in SHIPPED:
        source, path, _ = SHIPPED[name]
    elif name.startswith(_PUZZLE):
        source, path = "tiltjax.rewards.puzzles", "puzzle_reward"
    return _code_of(spec, source, path, "reward")


def function_code(function: Callable[..., Any]) -> str:
    """Fingerprint of a function that is given as such, as of `reward_code`.

    It is of the function's own source text, or of its name where Python cannot find that. What the function calls, and
    the values that it closes over, are not in it.

    Args:
      function: A function, or an object with ``__call__``, or with a ``fingerprint`` that is taken as it is.

    Returns:
      16 hexadecimal digits, or the object's own fingerprint.

    Example:
      >>> function_code(len) == function_code(len) != function_code(max)
      True
    """
    known = getattr(function, "fingerprint", "")
    if known:
        return str(known)
    named = function if hasattr(function, "__qualname__") else type(function)
    try:
        code = inspect.getsource(named)
    except (OSError, TypeError):
        code = f"{named.__module__}.{named.__qualname__}"
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def _code_of(spec: str, source: str, path: str, what: str) -> str:
    module = _import(spec, source, what)
    found = _attribute(spec, module, source, path, what)
    files = _files_of({module.__name__, getattr(found, "__module__", None) or type(found).__module__})
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _files_of(names: set[str]) -> list[pathlib.Path]:
    """Source files of loaded modules and of what they import from their own folder or below, sorted."""
    found: dict[pathlib.Path, None] = {}
    waiting: list[Any] = [sys.modules[name] for name in sorted(names) if name in sys.modules]
    while waiting:
        module = waiting.pop()
        file = _file_of(module)
        if file is None or file in found:
            continue
        found[file] = None
        for value in vars(module).values():
            name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None)
            other = sys.modules.get(name) if isinstance(name, str) else None
            beside = _file_of(other)
            if beside is not None and beside.is_relative_to(file.parent):
                waiting.append(other)
    return sorted(found)


def _file_of(module: Any) -> pathlib.Path | None:
    file = getattr(module, "__file__", None)
    return pathlib.Path(file).resolve() if file and file.endswith(".py") and pathlib.Path(file).exists() else None
