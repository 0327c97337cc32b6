"""Plots, tables and `report.md` of `experiments.diffusion_guidance`."""

import pathlib
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("Agg")
import matplotlib.pyplot as plt

from experiments.common.launch import command
from experiments.common.plots import STYLE
from experiments.theory.claims import PALETTE, Claim, table
from tiltjax.train.config import write_text

__all__ = ["plain", "write"]

BLUE, ORANGE, GREEN, PINK, YELLOW, SKY, BLACK = PALETTE
GREY = "#999999"


def write(directory: pathlib.Path, config: Any, results: dict[str, Any], facts: Sequence[Claim]) -> None:
    """Writes the plots and ``report.md``, and prints the facts.

    Args:
      directory: Of the run.
      config: The run's dataclass.
      results: Of the five stages of the experiment.
      facts: Judged.
    """
    with plt.rc_context(STYLE):
        plots = {"plane": plane_plot, "variance": variance_plot, "finite_n": finite_plot, "densities": line_plot}
        for name, plot in plots.items():
            figure = plot(results)
            figure.savefig(directory / f"{name}.png", metadata={"Software": None})
            plt.close(figure)
    rows = table(facts).replace("| claim | formula |", "| claim | what is computed |")
    report = directory / "report.md"
    write_text(report, _report(config, results, rows))
    print(f"\n{rows}\n\nreport: {report}")


def plain(value: Any) -> Any:
    """What JSON holds of the results: arrays of samples and pictures are left out, NaN is null."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items() if not isinstance(v, np.ndarray) and k != "samples"}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def variance_plot(results: dict[str, Any]) -> Any:
    """Where guidance ends, against its strength."""
    g = results["gaussian"]
    figure, ax = plt.subplots()
    for name, colour, words in (
        ("tilt", GREY, "the tilt p(x) p(c | x)$^g$ / Z"),
        ("sde", BLUE, "guidance, DDPM"),
        ("ode", ORANGE, "guidance, probability flow"),
    ):
        ax.plot(g["scales"], g["closed"][name], color=colour, lw=2, label=words)
    ax.plot(g["sampled_scales"], g["sde_samples"], "o", color=BLUE, mfc="white", label="samples of the library's DDPM")
    ax.plot(
        g["sampled_scales"], g["ode_samples"], "s", color=ORANGE, mfc="white", label="samples of the library's flow"
    )
    ax.axvline(1, color="black", lw=0.8, ls=":")
    ax.annotate("conditional: the only\nstrength but 0\nwhere they agree", (1, 1), (1.5, 1.25), fontsize=9,
                arrowprops={"arrowstyle": "->", "lw": 0.8})  # fmt: skip
    ax.set_yscale("log")
    ax.set_yticks([0.03, 0.1, 0.3, 1, 2], ["0.03", "0.1", "0.3", "1", "2"])
    ax.minorticks_off()
    ax.set_xlabel("scale g = 1 + w")
    ax.set_ylabel("variance of the samples")
    ax.legend(fontsize=8, loc="lower left")
    return figure


def finite_plot(results: dict[str, Any]) -> Any:
    """Soft best-of-N at every step: variance against N, and the law of the strength."""
    f = results["finite"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.0), width_ratios=(1.5, 1))
    n, steps = np.array(f["ns"]), results["num_steps"]
    for name, colour, words, marker in (
        ("plain", PINK, "odds p(c | x)$^g$", "o"),
        ("corrected", GREEN, "odds p(c | x)$^{g N / (N - 1)}$", "s"),
    ):
        left.plot(n, f["laws"][name], "x", color=colour, ms=7, mew=2, label=f"{words}: exact law, {steps} steps")
        at = f["sampled"][name]
        left.plot(
            [int(k) for k in at],
            list(at.values()),
            marker,
            color=colour,
            mfc="none",
            label="samples of the library's chain",
        )
    finer = np.geomspace(1, 32, 200)
    power = 2 * (1 - 1 / finer) * 3 - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        limit = (2 - 2.0 ** (1 - power)) / power
    left.plot(finer, limit, "--", color="black", lw=1, label="guidance at (1 - 1/N) g, many steps")
    left.axhline(f["guided"], color=BLUE, lw=1.5, label=f"guidance at g = 3, DDPM: {f['guided']:.4f}")
    left.set_xscale("log", base=2)
    left.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    left.set_xlabel("candidates a step, N")
    left.set_ylabel("variance")
    left.set_ylim(0.2, 2.1)
    left.legend(fontsize=8)
    sizes = [int(k) for k in f["displacement"]]
    right.plot(finer, 1 - 1 / finer, color="black", lw=1, ls="--", label="1 - 1/N")
    right.plot(sizes, list(f["displacement"].values()), "o", color=PINK, label="one small step, exact law")
    right.set_xscale("log", base=2)
    right.set_xticks([1, 2, 4, 8, 16, 32], ["1", "2", "4", "8", "16", "32"])
    right.set_xlabel("candidates, N")
    right.set_ylabel("strength of guidance / exponent")
    right.set_ylim(-0.02, 1.05)
    right.legend(fontsize=8, loc="lower right")
    return figure


def line_plot(results: dict[str, Any]) -> Any:
    """Densities on the line, and the two chains that select: by the class now, and by the class to come."""
    m = results["line"]
    x = np.array(m["points"])
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.2, 4.0), sharey=True)
    for ax in (left, right):
        ax.fill_between(x, m["density"]["tilt"], color=GREY, alpha=0.35, lw=0, label="the tilt p(x) p(c | x)$^4$ / Z")
        ax.plot(x, m["density"]["data"], color="black", lw=1, ls=":", label="p(x)")
        ax.set_xlabel("x")
        ax.set_xlim(-4, 5)
    left.plot(x, m["density"]["sde"], color=BLUE, lw=2, label=f"guidance, DDPM: TV {m['tv']['sde']:.2f} to the tilt")
    left.plot(x, m["density"]["ode"], color=ORANGE, lw=2, label=f"guidance, flow: TV {m['tv']['ode']:.2f}")
    right.plot(x, m["density"]["chain"], color=PINK, lw=2,
               label=f"selected by p$_t$(c | x)$^4$: TV {m['tv']['chain']:.2f}")  # fmt: skip
    right.plot(x, m["density"]["soft_value"], "--", color=GREEN, lw=2,
               label=f"selected by E[p(c | x$_0$)$^4$ | x$_t$]: TV {m['tv']['soft_value']:.0e}")  # fmt: skip
    left.set_ylabel("density")
    left.set_ylim(0, 1.35 * max(max(m["density"][name]) for name in ("sde", "ode", "tilt")))
    for ax in (left, right):
        ax.legend(fontsize=8, loc="upper left")
    return figure


def plane_plot(results: dict[str, Any]) -> Any:
    """Samples of every sampler over the contours of the tilt."""
    p = results["plane"]
    figure, axes = plt.subplots(2, 3, figsize=(9.6, 6.2), sharex=True, sharey=True)
    colours = (BLACK, ORANGE, BLUE, PINK, SKY, GREEN)
    levels = np.quantile(p["tilt"][p["tilt"] > p["tilt"].max() * 1e-3], [0.35, 0.7, 0.9])
    for ax, (name, x), colour in zip(axes.flat, p["samples"].items(), colours, strict=True):
        ax.contourf(p["grid"], p["grid"], p["tilt"], levels=[*levels, p["tilt"].max()], cmap="Greys", alpha=0.5)
        ax.contour(p["grid"], p["grid"], p["p"], levels=4, colors="black", linewidths=0.4, alpha=0.5)
        ax.plot(x[:, 0], x[:, 1], ".", ms=2, color=colour, alpha=0.6)
        ax.set_title(name, fontsize=10)
        ax.grid(False)
        ax.set_xlim(-4, 4)
        ax.set_ylim(-3.4, 3.4)
        ax.set_aspect("equal")
    figure.supxlabel("grey: the tilt p(x) p(c | x)$^4$ / Z;  lines: p(x);  dots: samples", fontsize=9)
    return figure


def _report(config: Any, results: dict[str, Any], rows: str) -> str:
    particles = results["particles"]
    header = "| particles are weighed by | mean of Z-hat / Z (standard error) | its deviation | resamplings |"
    smc = [header, "| --- | --- | --- | --- |"]
    for name, found in particles["estimates"].items():
        mean = f"{found['mean']:.3f} ({found['error']:.3f})"
        smc.append(f"| {name} | {mean} | {found['deviation']:.3f} | {found['resampled']:.1f} |")
    parts = [
        "# Guidance, soft best-of-N and the tilt, where everything is known",
        "Guidance at scale g pushes a diffusion along the gradient of log p_t(x) p_t(c | x)^g at every level of noise. "
        "It is often read as sampling p(x) p(c | x)^g. It does not, except at g = 0 and 1: tilting and noising do not "
        "commute. What does is a chain whose steps are tilted by the soft value E[p(c | x_0)^g | x_t]; soft best-of-N "
        "at every step draws from either chain, whichever weight it is given.",
        "Soft best-of-N with few candidates is weaker than its exponent says, by 1 - 1/N, however many steps there "
        "are, and the exponent g N / (N - 1) repairs that: two candidates are enough.",
        "![samples in the plane](plane.png)",
        f"Scale 4, {results['num_steps']} steps. The two chains of soft best-of-2 draw two candidates a step and keep "
        "one by the odds of its class; neither uses a gradient or a conditional denoiser. Sequential Monte Carlo "
        "selects by the same p_t(c | x)^4, but weighs what it has selected: it alone aims at the tilt.",
        "## Facts",
        "Laws are computed on grids and by closed forms; \"K to infinity\" extrapolates from K/2 and K steps. "
        "**sharpened**: true, and more is known than is usually said; **refuted**: false as stated.",
        rows,
        "## One Gaussian",
        "p(x) = N(0, 2), p(x | c) = N(0, 1), so that log p(c | x) is quadratic and all laws are Gaussian.",
        "![variance against scale](variance.png)",
        "![variance against N](finite_n.png)",
        "## Three Gaussians on the line",
        "The class is the two components on the right, of probability 0.6. Left: guidance leaves the border of the "
        "class behind and shrinks its modes. Right: the same chain, selected by the class of the noisy x, ends where "
        "guidance does; selected by the class that x will have, it ends in the tilt, here after 20 steps.",
        "![densities](densities.png)",
        "## Sequential Monte Carlo",
        f"The tilt of the line, log Z = {particles['log_z']:.4f} by quadrature; {particles['count']} particles, "
        f"{particles['runs']} runs. Z-hat is unbiased for the Z of the chain, whose steps are finite: about 1% away.",
        "\n".join(smc),
        "Sources: Ho and Salimans, 2022, arXiv:2207.12598; Jiao, Chen and Li, 2025, arXiv:2509.04372; Verdun et al., "
        "2025, arXiv:2505.03156; Wu et al., 2023, arXiv:2306.17775; Singhal et al., 2025, arXiv:2501.06848.",
        f"```\n{command('diffusion_guidance', config)}\n```",
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"
