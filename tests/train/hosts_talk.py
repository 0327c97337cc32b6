"""Hosts that only talk to each other, until one of them is gone: what a test starts as one of several processes."""

import itertools
import sys

from experiments.launch import program, run_program
from tiltjax.train import distributed
from tiltjax.train.config import from_flags
from tiltjax.train.distributed import Hosts


@program
def main():
    distributed.initialize(from_flags(Hosts))
    with distributed.ends_with_the_others():
        for turn in itertools.count():
            distributed.agree(turn)
            if not turn:
                sys.stdout.write("talking\n")
                sys.stdout.flush()


if __name__ == "__main__":
    run_program(main, Hosts)
