"""A DPO step on pairs that share a prompt or not, the reference precomputed or in the step.

    python -m benchmarks.dpo                 # 135M, every case, each in a process of its own
    python -m benchmarks.dpo --shape=mini --cases=dpo_64_64_in_step

A row per case goes to ``benchmarks/results/dpo.jsonl``.
"""

from benchmarks import harness
from benchmarks.cases import cases_of

if __name__ == "__main__":
    harness.huge_pages()

from benchmarks import workload

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Runs the cases that the command line names."""
    harness.main("dpo", workload.run, cases_of("dpo"), argv, dtypes=workload.DTYPES)


if __name__ == "__main__":
    main()
