import dataclasses
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks import children, compare, gpu, harness, profile, profile_report, report, workload
from benchmarks.cases import CASES, SHAPES, case_named
from tiltjax.analysis import trace


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setenv("TILTJAX_BENCH_RESULTS", str(tmp_path / "results"))
    for module in (gpu, workload):
        monkeypatch.setattr(module, "compilation_cache", lambda: None)  # The other tests' setting stays as it is.
    return tmp_path / "results"


def counted_flops(case, shape, shared):
    """Position by position, product by product."""
    s, total = SHAPES[shape], 0
    matrices = [(s.features, (s.num_heads + 2 * s.num_kv_heads) * s.head_dim), (s.num_heads * s.head_dim, s.features)]
    matrices += [(s.features, s.mlp_features)] * 2 + [(s.mlp_features, s.features)]

    def position(keys, head):
        block = sum(2 * a * b for a, b in matrices) + 2 * 2 * s.num_heads * s.head_dim * keys
        return s.num_layers * block + 2 * s.features * s.vocab_size * head

    predicts = case.work == "decode"
    for _ in range(case.B if shared else case.B * case.N):
        total += sum(position(i + 1, predicts and i + 1 == case.S) for i in range(case.S))
    for _ in range(case.B * case.N):
        total += sum(position(case.S + i + 1, True) for i in range(case.T - 1))
        total += 0 if predicts else 2 * s.features * s.vocab_size  # The first token is predicted by the prompt.
    return total * {"train": 3, "score": 1, "decode": 1}[case.work] + total * (case.reference == "in_step")


@pytest.mark.parametrize("case", [case.shrunk() for case in CASES], ids=lambda case: case.name)
@pytest.mark.parametrize("shared", [True, False])
def test_useful_work_is_what_counting_it_gives(case, shared):
    assert case.flops(SHAPES["tiny"], shared=shared) == counted_flops(case, "tiny", shared)


def test_the_shape_of_smollm2_has_its_parameters():
    s = SHAPES["135m"]
    norms = (2 * s.num_layers + 1) * s.features
    assert s.vocab_size * s.features + s.num_layers * s.layer_parameters + norms == 134_515_008


def test_a_case_is_warmed_up_then_timed_within_its_budget():
    calls = []
    watch = harness.measure(lambda: calls.append(1), repeats=3, budget=10.0, compiles=True)
    assert len(calls) == len(watch.laps) == 4
    watch.laps = [(50.0, 0, 0)]
    assert not watch.enough(3, 40.0)  # It compiled: nothing is known yet.
    watch.laps += [(25.0, 0, 0)]
    assert watch.enough(3, 40.0)  # A second one would take it to 50.
    eager = harness.Stopwatch(compiles=False)
    eager.laps = [(50.0, 0, 0)]
    assert eager.enough(3, 40.0)


def test_a_step_is_the_librarys_own_and_starts_where_theory_says():
    call = workload.prepare(case_named("dpo_64_64_in_step").shrunk(), "tiny", "float32")
    state, first = call()
    np.testing.assert_allclose(first["loss"], np.log(2), atol=1e-6)  # The policy is the reference.
    before = jax.device_get(state.params.embedding[...])
    state, second = call()
    assert int(state.step) == 2
    assert np.abs(before - state.params.embedding[...]).max() > 1e-6
    assert second["loss"] < first["loss"]


def test_the_group_step_has_grpos_loss():
    batch = workload.batch_of(case_named("group_step").shrunk(), "tiny")
    rng, shape = np.random.default_rng(1), batch.completion.shape
    logp, old = rng.normal(-3, 0.3, shape), rng.normal(-3, 0.3, shape)
    batch = dataclasses.replace(batch, old_token_logp=np.float32(old))
    policy = SimpleNamespace(score=lambda *_: SimpleNamespace(logp=np.float32(logp)))
    reward = np.asarray(batch.reward, np.float64)
    advantage = (reward - reward.mean(-1, keepdims=True)) / (reward.std(-1, ddof=1, keepdims=True) + 1e-4)
    ratio, advantage = np.exp(logp - old), advantage[..., None]
    expected = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.2) * advantage).mean()
    loss, _ = workload.group_objective(policy, None, batch, jax.random.key(0))
    np.testing.assert_allclose(loss.mean, expected, rtol=1e-5)


def test_a_module_prints_one_line_and_keeps_it(results, tmp_path):
    from benchmarks import group

    # A process of its own, as in a run: this one's peak of memory is that of the tests before.
    command = [sys.executable, "-m", "benchmarks.group", "--cases=group_score", "--shape=tiny", "--dtype=float32"]
    command += ["--repeats=2", "--run=r"]
    told = {"TILTJAX_BENCH_RESULTS": str(results), "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    environment = os.environ | told
    done = subprocess.run(command, cwd=harness.ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    row = json.loads(line)
    assert (results / "group.jsonl").read_text() == line + "\n"
    assert {"versions", "machine", "commit", "date", "peak_gb", "cpu_seconds", "gemm_share"} <= set(row)
    assert (row["library"], row["dtype"], len(row["laps"])) == ("tiltjax", "float32", 2)
    assert row["seconds"] == pytest.approx(np.median(row["laps"]), abs=2e-5)
    assert 0 < row["libraries_gb"] < row["peak_gb"]
    assert row["program_gb"] >= 0  # Less than a megabyte here.
    with (results / "group.jsonl").open("a") as file:
        file.write('{"case": "cut of')  # A process was killed while it wrote.
    assert [r["case"] for r in harness.rows("r")] == ["group_score"]
    with pytest.raises(SystemExit):
        group.main(["--cases=sft_8x128"])


def test_whether_a_process_compiled():
    compiling = workload.Compiling()
    compiled, hit = workload._LONG + 1, "/jax/compilation_cache/cache_hits"
    stage = next(event for event, name in workload._STAGES.items() if name == "compile")
    jax.monitoring.record_event(hit)
    jax.monitoring.record_event_duration_secs(stage, compiled)
    jax.monitoring.record_event_duration_secs(stage, workload._LONG / 2)  # JAX does not keep these.
    assert not compiling.missed
    jax.monitoring.record_event_duration_secs(stage, compiled)
    assert compiling.missed == 1
    assert compiling.seconds["compile"] == pytest.approx(2 * compiled + workload._LONG / 2)


def fake_row(job, laps, peak):
    base = {"measure": "x", "run": "compare-1", "date": "2026-01-01", "commit": "c"}
    base |= {"versions": {"python": "3"}, "machine": {"cpu": "C", "units": [], "threads": 2, "memory_gb": 1.0}}
    base["machine"]["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    del base["measure"]
    dtype = "bfloat16" if job.dtype == "auto" else job.dtype
    base |= {"case": job.case.name, "shape": job.shape, "library": job.library, "dtype": dtype, "laps": laps}
    base |= {"cpu_seconds": 1.0, "others": 0.0, "warmed_up": True, "gflop": 10.0, "gemm_share": 0.1}
    return base | {"peak_gb": peak, "seconds": float(np.median(laps))}


def test_a_run_goes_on_where_it_stopped():
    cases = [case_named("sft_8x128"), case_named("dpo_64_64_precomputed"), case_named("group_score")]
    jobs = compare.plan("135m", cases, ["trl", "tunix"])
    timed = [job for job in jobs if not isinstance(job, str)]
    assert len(timed) == len(set(timed))
    assert {j.dtype for j in timed if j.library == "trl" and j.case.name == "sft_8x128"} == set(compare._DTYPES["trl"])
    first = [j.process for j in timed if j.library == "trl" and j.case.name == "sft_8x128" and j.dtype == "bfloat16"]
    assert first == [1, 2]  # Once more at the end, lest a drift of the machine pass for a difference.
    assert [j.process for j in timed if j.label.startswith("sft_8x128 135m: tiltjax")] == [1, 2, 3, 4]
    assert not [j for j in timed if j.library == "tunix" and j.case.reference == "precomputed"]
    assert jobs[0].case.goal  # Goals come first.
    assert compare.unfinished(jobs, []) == jobs
    done = [fake_row(job, [1.0], 1.0) for job in timed[:5]]
    assert compare.unfinished(jobs, done) == jobs[5:]
    failed = {"measure": "failure", "library": "trl", "case": "sft_8x128", "shape": "135m", "dtype": "bfloat16"}
    assert len(compare.unfinished(jobs, [failed])) == len(jobs) - 1
    assert compare.unfinished(jobs, [failed], retry=True) == jobs
    whole = [fake_row(job, [1.0], 1.0) for job in timed] + [{"measure": name} for name in compare._ALONE]
    assert compare.unfinished(jobs, whole) == []
    assert not [j for j in compare.plan("135m", cases, []) if not isinstance(j, str) and j.library != "tiltjax"]


def test_the_page_holds_figures_to_goals_and_keeps_its_notes(tmp_path):
    sft, pairs = case_named("sft_8x128"), case_named("dpo_64_64_precomputed")
    job = children.Job("tiltjax", sft, "135m", "auto")
    parts = {"libraries_gb": 0.2, "arrays_gb": 0.3, "program_gb": 0.1}
    rows = [
        fake_row(job, [1.0, 2.0, 3.0], 3.0),
        fake_row(dataclasses.replace(job, library="trl", dtype="float32"), [6.0, 8.0], 2.0),
        fake_row(dataclasses.replace(job, library="trl", dtype="bfloat16"), [4.0, 5.0], 4.0),
        fake_row(dataclasses.replace(job, library="tunix", dtype="float32"), [5.0], 4.0),
        {**fake_row(dataclasses.replace(job, case=pairs), [2.0], 1.0), "cached": False, **parts},
        {**fake_row(dataclasses.replace(job, case=pairs), [2.0], 0.9), "cached": True, **parts},
        fake_row(dataclasses.replace(job, case=pairs, library="trl", dtype="autocast"), [3.0], 1.5),
    ]
    page = tmp_path / "performance.md"
    goals = report.write(rows, page, shape="135m")
    assert "2.00 | 4.50 (bfloat16*) | 2.25 [1.33, 5.00] | 5.00 (float32) | 2.50 [1.67, 5.00] | 1.5 | met |" in goals
    assert "2.00 | 3.00 (autocast*) | 1.50 [1.50, 1.50] | - | - | 2 | **missed** |" in goals
    text = page.read_text()
    assert "| 3.00 | - | 4.00 (bfloat16) | 0.75 | 2.00 (float32) | 1.50 | 4.00 | 1 | met |" in text
    assert "| 1.00 | 0.90 | 1.50 (autocast) | 0.67 | 1.50 (autocast) | 0.67 | - | 0.5 | **missed** |" in text
    assert "| compiled | 1.00 | 0.20 | 0.30 | 0.10 | 0.40 |" in text
    assert "| from the cache | 0.90 | 0.20 | 0.30 | 0.10 | 0.30 |" in text
    start, end = report._NOTES
    page.write_text(text.replace(f"{start}\n{end}", f"{start}\nWhy it was missed.\n{end}"))
    report.write(rows, page, shape="135m")
    report.write(rows, page, shape="135m")
    assert page.read_text().count("Why it was missed.") == 1


def test_a_worker_that_takes_too_long_is_ended_and_a_failure_is_one_line():
    job = children.Job("tiltjax", case_named("sft_8x128"), "tiny", "auto")
    assert children.start(job, run="r", limit=0.01) == (None, "killed after 0 s")
    row, why = children.start(dataclasses.replace(job, dtype="int3"), run="r", limit=100)
    assert row is None
    assert why.startswith("exit status 2: ")
    assert "int3" in why
    assert "\n" not in why


def test_the_gpu_benchmark_runs_here_at_a_tiny_size(results):
    rows = gpu.main(["--shape=tiny", "--repeats=1", "--run=r"])
    assert len(rows) == 5
    assert all(row["device"] == "cpu" and row["limits"] == "measured" for row in rows)
    assert 0 < rows[0]["mfu"] < 1
    # 6 operations per parameter and token, attention and the half of the vocabulary products that is counted added.
    c, tokens = gpu.SIZES["tiny"].config, 2 * 7
    blocks = 6 * c.num_layers * gpu.layer_parameters(c) * tokens
    attention = 3 * c.num_layers * 4 * c.num_heads * c.head_dim * 4 * tokens
    assert rows[0]["gflop"] * 1e9 == pytest.approx(blocks + attention + 6 * c.features * c.vocab_size * 8, rel=0.02)
    assert len((results / "gpu.jsonl").read_text().splitlines()) == 5


def stretch(start, end, name, thread="a"):
    return trace.Work(start, end, thread, "m", name)


def test_a_threads_time_goes_to_the_innermost_operation():
    found = [(0, 100, ("m", "loop"), None), (10, 30, ("m", "dot"), None), (20, 25, None, None), (40, 60, None, 7)]
    told = [(start, end, key or task) for start, end, key, task in trace._innermost(found)]
    loop, dot = ("m", "loop"), ("m", "dot")
    expected = [(0, 10, loop), (10, 20, dot), (20, 25, None), (25, 30, dot), (30, 40, loop), (40, 60, 7)]
    assert told == [*expected, (60, 100, loop)]


def test_sums_say_who_worked_alone():
    place = trace.Place("step", "f", "f.py:1", 6.0, False)
    known = {("m", "dot"): place, ("m", "add"): dataclasses.replace(place, function="g", flops=0.0)}
    known["m", "loop"] = dataclasses.replace(place, container=True)
    seconds = 10**9
    work = [stretch(0, 4 * seconds, "dot"), stretch(3 * seconds, 5 * seconds, "add", "b"), stretch(0, 1, "loop", "c")]
    found = trace.sums(trace.Trace({("m", "dot"): 2, ("m", "add"): 1}, work), known, lambda place: place.function)
    assert found == {"f": trace.Sum(4.0, 3.0, 12.0, 2), "g": trace.Sum(2.0, 1.0, 0.0, 1)}


def test_a_program_that_does_not_say_where_it_comes_from_is_read_once():
    """Of 60 sums of a sum with itself there are 2^60 paths to the parameter."""
    sums = [f"  %add.{i} = f32[] add(%add.{i - 1}, %add.{i - 1})" for i in range(1, 60)]
    body = "\n".join(["  %x = f32[] parameter(0)", "  %add.0 = f32[] add(%x, %x)", *sums])
    found = trace.places("m", f"HloModule m\n\nENTRY %main (x: f32[]) -> f32[] {{\n{body}\n}}\n")
    assert len(found) == 61
    assert {(place.phase, place.line) for place in found.values()} == {("unknown", "")}


@pytest.mark.parametrize(
    ("case", "phases"), [("best_of_64_long", {"prompt", "step"}), ("dpo_64_64_in_step", {"forward", "gradient"})]
)
def test_a_profile_finds_every_product_and_who_asked_for_it(case, phases):
    one = case_named(case).shrunk()
    call = workload.prepare(one, "tiny", "float32")
    call()
    _, found, known = profile.profile(call)
    products = {
        key: total for key, total in trace.sums(found, known, lambda p: (p.phase, p.function)).items() if total.flops
    }
    assert {(phase, name) for phase in phases for name in ("Block.project", "Block.finish", "attention")} <= set(
        products
    )
    assert not [name for _, name in products if not name]
    # What the case cannot do without; recomputation, masked scores and padding come on top.
    needed = one.flops(SHAPES["tiny"])
    assert needed < sum(total.flops for total in products.values()) < 2 * needed


def test_a_profile_is_kept_and_shown(results, capsys):
    profile.main(["--cases=sft_8x128", "--shape=tiny", "--dtype=float32", "--repeats=1", "--run=r"])
    (row,) = harness.rows("r")
    assert (row["measure"], row["case"], row["file"]) == ("profile", "sft_8x128", "profile")
    assert 0 < sum(one["share"] for one in row["functions"]) <= 1
    assert all(0 <= one["alone"] <= one["share"] for one in row["functions"])
    assert any(one["line"].startswith("tiltjax/models/") and one["text"] for one in row["lines"])
    assert {"forward", "gradient", "update"} <= {one["phase"] for one in row["functions"]}
    assert row["dtype"] == "float32"
    assert capsys.readouterr().out == profile_report.told_profile(row) + "\n"
    timed = fake_row(children.Job("tiltjax", case_named("sft_8x128"), "tiny", "auto"), [1.0], 1.0)
    report.write([timed, row], results / "page.md", shape="tiny")
    assert profile_report._profile(row) in (results / "page.md").read_text()
