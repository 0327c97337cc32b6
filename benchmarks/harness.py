"""The frame that every benchmark runs in: options, timing, memory, a yardstick, one JSON line per case.

Nothing but the standard library and NumPy, so that a peer's worker runs in it too, in its own environment. A case is
timed in a process of its own: one call to warm up, then up to ``--repeats`` timed ones within ``--budget`` seconds.
Every line has wall and CPU seconds, how many cores other processes used meanwhile, the peak of resident memory, the
useful arithmetic, and the speed of a plain matrix product in the same process (the yardstick).

glibc hands out huge pages only if it is told before the process starts (``GLIBC_TUNABLES=glibc.malloc.hugetlb=1``):
`huge_pages` starts the process again with it, tiltjax and peers alike, unless the variable is set already.
"""

import argparse
import contextlib
import dataclasses
import datetime
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.cases import SHAPES, Case

__all__ = [
    "RESULTS",
    "ROOT",
    "Options",
    "Stopwatch",
    "age",
    "commit",
    "emit",
    "environment",
    "gemm_gflops",
    "huge_pages",
    "main",
    "measure",
    "numpy_multiply",
    "options",
    "peak_memory",
    "report",
    "rows",
]

RESULTS = pathlib.Path(__file__).parent / "results"
"""Where results go; the environment variable ``TILTJAX_BENCH_RESULTS`` says otherwise."""

ROOT = pathlib.Path(__file__).parents[1]
_TUNABLE = "GLIBC_TUNABLES"
_PACKAGES = ("flax", "google-tunix", "jax", "jaxlib", "numpy", "optax", "torch", "transformers", "trl")


@dataclasses.dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
      cases: Which.
      shape: Name of the model's shape.
      dtype: Of the operands; each library has its own names.
      repeats: Most timed calls.
      budget: Seconds that the timed calls may take.
      run: Name under which rows that belong together are found again.
    """

    cases: tuple[Case, ...]
    shape: str
    dtype: str
    repeats: int
    budget: float
    run: str


def options(
    argv: Sequence[str] | None,
    module: str,
    cases: Sequence[Case],
    *,
    dtypes: tuple[str, ...],
    default: Sequence[str] = (),
) -> Options:
    """Reads the command line of a benchmark; the first of ``dtypes`` is the default, and all cases if none are."""
    known = {case.name: case for case in cases}
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}")
    parser.add_argument("--cases", default=",".join(default or known), help=f"comma-separated, of {', '.join(known)}")
    parser.add_argument("--shape", default="135m", choices=SHAPES)
    parser.add_argument("--dtype", default=dtypes[0], choices=dtypes)
    parser.add_argument("--repeats", type=int, default=3, help="most timed calls of a case")
    parser.add_argument("--budget", type=float, default=40.0, help="seconds that they may take")
    parser.add_argument("--run", default=f"{datetime.datetime.now():%Y%m%d-%H%M%S}", help="name of the run")
    given = parser.parse_args(argv)
    names = given.cases.split(",")
    for name in names:
        if name not in known:
            parser.error(f"cases must be among {', '.join(known)}; got {name!r}")
    cases = tuple(known[name].shrunk() if given.shape == "tiny" else known[name] for name in names)
    return Options(cases, given.shape, given.dtype, given.repeats, given.budget, given.run)


def huge_pages() -> None:
    """Starts this process again with transparent huge pages for malloc, unless it has been told about them.

    It also offers itself first where the machine runs out of memory.
    """
    with contextlib.suppress(OSError):
        pathlib.Path("/proc/self/oom_score_adj").write_text("900")
    if _TUNABLE not in os.environ and sys.platform == "linux":
        os.environ[_TUNABLE] = "glibc.malloc.hugetlb=1"
        sys.stdout.flush()
        os.execv(sys.executable, sys.orig_argv)


class Stopwatch:
    """Wall seconds, CPU seconds of this process, and cores that others used, per call.

    Args:
      compiles: Whether the first call may cost much more than the second; else, if it alone exceeds the budget, it is
        the measurement.
    """

    def __init__(self, *, compiles: bool):
        self._compiles = compiles
        self.laps: list[tuple[float, float, float]] = []
        self.first_ends = 0.0
        self._began: tuple[float, float, float] | None = None

    def begin(self) -> None:
        """Before the work."""
        self._began = (time.perf_counter(), time.process_time(), _busy())

    def end(self) -> None:
        """After it; whoever calls has waited for its result."""
        assert self._began is not None
        wall, cpu, busy = (
            b - a for a, b in zip(self._began, (time.perf_counter(), time.process_time(), _busy()), strict=True)
        )
        self.laps.append((wall, cpu, max(0.0, (busy - cpu) / wall)))
        self.first_ends = self.first_ends or age()

    def enough(self, repeats: int, budget: float) -> bool:
        """Whether the laps after the first one (the warm-up) are as many as wanted, or the next would be too long."""
        timed = [lap[0] for lap in self.laps[1:]]
        if len(timed) >= repeats:
            return True
        if not timed:
            return bool(self.laps) and self.laps[0][0] > budget and not self._compiles
        return sum(timed) + statistics.median(timed) > budget


def _busy() -> float:
    """CPU seconds that the whole machine has worked."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, softirq, *_ = (int(x) for x in file.readline().split()[1:9])
    except OSError:
        return 0.0
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def measure(call: Callable[[], Any], *, repeats: int, budget: float, compiles: bool) -> Stopwatch:
    """One call to warm up, then up to ``repeats`` within ``budget`` seconds.

    Args:
      call: Does the work and waits for it.
      repeats: Most timed calls.
      budget: Seconds.
      compiles: Whether the first call may cost much more than the second.

    Returns:
      The `Stopwatch`, its first lap the warm-up.
    """
    watch = Stopwatch(compiles=compiles)
    while not watch.enough(repeats, budget):
        watch.begin()
        call()
        watch.end()
    return watch


def gemm_gflops(multiply: Callable[[], Any], size: int, *, seconds: float = 0.5) -> float:
    """Speed of a product of two ``size x size`` matrices, 1e9 operations per second: the median of many."""
    multiply()
    times: list[float] = []
    while sum(times) < seconds or len(times) < 5:
        start = time.perf_counter()
        multiply()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times) / 1e9


def peak_memory() -> int:
    """Most bytes that were resident in this process so far (`VmHWM`, which a parent's size does not touch)."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def age() -> float:
    """Seconds since this process began."""
    with open("/proc/self/stat") as file:
        began = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")


def environment() -> dict[str, Any]:
    """Versions, machine, commit and date."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    text = pathlib.Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    told = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    model = told.get("model name", "unknown")
    # A cloud's machines of several generations go by one name.
    model += f" (family {told['cpu family']}, model {told['model']})" if "cpu family" in told else ""
    units = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in text]
    machine = {
        "cpu": model,
        "units": units,
        "threads": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        _TUNABLE: os.environ.get(_TUNABLE, ""),
    }
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"versions": versions, "machine": machine, "commit": commit(), "date": date}


def commit() -> str:
    """The commit, with a digest of what was changed since in the code that is measured; empty outside a checkout."""
    head, changes = _git("rev-parse", "--short=12", "HEAD"), _git("diff", "HEAD", "--", "tiltjax", "benchmarks/*.py")
    return f"{head}+{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if head and changes else head


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def report(
    case: Case,
    watch: Stopwatch,
    given: Options,
    *,
    library: str,
    shared: bool,
    multiply: tuple[Callable[[], Any], int],
    **extra: Any,
) -> dict[str, Any]:
    """The row of a case that has been timed.

    Args:
      case: Which.
      watch: Its laps; the first one is the warm-up unless it is the only one.
      given: The options.
      library: "tiltjax" or a peer.
      shared: Whether this library computes a prompt once for all of its completions.
      multiply: The yardstick (see `gemm_gflops`) and its size.
      **extra: More fields.

    Returns:
      The row, without `environment`.
    """
    peak = peak_memory()  # Before the yardstick.
    laps = watch.laps[1:] or watch.laps
    wall, cpu, others = zip(*laps, strict=True)
    seconds = statistics.median(wall)
    shape = SHAPES[given.shape]
    work = case.flops(shape, shared=shared) / 1e9
    yardstick = gemm_gflops(*multiply)
    return {
        "case": case.name,
        "shape": given.shape,
        "library": library,
        "dtype": given.dtype,
        "run": given.run,
        "sizes": {"B": case.B, "N": case.N, "S": case.S, "T": case.T},
        "seconds": round(seconds, 5),
        "laps": [round(x, 5) for x in wall],
        "cpu_seconds": round(statistics.median(cpu), 5),
        "others": round(statistics.median(others), 2),
        "warmed_up": len(watch.laps) > 1,
        "first_seconds": round(watch.laps[0][0], 3),
        "first_ends_seconds": round(watch.first_ends, 2),
        "peak_gb": round(peak / 1e9, 3),
        "gflop": round(work, 3),
        "gflop_shared": round(case.flops(shape) / 1e9, 3),
        "gflops": round(work / seconds, 2),
        "gemm_gflops": round(yardstick, 3),
        "gemm_share": round(work / seconds / yardstick, 4),
        **extra,
    }


def emit(name: str, row: dict[str, Any], *, show: Callable[[dict[str, Any]], str] = json.dumps) -> dict[str, Any]:
    """Appends a row, with `environment`, to ``results/<name>.jsonl`` and prints it, as one line of JSON or as told."""
    row = {**row, **environment()}
    line = json.dumps(row)
    print(show(row), flush=True)
    folder = pathlib.Path(os.environ.get("TILTJAX_BENCH_RESULTS") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("a") as file:
        file.write(line + "\n")
    return row


def rows(run: str | None = None) -> list[dict[str, Any]]:
    """Every row that was ever written, oldest first; of one run where it is named. Half-written lines are left out."""
    folder = pathlib.Path(os.environ.get("TILTJAX_BENCH_RESULTS") or RESULTS)
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                found.append({**json.loads(line), "file": path.stem})
            except ValueError:
                continue
    found = [row for row in found if run is None or row.get("run") == run]
    return sorted(found, key=lambda row: row.get("date", ""))


def main(
    program: str,
    one: Callable[[Case, Options], dict[str, Any]],
    cases: Sequence[Case],
    argv: Sequence[str] | None = None,
    *,
    dtypes: tuple[str, ...],
    default: Sequence[str] = (),
    show: Callable[[dict[str, Any]], str] = json.dumps,
) -> None:
    """The body of a benchmark: one case in this process, several in a child process each.

    Args:
      program: Name of the module under ``benchmarks``.
      one: Runs a case and returns its row.
      cases: Those it knows.
      argv: Command line; None means that of the process.
      dtypes: What ``--dtype`` may be, the default first.
      default: Names of the cases that run if none are named; all where it is empty.
      show: How a row is printed.
    """
    given = options(argv, program, cases, dtypes=dtypes, default=default)
    if len(given.cases) == 1:
        row = one(given.cases[0], given)
        emit(row.get("measure", given.cases[0].module), row, show=show)
        return
    failed = []
    for case in given.cases:
        command = [sys.executable, "-m", f"benchmarks.{program}", f"--cases={case.name}"]
        command += [f"--{name}={getattr(given, name)}" for name in ("shape", "dtype", "repeats", "budget", "run")]
        if subprocess.run(command, cwd=ROOT).returncode:
            failed.append(case.name)
    if failed:
        sys.exit(f"error: failed: {', '.join(failed)}")


def numpy_multiply(size: int = 1024) -> tuple[Callable[[], Any], int]:
    """The float32 yardstick for work without a device library."""
    a, b = (np.random.default_rng(i).random((size, size), np.float32) for i in range(2))
    out = np.empty_like(a)
    return lambda: np.matmul(a, b, out=out), size
