import signal
import threading
import time
from fractions import Fraction

import pytest

from tiltjax.rewards.gate import RewardError, score
from tiltjax.rewards.verifiers import as_number, exact_match, extract_answer, math_reward


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", Fraction(12)),
        (" -12 ", Fraction(-12)),
        ("+3", Fraction(3)),
        ("\u22123", Fraction(-3)),
        ("1,234", Fraction(1234)),
        ("1,234,567.5", Fraction(2469135, 2)),
        ("0.1", Fraction(1, 10)),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("-3/4", Fraction(-3, 4)),
        ("1e3", Fraction(1000)),
        ("1E-2", Fraction(1, 100)),
        ("007", Fraction(7)),
    ],
)
def test_a_number(text, value):
    assert as_number(text) == value


@pytest.mark.parametrize(
    "text", ["", "-", ".", "twelve", "12 apples", "1,23", "1 2", "1/0", "1.5/2", "0x10", "nan", "inf", "1e9999", "½"]
)
def test_no_number(text):
    assert as_number(text) is None


def test_degenerate_completions_take_no_time():
    units = ["1,", "1", "1 ", "1,111", "-", "answer:", "<answer>", "</answer>", "<answer></answer>", ".1", "1/", "1e"]
    start = time.monotonic()
    assert exact_match([""] * len(units), [unit * 50_000 for unit in units], ["12"] * len(units)) == [0.0] * len(units)
    assert time.monotonic() - start < 20


def test_more_digits_than_python_converts_is_no_number():
    assert as_number("9" * 5000) is None
    assert exact_match([""], ["9" * 5000], ["9"]) == [0.0]


@pytest.mark.parametrize(
    ("completion", "gold", "answer"),
    [
        # a number: the last one
        ("7 + 5 = 12", "13", "12"),
        ("It is 12.", "13", "12"),
        ("It costs $1,234.50, I think.", "1", "1234.50"),
        ("x = -3", "3", "-3"),
        ("12-5", "3", "5"),
        ("f1 scores", "3", "f1 scores"),
        ("no number here", "3", "no number here"),
        # after the mark: the last number of its line
        ("Answer: 7 + 5 = 12\nCheck: 12 - 5 = 7", "1", "12"),
        ("Step 1. Answer: 3\nNo. Answer: 4", "1", "4"),
        ("The answer: 4", "1", "4"),
        ("**Answer:** 4", "1", "4"),
        ("**Answer**: 4", "1", "4"),
        ("ANSWER :\n\n4\n5", "1", "4"),
        # in the block, before any mark
        ("<answer>3</answer> Answer: 4", "1", "3"),
        ("<answer>3</answer> or <ANSWER> 4 </ANSWER>", "1", "4"),
        ("<answer>3", "1", "3"),
        # a text: the marked part, as many lines as the gold has, or all of it
        ("Answer: Paris\nParis is in France.", "Rome", "Paris"),
        ("Paris 2024", "Rome", "Paris 2024"),
        ("Answer:\n1 0\n0 1\nDone.", "0 1\n1 0", "1 0\n0 1"),
        ("<answer>\n1 0\n0 1\n</answer>", "0 1\n1 0", "1 0\n0 1"),
        ("Answer: a\nb", None, "a\nb"),
        ("", "1", ""),
    ],
)
def test_the_rule(completion, gold, answer):
    assert extract_answer(completion, gold) == answer


@pytest.mark.parametrize(
    ("completion", "gold", "want"),
    [
        ("so it is 12", 12, 1.0),
        ("so it is 12.0", "12", 1.0),
        ("one half is 0.5", "1/2", 1.0),
        ("1/3", 0.3333, 0.0),
        ("12 and then 13", "12", 0.0),
        ("1,000", "1e3", 1.0),
        ("Answer: The Eiffel  Tower.", "the eiffel tower", 1.0),
        ('"Red"', "red", 1.0),
        ("It is red.", "red", 0.0),
        ("", "red", 0.0),
        ("", "12", 0.0),
    ],
)
def test_exact_match(completion, gold, want):
    assert exact_match([""], [completion], [gold]) == [want]


@pytest.mark.parametrize("gold", [None, "", "  ", True, [12]])
def test_an_answer_that_is_none_is_named(gold):
    for reward in (exact_match, math_reward()):
        with pytest.raises(ValueError, match=r"answer 1 must be a number or a text that is not empty, got"):
            reward([""] * 2, ["12", "12"], ["12", gold])


MATH = [
    (r"The answer is $0.5$", r"$\frac{1}{2}$", 1.0),
    ("7 + 5 = 13", 12, 0.0),
    ("7 + 5 = 12", 12, 1.0),
    (r"\boxed{\frac{2}{4}}", "1/2", 1.0),
    ("<answer>2/4</answer>", r"\frac12", 1.0),
    (r"<answer>\frac{3}{4}</answer>", "1/2", 0.0),
    ("$(x+1)^2$", "x^2 + 2x + 1", 1.0),
    ("$(x+1)^2$", "x^2 + 2x", 0.0),
    (r"$\{2, 1\}$", r"\{1, 2\}", 1.0),
    ("1,234", 1234, 1.0),
    ("", "12", 0.0),
    ("I do not know.", "12", 0.0),
    (r"$\frac{1}{$", "12", 0.0),
    (r"\boxed{\boxed{", "12", 0.0),
    ("\x00 $$ \\", "12", 0.0),
]


@pytest.mark.parametrize(("completion", "gold", "want"), MATH)
def test_math(completion, gold, want):
    assert math_reward()([""], [completion], [gold]) == [want]


def test_math_outside_the_main_thread():
    out = []
    completions, golds, want = (list(column) for column in zip(*MATH, strict=True))
    thread = threading.Thread(target=lambda: out.extend(math_reward()([""] * len(MATH), completions, golds)))
    thread.start()
    thread.join()
    assert out == want


def test_math_in_no_more_than_its_time_is_zero_and_leaves_the_alarm_as_it_was():
    before = signal.getsignal(signal.SIGALRM)
    start = time.monotonic()
    hopeless = ["$9^{9^{9^{9}}}$", "1 " * 20_000]
    assert math_reward(timeout=1)([""] * 2, hopeless, ["12", "12"]) == [0.0, 0.0]
    assert time.monotonic() - start < 20
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.alarm(0) == 0


def test_math_timeout_must_be_whole_seconds():
    with pytest.raises(ValueError, match="timeout must be at least 1, got 0"):
        math_reward(timeout=0)


def test_the_column_is_asked_for_by_name():
    for reward in (exact_match, math_reward()):
        with pytest.raises(RewardError, match="needs the column 'answer'"):
            score(reward, ["p"], ["12"])
        assert score(reward, ["p"], ["12"], columns={"answer": ["12"]}).tolist() == [1.0]
