import functools
import json
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tiltjax.ops.masked import average
from tiltjax.train import checkpoint
from tiltjax.train.finite import NonFiniteError
from tiltjax.train.loop import epoch_batches, fit
from tiltjax.train.metrics import Journal, MetricsWriter, bootstrap_interval
from tiltjax.train.state import init_state
from tiltjax.train.step import train_step

DATA = np.random.default_rng(0).normal(size=(12, 4)).astype(np.float32)
TX = optax.adam(0.1)


def noisy_loss(params, frozen, batch, key):
    noise = jax.random.normal(key, batch.shape)
    return average(jnp.sum(jnp.square(batch + 0.1 * noise - params["w"][None]), -1)), {}


STEP = jax.jit(functools.partial(train_step, loss_fn=noisy_loss, tx=TX), donate_argnums=0)


class Killed(Exception):
    pass


def run(directory, *, resume=False, kill_at=None, steps=11):
    order = epoch_batches(len(DATA), 5, seed=1)

    def batches(step):
        if step == kill_at:
            raise Killed
        return DATA[order(step)]

    return fit(
        init_state({"w": jnp.zeros(4)}, TX),
        batches,
        step_fn=STEP,
        key=jax.random.key(7),
        num_steps=steps,
        directory=directory,
        resume=resume,
        checkpoint_every=4,
        progress=False,
    )


@pytest.mark.parametrize("kills", [(2,), (4,), (7,), (10,), (3, 6, 9)])
def test_killed_and_resumed_is_bit_identical(tmp_path, kills):
    whole = run(tmp_path / "whole")
    for i, kill_at in enumerate(kills):
        with pytest.raises(Killed):
            run(tmp_path / "broken", resume=i > 0, kill_at=kill_at)
    resumed = run(tmp_path / "broken", resume=True)
    chex.assert_trees_all_equal(resumed, whole)
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "broken")]
    assert files[0] == files[1]
    assert [json.loads(line)["step"] for line in files[0].splitlines()] == list(range(11))


class Scalar:
    """The loss of a step, which can be read once the next step was started; a checkpoint that holds it must wait."""

    def __init__(self, step, started, folder, fault=None):
        self.step, self.started, self.folder, self.fault = step, started, folder, fault

    def __array__(self, *_, **__):
        assert self.started[self.step + 1].wait(timeout=30), "the loop waits for a step before it starts the next one"
        assert not (self.folder / "checkpoints" / str(self.step + 1)).exists()
        if self.step == self.fault:
            raise OSError("disk full")
        return np.float32(self.step)


def paced(directory, *, fault=None, steps=6):
    started = [threading.Event() for _ in range(steps + 1)]
    started[steps].set()

    def step_fn(state, batch, key, frozen):
        started[batch].set()
        return state.replace(step=state.step + 1), {"loss": Scalar(batch, started, directory, fault)}

    options = {"key": jax.random.key(0), "num_steps": steps, "checkpoint_every": 2, "progress": False}
    start = init_state({"w": jnp.zeros(2)}, TX)
    return fit(start, lambda step: step, step_fn=step_fn, directory=directory, **options)


def test_no_step_waits_for_the_metrics_of_the_one_before(tmp_path):
    """Not where a checkpoint is written either."""
    assert paced(tmp_path).step == 6
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": i, "loss": float(i)} for i in range(6)]
    assert checkpoint.latest(tmp_path / "checkpoints") == 6


def test_a_checkpoint_counts_only_with_the_metrics_of_its_steps(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        paced(tmp_path, fault=3)
    assert checkpoint.latest(tmp_path / "checkpoints") == 2
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize("processes", [1, 2])
def test_after_a_line_that_was_not_written_none_is(tmp_path, monkeypatch, processes):
    """One process hears of it with the numbers of the line; of several each has the numbers, and asks later."""
    writes = MetricsWriter.write

    def write(self, step, scalars):
        if step == 1:
            raise OSError("disk full")
        writes(self, step, scalars)

    monkeypatch.setattr(MetricsWriter, "write", write)
    with Journal(tmp_path) as journal:
        monkeypatch.setattr(jax, "process_count", lambda: processes)
        lines = [journal.write(step, {"loss": jnp.float32(step)}) for step in range(3)]
        assert lines[0].values() == {"loss": 0.0}
        lines[0].written()
        for step, line in enumerate(lines[1:], 1):
            if processes == 1:
                with pytest.raises(OSError, match="disk full"):
                    line.values()
            else:
                assert line.values() == {"loss": step}
            with pytest.raises(OSError, match="disk full"):
                line.written()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0, "loss": 0.0}\n'


def stepping(directory, *, at, loss=1.0, grad_norm=1.0, weight=0.0, steps=9):
    """A fit of steps that compute nothing, except that step ``at`` has these scalars and adds ``weight``."""

    def step_fn(state, batch, key, frozen):
        bad = batch == at
        state = state.replace(step=state.step + 1, params={"w": state.params["w"] + (weight if bad else 0.0)})
        return state, {"loss": jnp.float32(loss if bad else 1), "grad_norm": jnp.float32(grad_norm if bad else 1)}

    options = {"key": jax.random.key(0), "num_steps": steps, "checkpoint_every": 2, "progress": False}
    return fit(init_state({"w": jnp.zeros(2)}, TX), lambda i: i, step_fn=step_fn, directory=directory, **options)


@pytest.mark.robustness(
    "Numbers",
    given="a loss or a gradient that is NaN or infinite at a training step",
    outcome="the run ends with the step and the name; the last checkpoint is from before it, its metrics end before it",
)
@pytest.mark.parametrize(
    ("at", "scalars", "said", "last"),
    [
        (6, {"loss": np.nan}, "step 6: loss is nan", 6),
        (5, {"grad_norm": np.inf}, "step 5: grad_norm is inf", 4),
        (8, {"loss": -np.inf, "grad_norm": np.nan}, "step 8: grad_norm is nan, loss is -inf", 8),
    ],
)
def test_a_scalar_that_is_not_finite_ends_the_run(tmp_path, at, scalars, said, last):
    with pytest.raises(NonFiniteError, match=said):
        stepping(tmp_path, at=at, **scalars)
    assert checkpoint.latest(tmp_path / "checkpoints") == last
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [*range(at)]


@pytest.mark.robustness(
    "Numbers",
    given="a parameter that becomes NaN or infinite while loss and gradient are finite",
    outcome="no checkpoint has it, and the run ends with the step and the name of the parameter",
)
@pytest.mark.parametrize(("at", "last"), [(5, 4), (8, 8)])
def test_parameters_that_are_not_finite_are_not_kept(tmp_path, at, last):
    with pytest.raises(NonFiniteError, match=rf"step {at + 1}: params\['w'\] is not finite"):
        stepping(tmp_path, at=at, weight=np.inf)
    assert checkpoint.latest(tmp_path / "checkpoints") == last
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} <= {str(last - 2), str(last)}


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    whole = run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    chex.assert_trees_all_equal(run(tmp_path, resume=True), whole)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_tensorboard_events_are_written(tmp_path):
    run(tmp_path)
    assert [p for p in (tmp_path / "tensorboard").iterdir() if "tfevents" in p.name]


@pytest.mark.robustness(
    "Runs",
    given="lines of metrics.jsonl that were lost or damaged before a run is resumed",
    outcome="the steps without a line are named in one line of the log; the run goes on",
)
@pytest.mark.parametrize(
    ("left", "lost"),
    [
        ([0, 1, "half"], "steps 2 are lost; the run goes on at step 3"),
        ([0, 1, 2, 3, 4], None),
        ([1, "half"], "steps 0, 2 are lost"),
        (None, "steps 0 to 2 are lost"),
    ],
)
def test_lines_of_metrics_that_are_lost_are_named(tmp_path, caplog, left, lost):
    if left is not None:
        lines = ['{"step": 2, "lo' if step == "half" else json.dumps({"step": step, "loss": 1.0}) for step in left]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(3, {"loss": jnp.float32(4.0)})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": step, "loss": 1.0} for step in left or [] if step in (0, 1, 2)] + [
        {"step": 3, "loss": 4.0}
    ]
    assert (f"metrics.jsonl: the lines of {lost}" in caplog.text) if lost else not caplog.text


def test_every_prompt_once_per_epoch_in_changing_order():
    order = epoch_batches(12, 4, seed=0)
    epochs = [np.concatenate([order(3 * e + s) for s in range(3)]).tolist() for e in range(3)]
    assert all(sorted(e) == list(range(12)) for e in epochs)
    assert epochs[0] != epochs[1]
    assert epochs == [
        np.concatenate([epoch_batches(12, 4, seed=0)(3 * e + s) for s in range(3)]).tolist() for e in range(3)
    ]
    with pytest.raises(ValueError, match=r"batch_size must lie in \[1, 12\]"):
        epoch_batches(12, 13, seed=0)


def test_bootstrap_interval_covers_the_mean():
    rng = np.random.default_rng(0)
    hits = sum(
        low <= 1.0 <= high
        for _, low, high in (bootstrap_interval(rng.normal(1, 2, 60), resamples=999) for _ in range(200))
    )
    assert 178 <= hits <= 200  # 95% nominal; 4 standard errors below the percentile method's usual 93-94%
    mean, low, high = bootstrap_interval(rng.normal(size=400))
    assert high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    with pytest.raises(ValueError, match="number of values must be at least 2, got 1"):
        bootstrap_interval(np.ones(1))
