"""What a trained reward model is worth: tables, plots and `report.md` of `experiments.reward_model`."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.launch import command
from experiments.common.plots import STYLE, plt
from experiments.reward_model.data import Split
from tiltjax.losses.reward_model import bradley_terry_loss, labelled_steps, outcome_loss, process_loss
from tiltjax.ops.masked import masked_mean
from tiltjax.ops.order import expected_max
from tiltjax.train.config import write_text
from tiltjax.train.metrics import Interval, bootstrap_interval
from tiltjax.train.reward_model import Reading, RewardSpec
from tiltjax.types import Array, Float

__all__ = ["Verdict", "gold_of_best", "length_effect", "verdict", "write"]

COLOURS = {
    "gold": "#000000",
    "global": "#D55E00",
    "local": "#56B4E9",
    "dpo": "#E69F00",
    "outcome": "#009E73",
    "process": "#CC79A7",
    "preference": "#0072B2",
    "cost": "#7F3C8D",
}
"""Okabe and Ito, 2008, and one more."""

LABELS = {"outcome": "right or wrong", "process": "steps, good or bad"}
BINS = 8


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A model, or the gold reward, on held-out prompts.

    Attributes:
      kind: Of the model, or "gold".
      nll: Of the labels of its kind, nats per label.
      accuracy: Of the same labels.
      gold_nll: What the gold reward, which the labels are drawn from, reaches; None without one.
      gold_accuracy: Likewise.
      comparisons: Share of the comparisons that its rewards order as the label does; None without comparisons.
      correlation: With the gold reward, within a prompt; None without one.
      length: Standard deviations of reward per standard deviation of length, at equal gold where there is one.
      curve: Gold reward of the best of n by it, for every n; empty without a gold reward.
      gold_curve: By the gold reward itself.
      lengths: Centres of the bins of the plot, characters.
      by_length: Standardised reward in each, mean and standard error.
      gold_by_length: Of the gold reward likewise.
    """

    kind: str
    nll: Interval
    accuracy: Interval
    gold_nll: Interval | None
    gold_accuracy: Interval | None
    comparisons: Interval | None
    correlation: Interval | None
    length: Interval
    curve: dict[int, Interval]
    gold_curve: dict[int, Interval]
    lengths: list[float]
    by_length: list[tuple[float, float]]
    gold_by_length: list[tuple[float, float]] | None


@functools.partial(jax.jit, static_argnames="n")
def gold_of_best(proxy: Float[Array, "P N"], gold: Float[Array, "P N"], *, n: int) -> Float[Array, " P"]:
    r"""Expected gold reward of the best of ``n`` by a proxy, unbiased from ``N >= n`` candidates.

    The mean over all subsets of size ``n``. The expected largest proxy, `tiltjax.ops.order.expected_max`, is a weighted
    sum of the proxies whose weights are the chances of being the best: its derivative towards the gold rewards is what
    those chances make of them.

    Args:
      proxy: What chooses.
      gold: What is reported, reward units.
      n: Size of the best-of-n, at most N; static.

    Returns:
      One value per prompt, reward units; candidates that tie are taken in their order.

    Example:
      >>> float(gold_of_best(jnp.array([[3.0, 2.0, 1.0]]), jnp.array([[0.0, 1.0, 5.0]]), n=2)[0])  # 0, 0 and 1
      0.3333333432674408

    References:
      Nakano et al., 2021, arXiv:2112.09332, appendix I (the estimator); Gao et al., 2023, arXiv:2210.10760.
    """
    best: Callable = functools.partial(expected_max, n=n)
    return jax.jvp(best, (proxy,), (gold,))[1]


def length_effect(
    reward: Float[Array, "P N"], length: Float[Array, "P N"], gold: Float[Array, "P N"] | None, *, seed: int = 0
) -> Interval:
    """Standardised slope of the reward on length, beside the gold reward where there is one; bootstrap over prompts.

    Args:
      reward: Of every candidate.
      length: Likewise.
      gold: Likewise, or None.
      seed: Of the bootstrap.

    Returns:
      Standard deviations per standard deviation; everything is taken within a prompt where it has several candidates.
    """
    columns = [np.asarray(x, np.float64) for x in (reward, length, *(() if gold is None else (gold,)))]
    columns = [x - x.mean(axis=1 if x.shape[1] > 1 else None, keepdims=True) for x in columns]
    columns = [x / max(x.std(), 1e-12) for x in columns]
    # The normal equations add up over prompts: a resample is a sum of them.
    design = np.stack(columns[1:], axis=-1)
    gram = np.einsum("pni,pnj->pij", design, design)
    moment = np.einsum("pni,pn->pi", design, columns[0])

    def slope(rows: np.ndarray) -> float:
        return float(np.linalg.lstsq(gram[rows].sum(0), moment[rows].sum(0), rcond=None)[0][0])

    rng, num = np.random.default_rng(seed), len(gram)
    draws = [slope(rng.integers(num, size=num)) for _ in range(1000)]
    return Interval(slope(np.arange(num)), *(float(x) for x in np.quantile(draws, [0.025, 0.975])))


def verdict(spec: RewardSpec, held_out: Split, reading: Reading, shown: Split, reward: Float[Array, "P N"]) -> Verdict:
    """Everything that is said about one model.

    Args:
      spec: What it means.
      held_out: Labels that it has not seen.
      reading: What it says about them.
      shown: Completions for the curves: those of the policy, or the held-out ones.
      reward: What it says about those.

    Returns:
      `Verdict`.
    """
    real, reward = np.asarray(reading.where), np.asarray(reward, np.float32)
    nll, accuracy = (bootstrap_interval(np.asarray(x)[real]) for x in (reading.nll, reading.accuracy))
    gold_nll = gold_accuracy = correlation = comparisons = None
    if held_out.truth is not None:
        values = _truth(spec, held_out)
        gold_nll, gold_accuracy = (bootstrap_interval(x[real]) for x in values)
    if held_out.data.pair is not None:
        said = np.asarray(reading.reward)[np.arange(len(real))[:, None, None], held_out.data.pair]
        right = said[..., 0] > said[..., 1]
        comparisons = bootstrap_interval(right.mean(axis=1)) if spec.kind != "preference" else accuracy
    curve, gold_curve, gold = {}, {}, shown.gold
    if gold is not None:
        ns = [n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if n <= reward.shape[1]]
        exact = jnp.asarray(gold, jnp.float32)
        curve = {n: bootstrap_interval(gold_of_best(jnp.asarray(reward), exact, n=n)) for n in ns}
        gold_curve = {n: bootstrap_interval(gold_of_best(exact, exact, n=n)) for n in ns}
        correlation = bootstrap_interval(_correlation(reward, gold))
    lengths, by_length = _binned(reward, shown.length)
    return Verdict(
        kind=spec.kind,
        nll=nll,
        accuracy=accuracy,
        gold_nll=gold_nll,
        gold_accuracy=gold_accuracy,
        comparisons=comparisons,
        correlation=correlation,
        length=length_effect(reward, shown.length, gold),
        curve=curve,
        gold_curve=gold_curve,
        lengths=lengths,
        by_length=by_length,
        gold_by_length=None if gold is None else _binned(gold, shown.length)[1],
    )


def _truth(spec: RewardSpec, split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihood and accuracy of the labels under what they are drawn from, per prompt."""
    truth, data = jnp.asarray(split.truth, jnp.float32), split.data
    if spec.kind == "process":
        label, where = labelled_steps(jnp.asarray(data.step_label))
        right = masked_mean(_right(truth, label > 0), where)
        nll = process_loss(truth, label, where=where)
    elif spec.kind == "outcome":
        nll, right = outcome_loss(truth, jnp.asarray(data.label)), _right(truth, data.label)
    else:
        nll, right = bradley_terry_loss(jnp.stack([truth, jnp.zeros_like(truth)], axis=-1)), _right(truth, True)
    return np.asarray(jnp.mean(nll, axis=1)), np.asarray(jnp.mean(right, axis=1))


def _right(truth: Array, label: Any) -> Array:
    """Whether the gold reward would have given the label; one half where it is torn, as a coin would be right."""
    return jnp.where(truth == 0, 0.5, jnp.where(label, truth > 0, truth < 0))


def _correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Within every prompt; 0 where one of the two does not vary."""
    x, y = (np.asarray(v, np.float64) - np.mean(v, axis=1, keepdims=True) for v in (x, y))
    scale = np.sqrt(np.sum(x**2, axis=1) * np.sum(y**2, axis=1))
    return np.where(scale > 0, np.sum(x * y, axis=1) / np.where(scale > 0, scale, 1), 0)


def _binned(value: np.ndarray, length: np.ndarray) -> tuple[list[float], list[tuple[float, float]]]:
    """Centres of bins of equally many completions; mean and standard error of the standardised value in each."""
    flat, at = np.asarray(value, np.float64).ravel(), np.asarray(length, np.float64).ravel()
    flat = (flat - flat.mean()) / max(flat.std(), 1e-12)
    parts = [part for part in np.array_split(np.argsort(at, kind="stable"), BINS) if len(part)]
    means = [(float(flat[p].mean()), float(flat[p].std() / np.sqrt(len(p)))) for p in parts]
    return [float(at[part].mean()) for part in parts], means


def write(directory: pathlib.Path, config: Any, verdicts: list[Verdict], *, agreement: float | None) -> dict[str, Any]:
    """Writes ``results.json``, the plots and ``report.md``, and prints the table.

    Args:
      directory: Of the run.
      config: `experiments.reward_model.__main__.RewardConfig`.
      verdicts: Of every kind.
      agreement: Share of a judge's comparisons that go the way of the gold reward, or None.

    Returns:
      What is in ``results.json``.
    """
    results: dict[str, Any] = {"models": {v.kind: dataclasses.asdict(v) for v in verdicts}, "agreement": agreement}
    write_text(directory / "results.json", json.dumps(results, indent=2) + "\n")
    with plt.rc_context(STYLE):
        _length_plot(directory / "length.png", verdicts)
        if verdicts[0].curve:
            _curve_plot(directory / "best_of_n.png", config, verdicts)
    table = _table(verdicts)
    write_text(directory / "report.md", _report(config, verdicts, table, agreement))
    print(f"\n{table}\n\nreport: {directory / 'report.md'}")
    return results


def _table(verdicts: list[Verdict]) -> str:
    top = max(verdicts[0].curve, default=0)
    best = [f"gold reward of its best of {top}"] if top else []
    head = ["model", "labels", "NLL, nats", "the gold reward's", "accuracy", "the gold reward's", "orders pairs right",
            "correlation with gold", "length", *best]  # fmt: skip
    rows = [head, ["---"] * len(head)]
    for v in verdicts:
        cells = [v.kind, LABELS.get(v.kind, "comparisons"), v.nll, v.gold_nll, v.accuracy, v.gold_accuracy,
                 v.comparisons, v.correlation, v.length]  # fmt: skip
        rows.append([*("" if x is None else str(x) for x in cells), *([str(v.curve[top])] if top else [])])
    if top:
        for name, value in (("the gold reward", verdicts[0].gold_curve[top]), ("random", verdicts[0].curve[1])):
            rows.append([name, *[""] * (len(head) - 2), str(value)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _length_plot(path: pathlib.Path, verdicts: list[Verdict]) -> None:
    fig, ax = plt.subplots()
    lines: list[tuple[str, list[float], list[tuple[float, float]]]] = []
    if verdicts[0].gold_by_length is not None:
        lines.append(("gold", verdicts[0].lengths, verdicts[0].gold_by_length))
    lines += [(v.kind, v.lengths, v.by_length) for v in verdicts]
    for name, lengths, values in lines:
        mean, error = np.array(values).T
        style: dict[str, Any] = {"color": COLOURS[name], "lw": 2.5 if name == "gold" else 1.5}
        ax.plot(lengths, mean, "o-" if name == "gold" else "s--", ms=4, label=_named(name), **style)
        ax.fill_between(lengths, mean - 1.96 * error, mean + 1.96 * error, color=COLOURS[name], alpha=0.12, lw=0)
    ax.axhline(0, color="black", lw=0.6)
    ax.set_xlabel("length of the completion (characters)")
    ax.set_ylabel("reward (standard deviations from its mean)")
    ax.legend(fontsize=8)
    fig.savefig(path)
    plt.close(fig)


def _curve_plot(path: pathlib.Path, config: Any, verdicts: list[Verdict]) -> None:
    fig, ax = plt.subplots()
    ns = list(verdicts[0].curve)
    ax.plot(ns, [i.mean for i in verdicts[0].gold_curve.values()], "o-", ms=4, color=COLOURS["gold"], lw=2.5,
            label=_named("gold"))  # fmt: skip
    for v in verdicts:
        mean, low, high = np.array(list(v.curve.values())).T
        ax.plot(ns, mean, "s--", ms=4, color=COLOURS[v.kind], label=_named(v.kind))
        ax.fill_between(ns, low, high, color=COLOURS[v.kind], alpha=0.1, lw=0)
    ax.axhline(verdicts[0].curve[1].mean, color="#999999", lw=1, ls=":", label="random")
    ax.set_xscale("log", base=2)
    ax.set_xticks(ns, [str(n) for n in ns])
    ax.minorticks_off()
    ax.set_xlabel("n")
    ax.set_ylabel(f"{config.gold or 'sentiment'} of the best of n")
    ax.legend(fontsize=8)
    fig.savefig(path)
    plt.close(fig)


def _named(name: str) -> str:
    return "the gold reward" if name == "gold" else name


def _report(config: Any, verdicts: list[Verdict], table: str, agreement: float | None) -> str:
    source = config.data or f"completions of {config.policy} for the prompts {config.prompts!r}"
    parts = [
        f"# Reward models from {source}",
        table,
        "Held-out prompts; 95% bootstrap intervals over them. A model that knows nothing has an NLL of log 2 = 0.693. "
        "*Length* is how many standard deviations the reward moves with one standard deviation of length (characters) "
        "within a prompt" + (", at equal gold reward." if verdicts[0].curve else "."),
    ]
    if not config.data:
        parts.append(
            f"The labels are draws: a comparison goes to the first with log-odds {config.scale:g} times the difference "
            f"of the gold reward ({config.gold or 'sentiment'}), so that the gold reward's own NLL and accuracy are "
            "what any model can hope for."
        )
    if agreement is not None:
        parts.append(
            f"The training comparisons are those of {config.label}: of the pairs that differ in the gold reward it "
            f"orders {agreement:.1%} the same way. The held-out ones are drawn from the gold reward."
        )
    if verdicts[0].curve:
        parts += [
            "![gold reward of the best of n](best_of_n.png)",
            "The gold reward of the best of n by each model: the mean over all subsets of n of a prompt's candidates, "
            "which is unbiased; bands are the intervals.",
        ]
    parts += ["![reward against length](length.png)", "Rewards by length, in bins of equally many completions."]
    parts.append(f"## Command\n\n```\n{command('reward_model', config, free=('output',))}\n```")
    return "\n\n".join(parts) + "\n"
