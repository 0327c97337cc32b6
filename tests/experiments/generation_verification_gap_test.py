"""The stages run from end to end once, tiny; worlds and laws are held to NumPy loops, thresholds to made-up figures."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.generation_verification_gap import __main__ as experiment
from experiments.generation_verification_gap import report as gap_report
from experiments.generation_verification_gap import stages as gap_stages
from experiments.generation_verification_gap import world as gap_world
from experiments.generation_verification_gap.world import Task, parse_tasks
from tiltjax.exact import bandit
from tiltjax.samplers.best_of_n import best_of_n

TASKS = {
    "subset": Task("subset", 3, 64),
    "subsetbits": Task("subsetbits", 3, 64),
    "linear": Task("linear", 2, 64),
    "lookup": Task("lookup", 3, 64, 4),
}


def gold(task, secret, prompt, completion):
    """The reward as it is told in words."""
    if task.kind == "linear":
        values = [sum(prompt[d] * secret[d, h] for d in range(len(prompt))) for h in range(task.horizon)]
        return sum(value if token else -value for token, value in zip(completion, values, strict=True))
    if task.kind == "lookup":
        return sum(token == wanted for token, wanted in zip(completion, secret[int(np.argmax(prompt))], strict=True))
    return -4 * abs(sum(w for w, token in zip(prompt[:-1], completion, strict=True) if token) - prompt[-1])


def read(number, horizon):
    return [int(bit) for bit in f"{number:0{horizon}b}"]


@pytest.mark.parametrize("name", TASKS)
def test_gold_reward_is_what_the_task_says(name):
    task = TASKS[name]

    @jax.jit
    def world(key):
        keys = jax.random.split(key)
        secret, prompt = task.secret(keys[0]), task.prompts(keys[1], 5)
        return secret, prompt, task.reward(secret, prompt)

    secret, prompt, reward = jax.tree.map(np.asarray, world(jax.random.key(1)))
    expected = [[gold(task, secret, row, read(i, task.horizon)) for i in range(2**task.horizon)] for row in prompt]
    np.testing.assert_allclose(reward, expected, rtol=1e-5, atol=1e-6)
    if name == "subset":
        w, share = prompt[:, :-1], prompt[:, -1] / prompt[:, :-1].sum(-1)
        assert ((w >= 0.2) & (w <= 1)).all()
        assert ((share >= 0.1) & (share <= 0.9)).all()


@pytest.mark.parametrize("name", ["subset", "lookup"])
def test_a_completion_is_scored_alone_as_in_the_tree(name):
    task = TASKS[name]

    @jax.jit
    def scores(key):
        keys = jax.random.split(key, 4)
        net = gap_world.init_network(keys[0], task, width=5)
        net["policy"], net["reward"] = jax.random.normal(keys[1], (2, 5))
        prompt, completion = task.prompts(keys[2], 4), jax.random.randint(keys[3], (4, 3), 0, 2**task.horizon)
        tree = [fn(net, task, prompt) for fn in (gap_world.tree_logp, gap_world.tree_reward)]
        alone = [fn(net, task, prompt, completion) for fn in (gap_world.completion_logp, gap_world.completion_reward)]
        return tree, alone, completion

    tree, alone, completion = jax.tree.map(np.asarray, scores(jax.random.key(2)))
    for every, some in zip(tree, alone, strict=True):
        np.testing.assert_allclose(np.take_along_axis(every, completion, axis=1), some, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.exp(tree[0]).sum(-1), 1, rtol=1e-5)
    assert tree[0].std() > 0.01


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one task on two seeds, cut down; its figures mean nothing, their relations everything."""
    directory = tmp_path_factory.mktemp("gap") / "run"
    config = experiment.GapConfig(tasks="subset2:64", num_seeds=2, seed=5, output=str(directory), quick=True)
    return config, directory, experiment.run(config)


def test_run_leaves_its_report(finished):
    _, directory, results = finished
    assert json.loads((directory / "results.json").read_text()) == results
    report = (directory / "report.md").read_text()
    assert "No threshold was stated for these tasks." in report
    assert "--tasks=subset2:64 --num_seeds=2 --seed=5" in report
    for name in ("gap.png", "objective.png"):
        assert (directory / name).read_bytes().startswith(b"\x89PNG")


def test_no_policy_is_worth_more_than_the_optimum(finished):
    figures = finished[-1]["tasks"]["subset2:64"]
    J = {name: np.array(values) for name, values in figures["objective"].items()}
    assert all(value.shape == (2,) and (value <= J["optimum"] + 1e-5).all() for value in J.values())
    # Exact ascent of the gold objective is an ascent, and early stopping may always stay where it began.
    assert (J["online_gold"] > J["sft"]).all()
    best = {name: np.array(values) for name, values in figures["best_of_64"].items()}
    assert all((value <= best["oracle"] + 1e-5).all() for value in best.values())
    assert set(figures["local_scale"]) <= {np.float32(s).item() for s in gap_stages.LOCAL_SCALES}
    np.testing.assert_allclose(figures["delta_verifier"], J["online_global"] - J["online_local"])
    np.testing.assert_allclose(
        figures["normalised_gap"], (J["online_global"] - J["online_local"]) / (J["optimum"] - J["sft"])
    )


def test_the_twin_has_no_gap_at_one_token(finished):
    (row,) = finished[-1]["twin"]
    assert (row["horizon"], row["global_dimension"], row["local_dimension"]) == (1, pytest.approx(1), pytest.approx(1))
    assert row["online_kl"] == pytest.approx(row["offline_kl"], rel=1e-9)


def test_a_run_is_not_overwritten(finished):
    with pytest.raises(ValueError, match="there is a run already; pass --overwrite to remove it"):
        experiment.run(finished[0])


def test_best_of_64_is_what_the_sampler_picks():
    rng = np.random.default_rng(3)
    ref, (proxy, gold) = rng.dirichlet(np.ones(8)), rng.normal(size=(2, 8))
    draws = rng.choice(8, p=ref, size=(4000, 8))
    picked = draws[np.arange(4000), jax.jit(best_of_n)(proxy[draws])]
    law = np.asarray(jax.jit(lambda ref, proxy: bandit.best_of_n_law(ref, proxy, n=8))(ref, proxy))
    assert abs(gold[picked].mean() - law @ gold) < 4 * np.sqrt(law @ gold**2 / 4000)


def test_fit_keeps_the_best_and_the_start_if_nothing_is_better():
    schedule = gap_stages.Schedule(steps=40, batch_size=4, checks=8, learning_rate=0.1)
    data = jnp.full((8,), 2.0)

    def loss(net, rows):
        return jnp.square(net["x"] - rows)

    def run(key, held_out):
        return gap_stages.fit(key, {"x": jnp.zeros(())}, data, held_out, loss, schedule)

    run = jax.jit(run)
    towards, value = run(jax.random.key(0), jnp.full((3,), 2.0))
    assert abs(float(towards["x"]) - 2) < 0.5
    assert float(value) == pytest.approx((float(towards["x"]) - 2) ** 2, rel=1e-5)
    away, value = run(jax.random.key(0), jnp.full((3,), -1.0))
    assert (float(away["x"]), float(value)) == (0.0, 1.0)
    between, value = run(jax.random.key(0), jnp.full((3,), 0.5))
    assert 0 < float(between["x"]) < 1.2
    assert float(value) < 0.25


def figures(**changes):
    """Made-up figures of one task on two seeds, on which nothing is to be remarked."""
    base = {
        "nll": {"oracle": [0.3, 0.3], "global": [0.32, 0.32], "local": [0.4, 0.4], "dpo": [0.45, 0.45]},
        "objective": {"online_gold": [0.99, 0.99], "optimum": [1.0, 1.0]},
        "nll_gap": [0.05, 0.08],
        "best_of_64_gap": [0.3, 0.4],
        "delta_verifier": [0.1, 0.12],
        "delta_dpo": [0.1, 0.12],
        "delta_control": [0.0, 0.0],
    }
    return base | changes


def test_thresholds_are_judged_by_seed_or_by_mean():
    good = {
        "subset8:2000": figures(),
        "subset1:2000": figures(delta_verifier=[0.015, -0.018]),
        "lookup8p16:4000": figures(delta_verifier=[0.06, -0.3]),
        "subset4:2000": figures(delta_verifier=[-9.0, -9.0]),
    }
    verdicts = gap_report.judge(good)
    assert [v.threshold for v in verdicts] == list(gap_report.THRESHOLDS)
    assert all(v.holds for v in verdicts)
    bad = good | {
        "subset8:2000": figures(delta_verifier=[0.2, 0.04], nll_gap=[0.019, 0.5]),
        "subset1:2000": figures(delta_verifier=[0.019, 0.018]),
    }
    fails = [str(v.threshold) for v in gap_report.judge(bad) if not v.holds]
    assert fails == [
        "NLL(local) - NLL(global), each seed >= 0.02",
        "J(online on global) - J(online on local), each seed >= 0.05",
        "J(online on global) - J(online on local), mean in [-0.01, 0.01]",
    ]
    assert [v.threshold.task for v in gap_report.judge({"subset1:2000": figures()})] == ["subset1:2000"] * 2


REMARKED = {
    "unlearned": ("lookup8p64:2000", {"nll": {"oracle": [0.4], "global": [0.65], "local": [0.68], "dpo": [0.7]}}),
    "no_third_link": ("subset8:2000", {"nll": figures()["nll"] | {"dpo": [0.4]}}),
    "control": ("subset8:2000", {"delta_control": [0.02, 0.03]}),
    "bottleneck": ("subset8:2000", {"objective": {"online_gold": [0.8], "optimum": [1.0]}}),
    "readable": ("linear8:2000", {}),
    "reversed": ("subset8:2000", {"delta_verifier": [-0.01, -0.1]}),
    "mixed": ("subset8:2000", {"delta_verifier": [0.01, -0.01]}),
}


@pytest.mark.parametrize("remark", gap_report.REMARKS)
def test_what_does_not_fit_is_said(remark):
    label, changes = REMARKED[remark]
    (sentence,) = gap_report.caveats({"subset4:2000": figures(), label: figures(**changes)})
    assert sentence.startswith(f"{gap_report.REMARKS[remark]}: {label} (")
    assert "subset4" not in sentence


def test_figures_that_fit_need_no_remark():
    assert (
        gap_report.caveats({"subset8:2000": figures(), "subset1:2000": figures(delta_verifier=[-0.01, -0.001])}) == []
    )


def test_tasks_are_read_from_names_and_sets():
    core = parse_tasks("core")
    assert [task.label for task in core] == ["subset8:2000", "subset1:2000", "lookup8p16:4000"]
    assert core[-1] == Task("lookup", 8, 4000, 16)
    assert [t.label for t in parse_tasks("linear3:10, core,linear3:10")][:2] == ["linear3:10", core[0].label]
    labels = [task.label for task in parse_tasks("all")]
    assert len(labels) == len(set(labels)) == 10
    assert [t.label for t in parse_tasks("subsetbits8:20")] == ["subsetbits8:20"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "subset8"}, "lookupHpP:n, core, horizon, data, controls or all; got 'subset8'"),
        ({"tasks": "subset11:50"}, "tasks must have a horizon between 1 and 10 to be enumerated, got 'subset11:50'"),
        ({"tasks": "lookup2p0:50"}, "tasks must have at least 2 pairs and 1 prompt, got 'lookup2p0:50'"),
        ({"num_seeds": 0}, "num_seeds must be at least 1, got 0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError) as error:
        experiment.GapConfig(**options)
    assert str(error.value).endswith(message)


def test_bad_flags_end_in_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(experiment, "from_flags", lambda config: config(tasks="subset", output=str(tmp_path / "run")))
    with pytest.raises(SystemExit) as stop:
        experiment.main(["gap"])
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert err.startswith("error: tasks must be a comma-separated list of subsetH:n")
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()
