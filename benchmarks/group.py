"""A group of 16 completions of one prompt: scoring it, and a GRPO step on it.

    python -m benchmarks.group                 # 135M, every case, each in a process of its own
    python -m benchmarks.group --shape=mini --cases=group_step

A row per case goes to ``benchmarks/results/group.jsonl``.
"""

from benchmarks import harness
from benchmarks.cases import cases_of

if __name__ == "__main__":
    harness.huge_pages()

from benchmarks import workload

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Runs the cases that the command line names."""
    harness.main("group", workload.run, cases_of("group"), argv, dtypes=workload.DTYPES)


if __name__ == "__main__":
    main()
