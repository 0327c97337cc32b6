"""Soft best-of-N: N candidates of each prompt, a reward that costs nothing, one of them drawn.

    python -m benchmarks.best_of_n                 # 135M, every case, each in a process of its own
    python -m benchmarks.best_of_n --shape=mini --cases=best_of_16

A row per case goes to ``benchmarks/results/best_of_n.jsonl``.
"""

from benchmarks import harness
from benchmarks.cases import cases_of

if __name__ == "__main__":
    harness.huge_pages()

from benchmarks import workload

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Runs the cases that the command line names."""
    harness.main("best_of_n", workload.run, cases_of("best_of_n"), argv, dtypes=workload.DTYPES)


if __name__ == "__main__":
    main()
