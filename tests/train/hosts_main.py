"""`experiments.align`, and then more on the same policy: what a test starts as one of several processes."""

import dataclasses
import pathlib
import sys
from unittest import mock

import jax
import numpy as np
from absl import app

from experiments import align
from experiments.align_config import AlignConfig
from experiments.align_fit import tune
from experiments.align_online import improve
from experiments.align_world import prepare
from experiments.launch import program
from tiltjax.models import pretrained
from tiltjax.samplers.continuous import decode_queue
from tiltjax.train import checkpoint, distributed, rollout
from tiltjax.train.config import define_flags, from_flags
from tiltjax.train.distributed import Hosts
from tiltjax.train.sharding import batch_sharding, make_mesh

RECORD_MESH = "data:2,fsdp:2,tensor:2"


def improved(config):
    """Where the policy lies that a record has improved for four rounds of two steps, on devices that share layers."""
    directory = pathlib.Path(f"{config.output}-record")
    told = dataclasses.replace(config, method="inpo", steps=8, output=str(directory), mesh=RECORD_MESH)
    world = prepare(told, directory)
    model = improve(world)
    pretrained.save(model, directory / "hf", tokenizer=world.tokenizer, overwrite=True)
    return directory


def drawn_one_at_a_time(config):
    """Candidates of the held-out prompts, of which too few are drawn at a time for every device to have one."""
    directory = pathlib.Path(f"{config.output}-one")
    world = prepare(dataclasses.replace(config, output=str(directory), sample_batch=1), directory)
    world.rollout("heldout", world.model, seed=1)


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


def not_written(config):
    """Says what a host hears when the metrics that a checkpoint waits for cannot be written, by process 0 alone."""
    directory = pathlib.Path(f"{config.output}-full")

    def write():
        if distributed.is_main():
            raise OSError("disk full")

    saver = checkpoint.Saver(directory)
    saver.save(1, {"w": np.ones(2, np.float32)}, after=write)
    try:
        saver.wait()
    except (OSError, ValueError) as error:
        sys.stdout.write(f"checkpoint: {error}; the last is {checkpoint.latest(directory)}\n")


def gone_on(config):
    """Where the policy lies of a run that other hosts have begun and these go on with."""
    directory = pathlib.Path(f"{config.output}-taken-over")
    world = prepare(dataclasses.replace(config, output=str(directory)), directory)
    model = tune(world, world.rollout("train", world.model, seed=0)[0])
    pretrained.save(model, directory / "hf", tokenizer=world.tokenizer, overwrite=True)
    return directory


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
    with distributed.ends_with_the_others(), mock.patch.object(rollout, "decode_queue", told_of):
        align.run(config)
        improved(config)
        gone_on(config)
        drawn_one_at_a_time(config)
        exchanged()
        not_written(config)


if __name__ == "__main__":
    define_flags(AlignConfig)
    define_flags(Hosts)
    app.run(main)
