"""Where the time of a case goes: one call is traced, and XLA's operations are summed by the code that asked for them.

    python -m benchmarks.profile                          # every case with a goal, each in a process of its own
    python -m benchmarks.profile --cases=best_of_64_long

``share`` is of the time of all threads, ``alone`` the part of it in which no other thread worked, ``GFLOP/s`` the speed
of a thread at products of matrices; for what is missing to 100 % threads were idle. What XLA has fused counts for the
line of its last operation. A row per case goes to ``benchmarks/results/profile.jsonl``, and into docs/performance.md
with the run that it belongs to.
"""

import linecache
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import harness
from benchmarks.cases import CASES, Case
from benchmarks.profile_report import told_profile

if __name__ == "__main__":
    harness.huge_pages()
    # A program from the cache on disk may have been compiled from other lines.
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import jax

from benchmarks import workload
from tiltjax.analysis import trace
from tiltjax.train.hardware import fast_dtype

__all__ = ["main", "profile", "run"]

_KEPT = 60
"""Functions and lines of a row, those that take most."""


def profile(call: Callable[[], Any]) -> tuple[float, trace.Trace, trace.Places]:
    """Traces one call of what has been warmed up.

    Args:
      call: Does the work and waits for it.

    Returns:
      Its seconds, the trace, and the places of all operations of the programs that ran.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            start = time.perf_counter()
            call()
            seconds = time.perf_counter() - start
        found = trace.read(folder)
    ran = {module for module, _ in found.runs}
    programs = [one for loaded in workload.programs() for one in loaded.hlo_modules()]
    texts: dict[str, str] = {}
    for one in programs:
        text = one.to_string() if one.name in ran else ""
        if text and texts.setdefault(one.name, text) != text:
            raise ValueError(f"two programs are called {one.name}: which of them ran, the trace does not say")
    known = [trace.places(name, text) for name, text in texts.items()]
    return seconds, found, {key: place for places in known for key, place in places.items()}


def run(case: Case, given: harness.Options) -> dict[str, Any]:
    """Profiles a case and returns its row."""
    call = workload.prepare(case, given.shape, given.dtype)
    watch = harness.measure(call, repeats=given.repeats, budget=given.budget, compiles=True)
    seconds, found, known = profile(call)
    threads = len(os.sched_getaffinity(0))

    def sums(place: str) -> list[dict[str, Any]]:
        """By phase, place and whether there are products in it; those that take most."""
        key = lambda one: (one.phase, getattr(one, place), bool(one.flops))  # noqa: E731
        totals = sorted(trace.sums(found, known, key).items(), key=lambda item: -item[1].seconds)[:_KEPT]
        return [
            {"phase": phase, place: where, "product": product, **_told(total, seconds * threads)}
            for (phase, where, product), total in totals
        ]

    dtype = fast_dtype() if given.dtype == "auto" else given.dtype
    yardstick = harness.gemm_gflops(*workload.multiply(dtype, 2048 if given.shape != "tiny" else 64))
    return {
        "measure": "profile",
        "case": case.name,
        "shape": given.shape,
        "library": "tiltjax",
        "dtype": dtype,
        "run": given.run,
        "seconds": round(statistics.median(lap[0] for lap in watch.laps[1:] or watch.laps), 4),
        "traced_seconds": round(seconds, 4),
        "yardstick": round(yardstick / threads, 1),
        "functions": sums("function"),
        "lines": [{**one, "text": _text(one["line"])} for one in sums("line")],
    }


def _told(one: trace.Sum, seconds: float) -> dict[str, Any]:
    return {
        "share": round(one.seconds / seconds, 4),
        "alone": round(one.alone / seconds, 4),
        "gflops": round(one.flops / one.seconds / 1e9, 1) if one.seconds else 0.0,
        "runs": one.runs,
    }


def _text(line: str) -> str:
    """The source at ``file:line``."""
    file, _, number = line.rpartition(":")
    if not file:
        return ""
    return linecache.getline(str(harness.ROOT / file), int(number)).strip()


def main(argv: list[str] | None = None) -> None:
    """Profiles the cases that the command line names."""
    goals = [case.name for case in CASES if case.goal]
    harness.main("profile", run, CASES, argv, dtypes=workload.DTYPES, default=goals, show=told_profile)


if __name__ == "__main__":
    main()
