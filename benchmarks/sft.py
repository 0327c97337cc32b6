"""A supervised step: 8 sequences of 128 tokens, every token counted.

    python -m benchmarks.sft                 # 135M, every case, each in a process of its own
    python -m benchmarks.sft --shape=mini --cases=sft_8x128

A row per case goes to ``benchmarks/results/sft.jsonl``.
"""

from benchmarks import harness
from benchmarks.cases import cases_of

if __name__ == "__main__":
    harness.huge_pages()

from benchmarks import workload

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Runs the cases that the command line names."""
    harness.main("sft", workload.run, cases_of("sft"), argv, dtypes=workload.DTYPES)


if __name__ == "__main__":
    main()
