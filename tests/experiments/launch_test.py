"""What every experiment does around its job."""

import dataclasses
import logging
import re

import jax
import pytest
from absl import app, flags
from absl import logging as absl_logging

from experiments import launch
from tiltjax.train.config import define_flags, field, save_config

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
    for name in ("tiltjax.train.rollout", "experiments.align_fit", "absl", "jax._src.dispatch", "orbax.checkpoint"):
        logging.getLogger(name).info("of %s", name)
    assert [record.name for record in caplog.records] == ["tiltjax.train.rollout", "experiments.align_fit"]


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
