"""Import time: a fresh interpreter per import, its own start subtracted.

    python -m benchmarks.imports

The libraries' own modules here, the peers' trainers in their environments where those exist.
"""

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import time

from benchmarks import harness
from benchmarks.children import PEERS
from benchmarks.harness import ROOT

__all__ = ["STATEMENTS", "main"]

STATEMENTS = {
    "tiltjax": ("import jax", "import tiltjax", "import tiltjax.losses.preference", "import tiltjax.train.step",
                "import tiltjax.train.rollout", "import experiments.align"),
    "trl": ("import torch", "from trl import SFTTrainer", "from trl import GRPOTrainer"),
    "tunix": ("from tunix.sft import peft_trainer", "from tunix.rl.grpo import grpo_learner"),
}  # fmt: skip
"""What is imported, by library; JAX and torch on their own stand beside."""


def main(argv: list[str] | None = None) -> None:
    """Measures every statement."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.imports")
    parser.add_argument("--libraries", default=",".join(STATEMENTS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", default=f"{datetime.datetime.now():%Y%m%d-%H%M%S}", help="name of the run")
    given = parser.parse_args(argv)
    for library in given.libraries.split(","):
        python = str(ROOT / f".venv.{library}" / "bin" / "python") if library in PEERS else sys.executable
        if not os.path.exists(python):
            continue
        empty = statistics.median(_seconds(python, "pass") for _ in range(given.repeats))
        for statement in STATEMENTS[library]:
            laps = [round(max(0.0, _seconds(python, statement) - empty), 3) for _ in range(given.repeats)]
            row = {"measure": "imports", "library": library, "statement": statement, "run": given.run, "laps": laps}
            harness.emit("imports", {**row, "seconds": statistics.median(laps)})


def _seconds(python: str, statement: str) -> float:
    variables = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    start = time.perf_counter()
    subprocess.run([python, "-W", "ignore", "-c", statement], check=True, cwd=ROOT, env=variables, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
