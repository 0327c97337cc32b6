"""A session in a notebook: own reward, own prompts, no flags and no directory; it does what the command does."""

import json

import jax
import numpy as np
import pytest

from experiments.align import __main__ as align
from experiments.align.config import AlignConfig
from tests.tiny import save_policy
from tiltjax.align import Session, Settings
from tiltjax.data.candidates import load
from tiltjax.data.datasets import DataError, PromptRow
from tiltjax.models import pretrained

WORDS = ["<eos>", "<pad>", *(f"w{i}" for i in range(14))]
ROWS = [{"prompt": f"w{i % 14} w{i // 14} w3", "target": i % 4} for i in range(18)]
SIZES = {"num_candidates": 4, "num_prompts": 8, "num_eval_prompts": 4, "max_tokens": 5, "sample_batch": 8,
         "compute_dtype": "float32"}  # fmt: skip
FIT = {"beta": 0.5, "steps": 2, "batch_size": 8, "lora_rank": 2, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("session") / "policy"
    save_policy(folder, WORDS)
    return folder


def near(prompts, completions, target):
    """Minus the distance between the words of a completion and a column of its prompt."""
    return [-abs(len(said.split()) - wanted) / 3 for said, wanted in zip(completions, target, strict=True)]


@pytest.fixture(scope="module")
def session(policy):
    return Session.load(policy, reward=near, prompts=ROWS, **SIZES)


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_candidates_are_rewarded_by_the_function_with_the_columns_of_their_rows(session):
    drawn = session.sample()
    said, rows = session.texts(drawn), session.rows["train"]
    expected = [near(None, group, [row.columns["target"]] * 4) for row, group in zip(rows, said, strict=True)]
    np.testing.assert_allclose(drawn.reward, expected, rtol=1e-6)
    assert session.sample() is drawn  # A function of the session.
    with pytest.raises(ValueError, match="split must be one of train, heldout, got 'test'"):
        session.sample("test")


def test_the_estimate_is_that_of_the_candidates(session, caplog):
    reward = np.float64(session.sample().reward)
    found = session.estimate(beta=0.5)
    np.testing.assert_allclose(found.log_z, np.log(np.exp(reward / 0.5).mean(1)), rtol=1e-5)
    assert not caplog.records
    assert found.log_z.shape == (8,)


def test_it_ends_with_the_bits_of_the_command(policy, tmp_path, session):
    """The command draws, fits, and writes; the session has the same policy in memory, and saves it where it is told."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = {"policy": str(policy), "prompts": str(tmp_path / "prompts.jsonl"), "output": str(tmp_path / "run")}
    results = align.run(AlignConfig(**options, reward=f"{__name__}:near", method="tilted_mle", **FIT, **SIZES))
    tuned = session.align("tilted_mle", session.sample(), **FIT)
    same(pretrained.load(tmp_path / "run" / "hf"), pretrained.load(saved(session, tuned, tmp_path)))
    same(load(tmp_path / "run" / "candidates" / "train.npz"), session.sample())
    found = session.evaluate(tuned)
    assert {name: value for name, value in found.results.items() if name != "settings"} == {
        name: value for name, value in results.items() if name != "settings"
    }
    assert "| tilted_mle |" in str(found)
    found.save(tmp_path / "mine")
    files = ("report.md", "results.json", "frontier.png", "ess.png", "hf/model.safetensors", "hf/tokenizer.json")
    assert all((tmp_path / "mine" / name).stat().st_size > 100 for name in files)
    assert "## Command" not in (tmp_path / "mine" / "report.md").read_text()


def saved(session, tuned, folder):
    session.save(tuned.model, folder / "saved")
    return folder / "saved"


def test_every_method_has_its_own_numbers_where_nothing_is_said(session):
    """What `load` resolved for its own method does not stick to another one."""
    changed = session.settings.change(method="rloo")
    assert (changed.beta, changed.temperature) == (Settings(method="rloo").beta, Settings(method="rloo").temperature)
    assert session.settings.change(method="rloo", beta=0.3).change(method="grpo").beta == 0.3


def test_other_records_run_on_the_same_session(session):
    before = session.sample()
    tuned = session.align("dpo", **FIT)
    assert tuned.settings.method == "dpo"
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), tuned.model, session.model)
    assert 1e-6 < max(jax.tree.leaves(moved)) < 1
    assert session.sample() is before
    assert session.settings.method == "soft_best_of_n"


def test_without_training_the_policy_is_the_reference(session):
    evaluation = session.evaluate(session.align())
    assert "tuned" not in evaluation.results["points"]
    assert evaluation.export is None


def test_metrics_and_checkpoints_are_kept_where_a_directory_is_wanted(session, tmp_path):
    before = session.settings
    whole = session.align("rloo", directory=tmp_path / "whole", checkpoint_every=1, **FIT)
    assert len((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()) == 2

    class Cut(Exception):
        pass

    def cut(played, model):
        if played == 2:
            raise Cut

    with pytest.raises(Cut):
        session.align("rloo", directory=tmp_path / "cut", checkpoint_every=1, watch=cut, **FIT)
    again = session.align("rloo", directory=tmp_path / "cut", checkpoint_every=1, resume=True, **FIT)
    same(whole.model, again.model)
    assert session.settings == before


def test_candidates_are_kept_where_the_session_has_a_directory(policy, session, tmp_path):
    kept = Session.load(policy, reward=near, prompts=ROWS, directory=tmp_path, **SIZES)
    same(kept.sample(), session.sample())
    again = Session.load(policy, reward=near, prompts=ROWS, directory=tmp_path, **SIZES)
    same(again.sample(), session.sample())
    other = Session.load(policy, reward=near, prompts=ROWS[::-1], directory=tmp_path, **SIZES)
    with pytest.raises(ValueError, match=r"train\.npz"):
        other.sample()


def test_rows_may_be_texts_and_are_divided_two_to_one(policy):
    found = Session.load(policy, reward="length?target=2", prompts=[row["prompt"] for row in ROWS], max_tokens=4)
    assert [len(found.rows[name]) for name in ("train", "heldout")] == [12, 6]
    assert found.rows["train"][0] == PromptRow(prompt="w0 w0 w3", columns={}, place="rows:1")


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (
            DataError,
            "rows:2: prompt must be a text or a list of messages, got a number",
            {"prompts": [{"prompt": "w1"}, {"prompt": 3}] * 8},
        ),
        (DataError, "rows:1: no column 'target', which reward 'near' needs", {"prompts": ["w1", "w2"] * 8}),
        (TypeError, "unexpected keyword argument 'candidates'", {"candidates": 3}),
        (ValueError, "num_candidates must be at least 2, got 1", {"num_candidates": 1}),
    ],
)
def test_what_cannot_be_loaded_is_said_in_one_line(policy, error, message, options):
    with pytest.raises(error) as told:
        Session.load(policy, **{"reward": near, "prompts": ROWS, **SIZES, **options})
    assert message in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("message", "method", "options"),
    [
        ("num_candidates is no setting of a fit", "tilted_mle", {"num_candidates": 8}),
        ("method must be one of", "tilted", {}),
        ("method spin needs demonstrations", "spin", {"steps": 4}),
        ("batch_size must be a multiple of data x fsdp = 8, got 4", "tilted_mle", {"batch_size": 4}),
    ],
)
def test_what_a_fit_cannot_do_is_refused(session, message, method, options):
    with pytest.raises(ValueError, match=message):
        session.align(method, **FIT | options)
