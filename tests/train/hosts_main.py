"""`experiments.align`, and then more on the same policy: what a test starts as one of several processes."""

import dataclasses
import pathlib
import sys
from unittest import mock

from absl import app

from experiments import align
from experiments.align_config import AlignConfig
from experiments.align_fit import tune
from experiments.align_online import improve
from experiments.align_world import prepare
from experiments.launch import program
from tiltjax.models import pretrained
from tiltjax.samplers.continuous import decode_queue
from tiltjax.train import distributed, rollout
from tiltjax.train.config import define_flags, from_flags
from tiltjax.train.distributed import Hosts

RECORD_MESH = "data:2,fsdp:2,tensor:2"


def improved(config):
    """Where the policy lies that a record has improved for two rounds, on devices that share layers."""
    directory = pathlib.Path(f"{config.output}-record")
    told = dataclasses.replace(config, method="rloo", steps=2, output=str(directory), mesh=RECORD_MESH)
    world = prepare(told, directory)
    model = improve(world)
    pretrained.save(model, directory / "hf", tokenizer=world.tokenizer, overwrite=True)
    return directory


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


if __name__ == "__main__":
    define_flags(AlignConfig)
    define_flags(Hosts)
    app.run(main)
