"""What the programs do with bad rows: they end before a model is loaded, or count what they leave out."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from experiments.align.config import AlignConfig
from experiments.reward_model import data as reward_world
from tiltjax.align import inputs as align_inputs
from tiltjax.align import session as align_session
from tiltjax.data import text
from tiltjax.data.datasets import DataError, PromptRow
from tiltjax.train.methods import METHODS
from tiltjax.train.reward_model import RewardSpec

CASES = pathlib.Path(__file__).parents[1] / "cases"
CONFIG = AlignConfig(
    policy=str(CASES / "policy"), num_prompts=8, num_eval_prompts=4, num_candidates=4, max_tokens=12, steps=2,
    batch_size=8, sample_batch=4, lora_rank=0, reward="length?target=3", method="soft_best_of_n",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_model(monkeypatch):
    def load(*args, **options):
        raise AssertionError("a model is loaded before the rows are checked")

    monkeypatch.setattr(align_session.pretrained, "load", load)


def prepare(tmp_path, rows=None, **changes):
    if rows is not None:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        changes["prompts"] = str(tmp_path / "rows.jsonl")
    return align_session.prepare(dataclasses.replace(CONFIG, **changes), tmp_path)


@pytest.mark.parametrize(
    ("prompts", "reason"),
    [
        ("repeated-prompts/repeated.jsonl", "4 held-out prompts are needed, there are 0: 8 rows "),
        ("repeated-prompts/splits", "split must be one of test, train; got None; write "),
        ("lone-surrogate/prompts.jsonl", "prompts.jsonl:3: prompt has half of a surrogate pair"),
        ("none.jsonl", "no such file: "),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_used(tmp_path, prompts, reason):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        prepare(tmp_path, prompts=str(CASES / prompts))
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_a_column_that_a_reward_needs_is_needed_in_every_row(tmp_path):
    rows = [{"prompt": f"p {i}", "answer": None if i == 5 else "1"} for i in range(13)]
    with pytest.raises(DataError, match=r"rows\.jsonl:6: column 'answer' is null, which reward 'exact_match' needs$"):
        prepare(tmp_path, rows, reward="exact_match")
    with pytest.raises(AssertionError, match="a model is loaded"):
        prepare(tmp_path, rows, reward="exact_match", skip_bad_rows=True)
    with pytest.raises(ValueError, match="12 prompts are needed"):
        prepare(tmp_path, rows[:-1], reward="exact_match", skip_bad_rows=True)


@pytest.mark.robustness(
    "Data", given="--demonstrations names no column and no file", outcome="refused, with the columns there are"
)
@pytest.mark.robustness("Data", given="a prompt whose demonstration is null or empty", outcome="refused, by its line")
@pytest.mark.parametrize(
    ("column", "value", "reason"),
    [
        ("anser", "1", r"demonstrations must be a column of .*rows\.jsonl \(answer\) or a file, got 'anser'"),
        ("answer", None, r"rows\.jsonl:3: column 'answer' is null, which --demonstrations needs"),
        ("answer", " ", r"rows\.jsonl:3: column 'answer' is empty: nothing to learn from"),
        ("answer", [{"role": "assistant", "content": "1"}], r"rows\.jsonl:3: column 'answer' is no demonstration"),
    ],
)  # fmt: skip
def test_demonstrations_that_cannot_be_used(tmp_path, column, value, reason):
    rows = [{"prompt": f"p {i}", "answer": value if i == 2 else "1"} for i in range(12)]
    with pytest.raises(ValueError, match=reason):
        prepare(tmp_path, rows, method="sft", demonstrations=column)


@pytest.mark.robustness(
    "Data", given="a bad row of demonstrations or corpus", outcome="refused by its line; --skip_bad_rows counts it"
)
@pytest.mark.parametrize("method", ["sft", "ppo_ptx"])
def test_bad_rows_of_what_is_given(tmp_path, caplog, method):
    told = [json.dumps({"prompt": f"p {i}", "completion": "1"}) for i in range(8)]
    (tmp_path / "told.jsonl").write_text("\n".join(['{"prompt": "p"}', *told]))
    flag = {"sft": "demonstrations", "ppo_ptx": "corpus"}[method]
    config = dataclasses.replace(CONFIG, method=method, **{flag: str(tmp_path / "told.jsonl")})
    rows = [PromptRow(f"p {i}", {}) for i in range(8)]
    record, tokenizer = METHODS[method], text.load_tokenizer(config.policy)
    with pytest.raises(DataError, match=r"told\.jsonl:1: no column 'completion'"):
        align_inputs.load_inputs(config, record, rows, tokenizer)
    given = align_inputs.load_inputs(dataclasses.replace(config, skip_bad_rows=True), record, rows, tokenizer)
    assert len(given.demonstrations or given.corpus.prompt) == 8
    assert "1 bad rows left out" in caplog.text


@pytest.fixture
def splits(tmp_path):
    tokenizer = text.load_tokenizer(CASES / "policy")

    def splits(rows, kind="global", **options):
        (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = str(tmp_path / "pairs.jsonl")
        return reward_world.file_splits(source, tokenizer, RewardSpec(kind=kind), held_out=2, **options)

    return splits


PAIRS = [{"prompt": f"p {i}", "chosen": "a", "rejected": "b"} for i in range(6)]


@pytest.mark.robustness(
    "Data", given="pairs with a margin", outcome="it enters the losses that take one; else it is said"
)
def test_margins_of_a_file(splits, caplog):
    rows = [row | {"margin": i / 2 if i % 2 else None} for i, row in enumerate(PAIRS)]
    learn, held_out = splits(rows)
    assert learn.data.margin.tolist() == [[0.0], [0.5], [0.0], [1.5]]
    assert held_out.data.margin.tolist() == [[0.0], [2.5]]
    assert splits(PAIRS)[0].data.margin is None
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert splits(rows, "local")[0].data.margin is None
    assert "3 rows have a margin, which the loss of kind local does not use" in caplog.text


@pytest.mark.robustness(
    "Data", given="pairs whose prompt is held out too", outcome="left out of those to learn from, and counted"
)
def test_no_pair_to_learn_from_has_a_prompt_that_is_held_out(splits, caplog):
    again = [row | {"chosen": "c"} for row in PAIRS[4:]]
    learn, held_out = splits([*again, *PAIRS])
    digits = np.concatenate([learn.data.candidates.prompt, held_out.data.candidates.prompt])[:, 2]
    np.testing.assert_array_equal(np.diff(digits), 1)  # p 0 to p 5
    assert "2 of 6 rows to learn from have a prompt of the 2 held-out rows: left out" in caplog.text
    with pytest.raises(ValueError, match=r"3 of 4 rows to learn from .*: too few are left to learn from"):
        splits([PAIRS[0], *again, again[0], *PAIRS[4:]])


@pytest.mark.parametrize(
    ("kind", "good", "bad", "reason"),
    [
        ("global", {}, {"rejected": "a"}, "chosen and rejected are equal"),
        ("cost", dict.fromkeys(reward_world._HARM, True), {"rejected_harmful": None}, "rejected_harmful must be true"),
        ("process", {"completions": ["a", "b"], "labels": [1, True]}, {"labels": [1, None]}, r"labels\[1\] must"),
        ("process", {"completions": ["a"], "labels": [1]}, {"completions": [None]}, r"completions\[0\] must be a text"),
        ("outcome", {"completion": "a", "label": True}, {"label": None}, "label must be true or false, got null"),
    ],
)  # fmt: skip
def test_a_bad_row_of_labels_is_refused_by_its_line_or_counted(splits, caplog, kind, good, bad, reason):
    rows = [row | good for row in PAIRS]
    rows[1] |= bad
    with pytest.raises(DataError, match=rf"pairs\.jsonl:2: .*{reason}"):
        splits(rows, kind)
    learn, _ = splits(rows, kind, skip_bad=True)
    assert len(learn.length) == 3
    assert np.isfinite(learn.length).all()
    assert "1 bad rows left out; the first: " in caplog.text
