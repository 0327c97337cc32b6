"""What search over prefixes returns, and what values it needs, on trees small enough to know the best completion.

    python -m experiments.theory.search

Expected: exact with the largest reachable reward, or once nothing is pruned; refuted: that a wider beam is never worse,
and that mean values sample the optimum; about 12 seconds on two cores.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import special

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from tiltjax.exact import tree

__all__ = ["FAMILY", "claims"]

V, H, TREES = 3, 4, 256
K = V**H
"""Completions of four tokens of three, each with a normal reward of its own; random trees of them."""

WIDTHS, DEPTHS, BETA = (1, 2, 4, 8, V ** (H - 1)), tuple(range(H)), 0.3

BLOCK_N, MANY = 4, (4, 8, 16, 32, 256)
"""Blocks drawn at a time, and at how many it is asked whether blocks pay."""

SIMULATIONS, EXPLORATION, SEARCHES = (1, 10, 30, 100, 300, 1000, 3000), 4.0, 128


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page."""
    return [*_beams(), *_lookahead(), *_blocks(), *_decoding(), *_uct(fast)]


@functools.lru_cache
def _trees() -> tuple[list[np.ndarray], np.ndarray]:
    rng = np.random.default_rng(0)
    ref = [special.log_softmax(rng.normal(size=(TREES, V**t, V)), -1) for t in range(H)]
    return ref, rng.normal(size=(TREES, K))


@functools.lru_cache
def _found() -> dict[str, Any]:
    """Rewards found in every tree, ``[TREES]`` each, and the laws of blockwise best-of-n."""
    ref, reward = _trees()

    @jax.jit
    def compute(ref, reward):
        values = {"max": tree.max_values(ref, reward), "mean": tree.mean_values(ref, reward)}
        values["soft"] = tree.soft_values(ref, reward, beta=BETA)

        def rewarded(index):
            return jnp.take_along_axis(reward, index[:, None], axis=-1)[:, 0]

        out = {"best": jnp.max(reward, -1), "log_z": values["soft"][0][:, 0], "root": values["mean"][0][:, 0]}
        for name, value in values.items():
            out |= {f"{name}, width {w}": rewarded(tree.beam_search(value, width=w)) for w in WIDTHS}
        out |= {f"mean, depth {d}": rewarded(tree.lookahead_search(values["mean"], depth=d)) for d in DEPTHS}
        ref_law = jnp.exp(tree.sequence_logp(ref))
        whole = bandit.best_of_n_law(ref_law, reward, n=BLOCK_N)
        for name, block in (("mean", 2), ("max", 1)):
            law = tree.blockwise_best_of_n_law(ref, values[name], n=BLOCK_N, block=block)
            out[f"{name}, block {block}"] = jnp.sum(law * reward, -1)
        for block in (1, H):
            law_of = functools.partial(tree.blockwise_best_of_n_law, ref, values["mean"], block=block)
            laws = jax.vmap(lambda n, law_of=law_of: law_of(n=n))(jnp.asarray(MANY))
            out |= {f"{n} of block {block}": x for n, x in zip(MANY, jnp.sum(laws * reward[None], -1), strict=True)}
            out[f"mean, block {block}"] = out[f"{BLOCK_N} of block {block}"]
        out["apart"] = jnp.max(jnp.abs(laws[MANY.index(BLOCK_N)] - whole), -1)
        out["cost"] = BETA * -jnp.log(jnp.take_along_axis(ref_law, jnp.argmax(reward, -1)[:, None], -1)[:, 0])
        return out

    return {name: np.asarray(value) for name, value in compute(ref, reward).items()}


def _loss(name: str) -> np.ndarray:
    """What a search loses to the best completion, ``[TREES]``."""
    return _found()["best"] - _found()[name]


def _beams() -> list[Claim]:
    f = _found()
    by_width = [_loss(f"mean, width {w}").mean() for w in WIDTHS]
    pairs = itertools.pairwise(WIDTHS)
    worse = np.any([f[f"mean, width {wide}"] < f[f"mean, width {narrow}"] - 1e-12 for narrow, wide in pairs], axis=0)
    return [
        at_most(f"With the largest reachable reward as the value a beam of width 1 is exact: {TREES} random trees",
                "largest loss, reward units", _loss("max, width 1").max(), 0),
        holds("With mean values, as of a process reward model trained on roll-outs, a narrow beam is not",
              "mean loss at widths " + ", ".join(map(str, WIDTHS)), " ".join(f"{x:.3f}" for x in by_width),
              "falling to 0", all(np.diff(by_width) < 0) and by_width[-1] == 0),
        holds("A wider beam is never worse", "trees in which twice the width returns less", int(worse.sum()), "> 0",
              worse.any(), verdict="refuted"),
        at_most("A beam is sure to be exact from width V^(H-1) on: it then prunes nothing",
                f"largest loss at width {WIDTHS[-1]}", _loss(f"mean, width {WIDTHS[-1]}").max(), 0,
                verdict="sharpened"),
        at_most("Greedy search by mean values never returns less than the value of the root, E_ref r",
                "largest shortfall", (f["root"] - f["mean, width 1"]).max(), 1e-12, verdict="sharpened"),
        at_most("Greedy search by soft values returns no less than beta log Z: it loses at most beta log(1 / ref(y*))",
                f"largest of shortfall from beta log Z, loss less its bound, beta {BETA}",
                max((f["log_z"] - f["soft, width 1"]).max(), (_loss("soft, width 1") - f["cost"]).max()), 1e-12,
                verdict="sharpened"),
    ]  # fmt: skip


def _lookahead() -> list[Claim]:
    by_depth = [_loss(f"mean, depth {d}").mean() for d in DEPTHS]
    greedy = np.abs(_loss("mean, depth 0") - _loss("mean, width 1")).max()
    return [
        holds("Looking further past every token mends mean values",
              "mean loss at depths " + ", ".join(map(str, DEPTHS)), " ".join(f"{x:.3f}" for x in by_depth),
              "falling", all(np.diff(by_depth) < 0) and greedy == 0),
        at_most("A look to the end, depth H - 1, is exact", "largest loss", _loss(f"mean, depth {H - 1}").max(), 0),
    ]  # fmt: skip


def _blocks() -> list[Claim]:
    f = _found()
    gains = {name: f[name] - f[f"mean, block {H}"] for name in ("mean, block 1", "mean, block 2", "max, block 1")}
    one, bold = gains["mean, block 1"], gains["max, block 1"]
    by_n = [float((f[f"{n} of block 1"] - f[f"{n} of block {H}"]).mean()) for n in MANY]
    return [
        at_most("Blockwise best-of-n with one block is best-of-n", "largest error of a probability, n = 4",
                f["apart"].max(), 1e-14),
        holds("At the same number of tokens blocks of one token by mean values beat best-of-n on average",
              f"mean gain in E r, n = {', '.join(map(str, MANY))}", " ".join(f"{x:.3f}" for x in by_n),
              "falling below 0", by_n[0] > 0 > by_n[-1] and all(np.diff(by_n) < 0), verdict="refuted"),
        holds(f"With few draws, n = {BLOCK_N}, blocks of one token by mean values beat best-of-n on average",
              f"mean gain in E r, n = {BLOCK_N}, blocks of 2, of 1",
              f"{gains['mean, block 2'].mean():.4f}, {one.mean():.4f}",
              "growing from 0", 0 < gains["mean, block 2"].mean() < one.mean(), verdict="sharpened"),
        holds("Blocks by mean values do not gain in every tree: the largest mean can lead away from the best one",
              f"trees where blocks of one token gain, lose, n = {BLOCK_N}",
              f"{(one > 0).sum()}, {(one < 0).sum()}", "both above 0",
              0 < (one < 0).sum() < TREES, verdict="sharpened"),
        holds("The largest reachable reward, exact for a beam, does not make blocks of random draws safe either",
              f"trees where blocks of one token gain, lose, n = {BLOCK_N}; mean gain",
              f"{(bold > 0).sum()}, {(bold < 0).sum()}; {bold.mean():.4f}", "both above 0",
              0 < (bold < 0).sum() < TREES, verdict="sharpened"),
    ]  # fmt: skip


BETAS = 2.0 ** np.arange(-4, 9)


@functools.lru_cache
def _tilts() -> dict[str, np.ndarray]:
    """`decoded` in the first tree."""
    return decoded([level[0] for level in _trees()[0]], _trees()[1][0])


def decoded(ref: list[np.ndarray], reward: np.ndarray) -> dict[str, np.ndarray]:
    """Total variation to the tilt against `BETAS`, by mean and by soft values, and what it tends to."""
    return {name: np.asarray(value) for name, value in _decoded()(ref, reward, BETAS).items()}


@functools.lru_cache
def _decoded() -> Callable[..., dict[str, Any]]:
    @jax.jit
    def compute(ref, reward, betas):
        mean = tree.mean_values(ref, reward)

        def away(beta):
            target = bandit.tilted(jnp.exp(tree.sequence_logp(ref)), reward, beta=beta)
            kinds = {"mean": mean, "soft": tree.soft_values(ref, reward, beta=beta)}
            laws = {k: jnp.exp(tree.sequence_logp(tree.tilted_policy(ref, v, beta=beta))) for k, v in kinds.items()}
            out = {k: bandit.total_variation(law, target) for k, law in laws.items()}
            return out | {"lost": jnp.sum((target - laws["mean"]) * reward)}

        # The second order of a soft value is the variance of what is still to come; what its mean over tokens leaves
        # is missing from mean values.
        variance = [square - m**2 for square, m in zip(tree.mean_values(ref, reward**2), mean, strict=True)]
        terms = [v.reshape(p.shape) for v, p in zip(variance[1:], ref, strict=True)]
        terms = [v - jnp.sum(jnp.exp(p) * v, -1, keepdims=True) for v, p in zip(terms, ref, strict=True)]
        constant = jnp.exp(tree.sequence_logp(ref)) @ jnp.abs(tree.path_sums(terms)[-1]) / 4
        greedy = reward[tree.beam_search(mean, width=1)]
        cold = jnp.exp(tree.sequence_logp(tree.tilted_policy(ref, mean, beta=1e-3))) @ reward
        return jax.vmap(away)(betas) | {"constant": constant, "greedy": greedy, "cold": cold}

    return compute


def _decoding() -> list[Claim]:
    t = _tilts()
    far = BETAS >= 32
    slope = np.polyfit(np.log(BETAS[far]), np.log(t["mean"][far]), 1)[0]
    return [
        holds("Controlled decoding by mean values samples the optimum of E r - beta KL", "TV to the tilt, beta 0.5",
              t["mean"][BETAS == 0.5][0], "not 0", t["mean"][BETAS == 0.5][0] > 0.05, verdict="refuted"),
        equal("Decoding by mean values is right to first order in 1 / beta: its distance falls as 1 / beta^2",
              "slope of log TV against log beta, 32 to 256", slope, -2, atol=0.02, verdict="sharpened"),
        equal("The constant of that distance is E_ref |sum_t (v_t - E[v_t | y_<t])| / 4, v_t = Var_ref(r | y_<=t)",
              f"beta^2 TV, beta {BETAS[-1]:g}", BETAS[-1] ** 2 * t["mean"][-1], t["constant"], rtol=0.02,
              verdict="sharpened"),
        at_most("Decoding by soft values is exact at every beta", "largest TV to the tilt, beta 1/16 to 256",
                t["soft"].max(), 1e-13),
        equal("As beta goes to 0 decoding by mean values becomes greedy search by them", "E r, beta 0.001", t["cold"],
              t["greedy"], atol=1e-6, verdict="sharpened"),
    ]  # fmt: skip


@functools.lru_cache
def _hard() -> tuple[list[np.ndarray], np.ndarray]:
    """The tree in which greedy search by mean values loses most."""
    ref, reward = _trees()
    worst = int(np.argmax(_loss("mean, width 1")))
    return [level[worst] for level in ref], reward[worst]


@functools.lru_cache
def _search() -> Callable[..., Any]:
    @functools.partial(jax.jit, static_argnames="searches")
    def rewards(key, ref, reward, num_simulations, exploration, *, searches):
        def one(key):
            return tree.uct_search(key, ref, reward, num_simulations=num_simulations, exploration=exploration)

        return reward[jax.vmap(one)(jax.random.split(key, searches))]

    return rewards


@functools.lru_cache
def _uct_rewards(exploration: float = EXPLORATION) -> dict[int, np.ndarray]:
    """Rewards of independent searches, by number of simulations."""
    ref, reward = _hard()
    sizes = SIMULATIONS if exploration == EXPLORATION else SIMULATIONS[-1:]
    found = {}
    for n in sizes:
        key = jax.random.key(n)
        found[n] = np.asarray(_search()(key, ref, reward, np.int32(n), np.float64(exploration), searches=SEARCHES))
    return found


@functools.lru_cache
def _best_of() -> dict[int, float]:
    """Mean reward of best-of-n, by n."""
    ref, reward = _hard()

    @jax.jit
    def compute(ref, reward, n):
        law = jnp.exp(tree.sequence_logp(ref))
        return jax.vmap(lambda n: bandit.best_of_n_law(law, reward, n=n) @ reward)(n)

    return dict(zip(SIMULATIONS, np.asarray(compute(ref, reward, np.array(SIMULATIONS))).tolist(), strict=True))


def _uct(fast: bool) -> list[Claim]:
    ref, reward = _hard()
    found, timid = _uct_rewards(), _uct_rewards(0.1)
    mean = {n: x.mean() for n, x in found.items()}
    error = {n: x.std() / np.sqrt(SEARCHES) for n, x in found.items()}
    law = np.exp(ref[0][0]) @ reward[_likeliest(ref)]
    draws = SEARCHES if fast else 4096
    once = np.asarray(_search()(jax.random.key(99), ref, reward, np.int32(1), np.float64(EXPLORATION), searches=draws))
    ahead = {n: mean[n] - _best_of()[n] for n in (30, 100)}
    last, best = SIMULATIONS[-1], reward.max()
    low = timid[last]
    return [
        equal("After one simulation tree search writes its drawn first token and the reference's likeliest rest",
              f"mean reward, {len(once)} searches, 4 s.e. of the exact law", once.mean(), law,
              atol=4 * once.std() / np.sqrt(len(once))),
        holds(f"More simulations find more: UCT in the tree hardest for mean values, c = 4, {SEARCHES} searches",
              "mean reward at 1, 30, 100 simulations", f"{mean[1]:.3f}, {mean[30]:.3f}, {mean[100]:.3f}",
              "each above the last by 4 s.e.",
              all(mean[b] - mean[a] > 4 * np.hypot(error[a], error[b]) for a, b in ((1, 30), (30, 100)))),
        equal("UCT comes to the best completion", f"mean reward, {last} simulations", mean[last], best, atol=0.1),
        holds("With few roll-outs UCT is behind best-of-n, with more ahead of it",
              "mean reward of UCT less that of best-of-n, 30 and 100 roll-outs",
              f"{ahead[30]:.3f}, {ahead[100]:.3f}", "below 0, above 0, by 4 s.e.",
              ahead[30] < -4 * error[30] and ahead[100] > 4 * error[100], verdict="sharpened"),
        holds("UCT with too little exploration does not recover from early luck",
              f"mean reward, c = 0.1, {last} simulations",
              low.mean(), f"< {mean[last]:.3f}, c = 4, by 4 s.e.",
              low.mean() + 4 * np.hypot(low.std() / np.sqrt(SEARCHES), error[last]) < mean[last], verdict="sharpened"),
    ]  # fmt: skip


def _likeliest(ref: Sequence[np.ndarray]) -> np.ndarray:
    """For every first token the completion that follows the reference's likeliest tokens, ``[V]``."""
    prefix = np.arange(V)
    for level in ref[1:]:
        prefix = V * prefix + level[prefix].argmax(-1)
    return prefix


def draw_search():
    """Losses against the width of the beam, and tree search against simulations."""
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.5))
    labels = {"mean": "mean values", "soft": rf"soft values, $\beta$ = {BETA}", "max": "largest reachable reward"}
    for (name, label), marker, colour in zip(labels.items(), "osD", PALETTE, strict=False):
        losses = np.stack([_loss(f"{name}, width {w}") for w in WIDTHS])
        error = 2 * losses.std(-1) / np.sqrt(TREES)
        axes[0].errorbar(WIDTHS, losses.mean(-1), error, fmt=marker, ms=5, mfc="none", color=colour, label=label)
    depths = [_loss(f"mean, depth {d}").mean() for d in DEPTHS]
    axes[0].plot(
        [V**d for d in DEPTHS], depths, "x", color=PALETTE[3], label=r"mean values, lookahead to $3^{depth}$ prefixes"
    )
    axes[0].axhline(0, lw=1, color="black")
    axes[0].set_xscale("log", base=3)
    axes[0].set_xlabel("width of the beam (prefixes)")
    axes[0].set_ylabel("loss to the best completion (reward units)")
    axes[0].set_title(f"means over {TREES} trees; bars: 2 s.e.", fontsize=10)
    axes[0].legend(fontsize=8)
    found = _uct_rewards()
    sizes = np.array(list(found))
    mean = np.array([x.mean() for x in found.values()])
    error = np.array([2 * x.std() / np.sqrt(SEARCHES) for x in found.values()])
    reward = _hard()[1]
    axes[1].errorbar(sizes, mean, error, fmt="o", ms=5, color=PALETTE[0], label="UCT, c = 4")
    axes[1].plot(sizes, [_best_of()[n] for n in SIMULATIONS], "-", lw=1, color=PALETTE[1], label="best-of-n, exact")
    axes[1].axhline(reward.max(), lw=1, color="black", label="best completion")
    greedy = reward.max() - _loss("mean, width 1").max()
    axes[1].axhline(greedy, lw=1, ls="--", color=PALETTE[2], label="greedy by mean values")
    axes[1].set_xscale("log")
    axes[1].set_xlabel("roll-outs")
    axes[1].set_ylabel("mean reward")
    axes[1].set_title(f"hardest tree; {SEARCHES} searches; bars: 2 s.e.", fontsize=10)
    axes[1].legend(fontsize=8, loc="lower right")
    return figure


def draw_decoding():
    """Distance to the tilt against beta."""
    t = _tilts()
    figure, ax = plt.subplots(figsize=(5.4, 3.9))
    ax.loglog(BETAS, t["mean"], "o", ms=5, color=PALETTE[0], label="tokens tilted by mean values")
    ax.loglog(
        BETAS[4:],
        t["constant"] / BETAS[4:] ** 2,
        "-",
        lw=1,
        color=PALETTE[0],
        label=r"first order: constant / $\beta^2$",
    )
    ax.loglog(BETAS, np.maximum(t["soft"], 1e-17), "s", ms=4, mfc="none", color=PALETTE[1], label="by soft values")
    ax.set_ylim(1e-18, 5)
    ax.set_xlabel(r"$\beta$ (reward units)")
    ax.set_ylabel("total variation to the tilt")
    ax.legend(fontsize=8, loc="center right")
    return figure


FAMILY = Family(
    name="search",
    title="Search is as good as its values: largest, soft or mean",
    text="""
Beam search, lookahead, blockwise best-of-n and tree search on trees of 81 completions, whose best completion is known.
With the largest reachable reward as the value even greedy search is exact. A process reward model trained on roll-outs
estimates the mean instead, and then breadth or depth must make up for it: on average they do, tree by tree a wider beam
can be worse. Greedy search never returns less than the value of its root, which for soft values is beta log Z. Blocks
chosen by mean values beat whole completions while few are drawn; among many the best completion itself turns up.

The same difference decides what controlled decoding samples. Tilting every token by soft values is the tilt of whole
completions; by mean values it agrees with it to first order in 1 / beta, with a constant that is known.
""",
    claims=claims,
    figures={"search": draw_search, "decoding": draw_decoding},
    sources=(
        "Mudgal et al., 2023, [arXiv:2310.17022](https://arxiv.org/abs/2310.17022)",
        "Snell et al., 2024, [arXiv:2408.03314](https://arxiv.org/abs/2408.03314)",
        "Kocsis & Szepesvári, 2006, Bandit based Monte-Carlo planning",
        "Guan et al., 2025, [arXiv:2501.04519](https://arxiv.org/abs/2501.04519)",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
