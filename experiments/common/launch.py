"""What every experiment does around its job: the process, the command line, a report's command."""

import dataclasses
import functools
import logging
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Collection
from typing import Any, NoReturn

import jax
from absl import app, flags
from absl import logging as absl_logging

from experiments.common.flags import define_flags
from tiltjax.ops.checks import did_you_mean
from tiltjax.train.hardware import CACHE, compilation_cache, return_memory_after_compiling

__all__ = ["command", "one_line", "parse", "prepare_process", "program", "run_program"]

flags.disclaim_key_flags()  # A program's --help lists its own flags, which `run_program` defines.

_LONGEST_WORD = 300
"""Characters of a word of an error, such as a path."""

_PATIENCE = 15.0
"""Seconds that threads have to end after a program has failed."""


def run_program(main: Callable[[list[str]], None], *config_classes: type) -> None:
    """Runs a program: defines its flags, reads the command line, calls ``main`` and ends the process.

    Args:
      main: From `program`.
      *config_classes: Dataclasses whose fields are flags of the program.
    """
    for config_class in config_classes:
        define_flags(config_class)
    try:
        app.run(main, flags_parser=_parsed)
    except SystemExit as end:
        if end.code:
            _leave_in_time(end.code if isinstance(end.code, int) else 1)
        raise


def _leave_in_time(status: int) -> None:
    """Ends a process that has failed, also where a thread still waits for something that will never come."""

    def leave() -> None:
        threading.main_thread().join()
        time.sleep(_PATIENCE)
        os._exit(status)

    threading.Thread(target=leave, daemon=True).start()


def _parsed(argv: list[str]) -> list[str]:
    try:
        return parse(argv)
    except ValueError as error:
        _refuse(error)
    except SystemExit:  # Of --help, which absl ends with status 1.
        sys.exit(0)


def parse(argv: list[str], flag_values: flags.FlagValues = flags.FLAGS) -> list[str]:
    """Reads a command line into flags.

    Args:
      argv: The program's name, then its arguments.
      flag_values: The flags.

    Returns:
      The program's name.

    Raises:
      ValueError: If a flag is unknown or has no value or one of another type, or an argument is no flag; one line.
    """
    try:
        name, *strange = flag_values(argv)
    except flags.UnrecognizedFlagError as error:
        hint = did_you_mean(error.flagname, list(flag_values))
        raise ValueError(f"unknown flag --{error.flagname}{hint or '; --help lists the flags'}") from None
    except flags.Error as error:
        raise ValueError(str(error)) from None
    if strange:
        raise ValueError(f"unexpected arguments: {' '.join(strange)}; flags read --name=value")
    return [name]


def one_line(error: Exception) -> str:
    """What an error says, in one line, with words that no one reads to their end cut.

    Args:
      error: Any.

    Returns:
      Text without line breaks.
    """
    said = str(error).strip() or type(error).__name__
    if isinstance(error, jax.errors.JaxRuntimeError):
        said = said.partition("\n")[0]  # Below it stand all buffers.
    words = said.split()
    return " ".join(word if len(word) <= _LONGEST_WORD else f"{word[:80]}..." for word in words)


def _refuse(error: Exception) -> NoReturn:
    print(f"error: {one_line(error)}", file=sys.stderr)
    sys.exit(2)


def program(job: Callable[[], Any]) -> Callable[[list[str]], None]:
    """Makes a job the ``main`` of `run_program`, in a process as `prepare_process` leaves it.

    Bad input, and what does not fit into memory, ends in one line and exit status 2, or with ``TILTJAX_TRACEBACK`` set
    in a traceback.

    Args:
      job: Reads its flags and runs; what it returns, if anything but None, is the exit status.

    Returns:
      ``main(argv)``.
    """

    @functools.wraps(job)
    def main(argv: list[str]) -> None:
        prepare_process()
        try:
            status = job()
        except (ValueError, OSError, ImportError, MemoryError, jax.errors.JaxRuntimeError) as error:
            bug = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
            if bug or os.environ.get("TILTJAX_TRACEBACK"):
                raise
            _refuse(error)
        if status is not None:
            sys.exit(status)

    return main


def prepare_process() -> None:
    """What this process says, where its compiled programs are kept, and the memory that it gives back.

    The loggers "tiltjax" and "experiments" speak from INFO on, all others from WARNING on. Programs are kept in the
    directory of the flag ``compilation_cache``, or where there is no such flag, in `tiltjax.train.hardware.CACHE`.
    """
    absl_logging.set_verbosity(absl_logging.WARNING)
    if not os.environ.get("TILTJAX_TRACEBACK"):
        absl_logging.get_absl_logger().addFilter(_raised_anyway)
    for name in ("tiltjax", "experiments"):
        logging.getLogger(name).setLevel(logging.INFO)
    told = flags.FLAGS
    compilation_cache(str(told["compilation_cache"].value) if "compilation_cache" in told else CACHE)
    return_memory_after_compiling()


def _raised_anyway(record: logging.LogRecord) -> bool:
    """False for the tracebacks that threads of Orbax log before the error is raised where it is waited for."""
    return not ("orbax" in record.pathname and record.exc_info)


def command(module: str, config: Any, *, free: Collection[str] = ()) -> str:
    """What to type to get a run: the flags that differ from their defaults.

    Args:
      module: Below ``experiments``.
      config: The run's dataclass.
      free: Fields that do not belong to the command; resuming, overwriting and where compilations lie never do.

    Returns:
      One line.

    Example:
      >>> from experiments.generation_verification_gap.__main__ import GapConfig
      >>> command("generation_verification_gap", GapConfig(num_seeds=2))
      'python -m experiments.generation_verification_gap --num_seeds=2'
    """

    def default(f: dataclasses.Field) -> Any:
        """Where None stands for a value that other fields decide, that value."""
        return getattr(dataclasses.replace(config, **{f.name: None}), f.name) if f.default is None else f.default

    own = list(type(config).__annotations__)  # Before what is inherited.
    words = [
        shlex.quote(f"--{f.name}={getattr(config, f.name)}")
        for f in sorted(dataclasses.fields(config), key=lambda f: own.index(f.name) if f.name in own else len(own))
        if getattr(config, f.name) != default(f) and f.name not in {"resume", "overwrite", "compilation_cache", *free}
    ]
    return " ".join([f"python -m experiments.{module}", *words])
