"""Plots, tables and `report.md` of `experiments.online`."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.common.launch import command
from experiments.common.plots import STYLE, plt
from experiments.online.bench import Reading
from tiltjax.data import text
from tiltjax.train.config import write_text

__all__ = ["samples_of", "write"]

COLOURS = {
    "grpo": "#D55E00",
    "rloo": "#0072B2",
    "online_dpo_best_worst": "#009E73",
    "online_tilted_mle": "#CC79A7",
}
OTHERS = ("#E69F00", "#7F3C8D")
"""Okabe and Ito, 2008, and one more; the latter of further methods, in turn."""

GREY, SKY, BLACK = "#999999", "#56B4E9", "#000000"
CHOICES = {
    "best_of_n": ("best-of-n by the proxy", SKY, "s--"),
    "soft_best_of_n": ("soft best-of-n", BLACK, "d:"),
    "tilt": ("the tilt", GREY, "-"),
}
SHOWN = 3


def samples_of(prompts: Sequence[Any], before: Reading, after: dict[str, Reading]) -> list[dict[str, Any]]:
    """What the policies write after the first held-out prompts, with the same random numbers.

    Args:
      prompts: The held-out ones.
      before: The reference.
      after: Every method at its end.

    Returns:
      One mapping per prompt: the prompt, and per policy its first completion and the rewards of that.
    """
    policies = {"reference": before, **after}

    def said(reading: Reading, i: int) -> dict[str, Any]:
        rewards = {"reward": float(reading.reward[i, 0])}
        if reading.gold is not None:
            rewards["gold"] = float(reading.gold[i, 0])
        return {"completion": reading.texts[i][0], **rewards}

    return [
        {"prompt": text.prompt_text(prompts[i]), **{name: said(reading, i) for name, reading in policies.items()}}
        for i in range(min(SHOWN, len(prompts)))
    ]


def write(directory: pathlib.Path, config: Any, results: dict[str, Any], samples: dict[str, list]) -> None:
    """Writes ``results.json``, the plots and ``report.md``, and prints the tables.

    Args:
      directory: Of the run.
      config: The run's dataclass.
      results: Per task those of `experiments.online.measure.task_numbers`.
      samples: Per task those of `samples_of`.
    """
    write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")
    with plt.rc_context(STYLE):
        if "puzzles" in results:
            puzzle_plot(directory / "puzzles.png", results["puzzles"])
        if "sentiment" in results:
            sentiment_plot(directory / "sentiment.png", config, results["sentiment"])
    settings = next(iter(results.values()))["settings"]
    parts = ["# Methods that improve a language model online", _setting(config), "\n".join(f"* {s}" for s in settings)]
    for task, numbers in results.items():
        table = method_table(task, numbers)
        print(f"\n{task}\n\n{table}\n")
        parts += [f"## {task.capitalize()}", _question(task, config), table, verdict(numbers)]
        parts += _puzzle_parts(numbers) if task == "puzzles" else _sentiment_parts(config, numbers)
        parts += [f"### What they write ({task})", *map(_sample, samples[task])]
    parts.append(f"## Command\n\n```\n{command('online', config, free=('output',))}\n```")
    write_text(directory / "report.md", "\n\n".join(parts) + "\n")
    print(f"report: {directory / 'report.md'}")


def _setting(config: Any) -> str:
    return (
        f"Reference policy `{config.policy}`; {config.steps} rounds of {config.batch_size} prompts with "
        f"{config.num_candidates} candidates, where the method leaves that number free. All numbers are of "
        f"{config.num_eval_prompts} held-out prompts; brackets hold 95% bootstrap intervals over them. "
        "*Gain* is after less before, paired by prompt. "
        f"*Objective* is reward less {config.report_beta:g} times the KL to the reference."
    )


def _question(task: str, config: Any) -> str:
    law = config.describe_law(evaluation=True)
    if task == "puzzles":
        return (
            f"`reasoning_gym:{config.puzzle}`, the prompt as it is, at most {config.puzzle_tokens} tokens; the last "
            f"number of a completion is its answer. {config.puzzle_candidates} completions of each held-out prompt, "
            f"sampled at {law}. No question of the held-out set is among those of training."
        )
    draws = config.sentiment_candidates * config.reference_draws
    return (
        f"Prompts `{config.prompts}`, at most {config.sentiment_tokens} tokens; {config.sentiment_candidates} "
        f"completions of each held-out prompt, sampled at {law}, of the reference {draws}. The reward is the "
        f"proxy `{config.proxy}`; `{config.gold}` is the gold reward, which nothing is trained on."
    )


def method_table(task: str, numbers: dict[str, Any]) -> str:
    """The methods of a task as a Markdown table."""
    judged = "accuracy" if task == "puzzles" else "proxy"
    rows = [
        f"| method | {judged} before | after | gain | KL, nats | gain of the objective | training, s | reading, s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, found in numbers["methods"].items():
        seconds = [f"{found['seconds'].get(what, 0):.0f}" for what in ("train", "read")]
        cells = [name, numbers["reference"]["reward"], found["after"], _sure(found["gain"]), found["kl"],
                 _sure(found["objective_gain"]), *seconds]  # fmt: skip
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def _sure(gain: dict[str, Any]) -> str:
    mark = "\\*\\*" if gain["jointly"] else "\\*" if gain["significant"] else ""
    return f"{gain['difference']}{mark}"


def verdict(numbers: dict[str, Any]) -> str:
    """Which gains are more than chance, in a sentence."""
    gains = {name: found["gain"] for name, found in numbers["methods"].items()}
    up = [name for name, gain in gains.items() if gain["significant"] and gain["difference"].mean > 0]
    down = [name for name, gain in gains.items() if gain["significant"] and gain["difference"].mean < 0]
    rest = [name for name in gains if name not in up + down]
    parts = [f"The gain is significant for {len(up)} of {len(gains)} methods" + (f" ({', '.join(up)})" if up else "")]
    parts += [f"the loss for {', '.join(down)}"] if down else []
    parts += [f"neither for {', '.join(rest)}"] if rest else []
    return (
        "; ".join(parts) + ". One star: the 95% interval excludes 0; two: it still does when the level is shared among "
        "all tasks and methods of this report (Bonferroni)."
    )


def _puzzle_parts(numbers: dict[str, Any]) -> list[str]:
    start, methods = numbers["reference"], numbers["methods"]
    sizes = list(start["pass_at_k"])
    rows = [f"| policy | greedy | {' | '.join(f'pass@{k}' for k in sizes)} |", "| --- | --- |" + " --- |" * len(sizes)]
    rows.append(f"| reference | {start['greedy']} | {_cells(start['pass_at_k'])} |")
    for name, found in methods.items():
        rows.append(f"| {name} | {found['greedy']} | {_cells(found['pass_at_k'])} |")
        rows.append(f"| &nbsp; gain | {_sure(found['greedy_gain'])} | {_cells(found['pass_at_k_gain'])} |")
    return ["![gain in accuracy against rounds, pass@k, and the gain in it](puzzles.png)", "\n".join(rows)]


def _cells(values: dict[int, Any]) -> str:
    return " | ".join(map(str, values.values()))


def _agreement(start: dict[str, Any]) -> str:
    if start["correlation"] is None:
        return (
            f"Of the {start['draws']} completions of the reference, proxy and gold both vary within fewer than two "
            "prompts: nothing can be said of their correlation within a prompt."
        )
    return (
        f"Within a prompt proxy and gold have correlation {start['correlation']} over {start['draws']} completions of "
        "the reference."
    )


def _sentiment_parts(config: Any, numbers: dict[str, Any]) -> list[str]:
    start = numbers["reference"]
    rows = ["| policy | KL, nats | proxy | gold | gain in gold |", "| --- | --- | --- | --- | --- |"]
    rows.append(f"| reference | 0 | {start['reward']} | {start['gold']} | |")
    for kind, (label, _, _) in CHOICES.items():
        points = numbers["over_optimisation"][kind][-1:]
        name = "n" if kind != "tilt" else "beta"
        rows += [
            f"| {label}, {name} = {p['strength']:.3g} | {p['kl']} | {p['reward']} | {p['gold']} | |" for p in points
        ]
    for name, found in numbers["methods"].items():
        for point in found["curve"][1:]:
            last = _sure(found["gold_gain"]) if point is found["curve"][-1] else ""
            rows.append(
                f"| {name}, {point['round']} rounds | {point['kl']} | {point['reward']} | {point['gold']} | {last} |"
            )
    fits = {"best-of-n by the proxy": numbers["over_optimisation"]["law"]}
    fits |= {name: found["law"] for name, found in numbers["methods"].items()}
    lines = [
        f"* {name} ({fit['form']}): alpha {fit['alpha']:.3f}, b {fit['b']:.3f}, R^2 {fit['r_squared']:.2f}, "
        + ("never turns" if fit["peak_kl"] is None else f"highest at {fit['peak_kl']:.3g} nats")
        for name, fit in fits.items()
        if fit is not None
    ]
    return [
        "![proxy and gold against the KL](sentiment.png)",
        f"{_agreement(start)} Those completions also say what the proxy would choose: best-of-n, soft best-of-n at "
        f"beta = {config.report_beta:g} and the tilt, in proxy and in gold.",
        "\n".join(rows),
        "The laws of Gao et al. (2023, arXiv:2210.10760), fitted to the gold reward over the reference's with d the "
        "square root of the KL: d (alpha - b d) for best-of-n, d (alpha - b log d) for a policy in training. A peak "
        "outside of the data is not to be trusted.",
        "\n".join(lines),
    ]


def _sample(sample: dict[str, Any]) -> str:
    lines = [f"> {' '.join(sample['prompt'].split())}", ""]
    for name, said in sample.items():
        if name != "prompt":
            gold = f", gold {said['gold']:+.2f}" if "gold" in said else ""
            lines.append(
                f"* {name} ({said['reward']:.2f}{gold}): {' '.join(said['completion'].split()) or '(nothing)'}"
            )
    return "\n".join(lines)


def _band(ax: Any, x: Any, points: list[Any], colour: str, style: str, label: str | None, **options: Any) -> None:
    mean, low, high = np.array(points).T
    ax.plot(x, mean, style, ms=4, color=colour, label=label, **options)
    ax.fill_between(x, low, high, color=colour, alpha=0.12, lw=0)


def puzzle_plot(path: pathlib.Path, numbers: dict[str, Any]) -> None:
    """What was gained in accuracy after how many rounds; pass@k at the end, and what was gained in it."""
    fig, (rise, end, change) = plt.subplots(1, 3, figsize=(12.6, 3.8))
    start = numbers["reference"]["pass_at_k"]
    _band(end, list(start), list(start.values()), BLACK, "s--", "reference")
    methods = numbers["methods"]
    for i, (colour, (name, found)) in enumerate(zip(_colours(numbers), methods.items(), strict=True)):
        apart = i - (len(methods) - 1) / 2  # The intervals stand side by side.
        _bars(
            rise, [p["round"] + 0.2 * apart for p in found["curve"]], [p["gain"] for p in found["curve"]], colour, name
        )
        gains = found["pass_at_k_gain"]
        _bars(change, [k * 1.07**apart for k in gains], list(gains.values()), colour, name)
        end.plot(list(start), [interval.mean for interval in found["pass_at_k"].values()], "o-", ms=4, color=colour)
    rise.set_xlabel("rounds")
    rise.set_ylabel("gain in accuracy, paired by prompt")
    rise.legend(fontsize=8)
    for ax, label in ((end, "pass@k"), (change, "gain in pass@k, paired by prompt")):
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(start), [str(k) for k in start])
        ax.minorticks_off()
        ax.set_xlabel("k")
        ax.set_ylabel(label)
    end.legend(fontsize=8)
    change.axhline(0, color=BLACK, lw=1, ls="--")
    fig.savefig(path)
    plt.close(fig)


def _bars(ax: Any, x: Any, points: list[Any], colour: str, label: str) -> None:
    mean, low, high = np.array(points).T
    ax.errorbar(x, mean, yerr=[mean - low, high - mean], fmt="o-", ms=4, lw=1.2, capsize=2, color=colour, label=label)


def sentiment_plot(path: pathlib.Path, config: Any, numbers: dict[str, Any]) -> None:
    """Proxy and gold against the KL and its square root."""
    fig, axes = plt.subplots(2, 2, figsize=(9.6, 7.2), sharey="row", sharex="col")
    rewards = {"reward": f"proxy ({config.proxy})", "gold": f"gold ({config.gold})"}
    for row, (key, label) in zip(axes, rewards.items(), strict=True):
        for ax, scale in zip(row, (lambda x: x, np.sqrt), strict=True):
            for kind, (name, colour, style) in CHOICES.items():
                points = numbers["over_optimisation"][kind]
                _curve(ax, points, key, scale, colour, style, name)
            for colour, (name, found) in zip(_colours(numbers), numbers["methods"].items(), strict=True):
                _curve(ax, found["curve"], key, scale, colour, "o-", name, lw=2)
        row[0].set_ylabel(label)
    axes[1, 0].set_xlabel("KL to the reference (nats per completion)")
    axes[1, 1].set_xlabel("square root of the KL")
    axes[0, 0].legend(fontsize=8)
    fig.savefig(path)
    plt.close(fig)


def _curve(ax: Any, points: list[dict[str, Any]], key: str, scale: Any, *how: Any, **options: Any) -> None:
    if points:
        x = scale(np.maximum([point["kl"].mean for point in points], 0))
        _band(ax, x, [point[key] for point in points], *how, **options)


def _colours(numbers: dict[str, Any]) -> list[str]:
    return [COLOURS.get(name, OTHERS[i % len(OTHERS)]) for i, name in enumerate(numbers["methods"])]
