"""Plots, table and page of `experiments.arena`."""

import json
import pathlib
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

from experiments.arena.claims import Finding, Results, findings
from experiments.arena.run import MEASURES, Budget
from experiments.arena.world import World
from experiments.common.plots import STYLE
from tiltjax.train.config import write_text
from tiltjax.train.methods import FAMILIES

__all__ = ["ranking", "write"]

COLOURS = {
    "likelihood": "#0072B2",
    "preference": "#D55E00",
    "policy_gradient": "#009E73",
    "game": "#CC79A7",
    "internal": "#E69F00",
}
MARKERS = ("o", "s", "^", "D", "v")
_FAMILY = {method.name: family for family, methods in FAMILIES.items() for method in methods}


def write(directory: pathlib.Path, world: World, budget: Budget, found: list[dict[str, Any]]) -> str:
    """Writes ``report.md``, ``results.json`` and the plots; returns the table."""
    results = Results(curves={r["name"]: np.array(r["curves"]) for r in found}, betas=budget.betas)
    told = findings(results, world)
    directory.mkdir(parents=True, exist_ok=True)
    figures = {
        "frontier": _frontier(world, results),
        "distance": _distance(results, found),
        "claims": _behaviour(world, results, found),
    }
    for name, figure in figures.items():
        figure.savefig(directory / f"{name}.png")
        plt.close(figure)
    rows = ranking(results, found)
    table = _table(rows, budget.betas)
    write_text(directory / "results.json", json.dumps(_summary(rows, told, results), indent=1) + "\n")
    write_text(directory / "report.md", _page(world, budget, results, table, told))
    return table


def ranking(results: Results, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per method, nearest to the tilt first: by the share of the reference's distance that is left.

    The share is a geometric mean over strengths and seeds: 1 is where everybody started, 0 the tilt.
    """
    rows = []
    for record in found:
        name = record["name"]
        start, end = results.of(name, "to_tilt", 0), np.maximum(results.of(name, "to_tilt"), 1e-9)
        own, begun = results.of(name, "to_optimum"), results.of(name, "to_optimum", 0)
        rows.append(
            {
                "name": name,
                "family": _FAMILY[name],
                "schedule": record["schedule"],
                "feedback": record["feedback"],
                "optimum": record["optimum"],
                "share": float(np.exp(np.mean(np.log(end / start)))),
                "own_share": float(np.exp(np.mean(np.log(np.maximum(own, 1e-9) / begun)))),
                "to_tilt": end.mean(1).tolist(),
                "to_tilt_range": [[float(x.min()), float(x.max())] for x in end],
                "reward": results.of(name, "reward").mean(1).tolist(),
                "kl": results.of(name, "kl").mean(1).tolist(),
                "entropy": results.of(name, "entropy").mean(1).tolist(),
                "steps": record["steps"][-1],
            }
        )
    return sorted(rows, key=lambda row: row["share"])


def _table(rows: list[dict[str, Any]], betas: tuple[float, ...]) -> str:
    head = "| method | drawn | learns from | gap left | " + " | ".join(f"KL to tilt, beta {b:g}" for b in betas)
    lines = [f"{head} | reward | KL to ref | own optimum |", "|" + " --- |" * (7 + len(betas))]
    for row in rows:
        cells = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, (low, high) in
                 zip(row["to_tilt"], row["to_tilt_range"], strict=True)]  # fmt: skip
        own = {"tilt": "tilt", "none": "-"}.get(row["optimum"], f"{row['optimum']}: {row['own_share']:.2f} left")
        lines.append(
            f"| {row['name']} | {row['schedule']} | {row['feedback']} | {row['share']:.2f} | {' | '.join(cells)} | "
            f"{', '.join(f'{x:.2f}' for x in row['reward'])} | {', '.join(f'{x:.2f}' for x in row['kl'])} | {own} |"
        )
    return "\n".join(lines)


def _optima(world: World, betas: Any) -> np.ndarray:
    """Reward and KL of the tilt, ``[betas, 2]``."""
    out = []
    for beta in betas:
        law = np.asarray(world.tilt(float(beta)), np.float64)
        p = np.exp(law)
        out.append([(p * world.reward).sum(-1).mean(), (p * (law - world.ref_logp)).sum(-1).mean()])
    return np.array(out)


def _frontier(world: World, results: Results) -> Any:
    with plt.rc_context(STYLE | {"figure.figsize": (9.0, 6.0)}):
        figure, axes = plt.subplots()
        curve = _optima(world, np.geomspace(50, 0.04, 120))
        axes.plot(curve[:, 1], curve[:, 0], color="black", lw=1.5, zorder=1, label="the tilt, every beta (exact)")
        goals = _optima(world, results.betas)
        for i, beta in enumerate(results.betas):
            axes.plot(goals[i, 1], goals[i, 0], "*", ms=15, color="black", mec="white", zorder=5)
            axes.annotate(f"beta {beta:g}", (goals[i, 1], goals[i, 0]), textcoords="offset points", xytext=(-8, 9),
                          ha="right")  # fmt: skip
        for name in results.curves:
            reward, kl = (results.of(name, m) for m in ("reward", "kl"))
            for i in range(len(results.betas)):
                x, y = kl[i].mean(), reward[i].mean()
                spread = [[[m - v[i].min()], [v[i].max() - m]] for m, v in ((x, kl), (y, reward))]
                axes.errorbar(x, y, xerr=spread[0], yerr=spread[1], fmt=MARKERS[i], ms=5, lw=0.7, alpha=0.85,
                              color=COLOURS[_FAMILY[name]])  # fmt: skip
            axes.annotate(name, (kl[-1].mean(), reward[-1].mean()), fontsize=6, textcoords="offset points",
                          xytext=(4, -5), color=COLOURS[_FAMILY[name]])  # fmt: skip
        for family in {_FAMILY[name]: None for name in results.curves}:
            axes.plot([], [], "o", color=COLOURS[family], label=family.replace("_", " "))
        for i, beta in enumerate(results.betas):
            axes.plot([], [], MARKERS[i], color="0.4", label=f"trained at beta {beta:g}")
        axes.set_xscale("function", functions=(np.sqrt, np.square))  # Linear in the distance that KL is a square of.
        axes.set_xticks([0, 0.1, 0.5, 1, 2, 4, 6, 8, 10])
        axes.set_xlim(0, max(1.0, 1.1 * max(results.of(n, "kl").max() for n in results.curves)))
        axes.set_xlabel("exact KL(policy || reference), nats")
        axes.set_ylabel("exact expected reward")
        axes.legend(fontsize=8, loc="lower right")
    return figure


def _distance(results: Results, found: list[dict[str, Any]]) -> Any:
    middle = len(results.betas) // 2
    cycle = mpl.cycler(color=list(mpl.colormaps["tab20"].colors))  # type: ignore[attr-defined]
    with plt.rc_context(STYLE | {"figure.figsize": (11.0, 3.6 * 2), "axes.prop_cycle": cycle}):
        figure, axes = plt.subplots(2, 5, sharey=True, squeeze=False)
        for record in found:
            name = record["name"]
            column = list(COLOURS).index(_FAMILY[name])
            curve = results.curves[name][middle, :, :, MEASURES.index("to_tilt")]
            for row, at in enumerate(("samples", "steps")):
                line = axes[row, column].plot(record[at], curve.mean(0), lw=1.1, label=name)
                axes[row, column].fill_between(record[at], curve.min(0), curve.max(0), alpha=0.15,
                                               color=line[0].get_color())  # fmt: skip
        for column, family in enumerate(COLOURS):
            axes[0, column].set_title(family.replace("_", " "), color=COLOURS[family])
            for row, at in enumerate(("samples", "gradient steps")):
                axes[row, column].set_yscale("log")
                axes[row, column].set_xlabel(at)
                if row == 0 and axes[row, column].lines:
                    axes[row, column].legend(fontsize=5, ncol=2)
        for row in range(2):
            axes[row, 0].set_ylabel(f"KL(policy || tilt), beta {results.betas[middle]:g}")
    return figure


def _behaviour(world: World, results: Results, found: list[dict[str, Any]]) -> Any:
    middle = len(results.betas) // 2
    steps = {record["name"]: record["samples"] for record in found}
    beta = results.betas[middle]
    law = np.asarray(world.tilt(beta), np.float64)
    with plt.rc_context(STYLE | {"figure.figsize": (10.0, 3.6)}):
        figure, axes = plt.subplots(1, 3)
        for name in ("dpo", "dpop", "dpo_nll", "online_dpo"):
            if name in steps:
                chosen, rejected = (
                    results.curves[name][middle, :, :, MEASURES.index(m)].mean(0) for m in ("chosen", "rejected")
                )
                line = axes[0].plot(steps[name], chosen - chosen[0], label=name)
                axes[0].plot(steps[name], rejected - rejected[0], ls=":", color=line[0].get_color())
        axes[0].set_ylabel("change of log-probability, nats\n(chosen solid, rejected dotted)")
        for name in ("rloo", "grpo", "grpo_4_epochs", "dapo_4_epochs", "self_certainty", "ttrl", "raft"):
            if name in steps:
                axes[1].plot(steps[name], results.curves[name][middle, :, :, MEASURES.index("entropy")].mean(0),
                             label=name)  # fmt: skip
        axes[1].axhline(-(np.exp(law) * law).sum(-1).mean(), color="black", ls="--", lw=1, label="the tilt")
        axes[1].set_ylabel("entropy, nats")
        for name in ("dpo", "tr_dpo_soft", "tr_dpo_hard", "grpo", "grpo_prorl"):
            if name in steps:
                axes[2].plot(steps[name], results.curves[name][middle, :, :, MEASURES.index("kl")].mean(0), label=name)
        axes[2].axhline((np.exp(law) * (law - world.ref_logp)).sum(-1).mean(), color="black", ls="--", lw=1,
                        label="the tilt")  # fmt: skip
        axes[2].set_ylabel("KL(policy || first reference), nats")
        for axis in axes:
            axis.set_xlabel(f"samples (beta {beta:g})")
            if axis.get_legend_handles_labels()[1]:
                axis.legend(fontsize=7)
    return figure


def _page(world: World, budget: Budget, results: Results, table: str, told: list[Finding]) -> str:
    K, c = len(world.space.completion), world.config
    claims = "\n".join(f"| {f.claim} | {f.numbers} | {f.verdict} |" for f in told)
    return "\n\n".join(
        [
            "# The arena",
            f"{len(results.curves)} methods on one task: {c.num_prompts} prompts with {K} completions each (at most "
            f"{c.max_tokens} tokens of {c.vocab_size}), a transformer of two layers and width {c.width}, "
            f"{budget.updates * budget.samples} samples per run in {budget.updates} mini-batches of {budget.samples}, "
            f"Adam at {budget.learning_rate:g}, {budget.seeds} seeds. All numbers are sums over every completion: "
            "nothing is estimated. Rewards have mean 0 and standard deviation 1 under the reference.",
            "![reward against KL](frontier.png)",
            "The black curve is the optimum of E reward - beta KL for every beta; nothing can lie above it. Stars are "
            "the optima of the strengths that were trained; each method's marks should lie on the star of their shape.",
            "## Distance to the optimum",
            "`gap left` is the share of the reference's KL(policy || tilt) that is left at the end, a geometric mean "
            "over strengths and seeds: 0 is the optimum, 1 is no progress, above 1 is harm. beta times KL(policy || "
            "tilt) is the objective's gap. In brackets: smallest and largest of the seeds. `own optimum` says what "
            'methods tend to whose optimum is another one; "-" where there is none, or one that moves.',
            table,
            "![distance to the tilt](distance.png)",
            "## Claims",
            "A comparison is decided where all seeds agree. Numbers are means over seeds at each beta, "
            f"{', '.join(f'{b:g}' for b in results.betas)}.",
            f"| claim | numbers | verdict |\n| --- | --- | --- |\n{claims}" if told else "Too few methods were run.",
            "![what policies do on the way](claims.png)",
        ]
    ) + "\n"  # fmt: skip


def _summary(rows: list[dict[str, Any]], told: list[Finding], results: Results) -> dict[str, Any]:
    return {
        "betas": list(results.betas),
        "methods": [{k: _short(v) for k, v in row.items()} for row in rows],
        "claims": [vars(found) for found in told],
    }


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 5)
    return [_short(x) for x in value] if isinstance(value, list) else value
