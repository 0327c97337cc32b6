"""What a policy's log-ratio says of every prefix, and what outcome labels can teach it.

    python -m experiments.theory.process_rewards

Expected: prefix log-ratios are exact soft values; refuted: two printed indices, and cross-entropy without a bias;
about 6 seconds on two cores.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import special

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from tiltjax.exact import tree
from tiltjax.losses.process import (
    aggregate_steps,
    implicit_prm_ce_loss,
    implicit_prm_dpo_loss,
    implicit_process_reward,
    implicit_q,
    step_index,
    step_reward,
)

__all__ = ["FAMILY", "claims"]

V, H, BETA = 3, 4, 0.5
K = V**H
"""A policy and a reference over all completions of four tokens of three."""

SHORT, EASE = 2, np.array([1.5, -1.0])
"""Tokens of the completions whose outcomes are labelled; mean log-odds that one of either prompt is right."""


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page."""
    return [*_values(), *_printed(), *_optimum(), *_outcomes()]


def _levels(seed: int, scale: float, horizon: int, *batch: int) -> list[np.ndarray]:
    """A token policy of softmaxes of normal logits."""
    rng = np.random.default_rng(seed)
    return [special.log_softmax(scale * rng.normal(size=(*batch, V**t, V)), -1) for t in range(horizon)]


def _at_tokens(prefixes: Sequence[Any], horizon: int) -> np.ndarray:
    """Values of the prefixes of 1 ... H tokens along every completion, ``[*batch, K, H]``."""
    repeats = [V ** (horizon - t - 1) for t in range(horizon)]
    return np.stack([np.repeat(x, n, axis=-1) for x, n in zip(prefixes, repeats, strict=True)], -1)


def _token_logp(policy: Sequence[np.ndarray]) -> np.ndarray:
    return _at_tokens([level.reshape(*level.shape[:-2], -1) for level in policy], len(policy))


@functools.lru_cache
def _model() -> dict[str, Any]:
    """Process rewards of a random policy, and values of its implicit reward."""
    policy, ref = _levels(7, 1.5, H), _levels(0, 1.0, H)

    @jax.jit
    def compute(policy, ref, token_logp, ref_token_logp):
        reward = implicit_process_reward(token_logp, ref_token_logp, beta=BETA)
        last = jnp.broadcast_to(jnp.array([False, True, False, True]), reward.shape)
        outcome = tree.implicit_values(policy, ref, beta=BETA)[-1]
        steps, _ = step_reward(reward, step_index(last), num_steps=2)
        gains = [BETA * (p - r) for p, r in zip(policy, ref, strict=True)]
        return {
            "reward": reward,
            "q": implicit_q(token_logp, ref_token_logp, beta=BETA),
            "outcome": outcome,
            "steps": steps,
            "total": aggregate_steps(steps, mode="sum"),
            "soft": tree.soft_values(ref, outcome, beta=BETA),
            "mean": tree.mean_values(ref, outcome),
            "max": tree.max_values(ref, outcome),
            "martingale": [jnp.sum(jnp.exp(r + g / BETA), -1) for r, g in zip(ref, gains, strict=True)],
        }

    out = jax.tree.map(np.asarray, compute(policy, ref, _token_logp(policy), _token_logp(ref)))
    for name in ("soft", "mean", "max"):
        out[name] = _at_tokens(out[name][1:], H)
    return out | {"ref": ref}


def _values() -> list[Claim]:
    m = _model()
    q, steps = m["q"], m["steps"]
    outside = max((m["mean"] - q).max(), (q - m["max"]).max())
    return [
        at_most("The log-ratio of a prefix is the soft value beta log E_ref[exp(r / beta) | y_<=t] of the outcome",
                "largest error, 81 completions of 4 tokens", np.abs(q - m["soft"]).max(), 1e-13),
        at_most("It lies between the mean and the largest outcome reward that the prefix can lead to",
                "largest excess over either bound", outside, 1e-13),
        at_most("Process rewards add up to the outcome reward", "largest error",
                np.abs(m["total"] - m["outcome"]).max(), 1e-13),
        at_most("The reward of a step is the gain of q between its boundaries", "largest error, steps of 2 tokens",
                np.abs(np.cumsum(steps, -1) - q[:, 1::2]).max(), 1e-13),
        at_most("Under the reference exp(r_t / beta) has mean 1 after every prefix: no policy can reward "
                "everything", "largest |E_ref exp(r_t / beta) - 1|",
                max(np.abs(x - 1).max() for x in m["martingale"]), 1e-13, verdict="sharpened"),
    ]  # fmt: skip


def _printed() -> list[Claim]:
    m = _model()
    reward, q = m["reward"], m["q"]
    before = np.concatenate([np.zeros((K, 1)), q[:, :-1]], -1)
    twice = reward + np.concatenate([np.zeros((K, 1)), reward[:, :-1]], -1)
    # Given only the tokens before the t-th one.
    without = np.concatenate([np.zeros((K, 1)), m["soft"][:, :-1]], -1)
    return [
        holds("The process reward of token t is the sum of its log-ratio terms from i = t - 1 to t",
              "largest |printed sum - (q_t - q_(t-1))|", np.abs(twice - (q - before)).max(), "not 0",
              np.abs(twice - (q - before)).max() > 0.5, verdict="refuted"),
        at_most("The process reward of token t is its own term alone", "largest |r_t - (q_t - q_(t-1))|",
                np.abs(reward - (q - before)).max(), 1e-14, verdict="sharpened"),
        at_most("Read token by token the printed sum counts all tokens but the last twice",
                "largest |its total - (2 r(y) - r_T)|", np.abs(twice.sum(-1) - 2 * q[:, -1] + reward[:, -1]).max(),
                1e-13, verdict="sharpened"),
        holds("q_t is beta log E_ref[exp(r / beta) | y_<t]", "largest error", np.abs(q - without).max(), "not 0",
              np.abs(q - without).max() > 0.5, verdict="refuted"),
        at_most("Given the tokens before t only, that expectation is q_(t-1): it is off by the reward of token t",
                "largest |q_t - printed - r_t|", np.abs(q - without - reward).max(), 1e-13, verdict="sharpened"),
    ]  # fmt: skip


def _optimum() -> list[Claim]:
    """Of a reward of its own, rather than an implicit one."""
    ref = _model()["ref"]
    reward = np.random.default_rng(1).normal(size=K)

    @jax.jit
    def compute(ref, reward):
        values = tree.soft_values(ref, reward, beta=BETA)
        policy = tree.tilted_policy(ref, values, beta=BETA)
        law = bandit.tilted(jnp.exp(tree.sequence_logp(ref)), reward, beta=BETA)
        error = jnp.max(jnp.abs(jnp.exp(tree.sequence_logp(policy)) - law))
        implied = tree.implicit_values(policy, ref, beta=BETA)
        return error, jnp.stack([jnp.max(jnp.abs(q - v + values[0])) for q, v in zip(implied, values, strict=True)])

    error, potential = compute(ref, reward)
    return [
        at_most("Tilting every token by its soft value tilts the completion", "largest error of a probability", error,
                1e-15),
        at_most("Along the optimum the log-ratio of a prefix is V(prefix) - V(root): process rewards are "
                "differences of a potential", "largest error", np.max(potential), 1e-13),
    ]  # fmt: skip


@functools.lru_cache
def _fits() -> dict[str, np.ndarray]:
    """Policies of every kind of training on the population of labels, and the logits that they imply, ``[2, 9]``."""
    ref = _levels(3, 0.7, SHORT, 2)
    odds = EASE[:, None] + 1.2 * np.random.default_rng(4).normal(size=(2, V**SHORT))

    @jax.jit
    def compute(ref, odds):
        ref_logp = tree.sequence_logp(ref)
        p, right = jnp.exp(ref_logp), jax.nn.sigmoid(odds)
        both = (*p.shape, p.shape[-1])

        def cross_entropy(logits, bias):
            loss = functools.partial(implicit_prm_ce_loss, jax.nn.log_softmax(logits), ref_logp, beta=BETA, bias=bias)
            correct = jnp.full(p.shape, True)
            return jnp.sum(p * (right * loss(correct) + (1 - right) * loss(~correct)))

        def pairs(table):
            chosen = jnp.broadcast_to(table[..., :, None], both)
            return jnp.stack([chosen, jnp.broadcast_to(table[..., None, :], both)], -1)

        def direct(logits):
            correct = jnp.broadcast_to(jnp.array([True, False]), (*both, 2))
            loss = implicit_prm_dpo_loss(pairs(jax.nn.log_softmax(logits)), pairs(ref_logp), correct, beta=BETA)
            return jnp.sum((p * right)[..., :, None] * (p * (1 - right))[..., None, :] * loss)

        def every(x):
            """Independent fits in one sum."""
            no_bias, one_bias = cross_entropy(x["none"], 0.0), cross_entropy(x["one"], jnp.broadcast_to(x["b"], (2,)))
            return no_bias + one_bias + cross_entropy(x["each"], x["biases"]) + direct(x["dpo"])

        kinds = ("none", "one", "each", "dpo")
        start = dict.fromkeys(kinds, ref_logp) | {"b": jnp.zeros(()), "biases": jnp.zeros(2)}
        found = tree.minimise(every, start)
        x = found.params
        out = {kind: BETA * (jax.nn.log_softmax(x[kind]) - ref_logp) for kind in kinds}
        values = tree.soft_values(ref, odds, beta=BETA)
        first = {}
        for kind in kinds:
            policy = tree.conditionals(jax.nn.log_softmax(x[kind]), vocab_size=V)
            first[f"{kind}, first"] = BETA * (policy[0] - ref[0])[..., 0, :]
        return out | first | {
            "bias": x["biases"], "one bias": x["b"], "slope": found.gradient, "p": p,
            "log_z": BETA * bandit.log_partition(p, odds, beta=BETA),
            "true, first": values[1] - values[0],
        }  # fmt: skip

    return {name: np.asarray(value) for name, value in compute(ref, odds).items()} | {"odds": odds}


def _outcomes() -> list[Claim]:
    f = _fits()
    odds, p = f["odds"], f["p"]
    error = {
        "none": np.abs(f["none"] - odds).mean(),
        "one": np.abs(f["one"] + f["one bias"] - odds).mean(),
        "each": np.abs(f["each"] + f["bias"][:, None] - odds).max(),
    }
    mass = (p * np.exp(f["none"] / BETA)).sum(-1)
    first = {kind: np.abs(f[f"{kind}, first"] - f["true, first"]).max() for kind in ("none", "each", "dpo")}
    off = f["dpo"] - odds
    return [
        holds("Cross-entropy on correctness teaches the log-odds of correctness: every label of the population, any "
              "policy allowed",
              "mean |r - log-odds of correctness|, two prompts of 9 completions", error["none"], "not 0",
              error["none"] > 0.1 and f["slope"] < 1e-12, verdict="refuted"),
        at_most("An implicit reward obeys E_ref exp(r / beta) = 1, so it fits log-odds s only where "
                "beta log E_ref exp(s / beta) = 0", "largest |E_ref exp(r / beta) - 1|", np.abs(mass - 1).max(), 1e-13,
                verdict="sharpened"),
        at_most("With a trained bias for each prompt cross-entropy fits the log-odds", "largest |r + b - s|",
                error["each"], 1e-6, verdict="sharpened"),
        equal("The bias of the easy prompt is beta log E_ref exp(s / beta)", "trained bias", f["bias"][0],
              f["log_z"][0], atol=1e-6, verdict="sharpened"),
        equal("The bias of the hard prompt is beta log E_ref exp(s / beta)", "trained bias", f["bias"][1],
              f["log_z"][1], atol=1e-6, verdict="sharpened"),
        holds("One bias for all prompts is not enough", "mean |r + b - s|", error["one"],
              f"> 0.01, < {error['none']:.5g} (no bias)", 0.01 < error["one"] < error["none"], verdict="sharpened"),
        at_most("With a bias for each prompt the process reward of the first token is the gain in soft value",
                "largest error, reward units", first["each"], 1e-6, verdict="sharpened"),
        holds("Without a bias process rewards are wrong too", "largest error at the first token", first["none"],
              "> 0.1", first["none"] > 0.1, verdict="sharpened"),
        at_most("DPO on right against wrong completions fits the log-odds up to a constant of the prompt",
                "spread of r - s over completions", np.ptp(off, axis=-1).max(), 1e-6),
        at_most("DPO's process rewards are the gains in soft value: the constant does not enter",
                "largest error at the first token", first["dpo"], 1e-6, verdict="sharpened"),
    ]  # fmt: skip


def draw_process():
    """Values along a completion, and what the training fits."""
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.5))
    m, f = _model(), _fits()
    y = int(np.argmax(m["max"][:, 1] - m["mean"][:, 1] + np.abs(m["reward"]).min(-1)))
    t = np.arange(H + 1)
    root = {"soft": 0.0, "mean": float(np.exp(_sequence(m["ref"])) @ m["outcome"]), "max": float(m["outcome"].max())}
    along = {name: np.append(root[name], m[name][y]) for name in root}
    axes[0].fill_between(
        t, along["mean"], along["max"], color=PALETTE[0], alpha=0.12, lw=0, label="mean to largest reward"
    )
    axes[0].plot(t, along["soft"], "-", lw=1, color=PALETTE[0])
    axes[0].plot(t, np.append(0, m["q"][y]), "o", color=PALETTE[0], label=r"$q_t$; line: soft value")
    reward = m["reward"][y]
    printed = np.cumsum(reward + np.append(0, reward[:-1]))
    axes[0].plot(t, np.append(0, printed), "x", color=PALETTE[1], label="sum of rewards as printed")
    axes[0].set_ylim(-2.4, 2.3)
    axes[0].set_xticks(t)
    axes[0].set_xlabel("tokens t of one completion")
    axes[0].set_ylabel("reward units")
    axes[0].legend(fontsize=8, loc="lower left")
    ends = np.array([f["odds"].min(), f["odds"].max()])
    axes[1].plot(ends, ends, "-", lw=1, color="black")
    series = (
        ("cross-entropy, no bias", f["none"], "x", 1),
        ("cross-entropy, bias per prompt", f["each"] + f["bias"][:, None], "o", 0),
        ("DPO", f["dpo"], "^", 2),
    )
    for label, fitted, marker, colour in series:
        axes[1].plot(f["odds"].ravel(), fitted.ravel(), marker, mfc="none", color=PALETTE[colour], label=label)
    for log_z, odds in zip(f["log_z"], f["odds"], strict=True):
        span = np.array([odds.min(), odds.max()])
        axes[1].plot(span, span - log_z, "-", lw=1, color=PALETTE[2])
    axes[1].set_xlabel("log-odds of correctness s")
    axes[1].set_ylabel("fitted logit")
    axes[1].set_title(r"lines: s; s $-\ \beta\,$log E$_{ref}$ exp(s / $\beta$)", fontsize=10)
    axes[1].legend(fontsize=8)
    return figure


def _sequence(levels: Sequence[Any]) -> np.ndarray:
    return np.asarray(jax.jit(tree.sequence_logp)(levels))


FAMILY = Family(
    name="process_rewards",
    title="A log-ratio is an exact process reward, of whatever its training let it fit",
    text="""
Write the outcome reward as r = beta log(pi / ref). Then the log-ratio of every prefix is the soft value of r given that
prefix, and each token's share of it is a process reward, for any policy at all. Two of the printed indices are off: the
sum of a token's reward has one term, and the expectation conditions on that token as well.

What r means depends on the training. Under the reference exp(r / beta) has mean 1, prompt by prompt, so cross-entropy
on correctness cannot fit the log-odds even with every label of the population and any policy allowed. A bias trained
for each prompt, or DPO between right and wrong completions, takes the constant away. Process rewards are then exact
gains in soft value.
""",
    claims=claims,
    figures={"process": draw_process},
    sources=(
        "Yuan et al., 2024, [arXiv:2412.01981](https://arxiv.org/abs/2412.01981)",
        "Cui et al., 2025, [arXiv:2502.01456](https://arxiv.org/abs/2502.01456)",
        "Rafailov et al., 2024, [arXiv:2404.12358](https://arxiv.org/abs/2404.12358)",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
