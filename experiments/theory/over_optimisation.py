"""When more of a proxy is less of the truth: exact laws of over-optimisation.

    python -m experiments.theory.over_optimisation

Expected: the true reward of a tilt turns where its covariance with the proxy is 0; a few hackable completions or a
heavy-tailed error turn it, a Gaussian error never does; refuted: that any error of the proxy must; about 15 seconds on
two cores.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import optimize, stats

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from tiltjax.samplers.pessimism import inference_time_pessimism
from tiltjax.tilt.overoptimisation import best_of_n_curve, fit_overoptimisation, rl_curve
from tiltjax.tilt.pessimism import pessimistic_weights

__all__ = ["FAMILY", "claims"]

SIZES = 2 ** np.arange(13)
ETAS = np.geomspace(0.01, 2, 60)
"""Values of 1 / beta."""

HACKABLE, HACKED_GOLD = 20, -2.0


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page; all are cheap, so that ``fast`` leaves out none."""
    return [*_slopes(), *_best_of_n(), *_errors(), *_pessimism(), *_sampled()]


def _quantiles(n: int) -> np.ndarray:
    return stats.norm.ppf((np.arange(n) + 0.5) / n)


@functools.lru_cache
def _world() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """2000 equally likely completions, 1% hackable: reference, true reward, proxy.

    The others have every pair of 44 normal quantiles of true reward and 45 of an independent error of sd 1/2. The
    proxy of every hackable one is above that of all others.
    """
    gold, error = np.meshgrid(_quantiles(44), _quantiles(45) / 2, indexing="ij")
    proxy = np.concatenate([(gold + error).ravel(), 5 + _quantiles(HACKABLE) / 2])
    gold = np.concatenate([gold.ravel(), np.full(HACKABLE, HACKED_GOLD)])
    return np.full(gold.size, 1 / gold.size), gold, proxy


@jax.jit
def _bon(ref, proxy, sizes):
    return jax.vmap(lambda n: bandit.best_of_n_law(ref, proxy, n=n))(sizes)


@jax.jit
def _along(ref, gold, proxy, etas):
    """Of tilts: mean true reward and KL, their derivatives by 1 / beta, and the covariances that these should be."""

    def point(eta):
        def both(eta):
            p = bandit.tilted(ref, proxy, beta=1 / eta)
            # KL(p || ref) = eta E_p r - log Z, which is smooth in eta.
            return jnp.stack([p @ gold, eta * (p @ proxy) - bandit.log_partition(ref, proxy, beta=1 / eta)])

        (reward, kl), slopes = jax.jvp(both, (eta,), (jnp.ones_like(eta),))
        p = bandit.tilted(ref, proxy, beta=1 / eta)
        away = proxy - p @ proxy
        return {"gold": reward, "kl": kl, "d_gold": slopes[0], "d_kl": slopes[1], "cov": p @ (away * gold),
                "var": p @ away**2}  # fmt: skip

    return jax.lax.map(point, etas)


@functools.lru_cache
def _tilts() -> dict[str, np.ndarray]:
    return {k: np.asarray(v) for k, v in _along(*_world(), ETAS).items()}


def _at(eta: float) -> dict[str, float]:
    return {k: float(v[0]) for k, v in _along(*_world(), np.array([eta])).items()}


@functools.lru_cache
def _peak() -> tuple[float, float]:
    """Where the covariance is 0, and where a search of the true reward alone ends."""
    root = optimize.brentq(lambda eta: _at(eta)["cov"], 0.05, 2, xtol=1e-10)
    top = optimize.minimize_scalar(lambda eta: -_at(eta)["gold"], bounds=(0.05, 2), method="bounded",
                                   options={"xatol": 1e-9})  # fmt: skip
    return float(root), float(top.x)


def _slopes() -> list[Claim]:
    ref, gold, proxy = _world()
    at = _tilts()
    root, top = _peak()
    start = _at(1e-4)
    alpha = np.sqrt(2) * np.cov(gold, proxy, ddof=0)[0, 1] / proxy.std()
    end = float(bandit.tilted(ref, proxy, beta=0.1) @ gold)
    return [
        at_most("The true reward of a tilt towards a proxy changes with 1/beta at the rate Cov_tilt(true, proxy)",
                "largest error of d E[true] / d(1/beta), 1/beta from .01 to 2", np.abs(at["d_gold"] - at["cov"]).max(),
                1e-12),
        at_most("Its KL changes at the rate Var_tilt(proxy) / beta", "largest error of d KL / d(1/beta)",
                np.abs(at["d_kl"] - ETAS * at["var"]).max(), 1e-12),
        equal("So the true reward peaks where true reward and proxy are uncorrelated under the tilt",
              "1/beta at the peak; expected where Cov_tilt = 0", top, root, rtol=1e-6),
        equal("To begin with it rises by sqrt(2) Cov / sd(proxy) per square root of a nat",
              "E[true] / sqrt(KL) at 1/beta = 1e-4", (start["gold"] - ref @ gold) / np.sqrt(start["kl"]), alpha,
              rtol=2e-4, verdict="sharpened"),
        equal("In the end it is that of the hackable completions", "E[true], beta = .1; 1% hackable", end, HACKED_GOLD,
              atol=1e-4),
    ]  # fmt: skip


@functools.lru_cache
def _best() -> tuple[np.ndarray, np.ndarray]:
    """Exact mean true reward and KL of best-of-N, ``[len(SIZES)]``."""
    ref, gold, proxy = _world()
    laws = np.asarray(_bon(ref, proxy, SIZES))
    return laws @ gold, np.asarray(bandit.kl(laws, np.broadcast_to(ref, laws.shape)))


@functools.lru_cache
def _best_closed() -> np.ndarray:
    """The same by order: the best is hackable unless none was drawn, else the best of as many clean ones."""
    ref, gold, proxy = _world()
    clean = np.where(np.arange(ref.size) < ref.size - HACKABLE, 1 / (ref.size - HACKABLE), 0)
    rest = np.asarray(_bon(clean, proxy, SIZES)) @ gold
    none = (1 - HACKABLE / ref.size) ** SIZES
    return none * rest + (1 - none) * HACKED_GOLD


_fit = jax.jit(fit_overoptimisation, static_argnames="form")


def _fits():
    """Gao's curves fitted to best-of-N up to 512 and to the tilts."""
    ref, gold, _ = _world()
    reward, kl = _best()
    at = _tilts()
    return (
        _fit(kl[:10], reward[:10] - ref @ gold),
        _fit(at["kl"], at["gold"] - ref @ gold, form="rl"),
    )


def _best_of_n() -> list[Claim]:
    ref, gold, _ = _world()
    reward, kl = _best()
    top = int(reward.argmax())
    bon, rl = _fits()
    beyond = float(best_of_n_curve(jnp.sqrt(kl[-1]), alpha=bon.alpha, b=bon.b)) + float(ref @ gold)
    return [
        at_most("Best-of-N by the proxy is hacked with chance 1 - .99^N and clean otherwise",
                "largest error of E[true], N up to 4096", np.abs(reward - _best_closed()).max(), 1e-12),
        holds("Its true reward rises and then falls", "N at which it is largest, of powers of 2", SIZES[top],
              "between 4 and 64", 4 <= SIZES[top] <= 64),
        holds("Past that it is worse than one draw", "E[true], N = 128", reward[7], f"< {reward[0]:.5g}, at N = 1",
              reward[7] < reward[0]),
        holds("Gao et al.: its true reward is d (a - b d) with d = sqrt(KL)", "R^2 of the fit, N = 1 to 512",
              bon.r_squared, "> .9", bon.r_squared > 0.9),
        holds("Gao et al.: that of a trained policy is d (a - b log d)", "R^2 of the fit, tilts, 1/beta from .01 to 2",
              rl.r_squared, "> .9", rl.r_squared > 0.9),
        holds("The first fit places the peak too early", "KL at its maximum, nats", bon.peak_kl,
              f"< {kl[top - 1]:.5g}, at N = {SIZES[top - 1]}, half the best N", bon.peak_kl < kl[top - 1],
              verdict="sharpened"),
        holds("Beyond its data it is wrong: it falls below every reward there is", "fitted curve at the KL of N = 4096",
              beyond, f"< {HACKED_GOLD:g}, the worst true reward of the proxy's favourites", beyond < HACKED_GOLD,
              verdict="sharpened"),
    ]  # fmt: skip


@functools.lru_cache
def _grid(heavy: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normal true reward plus an independent error, normal or t with 2 degrees of freedom, on a fine grid."""
    gold = np.linspace(-6.4, 6.4, 65 if heavy else 257)
    # Spacings without a common measure: a lattice of sums would tie.
    edges = np.sinh(np.linspace(-12, 12, 401)) if heavy else np.linspace(-6.5, 6.5, 282)
    middle = (edges[1:] + edges[:-1]) / 2
    if heavy:  # Differences of whichever tail is the smaller keep their digits.
        cells = np.where(middle < 0, np.diff(stats.t.cdf(edges, 2)), -np.diff(stats.t.sf(edges, 2)))
    else:
        cells = stats.norm.pdf(middle)
    ref = (stats.norm.pdf(gold) / stats.norm.pdf(gold).sum())[:, None] * (cells / cells.sum())
    proxy = gold[:, None] + middle
    return ref.ravel(), np.broadcast_to(gold[:, None], ref.shape).ravel(), proxy.ravel()


@functools.lru_cache
def _with_error(heavy: bool) -> np.ndarray:
    ref, gold, proxy = _grid(heavy)
    return np.asarray(_bon(ref, proxy, SIZES)) @ gold


@functools.lru_cache
def _integrals(heavy: bool) -> np.ndarray:
    """``N int E[true; proxy = x] F(x)^(N-1) dx``, by quadrature over both variables."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()
    law, x = (stats.t(2), np.sinh(np.linspace(-13, 13, 3001))) if heavy else (stats.norm, np.linspace(-12, 12, 2001))
    apart = x[:, None] - nodes
    together, above, below = law.pdf(apart) @ (weights * nodes), law.sf(apart) @ weights, law.cdf(apart) @ weights
    log_f = np.log(np.maximum(below, 1e-300), out=np.log1p(-np.minimum(above, 0.5)), where=above > 0.5)
    return np.array([np.trapezoid(n * together * np.exp((n - 1) * log_f), x) for n in SIZES])


def _errors() -> list[Claim]:
    normal, heavy = _with_error(False), _with_error(True)
    x = np.linspace(-12, 12, 4001)
    largest = [np.trapezoid(x * n * stats.norm.pdf(x) * stats.norm.cdf(x) ** (n - 1), x) for n in SIZES]
    ref, gold, proxy = _grid(False)
    betas = np.array([4.0, 2.0, 1.0])
    tilts = {k: np.asarray(v) for k, v in _along(ref, gold, proxy, 1 / betas).items()}
    fit = _fit(tilts["kl"], tilts["gold"])
    top = int(heavy.argmax())
    return [
        holds("Any error of the proxy is over-optimised in the end", "smallest gain of E[true] from doubling N, up to "
              "4096: normal true reward, independent normal error", np.diff(normal).min(), "> 0, no fall",
              (np.diff(normal) > 0).all(), verdict="refuted"),
        at_most("With a normal error as large as the true reward, best-of-N has E[true] = E[max of N normals] / sqrt 2",
                "largest error, N up to 4096", np.abs(normal - np.asarray(largest) / np.sqrt(2)).max(), 1e-3,
                verdict="sharpened"),
        equal("So it has at N = 64", "E[true]", normal[6], 1.657, atol=1e-3),
        at_most("Gao's b is 0 then, for every tilt: E[true] = d Cov sqrt(2) / sd(proxy)",
                "|b| + |a - 1| of the fit, beta 4, 2 and 1", abs(float(fit.b)) + abs(float(fit.alpha) - 1), 1e-6,
                verdict="sharpened"),
        holds("A heavy-tailed error is over-optimised without any hackable completion",
              "E[true], N = 4096, error t with 2 degrees of freedom", heavy[-1],
              f"< a tenth of {heavy[top]:.5g}, at N = {SIZES[top]}", heavy[-1] < heavy[top] / 10),
        at_most("Its curve is N int E[true; proxy = x] F(x)^(N-1) dx", "largest error, N up to 4096",
                np.abs(heavy - _integrals(True)).max(), 2e-3),
    ]  # fmt: skip


BETA = 0.5


@jax.jit
def _pessimist(gold, proxy, betas):
    """Population optimum of pessimism: mean true reward and smallest weight, for each beta."""

    def point(beta):
        weights = pessimistic_weights(proxy, beta=beta)
        return weights @ gold / gold.size, weights.min()

    return jax.lax.map(point, betas)


def _optimum(betas: Sequence[float] | np.ndarray) -> np.ndarray:
    _, gold, proxy = _world()
    return np.asarray(_pessimist(gold, proxy, np.asarray(betas, float))[0])


def _pessimism() -> list[Claim]:
    ref, gold, proxy = _world()
    reward, least = (float(x[0]) for x in _pessimist(gold, proxy, np.array([4.0])))
    betas = np.geomspace(0.25, 8, 11)
    tilt = np.asarray(_along(ref, gold, proxy, 1 / betas)["gold"])
    lead = _optimum(betas) - tilt
    small = float(_optimum([0.01])[0])
    return [
        holds("While no completion is dropped, pessimism has E[true] = E_ref[true] + Cov_ref(true, proxy) / beta",
              "its error, beta = 4", reward - (ref @ gold + np.cov(gold, proxy, ddof=0)[0, 1] / 4), "0 ± 1e-12",
              least > 0 and abs(reward - (ref @ gold + np.cov(gold, proxy, ddof=0)[0, 1] / 4)) < 1e-12,
              verdict="sharpened"),
        holds("At equal beta pessimism is hacked less than the tilt",
              "smallest lead in E[true], beta from 1/4 to 8", lead.min(), "> 0", lead.min() > 0),
        holds("Its best beta is better than the tilt's", "largest E[true] over beta", _optimum(betas).max(),
              f"> {_at(_peak()[0])['gold']:.5g}, the tilt's", _optimum(betas).max() > _at(_peak()[0])["gold"]),
        holds("It needs a beta all the same: as beta goes to 0 it is best-of-N with all its hackability",
              "E[true], beta = .01", small, f"< {ref @ gold:.5g}, the reference's", small < ref @ gold - 1,
              verdict="sharpened"),
    ]  # fmt: skip


SAMPLED, DRAWS = (8, 64, 512), 2000


@functools.lru_cache
def _draws() -> dict[int, np.ndarray]:
    """True rewards of what the pessimistic sampler chose among N of the world's completions."""
    _, gold, proxy = _world()

    @jax.jit
    def run(key, n):
        arm_key, key = jax.random.split(key)
        arms = jax.random.randint(arm_key, (DRAWS, SAMPLED[-1]), 0, gold.size)
        real = jnp.broadcast_to(jnp.arange(SAMPLED[-1]) < n, arms.shape)
        chosen = inference_time_pessimism(key, jnp.asarray(proxy)[arms], beta=BETA, reward_max=proxy.max(), where=real)
        return jnp.asarray(gold)[jnp.take_along_axis(arms, chosen[:, None], axis=1)[:, 0]]

    return {n: np.asarray(run(jax.random.key(n), n)) for n in SAMPLED}


def _sampled() -> list[Claim]:
    found = _draws()
    limit, best = float(_optimum([BETA])[0]), dict(zip(SIZES.tolist(), _best()[0], strict=True))
    far = found[512]
    error = 4 * far.std() / np.sqrt(DRAWS)
    small = found[8]
    return [
        holds("With many candidates pessimism keeps what best-of-N loses",
              f"E[true], N = 512, beta = 1/2, {DRAWS:,} draws", far.mean(),
              f"> {best[512]:.5g} + 4 s.e., best-of-N's", far.mean() - error > best[512]),
        equal("More candidates take its sampler to the population's optimum and no further",
              f"E[true], N = 512, beta = 1/2, {DRAWS:,} draws, 4 s.e. + .02", far.mean(), limit, atol=error + 0.02),
        holds("With few candidates best-of-N is better", f"E[true], N = 8, beta = 1/2, {DRAWS:,} draws", small.mean(),
              f"< {best[8]:.5g} - 4 s.e., best-of-N's",
              small.mean() + 4 * small.std() / np.sqrt(DRAWS) < best[8], verdict="sharpened"),
    ]  # fmt: skip


def draw_curves():
    """True reward against distance with Gao's fits, and against 1 / beta with its slope."""
    figure, axes = plt.subplots(1, 2, figsize=(7.1, 3.1))
    ref, gold, _ = _world()
    (reward, kl), at, (bon, rl) = _best(), _tilts(), _fits()
    base = float(ref @ gold)
    d = np.linspace(0.02, 2.8, 200)
    axes[0].plot(np.sqrt(kl), reward - base, "o", ms=4, color=PALETTE[0], label="best-of-N")
    axes[0].plot(d, best_of_n_curve(d, alpha=bon.alpha, b=bon.b), "-", lw=1, color=PALETTE[0], label=r"$d\,(a - b\,d)$")
    axes[0].plot(np.sqrt(at["kl"][::3]), at["gold"][::3] - base, "s", ms=4, color=PALETTE[1], label="tilts")
    axes[0].plot(d, rl_curve(d, alpha=rl.alpha, b=rl.b), "-", lw=1, color=PALETTE[1], label=r"$d\,(a - b\,\log d)$")
    axes[0].set_ylim(-3, 1.4)
    axes[0].set_xlabel(r"$d = \sqrt{KL}$ (square root of nats)")
    axes[0].set_ylabel("true reward over the reference's")
    axes[0].legend(fontsize=8, loc="lower left")
    axes[1].semilogx(ETAS, at["cov"], "-", lw=1, color=PALETTE[2], label="Cov(true, proxy)")
    # Central differences of the true reward itself.
    axes[1].semilogx(ETAS[1:-1:3], np.gradient(at["gold"], ETAS)[1:-1:3], "^", ms=4, color=PALETTE[2],
                     label="slope of true reward")  # fmt: skip
    axes[1].semilogx(ETAS[::3], at["gold"][::3], "s", ms=4, color=PALETTE[1], label="true reward")
    axes[1].axvline(_peak()[0], lw=0.8, ls=":", color="grey")
    axes[1].axhline(0, lw=0.8, color="grey")
    axes[1].set_xlabel(r"$1/\beta$ (per reward unit)")
    axes[1].set_ylabel("reward units")
    axes[1].legend(fontsize=8, loc="lower left")
    return figure


def draw_errors():
    """True reward against N by kind of error, and with pessimism."""
    figure, axes = plt.subplots(1, 2, figsize=(7.9, 3.4), sharex=True)
    kinds = (
        ("o", "normal error", _with_error(False), _integrals(False)),
        ("^", "t error, 2 d.o.f.", _with_error(True), _integrals(True)),
        ("s", "1% hackable", _best()[0], _best_closed()),
    )
    for colour, (marker, label, exact, theory) in zip(PALETTE, kinds, strict=False):
        axes[0].semilogx(SIZES, exact, marker, ms=4, color=colour, label=label)
        axes[0].semilogx(SIZES, theory, "-", lw=1, color=colour)
    axes[0].set_title("best-of-N by the proxy; lines by quadrature", fontsize=10)
    axes[0].set_ylabel("true reward")
    axes[0].legend(fontsize=8, loc="lower left")
    axes[1].semilogx(SIZES, _best()[0], "s", ms=4, color=PALETTE[2], label="best-of-N")
    axes[1].semilogx(SIZES, _best_closed(), "-", lw=1, color=PALETTE[2])
    means, errors = zip(*[(x.mean(), 2 * x.std() / np.sqrt(x.size)) for x in _draws().values()], strict=True)
    axes[1].errorbar(SAMPLED, means, errors, fmt="D", ms=4, color=PALETTE[3],
                     label=r"pessimism, $\beta$ = 1/2 (2 s.e.)")  # fmt: skip
    axes[1].axhline(float(_optimum([BETA])[0]), lw=1, color=PALETTE[3])
    axes[1].set_title("1% hackable; line: pessimism on all completions", fontsize=10)
    axes[1].legend(fontsize=8, loc="lower left")
    for ax in axes:
        ax.set_xlabel("candidates N")
        ax.set_xscale("log", base=2)
    return figure


FAMILY = Family(
    name="over_optimisation",
    title="A proxy is over-optimised where its favourites are its errors",
    text="""
A tilt or a best-of-N towards a proxy reward is judged by the true reward. On a tilt the exchange rate is exact:
d E[true] / d(1/beta) = Cov(true, proxy) under the tilt, so the true reward peaks where that covariance is 0. Two worlds
are used. In one, 1% of 2000 completions are hackable: the proxy rates them above all others and their true reward is
-2. In the other, the proxy is a normal true reward plus an independent error. All laws are exact; only the sampler of
inference-time pessimism is sampled.

A normal error never turns the curve: the true reward of best-of-N rises as E[max of N] / sqrt 2. A t error with two
degrees of freedom does, and so do a few hackable completions. Gao's two curves then fit well inside their data and not
outside. Weights that grow with the reward instead of its exponential (pessimism) stop paying for further candidates
instead of losing by them, at a beta that has still to be chosen.
""",
    claims=claims,
    figures={"curves": draw_curves, "errors": draw_errors},
    sources=(
        "Gao, Schulman & Hilton, 2023, [arXiv:2210.10760](https://arxiv.org/abs/2210.10760)",
        "Huang et al., 2025 (inference-time pessimism), [arXiv:2503.21878](https://arxiv.org/abs/2503.21878)",
        "Kwa et al., 2024 (heavy-tailed errors), [arXiv:2407.14503](https://arxiv.org/abs/2407.14503)",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
