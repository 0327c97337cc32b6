"""What `experiments.online` works with: two tasks, a policy that a method improves, and what held-out prompts say."""

import dataclasses
import hashlib
import json
import pathlib
import time
from typing import Any

import numpy as np

from experiments.align.config import AlignConfig
from tiltjax.align.rounds import improve
from tiltjax.align.session import Session, prepare, score_rows
from tiltjax.data import text
from tiltjax.models.transformer import Transformer
from tiltjax.ops.tokens import sequence_logp
from tiltjax.rewards.registry import load_reward
from tiltjax.train import checkpoint
from tiltjax.train.config import save_config, write_text
from tiltjax.train.methods import get_method
from tiltjax.train.rollout import make_sampler

__all__ = ["Bench", "Reading", "make_bench", "play", "reference", "rounds_of", "watched"]


@dataclasses.dataclass(frozen=True)
class Reading:
    """A policy on the held-out prompts.

    Attributes:
      round: How many rounds it has learned; 0 is the reference.
      reward: What it is trained on, of K sampled completions per prompt, ``[P, K]``.
      texts: The completions.
      gold: The independent reward, ``[P, K]``; None where the reward is the truth.
      log_ratio: ``logp - ref_logp`` of the completions, nats, ``[P, K]``; 0 for the reference.
      greedy: Reward of the greedy completion, ``[P]``; None where it was not asked for.
    """

    round: int
    reward: np.ndarray
    texts: list[list[str]]
    gold: np.ndarray | None
    log_ratio: np.ndarray
    greedy: np.ndarray | None = None

    @property
    def judged(self) -> np.ndarray:
        """What is reported, ``[P, K]``: where the reward is the truth whether a completion is right, else the reward.

        Part of a reward, for an answer that holds the right one, is no right answer.
        """
        return self.reward if self.greedy is None else (self.reward >= 1).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Bench:
    """A task: its session with the sampler of evaluations, a greedy one, and the gold reward.

    Attributes:
      name: Of the task.
      session: Of the reference; its directory is the task's.
      greedy: The same session with a greedy sampler; None where accuracy is not what counts.
      gold: The independent reward and its name, or None.
    """

    name: str
    session: Session
    greedy: Session | None
    gold: tuple[str, Any] | None


def make_bench(name: str, config: AlignConfig, directory: pathlib.Path, *, gold: str) -> Bench:
    """Loads a task.

    Args:
      name: Of the task.
      config: Of its session; ``num_candidates`` is that of an evaluation.
      directory: Of the task.
      gold: Spec of the independent reward; empty for a reward that is the truth, which is then read greedily too.

    Returns:
      `Bench`; nothing is written.
    """
    independent = (gold, load_reward(gold)) if gold else None
    session = prepare(config, directory)
    alone = None
    if not gold:
        ends: dict[str, Any] = {"eos_id": text.end_ids(session.tokenizer), "pad_id": text.pad_id(session.tokenizer)}
        sampler = make_sampler(num_candidates=1, max_tokens=config.max_tokens, temperature=0.0, **ends)
        alone = dataclasses.replace(session, evaluator=sampler)
    return Bench(name=name, session=session, greedy=alone, gold=independent)


def _at(session: Session, directory: pathlib.Path, method: str) -> Session:
    """The same session in the directory of a method; its candidates are refused by any other."""
    fingerprint = hashlib.sha256(f"{session.fingerprint}\n{method}".encode()).hexdigest()[:16]
    return dataclasses.replace(session, directory=directory, fingerprint=fingerprint)


def _gold(bench: Bench, texts: list[list[str]]) -> np.ndarray | None:
    if bench.gold is None:
        return None
    return score_rows(bench.gold[1], bench.session.rows["heldout"], texts, name=bench.gold[0])


def _read(bench: Bench, directory: pathlib.Path, method: str, policy: Transformer, played: int) -> Reading:
    """Samples, scores and keeps; what was kept is read, and the policy is not looked at."""
    session = _at(bench.session, directory, method)
    drawn, texts = session.rollout(f"heldout-{played}", policy, name="heldout")
    reward = np.asarray(drawn.reward)
    log_ratio = np.zeros(reward.shape)
    if played:
        at = session.settings.eval_temperature
        referred = session.with_reference(f"scored-{played}", drawn, "score reference", temperature=at)
        log_ratio = np.asarray(sequence_logp(drawn.old_token_logp, drawn.completion_mask) - referred.ref_logp)
    greedy = None
    if bench.greedy is not None:
        best, _ = _at(bench.greedy, directory, method).rollout(f"heldout-greedy-{played}", policy, name="heldout")
        greedy = np.asarray(best.reward)[:, 0]
    return Reading(
        round=played, reward=reward, texts=texts, gold=_gold(bench, texts), log_ratio=log_ratio, greedy=greedy
    )


def reference(bench: Bench, *, draws: int) -> Reading:
    """The policy before training: ``draws`` times as many completions as of a policy in training.

    Args:
      bench: The task.
      draws: How often K completions are sampled.

    Returns:
      `Reading` of ``K draws`` completions, the first K with the random numbers of every other reading.
    """
    assert bench.session.directory is not None
    directory = bench.session.directory / "reference"
    first = _read(bench, directory, "reference", bench.session.model, 0)
    session, parts = _at(bench.session, directory, "reference"), [(first.reward, first.texts)]
    for i in range(1, draws):
        drawn, texts = session.rollout(f"heldout-0-{i}", bench.session.model, name=f"heldout again {i}")
        parts.append((np.asarray(drawn.reward), texts))
    texts = [[completion for _, part in parts for completion in part[p]] for p in range(len(first.texts))]
    reward = np.concatenate([part for part, _ in parts], axis=1)
    return dataclasses.replace(
        first, reward=reward, texts=texts, gold=_gold(bench, texts), log_ratio=np.zeros(reward.shape)
    )


def rounds_of(method: str, steps: int) -> int:
    """How many rounds a record plays in so many steps."""
    return get_method(method).rounds or steps


def watched(method: str, *, steps: int, every: int) -> list[int]:
    """The rounds after which a policy is read: where a checkpoint is written."""
    rounds = rounds_of(method, steps)
    return [r for r in range(1, rounds + 1) if r % every == 0 or r == rounds]


def play(bench: Bench, config: AlignConfig) -> tuple[list[Reading], dict[str, float]]:
    """Improves the policy by a method and reads it at every checkpoint; goes on from wherever it was stopped.

    Args:
      bench: The task.
      config: Of the method: record, beta, candidates, steps and learning rate; ``output`` is its directory.

    Returns:
      A reading per checkpoint, and the seconds that training and reading took.
    """
    directory, method = pathlib.Path(config.output), config.method
    directory.mkdir(parents=True, exist_ok=True)
    save_config(config, directory / "config.json")
    # The loop must know its own settings; prompts, policy and compiled functions are those of the task.
    session = dataclasses.replace(_at(bench.session, directory, method), settings=config, resume=config.resume)
    marks, clock = (
        watched(method, steps=config.steps, every=config.checkpoint_every),
        _Clock(directory / "seconds.json"),
    )

    def watch(played: int, policy: Transformer) -> None:
        clock.lap("train", played)
        _read(bench, directory, method, policy, played)
        clock.lap("read", played)

    if checkpoint.latest(directory / "checkpoints") != marks[-1]:  # It is written after the last reading.
        improve(session, watch=watch)
    kinds = ["heldout"] if bench.greedy is None else ["heldout", "heldout-greedy"]
    for path in [directory / "candidates" / f"{kind}-{played}.npz" for kind in kinds for played in marks]:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file, though training went past it; start in another --output")
    return [_read(bench, directory, method, bench.session.model, played) for played in marks], clock.total()


class _Clock:
    """Seconds between laps, kept in a file so that a run in parts has the sum of its parts."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self.start = path, time.monotonic()
        self.laps: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}

    def lap(self, what: str, played: int) -> None:
        now = time.monotonic()
        self.laps.setdefault(what, {})[str(played)] = round(now - self.start, 3)
        self.start = now
        write_text(self.path, json.dumps(self.laps, indent=2) + "\n")

    def total(self) -> dict[str, float]:
        return {what: sum(seconds.values()) for what, seconds in self.laps.items()}
