import math

import pytest

from tiltjax.rewards import extras
from tiltjax.rewards.sentiment import sentiment

TEXTS = [
    "A wonderful film, moving and funny.",
    "A dreadful film, dull and badly acted.",
    "Not good.",
    "The film lasts two hours.",
    "",
]


def test_sign_range_and_negation():
    good, bad, negated, neutral, empty = sentiment([""] * 5, TEXTS)
    assert good > 0.7
    assert bad < -0.7
    assert negated < 0
    assert neutral == 0
    assert empty == 0
    assert all(-1 <= value <= 1 for value in sentiment([""] * 2, ["love " * 1000, "hate " * 1000]))


def test_value_is_the_squashed_lexicon_rating():
    # "good" is rated 1.9 in the lexicon, and the compound of a rating s is s / sqrt(s^2 + 15).
    assert sentiment([""], ["good"]) == [round(1.9 / math.sqrt(1.9**2 + 15), 4)]


def test_the_prompt_is_not_read():
    assert sentiment(["I hate it."], [TEXTS[0]]) == sentiment(["I love it."], [TEXTS[0]])


def test_a_missing_package_says_how_to_install_it():
    with pytest.raises(ImportError, match=r"needs the package 'no_such_package'.*pip install 'tiltjax\[rewards\]'"):
        extras.import_extra("no_such_package.part")
