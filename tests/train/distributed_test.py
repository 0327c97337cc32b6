"""Two real processes of four devices each, one of them killed on the way, against one process of eight devices."""

import itertools
import json
import os
import pathlib
import queue
import re
import shutil
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

from experiments.align import __main__ as align
from experiments.align.config import AlignConfig
from tests.tiny import save_policy
from tests.train.hosts_main import adapted, improved, rewarded, shared_programs
from tests.train.worlds import CONFIG
from tiltjax.data.pipeline import epoch_batches, host_batches
from tiltjax.models.transformer import Transformer
from tiltjax.train import checkpoint, distributed
from tiltjax.train.distributed import Hosts, fetch, gather_rows, global_batch, host_rows, initialize, share
from tiltjax.train.sharding import AXES, batch_sharding, make_mesh, shardings
from tiltjax.train.state import init_state

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 8
# More prompts than slots on every device, and no device with as many as another.
SETTINGS = {"reward": "length?target=3", "beta": 0.2, "num_candidates": 2, "num_prompts": 18, "num_eval_prompts": 18,
            "max_tokens": 4, "steps": STEPS, "checkpoint_every": 2, "batch_size": 8, "sample_batch": 8,
            "learning_rate": 0.01, "lora_rank": 0, "compute_dtype": "float32", "mesh": "data:4,fsdp:2"}  # fmt: skip
SILENCE, GRACE = 30, 10
"""Seconds after which a host is taken for dead, and those that the others then have to come down."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A tiny policy, a file of prompts, and what a run of them needs to be told."""
    home = tmp_path_factory.mktemp("hosts")
    words = ["<eos>", "<pad>", *(f"w{i}" for i in range(CONFIG.vocab_size - 2))]
    save_policy(home / "policy", words, CONFIG)
    rows = [
        {"prompt": " ".join(words[2 + i % 27 : 5 + i % 27 - i % 4 % 3][:: -1 if i >= 27 else 1])} for i in range(36)
    ]
    rows[5]["prompt"] = " ".join(words[2:12] * 4)  # The steps that it is no part of are shorter, on both hosts.
    rows[35]["prompt"] = " ".join(words[12:22] * 4)  # So that both splits are drawn by one program.
    (home / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"policy": f"{home}/policy", "prompts": f"{home}/prompts.jsonl"} | SETTINGS


@pytest.fixture(scope="module")
def alone(settings, tmp_path_factory):
    """The directory of a run of this process, on its eight devices."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    config = AlignConfig(output=str(directory), **settings)
    with shared_programs():
        align.run(config)
        improved(config)
        rewarded(config)
        adapted(config)
    return directory


def start_hosts(flags, directory, module="experiments.align", silence=SILENCE):
    """Two processes of one run, and where they write what they say."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=4"),
        "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    shared = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--heartbeat_timeout={silence}"]
    command = [sys.executable, "-m", module, *flags, *shared]
    logs = [directory.parent / f"{directory.name}.{i}.{time.monotonic_ns()}" for i in (0, 1)]
    processes = []
    for i, log in enumerate(logs):
        with log.open("w") as file:
            processes.append(
                subprocess.Popen([*command, f"--process_id={i}"], cwd=ROOT, env=environment, stdout=file, stderr=file)
            )
    return processes, logs


def flags_of(settings, directory):
    """Of a run that goes on with what lies there."""
    return [f"--output={directory}", "--resume", *(f"--{name}={value}" for name, value in settings.items())]


@pytest.fixture(scope="module")
def killed(settings, tmp_path_factory):
    """A run whose second process is killed while it fits: how the first one ended, and what it said and left."""
    directory = tmp_path_factory.mktemp("killed") / "run"
    processes, logs = start_hosts(flags_of(settings, directory), directory)
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
def resumed(settings, alone, killed):
    """The same run, gone on by two new processes, which then take over the record that one has begun."""
    directory = killed["directory"]
    ours, theirs = (path.with_name(f"{path.name}-record") for path in (alone, directory))
    shutil.copytree(ours / "checkpoints" / "2", theirs / "checkpoints" / "2")
    flags = flags_of(settings, directory)
    processes, logs = start_hosts(flags, directory, module="tests.train.hosts_main")
    try:
        statuses = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert statuses == [0, 0], [log.read_text() for log in logs]
    return {"directory": directory, "logs": [log.read_text() for log in logs]}


def test_a_killed_host_ends_the_other_in_time_and_with_a_message(killed):
    assert killed["status"] == distributed.LOST, killed["log"]
    assert killed["seconds"] < SILENCE + GRACE
    line = killed["log"].splitlines()[-1]
    assert line.startswith("error: process 0 of 2 cannot communicate, another probably died (")
    assert line.endswith("restart all of them with --resume to go on from the last checkpoint")
    assert 2 <= killed["left"] < STEPS
    assert not (killed["directory"] / "results.json").exists()


def same_policies(alone, resumed, suffix=""):
    """One process and two have ended in the same parameters; returns how far each has moved."""
    ends = [path.with_name(path.name + suffix) / "hf" for path in (alone, resumed["directory"])]
    ours, theirs = (load_file(path / "model.safetensors") for path in ends)
    chex.assert_trees_all_close(theirs, ours, atol=1e-5, rtol=0)
    start = load_file(pathlib.Path(json.loads((alone / "config.json").read_text())["policy"]) / "model.safetensors")
    return [np.abs(theirs[name] - start[name]).max() for name in start]


def test_two_processes_end_where_one_does(alone, resumed):
    assert min(same_policies(alone, resumed)) > 1e-3
    for name in ("metrics.jsonl", "results.json"):
        ours, theirs = (numbers((path / name).read_text()) for path in (alone, resumed["directory"]))
        np.testing.assert_allclose(theirs, ours, atol=1e-4, rtol=1e-4, err_msg=name)
    steps = [json.loads(line)["step"] for line in (resumed["directory"] / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(STEPS))
    for name in ("train", "heldout"):
        ours, theirs = (np.load(path / "candidates" / f"{name}.npz") for path in (alone, resumed["directory"]))
        for column in ("prompt", "completion", "completion_mask", "reward"):
            np.testing.assert_array_equal(theirs[column], ours[column])


def test_two_processes_go_on_with_a_record_of_one_as_that_one_does(alone, resumed):
    """Players on a mesh over both, prompts split between them, rewards of each host's own rows."""
    ours, theirs = (path.with_name(f"{path.name}-record") for path in (alone, resumed["directory"]))
    assert min(same_policies(alone, resumed, "-record")) > 1e-4
    logged = [(path / "metrics.jsonl").read_text().splitlines() for path in (ours, theirs)]
    np.testing.assert_allclose(*(numbers("\n".join(some[-2:])) for some in logged), atol=1e-4, rtol=1e-4)
    lines, gone_on = ([json.loads(line) for line in some] for some in logged)
    assert [line["step"] for line in gone_on] == [2, 3]
    # The second of a round's two mini-batches was drawn before the first was learned; the first step has a rate of 0.
    assert [(line["step"], line["off_policy"] > 0) for line in lines] == [(0, False), (1, True), (2, True), (3, True)]
    assert abs(lines[0]["kl_k1"]) < 1e-6
    assert checkpoint.latest(theirs / "checkpoints") == 4


def test_a_reward_model_of_two_processes_is_that_of_one(alone, resumed):
    ours, theirs = (path.with_name(f"{path.name}-rewards") for path in (alone, resumed["directory"]))
    for name in ("global/model/model", "global/model/reward_head"):
        weights = [load_file(path / f"{name}.safetensors") for path in (theirs, ours)]
        chex.assert_trees_all_close(*weights, atol=1e-5, rtol=0)
    assert np.abs(load_file(theirs / "global" / "model" / "reward_head.safetensors")["kernel"]).max() > 1e-3
    for name in ("global/metrics.jsonl", "results.json"):
        np.testing.assert_allclose(
            *(numbers((path / name).read_text()) for path in (theirs, ours)), atol=1e-4, rtol=1e-4, err_msg=name
        )
    rewards = [json.loads((path / "global" / "model" / "reward.json").read_text()) for path in (theirs, ours)]
    assert rewards[0]["offset"] == pytest.approx(rewards[1]["offset"], abs=1e-5)


def test_two_processes_fit_adapters_by_pmap_as_one_does(alone, resumed):
    assert max(same_policies(alone, resumed, "-adapted")) > 1e-3


def test_two_processes_draw_the_candidates_of_few_prompts_as_those_of_many(alone, resumed):
    directory = resumed["directory"]
    one = directory.with_name(f"{directory.name}-one")
    ours, theirs = (np.load(path / "candidates" / "heldout.npz") for path in (alone, one))
    assert len(theirs["prompt"]) == 6
    np.testing.assert_array_equal(theirs["prompt"], ours["prompt"][:6, : theirs["prompt"].shape[1]])
    for column in ("completion", "completion_mask", "reward"):
        np.testing.assert_array_equal(theirs[column], ours[column][:6])
    assert len(list((one / "candidates" / "heldout").iterdir())) == 2  # Four prompts a call, on eight devices.


def test_the_exchange_between_hosts_is_compiled_once(resumed):
    for log in resumed["logs"]:
        counts = [line for line in log.splitlines() if line.startswith("exchange: ")]
        assert counts[1:] == ["exchange: 0 compiled"] * 2


def test_what_one_host_cannot_write_ends_all_of_them_at_the_next_checkpoint(resumed):
    """The line of step 2 is missed by the second checkpoint, though later lines could be written; then a name."""
    for log, error in zip(resumed["logs"], ["disk full", "host 0 of 2 failed; its own message says why"], strict=True):
        said = [line for line in log.splitlines() if " failed: " in line]
        assert said == [
            f"write failed: {error}; 4 steps, the last checkpoint is 2",
            f"_checksum failed: {error}; 4 steps, the last checkpoint is None",
        ]


def test_two_processes_map_by_pmap_and_keep_on_their_devices_what_lies_there(resumed):
    for log in resumed["logs"]:
        assert f"pmap: [{2 + 2 * np.arange(16).mean()}] in the same places" in log.splitlines()


def test_two_processes_work_through_one_queue(resumed):
    """On a mesh without tensor each device draws from its own share; `test_two_processes_end_where_one_does` compares.

    Three prompts on two groups of one slot: candidates and prompts wait for their turn.
    """
    for log in resumed["logs"]:
        assert "queue: 3 prompts, 2 candidates each, on 2 groups of 1" in log


@pytest.fixture(scope="module")
def gone(tmp_path_factory):
    """Hosts that lose another, in pairs that run at once: how the one that is left ended, when, and what it said."""
    home, silence = tmp_path_factory.mktemp("gone"), 8
    cases = {"coordinator killed": (0, signal.SIGKILL), "coordinator silent": (0, signal.SIGSTOP),
             "other silent": (1, signal.SIGSTOP), "coordinator killed, other alone": (0, signal.SIGKILL),
             "other killed, coordinator alone": (1, signal.SIGKILL)}  # fmt: skip
    pairs = {}
    for name in cases:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HOSTS_ALONE", "1" if "alone" in name else "")
            pairs[name] = start_hosts([], home / name.replace(" ", "-"), "tests.train.hosts_talk", silence=silence)
    ends = {}
    try:
        deadline = time.monotonic() + 200
        while not all("talking" in log.read_text() for _, logs in pairs.values() for log in logs):
            assert time.monotonic() < deadline, [log.read_text() for _, logs in pairs.values() for log in logs]
            time.sleep(0.05)
        began = time.monotonic()
        for name, (victim, how) in cases.items():
            pairs[name][0][victim].send_signal(how)
        while len(ends) < len(cases) and time.monotonic() < began + silence + 3 * GRACE:
            for name, (victim, _) in cases.items():
                status = pairs[name][0][1 - victim].poll()
                if status is not None:
                    ends.setdefault(name, {"status": status, "seconds": time.monotonic() - began - silence})
            time.sleep(0.05)
    finally:
        for processes, _ in pairs.values():
            for process in processes:
                process.kill()
                process.wait()
    return {name: end | {"log": pairs[name][1][1 - cases[name][0]].read_text()} for name, end in ends.items()}


@pytest.mark.robustness(
    "Runs",
    given="one of several hosts killed, while the others talk to it, sample or compile",
    outcome="the others end at once with one line that says which was lost, status 3; --resume goes on",
)
@pytest.mark.parametrize(
    "name", ["coordinator killed", "coordinator killed, other alone", "other killed, coordinator alone"]
)
def test_who_is_killed_is_missed_at_once(gone, name):
    end = gone[name]
    assert end["seconds"] < GRACE - 8  # Counted from the end of the silence that JAX waits for.
    assert end["status"] == distributed.LOST, end["log"]
    assert end["log"].splitlines()[-1].startswith("error: process ")
    assert "cannot communicate, another probably died (" in end["log"].splitlines()[-1]
    assert "Fatal Python error" not in end["log"]


@pytest.mark.parametrize("name", ["coordinator silent", "other silent"])
def test_whoever_is_silent_the_other_ends_in_time_and_says_so(gone, name):
    """Whether Gloo or the coordinator of JAX is first to notice, and so whose message and status it is, may differ."""
    end = gone[name]
    assert end["seconds"] < GRACE
    messages = {distributed.LOST: "cannot communicate, another probably died",
                -signal.SIGABRT: "the JAX distributed service detected fatal errors"}  # fmt: skip
    assert end["status"] in messages, end["log"]
    assert messages[end["status"]] in end["log"]


def test_both_processes_pad_a_step_to_the_same_lengths(resumed):
    lines = [next(line for line in log.splitlines() if "] fit: " in line).partition("] ")[2] for log in resumed["logs"]]
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"fit: {STEPS} steps of 2 shapes (compilations) [(8, 4), (40, 4)], ")


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
    here = distributed.localize(batch)["x"]
    assert [part.data.shape for part in here.addressable_shards] == [(8, 3)] * 8
    np.testing.assert_array_equal(here, rows)


def test_a_host_builds_its_own_rows_of_a_batch_only():
    """The shares of two hosts are the batch of one, and of the data each touches only those."""
    rows, touched = np.arange(60.0).reshape(20, 3), []

    class Watched:
        def __getitem__(self, which):
            touched.extend(which.tolist())
            return rows[which]

    order, watched = epoch_batches(20, 8, seed=1), Watched()
    whole = [rows[order(step)] for step in range(5)]
    parts = []
    for mine in (np.arange(4), np.arange(4, 8)):
        touched.clear()
        share = host_batches(lambda which: watched[which], order, num_steps=5, rows=mine)
        parts.append([share[step] for step in range(5)])
        assert touched == np.concatenate([order(step)[mine] for step in range(5)]).tolist()
    for step in range(5):
        np.testing.assert_array_equal(np.concatenate([part[step] for part in parts]), whole[step])


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
    ],
)
def test_half_a_configuration_is_refused_in_one_line(monkeypatch, hosts, message):
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    with pytest.raises(ValueError, match=message) as error:
        initialize(hosts)
    assert "\n" not in str(error.value)
    assert not jax.distributed.is_initialized()


@pytest.mark.robustness(
    "Runs",
    given="a coordinator that cannot be reached, or processes that do not come, at the start of a run on several hosts",
    outcome="one line after --start_timeout seconds, and status 2",
)
def test_who_does_not_come_in_time_is_one_line(monkeypatch, capfd):
    ends = queue.Queue()
    monkeypatch.setattr(os, "_exit", ends.put)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: ends.get(timeout=30))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    initialize(Hosts(coordinator="host0:1", num_processes=2, process_id=1, start_timeout=1))
    assert capfd.readouterr().err == "error: not all processes met at host0:1 within 1 s\n"


def test_nothing_configured_is_one_process(monkeypatch):
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    initialize()
    initialize(Hosts(coordinator="off", num_processes=2))
    monkeypatch.setenv("SLURM_NTASKS", "1")
    initialize()
    assert not jax.distributed.is_initialized()


@pytest.mark.robustness("Flags", given="--coordinator without host or port", outcome="one line that shows host:port")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heartbeat_timeout": 0}, "heartbeat_timeout must be at least 1, got 0"),
        ({"process_id": 2, "num_processes": 2}, "process_id must be below num_processes=2, got 2"),
        *[({"coordinator": bad}, f"coordinator must be host:port, such as host0:8476, got '{bad}'")
          for bad in ("host0", "host0:", ":8476", "host0:port", "host0:0", "host0:70000", " ")],
    ],
)  # fmt: skip
def test_bad_flags_of_hosts_are_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Hosts(**settings)


def test_an_address_of_the_environment_is_checked_too(monkeypatch):
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host0")
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS must be host:port"):
        initialize()


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


def test_what_process_0_does_alone(monkeypatch):
    assert distributed.by_main(lambda: 5) == 5
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert distributed.by_main(lambda: 1 / 0) is None
