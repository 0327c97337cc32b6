"""Hosts that talk to each other, or compile alone, until one is gone: what a test starts as several processes."""

import itertools
import os
import sys

import jax

from experiments.common.flags import from_flags
from experiments.common.launch import program, run_program
from tiltjax.train import distributed
from tiltjax.train.distributed import Hosts


@program
def main():
    distributed.initialize(from_flags(Hosts))
    with distributed.ends_with_the_others():
        for turn in itertools.count():
            if not (turn and os.environ.get("HOSTS_ALONE")):
                distributed.agree(turn)
            else:
                jax.jit(lambda x: x + turn)(1)  # noqa: B023
            if not turn:
                sys.stdout.write("talking\n")
                sys.stdout.flush()


if __name__ == "__main__":
    run_program(main, Hosts)
