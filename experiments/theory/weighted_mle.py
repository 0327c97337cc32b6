"""Weighted maximum likelihood: what it fits, how much its importance weights cost, and which weights are wrong.

    python -m experiments.theory.weighted_mle

Expected: N E KL tends to (sum_x p*/ref - 1 - chi2) / 2 where samples of the target give (K - 1) / 2; refuted: that the
price is 1 + chi2, or below it, and the printed weight of VAR; about 20 seconds on two cores.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import special, stats

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from experiments.theory.soft_best_of_n import REF, REWARD
from experiments.theory.tabular import minimiser, multisets
from tiltjax.losses.mle import (
    best_of_n_sft_loss,
    reward_weighted_regression_loss,
    sft_loss,
    tilted_mle_loss,
    var_importance_loss,
    var_loss,
)
from tiltjax.samplers.resample import resample
from tiltjax.tilt.weights import tilt

__all__ = ["FAMILY", "claims"]

BETA = 0.2
"""Where the figures of this page are: 1 + chi2 = 4.99, so that the laws to be told apart are far from each other."""

ARMS = len(REF)

FAST, FULL = (1024, 512), (2048, 4096)
"""Candidates of a simulated fit, and how many fits."""

SIZES = tuple(2**k for k in range(9, 15))


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page."""
    return [*_optimum(), *_error(fast), *_gradient(), *_prompts(), *_var()]


def _optimum() -> list[Claim]:
    target = np.asarray(bandit.tilted(REF, REWARD, beta=BETA))
    log_z = bandit.log_partition(REF, REWARD, beta=BETA)
    log_ref = np.log(REF)

    def population(z):  # Every completion as the only candidate of its prompt, weighed by the reference.
        logp = jax.nn.log_softmax(z)[:, None]
        losses = var_importance_loss(logp, REWARD[:, None], jnp.broadcast_to(log_z, (ARMS,)), beta=BETA)
        return jnp.asarray(REF) @ losses

    found = special.softmax(minimiser(population, log_ref))
    out = [
        at_most("The minimiser of weighted maximum likelihood is the tilt", "largest |pi - p*|, beta 0.2",
                np.abs(found - target).max(), 1e-7),
    ]  # fmt: skip
    law_of = jax.jit(lambda n: bandit.soft_best_of_n_law(jnp.asarray(REF), jnp.asarray(REWARD), n=n, beta=BETA))
    for n in (2, 4):
        law = np.asarray(law_of(n))
        error = np.abs(_expected_target(n) - law).max()
        distance = bandit.total_variation(law, target)
        out.append(
            at_most(f"With N = {n} candidates a prompt it is the law of soft best-of-N, at total variation "
                    f"{float(distance):.3f} from the tilt", "largest |pi - P_N| over all samples", error, 1e-12,
                    verdict="sharpened")
        )  # fmt: skip
    limits = np.random.default_rng(0).normal(size=(2, 8))

    @jax.jit
    def gradients(logp, reward):
        weighted = jax.grad(lambda logp, beta: tilted_mle_loss(logp, reward, beta=beta))
        ends = jax.grad(sft_loss)(logp), jax.grad(best_of_n_sft_loss)(logp, reward)
        return [weighted(logp, beta) - end for beta, end in zip((1e9, 1e-3), ends, strict=True)]

    to_sft, to_raft = (np.abs(x).max() for x in gradients(*limits))
    return [
        *out,
        at_most("As beta goes to infinity weighted MLE is supervised fine-tuning",
                "largest difference of gradients, beta 1e9",
                to_sft, 1e-8),
        at_most("As beta goes to 0 weighted MLE is best-of-N distillation (RAFT)",
                "largest difference of gradients, beta 1e-3",
                to_raft, 1e-12),
    ]  # fmt: skip


def _expected_target(n: int) -> np.ndarray:
    """What a policy fits in expectation over samples of N candidates: minus the gradient by log-probability, [K]."""
    drawn, orders = multisets(ARMS, n)
    chance, reward = orders * REF[drawn].prod(1), REWARD[drawn]

    def loss(logp):
        return chance @ tilted_mle_loss(logp[drawn], reward, beta=BETA)

    return -np.asarray(jax.jit(jax.grad(loss))(jnp.zeros(ARMS)))


def _limits(ref: np.ndarray, reward: np.ndarray, beta: float = BETA) -> tuple[float, float]:
    """Limits of N E KL(p* || fit): from weighted samples of the reference, and from samples of the tilt."""
    w = np.asarray(bandit.tilted(ref, reward, beta=beta)) / ref
    return float(w.sum() - ref @ w**2) / 2, (len(ref) - 1) / 2


@functools.lru_cache
def _worlds() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(2)
    worlds = {"bandit": (REF, REWARD), "tree": (rng.dirichlet(3 * np.ones(27)), rng.normal(size=27) / 4)}
    # Its tilt is (.9, .1): the weight of the rare arm is 10, and it seldom counts.
    return worlds | {"two arms": (np.array([0.99, 0.01]), np.array([0.0, BETA * np.log(11)]))}


@functools.lru_cache
def _exact_error(world: str) -> dict[int, tuple[float, float]]:
    """`exact_error` in one of the worlds of this page."""
    return exact_error(*_worlds()[world])


def exact_error(ref: np.ndarray, reward: np.ndarray) -> dict[int, tuple[float, float]]:
    """N -> ``N E KL(p* || fit)`` given that each arm was drawn: of weighted samples, and of samples of the tilt.

    The weighted fit is count times weight over their sum, so its log splits into the plain log-partition, whose mean is
    an integral, and the logs of binomial counts.
    """
    target = np.asarray(bandit.tilted(ref, reward, beta=BETA))
    law = jax.vmap(lambda n: bandit.log_partition_law(jnp.asarray(ref), jnp.asarray(reward), n=n, beta=BETA).bias)
    bias = np.asarray(jax.jit(law)(jnp.asarray(SIZES)))

    def missing(p, n):  # -E log(count / N p) given count > 0
        count = np.arange(1, n + 1)
        chance = stats.binom.pmf(count, n, p)
        return -(chance @ np.log(count / (n * p))) / chance.sum()

    return {
        n: (
            n * (b + sum(t * missing(p, n) for t, p in zip(target, ref, strict=True))),
            n * sum(t * missing(t, n) for t in target),
        )
        for n, b in zip(SIZES, bias.tolist(), strict=True)
    }


@functools.lru_cache
def _simulated(n: int, draws: int) -> dict[str, tuple[float, float]]:
    """``N KL(p* || fit)`` with its standard error: fits of weighted, resampled and on-target samples."""
    target = bandit.tilted(REF, REWARD, beta=BETA)
    table = jnp.zeros(ARMS)

    def fit(loss):  # The minimiser of -sum_i w_i logp_i over a table is the weights summed by arm.
        return -jax.grad(loss)(table)

    def one(key):
        ref_key, pick_key, target_key = jax.random.split(key, 3)
        arms = jax.random.choice(ref_key, ARMS, (n,), p=jnp.asarray(REF))
        reward = jnp.asarray(REWARD)[arms]
        kept = arms[resample(pick_key, tilt(reward, beta=BETA).weights, num=n, method="multinomial")]
        drawn = jax.random.choice(target_key, ARMS, (n,), p=target)
        fits = {
            "weighted": fit(lambda logp: tilted_mle_loss(logp[arms], reward, beta=BETA)),
            "resampled": fit(lambda logp: sft_loss(logp[kept])),
            "on target": fit(lambda logp: sft_loss(logp[drawn])),
        }
        return {name: n * bandit.kl(target, p) for name, p in fits.items()}

    values = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=256))(jax.random.split(jax.random.key(0), draws))
    return {name: (float(v.mean()), float(v.std() / draws**0.5)) for name, v in values.items()}


def _error(fast: bool) -> list[Claim]:
    n = 4096
    weighted, drawn = _exact_error("bandit")[n]
    limit, on_target = _limits(REF, REWARD)
    chi2 = float(bandit.chi_squared(REF, REWARD, beta=BETA))
    tree_limit, _ = _limits(*_worlds()["tree"])
    two, from_tilt = _exact_error("two arms")[16384]
    two_price = 1 + float(bandit.chi_squared(*_worlds()["two arms"], beta=BETA))
    two_limit = float(np.divide(*_limits(*_worlds()["two arms"])))
    out = [
        equal("Open question 3: N E KL(p* || fit) tends to (sum_x p*(x)/ref(x) - 1 - chi2) / 2",
              f"exact, N = {n}, beta 0.2", weighted, limit, rtol=0.01, verdict="sharpened"),
        equal("The limit of N E KL, computed apart from this library", "(sum_x p*/ref - 1 - chi2) / 2",
              limit, 6.02, atol=5e-3),
        equal("Samples of the tilt itself would give (K - 1) / 2", f"exact, N = {n}", drawn, on_target, rtol=0.01),
        equal("The same law in a world of 27 completions", "exact, N = 16,384",
              _exact_error("tree")[16384][0], tree_limit, rtol=0.02, verdict="sharpened"),
        holds("Importance weights cost a factor 1 + chi2 in samples", "limit of the error over (K - 1) / 2, beta 0.2",
              limit / on_target, f"not {1 + chi2:.5g}", abs(limit / on_target / (1 + chi2) - 1) > 0.2,
              verdict="refuted"),
        equal("Importance weights cost a factor (sum_x w(x) - 1 - chi2) / (K - 1) in samples",
              "exact errors, weighted over on-target, N = 4,096", weighted / drawn, limit / on_target, rtol=0.01,
              verdict="sharpened"),
        holds("Importance weights cost fewer samples than 1 + chi2 says",
              "exact errors, weighted over on-target, ref (.99, .01), p* (.9, .1), N = 16,384", two / from_tilt,
              f"not below {two_price:.5g}", two / from_tilt > 3 * two_price, verdict="refuted"),
        equal("The factor in samples is a mean of w in which an arm counts by 1 - p*, where 1 + chi2 is the one in "
              "which it counts by p*", "exact errors, weighted over on-target, ref (.99, .01), p* (.9, .1), N = 16,384",
              two / from_tilt, two_limit, rtol=0.03, verdict="sharpened"),
    ]  # fmt: skip
    n, draws = FAST if fast else FULL
    seen = _simulated(n, draws)
    told = f"mean N KL, N = {n:,}, {draws:,} fits, 4 s.e."
    resampled = limit + on_target
    for name, claim, value in (
        ("weighted", "The library's loss reaches that law", _exact_error("bandit")[n][0]),
        ("on target", "Supervised fine-tuning on samples of the tilt", _exact_error("bandit")[n][1]),
        ("resampled", "Resampling N of N candidates first adds (K - 1) / 2 to the error", resampled),
    ):
        mean, error = seen[name]
        out.append(equal(claim, told, mean, value, atol=4 * error + 0.01 * value,
                         verdict="sharpened" if name == "resampled" else "confirmed"))  # fmt: skip
    return out


@functools.lru_cache
def _traces_of() -> Callable[..., tuple[Any, Any, Any]]:
    """Compiled once: trace ratio of gradient covariances, weighted over on-target; 1 + chi2; the difference."""

    def traces(ref, beta):
        reward = jnp.asarray(REWARD)
        target = bandit.tilted(ref, reward, beta=beta)
        log_z = bandit.log_partition(ref, reward, beta=beta)

        def squares(loss):  # Squared norm of the gradient by logits of every completion as the only candidate.
            row = jax.grad(lambda z, i: loss(jax.nn.log_softmax(z)[i][None], reward[i][None]))
            return jnp.sum(jnp.square(jax.vmap(row, (None, 0))(jnp.log(target), jnp.arange(ARMS))), axis=-1)

        weighted = ref @ squares(lambda logp, r: var_importance_loss(logp, r, log_z, beta=beta))
        norms = squares(lambda logp, r: sft_loss(logp))
        w = target / ref
        covariance = target @ (w * norms) - (target @ w) * (target @ norms)
        return weighted / (target @ norms), target @ w, covariance / (target @ norms)

    return jax.jit(traces)


def _gradient() -> list[Claim]:
    ratio, price, correction = map(float, _traces_of()(REF, BETA))
    flat = np.exp(-REWARD / BETA)
    flat_ratio, flat_price, _ = _traces_of()(flat / flat.sum(), BETA)
    return [
        holds("Importance weights multiply the variance of the gradient by 1 + chi2",
              "trace of covariance, weighted over on-target, at the optimum, beta 0.2", ratio, f"not {price:.5g}",
              abs(ratio / price - 1) > 0.05, verdict="refuted"),
        equal("The gradient's factor is 1 + chi2 + Cov_p*(w, |g|^2) / E_p*|g|^2, g = grad log pi(y)", "trace ratio",
              ratio, price + correction, rtol=1e-10, verdict="sharpened"),
        equal("The gradient's factor is 1 + chi2 where all |g| are equal, as for a uniform tilt",
              "trace ratio, ref proportional to "
              "exp(-r/beta)", flat_ratio, flat_price, rtol=1e-10, verdict="sharpened"),
    ]  # fmt: skip


def _prompts() -> list[Claim]:
    """Two prompts of four equally likely completions: one batch of all eight is the population."""
    rng = np.random.default_rng(3)
    reward = rng.normal(size=(2, 4)) + np.array([[0.0], [1.0]])
    z = np.exp(np.asarray(bandit.log_partition(np.full((2, 4), 0.25), reward, beta=1.0)))
    batch = jax.jit(
        jax.grad(lambda logp: reward_weighted_regression_loss(logp, jnp.asarray(reward.ravel()), beta=1.0).sum())
    )
    rows = jax.jit(jax.grad(lambda logp: tilted_mle_loss(logp, jnp.asarray(reward), beta=1.0).sum()))
    mass = -np.asarray(batch(jnp.zeros(8))).reshape(2, 4).sum(1)
    even = -np.asarray(rows(jnp.zeros((2, 4)))).sum(1)
    return [
        equal("Weights normalised over the batch multiply the share of a prompt by its Z",
              "share of the gradient, second prompt over first", mass[1] / mass[0], z[1] / z[0], rtol=1e-12),
        equal("Weights normalised per prompt leave prompts their shares",
              "share of the gradient, second prompt over first", even[1] / even[0], 1, atol=1e-12),
    ]  # fmt: skip


def _var() -> list[Claim]:
    """The printed weight of VAR with the exact Z: every completion stands in the batch, so the sum is complete."""
    target = np.asarray(bandit.tilted(REF, REWARD, beta=BETA))
    ref_logp = np.broadcast_to(np.log(REF), (ARMS, ARMS))
    reward = np.broadcast_to(REWARD, (ARMS, ARMS))

    def population(z):
        return jnp.asarray(REF) @ var_loss(jax.nn.log_softmax(z), ref_logp, reward, beta=BETA)

    found = np.asarray(jax.nn.softmax(minimiser(population, np.log(REF))))
    twice = np.asarray(bandit.tilted(REF**2 / (REF**2).sum(), REWARD, beta=BETA))
    return [
        holds("VAR: completions of the reference weighed by ref(y|x) exp(r/lambda) / Z fit the tilt",
              "TV(pi, p*), lambda 0.2, exact Z", bandit.total_variation(found, target), "not 0",
              float(bandit.total_variation(found, target)) > 0.05, verdict="refuted"),
        at_most("The weights of VAR fit ref^2 exp(r/lambda): the reference enters twice", "largest |pi - that|",
                np.abs(found - twice).max(), 1e-7, verdict="sharpened"),
    ]  # fmt: skip


def draw_error():
    """Error of the fit against N, and the price of the weights against beta."""
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3.3))
    weighted, drawn = np.array([_exact_error("bandit")[n] for n in SIZES]).T
    limit, on_target = _limits(REF, REWARD)
    for colour, marker, values, level, label in (
        (PALETTE[0], "o", weighted, limit, "weighted samples of ref"),
        (PALETTE[2], "s", drawn, on_target, "samples of the tilt"),
    ):
        axes[0].semilogx(SIZES, values, marker, ms=5, color=colour, label=label)
        axes[0].axhline(level, lw=1, color=colour)
    axes[0].axhline(limit + on_target, lw=1, color=PALETTE[1])
    n = FAST[0]
    for colour, name in ((PALETTE[1], "resampled"), (PALETTE[0], "weighted"), (PALETTE[2], "on target")):
        mean, error = _simulated(*FAST)[name]
        labelled = {"label": "resampled, then fine-tuned"} if name == "resampled" else {}
        axes[0].errorbar(n * 1.12, mean, yerr=4 * error, fmt="x", capsize=3, color=colour, **labelled)
    axes[0].set_ylim(0, 13.5)
    axes[0].set_xscale("log", base=2)
    axes[0].set_xlabel("candidates N")
    axes[0].set_ylabel("N E KL(p* || fit), nats")
    axes[0].set_title(r"exact (x: simulated, 4 s.e.); lines: limits, $\beta = 0.2$", fontsize=10)
    axes[0].legend(fontsize=7, ncols=2, loc="upper center")
    betas = np.geomspace(0.12, 2.4, 12)
    traces = np.array([_traces_of()(REF, float(b)) for b in betas])
    prices = np.array([np.divide(*_limits(REF, REWARD, float(b))) for b in betas])
    axes[1].loglog(betas, traces[:, 1], "-", lw=1, color="black", label=r"$1 + \chi^2$")
    axes[1].loglog(betas, traces[:, 1] + traces[:, 2], "-", lw=1, color=PALETTE[3])
    axes[1].loglog(betas, traces[:, 0], "o", ms=5, color=PALETTE[3], label="gradient variance")
    axes[1].loglog(betas, prices, "--", lw=1.5, color=PALETTE[0], label="error of the fit (limit)")
    axes[1].set_xticks(ticks := [0.12, 0.25, 0.5, 1, 2], map(str, ticks), minor=False)
    axes[1].set_yticks(ticks := [1, 2, 5, 10], map(str, ticks), minor=False)
    axes[1].minorticks_off()
    axes[1].set_xlabel(r"$\beta$ (reward units)")
    axes[1].set_ylabel("weighted over on-target")
    axes[1].set_title("what importance weights cost", fontsize=10)
    axes[1].legend(fontsize=8)
    return figure


FAMILY = Family(
    name="weighted_mle",
    title="Weighted maximum likelihood fits the tilt, at a known price",
    text="""
RL-free alignment imitates N samples of the reference, weighed by exp(r / beta) and normalised per prompt: a forward
projection onto the tilt. The third open question of the anthology asks what the weights cost. In a table of K
completions the answer is exact: N E KL(p* || fit) tends to (sum_x w - 1 - chi2) / 2 with w = p* / ref, where samples of
the tilt itself would give (K - 1) / 2. That price is not the factor 1 + chi2 which the effective sample size suggests.
Both are means of w: in 1 + chi2 a completion counts by p*, in the price by 1 - p*. So the weights are cheap where the
heavy ones carry the tilt, as in the six-armed bandit (at most 2.51 at any beta), and dear where they do
not: ref (.99, .01) and p* (.9, .1) cost a factor 9.1 at 1 + chi2 = 1.8. The variance of a gradient is close to 1 + chi2
in the bandit, and equal to it where all gradients are of one length.

The weight that VAR prints has the reference in it once more than the samples allow: it fits ref² exp(r / lambda).
""",
    claims=claims,
    figures={"error": draw_error},
    sources=(
        "Jiao, Chen & Li, 2025, [arXiv:2509.04372](https://arxiv.org/abs/2509.04372)",
        "Du et al., 2025 (VAR), [arXiv:2502.11026](https://arxiv.org/abs/2502.11026)",
        "Kong, 1992 (the effective sample size)",
        "Peters & Schaal, 2007 (weights over the batch)",
        "Dong et al., 2023, [arXiv:2304.06767](https://arxiv.org/abs/2304.06767)",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
