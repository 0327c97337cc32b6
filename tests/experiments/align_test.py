import dataclasses
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import flags
from absl.testing import flagsaver

from experiments.align import __main__ as align
from experiments.align.config import AlignConfig
from experiments.common.flags import define_flags
from experiments.common.run_directory import Run
from tests.tiny import save_policy
from tiltjax.align import fit as align_fit
from tiltjax.align import rounds as align_rounds
from tiltjax.align import session as align_session
from tiltjax.align.settings import COMPUTED
from tiltjax.align.sources import prompt_rows
from tiltjax.data import text
from tiltjax.models import pretrained
from tiltjax.rewards.gate import score
from tiltjax.rewards.registry import load_reward
from tiltjax.train import evaluate
from tiltjax.train.distributed import Hosts

ROOT = pathlib.Path(__file__).parents[2]
STEPS, N = 6, 8  # As many candidates as devices.
ARTEFACTS = ("config.json", "fingerprint.json", "report.md", "results.json", "metrics.jsonl", "frontier.png", "ess.png")
SETTINGS = {"reward": "length?target=3", "beta": 0.2, "num_candidates": N, "num_prompts": 8, "num_eval_prompts": 8,
            "max_tokens": 6, "steps": STEPS, "checkpoint_every": 2, "batch_size": 4, "sample_batch": 2,
            "learning_rate": 0.01, "lora_rank": 0, "compute_dtype": "float32", "compilation_cache": ""}  # fmt: skip


def not_a_number(prompts, completions):
    return [float("nan")] * len(completions)


def complaining(prompts, completions):
    raise RuntimeError("first line\nsecond line")


def leaving(prompts, completions):
    raise SystemExit(0)


class Begun(BaseException):
    """Ends a run as a signal does: nothing is tidied up."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny policy with a tokenizer of whole words, and a file of short prompts: all draws are of one shape."""
    home = tmp_path_factory.mktemp("align")
    words = ["<eos>", "<pad>", *(f"w{i}" for i in range(14))]
    save_policy(home / "policy", words)
    (home / "policy/generation_config.json").write_text('{"eos_token_id": [0], "pad_token_id": 1}')
    rows = [{"prompt": " ".join(words[2 + (i + k * (1 + i // 14)) % 14] for k in range(3 - i % 3))} for i in range(18)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


def settings(home, output, **changes):
    return {"policy": f"{home}/policy", "prompts": f"{home}/prompts.jsonl", "output": f"{output}"} | SETTINGS | changes


def arguments(options):
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items()]


@pytest.fixture(scope="module")
def start(home):
    flags_ = [f for f in os.environ["XLA_FLAGS"].split() if "device_count" not in f]
    environment = os.environ | {
        "XLA_FLAGS": " ".join(flags_),
        # The runs below compile nothing that the first has compiled.
        "JAX_COMPILATION_CACHE_DIR": str(home / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def start(*arguments):
        command = [sys.executable, "-m", "experiments.align", *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    return start


@pytest.fixture(scope="module")
def unbroken(home, start):
    process = start(*arguments(settings(home, home / "unbroken")))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return home / "unbroken", out, err


def test_writes_all_that_it_promises(home, unbroken):
    directory, out, _ = unbroken
    assert {*ARTEFACTS, "candidates", "checkpoints", "hf", "tensorboard"} == {p.name for p in directory.iterdir()}
    for name in ("frontier.png", "ess.png"):
        data = (directory / name).read_bytes()
        assert data.startswith(b"\x89PNG")
        assert len(data) > 10_000
    assert [p for p in (directory / "tensorboard").iterdir() if "tfevents" in p.name and p.stat().st_size]
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(STEPS))
    assert all(np.isfinite(list(line.values())).all() and {"loss", "grad_norm"} < set(line) for line in lines)
    assert lines[-1]["loss"] < lines[0]["loss"]
    results = json.loads((directory / "results.json").read_text())
    assert set(results["points"]) == {"reference", "soft_best_of_n", "best_of_n", "tilt", "tuned"}
    assert np.isfinite(numbers(results)).all()
    report = (directory / "report.md").read_text()
    assert "| tilted_mle |" in report
    assert "| tilted_mle |" in out
    assert all(f"({name})" in report for name in ("frontier.png", "ess.png"))
    assert "'--reward=length?target=3'" in report
    assert str(directory / "report.md") in out


def test_says_how_much_it_compiles_and_nothing_of_what_jax_does(unbroken):
    _, out, err = unbroken
    lines = [line for line in err.splitlines() if re.match("[IWE]\\d{4} ", line)]
    said = [line.partition("] ")[2] for line in lines if "compilations" in line or "score tuned" in line]
    assert [line.partition(":")[0] for line in said] == [
        "sample train", "fit", "sample heldout", "sample heldout-tuned", "score tuned"
    ]  # fmt: skip
    places = {line.partition("] ")[0].split()[-1].partition(":")[0] for line in lines}
    assert {"rollout.py", "fit.py", "__main__.py"} <= places
    assert not places & {"compiler.py", "dispatch.py", "compilation_cache.py", "pxla.py", "xla_bridge.py"}
    assert re.fullmatch(r"sample train: 8 rows in 1 batches of 1 shapes \(compilations\) .*; padding .*", said[0])
    assert said[1].startswith("fit: 6 steps of 1 shapes (compilations) [(3, 6)], ")
    assert "compilations" not in out


def test_export_is_the_last_checkpoint(home, unbroken):
    directory, *_ = unbroken
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["4", "6"]
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(directory / "checkpoints" / "6" / "state")
    before, after = pretrained.load(home / "policy"), pretrained.load(directory / "hf")
    assert after.config == before.config
    for path, leaf in jax.tree_util.tree_flatten_with_path(after)[0]:
        np.testing.assert_array_equal(leaf, saved[".params" + jax.tree_util.keystr(path)])
    moved = [np.abs(a - b).max() for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)]
    assert min(moved) > 1e-3
    tokenizers = [text.load_tokenizer(folder) for folder in (home / "policy", directory / "hf")]
    assert text.tokenizer_fingerprint(tokenizers[0]) == text.tokenizer_fingerprint(tokenizers[1])
    ends = [(folder / "generation_config.json").read_text() for folder in (home / "policy", directory / "hf")]
    assert ends[0] == ends[1]


def test_killed_it_ends_with_the_same_bytes(home, start, unbroken):
    """Within a rollout it is killed in `rollout_test`, between stages in `rounds_test`; here by the system."""
    directory = home / "broken"
    process = start(*arguments(settings(home, directory, resume=True)))
    deadline = time.monotonic() + 200
    while not (directory / "checkpoints/2").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    _, err = process.communicate()
    assert (directory / "checkpoints/2").exists(), err
    assert process.returncode == -signal.SIGKILL
    assert not (directory / "results.json").exists()
    process = start(*arguments(settings(home, directory, resume=True)))
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    for name in ("hf/model.safetensors", "hf/config.json", "metrics.jsonl", "results.json"):
        assert (directory / name).read_bytes() == (unbroken[0] / name).read_bytes(), name


def test_an_existing_run_is_not_overwritten(home, unbroken, refused):
    before = {p: p.read_bytes() for p in unbroken[0].rglob("*") if p.is_file()}
    said = "there is a run already; pass --resume to go on with it, --overwrite to remove it, or another --output"
    assert refused(settings(home, unbroken[0])) == f"error: {unbroken[0]}: {said}"
    assert {p: p.read_bytes() for p in unbroken[0].rglob("*") if p.is_file()} == before


def test_help_teaches(start):
    out, _ = start("--help").communicate(timeout=100)
    assert "python -m experiments.align" in out
    for field in dataclasses.fields(AlignConfig):
        assert f"--{'[no]' if field.default is False else ''}{field.name}:" in out
    assert "Strength of the KL term, reward units" in " ".join(out.split())


def test_other_settings_are_named(home, unbroken, refused):
    line = refused(settings(home, unbroken[0], resume=True, beta=0.3, seed=1))
    assert "--resume with other settings: beta (0.2 -> 0.3), report_beta (0.2 -> 0.3), seed (0 -> 1)" in line


@pytest.fixture
def refused(capsys, monkeypatch):
    """Runs ``main`` on flags that it must refuse, and returns the line that it writes."""
    monkeypatch.delenv("TILTJAX_TRACEBACK", raising=False)
    if "num_eval_prompts" not in flags.FLAGS:
        define_flags(AlignConfig)
        define_flags(Hosts)

    def refused(options, *, quiet=True):
        with flagsaver.flagsaver():
            flags.FLAGS(["align", *arguments(options)])
            with pytest.raises(SystemExit) as stop:
                align.main(["align"])
        assert stop.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert "Traceback" not in err
        line = err.splitlines()[-1]  # Before it there may be progress bars.
        assert not quiet or err == line + "\n"
        assert line.startswith("error: ")
        return line

    return refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"beta": 0.0},
            "labels divide by it) for method tilted_mle, got 0.0",
        ),
        ({"num_candidates": 1}, "num_candidates must be at least 2, got 1"),
        ({"batch_size": 16}, "batch_size must be at most num_prompts=8, got 16"),
        ({"method": "spin", "steps": 4}, "method spin needs demonstrations"),
        ({"microbatches": 3}, "microbatches must divide batch_size=8, got 3"),
        ({"policy": "/no/such/policy"}, "/no/such/policy"),
        (
            {"policy": ROOT / "tests/cases/nan-checkpoint/policy"},
            "layers.0.mlp.down_proj.weight is not finite as float32",
        ),
        ({"reward": "kindness"}, "unknown reward 'kindness'"),
        ({"reward": "exact_match"}, "prompts.jsonl:1: no column 'answer', which reward 'exact_match' needs"),
        ({"prompts": "/no/such/prompts.jsonl"}, "/no/such/prompts.jsonl"),
        ({"num_prompts": 11}, "19 prompts are needed (training and held-out), the file has 18"),
        ({"mesh": "data:3"}, "3 places for 8 devices"),
        ({"num_candidates": 10**10}, "num_candidates=10000000000 of max_tokens="),
        ({"batch_size": 4}, "batch_size must be a multiple of data x fsdp = 8, got 4"),
        ({"mesh": "data:4,fsdp:2", "mapping": "pmap"}, "mesh must put every device on data where mapping=pmap"),
        ({"mapping": "pmap", "microbatches": 2}, "microbatches must divide the 1 prompts of each device"),
    ],
)
def test_bad_flags_are_refused_in_one_line_and_leave_nothing(home, tmp_path, refused, changes, message):
    line = refused(settings(home, tmp_path / "run", **{"batch_size": 8, "sample_batch": 8} | changes))
    assert message in line
    assert not (tmp_path / "run").exists()


def test_truncated_prompts_are_named_by_file_and_line(home, tmp_path, refused):
    lines = (home / "prompts.jsonl").read_text()
    (tmp_path / "cut.jsonl").write_text(lines[: len(lines) - 9])
    line = refused(settings(home, tmp_path / "run", prompts=tmp_path / "cut.jsonl"))
    assert f"{tmp_path}/cut.jsonl:18: invalid JSON" in line


@pytest.mark.parametrize(
    ("flags_", "attention", "remat"),
    [
        ({}, "auto", "full"),
        ({"attention": "plain", "remat": "dots", "length_buckets": 1}, "plain", "dots"),
        ({"remat": "none"}, "auto", "none"),
    ],
)
def test_flags_say_how_the_policy_computes(home, tmp_path, monkeypatch, flags_, attention, remat):
    """They reach the model. A run goes on with others, or from before there were any, with its own candidates."""
    worlds, begin, prepare = [], Run.begin, align.prepare

    def cut_off(*told):
        begin(*told)
        raise Begun

    monkeypatch.setattr(Run, "begin", cut_off)
    monkeypatch.setattr(align, "prepare", lambda *a, **k: worlds.append(prepare(*a, **k)) or worlds[-1])
    options = settings(home, tmp_path, batch_size=8, sample_batch=8)
    for changes in ({}, {"resume": True} | flags_, {"resume": True}):
        with pytest.raises(Begun):
            align.run(AlignConfig(**options | changes))
        if not changes:
            noted = json.loads((tmp_path / "config.json").read_text())
            (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in noted.items() if k not in COMPUTED}))
    assert (worlds[1].model.config.attention, worlds[1].model.config.remat) == (attention, remat)
    assert len({session.fingerprint for session in worlds}) == 1


@pytest.fixture
def compiled_once(monkeypatch, shared):
    for name, function in shared.items():
        monkeypatch.setattr(align_session, name, function)


@pytest.fixture(scope="module")
def shared():
    """One compiled sampler and scorer for all runs of this process."""
    made = {}

    def once(make):
        return lambda **options: made.setdefault((make, *sorted(options.items())), make(**options))

    return {name: once(getattr(align_session, name)) for name in ("make_sampler", "make_scorer")}


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("not_a_number", "is nan in float32 for completion 0"),
        ("complaining", "first line second line"),
        ("leaving", "raised SystemExit on completion 0"),
    ],
)
def test_a_reward_that_fails_is_named(home, tmp_path, refused, compiled_once, reward, message):
    spec = f"{__name__}:{reward}"
    options = settings(home, tmp_path / "run", reward=spec, batch_size=8, sample_batch=8)
    line = refused(options, quiet=False)
    assert f"reward {spec!r}" in line
    assert message in line
    assert not (tmp_path / "run").exists()


def test_the_reference_is_asked_of_what_steps_see_and_only_where_a_record_reads_it(home, tmp_path, compiled_once):
    session = align_session.prepare(AlignConfig(**settings(home, tmp_path, batch_size=8, sample_batch=8)), tmp_path)
    drawn, _ = session.rollout("train", session.model, name="train")
    seen, score = [], session.score

    def viewer(temperature):
        def view(model, candidates):
            seen.append(candidates.completion.shape)
            return session.viewer(temperature)(model, candidates)

        return view

    def data(method, **changes):
        config = dataclasses.replace(session.settings, method=method, steps=2, **changes)
        watched = dataclasses.replace(session, settings=config, viewer=viewer)
        return align_fit.training_data(watched, config.record, drawn).rows

    for method in ("tilted_mle", "best_of_n_sft", "var_importance", "simpo"):
        assert data(method).ref_view is None
    assert seen == []
    pairs = data("dpo")
    assert pairs.source.shape == (16, 2)  # Of 32 pairs, those of two steps.
    assert sum(shape[0] for shape in seen) == 16
    c = pairs.candidates
    expected = jax.jit(type(session.model).score)(session.model, c.prompt, c.prompt_mask, c.completion).logp
    mask = c.completion_mask
    np.testing.assert_allclose(pairs.ref.token_logp[mask], expected[mask], atol=1e-5, rtol=1e-5)
    crossed = data("var")
    rows = dict(zip(map(tuple, session.encode(session.rows["train"])), session.rows["train"], strict=True))
    c = crossed.candidates
    asked = [rows[tuple(prompt[mask].tolist())] for prompt, mask in zip(c.prompt, c.prompt_mask, strict=True)]
    np.testing.assert_allclose(crossed.reward, score(asked, session.texts(c)), rtol=1e-6)
    with pytest.MonkeyPatch.context() as patch:  # What a reward said once is not asked again.
        patch.setattr(align_session, "score_rows", lambda *_, **__: pytest.fail("scored again"))
        np.testing.assert_array_equal(data("var").reward, crossed.reward)
    session = dataclasses.replace(session, fingerprint="0" * 16)
    with pytest.raises(ValueError, match="made by another policy, tokenizer, prompts or settings"):
        data("var")


def test_prompts_that_cannot_be_divided_give_the_same_candidates(home, tmp_path, compiled_once):
    """Four of one prompt at a time in a queue, on eight devices: each draws one of a prompt's eight candidates."""
    found, held = {}, []
    for size in (8, 1):
        options = settings(home, tmp_path / f"{size}", batch_size=8, sample_batch=size)
        session = align_session.prepare(AlignConfig(**options), tmp_path / f"{size}")

        def sampler(*arguments, whole=session.sampler):
            out = whole(*arguments)
            held.append((out.completion.shape, out.completion.sharding.shard_shape(out.completion.shape)))
            return out

        drawn, _ = dataclasses.replace(session, sampler=sampler).rollout("train", session.model, name="train")
        found[size] = drawn, session.ref_logp(drawn, "score", temperature=1.0)
    assert held == [((8, 8, 6), (1, 8, 6)), *[((4, 8, 6), (4, 1, 6))] * 2]
    for name in ("prompt", "completion", "completion_mask", "reward"):
        np.testing.assert_array_equal(getattr(found[1][0], name), getattr(found[8][0], name))
    np.testing.assert_allclose(found[1][1], found[8][1], atol=1e-4)


def test_packed_rows_hold_what_counts_in_one_shape(home, tmp_path, compiled_once):
    """Of each prompt the best candidate with weight 1, at every step in as many rows, which the devices divide."""
    options = settings(home, tmp_path, batch_size=8, sample_batch=8, method="best_of_n_sft", pack=True)
    session = align_session.prepare(AlignConfig(**options), tmp_path)
    drawn, _ = session.rollout("train", session.model, name="train")
    data = align_fit.training_data(session, session.settings.record, drawn)
    take, rows = align_fit.packed(session, data)
    order = data.order
    best = np.asarray(drawn.reward).argmax(axis=1)
    tokens = drawn.completion_mask[np.arange(8), best].sum(axis=-1)
    for step in range(STEPS):
        batch = take(order(step))
        assert batch.token.shape == (rows, take(order(0)).token.shape[1])
        assert batch.weight.sum() == tokens[order(step)].sum()
        assert set(np.unique(batch.weight)) == {0, 1}
        assert batch.count.sum() == 8
        assert (batch.segment >= 0).sum() == (tokens + drawn.prompt_mask.sum(axis=-1))[order(step)].sum()
    assert rows % 8 == 0
    with pytest.raises(ValueError, match=r"pack is for methods that learn once, by weights .*; got method=dpo"):
        AlignConfig(**options | {"method": "dpo"})


def test_another_reference_or_tokenizer_is_another_fingerprint(home, tmp_path, compiled_once, monkeypatch):
    config = AlignConfig(**settings(home, tmp_path, batch_size=8, sample_batch=8))
    prints = {align_session.prepare(config, tmp_path).fingerprint}
    with monkeypatch.context() as patch:
        patch.setattr(text, "tokenizer_fingerprint", lambda tokenizer: "another")
        prints.add(align_session.prepare(config, tmp_path).fingerprint)
    with monkeypatch.context() as patch:
        load = pretrained.load
        patch.setattr(pretrained, "load", lambda *a, **o: jax.tree.map(lambda x: x * 1.0001, load(*a, **o)))
        prints.add(align_session.prepare(config, tmp_path).fingerprint)
    assert len(prints) == 3


METHODS = {
    "soft_best_of_n": {"sample_batch": 8, "batch_size": 8},
    "var_importance": {"microbatches": 2, "mesh": "data:4,tensor:2", "sample_batch": 8},
    "adapters": {"method": "tilted_mle", "mesh": "data:8", "batch_size": 8, "sample_batch": 8, "mapping": "pmap",
                 "fit_candidates": 0, "lora_rank": 2},
}  # fmt: skip
"""What runs through other code; the fits of the other methods are in `align_fit_test`, their data above."""


@pytest.mark.parametrize("name", METHODS)
def test_a_run_of_any_kind_ends_with_its_files(home, tmp_path, compiled_once, name):
    options = {"method": name, "steps": 2} | METHODS[name]
    results = align.run(AlignConfig(**settings(home, tmp_path, **options)))
    assert np.isfinite(numbers(results)).all()
    assert all((tmp_path / artefact).stat().st_size for artefact in ("report.md", "results.json", "frontier.png"))
    trains = name != "soft_best_of_n"
    assert (
        ("tuned" in results["points"]) == (tmp_path / "hf").exists() == (tmp_path / "metrics.jsonl").exists() == trains
    )
    if trains:
        before, after = pretrained.load(home / "policy"), pretrained.load(tmp_path / "hf")
        moved = np.asarray(after.blocks.up.kernel[0] - before.blocks.up.kernel[0])
        assert np.abs(moved).max() > 1e-4
        assert (np.linalg.matrix_rank(moved, tol=1e-5) <= 2) == (name == "adapters")
        assert np.array_equal(after.embedding[...], before.embedding[...]) == (name == "adapters")


def test_a_record_plays_its_rounds_and_is_compared(home, tmp_path, compiled_once, monkeypatch):
    """What its rounds do is in `rounds_test`, and in `distributed_test` on one process and on two."""
    played = []

    def improve(session, *, watch):
        played.append(session.settings.method)
        return jax.tree.map(lambda x: x * 1.5, session.model)

    monkeypatch.setattr(align_rounds, "improve", improve)
    options = {"method": "rloo", "batch_size": 8, "sample_batch": 8, "steps": 2}
    results = align.run(AlignConfig(**settings(home, tmp_path / "run", **options)))
    assert played == ["rloo"]
    assert np.isfinite(numbers(results)).all()
    assert results["points"]["tuned"][0].name == "rloo"
    before, after = (pretrained.load(path) for path in (home / "policy", tmp_path / "run" / "hf"))
    np.testing.assert_allclose(after.embedding[...], 1.5 * before.embedding[...], rtol=1e-6)


def numbers(value):
    """Every number of a nested result."""
    if isinstance(value, dict):
        return [x for part in value.values() for x in numbers(part)]
    if isinstance(value, list | tuple):
        return [x for part in value for x in numbers(part)]
    if isinstance(value, evaluate.Point):
        return numbers(vars(value))
    return [value] if isinstance(value, int | float) else []


def test_puzzles_are_prompts_with_what_their_reward_needs():
    rows = prompt_rows("reasoning_gym:gcd?max_value=20", 3, seed=0)
    assert len({row.prompt for row in rows}) == 3
    columns = {name: [row.columns[name] for row in rows] for name in ("answer", "entry")}
    reward = load_reward("reasoning_gym:gcd")
    assert score(reward, [row.prompt for row in rows], columns["answer"], columns=columns).tolist() == [1.0] * 3
    assert len(prompt_rows("reviews", 3, seed=0)) == 112
