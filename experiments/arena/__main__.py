"""Every method of alignment on one reward-KL plot, beside the exact optimum.

    python -m experiments.arena

A transformer is pretrained in place on a task whose completions are all enumerated (`experiments.arena.world`). Then
every method of `METHODS` gets the same number of samples at three strengths of the KL term, and its policy is measured
exactly at every checkpoint: reward, KL to the reference, and the distance KL(policy || tilt), which is the objective's
gap over beta. It writes `report.md`, `results.json`, `frontier.png`, `distance.png` and `claims.png` into --output, and
the result of every method as soon as it is there: the same command goes on where it was stopped.

Expected: the table of docs/arena.md; about ten minutes on two cores. `--quick` takes seven methods and a smaller task,
under two minutes; `--methods=rloo,dpo` chooses, `--methods=all` runs every record of `tiltjax.train.methods`.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from experiments.arena import report
from experiments.arena.run import Budget, run
from experiments.arena.world import World, WorldConfig, make_world
from experiments.common.flags import from_flags
from experiments.common.launch import prepare_process, program, run_program
from experiments.common.run_directory import open_run, overwrite_field
from tiltjax.ops.checks import check_at_least, check_positive
from tiltjax.train.config import field, output_field, write_text
from tiltjax.train.method import Method
from tiltjax.train.methods import METHODS, get_method

__all__ = ["CORE", "QUICK", "ArenaConfig", "compete", "main"]

CORE = (
    "sft", "tilted_mle", "iterated_tilted_mle", "online_tilted_mle", "var_importance", "online_var_importance", "var",
    "raft", "expert_iteration", "rwr", "awr", "dpo", "ipo", "simpo", "chi_po", "dpop", "dpo_nll", "kto",
    "preferred_ft", "dpo_best_worst", "online_dpo", "online_ipo", "online_dpo_best_worst", "online_info_nca",
    "tr_dpo_soft", "tr_dpo_hard", "rloo", "rloo_stale", "remax", "reinforce_pp", "grpo", "grpo_4_epochs", "grpo_prorl",
    "dr_grpo", "dapo_4_epochs", "gspo", "cispo", "ppo", "ppo_ptx", "mdpo", "mdloo", "safe_rlhf", "prime", "spin",
    "sppo", "dno", "inpo", "nash_md", "spo", "mpo", "self_certainty", "empo", "ttrl",
)  # fmt: skip
"""Methods of the default run."""

QUICK = ("tilted_mle", "online_tilted_mle", "dpo", "online_dpo", "rloo", "grpo", "dr_grpo")
"""Methods of the quick run."""


@dataclasses.dataclass(frozen=True)
class ArenaConfig:
    """Everything that decides a run."""

    methods: str = field("", "Comma-separated records of tiltjax.train.methods, or all; empty takes the default list.")
    quick: bool = field(False, "Seven methods, two strengths, two seeds and a smaller task: under two minutes.")
    updates: int = field(96, "Mini-batches that every method gets; a multiple of 16.")
    num_completions: int = field(64, "Completions per mini-batch; a multiple of 16.")
    num_seeds: int = field(3, "Independent runs of every method.")
    learning_rate: float = field(1e-3, "Of Adam, for all methods: a record's own is for a language model.")
    published: bool = field(
        False,
        "Methods that are published without a KL term (DAPO, Dr. GRPO, GSPO, CISPO, ...) have none; else every method "
        "is trained at the same strengths. Distances are to the tilt at each of these.",
    )
    workers: int = field(2, "Processes; 0 runs in this one.")
    output: str = output_field("runs/arena", "Directory of the run.")
    overwrite: bool = overwrite_field()

    def __post_init__(self):
        for name in ("updates", "num_completions"):
            value = getattr(self, name)
            check_at_least(name, value, 16)
            if value % 16:
                raise ValueError(f"{name} must be a multiple of 16, got {value}")
        check_at_least("num_seeds", self.num_seeds, 1)
        check_positive("learning_rate", self.learning_rate)
        check_at_least("workers", self.workers, 0)
        self.chosen()

    def chosen(self) -> list[Method]:
        """The records to run, in the order in which they were asked for."""
        names: Sequence[str] = QUICK if self.quick else CORE
        if self.methods:
            names = list(METHODS) if self.methods == "all" else [name.strip() for name in self.methods.split(",")]
        return [get_method(name) for name in dict.fromkeys(names)]

    def world(self) -> WorldConfig:
        """Of the task."""
        return WorldConfig(vocab_size=5, max_tokens=3, num_prompts=2) if self.quick else WorldConfig()

    def budget(self) -> Budget:
        """Of every method."""
        same: dict[str, Any] = {"samples": self.num_completions, "learning_rate": self.learning_rate}
        same["published"] = self.published
        if self.quick:
            return Budget(updates=48, seeds=2, betas=(1.0, 0.5), **same)
        return Budget(updates=self.updates, seeds=self.num_seeds, **same)


def compete(world: World, budget: Budget, methods: Sequence[Method], folder: pathlib.Path, *, workers: int = 0) -> list:
    """Runs what has no result yet, and returns all results in the order of ``methods``.

    Args:
      world: Task and reference.
      budget: Of every method.
      methods: Records.
      folder: Holds one JSON file per method; one of another world, budget or record is run again.
      workers: Processes; 0 runs in this one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    marks = {method.name: _fingerprint(world, budget, method) for method in methods}
    found = {name: _read(folder / f"{name}.json", mark) for name, mark in marks.items()}
    missing = [method.name for method in methods if found[method.name] is None]
    with tqdm(total=len(methods), initial=len(methods) - len(missing), desc="arena", unit="method") as bar:
        for name, result in _results(world, budget, missing, workers):
            bar.set_postfix_str(name)
            write_text(folder / f"{name}.json", json.dumps({"fingerprint": marks[name], **result}))
            found[name] = result
            bar.update()
    return [found[method.name] for method in methods]


def _results(world: World, budget: Budget, names: Sequence[str], workers: int) -> Iterator[tuple[str, dict[str, Any]]]:
    if not workers or len(names) < 2:
        for name in names:
            yield name, run(world, get_method(name), budget)
        return
    leaves = [np.asarray(x) for x in jax.tree.leaves(world.params)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=_start, initargs=(world.config, leaves)
    ) as pool:
        waiting = {pool.submit(_work, name, budget): name for name in names}
        for done in concurrent.futures.as_completed(waiting):
            yield waiting[done], done.result()


_WORLD: list[World] = []


def _start(config: WorldConfig, leaves: list[np.ndarray]) -> None:
    prepare_process()
    _WORLD.append(make_world(config, leaves=leaves))


def _work(name: str, budget: Budget) -> dict[str, Any]:
    return run(_WORLD[0], get_method(name), budget)


def _fingerprint(world: World, budget: Budget, method: Method) -> str:
    fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}
    plain = {name: value for name, value in fields.items() if isinstance(value, str | int | float | tuple)}
    of = repr((world.config, budget, plain, method.reference))
    return hashlib.sha256(of.encode()).hexdigest()[:16]


def _read(path: pathlib.Path, fingerprint: str) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found = json.loads(path.read_text())
    return found if found.pop("fingerprint") == fingerprint else None


@program
def main() -> None:
    """Reads the flags and runs."""
    config = from_flags(ArenaConfig)
    names = [item.name for item in dataclasses.fields(config)]  # Results of other settings are told by fingerprint.
    with open_run(config, free=names, resume=not config.overwrite, writes=("methods",)) as held:
        methods, budget, world = config.chosen(), config.budget(), make_world(config.world())
        held.begin()
        results = compete(world, budget, methods, held.directory / "methods", workers=config.workers)
        print(report.write(held.directory, world, budget, results))


if __name__ == "__main__":
    run_program(main, ArenaConfig)
