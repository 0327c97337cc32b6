"""What the arena says about claims in the literature: each a comparison of measured curves, with a verdict."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.arena.run import MEASURES, pair_laws
from experiments.arena.world import World

__all__ = ["Finding", "Results", "findings", "judge"]


@dataclasses.dataclass(frozen=True)
class Results:
    """Curves by name.

    Attributes:
      curves: Method -> ``[betas, seeds, checkpoints, MEASURES]``.
      betas: Strengths.
    """

    curves: Mapping[str, np.ndarray]
    betas: tuple[float, ...]

    def of(self, name: str, measure: str, place: int = -1) -> np.ndarray:
        """A measure at a checkpoint, ``[betas, seeds]``."""
        return self.curves[name][:, :, place, MEASURES.index(measure)]

    def change(self, name: str, measure: str) -> np.ndarray:
        """From the reference to the end, ``[betas, seeds]``."""
        return self.of(name, measure) - self.of(name, measure, 0)


@dataclasses.dataclass(frozen=True)
class Finding:
    """A claim, the numbers that bear on it, and what they say.

    Attributes:
      claim: In words.
      numbers: What was compared, and its means.
      verdict: "holds", "fails" or "mixed", with how many of the comparisons agree.
    """

    claim: str
    numbers: str
    verdict: str


def judge(cells: Mapping[str, np.ndarray]) -> str:
    """Of comparisons ``[betas, seeds]`` that the claim says are positive: one is decided where all seeds agree.

    Example:
      >>> judge({"a against b": np.array([[1.0, 2.0], [1.0, -1.0]])})
      'mixed (1 for, 0 against, 1 undecided)'
    """
    rows = np.concatenate([np.asarray(x) for x in cells.values()])
    good, bad = int((rows > 0).all(-1).sum()), int((rows < 0).all(-1).sum())
    if good == len(rows):
        return f"holds ({good} of {good})"
    if bad == len(rows):
        return f"fails ({bad} of {bad})"
    return f"mixed ({good} for, {bad} against, {len(rows) - good - bad} undecided)"


def _finding(claim: str, what: str, cells: dict[str, np.ndarray]) -> Finding | None:
    if not cells:
        return None
    each = "; ".join(f"{name} {', '.join(f'{v:+.2f}' for v in x.mean(-1))}" for name, x in cells.items())
    return Finding(claim=claim, numbers=f"{what}: {each}", verdict=judge(cells))


def _closer(results: Results, pairs: list[tuple[str, str]]) -> dict[str, np.ndarray]:
    """How many times nearer to the tilt the first ends than the second, as a logarithm, for pairs that were run."""
    return {
        f"{a} / {b}": np.log(results.of(b, "to_tilt") / results.of(a, "to_tilt"))
        for a, b in pairs
        if {a, b} <= set(results.curves)
    }


def _each(results: Results, names: list[str], measure: Callable[[str], np.ndarray]) -> dict[str, np.ndarray]:
    return {name: measure(name) for name in names if name in results.curves}


def _between(results: Results, pairs: list[tuple[str, str]], measure: str) -> dict[str, np.ndarray]:
    return {
        f"{a} - {b}": results.of(a, measure) - results.of(b, measure) for a, b in pairs if {a, b} <= set(results.curves)
    }


def findings(results: Results, world: World) -> list[Finding]:
    """All claims whose methods were run."""
    laws = [np.asarray(world.tilt(beta), np.float64) for beta in results.betas]
    entropy = np.array([-(np.exp(law) * law).sum(-1).mean() for law in laws])[:, None]
    ratio = "log of the ratio of the distances to the tilt, at each beta"
    online = [
        ("online_tilted_mle", "tilted_mle"),
        ("online_var_importance", "var_importance"),
        ("online_dpo", "dpo"),
        ("online_ipo", "ipo"),
    ]
    moving = [("tr_dpo_soft", "dpo"), ("tr_dpo_hard", "dpo"), ("grpo_prorl", "grpo")]
    judged: list[Any] = [
        _finding("At equal samples, on-policy ends nearer the optimum than offline with the same loss.", ratio,
                 _closer(results, online)),
        _finding("Four rounds of fresh candidates already help.", ratio,
                 _closer(results, [("iterated_tilted_mle", "tilted_mle")])),
        _finding("Candidates of the last round's policy are as good as fresh ones (at this learning rate).",
                 f"0.1 less the absolute {ratio}",
                 {k: 0.1 - np.abs(x) for k, x in _closer(results, [("rloo", "rloo_stale")]).items()}),
        _finding("Losses that push down bad candidates get further than weighted likelihood on the same samples.",
                 ratio, _closer(results, [("rloo", "online_tilted_mle"), ("rloo", "online_var_importance"),
                                          ("dr_grpo", "online_tilted_mle")])),
        _finding("Four gradient steps per batch get further than one.", ratio,
                 _closer(results, [("grpo_4_epochs", "grpo")])),
        _finding("Not dividing advantages by their standard deviation ends nearer the tilt.", ratio,
                 _closer(results, [("dr_grpo", "grpo")])),
        _finding("DPO lowers the likelihood of the chosen completions (displacement).",
                 "fall of the mean log-probability of the chosen, nats",
                 _each(results, ["dpo", "ipo", "simpo"], lambda n: -results.change(n, "chosen"))),
        _finding("... while the margin grows.", "growth of chosen less rejected, nats",
                 _each(results, ["dpo", "ipo", "simpo"],
                       lambda n: results.change(n, "chosen") - results.change(n, "rejected"))),
        _finding("DPO-positive and the likelihood term prevent the displacement.", "what they save against DPO, nats",
                 _between(results, [("dpop", "dpo"), ("dpo_nll", "dpo")], "chosen")),
        _finding("The exact optimum lowers it too, and by more than DPO does.",
                 "chosen under DPO less chosen under the tilt, nats",
                 {"dpo - tilt": results.of("dpo", "chosen") - _chosen(world, laws)} if "dpo" in results.curves else {}),
        _finding("Rewards from the policy itself collapse the entropy below the tilt's.",
                 "tilt's entropy less the policy's, nats",
                 _each(results, ["self_certainty", "token_entropy", "empo", "ttrl"],
                       lambda n: entropy - results.of(n, "entropy"))),
        _finding("So does best-of-N imitation, round after round.", "tilt's entropy less the policy's, nats",
                 _each(results, ["raft"], lambda n: entropy - results.of(n, "entropy"))),
        _finding("Clip-higher keeps more entropy than the symmetric clip.", "difference of the entropies, nats",
                 _between(results, [("dapo_4_epochs", "grpo_4_epochs")], "entropy")),
        _finding("A reference that follows lets the policy go further.", "difference of the KLs to the start, nats",
                 _between(results, moving, "kl")),
        _finding("... and past the optimum of the reference that it began with.",
                 "difference of the distances to the tilt, nats",
                 _between(results, moving, "to_tilt")),
        _finding("Safe RLHF keeps the mean cost below that of PPO.", "PPO's cost less its own",
                 _between(results, [("ppo", "safe_rlhf")], "cost")),
        _finding("VAR as printed is farther from the tilt than its importance-weighted form.", ratio,
                 _closer(results, [("var_importance", "var")])),
    ]  # fmt: skip
    return [found for found in judged if found is not None]


def _chosen(world: World, laws: list[np.ndarray]) -> np.ndarray:
    chosen = pair_laws(world)[0].astype(np.float64)
    return np.array([(chosen * law).sum(-1).mean() for law in laws])[:, None]
