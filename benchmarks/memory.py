"""Peak of resident memory, each case in a child process.

    python -m benchmarks.memory --shape=135m --cases=dpo_64_64_precomputed

A row has the peak of the whole process (interpreter, parameters, optimizer, activations, compiler), and what was
resident before the first call.
"""

import argparse
import datetime
import tempfile

from benchmarks import harness
from benchmarks.cases import CASES, SHAPES, case_named
from benchmarks.children import Job, start

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Measures the cases that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory")
    parser.add_argument("--cases", default=",".join(case.name for case in CASES))
    parser.add_argument("--shape", default="135m", choices=SHAPES)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that a case may take")
    parser.add_argument("--run", default=f"{datetime.datetime.now():%Y%m%d-%H%M%S}", help="name of the run")
    given = parser.parse_args(argv)
    for name in given.cases.split(","):
        job = Job("tiltjax", case_named(name), given.shape, "auto", repeats=1)
        # One lap is no timing: its row is not kept among the timings.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            variables = {"TILTJAX_BENCH_RESULTS": folder}
            row, why = start(job, run=given.run, limit=given.limit, environment=variables)
        if row is None:
            print(f"{job.label}: {why}", flush=True)
            continue
        kept = ("case", "shape", "library", "dtype", "run", "sizes", "peak_gb", "peak_before_gb")
        harness.emit("memory", {"measure": "memory", **{key: row[key] for key in kept}})


if __name__ == "__main__":
    main()
