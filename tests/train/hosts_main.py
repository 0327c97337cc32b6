"""`experiments.align`, and then more on the same policy: what a test starts as one of several processes."""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
import sys
import warnings
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from experiments.align import __main__ as align
from experiments.align.config import AlignConfig
from experiments.common.flags import from_flags
from experiments.common.launch import program, run_program
from experiments.reward_model import __main__ as reward_model
from experiments.reward_model.__main__ import RewardConfig
from tiltjax.align import session as align_session
from tiltjax.align.fit import tune
from tiltjax.align.rounds import improve
from tiltjax.align.session import prepare
from tiltjax.data.candidates import load
from tiltjax.models import pretrained
from tiltjax.ops.collectives import pmean
from tiltjax.samplers.continuous import decode_queue
from tiltjax.train import checkpoint, distributed, metrics, rollout
from tiltjax.train.distributed import Hosts
from tiltjax.train.loop import fit
from tiltjax.train.sharding import batch_sharding, make_mesh, pmap_step

RECORD_MESH = "data:2,fsdp:2,tensor:2"


@contextlib.contextmanager
def shared_programs():
    """Worlds that draw and score alike do it by one program, which is traced and compiled once."""
    makers = {name: functools.cache(getattr(align_session, name)) for name in ("make_sampler", "make_scorer")}
    with mock.patch.multiple(align_session, **makers):
        yield


def improved(config):
    """Where the policy lies that a record has improved for four rounds of two steps, on devices that share layers.

    A run of the first rounds that lies there, begun by this process or by others, is gone on with.
    """
    directory = pathlib.Path(f"{config.output}-record")
    told = dataclasses.replace(config, method="inpo", steps=8, output=str(directory), mesh=RECORD_MESH)
    session = prepare(told, directory, resume=told.resume)
    model = improve(session)
    pretrained.save(model, directory / "hf", tokenizer=session.tokenizer, overwrite=True)
    return directory


def rewarded(config):
    """Where a reward model lies that learned from comparisons of the policy's own completions."""
    directory = pathlib.Path(f"{config.output}-rewards")
    names = ("policy", "prompts", "num_candidates", "num_prompts", "num_eval_prompts", "max_tokens", "batch_size",
             "sample_batch", "learning_rate", "compute_dtype", "mesh")  # fmt: skip
    shared = {name: getattr(config, name) for name in names}
    reward_model.run(
        RewardConfig(
            kinds="global", gold=config.reward, scale=2.0, steps=2, lora_rank=2, output=str(directory), **shared
        )
    )
    return directory


def adapted(config):
    """Where a policy lies whose adapters `jax.pmap` has fitted for two steps to the candidates of the run."""
    directory = pathlib.Path(f"{config.output}-adapted")
    told = dataclasses.replace(config, lora_rank=2, mapping="pmap", mesh="data:8", steps=2, resume=False)
    session = prepare(told, directory)
    model = tune(session, load(pathlib.Path(config.output) / "candidates" / "train.npz"))
    pretrained.save(model, directory / "hf", tokenizer=session.tokenizer, overwrite=True)
    return directory


def drawn_one_at_a_time(config):
    """Candidates of the first held-out prompts, too few at a time for every device to have one."""
    directory = pathlib.Path(f"{config.output}-one")
    told = dataclasses.replace(config, output=str(directory), sample_batch=1, num_eval_prompts=6)
    session = prepare(told, directory)
    session.rollout("heldout", session.model, name="heldout")


def exchanged():
    """Says how many programs the exchange between hosts compiles, time and again."""
    compiled, place = [], batch_sharding(make_mesh("data:4,fsdp:2"))

    def listen(name, duration, **_):
        if name.endswith("backend_compile_duration"):
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for _ in range(3):
        rows = distributed.host_rows(place, 16)
        batch = distributed.global_batch(rows, place, 16)
        before = len(compiled)
        np.testing.assert_array_equal(rollout.whole_on_every_host(batch, place), np.arange(16))
        sys.stdout.write(f"exchange: {len(compiled) - before} compiled\n")
    jax.monitoring.unregister_event_duration_listener(listen)


def mapped():
    """Says where two steps of `jax.pmap` end, and whether the state stayed in its place."""

    def step(state, batch, key, frozen, axis_name):
        return state + frozen * pmean(jnp.mean(batch), axis_name), {}

    mesh, step_fn = make_mesh("data:8"), pmap_step(step)
    state, frozen = (distributed.localize(distributed.replicate(jnp.ones(1), mesh)) for _ in range(2))
    state = state + frozen

    def places():
        return [part.data.unsafe_buffer_pointer() for part in state.addressable_shards]

    before, rows = places(), np.arange(16, dtype=np.float32)[distributed.host_rows(batch_sharding(mesh), 16)]
    with jax.transfer_guard_device_to_device("disallow"), warnings.catch_warnings(action="error"):
        for _ in range(2):
            state, _ = step_fn(state, rows, jax.random.key(0), frozen)
    sys.stdout.write(f"pmap: {np.asarray(state).tolist()} in {'the same' if places() == before else 'other'} places\n")


def not_written(config):
    """Says how far a fit came, and what a host heard, when process 0 alone could not write something, once.

    A line of metrics between two checkpoints, or the name of a checkpoint; the hosts need each other in every step.
    """

    def failing(work, fault):
        calls = itertools.count()

        def run(*arguments, **options):
            if next(calls) == fault:
                raise OSError("disk full")
            return work(*arguments, **options)

        return run

    mesh = make_mesh("data:8")
    place, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    @functools.partial(jax.jit, in_shardings=(whole, place, whole, None), out_shardings=whole)
    def step_fn(state, batch, key, frozen):
        mean = batch.mean()
        return state + mean, {"loss": mean}

    def batches(step):
        steps.append(step)
        return distributed.global_batch(np.ones(4, np.float32), place, 8)

    for owner, name, fault in ((metrics.MetricsWriter, "write", 2), (checkpoint, "_checksum", 0)):
        directory, steps = pathlib.Path(f"{config.output}-full-{name}"), []
        options = {"key": jax.random.key(0), "num_steps": 6, "checkpoint_every": 2, "directory": directory}
        with mock.patch.object(owner, name, failing(getattr(owner, name), fault)):
            try:
                fit(distributed.replicate(jnp.zeros(2), mesh), batches, step_fn=step_fn, **options)
            except (OSError, ValueError) as error:
                last = checkpoint.latest(directory / "checkpoints")
                sys.stdout.write(f"{name} failed: {error}; {len(steps)} steps, the last checkpoint is {last}\n")


def told_of(*arguments, groups, slots, num_candidates, **options):
    """`tiltjax.samplers.continuous.decode_queue`, with a line when it is traced."""
    sys.stdout.write(
        f"queue: {len(arguments[1])} prompts, {num_candidates} candidates each, on {groups} groups of {slots}\n"
    )
    return decode_queue(*arguments, groups=groups, slots=slots, num_candidates=num_candidates, **options)


@program
def main():
    config = from_flags(AlignConfig)
    distributed.initialize(from_flags(Hosts))
    told = mock.patch.object(rollout, "decode_queue", told_of)
    with distributed.ends_with_the_others(), told, shared_programs():
        align.run(config)
        improved(config)
        rewarded(config)
        adapted(config)
        drawn_one_at_a_time(config)
        exchanged()
        mapped()
        not_written(config)


if __name__ == "__main__":
    run_program(main, AlignConfig, Hosts)
