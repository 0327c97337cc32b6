"""What every experiment does around its job."""

import dataclasses
import logging

import jax
import pytest
from absl import app, flags
from absl import logging as absl_logging

from experiments import launch
from tiltjax.train.config import field, save_config

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
    with pytest.raises(app.UsageError, match="unexpected arguments: --a b"):
        launch.program(lambda: None)(["x", "--a", "b"])


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
    for name in ("tiltjax.train.rollout", "experiments.align_fit", "absl", "jax._src.dispatch", "orbax.checkpoint"):
        logging.getLogger(name).info("of %s", name)
    assert [record.name for record in caplog.records] == ["tiltjax.train.rollout", "experiments.align_fit"]


def test_its_value_is_the_exit_status():
    with pytest.raises(SystemExit) as end:
        launch.program(lambda: 3)(["x"])
    assert end.value.code == 3


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


def test_a_directory_takes_one_run(tmp_path):
    config = Config(output=str(tmp_path))
    assert launch.check_run(config, free=("resume",)) == tmp_path
    save_config(config, tmp_path / "config.json")
    with pytest.raises(ValueError, match="there is a run already; pass --resume"):
        launch.check_run(config, free=("resume",))
    again = dataclasses.replace(config, resume=True)
    assert launch.check_run(again, free=("resume",)) == tmp_path
    other = dataclasses.replace(again, steps=5, name="b")
    with pytest.raises(ValueError, match=r"other settings: steps \(4 -> 5\), name \(a -> b\)"):
        launch.check_run(other, free=("resume",))
    assert launch.check_run(other, free=("resume", "steps", "name")) == tmp_path


def test_the_command_says_what_is_not_default():
    config = Config(steps=2, name="two words", output="elsewhere", resume=True)
    assert launch.command("x", config, free=("output",)) == "python -m experiments.x --steps=2 '--name=two words'"
    assert launch.command("x", Config()) == "python -m experiments.x"
