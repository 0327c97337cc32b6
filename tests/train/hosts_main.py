"""`experiments.align`, and then a record on the same policy: what a test starts as one of several processes."""

import dataclasses
import pathlib

from absl import app

from experiments import align
from experiments.align_config import AlignConfig
from experiments.align_online import improve
from experiments.align_world import prepare
from experiments.launch import program
from tiltjax.models import pretrained
from tiltjax.train import distributed
from tiltjax.train.config import define_flags, from_flags
from tiltjax.train.distributed import Hosts


def improved(config):
    """Where the policy lies that a record has improved for two rounds."""
    directory = pathlib.Path(f"{config.output}-record")
    told = dataclasses.replace(config, method="rloo", steps=2, output=str(directory))
    world = prepare(told, directory)
    model = improve(world)
    pretrained.save(model, directory / "hf", tokenizer=world.tokenizer, overwrite=True)
    return directory


@program
def main():
    config = from_flags(AlignConfig)
    distributed.initialize(from_flags(Hosts))
    with distributed.ends_with_the_others():
        align.run(config)
        improved(config)


if __name__ == "__main__":
    define_flags(AlignConfig)
    define_flags(Hosts)
    app.run(main)
