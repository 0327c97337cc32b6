import functools
import time

import jax.numpy as jnp
import numpy as np
import pytest

from tiltjax.rewards.gate import RewardError, required_columns, reward_name, score

PROMPTS = [f"prompt {i // 4}" for i in range(12)]
COMPLETIONS = ["word " * i for i in range(12)]


def words(prompts, completions):
    return [len(completion.split()) for completion in completions]


def at(index, value):
    """A reward of 0 that is ``value`` for one completion."""

    def bad(prompts, completions):
        return [value if completion == COMPLETIONS[index] else 0.0 for completion in completions]

    return bad


@pytest.mark.parametrize("batch_size", [1, 5, 12, 100])
def test_every_completion_in_order_whatever_the_batch(batch_size):
    out = score(words, PROMPTS, COMPLETIONS, batch_size=batch_size)
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, np.arange(12))


def test_batches_are_aligned_lists():
    seen = []

    def spy(prompts, completions, answer):
        assert isinstance(prompts, list)
        assert isinstance(completions, list)
        assert isinstance(answer, list)
        seen.append(list(zip(prompts, completions, answer, strict=True)))
        return [0.0] * len(prompts)

    score(spy, tuple(PROMPTS), tuple(COMPLETIONS), columns={"answer": range(12)}, batch_size=5)
    assert [len(batch) for batch in seen] == [5, 5, 2]
    assert [row for batch in seen for row in batch] == list(zip(PROMPTS, COMPLETIONS, range(12), strict=True))


@pytest.mark.parametrize(
    "convert",
    [
        tuple,
        lambda x: np.asarray(x, np.float64),
        lambda x: jnp.asarray(x, jnp.bfloat16),
        lambda x: np.asarray(x, np.int32),
        lambda x: [jnp.float32(y) for y in x],
    ],
)
def test_takes_whatever_holds_numbers(convert):
    np.testing.assert_array_equal(
        score(lambda p, c: convert(words(p, c)), PROMPTS, COMPLETIONS, batch_size=5), np.arange(12, dtype=np.float32)
    )


def test_true_is_one():
    np.testing.assert_array_equal(score(lambda p, c: [x == "b" for x in c], ["p"] * 2, ["a", "b"]), [0.0, 1.0])


def test_nothing_to_score_calls_nothing():
    assert score(at(0, float("nan")), [], []).shape == (0,)


@pytest.mark.robustness(
    "Data",
    given="a reward that raises, whatever it raises, SystemExit included",
    outcome="one line with the reward, the error, and the prompt and completion on which it raised",
)
@pytest.mark.parametrize("error", [ZeroDivisionError("division by zero"), SystemExit(3), GeneratorExit("gone")])
def test_a_reward_that_raises_is_named_with_its_completion(error):
    def broken(prompts, completions):
        if any(len(completion.split()) == 7 for completion in completions):
            raise error
        return [0.0] * len(completions)

    said = rf"reward 'broken' raised {type(error).__name__} on completion 7 of 12: {error}; prompt 'prompt 1', comp"
    with pytest.raises(RewardError, match=said) as info:
        score(broken, PROMPTS, COMPLETIONS, batch_size=5)
    assert info.value.__cause__ is error
    assert isinstance(info.value, ValueError)


def test_a_reward_that_raises_on_no_half_is_named_with_its_batch():
    def broken(prompts, completions):
        if len(completions) == 5:
            raise RuntimeError("too many")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"raised RuntimeError on completions 0 to 4 of 12: too many$"):
        score(broken, PROMPTS, COMPLETIONS, batch_size=5)


def test_an_interrupt_is_none_of_a_reward():
    def slow(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(slow, PROMPTS, COMPLETIONS)


@pytest.mark.parametrize(
    ("value", "shown"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "-inf"), (1e39, "inf")]
)
def test_a_reward_that_is_not_finite_is_named_by_index(value, shown):
    message = rf"reward 'bad' is {shown} in float32 for completion 7: prompt 'prompt 1', completion 'word word "
    with pytest.raises(RewardError, match=message):
        score(at(7, value), PROMPTS, COMPLETIONS, batch_size=5)


def test_long_texts_are_shortened_in_messages():
    with pytest.raises(RewardError) as info:
        score(lambda p, c: [float("nan")], ["p" * 10_000], ["c" * 10_000], name="long")
    assert "reward 'long' is nan" in str(info.value)
    assert len(str(info.value)) < 400


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ([0.0], r"one number per completion, 3 on completions 0 to 2 of 3; got list of shape \(1,\)"),
        ([0.0] * 4, r"got list of shape \(4,\)"),
        (np.zeros((3, 1)), r"got ndarray of shape \(3, 1\)"),
        (0.0, r"got float of shape \(\)"),
        (None, r"got NoneType of shape \(\)"),
        ((x for x in [0.0] * 3), r"got generator of shape \(\)"),
        ([[0.0], [0.0, 1.0], []], r"no flat list of numbers on completions 0 to 2 of 3"),
        ([0.0, None, 1.0], r"must return numbers; got None"),
        ([0.0, "high", 1.0], r"must return numbers; got 'high'"),
        (["1.0", "2.0", "3.0"], r"must return numbers; got '1.0'"),
        ([0.0, 1j, 1.0], r"must return numbers; got 1j"),
    ],
)
def test_what_is_not_one_number_each_is_refused(out, message):
    with pytest.raises(RewardError, match=message):
        score(lambda p, c: out, ["p"] * 3, ["a", "b", "c"])


def test_columns_come_by_name():
    def reward(prompts, completions, answer, *, unit, scale=1.0):
        return [scale * (a + u) for a, u in zip(answer, unit, strict=True)]

    columns = {"answer": [1.0, 2.0], "unit": [10.0, 20.0], "other": [0, 0]}
    assert required_columns(reward) == ("answer", "unit")
    np.testing.assert_array_equal(score(reward, ["p"] * 2, ["a", "b"], columns=columns), [11.0, 22.0])
    with pytest.raises(RewardError, match=r"reward 'reward' needs the column 'unit'; the prompt rows have answer"):
        score(reward, ["p"] * 2, ["a", "b"], columns={"answer": [1.0, 2.0]})
    with pytest.raises(RewardError, match=r"needs the column 'answer'; the prompt rows have no columns"):
        score(reward, ["p"] * 2, ["a", "b"])
    with pytest.raises(RewardError, match=r"column 'answer' has 1 rows for 2 completions"):
        score(reward, ["p"] * 2, ["a", "b"], columns={**columns, "answer": [1.0]})


def test_an_optional_column_may_be_absent_and_is_used_when_present():
    def reward(prompts, completions, weight=None):
        return [1.0] * len(completions) if weight is None else weight

    assert required_columns(reward) == ()
    np.testing.assert_array_equal(score(reward, ["p"] * 2, ["a", "b"]), [1.0, 1.0])
    np.testing.assert_array_equal(score(reward, ["p"] * 2, ["a", "b"], columns={"weight": [2.0, 3.0]}), [2.0, 3.0])


def test_double_star_takes_every_column():
    def reward(prompts, completions, **columns):
        assert sorted(columns) == ["id", "label"]
        return columns["label"]

    columns = {"label": [1.0, 2.0], "id": ["x", "y"], "prompts": ["p", "p"]}
    np.testing.assert_array_equal(score(reward, ["p"] * 2, ["a", "b"], columns=columns), [1.0, 2.0])


def test_what_a_partial_binds_is_no_column():
    def reward(prompts, completions, scale, answer):
        return [scale * a for a in answer]

    partial = functools.partial(reward, scale=3.0)
    assert required_columns(partial) == ("answer",)
    assert reward_name(partial) == "reward"
    out = score(partial, ["p"], ["a"], columns={"answer": [2.0], "scale": [100.0]})
    np.testing.assert_array_equal(out, [6.0])


def test_an_object_may_be_a_reward():
    class Model:
        def __call__(self, prompts, completions, answer):
            return answer

    assert required_columns(Model()) == ("answer",)
    with pytest.raises(RewardError, match="reward 'Model' needs the column 'answer'"):
        score(Model(), ["p"], ["a"])


def test_completions_first_is_refused():
    def other_order(completions, **kwargs):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"reward 'other_order' takes completions first; it must take \(prompts, com"):
        score(other_order, ["p"], ["a"])


def test_bad_arguments():
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        score(words, ["p"], ["a"], batch_size=0)
    with pytest.raises(ValueError, match="prompts and completions must be equally many, got 1 and 2"):
        score(words, ["p"], ["a", "b"])


def slow(prompts, completions):
    time.sleep(0.4)
    return words(prompts, completions)


def test_a_slow_reward_shows_progress(capsys):
    score(slow, PROMPTS, COMPLETIONS, batch_size=3, name="patience")
    captured = capsys.readouterr()
    assert "patience: 100%" in captured.err
    assert "12/12" in captured.err
    assert captured.out == ""


def test_a_quick_or_silenced_reward_shows_none(capsys):
    score(words, PROMPTS, COMPLETIONS, batch_size=3)
    score(slow, PROMPTS, COMPLETIONS, batch_size=3, progress=False)
    assert capsys.readouterr().err == ""
