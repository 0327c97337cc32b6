"""GRPO on a reward of 0 or 1 as a map of the probability of success: fixed points, cycles, chaos, finite groups.

    python -m experiments.theory.grpo_dynamics

Expected: success is amplified without any condition; refuted: that the iteration always settles, by a cycle and by
chaos, and that a division by the standard deviation only rescales the gradient; about 15 seconds on two cores.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import expit, logit, softmax

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from tiltjax.advantages import greedy_baseline, group_normalised, leave_one_out
from tiltjax.exact import grpo

__all__ = ["FAMILY", "claims"]

EPS = 0.01
"""Added to the variance of the reward, as in the analysis."""

RARE = 1e-6
"""Success probability of a reference that all but fails: where cycles and chaos are."""

GRID = {
    "ref": (1e-4, 0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999),
    "beta": (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5, 3.0, 10.0),
    "eps": (1e-3, 0.01),
}
"""162 settings, of which the claims about every fixed point are judged."""

KNOWN = {
    (0.1, 1.0): (0.44418212, 0.98549775, 0.99947411),
    (0.3, 2.0): (0.53380971,),
    (0.5, 5.0): (0.59863561,),
}
"""(reference, beta) -> fixed points, computed apart from this library."""

whitened = functools.partial(group_normalised, scale="variance", ddof=0, eps=EPS)
standardised = functools.partial(group_normalised, ddof=0, eps=0.0)
centred = functools.partial(group_normalised, scale="none")

orbit = jax.jit(grpo.orbit, static_argnames=("steps", "scale", "kl_to"))
success_map = jax.jit(grpo.success_map)
lyapunov_exponent = jax.jit(grpo.lyapunov_exponent, static_argnames=("steps", "burn_in"))


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page."""
    return [*_map(), *_fixed_points(), *_cycles(2000 if fast else 20_000), *_variants(), *_groups(), *_gradients()]


def _map() -> list[Claim]:
    # Twenty completions that the old policy has equally often, seven of them right: the group is the population.
    rng = np.random.default_rng(0)
    right = (np.arange(20) < 7).astype(float)
    ref = rng.dirichlet(np.ones(20))
    beta = 0.8
    other = rng.dirichlet(np.ones(20), size=1000)
    p = np.linspace(0.01, 0.99, 98)

    @jax.jit
    def everything(ref, right, other, p):
        advantage = whitened(right)
        policy = bandit.tilted(ref, advantage, beta=beta)
        every = jnp.concatenate([policy[None], other])
        value = every @ advantage - beta * bandit.kl(every, jnp.broadcast_to(ref, every.shape))
        slope = jax.vmap(jax.grad(lambda p: grpo.success_map(p, 0.1, beta=0.7, eps=EPS)))(p)
        error = jnp.abs(grpo.success_slope(p, 0.1, beta=0.7, eps=EPS) / slope - 1)
        return policy @ right, grpo.success_map(0.35, ref @ right, beta=beta, eps=EPS), value, error.max()

    success, mapped, value, error = map(np.asarray, everything(*map(jnp.asarray, (ref, right, other, p))))
    return [
        at_most("A round of GRPO, unclipped and exactly optimised, is the tilt of the reference by the advantages",
                "largest gain of 1,000 random policies over the tilt's", (value[1:] - value[0]).max(), 0),
        equal("All that survives of the tilt is the success probability, by p_n = h(p_{n-1})",
              "success under the tilt, p_{n-1} = 0.35, beta 0.8", success, mapped, atol=1e-14),
        at_most("h'(p) = h (1 - h) (2p - 1) / (2 beta (p (1-p) + eps)^{3/2})",
                "largest relative difference from automatic differentiation", error, 1e-11),
    ]  # fmt: skip


def _fixed(ref: Any, beta: Any, eps: Any) -> grpo.FixedPoints:
    """Fixed points of up to 8192 settings, padded so that one compilation serves all calls."""
    settings = np.stack(np.broadcast_arrays(ref, beta, eps)).reshape(3, -1)
    count = settings.shape[1]
    found = _solve(*np.pad(settings, ((0, 0), (0, 8192 - count)), mode="edge"))
    return jax.tree.map(lambda x: np.asarray(x)[:count], found)


_solve = jax.jit(jax.vmap(lambda ref, beta, eps: grpo.fixed_points(ref, beta=beta, eps=eps)))


@functools.partial(jax.jit, static_argnums=4)
def _orbits(p: Any, ref: Any, beta: Any, eps: Any, steps: int) -> Any:
    """One orbit for every setting, ``[settings, steps + 1]``."""
    return jax.vmap(lambda p, r, b, e: grpo.orbit(p, r, beta=b, eps=e, steps=steps))(p, ref, beta, eps)


def _fixed_points() -> list[Claim]:
    threshold = float(grpo.uniqueness_beta(EPS))
    variances = np.linspace(0, 0.25, 250_001)
    grid = np.stack([x.ravel() for x in np.meshgrid(*map(np.array, GRID.values()))])
    checked = np.array([(r, b, EPS) for r, b in KNOWN]).T
    scan = [
        np.stack(np.broadcast_arrays(expit(np.linspace(-1, 1.5, 4001)), b, EPS)) for b in (threshold, 0.99 * threshold)
    ]
    parts = (grid, checked, *scan)
    every = _fixed(*np.concatenate(parts, axis=1))
    ends = np.cumsum([part.shape[1] for part in parts])[:-1]
    x, slope, where = (np.split(y, ends)[0] for y in (every.logit, every.slope, every.where))
    found = np.split(every.p, ends)[1]
    counts = [int(y.sum(-1).max()) for y in np.split(every.where, ends)[2:]]
    known = [np.abs(p[: len(q)] - q).max() for p, q in zip(found, KNOWN.values(), strict=True)]
    ref, beta, eps = grid
    three = (where.sum(-1) == 3).sum()
    above = np.where(where, x - logit(ref)[:, None], np.inf).min(-1)
    spread = ref * (1 - ref)
    condition = beta * np.cosh(np.minimum(1 / (2 * beta * np.sqrt(0.25 + eps)), 300)) ** 2
    violated = (ref > 0.5) & (condition < spread * (2 * ref - 1) / (2 * (spread + eps) ** 1.5))
    # Neighbours a little above each fixed point, after enough rounds to come back or to go.
    inner = where & (np.abs(np.abs(slope) - 1) > 0.01) & (np.abs(x) < 8)
    cell, which = np.nonzero(inner)
    start = expit(x[inner] + 1e-6)
    path = _orbits(start, ref[cell], beta[cell], eps[cell], 1500).T
    distance = np.abs(logit(np.asarray(path)) - x[inner])
    returns = distance[-1] < 1e-7
    p = expit(x)
    bound = p * (1 - p) * np.abs(2 * p - 1) / (2 * (p * (1 - p) + eps[:, None]) ** 1.5)
    stated = (beta[:, None] > bound)[cell, which]
    two = orbit(jnp.array([0.5, 0.99]), 0.1, beta=1.0, eps=EPS, steps=60)[-1]
    return [
        at_most("Fixed points of h at eps 0.01", "largest difference from known ones, 3 settings", max(known), 1e-8),
        at_most("Every fixed point is above the reference, with no condition on it or on beta: the exponent of h is "
                "never 0", "largest log-odds of ref less those of a fixed point, 162 settings", -above.min(), 0,
                verdict="sharpened"),
        at_most(f"The published condition for ref > 1/2 is not needed: it is violated in {violated.sum()} of them",
                "the same where it is violated", -above[violated].min(), 0, verdict="sharpened"),
        holds("There are one or three of them", "settings of 162 with three", three, "above 0",
              three > 0 and np.all((where.sum(-1) == 1) | (where.sum(-1) == 3)), verdict="sharpened"),
        holds("It is one for every reference from beta = max_v v sqrt(1 - 4v) / (2 (v + eps)^{3/2}) on, not below",
              f"most fixed points of any reference at beta {threshold:.4g}, and 1% below", f"{counts[0]}, {counts[1]}",
              "1, 3", counts == [1, 3], verdict="sharpened"),
        equal("The maximum over v is attained at v = 2 eps / (1 + 12 eps)",
              "beta from which on there is one fixed point, held to the maximum on a grid of v", threshold,
              np.max(variances * np.sqrt(1 - 4 * variances) / (2 * (variances + EPS) ** 1.5)), rtol=1e-7),
        equal("Neighbours return if and only if beta > p (1-p) |2p-1| / (2 (p (1-p) + eps)^{3/2})",
              f"share of {len(cell)} fixed points where formula and orbit agree", np.mean(returns == stated), 1),
        at_most("Where the ends are two, the start decides: ref 0.1, beta 1, from p = 0.5 and p = 0.99",
                "largest distance from 0.44418212 and 0.99947411",
                np.abs(np.asarray(two) - [0.44418212, 0.99947411]).max(), 1e-7, verdict="sharpened"),
    ]  # fmt: skip


def _cycles(steps: int) -> list[Claim]:
    cycle, chaos = 0.68129, 0.50714
    path = np.asarray(orbit(0.3, RARE, beta=cycle, eps=EPS, steps=300))
    found = grpo.two_cycles(RARE, beta=cycle, eps=EPS)
    apart = np.abs(path[-1] - path[-2])
    starts = jnp.array([0.2, 0.3, 0.6])
    rate = lyapunov_exponent(starts, RARE, beta=chaos, eps=EPS, steps=steps)
    slope = _fixed(RARE, cycle, EPS).slope[0]
    return [
        holds("The iteration ends at a fixed point wherever it starts: ref 1e-6, beta 0.68129, from 0.3",
              "|p_300 - p_299|", apart, "0", apart > 0.5, verdict="refuted"),
        at_most("It ends in a cycle of two: one round succeeds at 0.7, the next at 2.3e-5",
                "largest relative distance from 0.69968 and 2.3e-5",
                np.abs(np.sort(path[-2:]) / [2.3e-5, 0.69968] - 1).max(), 0.01, verdict="sharpened"),
        at_most("The cycle attracts, where the one fixed point repels", "|slope of two rounds| along it",
                abs(found.slope[0]), 1 if abs(slope[0]) > 1 else 0),
        equal("At beta 0.50714 it is chaos: neighbours part", f"Lyapunov exponent, {steps:,} rounds, nats a round",
              np.mean(rate), 0.44, atol=0.03, verdict="sharpened"),
    ]  # fmt: skip


def _variants() -> list[Claim]:
    # Without eps, in log-odds x: ref + 2 cosh(x/2) / beta = x has no solution from this reference on.
    beta = 1.0
    edge = 2 * math.asinh(beta) - 2 * math.sqrt(1 + beta**2) / beta
    refs = expit(edge + np.array([-0.05, 0.05]))
    bare = np.asarray(orbit(refs, jnp.asarray(refs), beta=beta, eps=0.0, steps=200)[-1])
    starts = np.array([RARE, 0.1, 0.5])
    mirror = logit(np.asarray(orbit(starts, jnp.asarray(starts), beta=2.0, eps=EPS, steps=5, kl_to="previous")))
    doctor = np.asarray(orbit(starts, 0.1, beta=2.0, eps=EPS, steps=3, scale="none"))
    climbing = orbit(starts, jnp.asarray(starts), beta=2.0, eps=EPS, steps=12, scale="none", kl_to="previous")
    both = logit(np.asarray(climbing))
    return [
        holds("Without eps a reference above logit ref = 2 asinh(beta) - 2 sqrt(1 + beta^2) / beta ends at certainty",
              f"p_200 from references around {expit(edge):.3f}, beta 1", f"{bare[0]:.4f}, {bare[1]:.4f}", "< 1, 1",
              bare[0] < 0.95 and bare[1] == 1, verdict="sharpened"),
        holds("With the KL to the previous policy, log-odds rise in every round: it never stops short of certainty",
              "least rise of log-odds in 5 rounds, beta 2", np.diff(mirror, axis=0).min(),
              ">= 1/(beta sqrt(1/4 + eps))",
              np.diff(mirror, axis=0).min() >= 1 / (2 * math.sqrt(0.25 + EPS)) - 1e-12),
        at_most("Without the division (Dr. GRPO) a single round is the end: logit p = logit ref + 1/beta",
                "largest distance from it over 3 rounds",
                np.abs(doctor[1:] - expit(logit(0.1) + 0.5)).max(), 1e-14),
        at_most("Dr. GRPO with the KL to the previous policy climbs by 1/beta a round",
                "largest difference of log-odds, 12 rounds",
                np.abs(both - both[0] - np.arange(13)[:, None] / 2).max(), 1e-9),
    ]  # fmt: skip


@functools.lru_cache
def _group_limits(size: int, ref: float = 0.1, beta: float = 1.0) -> float:
    """Where GRPO ends up from the reference if its advantages come from groups of finite size."""

    def step(p, _):
        success, failure = grpo.expected_advantage(p, whitened, size=size)
        return jax.nn.sigmoid(logit(ref) + (success - failure) / beta), None

    return float(jax.jit(lambda p: jax.lax.scan(step, p, length=100)[0])(jnp.asarray(ref)))


def _groups() -> list[Claim]:
    known = ((8, 0.1, 2.0949), (64, 0.1, 2.9293))
    advantage = jax.jit(lambda p, size: grpo.expected_advantage(p, standardised, size=size), static_argnums=1)
    rows = [
        equal(f"A group of {size} gives a success less than the {math.sqrt((1 - p) / p):g} of a large one, p = {p:g}",
              "E[A | success], by the binomial law of the others", advantage(p, size)[0], value, atol=5e-5)
        for size, p, value in known
    ]  # fmt: skip
    p = np.array([1e-9, 0.01, 0.3, 0.7])
    success, failure = (np.asarray(a) for a in advantage(p, 8))
    limits = [_group_limits(size) for size in (4, 8, 64)]
    return [
        *rows,
        at_most("Mean advantages of a group are 0 for every p", "largest |p E[A | 1] + (1 - p) E[A | 0]|, G = 8",
                np.abs(p * success + (1 - p) * failure).max(), 1e-14),
        equal("The largest weight of a rare success is sqrt(G - 1), where an infinite group has no bound",
              "E[A | success], p = 1e-9, G = 8", success[0], math.sqrt(7), rtol=1e-6, verdict="sharpened"),
        holds("So small groups amplify less: where rounds from ref 0.1 at beta 1 end with groups of 4, 8 and 64",
              "success probability for G = 4, 8, 64", ", ".join(f"{x:.4f}" for x in limits), "rising to 0.4442",
              limits[0] < limits[1] < limits[2] < 0.44418212, verdict="sharpened"),
    ]  # fmt: skip


def _gradients() -> list[Claim]:
    logits, reward = jnp.array([0.3, -0.2, 0.7]), jnp.array([1.0, 0.0, 0.9])
    policy = softmax(np.asarray(logits))
    truth = policy * (np.asarray(reward) - policy @ np.asarray(reward))
    greedy = reward[jnp.argmax(logits)]

    def remax(r):
        return greedy_baseline(r, jnp.full(r.shape[:-1], greedy))

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def gradient(reward, advantage, size):
        return grpo.expected_gradient(logits, reward, advantage, size=size)

    def cosine(reward: Any, size: int) -> float:
        exact = policy * (np.asarray(reward) - policy @ np.asarray(reward))
        found = np.asarray(gradient(reward, standardised, size))
        return float(exact @ found / np.linalg.norm(exact) / np.linalg.norm(found))

    turned = cosine(reward, 4)
    return [
        at_most("The expected gradients of RLOO and ReMax are that of the reward",
                "largest error, all groups of 4 of 3 arms",
                max(np.abs(gradient(reward, a, 4) - truth).max() for a in (leave_one_out, remax)), 1e-14),
        at_most("Less the mean of the whole group (Dr. GRPO) it is (G - 1)/G of it", "largest error, G = 2 and 5",
                max(np.abs(gradient(reward, centred, g) - (g - 1) / g * truth).max() for g in (2, 5)), 1e-14),
        holds("Dividing by the standard deviation of the group only rescales it: rewards 1, 0, 0.9, G = 4",
              "cosine with the gradient of the reward", turned, "1", turned < 0.9, verdict="refuted"),
        equal("It does so for rewards of 0 and 1", "cosine with the gradient of the reward, rewards 1, 0, 1, G = 4",
              cosine(jnp.array([1.0, 0.0, 1.0]), 4), 1, atol=1e-12),
    ]  # fmt: skip


def draw_bifurcation():
    """Where the orbit ends up, and how fast neighbours part, against beta."""
    figure, axes = plt.subplots(2, 1, figsize=(6.0, 5.0), sharex=True, height_ratios=(2, 1), dpi=100)
    beta = np.linspace(0.4, 1.4, 501)
    settings = np.stack(np.broadcast_arrays(RARE, beta, EPS))
    path = _orbits(np.full_like(beta, 0.3), *settings, 1040)
    rate = jax.vmap(lambda b: lyapunov_exponent(0.3, RARE, beta=b, eps=EPS, steps=2000))(beta)
    last = logit(np.asarray(path)[:, -40:])
    axes[0].plot(np.repeat(beta, 40), last.ravel(), ",", color=PALETTE[0])
    fixed = _fixed(*settings)
    lowest = np.asarray(fixed.logit[:, 0])
    axes[0].plot(beta, lowest, "-", lw=1, color=PALETTE[1], label="lowest fixed point")
    axes[0].axhline(logit(RARE), ls="--", lw=1, color="black", label="reference")
    axes[0].set_ylabel("log-odds of success, rounds 1001-1040")
    axes[0].legend(fontsize=8, loc="upper right")
    axes[1].plot(beta, np.asarray(rate), ".", ms=2, color=PALETTE[0])
    axes[1].axhline(0, lw=1, color="black")
    axes[1].set_ylim(-2, 1)
    axes[1].set_ylabel("Lyapunov exponent,\nnats a round")
    axes[1].set_xlabel(r"$\beta$ (reference $10^{-6}$, $\epsilon$ = 0.01)")
    return figure


def draw_cobwebs():
    """The map with an orbit: two ends, a cycle, chaos."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.4), dpi=100)
    panels = ((0.1, 1.0, (0.2, 0.987), 30, "two ends"), (RARE, 0.68129, (0.3,), 40, "a cycle of two"),
              (RARE, 0.50714, (0.3,), 60, "chaos"))  # fmt: skip
    for ax, (ref, beta, starts, steps, name) in zip(axes, panels, strict=True):
        low, high = logit(ref) - 1, (9 if ref == 0.1 else 7)
        x = np.linspace(low, high, 400)
        ax.plot(x, logit(np.asarray(success_map(expit(x), ref, beta=beta, eps=EPS))), "-", lw=1.3, color=PALETTE[0])
        ax.plot(x, x, "-", lw=0.8, color="0.5")
        for colour, start in zip(PALETTE[1:], starts, strict=False):
            path = logit(np.asarray(orbit(start, ref, beta=beta, eps=EPS, steps=steps)))
            corners = np.repeat(path, 2)
            ax.plot(corners[:-1], np.r_[low, corners[2:]], "-", lw=0.6, color=colour)
            ax.plot(path[0], low, "o", ms=4, color=colour, clip_on=False)
        ax.set_xlim(low, high)
        ax.set_ylim(low, high)
        ax.set_aspect("equal")
        ax.set_title(rf"{name}: ref {ref:g}, $\beta$ = {beta:g}", fontsize=9)
        ax.set_xlabel("log-odds of success")
    axes[0].set_ylabel("log-odds in the next round")
    return figure


FAMILY = Family(
    name="grpo_dynamics",
    title="GRPO on a binary reward is a one-dimensional map, with cycles and chaos",
    text="""
With a reward of 0 or 1, exact optimisation and KL to a fixed reference, a round of GRPO leaves one number to follow:
p_n = h(p_{n-1}), logit h(p) = logit ref + 1 / (beta sqrt(p (1 - p) + eps)). The analysis of Mroueh (2025) says when its
fixed points exceed the reference and when they attract. They exceed it always; and they may be three, or repel.

The whitening is what makes it interesting: the division by the standard deviation gives rare success and rare failure
a weight up to 1/sqrt(eps). Without it (Dr. GRPO) a single round is the end. Finite groups temper it, and expectations
over them are exact here, by the binomial law or by enumeration.
""",
    claims=claims,
    figures={"bifurcation": draw_bifurcation, "cobwebs": draw_cobwebs},
    sources=(
        "Mroueh, 2025, [arXiv:2503.06639](https://arxiv.org/abs/2503.06639)",
        "Shao et al., 2024 (GRPO), [arXiv:2402.03300](https://arxiv.org/abs/2402.03300)",
        "Liu et al., 2025 (Dr. GRPO), [arXiv:2503.20783](https://arxiv.org/abs/2503.20783)",
        "Ahmadian et al., 2024 (RLOO), [arXiv:2402.14740](https://arxiv.org/abs/2402.14740)",
        "Li et al., 2023 (ReMax), [arXiv:2310.10505](https://arxiv.org/abs/2310.10505)",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
