import json
import logging
import shutil
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.train.worlds import tiny_model
from tiltjax.models import lora
from tiltjax.train import checkpoint
from tiltjax.train.sharding import make_mesh, shard
from tiltjax.train.state import init_state

TX = optax.adamw(1e-3)


def state_at(step):
    state = init_state(tiny_model(step), TX)
    return state.replace(step=jnp.int32(step))


def test_round_trip_is_bit_exact(tmp_path):
    checkpoint.save(tmp_path, 3, state_at(3))
    assert checkpoint.latest(tmp_path) == 3
    chex.assert_trees_all_equal(checkpoint.restore(tmp_path, 3, state_at(0)), state_at(3))


def test_adapters_alone(tmp_path):
    trained, _ = lora.partition(lora.add(jax.random.key(0), tiny_model(), rank=2), lora.is_adapter)
    checkpoint.save(tmp_path, 1, init_state(trained, TX))
    chex.assert_trees_all_equal(checkpoint.restore(tmp_path, 1, init_state(trained, TX)).params, trained)


def test_restores_on_another_mesh(tmp_path):
    checkpoint.save(tmp_path, 1, shard(state_at(1), make_mesh("data:2,fsdp:2,tensor:2")))
    like = shard(state_at(0), make_mesh("data:1,fsdp:8"))
    restored = checkpoint.restore(tmp_path, 1, like)
    chex.assert_trees_all_equal(jax.device_get(restored), jax.device_get(state_at(1)))
    kernel = restored.params.blocks.up.kernel[...]
    assert kernel.sharding == like.params.blocks.up.kernel[...].sharding
    assert kernel.addressable_shards[0].data.shape == (1, 2, 32)


def test_restores_what_orbax_wrote_by_its_standard_handler(tmp_path):
    """As checkpoints of earlier versions were."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "1" / "state", {"['a']": jnp.arange(3.0), "['b']": jnp.ones(2, jnp.bfloat16)})
    restored = checkpoint.restore(tmp_path, 1, {"a": jnp.zeros(3), "b": jnp.zeros(2, jnp.bfloat16)})
    chex.assert_trees_all_equal(restored, {"a": jnp.arange(3.0), "b": jnp.ones(2, jnp.bfloat16)})


def test_replicas_share_the_writing_of_large_arrays_only(tmp_path, compilations):
    """Every share of another shape is a program to compile; of small arrays there may be many."""
    place = NamedSharding(make_mesh("data:8"), PartitionSpec())
    small = {str(n): jax.device_put(np.full(n, 1.5, np.float32), place) for n in range(8, 128, 8)}
    large = {"large": jax.device_put(np.arange(8 * 2**18, dtype=np.float32), place)}
    compiled = []
    for step, tree in enumerate((small, large)):
        before = compilations()
        with checkpoint.Saver(tmp_path) as saver:
            saver.save(step, tree)
        compiled.append(compilations() - before)
        chex.assert_trees_all_equal(checkpoint.restore(tmp_path, step, tree), tree)
    copy_and_check = 2
    assert compiled == [copy_and_check, copy_and_check + place.mesh.size]


def test_only_the_newest_stay(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"w": jnp.ones(2) * step}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["2", "3"]


@pytest.mark.parametrize("harm", ["truncate", "remove", "flip", "manifest"])
def test_damaged_checkpoint_gives_way_to_the_last_whole_one(tmp_path, caplog, harm):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state_at(step))
    files = [p for p in (tmp_path / "2" / "state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    if harm == "truncate":
        largest.write_bytes(data[: len(data) // 2])
    elif harm == "remove":
        largest.unlink()
    elif harm == "flip":
        data[len(data) // 2] ^= 1
        largest.write_bytes(data)
    else:
        (tmp_path / "2" / "manifest.json").write_text('{"step": 2, "fi')
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == 1
    assert "checkpoint is not whole" in caplog.text
    chex.assert_trees_all_equal(checkpoint.restore(tmp_path, 1, state_at(0)), state_at(1))


@pytest.mark.robustness(
    "Runs",
    given="a checkpoint of another run in the directory of a run",
    outcome="refused with its folder; nothing of it is restored",
)
def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    checkpoint.save(tmp_path / "mine", 1, {"w": jnp.ones(2)}, fingerprint="a")
    assert checkpoint.latest(tmp_path / "mine", fingerprint="a") == 1
    checkpoint.save(tmp_path / "other", 2, {"w": jnp.zeros(2)}, fingerprint="b")
    checkpoint.save(tmp_path / "old", 3, {"w": jnp.zeros(2)})
    for other, made_by in (("other", "b"), ("old", "missing")):
        shutil.copytree(tmp_path / other, tmp_path / "mine", dirs_exist_ok=True)
        with pytest.raises(ValueError, match=rf"mine/\d: checkpoint of another run, .* fingerprint is {made_by}"):
            checkpoint.latest(tmp_path / "mine", fingerprint="a")


@pytest.mark.robustness(
    "Runs",
    given="a directory that loses its write permission, or a disk that is full, while a checkpoint is written",
    outcome="one line with the folder, exit status 2, and no thread that keeps the process; earlier checkpoints stay",
)
@pytest.mark.parametrize("when", ["at its directory", "at its arrays"])
def test_what_cannot_be_written_is_one_line_and_leaves_no_thread(tmp_path, monkeypatch, when):
    checkpoint.save(tmp_path, 1, {"w": jnp.ones(2)})
    before = set(threading.enumerate())

    def fail(*_, **__):
        raise OSError(28, "No space left on device [spec={...}]\nTraceback")

    target = "os.makedirs" if when == "at its directory" else "tensorstore.open"
    monkeypatch.setattr(target, fail)
    with pytest.raises(OSError, match=r"checkpoint cannot be written: .*No space left") as error:
        checkpoint.save(tmp_path, 2, {"w": jnp.ones(2)})
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path) == 1
    left = [t for t in set(threading.enumerate()) - before if not t.daemon and "ThreadPool" not in t.name]
    for thread in left:
        thread.join(timeout=5)
    assert not [t.name for t in left if t.is_alive()]


def test_checkpoint_cut_off_while_written_is_ignored(tmp_path, caplog):
    checkpoint.save(tmp_path, 1, state_at(1))
    shutil.copytree(tmp_path / "1", tmp_path / ".part-2")
    (tmp_path / ".part-2" / "manifest.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert checkpoint.latest(tmp_path) == 1
    assert "cut off while it was written" in caplog.text
    checkpoint.save(tmp_path, 2, state_at(2))
    assert checkpoint.latest(tmp_path) == 2
    assert json.loads((tmp_path / "2" / "manifest.json").read_text())["step"] == 2


def test_other_parameters_are_refused_by_name(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": jnp.zeros(3)})
    with pytest.raises(ValueError, match=r"\['a'\] should have shape \(4,\), the checkpoint has \(3,\)"):
        checkpoint.restore(tmp_path, 1, {"a": jnp.zeros(4)})
    with pytest.raises(ValueError, match=r"\['b'\] should have shape \(3,\), the checkpoint has None"):
        checkpoint.restore(tmp_path, 1, {"b": jnp.zeros(3)})


def test_nothing_there_is_none(tmp_path):
    assert checkpoint.latest(tmp_path / "nowhere") is None
    np.testing.assert_equal(list(tmp_path.iterdir()), [])


def test_saver_writes_while_the_state_is_overwritten(tmp_path, monkeypatch):
    """`save` returns before the checkpoint is whole; donating what it was given does no harm; the context awaits it."""
    may_finish, finish = threading.Semaphore(0), checkpoint._finish

    def slow(*arguments):
        assert may_finish.acquire(timeout=60)
        return finish(*arguments)

    monkeypatch.setattr(checkpoint, "_finish", slow)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    tree = {"w": jnp.arange(50_000.0)}
    with checkpoint.Saver(tmp_path, keep=1) as saver:
        saver.save(1, tree)
        jax.block_until_ready(overwrite(tree))
        assert tree["w"].is_deleted()
        assert checkpoint.latest(tmp_path) is None
        may_finish.release()
        saver.save(2, {"w": jnp.ones(50_000)})  # Not before the first is whole, which the second will remove.
        np.testing.assert_array_equal(checkpoint.restore(tmp_path, 1, {"w": jnp.ones(50_000)})["w"], np.arange(50_000))
        may_finish.release()
    assert [p.name for p in tmp_path.iterdir()] == ["2"]


def test_a_checkpoint_counts_after_what_it_was_told_to_wait_for(tmp_path):
    seen = []
    with checkpoint.Saver(tmp_path) as saver:
        saver.save(1, {"w": jnp.ones(2)}, after=lambda: seen.append(checkpoint.latest(tmp_path)))
        saver.wait()
        assert (seen, checkpoint.latest(tmp_path)) == ([None], 1)
        saver.save(2, {"w": jnp.ones(2)}, after=lambda: [][0])
        with pytest.raises(IndexError):
            saver.wait()
    assert checkpoint.latest(tmp_path) == 1


def test_an_error_of_the_background_is_raised(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    with checkpoint.Saver(tmp_path) as saver:
        monkeypatch.setattr(checkpoint, "_checksum", fail)
        saver.save(1, {"w": jnp.ones(2)})
        with pytest.raises(OSError, match="disk full"):
            saver.wait()
    assert checkpoint.latest(tmp_path) is None
