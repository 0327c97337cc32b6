"""Compile time and time to the first step: cold, then again with the compilations that the first process left on disk.

    python -m benchmarks.compile --shape=135m --cases=sft_8x128

``to_first_step_seconds`` runs from the start of the process to the end of its first call, imports included.
"""

import argparse
import datetime
import tempfile

from benchmarks import harness
from benchmarks.cases import SHAPES, case_named
from benchmarks.children import Job, start

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Measures the cases that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compile")
    parser.add_argument("--cases", default="sft_8x128,dpo_64_64_in_step,generate_16")
    parser.add_argument("--shape", default="135m", choices=SHAPES)
    parser.add_argument("--limit", type=float, default=120.0, help="seconds that a process may take")
    parser.add_argument("--run", default=f"{datetime.datetime.now():%Y%m%d-%H%M%S}", help="name of the run")
    given = parser.parse_args(argv)
    for name in given.cases.split(","):
        job = Job("tiltjax", case_named(name), given.shape, "auto", repeats=1)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
            for state in ("cold", "cached"):
                # One lap is no timing: its row is not kept among the timings.
                variables = {"JAX_COMPILATION_CACHE_DIR": cache, "TILTJAX_BENCH_RESULTS": cache}
                row, why = start(job, run=given.run, limit=given.limit, environment=variables)
                if row is None:
                    print(f"{job.label} {state}: {why}", flush=True)
                    break
                stages = {f"{s}_seconds": row[f"{s}_seconds"] for s in ("import", "trace", "lower", "compile")}
                kept = {key: row[key] for key in ("case", "shape", "library", "dtype", "run")}
                first = {"to_first_step_seconds": row["first_ends_seconds"], "step_seconds": row["seconds"]}
                harness.emit("compile", {"measure": "compile", **kept, "cache": state, **stages, **first})


if __name__ == "__main__":
    main()
