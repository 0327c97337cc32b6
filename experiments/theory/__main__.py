"""Every family of claims, each with its page, and one page that holds every verdict.

    python -m experiments.theory

Expected: no claim FAILED (exit status 0); under 8 minutes on two cores. ``--output=docs`` refreshes the committed page.
"""

import importlib
import pathlib
import sys

from absl import app, flags
from absl import logging as absl_logging
from tqdm import tqdm

from experiments.theory import claims

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

_OUTPUT = flags.DEFINE_string("output", "runs", "Directory for theory.md and theory/<family>/ with the figures.")
_FAST = flags.DEFINE_bool("fast", False, "Leave out whatever takes more than a few seconds.")
_ONLY = flags.DEFINE_list("only", [], f"Families to run; all by default: {', '.join(FAMILIES)}.")


def families(names: list[str]) -> list[claims.Family]:
    """The families by name; all of them where none is named.

    Raises:
      ValueError: If a name is unknown.
    """
    if unknown := sorted(set(names) - set(FAMILIES)):
        raise ValueError(f"only: {', '.join(unknown)}: no such family; there are {', '.join(FAMILIES)}")
    return [importlib.import_module(f"experiments.theory.{name}").FAMILY for name in names or FAMILIES]


def main(argv: list[str]) -> None:
    """Runs the families and writes the index page."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    absl_logging.set_verbosity(absl_logging.WARNING)
    try:
        chosen = families(_ONLY.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    output = pathlib.Path(_OUTPUT.value)
    pages, judged = [], {}
    for family in tqdm(chosen, desc="families", disable=None):
        body, judged[family.name] = claims.run(family, output / "theory" / family.name, fast=_FAST.value)
        pages.append(claims.nested(body, f"theory/{family.name}"))
    command = "python -m experiments.theory" + (" --fast" if _FAST.value else "")
    page = claims.index(chosen, judged, pages, command)
    (output / "theory.md").write_text(page)
    failed = [c for of_family in judged.values() for c in of_family if c.verdict == claims.FAILED]
    for claim in failed:
        print(f"FAILED: {claim.claim}: {claim.formula} = {claim.computed}, expected {claim.expected}", file=sys.stderr)
    print(f"report: {output / 'theory.md'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    app.run(main)
