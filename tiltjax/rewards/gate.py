"""The gate between a reward and everything that learns from it: M completions in, M finite float32 out, or an error.

A reward is any callable ``(prompts, completions) -> floats``, called with two lists of equal length (a prompt is
repeated for each of its candidates) and returning one number per completion, higher is better. A further parameter is a
column of the prompt rows: ``def reward(prompts, completions, answer)`` receives the list of the rows' "answer", aligned
with the completions. A parameter with a default is optional, and ``**columns`` takes every column there is.

``prompts`` are texts: of a conversation, the last message of the user. A reward that needs the conversation asks for it
by a parameter ``prompt``, the column as the row has it: a text, or the list of all messages.
"""

import functools
import inspect
import reprlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import tqdm

from tiltjax.ops.checks import check_at_least
from tiltjax.types import Float

__all__ = ["RewardError", "required_columns", "reward_name", "score"]

_SLOW = 1.0
"""Seconds after which a reward is slow and gets a progress bar."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


class RewardError(ValueError):
    """A reward that failed, or returned something that cannot be learned from; names the reward and the completion."""


def reward_name(reward_fn: Callable[..., Any]) -> str:
    """The name of a reward in messages and progress bars: its ``__name__``, or that of its type."""
    while isinstance(reward_fn, functools.partial):
        reward_fn = reward_fn.func
    return getattr(reward_fn, "__name__", type(reward_fn).__name__)


def _column_parameters(reward_fn: Callable[..., Any]) -> tuple[list[str], list[str], bool]:
    """Names of the required and of the optional columns of a reward, and whether it takes all others too."""
    try:
        parameters = list(inspect.signature(reward_fn).parameters.values())
    except (TypeError, ValueError):  # some built-in callables have no signature
        return [], [], False
    if parameters and parameters[0].name == "completions":
        raise RewardError(
            f"reward {reward_name(reward_fn)!r} takes completions first; it must take (prompts, completions, ...)"
        )
    bound = reward_fn.keywords if isinstance(reward_fn, functools.partial) else {}
    required: list[str] = []
    optional: list[str] = []
    positional = 2
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            positional = 0
        elif positional and parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            positional -= 1
        elif parameter.kind is not parameter.VAR_KEYWORD and parameter.name not in bound:
            (required if parameter.default is parameter.empty else optional).append(parameter.name)
    return required, optional, any(p.kind is p.VAR_KEYWORD for p in parameters)


def required_columns(reward_fn: Callable[..., Any]) -> tuple[str, ...]:
    """Columns that the prompt rows must have for a reward, to be checked before any model is loaded.

    Args:
      reward_fn: A reward.

    Returns:
      Names, in the order of the signature, without "prompt", which every row has.

    Raises:
      RewardError: If the reward takes ``completions`` first.

    Example:
      >>> required_columns(lambda prompts, completions, answer, unit="m": [0.0])
      ('answer',)
    """
    return tuple(name for name in _column_parameters(reward_fn)[0] if name != "prompt")


def _select_columns(
    reward_fn: Callable[..., Any], prompts: Sequence[str], columns: Mapping[str, Sequence[Any]], name: str
) -> dict[str, list[Any]]:
    required, optional, takes_all = _column_parameters(reward_fn)
    if "prompt" in (*required, *optional):
        columns = {"prompt": prompts, **columns}
    for column in required:
        if column not in columns:
            have = ", ".join(sorted(columns)) or "no columns"
            raise RewardError(f"reward {name!r} needs the column {column!r}; the prompt rows have {have}")
    reserved = {"prompts", "completions", *(reward_fn.keywords if isinstance(reward_fn, functools.partial) else ())}
    wanted = set(columns) - reserved if takes_all else {*required, *optional} & set(columns)
    for column in sorted(wanted):
        if len(columns[column]) != len(prompts):
            raise RewardError(f"column {column!r} has {len(columns[column])} rows for {len(prompts)} completions")
    return {column: list(columns[column]) for column in sorted(wanted)}


def _as_rewards(out: Any, size: int, name: str, where: str) -> np.ndarray:
    try:
        array = np.asarray(out)
    except Exception as error:
        raise RewardError(f"reward {name!r} returned no flat list of numbers on {where}: {error}") from error
    if array.shape != (size,):
        raise RewardError(
            f"reward {name!r} must return one number per completion, {size} on {where}; "
            f"got {type(out).__name__} of shape {array.shape}"
        )
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, jnp.bool_)):
        wrong = next((x for x in out if not isinstance(x, bool | int | float | np.number)), array[0])
        raise RewardError(f"reward {name!r} must return numbers; got {_SHORT.repr(wrong)} on {where}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32)


def _culprit(ask: Callable[[int, int], Any], start: int, stop: int) -> int | None:
    """The completion on which a reward raises that raised on a batch, found by halves; None where neither half does."""

    def raises(start: int, stop: int) -> bool:
        try:
            ask(start, stop)
        except KeyboardInterrupt:
            raise
        except BaseException:
            return True
        return False

    while stop - start > 1:
        middle = (start + stop) // 2
        halves = [half for half in ((start, middle), (middle, stop)) if raises(*half)]
        if not halves:
            return None
        start, stop = halves[0]
    return start


def score(
    reward_fn: Callable[..., Any],
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    columns: Mapping[str, Sequence[Any]] | None = None,
    name: str | None = None,
    progress: bool = True,
    batch_size: int = 64,
) -> Float[np.ndarray, " M"]:
    """Calls a reward on M completions, in order and in batches, and checks all that it returns.

    A reward that takes longer than a second shows a progress bar on standard error. A reward that compares the
    candidates of one prompt with each other needs a ``batch_size`` that is a multiple of N.

    Args:
      reward_fn: ``(prompts, completions, ...) -> floats``; see the top of this module for further parameters.
      prompts: ``M`` strings, each prompt repeated for each of its candidates.
      completions: ``M`` strings.
      columns: Columns of the prompt rows by name, ``M`` values each, repeated like the prompts. Without a column
        "prompt" the prompts are it.
      name: What messages call the reward; None takes the function's name.
      progress: False for no progress bar, however slow.
      batch_size: Completions per call, at least 1.

    Returns:
      Rewards ``[M]``, float32, all finite.

    Raises:
      RewardError: If the reward raises, with the completion, which is found by asking for halves of its batch; returns
        not exactly one number per completion; returns NaN, an infinity or a number beyond float32; or needs a column
        that is not there or not M long.
      ValueError: If ``batch_size < 1``, or prompts and completions differ in number.

    Example:
      >>> def words(prompts, completions):
      ...     return [len(completion.split()) for completion in completions]
      >>> score(words, ["Say hi."] * 2, ["Hi.", "Hello to you."])
      array([1., 3.], dtype=float32)
    """
    check_at_least("batch_size", batch_size, 1)
    if len(prompts) != len(completions):
        raise ValueError(f"prompts and completions must be equally many, got {len(prompts)} and {len(completions)}")
    name = reward_name(reward_fn) if name is None else name
    size = len(completions)
    extra = _select_columns(reward_fn, prompts, columns or {}, name)
    rewards = np.zeros(size, np.float32)

    def ask(start: int, stop: int) -> Any:
        batch = {column: values[start:stop] for column, values in extra.items()}
        return reward_fn(list(prompts[start:stop]), list(completions[start:stop]), **batch)

    with tqdm.tqdm(total=size, desc=name, delay=_SLOW, disable=not progress, unit="completion") as bar:
        for start in range(0, size, batch_size):
            stop = min(start + batch_size, size)
            where = f"completions {start} to {stop - 1} of {size}"
            try:
                out = ask(start, stop)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # SystemExit too: a reward that ends the process ends in silence.
                index = _culprit(ask, start, stop)
                shown = ""
                if index is not None:
                    where = f"completion {index} of {size}"
                    shown = f"; prompt {_SHORT.repr(prompts[index])}, completion {_SHORT.repr(completions[index])}"
                raise RewardError(
                    f"reward {name!r} raised {type(error).__name__} on {where}: {error}{shown}"
                ) from error
            rewards[start:stop] = _as_rewards(out, stop - start, name, where)
            for index in (start + np.flatnonzero(~np.isfinite(rewards[start:stop]))).tolist():
                raise RewardError(
                    f"reward {name!r} is {rewards[index]} in float32 for completion {index}: "
                    f"prompt {_SHORT.repr(prompts[index])}, completion {_SHORT.repr(completions[index])}"
                )
            bar.update(stop - start)
    return rewards
