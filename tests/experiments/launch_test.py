"""What every experiment does around its job."""

import dataclasses

import pytest
from absl import app

from experiments import launch
from tiltjax.train.config import field, save_config


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
