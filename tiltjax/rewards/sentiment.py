"""Sentiment of a completion, by lexicon: no model, no download, about a millisecond a text."""

import functools
from typing import Any

from tiltjax.rewards.extras import import_extra

__all__ = ["sentiment"]


@functools.cache
def _analyser() -> Any:
    return import_extra("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()


def sentiment(prompts: list[str], completions: list[str]) -> list[float]:
    """Compound sentiment of every completion, -1 (most negative) to 1 (most positive); 0 for an empty one.

    The prompt is not read. VADER sums signed word ratings, with rules for negation, emphasis and "but", and squashes
    the sum ``s`` into ``s / sqrt(s^2 + 15)``: a long text of one mood saturates.

    Args:
      prompts: Unused, ``M`` strings.
      completions: ``M`` strings.

    Returns:
      ``M`` floats.

    Raises:
      ImportError: If vaderSentiment is not installed.

    Example:
      >>> sentiment([""] * 3, ["I love this film.", "I hate this film.", "This is a film."])
      [0.6369, -0.5719, 0.0]

    References:
      Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
      ICWSM 2014.
    """
    return [_analyser().polarity_scores(completion)["compound"] for completion in completions]
