import itertools

import numpy as np
import pytest

from tiltjax.rewards.text import brevity_reward, length_reward, rouge_l


def test_length_is_a_tent_about_the_target():
    completions = ["w " * n for n in range(21)]
    out = length_reward(target=10)([""] * 21, completions)
    np.testing.assert_allclose(out, -np.abs(np.arange(21) - 10) / 10, atol=1e-12)
    assert np.argmax(out) == 10


def test_brevity_is_free_up_to_the_limit():
    completions = ["w " * n for n in range(21)]
    out = brevity_reward(limit=10)([""] * 21, completions)
    np.testing.assert_allclose(out, [0] * 11 + [-n / 10 for n in range(1, 11)], atol=1e-12)


def test_zero_has_no_sign():
    assert [str(x) for x in length_reward(target=1)([""], ["a"]) + brevity_reward(limit=1)([""], ["a"])] == ["0.0"] * 2


@pytest.mark.parametrize("make", [lambda n: length_reward(target=n), lambda n: brevity_reward(limit=n)])
def test_bad_options(make):
    with pytest.raises(ValueError, match=r"(target|limit) must be at least 1, got 0"):
        make(0)


def longest_common_subsequence(a, b):
    """By enumeration of all subsequences of a."""
    sizes = range(len(a) + 1)
    return max(n for n in sizes for chosen in itertools.combinations(a, n) if is_subsequence(chosen, b))


def is_subsequence(short, long):
    rest = iter(long)
    return all(word in rest for word in short)


@pytest.mark.parametrize(
    ("completion", "reference"),
    [
        ("the cat sat on the mat", "the cat sat on the mat"),
        ("on the mat sat the cat", "the cat sat on the mat"),
        ("a dog ran", "the cat sat on the mat"),
        ("the mat", "the cat sat on the mat"),
        ("the the the cat cat", "the cat sat on the mat"),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(completion, reference):
    a, b = completion.split(), reference.split()
    common = longest_common_subsequence(a, b)
    want = 2 * common / (len(a) + len(b))  # the harmonic mean of common / len(a) and common / len(b)
    np.testing.assert_allclose(rouge_l([""], [completion], [reference]), [want], atol=1e-12)


def test_rouge_l_reads_stems_without_case_and_punctuation():
    assert rouge_l([""] * 2, ["The CAT, sitting!", ""], ["the cats sit", "the cats sit"]) == [1.0, 0.0]


def test_rouge_l_names_a_reference_that_is_no_text():
    with pytest.raises(ValueError, match="reference 1 must be a string, got None"):
        rouge_l([""] * 2, ["a", "b"], ["a", None])
