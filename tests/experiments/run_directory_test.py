"""Who may write into the directory of a run, what is left there, and what is removed."""

import contextlib
import dataclasses
import json
import pathlib
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from experiments.common.run_directory import locked, open_run, overwrite_field
from tiltjax.data import candidates as batches
from tiltjax.train.config import field, output_field, save_config, write_text
from tiltjax.train.metrics import MetricsWriter


@dataclasses.dataclass(frozen=True)
class Config:
    steps: int = field(4, "Steps.")
    name: str = field("a", "Name.")
    output: str = output_field("runs/x")
    resume: bool = field(False, "Go on.")
    overwrite: bool = overwrite_field()


HOLDS = """
import fcntl, os, sys, time
file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(file, fcntl.LOCK_EX)
os.write(file, b"process 7 on host0")
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def config(tmp_path):
    return Config(output=str(tmp_path / "runs" / "x"))


def play(config, *, parts=None, fails=None, **options):
    """A run that writes what runs write, up to an error."""
    with open_run(config, **options) as held:
        held.begin(parts)
        candidates = held.directory / "candidates" / "train"
        candidates.mkdir(parents=True, exist_ok=True)
        np.savez(candidates / "00000.npz", completion=np.zeros(2))
        (held.directory / "metrics.jsonl").touch()
        if fails == "before a result":
            raise RuntimeError("the reward raises")
        np.savez(candidates / "00000.npz", completion=np.zeros(2), reward=np.ones(2))
        if fails:
            raise RuntimeError("later")
        (held.directory / "results.json").write_text(config.name)
    return held.directory


@pytest.mark.robustness(
    "Runs",
    given="a second program on the --output of one that is at work",
    outcome="refused before it reads anything, with the process and host that hold it",
)
@pytest.mark.robustness(
    "Runs",
    given="--output of a program that was killed with -9",
    outcome="free: the lock ends with the process that held it",
)
def test_a_directory_is_held_by_one_program_and_by_none_that_is_dead(config, tmp_path):
    (tmp_path / "runs" / "x").mkdir(parents=True)
    other = subprocess.Popen([sys.executable, "-c", HOLDS, f"{config.output}/.lock"], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"x: another program is at work here \(process 7 on host0\)") as error:
            play(config)
        assert "\n" not in str(error.value)
    finally:
        other.kill()
        other.communicate()
    play(config)
    assert not (tmp_path / "runs" / "x" / ".lock").exists()


@pytest.mark.robustness(
    "Runs", given="programs on one --output, started in the same moment", outcome="one of them runs, the others end"
)
def test_of_programs_that_start_together_one_runs(tmp_path):
    inside, most, refused, failed = [], [], [], []
    together = threading.Barrier(6, timeout=60)  # A thread that fails must not keep the others waiting.

    def program():
        for _ in range(20):
            together.wait()
            try:
                with locked(tmp_path / "new" / "x"):
                    inside.append(1)
                    most.append(len(inside))
                    time.sleep(0.001)
                    inside.pop()
            except ValueError:
                refused.append(1)
            except OSError as error:
                failed.append(error)

    threads = [threading.Thread(target=program) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert set(most) == {1}
    assert len(most) >= 20
    assert refused
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.robustness(
    "Runs",
    given="a first attempt that fails before it has a result (a bad policy, a reward that raises)",
    outcome="leaves nothing behind; the command can be corrected and given again",
)
def test_a_first_attempt_that_fails_leaves_nothing(config, tmp_path):
    with pytest.raises(RuntimeError), open_run(config):
        raise RuntimeError("no such policy")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError):
        play(config, fails="before a result")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "notes.txt").write_text("mine")
    with pytest.raises(RuntimeError):
        play(config, fails="before a result")
    assert [p.name for p in (tmp_path / "runs" / "x").iterdir()] == ["notes.txt"]
    play(dataclasses.replace(config, steps=5))


def test_what_fails_after_a_result_is_a_run(config):
    with pytest.raises(RuntimeError, match="later"):
        play(config, fails="later")
    with pytest.raises(ValueError, match="there is a run already; pass --resume to go on with it, --overwrite to"):
        play(config)
    play(dataclasses.replace(config, resume=True))


def test_killed_before_a_result_it_locks_nobody_out(config, tmp_path):
    """Nothing cleans up after -9: settings and candidates without a reward are there, and are no run."""
    directory = tmp_path / "runs" / "x"
    with contextlib.suppress(KeyboardInterrupt), open_run(config) as held:
        held.begin({"policy": "1"})
        (directory / "candidates").mkdir()
        np.savez(directory / "candidates" / "train.npz", completion=np.zeros(2))
        raise KeyboardInterrupt
    assert (directory / "config.json").exists()
    with open_run(dataclasses.replace(config, resume=True)) as held:
        held.begin({"policy": "1"})
        assert (directory / "candidates" / "train.npz").exists()  # With the same settings they are used.
    with open_run(dataclasses.replace(config, name="b")) as held:
        held.begin({"policy": "2"})
        assert not (directory / "candidates").exists()
    assert json.loads((directory / "config.json").read_text())["name"] == "b"


def test_a_run_goes_on_with_its_own_settings(config):
    directory = play(config)
    again = dataclasses.replace(config, resume=True)
    assert play(again) == directory
    other = dataclasses.replace(again, steps=5, name="b")
    with pytest.raises(ValueError, match=r"--resume with other settings: steps \(4 -> 5\), name \(a -> b\)"):
        play(other)
    assert play(other, free=("steps", "name")) == directory
    with pytest.raises(ValueError, match=r"a run with other settings: steps \(5 -> 4\), .* pass --overwrite"):
        play(config, resume=True)
    with pytest.raises(ValueError, match="there is a run already; pass --overwrite to remove it, or another"):
        play(config, resume=False)


@pytest.mark.robustness(
    "Runs",
    given="--resume with a reward whose code was edited, another policy under the same name, edited prompts",
    outcome="refused, and what has changed is named",
)
def test_a_run_goes_on_with_what_it_was_made_of(config):
    play(config, parts={"policy": "1", "reward": "2"})
    again = dataclasses.replace(config, resume=True)
    with pytest.raises(ValueError, match="made with another reward than it would be now"):
        play(again, parts={"policy": "1", "reward": "3"})
    play(again, parts={"policy": "1", "reward": "2"})


@pytest.mark.robustness(
    "Runs",
    given="--overwrite",
    outcome="the old run is removed once all input was read; files that no run writes stay",
)
def test_overwriting_removes_what_a_run_writes(config, tmp_path):
    directory = play(config, parts={"policy": "1"})
    (directory / "notes.txt").write_text("mine")
    (directory / "hf").mkdir()
    (directory / "frontier.png").touch()
    anew = dataclasses.replace(config, overwrite=True, name="b")
    with pytest.raises(RuntimeError), open_run(anew):
        raise RuntimeError("bad input")
    assert (directory / "results.json").read_text() == "a"
    with open_run(anew) as held:
        held.begin({"policy": "2"})
        assert sorted(p.name for p in directory.iterdir()) == [".lock", "config.json", "fingerprint.json", "notes.txt"]
    with pytest.raises(ValueError, match="resume and overwrite exclude each other"):
        play(dataclasses.replace(anew, resume=True))


@pytest.mark.robustness(
    "Runs",
    given="--overwrite of a directory that is not a run (a model, somebody's files)",
    outcome="refused; nothing is removed",
)
@pytest.mark.parametrize("held", ["model", "files", "damaged"])
def test_only_a_run_is_overwritten(config, tmp_path, held):
    directory = tmp_path / "runs" / "x"
    directory.mkdir(parents=True)
    name = "config.json" if held != "files" else "results.json"
    text = {"model": '{"architectures": ["LlamaForCausalLM"], "vocab_size": 9}', "damaged": '{"steps": 4, "na'}
    (directory / name).write_text(text.get(held, "mine"))
    before = (directory / name).read_bytes()
    with pytest.raises(ValueError, match=f"--overwrite removes a run of this program, and this is none .*{name}"):
        play(dataclasses.replace(config, overwrite=True))
    assert (directory / name).read_bytes() == before
    assert [p.name for p in directory.iterdir()] == [name]
    if held == "model":
        with pytest.raises(ValueError, match=r"config\.json: not a configuration of this experiment"):
            play(config)


def test_an_older_run_without_the_newer_settings_is_one(config, tmp_path):
    directory = play(config)
    values = json.loads((directory / "config.json").read_text())
    del values["overwrite"]
    (directory / "config.json").write_text(json.dumps(values))
    play(dataclasses.replace(config, resume=True))
    save_config(config, directory / "config.json")
    play(dataclasses.replace(config, overwrite=True))


def test_a_file_system_without_locks_is_said(config, monkeypatch, caplog):
    def fail(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", fail)
    play(config)
    assert "this file system has no locks" in caplog.text


@pytest.mark.robustness(
    "Runs", given="a disk that is full", outcome="one line with the file that could not be written, and status 2"
)
@pytest.mark.parametrize("what", ["text", "candidates", "metrics"])
def test_what_does_not_fit_on_the_disk_is_named(tmp_path, monkeypatch, what):
    full = OSError(28, "No space left on device")

    def fail(*_, **__):
        raise full

    if what == "text":
        monkeypatch.setattr("pathlib.Path.write_text", fail)
        path, write = tmp_path / "a.json", lambda: write_text(tmp_path / "a.json", "x")
    elif what == "candidates":
        monkeypatch.setattr("os.fsync", fail)
        drawn = batches.from_tokens([[5]], [[[3]]], pad_id=0)
        path, write = tmp_path / "a.npz", lambda: batches.save(tmp_path / "a.npz", drawn)
    else:
        writer = MetricsWriter(tmp_path)
        writer._file.close()
        writer._file = pathlib.Path("/dev/full").open("w")  # noqa: SIM115
        path = "/dev/full"

        def write():
            with writer:
                writer.write(0, {"loss": 1.0})

    with pytest.raises(OSError, match="No space left on device") as error:
        write()
    assert str(error.value.filename) == str(path)
    assert [p.name for p in tmp_path.iterdir() if what != "metrics"] == []
