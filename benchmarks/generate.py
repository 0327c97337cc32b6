"""Generation: 16 prompts of 64 tokens, 64 tokens each, drawn at temperature 1.

    python -m benchmarks.generate                 # 135M, every case, each in a process of its own
    python -m benchmarks.generate --shape=mini --cases=generate_16

A row per case goes to ``benchmarks/results/generate.jsonl``.
"""

from benchmarks import harness
from benchmarks.cases import cases_of

if __name__ == "__main__":
    harness.huge_pages()

from benchmarks import workload

__all__ = ["main"]


def main(argv: list[str] | None = None) -> None:
    """Runs the cases that the command line names."""
    harness.main("generate", workload.run, cases_of("generate"), argv, dtypes=workload.DTYPES)


if __name__ == "__main__":
    main()
