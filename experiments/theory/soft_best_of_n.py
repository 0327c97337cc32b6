"""How fast soft best-of-N reaches the tilt, by its exact finite-N law.

    python -m experiments.theory.soft_best_of_n

Expected: total variation falls as C1/N and both KLs as C2/N^2 with the constants of the table; refuted: that a finite
chi2 is enough for it, and the equality of the best-of-N formula when rewards tie; about 20 seconds on two cores.
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
from tiltjax.samplers.best_of_n import soft_best_of_n
from tiltjax.tilt.divergence import best_of_n_kl_bound, chi_squared_bound, soft_best_of_n_kl_bound

__all__ = ["FAMILY", "REF", "REWARD", "claims"]

REF = np.array([0.30, 0.25, 0.20, 0.15, 0.07, 0.03])
REWARD = np.array([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
"""The standard bandit of these pages: six arms, the best one rare."""

CONSTANTS = {
    (1, 1.0): (0.09199, 0.13882, 0.05784),
    (1, 0.5): (0.4367, 0.34827, 0.37976),
    (1, 0.2): (3.992, 1.8808, 8.8698),
    (4, 1.0): (2.324, 1.1723, 4.0101),
    (4, 0.5): (11.06, 4.0205, 33.553),
    (4, 0.2): (29.58, 1.2777, 20.03),
}
"""(largest reward, beta) -> chi-squared, C1, C2, computed apart from this library."""

SIZES = tuple(2**k for k in range(13))


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page."""
    return [*_rates(), *_heavy(), *_bounds(), *_collapse(), *_best_of_n(), *_sampler(20_000 if fast else 200_000)]


@jax.jit
def _law(ref, reward, n, beta):
    """Laws of soft best-of-N for every N of ``n``, and the tilt: compiled once per shape."""
    laws = jax.vmap(lambda k: bandit.soft_best_of_n_law(ref, reward, n=k, beta=beta))(n)
    return laws, bandit.tilted(ref, reward, beta=beta)


@functools.lru_cache
def _laws(scale: float, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Laws of soft best-of-N for every size, ``[len(SIZES), K]``, and the tilt ``[K]``."""
    laws, target = _law(REF, scale * REWARD, np.asarray(SIZES), float(beta))
    return np.asarray(laws), np.asarray(target)


def _distances(scale: float, beta: float) -> dict[str, np.ndarray]:
    laws, target = _laws(scale, beta)
    target = np.broadcast_to(target, laws.shape)
    return {
        "tv": np.asarray(bandit.total_variation(laws, target)),
        "forward": np.asarray(bandit.kl(target, laws)),
        "reverse": np.asarray(bandit.kl(laws, target)),
    }


def _rates() -> list[Claim]:
    n = SIZES[-1]
    out, apart = [], []
    for (scale, beta), published in CONSTANTS.items():
        at = f"r_max {scale}, beta {beta}"
        far = {k: v[-1] for k, v in _distances(scale, beta).items()}
        constants = bandit.expansion(REF, scale * REWARD, beta=beta)
        computed = (bandit.chi_squared(REF, scale * REWARD, beta=beta), constants.tv, constants.kl)
        apart += [abs(float(a) / b - 1) for a, b in zip(computed, published, strict=True)]
        out += [
            equal(f"Total variation tends to C1 / N ({at})", f"N TV(P_N, p*), N = {n}", n * far["tv"], constants.tv,
                  rtol=0.03),
            equal(f"KL tends to C2 / N^2 ({at})", f"N^2 KL(p* || P_N), N = {n}", n**2 * far["forward"], constants.kl,
                  rtol=0.06),
        ]  # fmt: skip
    out.append(at_most("chi2, C1 and C2 equal an independent computation, 6 worlds", "largest relative difference",
                       max(apart), 5e-4))  # fmt: skip
    some = _distances(1, 0.5)
    slopes = {name: np.polyfit(np.log(SIZES[6:]), np.log(values[6:]), 1)[0] for name, values in some.items()}
    n64 = SIZES.index(64)
    return [
        equal("Open question 1: KL falls as 1/N^2 in both directions; the published 1/N is an upper bound",
              "slope of log KL(p* || P_N)", slopes["forward"], -2, atol=0.01, verdict="sharpened"),
        equal("Open question 1: the same in the other direction", "slope of log KL(P_N || p*)", slopes["reverse"], -2,
              atol=0.01, verdict="sharpened"),
        equal("Total variation falls as 1/N exactly", "slope of log TV", slopes["tv"], -1, atol=0.01),
        equal("At N = 64, beta 0.5", "TV(P_N, p*)", some["tv"][n64], 5.447e-3, rtol=2e-4),
        equal("At N = 64, beta 0.5", "KL(P_N || p*)", some["reverse"][n64], 9.196e-5, rtol=2e-4),
        *out,
    ]  # fmt: skip


FAR = (2**12, 2**13)
"""Sizes between which the rates under heavy tails are read."""


def heavy_tailed(index: float, *, arms: int = 800) -> tuple[np.ndarray, np.ndarray]:
    """Reference and reward, at beta 1, of weights whose tail is Pareto's: ``P(w > x)`` falls as ``x^-index``.

    Cells of the quantile, the rarest of them 1e-12, each with its mean weight.
    """
    edges = np.concatenate([[0], np.geomspace(1e-12, 1, arms)])
    ref = np.diff(edges)
    return ref, np.log(np.diff(edges ** (1 - 1 / index)) / ref)


def heavy_slopes(index: float) -> dict[str, float]:
    """Local slopes against log N of the log of the distances to the tilt, between the sizes of `FAR`."""
    laws, target = map(np.asarray, _law(*heavy_tailed(index), np.asarray(FAR), 1.0))
    target = np.broadcast_to(target, laws.shape)
    distances = {
        "tv": bandit.total_variation(laws, target),
        "forward": bandit.kl(target, laws),
        "reverse": bandit.kl(laws, target),
    }
    return {name: float(np.diff(np.log(np.asarray(x)))[0] / np.log(2)) for name, x in distances.items()}


def _heavy() -> list[Claim]:
    heavy, light = heavy_slopes(2.5), heavy_slopes(4.5)
    chi2 = float(bandit.chi_squared(*heavy_tailed(2.5), beta=1.0))
    at = f"N = {FAR[0]} to {FAR[1]}"
    return [
        holds("A finite chi2 is enough for KL to fall as 1/N^2",
              f"slope of log KL(p* || P_N), {at}, weights with a Pareto tail of index 2.5, chi2 = {chi2:.3g}",
              heavy["forward"], "not -2", heavy["forward"] > -1.6, verdict="refuted"),
        equal("KL falls as N^(1 - a) where weights have a Pareto tail of index a from 2 to 3: E_ref w^3 is infinite",
              f"slope of log KL(p* || P_N), {at}, a = 2.5", heavy["forward"], -1.5, atol=0.03, verdict="sharpened"),
        equal("KL falls as N^(1 - a) in the other direction too", f"slope of log KL(P_N || p*), {at}, a = 2.5",
              heavy["reverse"], -1.5, atol=0.03, verdict="sharpened"),
        equal("A finite chi2 is enough for total variation to fall as 1/N", f"slope of log TV, {at}, a = 2.5",
              heavy["tv"], -1, atol=0.03),
        equal("A finite E_ref w^3 is enough for KL to fall as 1/N^2", f"slope of log KL(p* || P_N), {at}, a = 4.5",
              light["forward"], -2, atol=0.01, verdict="sharpened"),
    ]  # fmt: skip


def _bounds() -> list[Claim]:
    slack, reached, bound = [], [], jax.jit(chi_squared_bound)
    for scale, beta in itertools.product((0.5, 1, 4), (0.05, 0.2, 0.5, 1.0, 3.0)):
        laws, target = _laws(scale, beta)
        n = np.asarray(SIZES)
        chi2 = float(bandit.chi_squared(REF, scale * REWARD, beta=beta))
        forward = np.asarray(bandit.kl(np.broadcast_to(target, laws.shape), laws))
        to_ref = np.asarray(bandit.kl(laws, np.broadcast_to(REF, laws.shape)))
        worst = float(bound(reward_range=float(scale), beta=beta))
        slack.append((forward - np.log1p(chi2 / n)).max())
        slack.append((np.log1p(chi2 / n) - worst / n).max())
        reached.append(
            (to_ref - np.asarray(soft_best_of_n_kl_bound(jnp.asarray(n), reward_range=scale, beta=beta))).max()
        )
    two_point = bandit.chi_squared(*_two_point(4.0), beta=1.0)
    return [
        at_most("KL(p* || P_N) is at most log(1 + chi2/N), and chi2 at most sinh^2(r_max / 2 beta): 15 worlds, N up to "
                "4096", "largest excess", max(slack), 1e-12),
        at_most("KL(P_N || ref) is at most log(N / (1 + (N - 1) exp(-r_max / beta)))", "largest excess", max(reached),
                1e-12),
        equal("The bound on chi2 is reached by a two-point law, so e^(r_max/beta)/4 is the worst case and not the rule",
              "chi2 of the two-point law, r_max/beta = 4", two_point, math.sinh(2.0) ** 2, rtol=1e-10),
        equal("For rewards uniform on [0, a] chi2 grows only linearly in a", "chi2, a = 20",
              bandit.chi_squared(*_uniform(20.0), beta=1.0), 10 / math.tanh(10) - 1, rtol=1e-3),
        equal("For rewards uniform on [0, a] chi2 grows only linearly in a", "chi2, a = 4",
              bandit.chi_squared(*_uniform(4.0), beta=1.0), 2 / math.tanh(2) - 1, rtol=1e-3),
    ]  # fmt: skip


def _two_point(gap: float) -> tuple[np.ndarray, np.ndarray]:
    """The law over rewards {0, gap} of largest chi-squared at beta 1."""
    p = 1 / (1 + math.exp(gap))
    return np.array([1 - p, p]), np.array([0.0, gap])


def _uniform(a: float, points: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    return np.full(points, 1 / points), (np.arange(points) + 0.5) * a / points


def _collapse() -> list[Claim]:
    out = []
    for multiple, expected in ((1, 0.265), (10, 5.8e-3), (100, 5.1e-5)):
        for gap in (8.0, 12.0):
            ref, reward = _two_point(gap)
            n = round(multiple * (1 + math.sinh(gap / 2) ** 2))
            (law,), target = _law(ref, reward, np.array([n]), 1.0)
            distance = bandit.kl(target, law)
            out.append(
                equal(f"Candidates needed scale with 1 + chi2 (worst case, r_max/beta = {gap:g}, N = {n})",
                      f"KL(p* || P_N), N = {multiple} (1 + chi2)", distance, expected, rtol=0.02)
            )  # fmt: skip
    return out


def _best_of_n() -> list[Claim]:
    out = []
    for n, divergence, rate in ((2, 0.171271, 0.657605), (4, 0.608925, 0.790377), (16, 1.759677, 0.932134),
                                (64, 2.968985, 0.977752)):  # fmt: skip
        law = np.asarray(bandit.best_of_n_law(REF, REWARD, n=n))
        out.append(equal(f"Best-of-{n} with ties", "KL(P_N || ref)", bandit.kl(law, REF), divergence, atol=1e-6))
        out.append(equal(f"Best-of-{n} with ties", "win rate", bandit.win_rate(law, REF, REWARD), rate, atol=1e-6))
    for n in (4, 64):
        law, formula = np.asarray(bandit.best_of_n_law(REF, REWARD, n=n)), float(best_of_n_kl_bound(n))
        out.append(
            holds("KL(BoN || ref) = log N - (N-1)/N holds for any reward: with ties it is only an upper bound",
                  f"KL(P_N || ref), N = {n}", bandit.kl(law, REF), f"< {formula:.5g}",
                  float(bandit.kl(law, REF)) < formula, verdict="refuted")
        )  # fmt: skip
    law = bandit.best_of_n_law(REF, REWARD, n=4096)
    free = np.full(100_000, 1e-5), np.arange(1e5)
    tie_free = np.asarray(bandit.best_of_n_law(*free, n=16))
    return [
        *out,
        equal("With ties the KL of best-of-N saturates at -log ref(best level)", "KL(P_N || ref), N = 4096",
              bandit.kl(law, REF), -math.log(0.03), atol=1e-6),
        equal("Without ties (100,000 arms) the formula holds", "KL(P_16 || ref)", bandit.kl(tie_free, free[0]),
              float(best_of_n_kl_bound(16)), atol=1e-3),
        equal("Soft best-of-N tends to best-of-N as beta goes to 0", "TV, N = 16, beta = 1e-3",
              bandit.total_variation(bandit.soft_best_of_n_law(REF, REWARD, n=16, beta=1e-3),
                                     bandit.best_of_n_law(REF, REWARD, n=16)), 0, atol=1e-12),
        equal("A binary verifier: best-of-N is right with probability 1 - (1-p)^N", "p = 0.3, N = 8",
              bandit.best_of_n_law(np.array([0.7, 0.3]), np.array([0.0, 1.0]), n=8)[1], 1 - 0.7**8, atol=1e-12),
        equal("De-duplicating the candidates before the softmax loses p_ref", "TV(softmax(r/beta), p*), beta = 0.5",
              bandit.total_variation(special.softmax(REWARD / 0.5), bandit.tilted(REF, REWARD, beta=0.5)),
              0.345, atol=5e-4, verdict="confirmed"),
    ]  # fmt: skip


def _sampler(draws: int) -> list[Claim]:
    """The library's sampler against its exact law."""

    def drawn(key, count, *, n, beta):
        def draw(key):
            arm_key, pick_key = jax.random.split(key)
            arms = jax.random.choice(arm_key, len(REF), (n,), p=jnp.asarray(REF))
            return arms[soft_best_of_n(pick_key, jnp.asarray(REWARD)[arms], beta=beta)]

        seen = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(key), count)))
        return seen, np.asarray(bandit.soft_best_of_n_law(REF, REWARD, n=n, beta=beta))

    arms, law = drawn(0, draws, n=4, beta=0.5)
    statistic = stats.chisquare(np.bincount(arms, minlength=len(REF)), law * draws).statistic
    # The mean reward is what a wrong strength moves most: by seven of its standard errors where beta is off by 3%.
    arms, sharp = drawn(1, 40_000, n=32, beta=0.2)
    mean = float(sharp @ REWARD)
    error = np.sqrt((sharp @ (REWARD - mean) ** 2) / len(arms))
    return [
        at_most("The sampler draws from the exact law", f"chi-square, 5 degrees of freedom, {draws:,} draws, N = 4",
                statistic, 25.0),
        equal("The sampler's mean reward is that of the exact law",
              f"mean reward, N = 32, beta 0.2, {len(arms):,} draws, 3.5 s.e.", REWARD[arms].mean(), mean,
              atol=3.5 * error),
    ]  # fmt: skip


def draw_rates():
    """Distance to the tilt against N."""
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 3.9), sharex=True)
    n = np.asarray(SIZES, float)
    for colour, (scale, beta) in zip(PALETTE, [(1, 1.0), (1, 0.5), (1, 0.2), (4, 0.5)], strict=False):
        values, constants = _distances(scale, beta), bandit.expansion(REF, scale * REWARD, beta=beta)
        label = rf"$r_{{\max}}/\beta = {scale / beta:g}$"
        axes[0].loglog(n, values["tv"], "o", ms=4, color=colour, label=label)
        axes[0].loglog(n, float(constants.tv) / n, "-", lw=1, color=colour)
        axes[1].loglog(n, values["forward"], "o", ms=4, color=colour, label=label)
        axes[1].loglog(n, values["reverse"], "x", ms=4, color=colour)
        axes[1].loglog(n, float(constants.kl) / n**2, "-", lw=1, color=colour)
    axes[0].set_ylabel("total variation to the tilt")
    axes[1].set_ylabel("KL (nats)")
    axes[0].set_title("total variation: lines C1 / N", fontsize=10)
    axes[1].set_title(r"o KL(p* || P$_N$), x KL(P$_N$ || p*): lines C2 / N$^2$", fontsize=10)
    for ax in axes:
        ax.set_xlabel("candidates N")
        ax.set_xscale("log", base=2)
    axes[0].set_ylim(1e-6, 3)
    axes[1].set_ylim(1e-10, 30)
    axes[0].legend(fontsize=8)
    return figure


def draw_collapse():
    """KL against N in units of 1 + chi2."""
    figure, ax = plt.subplots(figsize=(5.4, 3.9))
    multiples = np.geomspace(0.1, 300, 15)
    for colour, marker, size, gap in zip(PALETTE, "so+", (8, 5, 6), (4.0, 8.0, 12.0), strict=False):
        ref, reward = _two_point(gap)
        sizes = np.unique(np.maximum(np.round(multiples * (1 + math.sinh(gap / 2) ** 2)), 1).astype(int))
        laws, target = _law(ref, reward, sizes, 1.0)
        distance = np.asarray(bandit.kl(jnp.broadcast_to(target, laws.shape), laws))
        ax.loglog(sizes / (1 + math.sinh(gap / 2) ** 2), distance, marker, ms=size, color=colour,
                  mfc="none", label=rf"$r_{{\max}}/\beta = {gap:g}$")  # fmt: skip
    ax.loglog(multiples, np.log1p(1 / multiples), "-", lw=1, color="black", label=r"bound $\log(1 + \chi^2/N)$")
    ax.set_xlabel(r"$N / (1 + \chi^2)$")
    ax.set_ylabel("KL(p* || P_N), nats")
    ax.legend(fontsize=8)
    return figure


FAMILY = Family(
    name="soft_best_of_n",
    title="Soft best-of-N reaches the tilt at 1/N in total variation and 1/N² in KL",
    text="""
Soft best-of-N draws N completions from the reference and keeps one with odds exp(r / beta). Its law is known exactly
for every N, P_N(x) = N ref(x) w(x) ∫ exp(-t w(x)) M(t)^(N-1) dt with w = exp(r / beta) / Z and M(t) = E_ref exp(-t w),
so its distance to the tilt p* is computed here and not sampled. To leading order P_N / p* = 1 + (1 + chi2 - w) / N.

This answers the first open question of the anthology (which rate, and which constant): total variation is C1 / N with
C1 = E_p*|1 + chi2 - w| / 2, and either KL is C2 / N² with C2 = Var_p*(w) / 2, as long as C2 is finite: that takes a
third moment of w under the reference, which any bounded reward has and a heavy tail may not. The published O(1/N) in KL
is a true upper bound and not the rate. How many candidates are needed is set by 1 + chi2, not by the largest reward.
""",
    claims=claims,
    figures={"rates": draw_rates, "collapse": draw_collapse},
    sources=(
        "Verdun et al., 2025, [arXiv:2505.03156](https://arxiv.org/abs/2505.03156)",
        "Jiao, Chen & Li, 2025, [arXiv:2509.04372](https://arxiv.org/abs/2509.04372)",
        "Beirami et al., 2024, [arXiv:2401.01879](https://arxiv.org/abs/2401.01879)",
        "Aminian et al., 2025 (the bound on KL(P_N || ref))",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
