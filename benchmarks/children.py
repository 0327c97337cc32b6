"""Starting a worker process and reading the row that it prints, within a hard limit of time."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from typing import Any

from benchmarks.cases import SHAPES, Case
from benchmarks.harness import ROOT

__all__ = ["PEERS", "Job", "start"]

PEERS = {"trl": "benchmarks.peers.trl_worker", "tunix": "benchmarks.peers.tunix_worker"}
"""Module of each peer's worker; its interpreter is ``.venv.<name>/bin/python``."""

_RATE = {"tiltjax": 150.0, "trl": 80.0, "tunix": 80.0}
_START = {"tiltjax": 12.0, "trl": 18.0, "tunix": 30.0}
"""Rough GFLOP/s and seconds before the first call on two quiet cores: only to judge what fits into the time left."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One process: a case by a library with operands of a type.

    Attributes:
      library: "tiltjax" or a key of `PEERS`.
      case: What it does.
      shape: Name of the model's shape.
      dtype: As the worker spells it.
      repeats: Most timed calls.
      budget: Seconds for them.
      process: Which of several like it.
    """

    library: str
    case: Case
    shape: str
    dtype: str
    repeats: int = 3
    budget: float = 40.0
    process: int = 1

    @property
    def label(self) -> str:
        """For the reader of a terminal."""
        return f"{self.case.name} {self.shape}: {self.library} {self.dtype} ({self.process})"

    @property
    def interpreter(self) -> str:
        """Of the library's own environment."""
        return sys.executable if self.library == "tiltjax" else str(ROOT / f".venv.{self.library}" / "bin" / "python")

    @property
    def module(self) -> str:
        """What is started."""
        return PEERS.get(self.library, f"benchmarks.{self.case.module}")

    @property
    def seconds(self) -> float:
        """A guess of how long it takes on a quiet machine."""
        work = self.case.flops(SHAPES[self.shape], shared=self.library == "tiltjax") / 1e9
        one = work / _RATE[self.library]
        return _START[self.library] + one + min(self.repeats * one, max(one, self.budget))


def start(
    job: Job, *, run: str, limit: float, environment: dict[str, str] | None = None, settings: tuple[str, ...] = ()
) -> tuple[dict[str, Any] | None, str]:
    """Runs a job to its end.

    Args:
      job: What.
      run: Name of the run that its row belongs to.
      limit: Seconds after which it is killed.
      environment: Variables on top of this process's.
      settings: More command-line arguments.

    Returns:
      The row, or None and why there is none, in one line.
    """
    command = [job.interpreter, "-m", job.module, f"--cases={job.case.name}", f"--run={run}", *settings]
    command += [f"--{name}={getattr(job, name)}" for name in ("shape", "dtype", "repeats", "budget")]
    variables = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", **os.environ, **(environment or {})}
    # A session of its own, so that what the worker has started ends with it.
    worker = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = worker.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.communicate()
        return None, f"killed after {limit:.0f} s"
    except BaseException:
        os.killpg(worker.pid, signal.SIGKILL)
        raise
    for line in reversed(out.splitlines()):
        if line.startswith('{"case"'):
            return json.loads(line), ""
    last = (err.strip() or out.strip() or "no output").splitlines()[-1]
    return None, f"exit status {worker.returncode}: {last[:300]}"
