"""What a vote without labels teaches, and what sharpening does to pass@k, exactly.

    python -m experiments.theory.voting

Expected: training on votes ends in the policy's likeliest answer, right or wrong; refuted: lucky hits in a question
with two answers, and the bound on pass@k at k = 1; about 8 seconds on two cores.
"""

import functools
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import special, stats

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from experiments.theory.tabular import multisets
from tiltjax.ops.order import pass_at_k, pass_at_k_bound
from tiltjax.rewards.internal import empo_reward, majority_vote, ttrl_reward

__all__ = ["FAMILY", "claims"]

ANSWERS = np.array([0.3, 0.4, 0.1, 0.1, 0.1])
"""How often a policy gives each of five answers; the first one is right, so the likeliest is wrong."""

N = 8


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page."""
    return [*_votes(), *_many_votes(fast), *_training(), *_pass_at_k(), *_bound(), *_sharpening()]


@functools.lru_cache
def _orders(arms: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The library's vote and rewards on every ordered sample, gathered by composition.

    Returns:
      How often each answer occurs in each composition, ``[M, arms]``; the share of its orders in which each answer wins
      the vote, ``[M, arms]``; and the total reward of the candidates that give it, mean over orders, ``[M, arms]``.
    """
    drawn = np.stack(np.meshgrid(*[np.arange(arms, dtype=np.int8)] * n, indexing="ij"), -1).reshape(-1, n)
    winner, reward = jax.jit(lambda x: (majority_vote(x).answer, ttrl_reward(x)))(jnp.asarray(drawn))
    each = np.arange(arms)
    counts = (drawn[..., None] == each).sum(1)
    _, first, inverse, orders = np.unique(
        counts @ (n + 1) ** each, return_index=True, return_inverse=True, return_counts=True
    )
    cell, shape = inverse[:, None] * arms, (len(first), arms)
    won = np.bincount((cell[:, 0] + np.asarray(winner)), minlength=np.prod(shape)).reshape(shape)
    paid = np.bincount((cell + drawn).ravel(), np.asarray(reward).ravel(), np.prod(shape)).reshape(shape)
    return counts[first], won / orders[:, None], paid / orders[:, None]


def _chance(counts: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Multinomial probability of every composition, ``[M]``."""
    return np.asarray(stats.multinomial.pmf(counts, counts[0].sum(), p))


def _accuracies(p: np.ndarray) -> tuple[float, float]:
    """Chance that a vote is right, and the share of candidates whose reward is the one that a label would give.

    The first answer is the right one: its candidates should be paid, the others not.
    """
    counts, won, paid = _orders(len(p), N)
    judged = paid[:, 0] + (counts - paid)[:, 1:].sum(1)
    chance = _chance(counts, p)
    return float(chance @ won[:, 0]), float(chance @ judged / N)


def _given_answer(p: np.ndarray) -> np.ndarray:
    """Mean reward of a candidate that gives each answer, ``[K]``: E[r | a], the others drawn from the policy."""
    counts, _, paid = _orders(len(p), N)
    # Relative to p(a): the chance of a sample with an answer so rare that p(a) underflows is 0 as well.
    return (_chance(counts, p) @ paid) / (N * np.maximum(p, 1e-300))


def _votes() -> list[Claim]:
    binary = np.array([0.4, 0.6])
    label, share = _accuracies(ANSWERS)
    uniform, two = _accuracies(np.full(5, 0.2)), _accuracies(binary)
    counts, _, _ = _orders(5, N)
    best = counts == counts.max(1, keepdims=True)
    fair = _chance(counts, ANSWERS) @ (best[:, 0] / best.sum(1))
    return [
        equal("Where the likeliest answer is wrong, a vote of 8 mostly is",
              "P(vote is right), p = .3 against .4 .1 .1 .1", label, 0.3261, atol=5e-5),
        equal("Most rewards are right all the same: a wrong vote still gives 0 to the other wrong answers",
              "share of right rewards, p = .3 against .4 .1 .1 .1", share, 0.5237, atol=5e-5),
        equal("So they are on five equally likely answers, where the vote is right once in five",
              "share of right rewards", uniform[1], 0.5617, atol=5e-5),
        at_most("The first answer seen wins a tie, which is a fair draw among those tied",
                "|P(vote is right) - its value with ties drawn at random|", abs(label - fair), 1e-12),
        equal("Between two answers", "P(vote is right), p = .4 against .6", two[0], 0.2898, atol=5e-5),
        holds("Rewards are right more often than the vote, by lucky hits, whatever the question",
              "share of right rewards, p = .4 against .6", two[1], f"not above {two[0]:.5g}, the vote's",
              two[1] < two[0] + 1e-12, verdict="refuted"),
        at_most("With two answers all rewards of a vote are right or all are wrong",
                "largest |share of right rewards - P(vote is right)|, p from .1 to .9",
                max(abs(np.subtract(*_accuracies(np.array([p, 1 - p])))) for p in np.linspace(0.1, 0.9, 9)), 1e-12,
                verdict="sharpened"),
    ]  # fmt: skip


THREE = np.array([0.25, 0.65, 0.1])
"""Three answers, for votes of many candidates."""


@functools.lru_cache
def _win_chances(n: int) -> np.ndarray:
    """Chance that each of three answers wins a vote of ``n``, ``[3]``.

    The library's vote on every composition, once for each of the six orders in which three answers can first be seen.
    """
    drawn, orders = multisets(3, n)
    names = np.array(list(itertools.permutations(range(3))))
    # Renamed before the sort and named back after the vote, the answers keep their counts and change who comes first.
    winner = np.asarray(_winner(np.sort(np.argsort(names, axis=1)[:, drawn], axis=-1)))
    won = (np.take_along_axis(names, winner, axis=1)[..., None] == np.arange(3)).mean(0)
    return (orders * THREE[drawn].prod(1)) @ won


@jax.jit
def _winner(drawn):
    return majority_vote(drawn).answer


def _many_votes(fast: bool) -> list[Claim]:
    sizes = np.array([8, 16, 24, 32]) if fast else np.array([8, 16, 24, 32, 48, 64])
    won = np.array([_win_chances(int(n)) for n in sizes])
    wrong = 1 - won[:, 1]
    # Chernoff: a rival reaches the mode with chance at most rho^n, rho = 1 - (sqrt p_mode - sqrt p_rival)^2.
    rho = 1 - (np.sqrt(THREE[1]) - np.sqrt(THREE[[0, 2]])) ** 2
    bound = (rho ** sizes[:, None]).sum(1)
    slope = np.diff(np.log(wrong[-2:]) + np.log(sizes[-2:]) / 2)[0] / (sizes[-1] - sizes[-2])
    few = [right_vote(ANSWERS, n) for n in (1, 4, 8, 16)]
    return [
        holds("With more votes the label tends to the likeliest answer, here a right one",
              f"P(vote is right), p = .65 against .25 .1, N = {sizes[-1]}", won[-1, 1], f"> {won[0, 1]:.5g}, at N = 8",
              (np.diff(won[:, 1]) > 0).all()),
        holds("A right answer that is not the likeliest is voted down more surely with every further candidate",
              "P(vote is right), p = .3 against .4 .1 .1 .1, N = 1, 4, 8, 16", " ".join(f"{x:.3f}" for x in few),
              "growing up to N = 8", few[0] < few[1] < few[2] > few[3], verdict="refuted"),
        holds("From some N on, a right answer that is not the likeliest is voted down the more surely",
              f"P(vote is right), p = .25 against .65 .1, N = {sizes[-1]}", won[-1, 0], f"< {won[0, 0]:.5g}, at N = 8",
              (np.diff(won[:, 0]) < 0).all()),
        at_most("The chance that the likeliest answer loses is at most the sum over rivals b of (1 - (sqrt p_mode - "
                "sqrt p_b)^2)^N", f"largest ratio to the bound, N up to {sizes[-1]}", (wrong / bound).max(), 1,
                verdict="sharpened"),
        equal("The nearest rival's term is its rate, up to a factor 1 / sqrt N",
              f"slope of log(sqrt N P), N = {sizes[-2]} to {sizes[-1]}", slope, math.log(rho.max()),
              rtol=0.1 if fast else 0.05, verdict="sharpened"),
    ]  # fmt: skip


def right_vote(p: np.ndarray, n: int) -> float:
    """Chance that the first answer wins a vote of ``n``, a tie being a fair draw among those tied."""
    rest = np.indices((n + 1,) * (len(p) - 1)).reshape(len(p) - 1, -1)
    rest = rest[:, rest.sum(0) <= n]
    counts = np.concatenate([rest, n - rest.sum(0, keepdims=True)]).T
    best = counts == counts.max(1, keepdims=True)
    return float(_chance(counts, p) @ (best[:, 0] / best.sum(1)))


@functools.lru_cache
def _trained(beta: float = 1.0, steps: int = 60) -> np.ndarray:
    """Policies of repeated tilts towards the mean vote reward, from `ANSWERS`, ``[steps + 1, K]``."""
    policies = [ANSWERS]
    for _ in range(steps):
        policies.append(np.asarray(_tilted(policies[-1], _given_answer(policies[-1]), beta)))
    return np.array(policies)


@jax.jit
def _tilted(p, reward, beta):
    return bandit.tilted(p, reward, beta=beta)


def _empo(p: np.ndarray, n: int) -> np.ndarray:
    """E[r | a] of EMPO's reward, by the library's kernel on every composition, ``[K]``."""
    drawn, orders = multisets(len(p), n)
    reward = np.asarray(jax.jit(empo_reward)(jnp.asarray(drawn)), float)
    chance = orders * np.asarray(p)[drawn].prod(1)
    gives = drawn[..., None] == np.arange(len(p))
    return (chance @ (reward[..., None] * gives).sum(1)) / (n * p)


def lonely(p: np.ndarray, n: int) -> np.ndarray:
    """Chance that no two of ``n`` candidates agree, given the answer of one of them, ``[K]``."""
    others = [np.delete(p, answer) for answer in range(len(p))]
    sums = [sum(math.prod(chosen) for chosen in itertools.combinations(rest, n - 1)) for rest in others]
    return math.factorial(n - 1) * np.array(sums, float)


def _training() -> list[Claim]:
    policies = _trained()
    worlds = np.random.default_rng(0).dirichlet(np.ones(5), 200)
    rewards = np.array([_given_answer(p) for p in worlds])
    ranked = np.take_along_axis(rewards, np.argsort(worlds, axis=1), axis=1)
    given, few = _empo(ANSWERS, N), _empo(ANSWERS, 4)
    mean, mean_few = ((1 + (n - 1) * ANSWERS) / n for n in (N, 4))
    collision = jax.jit(jax.grad(lambda z: jnp.sum(jnp.square(jax.nn.softmax(z)))))(np.log(ANSWERS))
    return [
        equal("Trained on its own vote, the policy converges to its likeliest answer, and a right one is unlearned",
              f"mass of the likeliest answer after {len(policies) - 1} tilts of beta 1; .4 at first", policies[-1][1],
              1, atol=1e-6),
        at_most("The mean reward ranks the answers as the policy does: no training on votes overturns the likeliest",
                "largest E[r | less likely answer] - E[r | more likely], 200 random policies",
                -np.diff(ranked, axis=1).min(), 0, verdict="sharpened"),
        holds("EMPO rewards an answer with (1 + (N - 1) p(a)) / N in the mean",
              "largest error of E[r | a], N = 4, five answers, all 70 compositions", np.abs(few - mean_few).max(),
              "not 0: a group in which no two agree gets 0", np.abs(few - mean_few).max() > 0.04, verdict="refuted"),
        at_most("EMPO rewards an answer with (1 + (N - 1) p(a)) / N in the mean where there are more candidates than "
                "answers", "largest error of E[r | a], N = 8, five answers, all 495 compositions",
                np.abs(given - mean).max(), 1e-12, verdict="sharpened"),
        at_most("Elsewhere the mean is lower by P(no two agree | a) / N",
                "largest error of E[r | a], N = 4, five answers",
                np.abs(few - mean_few + lonely(ANSWERS, 4) / 4).max(), 1e-12, verdict="sharpened"),
        at_most("With more candidates than answers EMPO ascends the collision probability sum p^2, not minus the "
                "semantic entropy", "largest error of its policy gradient against (N - 1) / 2N grad sum p^2",
                np.abs(ANSWERS * (given - ANSWERS @ given) - (N - 1) / (2 * N) * np.asarray(collision)).max(), 1e-12,
                verdict="sharpened"),
    ]  # fmt: skip


def _pass_at_k() -> list[Claim]:
    worst = 0.0
    for n, k in itertools.product((2, 5, 10, 40), (1, 2, 3, 8, 40)):
        if k <= n:
            estimate = np.asarray(pass_at_k(jnp.arange(n + 1), num_samples=n, k=k))
            for p in (0.01, 0.1, 0.3, 0.7, 0.99):
                worst = max(
                    worst, abs(stats.binom.pmf(np.arange(n + 1), n, p) @ estimate + math.expm1(k * math.log1p(-p)))
                )
    k, p = 3, 0.3
    return [
        at_most("The estimate of pass@k from n samples is unbiased", "largest |E - (1 - (1-p)^k)|, n up to 40, p from "
                ".01 to .99", worst, 1e-12),
        equal("The plug-in 1 - (1 - c/n)^k is low", "bias, n = 10, k = 3, p = .3", _plug_in_bias(10, k, p), -0.043,
              atol=5e-4),
        equal("Its bias is -k (k-1) p (1-p)^(k-1) / 2n to first order", "n bias, n = 4000, k = 3, p = .3",
              4000 * _plug_in_bias(4000, k, p), -k * (k - 1) / 2 * p * (1 - p) ** (k - 1), rtol=1e-3,
              verdict="sharpened"),
    ]  # fmt: skip


def _plug_in_bias(n: int, k: int, p: float) -> float:
    c = np.arange(n + 1)
    return float(stats.binom.pmf(c, n, p) @ (1 - (1 - c / n) ** k) - _solved(np.array([p]), k)[0])


def _solved(rho: np.ndarray, k: int) -> np.ndarray:
    """pass@k of prompts whose answers are right with chance ``rho``: best-of-k under a binary verifier."""
    return np.asarray(_verified(jnp.stack([1 - rho, rho], -1), jnp.asarray(k)))


@jax.jit
def _verified(ref, n):
    return bandit.best_of_n_law(ref, jnp.broadcast_to(jnp.array([0.0, 1.0]), ref.shape), n=n)[..., 1]


SHAPE = (0.5, 1.0)
"""Of the beta distribution of pass@1 over prompts: many hard ones, a few easy."""

MEAN, VARIANCE = (float(x) for x in stats.beta(*SHAPE).stats())


def _mean_pass(k: float) -> float:
    """Mean pass@k of prompts with beta-distributed pass@1, in closed form."""
    a, b = SHAPE
    return float(-np.expm1(special.betaln(a, b + k) - special.betaln(a, b)))


def _bound_at(k: int) -> float:
    """The published bound; at k = 1 from its value at 2, since the library refuses it there."""
    if k == 1:
        return 1 - math.sqrt(1 - _bound_at(2))
    return float(pass_at_k_bound(jnp.asarray(MEAN), jnp.asarray(VARIANCE), k=k))


def _bound() -> list[Claim]:
    powers = (2, 3, 4, 8, 16, 64, 256)
    return [
        holds("ProRL: E pass@k <= 1 - [(1 - E pass@1)^2 + Var pass@1]^(k/2) for every k",
              "E pass@1, pass@1 of prompts ~ Beta(1/2, 1)", MEAN, f"> {_bound_at(1):.5g}, the bound at k = 1",
              _bound_at(1) + 0.01 < MEAN, verdict="refuted"),
        at_most("It holds for k >= 2", "largest E pass@k - bound, k from 2 to 256",
                max(_mean_pass(k) - _bound_at(k) for k in powers), 1e-12, verdict="sharpened"),
        equal("At k = 2 it is an equality", "E pass@2", _mean_pass(2), _bound_at(2), atol=1e-12, verdict="sharpened"),
    ]  # fmt: skip


BASE, SHARP = np.array([0.5, 0.1]), np.array([1.0, 0.0])
"""pass@1 of two prompts before and after sharpening."""


def _sharpening() -> list[Claim]:
    voted = ANSWERS[[0, 1]], _trained()[-1][[0, 1]]
    before, after = (float(_solved(np.asarray(x), 16).mean()) for x in voted)
    crossing = next(k for k in range(1, 20) if _solved(BASE, k).mean() > _solved(SHARP, k).mean())
    return [
        equal("Sharpening (.5, .1) to (1, 0) raises pass@1", "mean pass@1 after; .3 before", _solved(SHARP, 1).mean(),
              0.5, atol=1e-12),
        equal("It lowers pass@16", "mean pass@16 before; .5 after", _solved(BASE, 16).mean(), 0.907, atol=5e-4),
        equal("The base is ahead from three samples on", "first k at which it is", crossing, 3),
        equal("Training on votes does this: one prompt whose likeliest answer is right (.4), one where it is not (.3)",
              "mean pass@1 after; .35 before", _solved(np.asarray(voted[1]), 1).mean(), 0.5, atol=1e-6),
        equal("Its pass@k no longer grows with k", f"mean pass@16 after; {before:.4f} before", after, 0.5, atol=1e-5),
    ]  # fmt: skip


def draw_vote():
    """The vote against its size, and training on it."""
    figure, axes = plt.subplots(1, 2, figsize=(7.9, 3.4))
    sizes = np.array([2, 8, 16, 24, 32])
    chances = np.array([_win_chances(int(n)) for n in sizes])
    for answer, colour, label in ((1, PALETTE[0], "the likeliest loses (p = .65)"),
                                  (0, PALETTE[1], "the second wins (p = .25)"),
                                  (2, PALETTE[2], "the third wins (p = .1)")):  # fmt: skip
        value = 1 - chances[:, 1] if answer == 1 else chances[:, answer]
        axes[0].semilogy(sizes, value, "o", ms=5, mfc="none" if answer == 0 else None, color=colour, label=label)
        if answer != 1:
            rho = 1 - (np.sqrt(THREE[1]) - np.sqrt(THREE[answer])) ** 2
            axes[0].semilogy(sizes, rho**sizes, "-", lw=1, color=colour)
    axes[0].set_xlabel("candidates that vote, N")
    axes[0].set_ylabel("probability")
    axes[0].set_title(r"lines $[1 - (\sqrt{p_{mode}} - \sqrt{p_b})^2]^N$", fontsize=10)
    axes[0].legend(fontsize=8, loc="lower left")
    axes[0].set_ylim(1e-7, 3)
    policies = _trained()[:17]
    names = ("right answer (.3 at first)", "likeliest answer (.4)", "each of three others (.1)")
    for colour, marker, column, name in zip(PALETTE, "os^", (0, 1, 2), names, strict=False):
        axes[1].plot(policies[:, column], marker, ms=4, color=colour, label=name)
    axes[1].set_xlabel(r"tilts towards the vote, $\beta$ = 1")
    axes[1].set_ylabel("mass of the policy")
    axes[1].set_title("trained on votes of 8", fontsize=10)
    axes[1].legend(fontsize=8, loc="center right")
    return figure


def draw_pass():
    """pass@k of base and sharpened policies, and the bound."""
    figure, axes = plt.subplots(1, 2, figsize=(7.9, 3.4))
    ks = 2 ** np.arange(8)
    for colour, marker, rho, label in (
        (PALETTE[0], "o", BASE, "base (.5, .1)"),
        (PALETTE[1], "s", SHARP, "sharp (1, 0)"),
    ):
        axes[0].semilogx(ks, [_solved(rho, int(k)).mean() for k in ks], marker, ms=5, color=colour, label=label)
        fine = np.geomspace(1, ks[-1], 100)
        axes[0].semilogx(fine, 1 - ((1 - rho[:, None]) ** fine).mean(0), "-", lw=1, color=colour)
    axes[0].set_ylabel("mean pass@k of two prompts")
    axes[0].set_title(r"lines $1 - E(1 - \rho)^k$", fontsize=10)
    axes[0].legend(fontsize=8, loc="center right")
    axes[1].loglog(
        ks, [1 - _mean_pass(int(k)) for k in ks], "o", ms=5, color=PALETTE[0], label=r"exact, $\rho \sim$ Beta(1/2, 1)"
    )
    square = 1 - _bound_at(2)
    fine = np.geomspace(1, ks[-1], 100)
    axes[1].loglog(fine, square ** (fine / 2), "-", lw=1, color="black", label=r"$[(1-E\rho)^2 + Var\,\rho]^{k/2}$")
    axes[1].axvline(2, lw=0.8, ls=":", color="grey")
    axes[1].set_ylim(1e-4, 1.5)
    axes[1].set_ylabel("1 - mean pass@k")
    axes[1].set_title("a lower bound from k = 2 on only", fontsize=10)
    axes[1].legend(fontsize=8, loc="lower left")
    for ax in axes:
        ax.set_xlabel("samples k")
        ax.set_xscale("log", base=2)
    return figure


FAMILY = Family(
    name="voting",
    title="A vote without labels ends in the likeliest answer, and sharpening costs pass@k",
    text="""
Test-time reinforcement learning (TTRL) rewards the candidates that give the majority's answer. Votes and rewards below
are the library's, on every possible sample with its multinomial probability, so nothing is simulated. Wherever the
likeliest answer is wrong, the vote is sure to be wrong once there are enough candidates, though a few more may help at
first, and the mean reward ranks the answers just as the policy does: training ends in the likeliest answer, right or
wrong. Rewards are more often right than the label, because a wrong label still gives the other wrong answers their 0; a
question with two answers has no such luck.

That is sharpening: pass@1 rises where the likeliest answer is right, and pass@k stops growing with k. The bound of
ProRL on mean pass@k by mean and variance of pass@1 is Jensen's inequality for a power k/2, so it holds from k = 2 on,
is an equality there, and is false at k = 1.
""",
    claims=claims,
    figures={"vote": draw_vote, "pass_at_k": draw_pass},
    sources=(
        "Zuo et al., 2025 (TTRL), [arXiv:2504.16084](https://arxiv.org/abs/2504.16084)",
        "Zhang et al., 2025 (EMPO), [arXiv:2504.05812](https://arxiv.org/abs/2504.05812)",
        "Liu et al., 2025 (ProRL), [arXiv:2505.24864](https://arxiv.org/abs/2505.24864)",
        "Chen et al., 2021 (pass@k), [arXiv:2107.03374](https://arxiv.org/abs/2107.03374)",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
