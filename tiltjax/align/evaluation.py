"""The numbers of a session on its held-out prompts, and their report: a table, two plots, samples."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from tiltjax.align.settings import Settings
from tiltjax.tilt.weights import tilt
from tiltjax.train import distributed
from tiltjax.train.config import write_text
from tiltjax.train.evaluate import Point, PromptEstimates

__all__ = ["COLOURS", "STYLE", "Evaluation", "frontier_table", "report", "verdict"]

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
"""How figures look: settings of matplotlib."""


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What `Session.evaluate` found; ``print`` shows its table.

    Attributes:
      settings: Of the policy that was evaluated.
      results: Points and intervals by name, as ``results.json`` has them.
      samples: One mapping per held-out prompt: the prompt, and per policy ``(completion, reward)``.
      reward: Of the candidates of the training prompts, ``[P, N]``.
      estimates: Of the tilt, from them.
      export: Writes the policy into a Hugging Face directory; None where nothing was trained.
    """

    settings: Settings
    results: dict[str, Any]
    samples: list[dict[str, Any]]
    reward: np.ndarray
    estimates: PromptEstimates
    export: Callable[[pathlib.Path], None] | None = None

    def __str__(self) -> str:
        return f"{frontier_table(self.results)}\n\n{verdict(self.results)}"

    def save(self, directory: str | os.PathLike, *, command: str = "") -> None:
        """Writes ``report.md`` with its plots and samples, ``results.json``, and the policy into ``hf/``.

        What another evaluation has written there is replaced. With several hosts all of them call this.

        Args:
          directory: Where to; it is made where it is missing.
          command: What made it, for the last line of the report; empty leaves that out.
        """
        folder = pathlib.Path(directory)
        if self.export is not None:
            self.export(folder / "hf")
        distributed.by_main(lambda: self._write(folder, command))

    def _write(self, folder: pathlib.Path, command: str) -> None:
        import matplotlib as mpl

        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "results.json", json.dumps(_plain(self.results), indent=2) + "\n")
        with mpl.rc_context(STYLE):
            frontier_plot(folder / "frontier.png", self.settings, self.results)
            ess_plot(folder / "ess.png", self.settings, self.reward, self.estimates)
        write_text(folder / "report.md", report(self, command=command))


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


def frontier_plot(path: pathlib.Path, settings: Settings, results: dict) -> None:
    """Reward against KL: theory as lines, policies as markers."""
    from matplotlib.figure import Figure

    fig = Figure()
    ax = fig.subplots()
    points = results["points"]

    def xy(name: str) -> tuple[np.ndarray, np.ndarray]:
        return np.array([p.kl.mean for p in points[name]]), np.array([p.reward.mean for p in points[name]])

    ax.plot(*xy("tilt"), color=COLOURS["tilt"], lw=2, label="tilt, every beta (importance-weighted)", zorder=1)
    ax.plot(*xy("best_of_n"), "--", marker="s", ms=4, color=COLOURS["best_of_n"], label="best-of-N")
    ax.plot(*xy("soft_best_of_n"), "-", marker="o", ms=4, color=COLOURS["soft_best_of_n"],
            label=f"soft best-of-N, beta = {settings.report_beta:g}")  # fmt: skip
    for point in points["soft_best_of_n"]:
        place = (point.kl.mean, point.reward.mean)
        ax.annotate(str(point.strength), place, textcoords="offset points", xytext=(4, -11), fontsize=8)
    ax.plot([results["tilt_kl"].mean], [results["tilted_reward"].mean], "d", color=COLOURS["tilt"], mec="black", ms=8,
            label=f"tilt at beta = {settings.report_beta:g}")  # fmt: skip
    for name in ("reference", "tuned"):
        for point in points.get(name, []):
            ax.errorbar(point.kl.mean, point.reward.mean, yerr=_bars(point.reward), xerr=_bars(point.kl), fmt="*",
                        ms=13 if name == "tuned" else 9, color=COLOURS[name], capsize=3,
                        label="reference" if name == "reference" else f"tuned: {point.name}", zorder=3)  # fmt: skip
    ax.set_xlabel("KL to the reference (nats per completion)")
    ax.set_ylabel(f"held-out reward ({settings.reward})")
    ax.legend(fontsize=8)
    fig.savefig(path)


def ess_plot(path: pathlib.Path, settings: Settings, reward: np.ndarray, train: PromptEstimates) -> None:
    """How many candidates the weights rest on: over prompts at this beta, and on average against beta."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(7.6, 3.2))
    left, right = fig.subplots(1, 2)
    N = settings.num_candidates
    left.hist(train.ess, bins=np.linspace(1, N, 20), color=COLOURS["soft_best_of_n"])
    left.axvline(float(np.mean(train.ess)), color="black", lw=1, ls="--", label=f"mean {np.mean(train.ess):.1f}")
    left.set_xlabel(f"effective sample size (of N = {N})")
    left.set_ylabel("training prompts")
    left.legend()
    betas = np.geomspace(settings.report_beta / 20, settings.report_beta * 20, 41)
    sizes = np.asarray(jax.jit(jax.vmap(lambda b: tilt(reward, beta=b).ess))(betas))
    low, high = np.quantile(sizes, [0.1, 0.9], axis=1)
    right.fill_between(betas, low, high, color=COLOURS["soft_best_of_n"], alpha=0.2, lw=0, label="8 of 10 prompts")
    right.plot(betas, sizes.mean(axis=1), color=COLOURS["soft_best_of_n"], label="mean over prompts")
    right.axvline(settings.report_beta, color="black", lw=1, ls="--", label=f"beta = {settings.report_beta:g}")
    right.set_xscale("log")
    right.set_xlabel("beta (reward units)")
    right.set_ylabel("effective sample size")
    right.legend(fontsize=8)
    fig.savefig(path)


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


def report(evaluation: Evaluation, *, command: str = "") -> str:
    """The report as Markdown, with the samples of twelve prompts."""
    settings, results, train = evaluation.settings, evaluation.results, evaluation.estimates
    parts = [
        f"# {settings.policy} tilted towards {settings.reward} by {settings.method}",
        f"p*(y|x) = ref(y|x) exp(reward / {settings.report_beta:g}) / Z(x), N = {settings.num_candidates} candidates "
        f"per prompt, {settings.num_prompts} training and {settings.num_eval_prompts} held-out prompts, completions of "
        f"at most {settings.max_tokens} tokens.",
        f"Settings: {results['settings']}.",
        _law(settings, results),
        "## Held-out prompts",
        frontier_table(results),
        verdict(results),
        "Intervals are 95% bootstrap intervals over prompts. Soft best-of-N is evaluated by its exact finite-N law, "
        "with the observed candidates of each prompt as the reference; best-of-N by the unbiased expected maximum, at "
        "the KL log N - (N-1)/N that holds without ties; the tilt by self-normalised importance weights, with the 1/N "
        "bias of log Z removed by the jackknife.",
        "![reward against KL](frontier.png)",
        "## How far the weights can be trusted",
        f"Training prompts: mean effective sample size {np.mean(train.ess):.2f} of {settings.num_candidates}, smallest "
        f"{np.min(train.ess):.2f}; mean log Z {np.mean(train.log_z):.3f} plain, "
        f"{np.mean(train.log_z_jackknife):.3f} jackknife. " + _tails(train.pareto_k),
        "![effective sample size](ess.png)",
        "## Samples",
        "The first candidate of each policy (for soft best-of-N, the one it draws from the reference's candidates).",
    ]
    for sample in evaluation.samples[:12]:
        lines = [f"**{sample['prompt']}**", ""]
        for name, value in sample.items():
            if name != "prompt":
                completion = " ".join(value[0].split())
                lines.append(f"* {name} ({value[1]:+.2f}): {completion}")
        parts.append("\n".join(lines))
    if command:
        parts += ["## Command", f"```\n{command}\n```"]
    return "\n\n".join(parts) + "\n"


def _law(settings: Settings, results: dict) -> str:
    drawn, read = settings.describe_law(), settings.describe_law(evaluation=True)
    cut = results["truncated"]
    shares = ", ".join(f"{share:.0%} {name}" for name, share in cut.items())
    text = f"Candidates are drawn at {drawn}" + ("" if drawn == read else f", those of held-out prompts at {read}")
    if not drawn == read == "temperature 1":
        text += (
            "; the reference, the tilt, log Z and every KL are those of the law that drew, the reference's own at that "
            "temperature on the tokens that the filters left"
        )
    return f"{text}. Cut at {settings.max_tokens} tokens: {shares} of the held-out completions."


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
