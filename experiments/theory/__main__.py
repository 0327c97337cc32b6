"""Every family of claims, each with its page, and one page that holds every verdict.

    python -m experiments.theory

Expected: no claim FAILED (exit status 0); under 8 minutes on two cores. ``--output=docs`` refreshes the committed page.
"""

import dataclasses
import importlib
import sys

from tqdm import tqdm

from experiments.common.flags import from_flags
from experiments.common.launch import program, run_program
from experiments.common.run_directory import locked
from experiments.theory import claims
from tiltjax.train.config import field, output_field

FAMILIES = (
    "soft_best_of_n",
    "log_partition",
    "rlhf_rlif",
    "weighted_mle",
    "all_roads",
    "direct_preference",
    "f_divergence",
    "misspecification",
    "kl_estimators",
    "grpo_dynamics",
    "games",
    "kuhn",
    "over_optimisation",
    "process_rewards",
    "search",
    "voting",
)
"""Modules of this package, in the order of the page."""


@dataclasses.dataclass(frozen=True)
class TheoryConfig:
    """Everything that decides a run."""

    output: str = output_field(
        "runs", "Directory for theory.md, and theory/<family>/ with the pages and their figures."
    )
    fast: bool = field(False, "Leave out whatever takes more than a few seconds.")
    only: str = field("", f"Comma-separated families to run; all by default: {', '.join(FAMILIES)}.")


def families(names: list[str]) -> list[claims.Family]:
    """The families by name; all of them where none is named.

    Raises:
      ValueError: If a name is unknown.
    """
    if unknown := sorted(set(names) - set(FAMILIES)):
        raise ValueError(f"only: {', '.join(unknown)}: no such family; there are {', '.join(FAMILIES)}")
    return [importlib.import_module(f"experiments.theory.{name}").FAMILY for name in names or FAMILIES]


@program
def main() -> bool:
    """Runs the families and writes the index page; the exit status is 1 if a claim fails."""
    config = from_flags(TheoryConfig)
    chosen = families([name for name in config.only.split(",") if name])
    with locked(config.output) as output:
        pages, judged = [], {}
        for family in tqdm(chosen, desc="families", disable=None):
            body, judged[family.name] = claims.run(family, output / "theory" / family.name, fast=config.fast)
            pages.append(claims.nested(body, f"theory/{family.name}"))
        command = "python -m experiments.theory" + (" --fast" if config.fast else "")
        page = claims.index(chosen, judged, pages, command)
        (output / "theory.md").write_text(page)
    failed = [c for of_family in judged.values() for c in of_family if c.verdict == claims.FAILED]
    for claim in failed:
        print(f"FAILED: {claim.claim}: {claim.formula} = {claim.computed}, expected {claim.expected}", file=sys.stderr)
    print(f"report: {output / 'theory.md'}")
    return bool(failed)


if __name__ == "__main__":
    run_program(main, TheoryConfig)
