"""Tables, thresholds, plots and `report.md` of `experiments.generation_verification_gap`."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from experiments.common.launch import command
from experiments.common.plots import STYLE, plt
from experiments.generation_verification_gap.world import Task
from tiltjax.train.config import write_text

__all__ = ["THRESHOLDS", "Threshold", "Verdict", "caveats", "judge", "save", "write"]

CHANCE = float(np.log(2))

STAGES = {
    "sft": ("SFT", "#000000"),
    "dpo": ("DPO, offline", "#999999"),
    "online_dpo": ("online on DPO's reward", "#E69F00"),
    "online_local": ("online on the local reward", "#56B4E9"),
    "online_global": ("online on the global reward", "#D55E00"),
    "online_gold": ("online on the gold reward", "#009E73"),
}
"""Policies in the order of the plot, with their words and colours (Okabe and Ito, 2008)."""


@dataclasses.dataclass(frozen=True)
class Threshold:
    """What a figure was held to before these seeds were run.

    Attributes:
      task: As on the command line.
      quantity: A list of `experiments.generation_verification_gap.__main__.differences`.
      of_mean: Hold the mean over seeds to it, not every seed.
      low: Lower bound.
      high: Upper bound.
    """

    task: str
    quantity: str
    of_mean: bool
    low: float = -np.inf
    high: float = np.inf

    def __str__(self) -> str:
        if np.isinf(self.high):
            bound = f">= {self.low:g}"
        else:
            bound = f"<= {self.high:g}" if np.isinf(self.low) else f"in [{self.low:g}, {self.high:g}]"
        return f"{QUANTITIES[self.quantity]}, {'mean' if self.of_mean else 'each seed'} {bound}"


QUANTITIES = {
    "nll_gap": "NLL(local) - NLL(global)",
    "best_of_64_gap": "best-of-64 by global - by local",
    "delta_verifier": "J(online on global) - J(online on local)",
}

THRESHOLDS = (
    Threshold("subset8:2000", "nll_gap", of_mean=False, low=0.02),
    Threshold("subset8:2000", "best_of_64_gap", of_mean=False, low=0.25),
    Threshold("subset8:2000", "delta_verifier", of_mean=False, low=0.05),
    Threshold("subset8:2000", "delta_verifier", of_mean=True, low=0.08),
    Threshold("subset1:2000", "delta_verifier", of_mean=False, low=-0.02, high=0.02),
    Threshold("subset1:2000", "delta_verifier", of_mean=True, low=-0.01, high=0.01),
    Threshold("lookup8p16:4000", "delta_verifier", of_mean=True, high=0.04),
)
"""The gap at eight tokens, its absence at one, and no gain where the reward is as hard to learn as the policy."""


REMARKS = {
    "unlearned": "A reward model has learned less than a third of what there is to learn (global and local), so that "
    "the gap is no evidence for or against the hypothesis",
    "reversed": "The verifier is worth less than the local reward in every seed",
    "mixed": "The sign of the verifier's worth differs between seeds",
    "readable": "The reward is one from which the policy can be read off, where no gap was expected, yet there is one "
    "in every seed",
    "control": "The online stage gains over DPO on the local reward too (beside what it gains on the global one), and "
    "that much is not the verifier's",
    "no_third_link": "That DPO's reward fits worse than the local one is not reproduced (NLL of DPO and local)",
    "bottleneck": "Online on the gold reward stops short of the optimum: the policy network is a bottleneck, not only "
    "the reward",
}
"""What `caveats` looks for."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A threshold, what was measured for it, and whether it holds."""

    threshold: Threshold
    measured: list[float]
    holds: bool


def judge(tasks: dict[str, dict[str, Any]]) -> list[Verdict]:
    """Every threshold whose task was run."""
    verdicts = []
    for threshold in THRESHOLDS:
        if threshold.task in tasks:
            values = np.array(tasks[threshold.task][threshold.quantity])
            held = np.atleast_1d(values.mean() if threshold.of_mean else values)
            holds = bool(np.all((threshold.low <= held) & (held <= threshold.high)))
            verdicts.append(Verdict(threshold=threshold, measured=held.tolist(), holds=holds))
    return verdicts


def caveats(tasks: dict[str, dict[str, Any]]) -> list[str]:
    """What does not come out as the hypothesis has it, or must be read with care: sentences, from the figures."""
    means = {
        label: {part: {k: float(np.mean(v)) for k, v in figures[part].items()} for part in ("nll", "objective")}
        for label, figures in tasks.items()
    }
    remarks: dict[str, list[str]] = {sentence: [] for sentence in REMARKS}
    for label, figures in tasks.items():
        nll, J = means[label]["nll"], means[label]["objective"]
        found = dict.fromkeys(REMARKS, "")
        if CHANCE - max(nll["global"], nll["local"]) < 0.3 * (CHANCE - nll["oracle"]):
            found["unlearned"] = (
                f"NLL {nll['global']:.3f} and {nll['local']:.3f}, gap {_mean(figures['delta_verifier'])}"
            )
        if nll["dpo"] - nll["local"] < 0.01:
            found["no_third_link"] = f"{nll['dpo']:.3f} and {nll['local']:.3f}"
        if np.mean(figures["delta_control"]) > 0.01:
            found["control"] = f"{_mean(figures['delta_control'])} of {_mean(figures['delta_dpo'])}"
        if J["optimum"] - J["online_gold"] > 0.05:
            found["bottleneck"] = f"{J['optimum'] - J['online_gold']:.3f}"
        if label.startswith("linear") and np.min(figures["delta_verifier"]) > 0:
            found["readable"] = _signed(figures["delta_verifier"])
        if np.min(figures["delta_verifier"]) < 0 < np.max(figures["delta_verifier"]):
            found["mixed"] = _signed(figures["delta_verifier"])
        if np.max(figures["delta_verifier"]) < 0 and np.mean(figures["delta_verifier"]) < -0.01:
            found["reversed"] = _signed(figures["delta_verifier"])
        for name, text in found.items():
            remarks[name] += [f"{label} ({text})"] if text else []
    return [f"{REMARKS[name]}: {'; '.join(where)}." for name, where in remarks.items() if where]


def write(directory: pathlib.Path, config: Any, results: dict[str, Any], tasks: dict[str, Task]) -> None:
    """Writes ``results.json``, the plots and ``report.md``, and prints the thresholds.

    Args:
      directory: Of the run.
      config: The run's dataclass.
      results: Of `experiments.generation_verification_gap.__main__.run`.
      tasks: By their names in the results.
    """
    verdicts = judge(results["tasks"])
    results["thresholds"] = [
        {"task": v.threshold.task, "threshold": str(v.threshold), "measured": v.measured, "holds": v.holds}
        for v in verdicts
    ]
    with plt.rc_context(STYLE):
        gap_plot(directory / "gap.png", results, tasks)
        objective_plot(directory / "objective.png", results)
    table = _verdict_table(verdicts)
    write_text(directory / "report.md", _report(config, results, table))
    save(directory, results)
    print("\n" + table + f"\n\nreport: {directory / 'report.md'}")


def save(directory: pathlib.Path, results: dict[str, Any]) -> None:
    """Writes ``results.json``; an interrupted run keeps the tasks that it has finished."""
    write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")


def gap_plot(path: pathlib.Path, results: dict[str, Any], tasks: dict[str, Task]) -> None:
    """The verifier's worth as a share of what there is to gain, against horizon and against data."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.6, 4.2), sharey=True)
    subset = {label: task for label, task in tasks.items() if task.kind == "subset"}
    usual = [task.num_pairs for task in subset.values()]
    usual_pairs = max(set(usual), key=usual.count) if usual else 0
    longest = max((task.horizon for task in subset.values()), default=0)
    panels = (
        (left, "horizon", [t for t in subset if subset[t].num_pairs == usual_pairs], "tokens per completion"),
        (right, "num_pairs", [t for t in subset if subset[t].horizon == longest], "preference pairs"),
    )
    for axis, name, labels, words in panels:
        labels = sorted(labels, key=lambda label, name=name: getattr(tasks[label], name))
        places = [getattr(tasks[label], name) for label in labels]
        values = [100 * np.array(results["tasks"][label]["normalised_gap"]) for label in labels]
        axis.plot(places, [v.mean() for v in values], color=STAGES["online_global"][1], label="subset sum (line: mean)")
        for place, value in zip(places, values, strict=True):
            axis.plot([place] * len(value), value, "o", ms=5, mfc="none", color=STAGES["online_global"][1])
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.set_xticks(places, [str(place) for place in places])
        axis.minorticks_off()
        axis.set_xlabel(words)
    others = [label for label, task in tasks.items() if task.kind != "subset"]
    colours = ["#0072B2", "#CC79A7", "#E69F00", "#009E73", "#56B4E9", "#999999"]
    for i, label in enumerate(others):
        value = 100 * np.array(results["tasks"][label]["normalised_gap"])
        place = tasks[label].horizon * 1.1 ** (1 + i)
        left.plot([place] * len(value), value, "sD^v<>"[i % 6], ms=5, mfc="none", color=colours[i % 6], label=label)
    if subset:
        left.set_title(f"{usual_pairs} pairs", fontsize=10)
        right.set_title(f"{longest} tokens", fontsize=10)
    left.set_ylabel("worth of the verifier\n(% of optimum - SFT)")
    fig.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8)
    fig.savefig(path)
    plt.close(fig)


def objective_plot(path: pathlib.Path, results: dict[str, Any]) -> None:
    """What each stage gains over SFT, as a share of what there is to gain: one panel per task, seeds as points."""
    count = len(results["tasks"])
    columns = min(count, 5)
    rows = -(-count // columns)
    size = (max(2.1 * columns + 0.6, 5.2), 2.4 * rows + 0.9)
    fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharey=True)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    for axis, (label, figures) in zip(axes.flat, results["tasks"].items(), strict=False):
        J = {name: np.array(values) for name, values in figures["objective"].items()}
        for i, (name, (words, colour)) in enumerate(STAGES.items()):
            if name != "sft":
                share = 100 * (J[name] - J["sft"]) / (J["optimum"] - J["sft"])
                axis.bar(i, share.mean(), color=colour, alpha=0.75, label=words)
                axis.plot(i + np.linspace(-0.2, 0.2, len(share)), share, ".", color="black", ms=3)
        axis.axhline(100, color="black", ls="--", lw=1)
        axis.set_title(label, fontsize=9)
        axis.set_xticks([])
    for axis in axes[:, 0]:
        axis.set_ylabel("gain in J\n(% of optimum - SFT)", fontsize=9)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    fig.savefig(path)
    plt.close(fig)


def _verdict_table(verdicts: list[Verdict]) -> str:
    if not verdicts:
        return "No threshold was stated for these tasks."
    rows = [
        [v.threshold.task, str(v.threshold), _signed(v.measured), "holds" if v.holds else "**fails**"] for v in verdicts
    ]
    return _table(["task", "threshold", "measured", "verdict"], rows)


def _report(config: Any, results: dict[str, Any], verdicts: str) -> str:
    tasks, recipe = results["tasks"], results["recipe"]
    nll = [[label, *(_mean(t["nll"][k]) for k in ("oracle", "global", "local", "dpo"))] for label, t in tasks.items()]
    J = [[label, *(_mean(t["objective"][k]) for k in (*STAGES, "optimum"))] for label, t in tasks.items()]
    gaps = [
        [label, _signed(t["delta_verifier"]), f"{100 * np.mean(t['normalised_gap']):+.1f}%", _signed(t["delta_dpo"]),
         _signed(t["delta_control"])] for label, t in tasks.items()
    ]  # fmt: skip
    others = [
        [label, *(_mean(t["best_of_64"][k]) for k in ("global", "local", "dpo", "oracle")),
         ", ".join(f"{x:.3f}" for x in t["win_rate"])] for label, t in tasks.items()
    ]  # fmt: skip
    twin = [
        [str(t["horizon"]), f"{t['global_dimension']:.0f} / {t['local_dimension']:.0f}",
         f"{t['global_excess']:.2f} / {t['local_excess']:.2f}", f"{t['online_kl']:.1f} ({t['online_law']:.1f})",
         f"{t['offline_kl']:.1f} ({t['offline_law']:.1f})"] for t in results["twin"]
    ]  # fmt: skip
    parts = [
        "# The generation-verification gap in miniature",
        "Binary tokens, every completion of a prompt listed, so that J = E reward - beta KL(policy || SFT) is exact "
        f"(beta {recipe['beta']:g}, {recipe['num_test_prompts']} fresh prompts). One network (two hidden layers of "
        f"{recipe['width']}), one supervised checkpoint, one optimizer, batches and early stopping for everything. "
        "From the same preferences of the SFT policy, labelled by Bradley-Terry with the gold reward, it learns a "
        "*global* reward (a scalar of the complete completion), a *local* one (a policy's log-likelihood), and DPO. "
        "*Online* climbs J under a learned reward on the training prompts, exactly. What the verifier is worth is "
        "J(online on global) - J(online on local): the same stage on either reward. Against DPO alone, the gain of "
        "more optimisation would be counted too.",
        f"Seeds {', '.join(map(str, results['seeds']))}.",
        "## Thresholds",
        "Fixed on another implementation of this setting before these worlds were run; there, fresh seeds had missed "
        "tighter bounds for subset1 and a two-sided one for lookup8p16, which were loosened to these. How the network "
        "is shown the prefix was chosen here, after the reward models' test loss on subset8 with seeds 0 and 1. The "
        "result depends on it: where the prefix is bare bits (subsetbits8 with --tasks=controls) the scalar reward is "
        "no easier to learn than the policy, and there is no gap. Other seeds are the better witness.",
        verdicts,
        "![worth of the verifier](gap.png)",
        "## The verifier's worth, by seed",
        _table(["task", "J(online on global) - J(online on local)", "of optimum - SFT", "J(online on global) - J(DPO)",
                "J(online on local) - J(DPO)"], gaps),
        "## J, mean over seeds",
        _table(["task", *(words for words, _ in STAGES.values()), "optimum"], J),
        "![objective by stage](objective.png)",
        "## Test loss of the reward models, nats per pair",
        f"Chance is {CHANCE:.3f}; the true reward's own loss is in the second column.",
        _table(["task", "true reward", "global", "local", "DPO"], nll),
        "## Gold reward of the best of 64 by each model, and win rate",
        "By the exact law of best-of-64 from the SFT policy. The win rate is of online-on-global against DPO, judged "
        "by Bradley-Terry with the gold reward, whose noise keeps it near one half.",
        _table(["task", "global", "local", "DPO", "true reward", "win rate by seed"], others),
        "## What does not fit, and what to read with care",
        "\n".join(f"* {sentence}" for sentence in caveats(tasks)) or "Nothing was found.",
        "## The exact twin",
        "No networks: one prompt, maximum likelihood over tables (`tiltjax.exact.gap`), reward -|ones - 2H/3|, beta 1, "
        "8000 pairs of the uniform policy, means of 20 data sets. A verifier counts ones; a generator is a free "
        "policy. All figures are times the number of pairs; the excess loss tends to half the dimension, and the law "
        "of the KL is in brackets. At one token both classes are the same.",
        _table(["tokens", "dimension, verifier / generator", "excess loss, verifier / generator",
                "KL of online to the optimum (law)", "KL of offline to the optimum (law)"], twin),
        "## Setting",
        "subsetH: prompt (w, T), w uniform on [0.2, 1]^H, T between 0.1 and 0.9 of their sum; reward -4 |sum of the "
        "chosen w - T|; the network is shown the prefix as the weights it has chosen (subsetbitsH: as bits). linearH: "
        "tokens of value +-(x U)_h, x normal in 6 dimensions. lookupHpP: matches with one of P hidden completions. "
        "Tasks are named with their number of preference pairs. References: Swamy et al., 2025, arXiv:2503.01067.",
        f"```\n{command('generation_verification_gap', config)}\n```",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def _signed(values: list[float]) -> str:
    return ", ".join(f"{value:+.3f}" for value in values)


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.3f}"
