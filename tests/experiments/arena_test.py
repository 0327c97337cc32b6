"""The arena run from end to end, tiny: its laws are held to NumPy, its loop to what must come out."""

import dataclasses
import functools
import itertools
import json

import jax
import numpy as np
import pytest

from experiments.arena import __main__ as arena
from experiments.arena import report as arena_report
from experiments.arena import run as arena_run
from experiments.arena import world as arena_world
from experiments.arena.claims import Results, judge
from tiltjax.train.methods import get_method
from tiltjax.train.rounds import init_players

CONFIG = arena_world.WorldConfig(vocab_size=3, max_tokens=2, num_prompts=2, width=8, pretraining_steps=40)
BUDGET = arena_run.Budget(updates=32, samples=32, seeds=2, betas=(1.0, 0.5), learning_rate=1e-2)


@functools.cache
def world():
    return arena_world.make_world(CONFIG)


def test_completions_are_all_there_once():
    space = arena_world.make_space(4, 3)
    words = [(0,)] + [(*p, 0) for t in (1, 2) for p in itertools.product((1, 2, 3), repeat=t)]
    words += list(itertools.product((1, 2, 3), repeat=3))
    found = [tuple(y[m].tolist()) for y, m in zip(space.completion, space.mask, strict=True)]
    assert sorted(found) == sorted(words)
    for k, y in enumerate(space.completion):
        assert space.number[int(y @ [16, 4, 1])] == k
    assert (space.number >= 0).sum() == len(words)


def test_the_law_is_the_product_of_the_next_token_laws_and_the_models_score():
    w = world()
    logp = w.ref_logp
    np.testing.assert_allclose(np.exp(logp).sum(-1), 1, rtol=1e-5)
    prompts = w.batch_of_prompts(2)
    every = np.broadcast_to(w.space.completion[None], (2, *w.space.completion.shape))
    asked = dataclasses.replace(prompts, completion=every, completion_mask=np.broadcast_to(w.space.mask, every.shape))
    token_logp = np.asarray(jax.jit(w.view)(w.params, asked).token_logp)
    np.testing.assert_allclose(np.where(w.space.mask, token_logp, 0).sum(-1), logp, atol=1e-5)
    assert np.std(logp) > 0.3
    reward = jax.jit(w.score)(asked).reward
    np.testing.assert_array_equal(reward, w.reward)
    p = np.exp(logp)
    np.testing.assert_allclose((p * w.reward).sum(-1), 0, atol=1e-4)
    np.testing.assert_allclose((p * w.reward**2).sum(-1), 1, rtol=1e-3)


def test_samples_follow_the_law():
    w, sources = world(), ("current", "data", "corpus", "greedy")
    players = init_players(get_method("rloo"), w.params, arena_run.optax.sgd(0.1))
    draw, prompts = w.sampler(w.tilt(0.5)), w.batch_of_prompts(2)
    every = jax.jit(lambda key: [draw(key, players, source, prompts, 4000) for source in sources])(jax.random.key(0))
    drawn = {
        name: w.space.number[np.asarray(part.completion) @ [3, 1]] for name, part in zip(sources, every, strict=True)
    }
    for source, law in (("current", w.ref_logp), ("data", w.tilt(0.5)), ("corpus", w.corpus_logp)):
        counts = np.stack([np.bincount(row, minlength=law.shape[1]) for row in drawn[source]]) / 4000
        np.testing.assert_allclose(counts, np.exp(law), atol=0.04)
    assert [len(set(row.tolist())) for row in drawn["greedy"]] == [1, 1]
    cold = w.sampler(w.tilt(0.5), temperature=0.4)(jax.random.key(1), players, "current", prompts, 4000)
    seen = jax.jit(functools.partial(w.view, temperature=0.4))(w.params, cold).token_logp
    np.testing.assert_allclose(np.where(cold.completion_mask, seen - cold.old_token_logp, 0), 0, atol=1e-5)
    rows = np.asarray(w.outputs(w.params, w.prompt)[0], np.float64) / 0.4
    law = np.exp(w.law(rows - np.log(np.exp(rows).sum(-1, keepdims=True))))
    drawn_cold = w.space.number[np.asarray(cold.completion) @ [3, 1]]
    counts = np.stack([np.bincount(row, minlength=law.shape[1]) for row in drawn_cold]) / 4000
    np.testing.assert_allclose(counts, law, atol=0.04)
    assert np.abs(law - np.exp(w.ref_logp)).max() > 0.1
    whole = np.where(every[0].completion_mask, every[0].old_token_logp, 0).sum(-1)
    np.testing.assert_allclose(whole, np.take_along_axis(w.ref_logp, drawn["current"], axis=1), atol=1e-5)


def test_other_optima():
    w = world()
    ref = np.exp(np.float64(w.ref_logp))
    law = w.constrained(0.3)
    assert (np.exp(law) * w.cost).sum() <= 1e-5
    free = np.asarray(w.tilt(0.3))
    assert (np.exp(free) * w.cost).sum() > 0
    slope = [np.linalg.lstsq(np.stack([w.cost[i], np.ones_like(w.cost[i])], 1), (law - free)[i], rcond=None)[0][0]
             for i in range(2)]  # fmt: skip
    assert slope[0] == pytest.approx(slope[1], rel=1e-3)
    assert slope[0] < 0
    equilibrium = np.exp(np.float64(w.equilibrium(0.2)))
    for q, p, r in zip(ref, equilibrium, np.float64(w.reward), strict=True):
        wins = 1 / (1 + np.exp(r[None] - r[:, None]))
        again = q * np.exp(wins @ p / 0.2)
        np.testing.assert_allclose(again / again.sum(), p, atol=1e-5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A method on the tiny world, in this process; in the report, beside one that never moves."""
    folder = tmp_path_factory.mktemp("arena")
    methods = [get_method("rloo")]
    results = arena.compete(world(), BUDGET, methods, folder / "methods")
    still = results[0] | {
        "name": "online_tilted_mle",
        "curves": [[[run[0]] * len(run) for run in seeds] for seeds in results[0]["curves"]],
    }
    table = arena_report.write(folder, world(), BUDGET, [still, *results])
    return folder, methods, results, table


def test_every_checkpoint_obeys_the_identity_of_the_objective(finished):
    """E r - beta KL(policy || ref) = beta log Z - beta KL(policy || tilt), at every strength, seed and checkpoint."""
    _, _, results, _ = finished
    for result in results:
        curves = Results(curves={"m": np.array(result["curves"])}, betas=BUDGET.betas)
        for i, beta in enumerate(BUDGET.betas):
            log_z = np.log((np.exp(np.float64(world().ref_logp)) * np.exp(world().reward / beta)).sum(-1)).mean()
            for place in range(BUDGET.checkpoints + 1):
                reward, kl, gap = (curves.of("m", name, place)[i] for name in ("reward", "kl", "to_tilt"))
                np.testing.assert_allclose(reward - beta * kl, beta * (log_z - gap), atol=2e-4)
        assert np.array(result["curves"]).shape == (2, 2, 17, len(arena_run.MEASURES))
        assert result["samples"][-1] == 32 * 32


def test_what_is_published_without_a_kl_term_can_run_so():
    budget = dataclasses.replace(BUDGET, updates=16, seeds=1, published=True)
    strong, weak = np.array(arena_run.run(world(), get_method("dr_grpo"), budget)["curves"])[:, 0]
    kl = arena_run.MEASURES.index("kl")
    np.testing.assert_array_equal(strong[:, kl], weak[:, kl])  # No strength of a KL term, no difference.
    assert strong[-1, kl] > 0


def test_online_learning_approaches_the_tilt(finished):
    _, _, results, _ = finished
    rloo = Results(curves={"rloo": np.array(results[0]["curves"])}, betas=BUDGET.betas)
    assert (rloo.of("rloo", "to_tilt") < 0.5 * rloo.of("rloo", "to_tilt", 0)).all()


def test_results_are_taken_from_disk_and_others_are_not(finished, monkeypatch):
    folder, methods, results, _ = finished
    monkeypatch.setattr(arena, "run", lambda *_: pytest.fail("it was there already"))
    assert arena.compete(world(), BUDGET, methods, folder / "methods") == results
    monkeypatch.setattr(arena, "run", lambda world, method, budget: {"name": method.name, "again": True})
    other = dataclasses.replace(BUDGET, learning_rate=0.5)
    assert all(r["again"] for r in arena.compete(world(), other, methods, folder / "other"))


def test_the_report_has_the_plots_and_the_table(finished):
    folder, _, _, table = finished
    page = (folder / "report.md").read_text()
    assert table in page
    for name in ("frontier", "distance", "claims"):
        assert (folder / f"{name}.png").stat().st_size > 10_000
        assert f"{name}.png" in page
    written = json.loads((folder / "results.json").read_text())
    shares = [row["share"] for row in written["methods"]]
    assert shares == sorted(shares)
    assert [row["name"] for row in written["methods"]] == ["rloo", "online_tilted_mle"]
    assert shares[1] == pytest.approx(1, abs=1e-3)
    (claim,) = written["claims"]
    assert claim["claim"].startswith("Losses that push down bad candidates")
    assert claim["verdict"] == "holds (2 of 2)"


def test_verdicts():
    good, bad = np.full((2, 3), 1.0), np.full((2, 3), -1.0)
    assert judge({"a": good}) == "holds (2 of 2)"
    assert judge({"a": bad}) == "fails (2 of 2)"
    assert judge({"a": good, "b": np.array([[1.0, -1.0, 1.0]])}) == "mixed (2 for, 0 against, 1 undecided)"


def test_bad_settings_are_named():
    for options, message in (
        ({"methods": "rloo,magic"}, "method must be one of .*; got 'magic'"),
        ({"updates": 20}, "updates must be a multiple of 16, got 20"),
        ({"num_completions": 8}, "num_completions must be at least 16, got 8"),
        ({"num_seeds": 0}, "num_seeds must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            arena.ArenaConfig(**options)
    assert len(arena.ArenaConfig().chosen()) == len(set(arena.CORE)) > 35
    assert len(arena.ArenaConfig(methods="all").chosen()) > 90
    with pytest.raises(ValueError, match="num_prompts must be at most 4"):
        arena_world.make_world(dataclasses.replace(CONFIG, num_prompts=9))
