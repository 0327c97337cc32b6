"""What a model can read: ids below the size of its vocabulary, positions within those it has."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from tiltjax.data.notes import warn_once

__all__ = ["Limits", "check_ids", "check_positions", "limit"]

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a model can read.

    Attributes:
      vocab_size: Ids are below it.
      position_table: Rows of its table of learned positions; None where positions rotate.
      max_positions: Longest sequence that it was trained on, tokens; None where that is not known.
    """

    vocab_size: int
    position_table: int | None = None
    max_positions: int | None = None


def limit(tokenizer: Any, model: Any) -> None:
    """Tells a tokenizer what its model can read: from then on, encoding refuses what lies beyond.

    JAX reads the last row of a table in place of one beyond it, and says nothing. Of several models that read the same
    tokens, each is told to the tokenizer, and the narrowest counts.

    Args:
      tokenizer: From `tiltjax.data.text.load_tokenizer`.
      model: `Limits`, or the `tiltjax.models.config.TransformerConfig` of a model, which has these fields.
    """
    known = _limits(tokenizer)
    least: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(Limits)):
        values = [getattr(model, name), getattr(known, name, None)]
        least[name] = min((value for value in values if value is not None), default=None)
    tokenizer.model_limits = Limits(**least)


def _limits(tokenizer: Any) -> Limits | None:
    return getattr(tokenizer, "model_limits", None)


def check_positions(tokenizer: Any, lengths: Sequence[int], names: Sequence[str]) -> None:
    """Refuses sequences longer than a model's learned positions, and warns of those longer than it was trained on.

    Args:
      tokenizer: Which knows the limits of its model, by `limit`; else nothing is checked.
      lengths: Tokens of every sequence: of a prompt together with what is to follow.
      names: What each is called in messages.

    Raises:
      ValueError: With the name of the first one that is too long.
    """
    limits, sizes = _limits(tokenizer), np.asarray(lengths, int)
    if limits is None or not sizes.size:
        return
    table, trained = limits.position_table, limits.max_positions
    if table is not None and sizes.max() > table:
        i = int(np.argmax(sizes > table))
        raise ValueError(f"{names[i]} takes {sizes[i]} positions, but the model has {table} learned ones")
    if trained is not None and sizes.max() > trained:
        warn_once(
            _LOG,
            f"{(sizes > trained).sum()} of {sizes.size} texts take more than the {trained} positions that the model "
            f"was trained on, at most {sizes.max()}: expect little sense beyond",
        )


def check_ids(tokenizer: Any, encoded: Sequence[Sequence[int]], names: Sequence[str]) -> None:
    """Refuses ids beyond the vocabulary of a model.

    Args:
      tokenizer: Which knows the limits of its model, by `limit`; else nothing is checked.
      encoded: Token ids of every text.
      names: What each is called in messages.

    Raises:
      ValueError: With the name, the token, its id and the size of the vocabulary.
    """
    limits = _limits(tokenizer)
    if limits is None:
        return
    for name, ids in zip(names, encoded, strict=True):
        if ids and max(ids) >= limits.vocab_size:
            beyond = next(token for token in ids if token >= limits.vocab_size)
            raise ValueError(
                f"{name} has the token {tokenizer.convert_ids_to_tokens(beyond)!r} of id {beyond}, but the model's "
                f"vocab_size is {limits.vocab_size}"
            )
