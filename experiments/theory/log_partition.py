"""What estimates of log Z are worth: exact bias and variance, the in-batch estimate of VAR, and heavy tails.

    python -m experiments.theory.log_partition

Expected: the bias is -chi2/2N and the variance chi2/N with the second orders of the table; refuted: that the plain
estimate errs least for one prompt, and the in-batch sum of VAR as an estimate of Z; about 20 seconds on two cores.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import special, stats

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from experiments.theory.soft_best_of_n import REF, REWARD
from experiments.theory.tabular import multisets
from tiltjax.losses.mle import var_weights
from tiltjax.tilt.partition import (
    delta_log_partition,
    in_batch_log_partition,
    jackknife_log_partition,
    log_partition,
)
from tiltjax.tilt.tails import pareto_k
from tiltjax.tilt.weights import tilt

__all__ = ["FAMILY", "claims"]

BIASES = {(1.0, 256): -1.796044e-4, (0.2, 16): -0.1266301, (0.2, 1024): -1.951163e-3}
"""(beta, N) -> exact bias of the plain estimate, computed apart from this library."""

ESTIMATORS = {"plain": log_partition, "jackknife": jackknife_log_partition, "delta": delta_log_partition}

SIZES = tuple(2**k for k in range(1, 13))

PROMPTS, COMPLETIONS, LAMBDA = 5, 8, 0.5
"""The world of the in-batch claims: prompts share their completions, one of which is drawn for each."""


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page."""
    return [*_bias(), *_corrected(), *_spread(fast), *_in_batch(), *_tails(fast), *_range()]


@functools.lru_cache
def _moments(beta: float) -> tuple[float, float]:
    """``chi2`` and ``m3 = E (w - 1)^3`` of the standard bandit."""
    w = np.asarray(bandit.tilted(REF, REWARD, beta=beta)) / REF
    return float(REF @ (w - 1) ** 2), float(REF @ (w - 1) ** 3)


@functools.lru_cache
def _biases() -> dict[float, dict[int, float]]:
    """Exact biases of the plain estimate, nats: beta -> N -> bias."""
    sizes = jnp.asarray(sorted({*SIZES, *(n - 1 for n in SIZES)}))

    def law(n, beta):
        return bandit.log_partition_law(jnp.asarray(REF), jnp.asarray(REWARD), n=n, beta=beta).bias

    both = jax.jit(jax.vmap(jax.vmap(law, (0, None)), (None, 0)))(sizes, jnp.asarray([1.0, 0.2]))
    return {
        beta: dict(zip(sizes.tolist(), row, strict=True)) for beta, row in zip((1.0, 0.2), both.tolist(), strict=True)
    }


def _jackknifed(beta: float, n: int) -> float:
    """Exact bias of the jackknife, linear in the plain estimates of N and N - 1 candidates."""
    biases = _biases()[beta]
    return n * biases[n] - (n - 1) * biases[n - 1]


@functools.lru_cache
def _enumerated(beta: float, n: int) -> dict[str, tuple[float, float]]:
    """Exact mean error and variance of every estimator, by enumeration of every sample of the standard bandit."""
    drawn, orders = multisets(len(REF), n)
    chance = orders * np.exp(np.log(REF)[drawn].sum(1))
    truth = float(bandit.log_partition(REF, REWARD, beta=beta))

    @jax.jit
    def evaluate(reward):
        out = {name: estimator(reward, beta=beta) - truth for name, estimator in ESTIMATORS.items()}
        weighed = tilt(reward, beta=beta)
        return out | {"z": jnp.exp(out["plain"]), "ess": weighed.ess / n, "weighed": jnp.exp(weighed.log_z - truth)}

    values = {name: np.asarray(x) for name, x in evaluate(REWARD[drawn]).items()}
    means = {name: float(chance @ x) for name, x in values.items()}
    return {name: (means[name], float(chance @ (x - means[name]) ** 2)) for name, x in values.items()}


def _errors_by_counts(beta: float, n: int) -> dict[str, float]:
    """Exact root mean square errors, by how often each arm of the standard bandit is drawn: for many candidates."""
    w = np.asarray(bandit.tilted(REF, REWARD, beta=beta)) / REF
    squares, log_factorial = np.zeros(len(ESTIMATORS)), special.gammaln(np.arange(n + 1) + 1.0)
    for first, second in itertools.product(range(n + 1), repeat=2):
        if (left := n - first - second) < 0:
            continue
        others = np.indices((left + 1,) * 3, np.int64).reshape(3, -1)
        others = others[:, others.sum(0) <= left]
        begun = np.broadcast_to([[first], [second]], (2, others.shape[1]))
        counts = np.concatenate([begun, others, left - others.sum(0, keepdims=True)])
        chance = np.exp(log_factorial[n] - log_factorial[counts].sum(0) + np.log(REF) @ counts)
        total = w @ counts
        plain = np.log(total / n)
        without = np.log(np.maximum(total - w[:, None], 1e-300) / (n - 1))
        jackknife = n * plain - (n - 1) / n * (counts * without).sum(0)
        delta = plain + (w**2 @ counts / total**2 - 1 / n) / 2
        squares += np.stack([plain, jackknife, delta]) ** 2 @ chance
    return dict(zip(ESTIMATORS, np.sqrt(squares), strict=True))


@functools.partial(jax.jit, static_argnames="n")
def _estimates_of_two(reward, *, n):
    """Every estimator on every number of draws of the second of two arms, ``[n + 1]`` each."""
    drawn = reward[(jnp.arange(n)[None] < jnp.arange(n + 1)[:, None]).astype(int)]
    return {name: estimator(drawn, beta=1.0) for name, estimator in ESTIMATORS.items()}


def second_order_of_two(share: float, mass: float, *, n: int = 1024) -> tuple[float, float]:
    """``N^2`` times the mean square error of plain less that of the jackknife, for two arms: exact, and its limit.

    Args:
      share: The reference's probability of the better arm.
      mass: The tilt's.
      n: Candidates.

    Returns:
      The number, and ``9 chi2^2 / 4 - m3``.
    """
    ref, target = np.array([1 - share, share]), np.array([1 - mass, mass])
    w, count = target / ref, np.arange(n + 1)
    seen = _estimates_of_two(jnp.asarray(np.log(w)), n=n)
    chance = stats.binom.pmf(count, n, share)
    mean_square = {name: chance @ np.asarray(x) ** 2 for name, x in seen.items()}
    chi2, m3 = ref @ (w - 1) ** 2, ref @ (w - 1) ** 3
    return float(n**2 * (mean_square["plain"] - mean_square["jackknife"])), float(9 * chi2**2 / 4 - m3)


def _bias() -> list[Claim]:
    exact = [
        equal(f"The plain estimate is low (beta {beta:g}, N = {n})", "E log Z_N - log Z",
              _biases()[beta][n], value, atol=1e-6 * abs(value) + 1e-9)
        for (beta, n), value in BIASES.items()
    ]  # fmt: skip
    chi2, m3 = _moments(0.2)
    n = 4096
    far = _biases()[0.2][n]
    return [
        equal("Z itself is estimated without bias", "E Z_N / Z over all samples, beta 0.2, N = 16",
              _enumerated(0.2, 16)["z"][0], 1, atol=1e-12),
        equal("The normaliser of the weights is that estimate", "E Z_N / Z by the weights, beta 0.2, N = 16",
              _enumerated(0.2, 16)["weighed"][0], 1, atol=1e-12),
        *exact,
        equal("The integral of the exact law is the enumeration of all 20,349 samples",
              "E log Z_N - log Z, beta 0.2, N = 16", _enumerated(0.2, 16)["plain"][0], _biases()[0.2][16],
              atol=1e-10),
        equal("The bias is -chi2 / 2N to first order", f"N bias, beta 0.2, N = {n}", n * far, -chi2 / 2, rtol=0.01),
        equal("The second order is (m3/3 - 3 chi2^2/4) / N^2 with m3 = E_ref (w - 1)^3",
              f"N^2 (bias + chi2/2N), beta 0.2, N = {n}", n**2 * (far + chi2 / (2 * n)), m3 / 3 - 0.75 * chi2**2,
              rtol=0.01, verdict="sharpened"),
    ]  # fmt: skip


def _corrected() -> list[Claim]:
    out = []
    for beta, expected in ((1.0, -1.93e-5), (0.2, -3.74e-3)):
        bias, _ = _enumerated(beta, 16)["jackknife"]
        out.append(equal(f"The jackknife removes the first order (beta {beta:g})", "bias of the jackknife, N = 16",
                         bias, expected, rtol=3e-3))  # fmt: skip
    chi2, m3 = _moments(0.2)
    n = 4096
    moments = _moments(1.0)
    delta = 16**2 * _enumerated(1.0, 16)["delta"][0]
    of_16 = _enumerated(0.2, 16)
    error = {name: np.hypot(mean, np.sqrt(variance)) for name, (mean, variance) in of_16.items()}
    many = _errors_by_counts(0.2, 64)
    same = max(abs(value - error[name]) for name, value in _errors_by_counts(0.2, 16).items())
    rare, frequent = second_order_of_two(0.1, 0.25), second_order_of_two(0.1, 0.8)
    return [
        *out,
        equal("What the jackknife leaves is minus the second order of the plain bias",
              f"N^2 bias of the jackknife, beta 0.2, N = {n}", n**2 * _jackknifed(0.2, n), 0.75 * chi2**2 - m3 / 3,
              rtol=0.01, verdict="sharpened"),
        equal("Adding (1/ESS - 1/N) / 2 removes the first order too; it leaves 3 chi2^2/4 - chi2/2 - 2 m3/3",
              "N^2 bias of the delta correction, beta 1, N = 16", delta,
              0.75 * moments[0] ** 2 - moments[0] / 2 - 2 * moments[1] / 3, rtol=0.05, verdict="sharpened"),
        holds("A correction pays where many prompts are averaged: for one prompt the plain estimate errs least",
              "root mean square error of plain, beta 0.2, N = 64", many["plain"],
              f"> {many['delta']:.5g} (delta), {many['jackknife']:.5g} (jackknife)",
              many["plain"] > many["delta"] > many["jackknife"] and same < 1e-12, verdict="refuted"),
        holds("With few candidates the plain estimate errs least for one prompt",
              "root mean square error of plain, beta 0.2, N = 16", error["plain"],
              f"< {error['delta']:.5g} (delta), {error['jackknife']:.5g} (jackknife)",
              error["plain"] < error["delta"] < error["jackknife"], verdict="sharpened"),
        equal("With many, the plain estimate errs less than the jackknife where m3 > 9 chi2^2 / 4",
              "N^2 (square error of plain - of jackknife), two arms, ref .1, p* .25, N = 1,024", rare[0], rare[1],
              rtol=0.02, verdict="sharpened"),
        equal("... and more where m3 < 9 chi2^2 / 4, as where the tilt is mostly on one rare completion",
              "N^2 (square error of plain - of jackknife), two arms, ref .1, p* .8, N = 1,024", frequent[0],
              frequent[1], rtol=0.1, verdict="sharpened"),
    ]  # fmt: skip


def _spread(fast: bool) -> list[Claim]:
    chi2, m3 = _moments(1.0)
    out = [
        equal("N Var(log Z_N) = chi2 + (5 chi2^2/2 - m3) / N + O(1/N^2)", "N Var, beta 1, N = 16",
              16 * _enumerated(1.0, 16)["plain"][1], chi2 + (2.5 * chi2**2 - m3) / 16, rtol=2e-3, verdict="sharpened"),
    ]  # fmt: skip
    if fast:
        return out
    n, draws = 1024, 8000
    arms = jax.random.choice(jax.random.key(1), len(REF), (draws, n), p=jnp.asarray(REF))
    seen = jax.jit(lambda arms: tilt(jnp.asarray(REWARD)[arms], beta=0.2))(arms)
    log_z, ess = np.asarray(seen.log_z), np.asarray(seen.ess) / n
    chi2, m3 = _moments(0.2)
    limit = chi2 + (2.5 * chi2**2 - m3) / n
    squares = n * (log_z - log_z.mean()) ** 2
    return [
        *out,
        equal("N Var(log Z_N) tends to chi2", f"N Var, beta 0.2, N = {n}, {draws:,} samples, 4 s.e.", squares.mean(),
              limit, atol=4 * squares.std() / np.sqrt(draws)),
        equal("ESS/N tends to 1 / (1 + chi2)", f"E ESS/N, beta 0.2, N = {n}, {draws:,} samples", ess.mean(),
              1 / (1 + chi2), rtol=0.03),
    ]  # fmt: skip


@functools.lru_cache
def _in_batch_means() -> dict[str, np.ndarray]:
    """Exact ``E Z_i / Z_i`` of the in-batch estimates, ``[PROMPTS]``, over all 8^5 batches; and the closed forms."""
    rng = np.random.default_rng(0)
    ref = rng.dirichlet(np.ones(COMPLETIONS), PROMPTS)
    reward = rng.normal(size=(PROMPTS, COMPLETIONS))
    batches = np.array(list(itertools.product(range(COMPLETIONS), repeat=PROMPTS)))
    chance = ref[np.arange(PROMPTS), batches].prod(1)
    log_ref, truth = np.log(ref), np.asarray(bandit.log_partition(ref, reward, beta=LAMBDA))

    def ratios(drawn, method):
        log_z = in_batch_log_partition(
            jnp.asarray(log_ref)[:, drawn], jnp.asarray(reward)[:, drawn], beta=LAMBDA, method=method
        )
        return jnp.exp(log_z - truth)

    methods = ("sum", "mean", "balance")
    found = jax.jit(jax.vmap(lambda drawn: [ratios(drawn, method) for method in methods]))(batches)
    out = {method: chance @ np.asarray(x) for method, x in zip(methods, found, strict=True)}
    # E_{y ~ sum of the batch's references} ref(y|x) exp(r/lambda) / Z(x) = E_mixture of the tilt, times B.
    return out | {"closed": (np.asarray(bandit.tilted(ref, reward, beta=LAMBDA)) * ref.sum(0)).sum(1)}


def _in_batch() -> list[Claim]:
    means = _in_batch_means()
    worst = np.abs(means["sum"] - 1).argmax()
    rng = np.random.default_rng(1)
    reward = rng.uniform(-5, 5, (PROMPTS, PROMPTS))
    ref_logp = -160 + 80 * np.eye(PROMPTS)  # Likelier by 80 nats under their own prompt than under another's.
    weights = np.asarray(var_weights(ref_logp, reward, beta=LAMBDA))
    spread = f"{means['sum'].min():.3f} to {means['sum'].max():.3f}"
    return [
        holds("VAR: the sum of ref(y_j|x) exp(r/lambda) over a mini-batch estimates Z(x)",
              "E Z_B(x) / Z(x), the prompt furthest off, all 32,768 batches", means["sum"][worst],
              f"not 1 ({spread} over prompts)", np.abs(means["sum"] - 1).max() > 0.05, verdict="refuted"),
        at_most("The mean of VAR's sum over Z(x) is B E_mixture p*(y|x)",
                "largest error of E Z_B / Z over prompts", np.abs(means["sum"] - means["closed"]).max(), 1e-12,
                verdict="sharpened"),
        holds("The mean over the mini-batch in place of the sum estimates Z(x)", "E Z_B / (B Z), largest over prompts",
              means["mean"].max(),
              "not 1 (below 1 for every prompt)", means["mean"].max() < 0.9, verdict="refuted"),
        at_most("Weighing each completion by ref(y|x) over the batch's mixture of references is unbiased",
                "largest |E Z / Z - 1| over prompts", np.abs(means["balance"] - 1).max(), 1e-12, verdict="sharpened"),
        at_most("Where completions are likely under their own prompt only, every weight of VAR is 1: "
                "plain fine-tuning", "largest |w - 1|; 80 nats between own and other prompts, rewards up to 5, lambda "
                "0.5", np.abs(weights - 1).max(), 0, verdict="sharpened"),
    ]  # fmt: skip


@functools.lru_cache
def _lognormal() -> dict[float, tuple[float, float]]:
    """Exact biases of plain and jackknife for normal rewards and N = 16: sd(r) / beta -> biases, nats."""
    grid = np.linspace(-12, 12, 201)  # The trapezoidal rule of a normal law: exact to the last digit.
    ref = np.exp(-(grid**2) / 2)

    def law(n, beta):
        return bandit.log_partition_law(jnp.asarray(ref / ref.sum()), jnp.asarray(grid), n=n, beta=beta).bias

    at = jax.jit(jax.vmap(jax.vmap(law, (0, None)), (None, 0)))(jnp.asarray([15, 16]), 1 / jnp.asarray([0.8, 3.0]))
    return {sd: (float(b[1]), float(16 * b[1] - 15 * b[0])) for sd, b in zip((0.8, 3.0), at, strict=True)}


def _tails(fast: bool) -> list[Claim]:
    draws = 20_000 if fast else 400_000
    reward = 0.8 * jax.random.normal(jax.random.key(4), (draws, 16), float)
    estimates = jax.jit(lambda reward: [e(reward, beta=1.0) for e in (log_partition, jackknife_log_partition)])(reward)
    seen = [np.asarray(x) - 0.32 for x in estimates]  # log Z = sd^2 / 2.
    control = np.expm1(seen[0])  # Z_N / Z - 1, whose mean is known to be 0.
    out = []
    for name, bias, values in zip(ESTIMATORS, _lognormal()[0.8], seen, strict=False):
        error = values - control
        out.append(equal(f"Normal rewards, sd 0.8 beta, N = 16: bias of the {name} estimate",
                         f"mean of {draws:,} samples, 4 s.e. of the law's quadrature", error.mean(), bias,
                         atol=4 * error.std() / np.sqrt(draws)))  # fmt: skip
    plain, jackknife = _lognormal()[3.0]
    out += [
        holds("The first order needs N above chi2: normal rewards, sd 3 beta, chi2 = 8,102", "bias, N = 16", plain,
              f"far from -chi2/2N = {-np.expm1(9) / 32:.5g}", plain > -4),
        holds("Where N is far below chi2 the jackknife leaves most of the bias",
              "bias of jackknife / bias of plain, sd 3 beta, N = 16",
              jackknife / plain, "> 1/2", jackknife / plain > 0.5),
    ]  # fmt: skip
    rows, n = (16, 2000) if fast else (128, 4000)
    fit = jax.jit(pareto_k)
    tail = np.ceil(3 * np.sqrt(n))
    pareto = 0.9 * jax.random.exponential(jax.random.key(2), (rows, n), float)
    normal = 2.5 * jax.random.normal(jax.random.key(3), (rows, n), float)
    found = np.asarray(fit(pareto))
    away = np.asarray(fit(normal))
    return [
        *out,
        equal("Exponential rewards of mean 0.9 beta: weights have a Pareto tail of shape k = 0.9",
              f"mean k-hat, {rows} samples of {n:,}; expected after the prior's pull to 1/2, 4 s.e.", found.mean(),
              (tail * 0.9 + 5) / (tail + 10), atol=4 * found.std() / np.sqrt(rows)),
        holds("k-hat speaks of the sample and not of the law: normal rewards give weights with every moment",
              f"mean k-hat, sd 2.5 beta, {rows} samples of {n:,}", away.mean(), "> 0.7, 4 s.e. away",
              away.mean() - 4 * away.std() / np.sqrt(rows) > 0.7, verdict="sharpened"),
    ]  # fmt: skip


def _range() -> list[Claim]:
    reward = jnp.asarray([0.0, 1e4, 1e4 - 1, -1e4], jnp.float32)
    exact = 1e4 + np.log1p(np.exp(-1.0)) - np.log(4)
    larger = jnp.asarray([0.0, 1e5, 1e5 - 1, -1e5], jnp.float32)
    log_z, weights = jax.jit(lambda x, y: (log_partition(x, beta=1.0), tilt(y, beta=1.0).weights))(reward, larger)
    return [
        at_most("Rewards of 1e4 beta do not overflow in float32", "error of log Z, nats (one unit in the last place: "
                "9.8e-4)", abs(float(log_z) - exact), 9.8e-4),
        at_most("Weights sum to 1 in float32 at rewards of 1e5 beta", "|sum w - 1|",
                abs(float(jnp.sum(weights)) - 1), 1.2e-7),
    ]  # fmt: skip


def draw_bias():
    """Bias and error against N: exact laws and first orders."""
    figure, axes = plt.subplots(1, 2, figsize=(6.6, 2.8))
    n = np.asarray(SIZES, float)
    for colour, beta in zip(PALETTE, (1.0, 0.2), strict=False):
        chi2, m3 = _moments(beta)
        plain = np.array([-_biases()[beta][k] for k in SIZES])
        jackknife = np.array([abs(_jackknifed(beta, k)) for k in SIZES])
        axes[0].loglog(n, plain, "o", ms=5, color=colour, label=rf"plain, $\beta = {beta:g}$")
        axes[0].loglog(n, jackknife, "^", ms=5, mfc="none", color=colour, label=rf"jackknife, $\beta = {beta:g}$")
        axes[0].loglog(n, chi2 / 2 / n, "-", lw=1, color=colour)
        axes[0].loglog(n, abs(m3 / 3 - 0.75 * chi2**2) / n**2, "--", lw=1, color=colour)
    axes[0].set_ylim(1e-10, 20)
    axes[0].set_xlabel("candidates N")
    axes[0].set_ylabel("|bias of log Z| (nats)")
    axes[0].set_title(r"solid $\chi^2/2N$; dashed $|m_3/3 - 3\chi^4/4|/N^2$", fontsize=9)
    axes[0].legend(fontsize=6.5)
    axes[0].set_xscale("log", base=2)
    means = _in_batch_means()
    prompts = np.arange(1, PROMPTS + 1)
    labels = {"sum": "sum, as printed", "mean": "sum / B", "balance": "balance heuristic"}
    for colour, marker, (method, label) in zip(PALETTE, "osD", labels.items(), strict=False):
        axes[1].plot(prompts, means[method], marker, color=colour, label=label)
    axes[1].plot(prompts, means["closed"], "_", ms=22, color=PALETTE[0], label=r"$B\, E_{mix}\, p^*$")
    axes[1].axhline(1, lw=1, color="black")
    axes[1].set_ylim(0, 1.5)
    axes[1].set_xticks(prompts)
    axes[1].set_xlabel("prompt of the batch")
    axes[1].set_ylabel("E Z in-batch / Z (exact)")
    axes[1].set_title("VAR: one completion a prompt, B = 5", fontsize=9)
    axes[1].legend(fontsize=6.5, ncols=2, loc="upper center")
    return figure


FAMILY = Family(
    name="log_partition",
    title="What an estimate of log Z is worth",
    text="""
log Z = log E_ref exp(r / beta) is estimated by the log of a mean over N candidates. Below, w = exp(r / beta) / Z,
chi2 = Var_ref(w) and m3 = E_ref (w - 1)^3. The mean of the estimate is known exactly for every N as a one-dimensional
integral, that of the jackknife by linearity, and means and variances of all estimators by enumerating every sample of a
six-armed world, so almost nothing on this page is simulated.

The estimate that VAR makes from the other completions of a mini-batch is not one of Z: it is B times the mixture's mean
of the tilt itself, and with sequences of many tokens its weights are 1 whatever the reward, which is supervised
fine-tuning. Dividing by the batch's mixture of references makes it unbiased.
""",
    claims=claims,
    figures={"bias": draw_bias},
    sources=(
        "Jiao, Chen & Li, 2025, [arXiv:2509.04372](https://arxiv.org/abs/2509.04372)",
        "Du et al., 2025 (VAR), [arXiv:2502.11026](https://arxiv.org/abs/2502.11026)",
        "Vehtari et al., 2024, [arXiv:1507.02646](https://arxiv.org/abs/1507.02646)",
        "Quenouille, 1956 (the jackknife)",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
