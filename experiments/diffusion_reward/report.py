"""Plots, table and `report.md` of `experiments.diffusion_reward`."""

import json
import pathlib
from typing import Any

import numpy as np

from experiments.common.launch import command
from experiments.common.plots import STYLE, plt
from experiments.diffusion_digits.report import image_grid
from tiltjax.train.config import write_text

__all__ = ["METHODS", "write"]

METHODS: dict[str, tuple[str, str, str]] = {
    "tilt": ("the tilt (importance-weighted)", "#999999", "-"),
    "final": ("final-sample soft best-of-N", "#56B4E9", "o"),
    "plug_in": ("per-step soft best-of-N, plug-in value", "#0072B2", "s"),
    "learned": ("per-step soft best-of-N, learned value", "#0072B2", "^"),
    "smc": ("sequential Monte Carlo", "#009E73", "D"),
    "control": ("fine-tuned on its own images, unweighted", "#000000", "v"),
    "weighted": ("importance-weighted score matching", "#D55E00", "*"),
    "resampled": ("guarded resampling and fine-tuning", "#E69F00", "P"),
    "ddpo": ("DDPO", "#CC79A7", "x"),
}
"""Name -> words, colour (Okabe and Ito, 2008) and marker."""


def write(directory: pathlib.Path, config: Any, results: dict[str, Any], images: dict[str, Any]) -> None:
    """Writes ``results.json``, the plots and ``report.md``, and prints the table."""
    write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")
    frontier_plot(directory / "frontier.png", config, results)
    last = f"KL {config.resized.targets[-1]:g}"
    rows = {k.split(",")[0]: x for k, x in images.items() if "," not in k or k.endswith(last)}
    image_grid(directory / "samples.png", rows, title=f"reward: {config.reward}; beta of the tilt at {last}")
    table = _table(results)
    parts = [
        f"# Reward-directed diffusion: {config.reward}",
        f"The reference's images have reward {results['reference']['reward']:.4f}; total variance "
        f"{results['reference']['total_variance']:.2f}, mean distance "
        f"{results['reference']['pairwise_distance']:.2f}. {results['seconds']:.0f} s of one core in all.",
        "![frontier](frontier.png)",
        table,
        "J = reward - beta KL is computed from the bound, and so is a bound from below; the tilt's, beta log Z, is the "
        "largest that any law can reach.",
        "What the KL column is: exact for the tilt and for final-sample soft best-of-N (laws on the pool of the "
        "reference's images); for soft best-of-N steps the sum over steps of E log(N weight of the one chosen); for "
        "SMC E[r / beta - log Z^] with the run's own estimate Z^; for the fine-tuned models the path KL of the reverse "
        "chain, a sum of KLs of Gaussians (in the control, all that fine-tuning costs where there "
        "is nothing to gain: what the average of the weights still carries of single batches, and what a network loses "
        "by learning from its own images). The last three bound the KL of the images from above. The last, noiseless "
        "step of every chain is the reference's.",
        "![samples](samples.png)",
        "## Command",
        f"```\n{command('diffusion_reward', config)}\n```",
    ]
    write_text(directory / "report.md", "\n\n".join(parts) + "\n")
    print(f"\n{table}\n\nreport: {directory / 'report.md'}")


def frontier_plot(path: pathlib.Path, config: Any, results: dict[str, Any]) -> None:
    """Reward against the bound on the KL, and diversity against reward."""
    with plt.rc_context(STYLE):
        fig, (left, right) = plt.subplots(1, 2, figsize=(11.0, 4.6), width_ratios=(1.35, 1))
        frontier = results["frontier"]
        words, colour, _ = METHODS["tilt"]
        left.plot(frontier["kl"], frontier["reward"], color=colour, lw=2.5, label=words, zorder=1)
        ref = results["reference"]
        left.plot([0], [ref["reward"]], "k*", ms=9, label="reference")
        right.plot([ref["reward"]], [ref["pairwise_distance"]], "k*", ms=9)
        for name, (words, colour, marker) in METHODS.items():
            points = [p for p in results["points"] if p["method"] == name]
            if name == "tilt":
                left.plot([p["kl"] for p in points], [p["reward"] for p in points], "d", color=colour, mec="k", ms=8)
                continue
            for p in points:
                label = words if p is points[0] else None
                if "curve" in p:
                    left.plot([q["kl"] for q in p["curve"]], [q["reward"] for q in p["curve"]], "-", marker=marker,
                              color=colour, ms=4, label=label)  # fmt: skip
                else:
                    left.errorbar(p["kl"], p["reward"], xerr=p["kl_se"], yerr=p["reward_se"], fmt=marker, color=colour,
                                  ms=11 if marker == "*" else 8, capsize=2, label=label)  # fmt: skip
                if name == "ddpo":
                    left.plot([k for _, k in p["log"]], [r for r, _ in p["log"]], ":", color=colour, lw=1)
                right.plot(p["reward"], p["pairwise_distance"], marker, color=colour, ms=11 if marker == "*" else 8)
        # Near the reference the frontier is a square root: on this axis, a line.
        left.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
        left.set_xlim(0, 1.1 * max(q["kl"] for p in results["points"] for q in (p, *p.get("curve", ()))))
        left.set_xticks(ticks := [t for t in (0, 0.1, 0.5, 1, 2, 3, 5, 7, 10, 20) if t < left.get_xlim()[1]], ticks)
        left.set_xlabel("KL to the reference, nats (bound from above where not exact)")
        left.set_ylabel(f"reward ({config.reward})")
        left.legend(fontsize=7)
        right.set_xlabel(f"reward ({config.reward})")
        right.set_ylabel("mean distance between images")
        fig.savefig(path)
        plt.close(fig)


def _table(results: dict[str, Any]) -> str:
    rows = [
        "| method | beta | reward | KL <= | J >= | total variance | distance | s of one core |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for p in results["points"]:
        if p["method"] == "tilt":
            rows.append(f"| **{METHODS['tilt'][0]}** | {p['beta']:.4f} | {p['reward']:.4f} | {p['kl']:.2f} | "
                        f"{p['beta'] * p['log_z']:.4f} | | | |")  # fmt: skip
            continue
        name = METHODS[p["method"]][0] + (f", N = {p['n']}" if "n" in p else "")
        rows.append(f"| {name} | {p['beta']:.4f} | {p['reward']:.4f} | {p['kl']:.2f} | {p['objective']:.4f} | "
                    f"{p['total_variance']:.2f} | {p['pairwise_distance']:.2f} | {p['seconds']:.0f} |")  # fmt: skip
    return "\n".join(rows)
