"""Grids of samples, plots and `report.md` of `experiments.diffusion_digits`."""

import json
import pathlib
from typing import Any

import numpy as np

from experiments.common.launch import command
from experiments.common.plots import STYLE, plt
from experiments.diffusion_digits.world import Images
from tiltjax.train.config import write_text

__all__ = ["image_grid", "write"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def write(
    directory: pathlib.Path,
    config: Any,
    results: dict[str, Any],
    drawn: dict[str, np.ndarray],
    label: np.ndarray,
    images: Images,
) -> None:
    """Writes ``results.json``, the plots and ``report.md``, and prints the table.

    Args:
      directory: Of the run.
      config: The run's dataclass.
      results: Of `experiments.diffusion_digits.__main__.run`.
      drawn: Images of each method.
      label: What they were meant to be.
      images: The data.
    """
    write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")
    rows = results["rows"]
    first = [np.flatnonzero(images.label == c)[:1] for c in np.unique(label)]
    data = {"data": images.image[np.concatenate(first)]}
    one = {name: image[np.unique(label, return_index=True)[1]] for name, image in drawn.items()}
    guided = {name.removeprefix("guidance, "): x for name, x in one.items() if name.startswith("guidance")}
    plain = {"N = 1": one["guidance, scale 0"]} | {
        _count(name): x for name, x in one.items() if name.endswith(", scale 1") and "best" in name
    }
    image_grid(directory / "guidance.png", data | guided, title="classifier-free guidance, scale = 1 + w")
    image_grid(directory / "candidates.png", data | plain, title="soft best-of-N of the unconditional chain, scale 1")
    figures_plot(directory / "figures.png", results)
    table = _table(rows)
    write_text(directory / "report.md", _report(config, results, table))
    print(f"\n{table}\n\nreport: {directory / 'report.md'}")


def image_grid(path: pathlib.Path, rows: dict[str, np.ndarray], *, title: str) -> None:
    """One row of images per name."""
    wide = max(len(x) for x in rows.values())
    with plt.rc_context(STYLE | {"figure.constrained_layout.use": False}):
        fig, axes = plt.subplots(len(rows), wide, figsize=(0.62 * wide + 1.5, 0.62 * len(rows) + 0.4), squeeze=False)
        for (name, image), line in zip(rows.items(), axes, strict=True):
            for ax in line:
                ax.axis("off")
            for ax, x in zip(line, image, strict=False):
                ax.imshow(np.squeeze((x + 1) / 2), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
            line[0].text(-0.25, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=9)
        fig.suptitle(title, fontsize=10)
        fig.subplots_adjust(left=1.5 / (0.62 * wide + 1.5), right=0.99, bottom=0.01, wspace=0.06, hspace=0.06,
                            top=1 - 0.4 / (0.62 * len(rows) + 0.4))  # fmt: skip
        fig.savefig(path)
        plt.close(fig)


def figures_plot(path: pathlib.Path, results: dict[str, Any]) -> None:
    """Accuracy and diversity against N and against the scale, learned and exact."""
    rows = results["rows"]
    scales = {float(name.split()[-1]): row for name, row in rows.items() if name.startswith("guidance")}
    unguided = {1: rows["guidance, scale 0"]}
    plain = unguided | {int(_count(n).split()[-1]): r for n, r in rows.items() if "best" in n and n.endswith("scale 1")}
    better = {int(_count(n).split()[-1]): r for n, r in rows.items() if n.endswith("(N - 1)")}
    with plt.rc_context(STYLE):
        fig, axes = plt.subplots(2, 2, figsize=(8.2, 6.0), sharex="col")
        for line, (kind, exact, ylabel) in zip(
            axes,
            (("accuracy", "exact_bayes_accuracy", "drawn as asked (share)"),
             ("pairwise_distance", "exact_pairwise_distance", "distance within a class")),
            strict=True,
        ):  # fmt: skip
            for key, colour, words in ((kind, COLOURS[0], "learned"), (exact, COLOURS[1], "exact, PCA-16")):
                # Distances have their own unit: in shares of what guidance of scale 1 has.
                unit = 1.0 if kind == "accuracy" else rows["guidance, scale 1"][key]
                line[0].plot(list(plain), [r[key] / unit for r in plain.values()], "o-", color=colour,
                             label=f"{words}, scale 1")  # fmt: skip
                line[0].plot(list(better), [r[key] / unit for r in better.values()], "s:", color=colour, mfc="white",
                             label=f"{words}, scale N / (N - 1)")  # fmt: skip
                line[0].axhline(rows["guidance, scale 1"][key] / unit, color=colour, lw=0.8, ls="--")
                line[1].plot(list(scales), [r[key] / unit for r in scales.values()], "o-", color=colour, label=words)
            line[0].set_ylabel(ylabel + ("" if kind == "accuracy" else "\n(guidance of scale 1 = 1)"))
        axes[0, 0].set_xscale("log", base=2)
        axes[1, 0].set_xlabel("N candidates per reverse step")
        axes[1, 1].set_xlabel("guidance scale = 1 + w")
        axes[0, 0].legend(fontsize=7)
        axes[0, 1].legend(fontsize=8)
        axes[0, 0].set_title("soft best-of-N (dashed: guidance of scale 1)", fontsize=9)
        axes[0, 1].set_title("classifier-free guidance", fontsize=9)
        fig.savefig(path)
        plt.close(fig)


def _count(name: str) -> str:
    return f"N = {name.split('best-of-')[1].split(',')[0]}"


def _table(rows: dict[str, dict[str, float]]) -> str:
    head = (
        "| method | learned: drawn as asked | variance | distance | exact: Bayes-classified as asked | by the judge "
        "| class 8 | variance | distance |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    names = ("accuracy", "total_variance", "pairwise_distance", "exact_bayes_accuracy", "exact_accuracy",
             "exact_accuracy_8", "exact_total_variance", "exact_pairwise_distance")  # fmt: skip
    lines = [f"| {name} | " + " | ".join(f"{row[k]:.3f}" for k in names) + " |" for name, row in rows.items()]
    return "\n".join([head, *lines])


def _report(config: Any, results: dict[str, Any], table: str) -> str:
    data, seconds = results["data"], results["seconds"]
    return "\n\n".join([
        f"# Guidance and soft best-of-N on {config.dataset}",
        f"A diffusion transformer of {results['parameters']:,} parameters, {config.resized.num_steps} training steps "
        f"of {config.resized.batch_size} images ({seconds['training']:.0f} s of one core; "
        f"{seconds['sampling']:.0f} s to sample), "
        f"{config.resized.sampling_steps} reverse steps ({config.resized.exact_steps} exact), "
        f"{config.resized.per_class} images per class. "
        f"The judge is a support vector machine that saw none of the generator's data; on that data it is right "
        f"{results['judge_accuracy']:.1%} of the time. Within a class the data have total variance "
        f"{data['total_variance']:.2f} and mean pairwise distance {data['pairwise_distance']:.2f}.",
        "Scale is 1 + w: 0 is the unconditional law, 1 the conditional one. Soft best-of-N draws N candidates of every "
        "step of the *unconditional* chain and keeps one with odds p(c | x)^scale; learned, by the model's own two "
        "scores (and, in the last row, by a small classifier of noisy images); exact, by Bayes' rule between the "
        "Gaussians of the classes in 16 principal components.",
        "![guidance](guidance.png)",
        "![soft best-of-N](candidates.png)",
        "![figures](figures.png)",
        table,
        "## Command",
        f"```\n{command('diffusion_digits', config)}\n```",
    ]) + "\n"  # fmt: skip
