"""A tiny policy, a tiny session: the report, the saved reward as texts see it, files of labels, the judge."""

import dataclasses
import itertools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.align.config import AlignConfig
from experiments.reward_model import __main__ as reward_model
from experiments.reward_model import data as reward_world
from experiments.reward_model import report as reward_report
from experiments.reward_model.__main__ import RewardConfig
from tests.tiny import save_policy
from tiltjax.align import session as align_session
from tiltjax.data import text
from tiltjax.models import pretrained
from tiltjax.rewards.gate import score
from tiltjax.train.learned_reward import load_reward_model, save_reward_model
from tiltjax.train.reward_model import RewardSpec, new_model

SETTINGS = {"gold": f"{__name__}:low", "scale": 3.0, "num_candidates": 4, "num_prompts": 8, "num_eval_prompts": 4,
            "max_tokens": 6, "steps": 2, "checkpoint_every": 2, "batch_size": 8, "sample_batch": 8, "lora_rank": 2,
            "learning_rate": 0.03,
            "compute_dtype": "float32", "compilation_cache": ""}  # fmt: skip


def low(prompts, completions):
    """Words with a small number less those with a large one."""
    return [sum(1 if word in ("w0", "w1", "w2", "w3", "w4") else -1 for word in c.split()) / 6 for c in completions]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("reward")
    words = ["<eos>", "<pad>", "A", "B", *(f"w{i}" for i in range(12))]
    save_policy(home / "policy", words)
    (home / "policy/generation_config.json").write_text('{"eos_token_id": [0], "pad_token_id": 1}')
    rows = [{"prompt": " ".join(words[4 + i % 9 : 7 + i % 9 - i % 3 + i // 9])} for i in range(12)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def settings(home, output, **changes):
    return {"policy": f"{home}/policy", "prompts": f"{home}/prompts.jsonl", "output": f"{output}"} | SETTINGS | changes


@pytest.fixture(scope="module")
def finished(home):
    config = RewardConfig(**settings(home, home / "run"))
    return config, reward_model.run(config)


def test_the_report_has_everything_of_every_kind(home, finished):
    _, results = finished
    assert set(results["models"]) == {"global"}
    assert json.loads((home / "run" / "results.json").read_text())["agreement"] is None
    for found in results["models"].values():
        assert 0 < found["gold_nll"][0] < np.log(2)
        assert found["gold_accuracy"][0] > 0.5
        assert set(found["curve"]) == {1, 2, 3, 4}
        assert found["curve"][1].mean == pytest.approx(found["gold_curve"][1].mean, abs=1e-6)
        assert all(found["gold_curve"][n].mean >= found["curve"][n].mean - 1e-6 for n in (2, 3, 4))
        assert found["nll"][0] != pytest.approx(np.log(2), abs=1e-6)
    report = (home / "run" / "report.md").read_text()
    for name in ("best_of_n.png", "length.png"):
        assert f"({name})" in report
        assert len((home / "run" / name).read_bytes()) > 10_000
    for line in ("| global | comparisons | ", "| random | "):
        assert line in report


def test_the_saved_model_is_the_reward_that_align_is_told(home, finished):
    """Texts read from disk score as in the run, centred, and every prompt's completions wherever they stand."""
    folder = home / "run" / "global" / "model"
    assert (folder / "generation_config.json").read_text() == (home / "policy/generation_config.json").read_text()
    told = dataclasses.replace(finished[0].drawing(), reward=f"model:{folder}")
    session = align_session.prepare(told, home / "none")
    assert session.reward.fingerprint
    prompts = [row.prompt for row in session.rows["heldout"] for _ in range(4)]
    completions = [f"w{i % 9} w{i % 5}" if i % 4 else "w1" for i in range(16)]
    together = score(session.reward, prompts, completions, progress=False)
    alone = session.reward(prompts[5:6], completions[5:6])
    np.testing.assert_allclose(together[5], alone[0], atol=1e-5)
    assert np.ptp(together) > 1e-4
    with pytest.raises(FileNotFoundError, match=r"reward\.json: no such file"):
        load_reward_model(home / "policy")


def test_a_saved_preference_model_lets_the_completions_of_a_prompt_compete(home, tmp_path):
    spec, tokenizer = RewardSpec(kind="preference"), text.load_tokenizer(home / "policy")
    model = new_model(spec, pretrained.load(home / "policy"))
    model.kernel = nnx.Param(jax.random.normal(jax.random.key(1), model.kernel.shape))
    save_reward_model(model, spec, tmp_path / "model", tokenizer=tokenizer)
    rivals = load_reward_model(tmp_path / "model", compute_dtype="float32", batch_size=8)
    completions = ["w1", "w2 w3", "w1 w1", "", "w4", "w5", "w6", "w7 w8", "w1", "w2 w3", "w1 w1", ""]
    groups = np.array(rivals(["w1"] * 4 + ["w2"] * 4 + ["w1"] * 4, completions)).reshape(3, 4)
    np.testing.assert_allclose(groups.sum(1), 0, atol=1e-5)  # Log-odds against each other.
    np.testing.assert_allclose(groups[0], groups[2], atol=1e-6)
    assert np.ptp(groups, axis=1).min() > 0.1
    with pytest.raises(ValueError, match="give each at least 2"):
        rivals(["w1", "w2"], ["w3", "w4"])


@pytest.mark.robustness(
    "Checkpoints",
    given="a reward model whose reward.json has a field of another type, or an unknown one",
    outcome="refused with the path and the field before a model is read",
)
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": None}, "kind must be a text, got None"),
        ({"kind": "local", "beta": "1"}, "beta must be a finite number above 0, got '1'"),
        ({"kind": "global", "offset": float("nan")}, "offset must be a finite number, got nan"),
        ({"kind": "global", "separators": 3}, "separators must be a list of integers, got 3"),
        ({"kind": "process", "step_tokens": 1.5}, "step_tokens must be an integer .*, got 1.5"),
        ({"kind": "global", "colour": 1}, "the field 'colour' is unknown"),
        ({"beta": 1.0}, "the field 'kind' is missing"),
        ({"kind": "best"}, "kind must be one of .*; got 'best'"),
    ],
)
def test_a_damaged_meaning_is_refused(fields, words, tmp_path):
    (tmp_path / "reward.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"^{tmp_path}/reward.json: not a reward model \({words}"):
        load_reward_model(tmp_path)


def test_a_run_goes_on_with_another_kind_and_no_other_settings(home, finished, monkeypatch):
    config, results = finished
    with pytest.raises(ValueError, match="there is a run already"):
        reward_model.run(config)
    with pytest.raises(ValueError, match=r"--resume with other settings: scale \(3\.0 -> 2\.0\)"):
        reward_model.run(dataclasses.replace(config, scale=2.0, resume=True))

    def no_step(*args):
        raise AssertionError("every step was made")

    monkeypatch.setattr(reward_model, "sharded_step", lambda *args: no_step)
    again = reward_model.run(dataclasses.replace(config, kinds="global", resume=True, attention="plain", remat="dots"))
    assert again["models"]["global"] == results["models"]["global"]


def test_steps_of_a_file_are_learned_where_they_end(home, tmp_path, monkeypatch):
    rows = [{"prompt": f"w{i} w2", "completions": [f"w{i % 5} w3", "w4", "w5 w6"][: 1 + i % 3],
             "labels": [True, False, True][: 1 + i % 3]} for i in range(10)]  # fmt: skip
    data = tmp_path / "steps.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = RewardConfig(
        **settings(home, tmp_path / "run", kinds="process", data=str(data), gold="", num_eval_prompts=2)
    )
    monkeypatch.setattr(reward_model, "train", lambda config, session, spec, data: new_model(spec, session.model))
    found = reward_model.run(config)["models"]["process"]
    assert found["nll"][0] == pytest.approx(np.log(2), abs=1e-6)
    assert found["curve"] == {}
    assert found["gold_nll"] is None
    tokenizer = text.load_tokenizer(home / "policy")
    learn, held_out = reward_world.file_splits(str(data), tokenizer, RewardSpec(kind="process"), held_out=2)
    assert (len(learn.length), len(held_out.length)) == (8, 2)
    ends = [np.flatnonzero(row[0] != -100).tolist() for row in learn.data.step_label]
    assert ends[:3] == [[2], [1, 3], [1, 2, 5]]  # The last step ends with EOS.
    assert learn.data.step_label[2, 0, [1, 2, 5]].tolist() == [1, 0, 1]
    (tmp_path / "bad.jsonl").write_text((json.dumps({"prompt": "w1", "completions": ["w1"], "labels": []}) + "\n") * 4)
    with pytest.raises(ValueError, match=r"bad\.jsonl:1: completions and labels must be lists"):
        reward_world.file_splits(str(tmp_path / "bad.jsonl"), tokenizer, RewardSpec(kind="process"), held_out=2)


def test_pairs_and_harm_of_a_file_keep_their_order(home, tmp_path):
    tokenizer, data = text.load_tokenizer(home / "policy"), tmp_path / "pairs.jsonl"
    row = {"prompt": "w1", "chosen": "w2", "rejected": "w3 w4", "chosen_harmful": False, "rejected_harmful": True}
    data.write_text("".join(json.dumps(row | {"prompt": f"w{i}"}) + "\n" for i in range(4)))
    learn, _ = reward_world.file_splits(str(data), tokenizer, RewardSpec(kind="cost"), held_out=2)
    assert learn.data.label.tolist() == [[False, True]] * 2
    assert learn.data.pair.tolist() == [[[0, 1]]] * 2
    assert learn.data.candidates.completion_mask.sum(-1).tolist() == [[2, 3]] * 2
    assert learn.length.tolist() == [[2, 5]] * 2
    del row["chosen_harmful"]
    data.write_text((json.dumps(row) + "\n") * 4)
    with pytest.raises(ValueError, match=r"pairs\.jsonl:1: chosen_harmful must be true or false"):
        reward_world.file_splits(str(data), tokenizer, RewardSpec(kind="cost"), held_out=2)


def test_a_judge_that_is_asked_in_both_orders_has_no_favourite_place(home):
    compare = reward_world.judge(f"{home}/policy", AlignConfig(compute_dtype="float32"), criterion="w1", batch_size=4)
    first, second = ["w1 w2", "w3", "w4"], ["w5", "w6 w7", "w4"]
    forward = compare(["w1"] * 3, first, second)
    np.testing.assert_allclose(forward, -compare(["w1"] * 3, second, first), atol=1e-5)
    np.testing.assert_allclose(forward[2], 0, atol=1e-6)
    assert np.abs(forward[:2]).min() > 1e-4


def test_the_policy_computes_as_it_is_told():
    told = RewardConfig(attention="plain", remat="dots").drawing()
    assert (told.attention, told.remat) == ("plain", "dots")


def test_gold_of_the_best_by_a_proxy_is_the_mean_over_subsets():
    rng = np.random.default_rng(0)
    proxy, gold = rng.normal(size=(2, 3, 7)).astype(np.float32)
    for n in (1, 3, 7):
        subsets = np.array(list(itertools.combinations(range(7), n)))
        best = np.take_along_axis(subsets[None], proxy[:, subsets].argmax(-1)[..., None], axis=-1)[..., 0]
        expected = np.take_along_axis(gold, best, axis=1).mean(1)
        np.testing.assert_allclose(reward_report.gold_of_best(proxy, gold, n=n), expected, rtol=1e-5)


def test_length_counts_only_beyond_the_gold_reward():
    rng = np.random.default_rng(1)
    length = rng.normal(size=(40, 8))
    gold = 0.7 * length + rng.normal(size=length.shape)
    honest = reward_report.length_effect(2 * gold, length, gold)
    assert honest.mean == pytest.approx(0, abs=1e-9)
    assert reward_report.length_effect(2 * gold, length, None).low > 0.3
    biased = reward_report.length_effect(gold + length + 0.1 * rng.normal(size=length.shape), length, gold)
    assert 0.4 < biased.low < biased.mean < biased.high < 0.7


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kinds": "global,hunch"}, "kinds must be one of"),
        ({"label": "oracle"}, "label must be gold or judge:<policy>, got 'oracle'"),
        ({"label": "judge:x", "kinds": "cost"}, "a judge compares completions"),
        ({"scale": 0.0}, "scale must be a finite number above 0"),
        ({"microbatches": 3}, "microbatches must divide batch_size=2"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        RewardConfig(**changes)
