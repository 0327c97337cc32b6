"""Plots, tables and `report.md` of a run."""

import dataclasses
import json
import pathlib
from typing import Any

import jax
import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

from experiments.align_law import described
from experiments.launch import command
from tiltjax.tilt.weights import tilt
from tiltjax.train.config import write_text
from tiltjax.train.evaluate import Point, PromptEstimates

__all__ = ["COLOURS", "STYLE", "frontier_table", "verdict", "write"]

COLOURS = {
    "reference": "#000000",
    "soft_best_of_n": "#0072B2",
    "best_of_n": "#56B4E9",
    "tilt": "#999999",
    "tuned": "#D55E00",
}
"""One palette (Okabe and Ito, 2008: safe for colour-blind readers)."""

STYLE: dict[Any, Any] = {
    "figure.figsize": (6.4, 4.2),
    "figure.dpi": 130,
    "figure.constrained_layout.use": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "font.size": 10,
}


def write(
    directory: pathlib.Path,
    config: Any,
    results: dict,
    samples: list[dict],
    *,
    reward: np.ndarray,
    train: PromptEstimates,
) -> None:
    """Writes ``results.json``, the plots and ``report.md``, and prints the table.

    Args:
      directory: Of the run.
      config: The run's dataclass.
      results: Of `experiments.align.compare`.
      samples: One mapping per held-out prompt: the prompt, and per policy ``(completion, reward)``.
      reward: Of the candidates of the training prompts, ``[P, N]``.
      train: Estimates from them.
    """
    write_text(directory / "results.json", json.dumps(_plain(results), indent=2) + "\n")
    with plt.rc_context(STYLE):
        frontier_plot(directory / "frontier.png", config, results)
        ess_plot(directory / "ess.png", config, reward, train)
    table = frontier_table(results)
    write_text(directory / "report.md", _report(config, results, samples, table, train))
    print("\n" + table + "\n")
    print(verdict(results))
    print(f"\nreport: {directory / 'report.md'}")


def frontier_table(results: dict) -> str:
    """Policies on the held-out prompts as a Markdown table, 95% intervals in brackets."""
    rows = ["| policy | reward | KL to the reference, nats |", "| --- | --- | --- |"]
    points = results["points"]
    shown = [*points["reference"], *points["soft_best_of_n"][1:], *points["best_of_n"][-1:]]
    for point in [*shown, *points.get("tuned", [])]:
        name = point.name if point.strength is None else f"{point.name}, N = {point.strength}"
        rows.append(f"| {name} | {point.reward} | {point.kl} |")
    rows.append(
        f"| the tilt itself (theory, importance-weighted) | {results['tilted_reward']} | {results['tilt_kl']} |"
    )
    return "\n".join(rows)


def frontier_plot(path: pathlib.Path, config: Any, results: dict) -> None:
    """Reward against KL: theory as lines, policies as markers."""
    fig, ax = plt.subplots()
    points = results["points"]

    def xy(name: str) -> tuple[np.ndarray, np.ndarray]:
        return np.array([p.kl.mean for p in points[name]]), np.array([p.reward.mean for p in points[name]])

    ax.plot(*xy("tilt"), color=COLOURS["tilt"], lw=2, label="tilt, every beta (importance-weighted)", zorder=1)
    ax.plot(*xy("best_of_n"), "--", marker="s", ms=4, color=COLOURS["best_of_n"], label="best-of-N")
    ax.plot(*xy("soft_best_of_n"), "-", marker="o", ms=4, color=COLOURS["soft_best_of_n"],
            label=f"soft best-of-N, beta = {config.report_beta:g}")  # fmt: skip
    for point in points["soft_best_of_n"]:
        place = (point.kl.mean, point.reward.mean)
        ax.annotate(str(point.strength), place, textcoords="offset points", xytext=(4, -11), fontsize=8)
    ax.plot([results["tilt_kl"].mean], [results["tilted_reward"].mean], "d", color=COLOURS["tilt"], mec="black", ms=8,
            label=f"tilt at beta = {config.report_beta:g}")  # fmt: skip
    for name in ("reference", "tuned"):
        for point in points.get(name, []):
            ax.errorbar(point.kl.mean, point.reward.mean, yerr=_bars(point.reward), xerr=_bars(point.kl), fmt="*",
                        ms=13 if name == "tuned" else 9, color=COLOURS[name], capsize=3,
                        label="reference" if name == "reference" else f"tuned: {point.name}", zorder=3)  # fmt: skip
    ax.set_xlabel("KL to the reference (nats per completion)")
    ax.set_ylabel(f"held-out reward ({config.reward})")
    ax.legend(fontsize=8)
    fig.savefig(path)
    plt.close(fig)


def ess_plot(path: pathlib.Path, config: Any, reward: np.ndarray, train: PromptEstimates) -> None:
    """How many candidates the weights rest on: over prompts at this beta, and on average against beta."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.2))
    N = config.num_candidates
    left.hist(train.ess, bins=np.linspace(1, N, 20), color=COLOURS["soft_best_of_n"])
    left.axvline(float(np.mean(train.ess)), color="black", lw=1, ls="--", label=f"mean {np.mean(train.ess):.1f}")
    left.set_xlabel(f"effective sample size (of N = {N})")
    left.set_ylabel("training prompts")
    left.legend()
    betas = np.geomspace(config.report_beta / 20, config.report_beta * 20, 41)
    sizes = np.asarray(jax.jit(jax.vmap(lambda b: tilt(reward, beta=b).ess))(betas))
    low, high = np.quantile(sizes, [0.1, 0.9], axis=1)
    right.fill_between(betas, low, high, color=COLOURS["soft_best_of_n"], alpha=0.2, lw=0, label="8 of 10 prompts")
    right.plot(betas, sizes.mean(axis=1), color=COLOURS["soft_best_of_n"], label="mean over prompts")
    right.axvline(config.report_beta, color="black", lw=1, ls="--", label=f"beta = {config.report_beta:g}")
    right.set_xscale("log")
    right.set_xlabel("beta (reward units)")
    right.set_ylabel("effective sample size")
    right.legend(fontsize=8)
    fig.savefig(path)
    plt.close(fig)


def _bars(interval: Any) -> np.ndarray:
    return np.array([[interval.mean - interval.low], [interval.high - interval.mean]])


def verdict(results: dict) -> str:
    """What the run says about the optimum and the tuned policy, one sentence a line."""
    lines = [
        f"At beta = {results['report_beta']:g}, beta log Z = {results['optimum']}, an estimate of the best "
        "reward - beta KL that any policy can reach."
    ]
    if "improvement" in results:
        gain = results["improvement"]
        sure = "the interval excludes 0" if gain.low > 0 else "the interval does not exclude 0"
        lines.append(f"reward - beta KL of the tuned policy = {results['objective']}.")
        lines.append(f"Held-out reward, tuned minus reference: {gain} ({sure}).")
    return "\n".join(lines)


def _report(config: Any, results: dict, samples: list[dict], table: str, train: PromptEstimates) -> str:
    parts = [
        f"# {config.policy} tilted towards {config.reward} by {config.method}",
        f"p*(y|x) = ref(y|x) exp(reward / {config.report_beta:g}) / Z(x), N = {config.num_candidates} candidates per "
        f"prompt, {config.num_prompts} training and {config.num_eval_prompts} held-out prompts, completions of at most "
        f"{config.max_tokens} tokens.",
        f"Settings: {results['settings']}.",
        _law(config, results),
        "## Held-out prompts",
        table,
        verdict(results),
        "Intervals are 95% bootstrap intervals over prompts. Soft best-of-N is evaluated by its exact finite-N law, "
        "with the observed candidates of each prompt as the reference; best-of-N by the unbiased expected maximum, at "
        "the KL log N - (N-1)/N that holds without ties; the tilt by self-normalised importance weights, with the 1/N "
        "bias of log Z removed by the jackknife.",
        "![reward against KL](frontier.png)",
        "## How far the weights can be trusted",
        f"Training prompts: mean effective sample size {np.mean(train.ess):.2f} of {config.num_candidates}, smallest "
        f"{np.min(train.ess):.2f}; mean log Z {np.mean(train.log_z):.3f} plain, "
        f"{np.mean(train.log_z_jackknife):.3f} jackknife. " + _tails(train.pareto_k),
        "![effective sample size](ess.png)",
        "## Samples",
        "The first candidate of each policy (for soft best-of-N, the one it draws from the reference's candidates).",
    ]
    for sample in samples[:12]:
        lines = [f"**{sample['prompt']}**", ""]
        for name, value in sample.items():
            if name != "prompt":
                completion = " ".join(value[0].split())
                lines.append(f"* {name} ({value[1]:+.2f}): {completion}")
        parts.append("\n".join(lines))
    parts += ["## Command", f"```\n{command('align', config)}\n```"]
    return "\n\n".join(parts) + "\n"


def _law(config: Any, results: dict) -> str:
    drawn, read = described(config), described(config, evaluation=True)
    cut = results["truncated"]
    shares = ", ".join(f"{share:.0%} {name}" for name, share in cut.items())
    text = f"Candidates are drawn at {drawn}" + ("" if drawn == read else f", those of held-out prompts at {read}")
    if not drawn == read == "temperature 1":
        text += (
            "; the reference, the tilt, log Z and every KL are those of the law that drew, the reference's own at that "
            "temperature on the tokens that the filters left"
        )
    return f"{text}. Cut at {config.max_tokens} tokens: {shares} of the held-out completions."


def _tails(k: np.ndarray) -> str:
    if not np.isfinite(k).any():
        return "N is too small for a Pareto k of the weights (it needs more than 20 candidates)."
    return f"Pareto k of the weights is above 0.7 (not to be trusted) on {np.mean(k > 0.7):.0%} of the prompts."


def _plain(value: Any) -> Any:
    if isinstance(value, Point):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
