"""tiltjax beside its peers, in one run: what is timed, in which order, and the table in ``docs/performance.md``.

    benchmarks/peers/setup.sh                        # once: .venv.trl and .venv.tunix (1.5 GB and 1 GB)
    python -m benchmarks.compare --minutes=18        # what `make bench` does; on two quiet cores
    python -m benchmarks.compare --resume --minutes=60   # the rest of it
    python -m benchmarks.compare --minutes=0         # only the table, from the rows of the last run

Every measurement is a process of its own: one call to warm up, then at most three timed ones within 40 seconds. Cases
come one after the other, and within a case the libraries take turns, so that a slow hour slows all of them. First come
the cases with a goal, each by the peers' usually fastest settings; then tiltjax alone (other cases, the mini shape,
import and compile time, profiles); then the peers' other settings and their first ones again, with tiltjax once more in
between. What does not fit into the time that is left waits for ``--resume``, which goes on with the last run of the
same code. A peer whose environment is missing is left out.
"""

import argparse
import datetime
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import harness, report
from benchmarks.cases import CASES, SHAPES, Case
from benchmarks.children import PEERS, Job, start
from benchmarks.harness import ROOT

__all__ = ["main", "plan", "unfinished"]

_ALONE = {"imports": 90.0, "compile": 110.0, "profile": 240.0}
"""Modules that run as they are, with a guess of their seconds."""

_DTYPES = {"trl": ("bfloat16", "float32", "autocast"), "tunix": ("float32", "bfloat16")}
"""Settings of the peers, the usually fastest first."""

_TURNS = ((0, 1), (1, 1), (2, 1), (0, 2))
"""For each turn: index into the settings of the peer, and repetition."""

_MINI = ("sft_8x128", "dpo_64_64_in_step", "generate_16", "best_of_16", "group_step")


def plan(shape: str, cases: Sequence[Case], peers: Sequence[str]) -> list[Job | str]:
    """Everything there is to do, the most telling first.

    Args:
      shape: Name of the model's shape.
      cases: Those to run.
      peers: Those whose environments are there.

    Returns:
      Jobs, and names of modules that run as they are.
    """

    def turn(case: Case, number: int) -> list[Job]:
        """The peers that have a setting at that place, with tiltjax in the middle."""
        place, process = _TURNS[number]
        able = [p for p in peers if place < len(_DTYPES[p]) and not (p == "tunix" and case.reference == "precomputed")]
        jobs = [Job(p, case, shape, _DTYPES[p][place], process=process) for p in able]
        # It has two turns of its own; later ones only beside a peer.
        mine = [Job("tiltjax", case, shape, "auto", process=number + 1)] if number < 2 or able else []
        return jobs[:1] + mine + jobs[1:]

    aims, others = [c for c in cases if c.goal], [c for c in cases if not c.goal]
    jobs: list[Job | str] = [job for case in aims for job in turn(case, 0)]
    jobs += [Job("tiltjax", case, shape, "auto") for case in others]
    if shape == "135m":
        jobs += [Job("tiltjax", case, "mini", "auto") for case in cases if case.name in _MINI]
    jobs += list(_ALONE)
    later = [job for number in range(1, len(_TURNS)) for case in aims for job in turn(case, number)]
    later += [job for number in (0, 1) for case in others for job in turn(case, number)]
    return jobs + [job for job in later if job not in jobs]


def unfinished(jobs: Sequence[Job | str], done: Sequence[dict[str, Any]], *, retry: bool = False) -> list[Job | str]:
    """What of the plan has no row yet; what failed has one, unless it is to be tried again."""
    timed: dict[tuple, int] = {}
    for row in done:
        if "measure" in row and (retry or row["measure"] != "failure"):
            continue
        key = tuple(row[name] for name in ("library", "case", "shape", "dtype"))
        timed[key] = timed.get(key, 0) + 1
        if row["library"] == "tiltjax":  # It was asked for "auto", and says what that was.
            timed[(*key[:3], "auto")] = timed[key]
    measures = {row.get("measure") for row in done}

    def is_left(job: Job | str) -> bool:
        if isinstance(job, str):
            return job not in measures
        return timed.get((job.library, job.case.name, job.shape, job.dtype), 0) < job.process

    return [job for job in jobs if is_left(job)]


def work(jobs: Sequence[Job | str], *, run: str, shape: str, until: float) -> list[str]:
    """Does what fits before ``until`` (on the monotonic clock); returns the labels of what did not."""
    left = []
    for i, job in enumerate(jobs, 1):
        label = job if isinstance(job, str) else job.label
        guess = _ALONE[job] if isinstance(job, str) else job.seconds
        remaining = until - time.monotonic()
        if guess > remaining:
            left.append(label)
            continue
        print(f"[{i}/{len(jobs)}, {remaining / 60:.1f} min left] {label}", flush=True)
        limit = min(remaining + 20, 4 * guess + 60)
        if isinstance(job, str):
            why = _alone(job, run, shape, limit)
            row: dict[str, Any] = {"library": "tiltjax", "case": job, "shape": "", "dtype": ""}
        else:
            found, why = start(job, run=run, limit=limit)
            row = {"library": job.library, "case": job.case.name, "shape": job.shape, "dtype": job.dtype}
            if found:
                told = f"{found['seconds']:.3f} s, CPU {found['cpu_seconds']:.3f} s, {found['peak_gb']:.2f} GB"
                print(f"    {told}, others used {found['others']:.1f} cores", flush=True)
        if why:
            harness.emit("failures", {"measure": "failure", **row, "run": run, "why": why})
    return left


def _alone(module: str, run: str, shape: str, limit: float) -> str:
    """Runs a module as it is; returns why it failed, if it did."""
    command = [sys.executable, "-m", f"benchmarks.{module}", f"--run={run}"]
    command += {
        "imports": ["--repeats=2"],
        "compile": [f"--shape={shape}", "--cases=sft_8x128,generate_16", "--limit=60"],
        "profile": [f"--shape={shape}", "--repeats=1"],
    }[module]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, err = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # So that it ends what it has started.
        process.communicate()
        return f"stopped after {limit:.0f} s"
    last = ["no message", *err.strip().splitlines()][-1]
    return f"exit status {process.returncode}: {last[:300]}" if process.returncode else ""


def main(argv: list[str] | None = None) -> None:
    """Measures what fits into the time, and writes the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare")
    parser.add_argument("--minutes", type=float, default=18.0, help="time for measuring; 0 only writes the table")
    parser.add_argument("--run", default="", help="name of a run to go on with, or to write the table of")
    parser.add_argument("--resume", action="store_true", help="go on with the last run of the same code")
    parser.add_argument("--retry", action="store_true", help="try again what failed")
    parser.add_argument("--shape", default="135m", choices=SHAPES)
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--output", default=str(ROOT / "docs" / "performance.md"), help="the page; empty writes none")
    given = parser.parse_args(argv)
    until = time.monotonic() + 60 * given.minutes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # So that what it has started ends with it.
    known = {case.name: case for case in CASES}
    if unknown := set(given.cases.split(",")) - set(known):
        parser.error(f"cases must be among {', '.join(known)}; got {', '.join(sorted(unknown))}")
    peers = [p for p in given.peers.split(",") if p]
    if unknown := set(peers) - set(PEERS):
        parser.error(f"peers must be among {', '.join(PEERS)}; got {', '.join(sorted(unknown))}")
    there = [p for p in peers if os.path.exists(ROOT / f".venv.{p}" / ".installed")]
    for peer in sorted(set(peers) - set(there)):
        print(f".venv.{peer} is missing (benchmarks/peers/setup.sh makes it): {peer} is left out", flush=True)

    run = given.run or (_last(same_code=given.minutes > 0) if given.resume or not given.minutes else "")
    run = run or f"compare-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    if given.minutes:
        jobs = plan(given.shape, [known[name] for name in given.cases.split(",")], there)
        jobs = unfinished(jobs, harness.rows(run), retry=given.retry)
        print(f"run {run}: {len(jobs)} measurements to make", flush=True)
        left = work(jobs, run=run, shape=given.shape, until=until)
        if left:
            print(f"not measured for want of time: {len(left)}; go on with --run={run}", flush=True)
    found = harness.rows(run)
    if not found:
        sys.exit(f"error: there is no row of a run {run!r}")
    if given.output:
        print(f"{report.write(found, given.output, shape=given.shape)}\n\n{given.output}", flush=True)


def _last(*, same_code: bool) -> str:
    """The last run of this program, of the code as it is now if that is asked; empty if there is none."""
    runs = [r for r in harness.rows() if str(r.get("run", "")).startswith("compare-")]
    if same_code:
        now = harness.commit()
        runs = [r for r in runs if r.get("commit") == now]
    return runs[-1]["run"] if runs else ""


if __name__ == "__main__":
    main()
