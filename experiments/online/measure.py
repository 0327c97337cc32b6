"""The numbers of `experiments.online`: gains paired by prompt, pass@k, and the curves of over-optimisation."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.online.bench import Reading
from experiments.reward_model.report import gold_of_best
from tiltjax.exact.bandit import kl, soft_best_of_n_law
from tiltjax.ops.order import expected_max, pass_at_k
from tiltjax.tilt.divergence import best_of_n_kl_bound, tilt_kl
from tiltjax.tilt.overoptimisation import fit_overoptimisation
from tiltjax.tilt.weights import tilt
from tiltjax.train.metrics import Interval, bootstrap_interval
from tiltjax.types import Array

__all__ = ["SIZES", "curve", "gain", "method_numbers", "over_optimisation", "pass_curve", "task_numbers"]

SIZES = (1, 2, 4, 8, 16, 32, 64)
"""k of pass@k, and n of best-of-n."""


def _means(values: np.ndarray) -> np.ndarray:
    return np.mean(np.asarray(values, np.float64), axis=1)


def _right(reward: np.ndarray) -> np.ndarray:
    return np.asarray(reward >= 1, np.float64)


def gain(before: np.ndarray, after: np.ndarray, *, comparisons: int) -> dict[str, Any]:
    """Mean of ``after - before`` over prompts, and whether it is more than chance.

    Args:
      before: One value per held-out prompt, ``[P]``.
      after: Of the same prompts.
      comparisons: How many gains the report looks at: the joint verdict is Bonferroni's for all of them.

    Returns:
      ``difference`` with its 95% interval; ``significant`` where the interval excludes 0; ``jointly`` where the one of
      level ``1 - 0.05 / comparisons`` does.
    """
    change = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    alone = bootstrap_interval(change)
    # The tails of many comparisons lie far out: more resamples.
    joint = bootstrap_interval(change, level=1 - 0.05 / comparisons, resamples=20_000)
    excludes = lambda interval: bool(interval.low > 0 or interval.high < 0)  # noqa: E731
    return {"difference": alone, "significant": excludes(alone), "jointly": excludes(joint)}


def pass_curve(reward: np.ndarray, before: np.ndarray | None = None) -> dict[int, Any]:
    """pass@k of the prompts, unbiased from their K completions, for every k of `SIZES` up to K.

    Args:
      reward: ``[P, K]``; a completion is right if it is 1.
      before: The reference's, ``[P, K]``; then the values are paired differences from it.

    Returns:
      k -> interval.
    """

    def solved(reward: np.ndarray, k: int) -> np.ndarray:
        right = jnp.asarray(_right(reward).sum(axis=1), jnp.int32)
        return np.asarray(pass_at_k(right, num_samples=reward.shape[1], k=k), np.float64)

    sizes = [k for k in SIZES if k <= reward.shape[1]]
    less = lambda k: 0 if before is None else solved(before, k)  # noqa: E731
    return {k: bootstrap_interval(solved(reward, k) - less(k)) for k in sizes}


def method_numbers(
    before: Reading, readings: list[Reading], seconds: dict[str, float], *, beta: float, comparisons: int
) -> dict[str, Any]:
    """Everything that is said about one method on one task.

    Args:
      before: The reference.
      readings: After some of the rounds, the last of them at the end.
      seconds: That training and reading took.
      beta: Strength of the KL term, reward units.
      comparisons: As in `gain`.

    Returns:
      Intervals over held-out prompts by name, and ``curve``, those of every reading.
    """
    last, objective = readings[-1], _means(readings[-1].reward - beta * readings[-1].log_ratio)
    numbers: dict[str, Any] = {
        "after": bootstrap_interval(_means(last.judged)),
        "gain": gain(_means(before.judged), _means(last.judged), comparisons=comparisons),
        "kl": bootstrap_interval(_means(last.log_ratio)),
        "objective": bootstrap_interval(objective),
        "objective_gain": gain(_means(before.reward), objective, comparisons=comparisons),
        "seconds": seconds,
        "curve": [point_of(reading, before) for reading in [before, *readings]],
    }
    if before.gold is not None and last.gold is not None:
        numbers["gold_gain"] = gain(_means(before.gold), _means(last.gold), comparisons=comparisons)
        numbers["law"] = law(numbers["curve"])
    if before.greedy is not None and last.greedy is not None:
        numbers["greedy"] = bootstrap_interval(_right(last.greedy))
        numbers["greedy_gain"] = gain(_right(before.greedy), _right(last.greedy), comparisons=comparisons)
        numbers["pass_at_k"] = pass_curve(last.reward)
        numbers["pass_at_k_gain"] = pass_curve(last.reward, before.reward)
    return numbers


def point_of(reading: Reading, before: Reading) -> dict[str, Any]:
    """A policy as a point of a curve; ``gain`` is over the reference, paired by prompt."""
    judged = _means(reading.judged)
    point: dict[str, Any] = {"round": reading.round, "reward": bootstrap_interval(judged)}
    point["gain"] = bootstrap_interval(judged - _means(before.judged))
    point["kl"] = bootstrap_interval(_means(reading.log_ratio))
    if reading.gold is not None:
        point["gold"] = bootstrap_interval(_means(reading.gold))
    return point


def law(points: list[dict[str, Any]], *, form: str = "rl") -> dict[str, Any] | None:
    """The law of Gao et al., fitted to the gold reward of a curve that begins at the reference; None below 3 points.

    ``peak_kl`` is None where the law never turns.
    """
    divergence = np.array([point["kl"].mean for point in points])
    height = np.array([point["gold"].mean - points[0]["gold"].mean for point in points])
    if np.sum(divergence > 0) < 3:
        return None
    fit = fit_overoptimisation(jnp.asarray(divergence), jnp.asarray(height), form=form)
    peak = float(fit.peak_kl) if np.isfinite(fit.peak_kl) else None
    return {"form": form, "peak_kl": peak, **{name: float(getattr(fit, name)) for name in ("alpha", "b", "r_squared")}}


@jax.jit
def _tilt_of(proxy: Array, gold: Array, beta: Any) -> tuple[Array, tuple[Array, Array, Array]]:
    found = tilt(proxy, beta=beta)
    means = (jnp.sum(found.weights * values, axis=-1) for values in (proxy, gold))
    return found.ess, (*means, tilt_kl(proxy, beta=beta))


@jax.jit
def _soft_of(proxy: Array, gold: Array, n: Any, beta: Any) -> tuple[Array, Array, Array]:
    ref = jnp.full_like(proxy, 1 / proxy.shape[-1])
    chosen = soft_best_of_n_law(ref, proxy, n=n, beta=beta)
    return jnp.sum(chosen * proxy, axis=-1), jnp.sum(chosen * gold, axis=-1), kl(chosen, ref)


def over_optimisation(proxy: np.ndarray, gold: np.ndarray, *, beta: float) -> dict[str, Any]:
    """What a proxy chooses among the reference's own completions, in proxy and in gold.

    Args:
      proxy: Of M completions per prompt, ``[P, M]``.
      gold: Of the same completions.
      beta: Of soft best-of-n, reward units.

    Returns:
      The curves ``best_of_n`` (n up to M), ``soft_best_of_n`` (up to M / 2: the law of a few points has no larger KL)
      and ``tilt`` (of every beta at which the weights rest on 8 completions or more), each a list of points with
      ``strength``, ``reward``, ``gold`` and ``kl``; and the ``law`` fitted to the first.
    """
    x, y = jnp.asarray(proxy, jnp.float32), jnp.asarray(gold, jnp.float32)
    most = x.shape[1]
    best = jax.jit(expected_max, static_argnames="n")
    curves: dict[str, Any] = {"best_of_n": [], "soft_best_of_n": [], "tilt": []}
    for n in (n for n in SIZES if n <= most):
        divergence = np.full(len(x), best_of_n_kl_bound(n))
        curves["best_of_n"].append(curve(n, best(x, n=n), gold_of_best(x, y, n=n), divergence))
        if n <= max(1, most // 2):
            curves["soft_best_of_n"].append(curve(n, *_soft_of(x, y, jnp.int32(n), beta)))
    for strength in np.geomspace(8.0, 0.008, 25).tolist():
        ess, values = _tilt_of(x, y, strength)
        if np.mean(ess) >= min(8, most / 2):
            curves["tilt"].append(curve(strength, *values))
    return curves | {"law": law(curves["best_of_n"], form="best_of_n")}


def curve(strength: float, reward: Any, gold: Any, divergence: Any) -> dict[str, Any]:
    """A point from one value per prompt."""
    names = {"reward": reward, "gold": gold, "kl": np.maximum(divergence, 0)}
    values: dict[str, Interval] = {name: bootstrap_interval(np.asarray(x)) for name, x in names.items()}
    return {"strength": strength, **values}


def task_numbers(
    before: Reading, played: dict[str, tuple[list[Reading], dict[str, float]]], *, beta: float, comparisons: int
) -> dict[str, Any]:
    """Everything that is said about one task.

    Args:
      before: The reference.
      played: Per method its readings, and the seconds it took.
      beta: Strength of the KL term, reward units.
      comparisons: As in `gain`.

    Returns:
      ``reference``; ``methods``, of `method_numbers`; and where there is a gold reward ``over_optimisation``.
    """
    start: dict[str, Any] = {"reward": bootstrap_interval(_means(before.judged)), "draws": before.reward.shape[1]}
    options: dict[str, Any] = {"beta": beta, "comparisons": comparisons}
    numbers: dict[str, Any] = {
        "reference": start,
        "methods": {name: method_numbers(before, *found, **options) for name, found in played.items()},
    }
    if before.greedy is not None:
        start["greedy"], start["pass_at_k"] = bootstrap_interval(_right(before.greedy)), pass_curve(before.reward)
    if before.gold is not None:
        start["gold"] = bootstrap_interval(_means(before.gold))
        inside = [
            np.corrcoef(a, b)[0, 1] for a, b in zip(before.reward, before.gold, strict=True) if np.ptp(a) * np.ptp(b)
        ]
        # Where fewer than two prompts have one, there is nothing to take an interval over.
        start["correlation"] = bootstrap_interval(np.array(inside)) if len(inside) > 1 else None
        numbers["over_optimisation"] = over_optimisation(before.reward, before.gold, beta=beta)
    return numbers
