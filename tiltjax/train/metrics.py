"""Numbers of a run: a JSONL file that a resumed run continues without a seam, TensorBoard events, intervals."""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np

from tiltjax.files import naming
from tiltjax.ops.checks import check_at_least
from tiltjax.train import distributed
from tiltjax.train.config import write_text
from tiltjax.train.finite import check_scalars
from tiltjax.types import Array, Float

__all__ = ["Interval", "Journal", "Line", "MetricsWriter", "bootstrap_interval"]

_LOG = logging.getLogger(__name__)


class MetricsWriter:
    """Appends scalars to ``metrics.jsonl`` and to TensorBoard events; a context manager.

    The file holds nothing that differs between two runs of the same configuration (no times, no paths): an interrupted
    and resumed run ends with the same bytes as an unbroken one.

    Args:
      directory: Of the run.
      resume_step: Lines of this step and later are dropped before the first write, and steps before it that have no
        line are named in the log; None starts the file anew.
    """

    def __init__(self, directory: str | os.PathLike, *, resume_step: int | None = None):
        from tensorboardX import SummaryWriter

        folder = pathlib.Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        kept = {} if resume_step is None or not path.exists() else _whole_lines(path, resume_step)
        if lost := _spans(step for step in range(resume_step or 0) if step not in kept):
            _LOG.warning("%s: the lines of steps %s are lost; the run goes on at step %d", path, lost, resume_step)
        write_text(path, "".join(f"{line}\n" for line in kept.values()))
        self._file = path.open("a")
        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=resume_step)

    def write(self, step: int, scalars: Mapping[str, Any]) -> None:
        """One line: the step and its scalars."""
        values = {name: float(value) for name, value in sorted(scalars.items())}
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            raise naming(self._file.name, error) from None
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception) -> None:
        with contextlib.suppress(OSError):  # Every line was flushed: what cannot be closed was raised by `write`.
            self._file.close()
        self._events.close()


@dataclasses.dataclass(frozen=True)
class Line:
    """A line that `Journal.write` has begun."""

    _values: Future[dict[str, float]]
    _written: Future[None]

    def values(self) -> dict[str, float]:
        """Waits for its numbers; raises `tiltjax.train.finite.NonFiniteError` on every host if one is not finite.

        With one process, errors of writing are raised here; with several, by `written`, which all hosts call, so that
        none continues alone.
        """
        if jax.process_count() == 1:
            self._written.result()
        return self._values.result()

    def written(self) -> None:
        """Waits until this line and all before it are written; raises the first error there was."""
        self._written.result()


class Journal:
    """Asynchronous metrics writer; a context manager.

    Create it on every host and write the same lines; only process 0 writes them, in order, on a background thread.
    Where the files cannot be opened, all hosts raise.

    Args:
      directory: As for `MetricsWriter`; None writes no file, and lines that are not finite are refused all the same.
      resume_step: As for `MetricsWriter`.
    """

    def __init__(self, directory: str | os.PathLike | None, *, resume_step: int | None = None):
        self._writer: MetricsWriter | None = None
        if directory is not None:
            self._writer = distributed.by_main(lambda: MetricsWriter(directory, resume_step=resume_step))
        self._clerk = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def write(self, step: int, scalars: Mapping[str, Any]) -> Line:
        """Begins a line; waits for nothing. One with a number that is not finite is not written, nor any after it."""
        values = self._clerk.submit(_floats, step, scalars)
        self._last = self._clerk.submit(self._write, step, values, self._last)
        return Line(values, self._last)

    def _write(self, step: int, values: Future[dict[str, float]], before: Future[None] | None) -> None:
        if before is not None:
            before.result()  # A file with a gap would look whole: after an error nothing is written any more.
        if self._writer is not None:
            self._writer.write(step, values.result())

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception) -> None:
        self._clerk.shutdown()
        if self._writer is not None:
            self._writer.__exit__(*exception)


def _floats(step: int, scalars: Mapping[str, Any]) -> dict[str, float]:
    values = {name: float(value) for name, value in jax.device_get(scalars).items()}
    check_scalars(f"step {step}", values)
    return values


def _whole_lines(path: pathlib.Path, before: int) -> dict[int, str]:
    """Lines of steps below ``before``, by step; one that is damaged, as by a kill while it was written, is left out."""
    kept: dict[int, str] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if step < before:
            kept.setdefault(step, line)
    return kept


def _spans(steps: Iterable[int]) -> str:
    """``3, 4, 5, 9`` as "3 to 5, 9"."""
    spans: list[list[int]] = []
    for step in steps:
        if spans and spans[-1][1] == step - 1:
            spans[-1][1] = step
        else:
            spans.append([step, step])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans)


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_interval(
    values: Float[Array, " P"], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Bootstrap interval of a mean over prompts (percentile method).

    Candidates of one prompt are not independent: average them first and resample prompts.

    Args:
      values: One value per prompt.
      level: Coverage.
      resamples: Bootstrap draws.
      seed: Of NumPy's generator, so that a report is reproducible.

    Returns:
      Mean, lower and upper end.

    Raises:
      ValueError: If there are fewer than 2 values.

    Example:
      >>> bootstrap_interval(np.zeros(5))
      Interval(mean=0.0, low=0.0, high=0.0)
    """
    from scipy.stats import bootstrap

    values = np.asarray(values, np.float64)
    check_at_least("number of values", len(values), 2)
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    generator = np.random.default_rng(seed)
    result = bootstrap(
        (values,),
        np.mean,
        confidence_level=level,
        n_resamples=resamples,
        method="percentile",
        rng=generator,
        batch=1000,
    )
    return Interval(mean, float(result.confidence_interval.low), float(result.confidence_interval.high))
