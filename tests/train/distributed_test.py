"""Two real processes of four devices each, one of them killed on the way, against one process of eight devices."""

import itertools
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from safetensors.numpy import load_file

from experiments import align
from experiments.align_config import AlignConfig
from tests.tiny import save_policy
from tests.train.hosts_main import improved
from tests.train.worlds import CONFIG
from tiltjax.models.transformer import Transformer
from tiltjax.train import checkpoint, distributed
from tiltjax.train.distributed import Hosts, fetch, gather_rows, global_batch, host_rows, initialize, share
from tiltjax.train.sharding import AXES, batch_sharding, make_mesh, shardings
from tiltjax.train.state import init_state

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 8
SETTINGS = {"reward": "length?target=3", "beta": 0.2, "num_candidates": 2, "num_prompts": 9, "num_eval_prompts": 3,
            "max_tokens": 4, "steps": STEPS, "checkpoint_every": 2, "batch_size": 8, "sample_batch": 8,
            "learning_rate": 0.01, "lora_rank": 0, "compute_dtype": "float32",
            "mesh": "data:2,fsdp:2,tensor:2"}  # fmt: skip


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A tiny policy, a file of prompts, and what a run of them needs to be told."""
    home = tmp_path_factory.mktemp("hosts")
    words = ["<eos>", "<pad>", *(f"w{i}" for i in range(CONFIG.vocab_size - 2))]
    save_policy(home / "policy", words, CONFIG)
    rows = [{"prompt": " ".join(words[2 + i : 5 + i - i % 3])} for i in range(12)]
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"policy": f"{home}/policy", "prompts": f"{home}/prompts.jsonl"} | SETTINGS


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """The directory of a run of this process, on its eight devices."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    config = AlignConfig(output=str(directory), **settings)
    align.run(config)
    improved(config)
    return directory


def start_hosts(settings, directory, module="experiments.align"):
    """Two processes of one run."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
        "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    arguments = [f"--{name}={value}" for name, value in settings.items()]
    shared = [f"--coordinator=localhost:{port}", "--num_processes=2", "--heartbeat_timeout=30"]
    command = [sys.executable, "-m", module, f"--output={directory}", "--resume", *arguments, *shared]
    logs = [directory.parent / f"{directory.name}.{i}.{time.monotonic_ns()}" for i in (0, 1)]
    processes = []
    for i, log in enumerate(logs):
        with log.open("w") as file:
            processes.append(
                subprocess.Popen([*command, f"--process_id={i}"], cwd=ROOT, env=environment, stdout=file, stderr=file)
            )
    return processes, logs


@pytest.fixture(scope="module")
def killed(settings, tmp_path_factory):
    """A run whose second process is killed while it fits: how the first one ended, and what it said and left."""
    directory = tmp_path_factory.mktemp("killed") / "run"
    processes, logs = start_hosts(settings, directory)
    sight, deadline = directory / "checkpoints" / "2", time.monotonic() + 300
    while not sight.exists() and time.monotonic() < deadline and all(p.poll() is None for p in processes):
        time.sleep(0.001)
    processes[1].kill()
    began = time.monotonic()
    try:
        status = processes[0].wait(timeout=300)
    finally:
        processes[0].kill()
        processes[1].wait()
    assert sight.exists(), logs[0].read_text()
    assert processes[1].returncode == -signal.SIGKILL
    left = checkpoint.latest(directory / "checkpoints")
    return {"directory": directory, "status": status, "log": logs[0].read_text(), "left": left,
            "seconds": time.monotonic() - began}  # fmt: skip


@pytest.fixture(scope="module")
def resumed(settings, killed):
    """The same run, gone on by two new processes, which then improve the policy by a record."""
    processes, logs = start_hosts(settings, killed["directory"], module="tests.train.hosts_main")
    try:
        statuses = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert statuses == [0, 0], [log.read_text() for log in logs]
    return {"directory": killed["directory"], "logs": [log.read_text() for log in logs]}


def test_a_killed_host_ends_the_other_in_time_and_with_a_message(killed):
    assert killed["status"] == distributed.LOST, killed["log"]
    assert killed["seconds"] < 60
    line = killed["log"].splitlines()[-1]
    assert line.startswith("error: process 0 of 2 cannot go on, another was probably lost (")
    assert line.endswith("start all of them again with --resume to go on from the last checkpoint")
    assert 2 <= killed["left"] < STEPS
    assert not (killed["directory"] / "results.json").exists()


def test_two_processes_end_where_one_does(alone, resumed):
    ours, theirs = (load_file(path / "hf" / "model.safetensors") for path in (alone, resumed["directory"]))
    chex.assert_trees_all_close(theirs, ours, atol=1e-5, rtol=0)
    start = load_file(pathlib.Path(json.loads((alone / "config.json").read_text())["policy"]) / "model.safetensors")
    assert min(np.abs(ours[name] - start[name]).max() for name in ours) > 1e-3
    for name in ("metrics.jsonl", "results.json"):
        ours, theirs = (numbers((path / name).read_text()) for path in (alone, resumed["directory"]))
        np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=1e-4, err_msg=name)
    steps = [json.loads(line)["step"] for line in (resumed["directory"] / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(STEPS))
    for name in ("train", "heldout"):
        ours, theirs = (np.load(path / "candidates" / f"{name}.npz") for path in (alone, resumed["directory"]))
        for column in ("prompt", "completion", "completion_mask", "reward"):
            np.testing.assert_array_equal(theirs[column], ours[column])


def test_a_record_improves_the_policy_of_two_processes_as_that_of_one(alone, resumed):
    """Players on a mesh over both, prompts split between them, rewards of each host's own rows."""
    ours, theirs = (path.with_name(f"{path.name}-record") for path in (alone, resumed["directory"]))
    weights = [load_file(path / "hf" / "model.safetensors") for path in (ours, theirs)]
    chex.assert_trees_all_close(*weights, atol=1e-5, rtol=0)
    start = load_file(pathlib.Path(json.loads((alone / "config.json").read_text())["policy"]) / "model.safetensors")
    assert min(np.abs(weights[1][name] - start[name]).max() for name in start) > 1e-4
    logged = [(path / "metrics.jsonl").read_text() for path in (ours, theirs)]
    np.testing.assert_allclose(*map(numbers, logged), atol=1e-4, rtol=1e-4)
    lines = [json.loads(line) for line in logged[1].splitlines()]
    assert [(line["step"], line["off_policy"]) for line in lines] == [(0, 0), (1, 0)]
    assert abs(lines[0]["kl_k1"]) < 1e-6
    assert checkpoint.latest(theirs / "checkpoints") == 2


def test_only_the_first_process_reports(resumed):
    first, second = resumed["logs"]
    assert "| tilted_mle |" in first
    assert "fit: 100%" in first
    assert not [line for line in second.splitlines() if "|" in line or "report" in line]
    assert (
        len(list((resumed["directory"] / "tensorboard").iterdir())) <= 2
    )  # One of the killed run, one of the resumed.


def test_a_checkpoint_of_two_processes_restores_on_one_whatever_its_mesh(alone, resumed):
    folders = [path / "checkpoints" for path in (alone, resumed["directory"])]
    assert [checkpoint.latest(folder) for folder in folders] == [STEPS, STEPS]
    one = Mesh(np.array(jax.devices()[:1]).reshape(1, 1, 1), AXES)
    expected = restored(folders[0], one)
    for mesh in (one, make_mesh("data:8"), make_mesh("fsdp:4,tensor:2")):
        state = restored(folders[1], mesh)
        assert len(state.params.embedding[...].sharding.device_set) == mesh.size
        chex.assert_trees_all_close(fetch(state), fetch(expected), atol=1e-5, rtol=0)


def restored(folder, mesh):
    """The last state in a folder, on the devices of a mesh in this process."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda step: 0.01))
    shapes = jax.eval_shape(lambda: init_state(Transformer(jax.random.key(0), CONFIG), tx))
    like = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes,
                        shardings(shapes, mesh))  # fmt: skip
    return checkpoint.restore(folder, STEPS, like)


def numbers(text):
    """Every number of a JSON text, or of its lines."""
    values = []
    decoder = json.JSONDecoder(parse_float=lambda x: values.append(float(x)), parse_int=lambda x: values.append(int(x)))
    for line in [text] if text.startswith("{\n") else text.splitlines():
        decoder.decode(line.strip())
    return np.array(values)


def test_one_process_has_every_row():
    place = batch_sharding(make_mesh("data:4,tensor:2"))
    rows = np.arange(24.0, dtype=np.float32).reshape(8, 3)
    np.testing.assert_array_equal(host_rows(place, 8), np.arange(8))
    batch = global_batch({"x": rows}, place, 8)
    assert batch["x"].sharding == place
    np.testing.assert_array_equal(fetch(batch)["x"], rows)
    np.testing.assert_array_equal(gather_rows(rows[share(8)], 8), rows)
    distributed.barrier("alone")
    assert distributed.is_main()
    assert (distributed.agree(True), distributed.agree(5)) == (1, 5)
    assert distributed.replicate(batch) is batch
    assert distributed.localize(batch) is batch


def test_shares_cover_all_rows_in_order(monkeypatch):
    for processes, rows in itertools.product((1, 2, 3, 8), (1, 3, 8, 11)):
        monkeypatch.setattr(jax, "process_count", lambda: processes)  # noqa: B023
        taken = []
        for index in range(processes):
            monkeypatch.setattr(jax, "process_index", lambda: index)  # noqa: B023
            taken.append(np.arange(rows)[share(rows)])
        np.testing.assert_array_equal(np.concatenate(taken), np.arange(rows))
        assert max(map(len, taken)) == -(-rows // processes)


@pytest.mark.parametrize(
    ("hosts", "message"),
    [
        (Hosts(coordinator="host0:1"), "coordinator=host0:1, but --num_processes, --process_id must be given too"),
        (Hosts(num_processes=2, process_id=0), "num_processes=2, process_id=0, but --coordinator must be given too"),
        (Hosts(coordinator="h:1", num_processes=2, process_id=2), "process_id=2, but .* process_id < num_processes"),
    ],
)
def test_half_a_configuration_is_refused_in_one_line(monkeypatch, hosts, message):
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(ValueError, match=message) as error:
        initialize(hosts)
    assert "\n" not in str(error.value)
    assert not jax.distributed.is_initialized()


def test_nothing_configured_is_one_process(monkeypatch):
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    initialize()
    initialize(Hosts(coordinator="off", num_processes=2))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    initialize()
    assert not jax.distributed.is_initialized()
    with pytest.raises(ValueError, match="heartbeat_timeout must be at least 1, got 0"):
        Hosts(heartbeat_timeout=0)


def test_too_late_is_an_error_only_where_several_hosts_were_asked_for():
    initialize()
    with pytest.raises(RuntimeError, match="must be called before"):
        initialize(Hosts(coordinator="localhost:1", num_processes=1, process_id=0))


def test_failure_of_one_is_failure_of_all(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    told = []
    monkeypatch.setattr(
        distributed.multihost_utils, "process_allgather", lambda x: told.append(int(x)) or np.array([0, 1, 0])
    )
    with pytest.raises(ValueError, match="host 1 of 3 failed; its own message says why"):
        distributed.together(lambda: 1.0)
    with pytest.raises(ZeroDivisionError):
        distributed.together(lambda: 1 / 0)
    assert told == [0, 1]
