"""The settings of `experiments.align`."""

import dataclasses

from experiments.common.run_directory import RunFlags
from tiltjax.align.settings import FREE, Settings
from tiltjax.train.config import refield

__all__ = ["UNCHANGING", "AlignConfig"]

UNCHANGING = (*FREE, *(item.name for item in dataclasses.fields(RunFlags)))
"""Settings that move no number of a run."""


@dataclasses.dataclass(frozen=True)
class AlignConfig(RunFlags, Settings):
    """Everything that decides a run: the settings of a `tiltjax.align.Session`, and where it is written."""

    output: str = refield(RunFlags, "output", "runs/align")
