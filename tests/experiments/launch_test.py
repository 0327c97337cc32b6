"""What every experiment does around its job."""

import dataclasses
import logging
import pathlib
import re
import subprocess
import sys

import jax
import pytest
from absl import app, flags
from absl import logging as absl_logging

from experiments.common import launch
from experiments.common.flags import define_flags
from tiltjax.train.config import field

ROOT = pathlib.Path(__file__).parents[2]
prepare_process = launch.prepare_process  # As it is outside of the tests.


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = field(4, "Steps.")
    name: str = field("a", "Name.")
    output: str = field("runs/x", "Directory.")
    resume: bool = field(False, "Go on.")


def test_a_job_becomes_a_main():
    done = []
    launch.program(lambda: done.append(1))(["x"])
    assert done == [1]


@pytest.fixture
def process(tmp_path, monkeypatch):
    """This process as it was, with a home of its own; what is given back is counted."""
    loggers, returned = [logging.getLogger(name) for name in ("tiltjax", "experiments")], []
    before = [logger.level for logger in loggers], absl_logging.get_verbosity(), jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(launch, "prepare_process", prepare_process)
    monkeypatch.setattr(launch, "return_memory_after_compiling", lambda: returned.append(1))
    jax.config.update("jax_compilation_cache_dir", None)
    yield returned
    for logger, level in zip(loggers, before[0], strict=True):
        logger.setLevel(level)
    absl_logging.set_verbosity(before[1])
    jax.config.update("jax_compilation_cache_dir", before[2])


@pytest.mark.parametrize("told", [None, "elsewhere", ""])
def test_every_program_keeps_what_it_compiles(tmp_path, monkeypatch, process, told):
    """Where its flag says, and where it has none, in the home."""
    own, kept = flags.FlagValues(), []
    if told is not None:
        flags.DEFINE_string("compilation_cache", told and str(tmp_path / told), "Of a program.", flag_values=own)
    monkeypatch.setattr(flags, "FLAGS", own)
    launch.program(lambda: kept.append(jax.config.jax_compilation_cache_dir))(["x"])
    home = str(tmp_path / ".cache" / "tiltjax")
    assert kept == [{None: home, "elsewhere": str(tmp_path / "elsewhere"), "": None}[told]]
    assert process == [1]


def test_programs_speak_of_their_own_work_only(process, caplog):
    launch.program(lambda: None)(["x"])
    for name in ("tiltjax.train.rollout", "tiltjax.align.fit", "absl", "jax._src.dispatch", "orbax.checkpoint"):
        logging.getLogger(name).info("of %s", name)
    assert [record.name for record in caplog.records] == ["tiltjax.train.rollout", "tiltjax.align.fit"]


@pytest.fixture
def own():
    """The flags of `Config`, apart from those of this process."""
    values = flags.FlagValues()
    define_flags(Config, values)
    return values


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stpes=3"], "unknown flag --stpes; did you mean 'steps'?"),
        (["--zzz"], "unknown flag --zzz; --help lists the flags"),
        (["--steps=three"], "flag --steps=three: invalid literal for int() with base 10: 'three'"),
        (["--steps"], "Missing value for flag --steps"),
        (["--resume=perhaps"], "flag --resume=perhaps: "),
        (["--steps=3", "a", "--name=b", "b"], "unexpected arguments: a b; flags read --name=value"),
        (["--flagfile=/nowhere"], "ERROR:: Unable to open flagfile"),
    ],
)
@pytest.mark.robustness(
    "Flags", given="an unknown flag, or a value of another type", outcome="one line, the nearest name, exit status 2"
)
def test_a_bad_flag_is_one_line(own, words, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        launch.parse(["x", *words], own)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("word", "status"), [("--nonsense_flag", 2), ("--help", 0)])
def test_a_bad_command_line_ends_with_status_2_and_help_with_0(monkeypatch, capsys, word, status):
    app.define_help_flags()
    monkeypatch.setattr(app, "run", lambda main, flags_parser: flags_parser(["x", word]))
    with pytest.raises(SystemExit) as end:
        launch.run_program(lambda argv: None)
    assert end.value.code == status
    out = capsys.readouterr()
    assert out.err == ("" if status == 0 else "error: unknown flag --nonsense_flag; --help lists the flags\n")


def test_its_value_is_the_exit_status():
    with pytest.raises(SystemExit) as end:
        launch.program(lambda: 3)(["x"])
    assert end.value.code == 3


@pytest.mark.robustness(
    "Runs",
    given="a run that does not fit into memory",
    outcome="one line, the first of what the backend says, and status 2",
)
@pytest.mark.parametrize(
    ("error", "said"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nBuffers:\n1"),
         "error: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\n"),
        (MemoryError(), "error: MemoryError\n"),
    ],
)  # fmt: skip
def test_what_does_not_fit_into_memory_is_one_line(error, said, capsys, monkeypatch):
    def job():
        raise error

    monkeypatch.delenv("TILTJAX_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        launch.program(job)(["x"])
    assert end.value.code == 2
    assert capsys.readouterr().err == said


def test_a_program_that_has_failed_ends_though_a_thread_waits():
    code = (
        "import threading\nfrom experiments.common import launch\nlaunch._PATIENCE = 0.2\n"
        "@launch.program\ndef main():\n"
        "    threading.Thread(target=threading.Event().wait).start()\n    raise ValueError('no')\n"
        "launch.run_program(main)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stderr) == (2, "error: no\n")


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError])
def test_bad_input_is_one_line_and_status_2(error, capsys, monkeypatch):
    def job():
        raise error("first\n  second")

    monkeypatch.delenv("TILTJAX_TRACEBACK", raising=False)
    with pytest.raises(SystemExit) as end:
        launch.program(job)(["x"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: first second\n"
    monkeypatch.setenv("TILTJAX_TRACEBACK", "1")
    with pytest.raises(error):
        launch.program(job)(["x"])


def test_another_error_is_a_bug_and_keeps_its_traceback():
    def job():
        raise RuntimeError("bug")

    with pytest.raises(RuntimeError):
        launch.program(job)(["x"])


def test_the_command_says_what_is_not_default():
    config = Config(steps=2, name="two words", output="elsewhere", resume=True)
    assert launch.command("x", config, free=("output",)) == "python -m experiments.x --steps=2 '--name=two words'"
    assert launch.command("x", Config()) == "python -m experiments.x"
