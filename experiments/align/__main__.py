"""Tilt a language model towards a reward: at test time (soft best-of-N) and in its weights.

    python -m experiments.align --output=runs/align

draws N candidates per prompt from the reference policy, scores them, estimates log Z and the effective sample size,
fits the tilted distribution, and evaluates on held-out prompts beside what theory predicts. It writes `report.md` with
plots and samples, `results.json`, `metrics.jsonl`, TensorBoard events, Orbax checkpoints and a Hugging Face export. The
export stops where the policy stops (it has all its end ids, generation_config.json and chat template) and is of the
type that the policy's config.json declares, float32 where it declares none.

Expected at the default settings (SmolLM2-135M, VADER sentiment): what docs/align/report.md shows, to the draw of the
candidates; the interval of the tuned policy's gain excludes 0. Two to four minutes on two cores.

`--method=rloo`, or the name of any record of `tiltjax.train.methods`, learns in rounds of fresh candidates. Some need
more than prompts and a reward:

    --method=spin --demonstrations=answer         a column of the prompts, or a file with completions of them (sft too)
    --method=ppo_ptx --corpus=text.jsonl          text that must not be forgotten
    --method=safe_rlhf --cost=model:runs/reward/cost/model    a cost, above 0 where a completion harms
    --method=online_kto --desirable_above=0.5     a threshold that makes the reward a binary label

On several hosts, the same command on each, and a directory that all of them see (under SLURM, Open MPI, GKE and on TPU
pods the last three flags are found by themselves):

    python -m experiments.align --output=/shared/run --resume --coordinator=host0:8476 --num_processes=2 --process_id=0

Bad input ends with one line and exit status 2; TILTJAX_TRACEBACK=1 shows the whole traceback.
"""

import logging
from typing import Any

from experiments.align.config import UNCHANGING, AlignConfig
from experiments.common.flags import from_flags
from experiments.common.launch import command, program, run_program
from experiments.common.run_directory import open_run
from tiltjax.align.session import prepare
from tiltjax.align.settings import COMPUTED
from tiltjax.train import distributed
from tiltjax.train.distributed import Hosts

_LOG = logging.getLogger("experiments.align")  # Not "__main__", whose lines are not shown.


def run(config: AlignConfig) -> dict[str, Any]:
    """The whole job; returns what it writes to ``results.json``."""
    with open_run(config, free=(*UNCHANGING, *COMPUTED)) as held:
        distributed.by_main(lambda: _LOG.info(config.describe()))
        session = prepare(config, held.directory, resume=config.resume)
        held.begin(session.parts)  # Not before: input that is refused leaves no run behind.
        drawn = session.sample()
        session.estimate(drawn)  # Says whether the weights can be trusted, before anything is fitted to them.
        evaluation = session.evaluate(session.align(drawn=drawn))
        evaluation.save(held.directory, command=command("align", config))
        distributed.by_main(lambda: print(f"\n{evaluation}\n\nreport: {held.directory / 'report.md'}"))
    return evaluation.results


@program
def main() -> None:
    """Reads the flags, joins the other hosts and runs."""
    config = from_flags(AlignConfig)
    distributed.initialize(from_flags(Hosts))
    with distributed.ends_with_the_others():
        run(config)


if __name__ == "__main__":
    run_program(main, AlignConfig, Hosts)
