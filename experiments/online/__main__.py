"""Improve a real language model online: arithmetic that can be checked, and a learned reward that can be fooled.

    python -m experiments.online --output=runs/online

SmolLM2-135M learns by every method of ``--methods``, in rounds of fresh completions, on

* ``puzzles``: one-digit sums of reasoning-gym, the questions of training and of the held-out set all different. The
  report has the accuracy of sampled and of greedy completions and pass@k, before and after;
* ``sentiment``: the beginnings of reviews. The reward is a classifier fitted to IMDb (`tiltjax.rewards.classifier`), a
  proxy; VADER is the gold reward that nothing is trained on. The report has both against the KL to the reference,
  beside best-of-n, soft best-of-n and the exact tilt: the curve of over-optimisation.

Expected with --beta=0.02 (95% intervals over 48 held-out prompts): accuracy of a sampled answer 0.448 before,
0.698 (gain 0.250 [0.184, 0.315]) after GRPO, 0.715 (0.267 [0.198, 0.337]) after RLOO, 0.702 after online DPO on the
best and the worst, 0.589 after tilted maximum likelihood; greedy accuracy stays at 0.73. Proxy 0.594 before, 0.671
(0.077 [0.058, 0.097]) after GRPO, 0.643, 0.641 and 0.631 after the others, and the gold reward rises with it: 0.183 to
0.330 after GRPO. 19 minutes on two cores, compilations included.

Every number is of held-out prompts, with 95% bootstrap intervals over them; gains are paired by prompt. A task and
method is a directory of its own below ``--output``, and ``--resume`` goes on from wherever the run was stopped.

Bad input ends with one line and exit status 2; TILTJAX_TRACEBACK=1 shows the whole traceback.
"""

import dataclasses
import logging
import pathlib
from typing import Any

import jax

from experiments.align.config import AlignConfig
from experiments.common.flags import from_flags
from experiments.common.launch import program, run_program
from experiments.common.run_directory import Run, RunFlags, open_run
from experiments.online import report
from experiments.online.bench import make_bench, play, reference
from experiments.online.measure import task_numbers
from tiltjax.align.law import Law
from tiltjax.align.settings import (
    COMPUTED,
    OWN_BETA,
    UNTRAINED,
    Computation,
    Fitting,
    Settings,
    Sources,
    Tilting,
    check_method,
)
from tiltjax.ops.checks import check_at_least, check_choice
from tiltjax.rewards.registry import reward_code
from tiltjax.train.config import check_fields, field, refield

__all__ = ["TASKS", "OnlineConfig", "run"]

_LOG = logging.getLogger("experiments.online")  # Not "__main__", whose lines are not shown.

TASKS = ("puzzles", "sentiment")
FREE = ("tasks", "methods", *(item.name for item in dataclasses.fields(RunFlags)))
"""Settings that move no number of a task and method."""


@dataclasses.dataclass(frozen=True)
class OnlineConfig(RunFlags, Sources, Law, Tilting, Fitting, Computation):
    """Everything that decides a run."""

    tasks: str = field("puzzles,sentiment", "Tasks with commas between: puzzles, sentiment.")
    methods: str = field(
        "grpo,rloo,online_dpo_best_worst,online_tilted_mle",
        "Methods with commas between: the records of experiments.align that learn in rounds.",
    )
    puzzle: str = field(
        "chain_sum?min_terms=2&max_terms=2&min_digits=1&max_digits=1", "Task of reasoning-gym, with its options."
    )
    prompts: str = refield(Sources, "prompts", "reviews", "Prompts of the task sentiment: as in experiments.align.")
    proxy: str = refield(Settings, "reward", "imdb", "Reward that sentiment is trained on: as in experiments.align.")
    gold: str = refield(
        Settings, "reward", "sentiment", "Independent reward of the task sentiment: as in experiments.align."
    )
    steps: int = refield(
        Fitting, "steps", 12, "Rounds: in each, candidates of --batch_size prompts are drawn, and a step is taken."
    )
    num_candidates: int = refield(
        Sources, "num_candidates", 8, "N, candidates per prompt in training, where the method leaves it free."
    )
    num_eval_prompts: int = refield(Sources, "num_eval_prompts", 48)
    puzzle_candidates: int = field(16, "puzzles: K, sampled completions per held-out prompt; pass@k goes up to it.")
    sentiment_candidates: int = field(8, "sentiment: K, sampled completions per held-out prompt.")
    reference_draws: int = field(8, "sentiment: how many times K completions of the reference, for best-of-n.")
    puzzle_tokens: int = field(12, "puzzles: longest completion, tokens.")
    sentiment_tokens: int = field(20, "sentiment: longest completion, tokens.")
    sample_batch: int = refield(Computation, "sample_batch", 48, "Held-out prompts sampled and scored at a time.")
    checkpoint_every: int = refield(
        Fitting, "checkpoint_every", 6, "Rounds between checkpoints, at each of which the policy is read."
    )
    output: str = refield(RunFlags, "output", "runs/online")
    resume: bool = refield(
        RunFlags,
        "resume",
        False,
        "Go on with the run in --output, and with further methods and tasks beside its own; with another --remat or "
        "--attention numbers agree to rounding.",
    )

    def __post_init__(self):
        check_fields(self)
        if self.report_beta is None:
            object.__setattr__(self, "report_beta", self.beta or OWN_BETA)
        if self.eval_temperature is None:  # One for all methods: they are compared.
            object.__setattr__(self, "eval_temperature", 1.0 if self.temperature is None else self.temperature)
        for part in self.parts("tasks"):
            check_choice("tasks", part, TASKS)
        for name in ("puzzle_candidates", "sentiment_candidates"):
            check_at_least(name, getattr(self, name), 2)
        for name in ("reference_draws", "puzzle_tokens", "sentiment_tokens"):
            check_at_least(name, getattr(self, name), 1)
        for method in self.parts("methods"):
            check_method("methods", method)
            if not self.align(TASKS[0], method).in_rounds:
                raise ValueError(f"methods must learn in rounds of fresh candidates, got {method!r}")

    def parts(self, name: str) -> tuple[str, ...]:
        """The tasks or the methods, each once."""
        return tuple(dict.fromkeys(getattr(self, name).split(",")))

    def align(self, task: str, method: str) -> AlignConfig:
        """The settings of a task and a method, as `experiments.align` has them; "" is the session of the task alone."""
        puzzle = f"reasoning_gym:{self.puzzle}"
        read = self.puzzle_candidates if task == "puzzles" else self.sentiment_candidates
        own = {item.name for item in dataclasses.fields(AlignConfig)} & {item.name for item in dataclasses.fields(self)}
        settings: dict[str, Any] = {name: getattr(self, name) for name in own}
        settings["beta"] = self.beta if method else self.report_beta
        settings |= {
            "prompts": puzzle if task == "puzzles" else self.prompts,
            "reward": puzzle if task == "puzzles" else self.proxy,
            "max_tokens": self.puzzle_tokens if task == "puzzles" else self.sentiment_tokens,
            "method": method or UNTRAINED,
            "num_candidates": self.num_candidates if method else read,
            "output": str(pathlib.Path(self.output) / task / method),
        }
        return AlignConfig(**settings)


def run(config: OnlineConfig) -> dict[str, Any]:
    """The whole job; returns what it writes to ``results.json``."""
    with open_run(config, free=(*FREE, *COMPUTED), writes=TASKS) as held:
        return _run(config, held)


def _run(config: OnlineConfig, held: Run) -> dict[str, Any]:
    if jax.process_count() > 1:
        raise ValueError("experiments.online runs on one host")
    methods = config.parts("methods")
    for method in methods:
        _LOG.info(config.align(config.parts("tasks")[0], method).describe())
    results: dict[str, Any] = {}
    samples: dict[str, list] = {}
    comparisons = len(methods) * len(config.parts("tasks"))
    for task in config.parts("tasks"):
        gold = "" if task == "puzzles" else config.gold
        bench = make_bench(task, config.align(task, ""), held.directory / task, gold=gold)
        parts = bench.session.parts | ({"gold reward": reward_code(gold)} if gold else {})
        held.begin({f"{name} of {task}": value for name, value in parts.items()})  # Not before all input was read.
        before = reference(bench, draws=config.reference_draws if gold else 1)
        played = {method: play(bench, config.align(task, method)) for method in methods}
        numbers = task_numbers(before, played, beta=config.report_beta, comparisons=comparisons)
        results[task] = {"settings": [config.align(task, method).describe() for method in methods], **numbers}
        prompts = [row.prompt for row in bench.session.rows["heldout"]]
        after = {method: readings[-1] for method, (readings, _) in played.items()}
        samples[task] = report.samples_of(prompts, before, after)
        report.write(held.directory, config, results, samples)
    return results


@program
def main() -> None:
    """Reads the flags and runs."""
    run(from_flags(OnlineConfig))


if __name__ == "__main__":
    run_program(main, OnlineConfig)
