"""Tilts under other divergences: the right closed form, the printed one, and what f-DPO learns.

    python -m experiments.theory.f_divergence

Expected: the multiplier stands inside the inverse of f' for every divergence; refuted: a normaliser outside of it,
which is right for reverse KL only; about 20 seconds on two cores.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import expit, softmax

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from experiments.theory.soft_best_of_n import REF, REWARD
from experiments.theory.tabular import minimiser, ordered_pairs
from tiltjax.losses.preference import chi_po_loss, dpo_loss
from tiltjax.tilt.f_divergence import divergence_link, f_divergence, f_divergence_tilt
from tiltjax.tilt.pessimism import pessimistic_weights

__all__ = ["FAMILY", "claims"]

BETA, SMALL = 0.3, 0.03
"""The strength used throughout, and one at which the divergences change places."""

BETAS = np.array([BETA, SMALL, *np.geomspace(0.02, 20, 150)])

SMOOTH: dict[str, dict[str, Any]] = {
    "reverse KL": {"divergence": "reverse_kl"},
    "forward KL": {"divergence": "forward_kl"},
    "Jensen-Shannon": {"divergence": "js"},
    "alpha 0.5": {"divergence": "alpha", "alpha": 0.5},
    (MIXED := "chi-squared + KL"): {"divergence": "mixed_chi_squared"},
}
"""Divergences whose f'(0) is infinite: the optimum keeps every completion."""

INVERSES = {
    "reverse KL": lambda z: np.exp(z - 1),
    "alpha 0.5": lambda z: (1 - z / 2) ** -2.0,
    "forward KL": lambda z: -1 / z,
}
"""(f')^-1 of f = u log u, of the alpha divergence's (1 - u^-alpha) / alpha, and of f = -log u."""

PAIRS = ordered_pairs(len(REF))


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page."""
    del fast  # Everything here takes less than a second once compiled.
    return [*_optimum(), *_outside(), *_pairs(), *_limits(), *_sparse(), *_one_beta(), *_equal_reward()]


@functools.lru_cache
def _tilts(uniform: bool) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Policies ``[len(BETAS), K]`` and multipliers of every smooth divergence, by the library's bisection."""
    ref = np.full(len(REF), 1 / len(REF)) if uniform else REF
    found = _all_tilts()(ref, BETAS)
    return {name: (np.asarray(tilt.weights), np.asarray(tilt.lam)) for name, tilt in found.items()}


@functools.lru_cache
def _all_tilts() -> Callable[..., dict[str, Any]]:
    def tilts(ref, betas):
        return {
            name: jax.vmap(lambda beta, o=options: f_divergence_tilt(REWARD, ref, beta=beta, **o))(betas)
            for name, options in SMOOTH.items()
        }

    return jax.jit(tilts)


def _optima() -> dict[str, tuple[np.ndarray, float]]:
    """Policy and multiplier at `BETA` of every smooth divergence."""
    return {name: (policies[0], float(lams[0])) for name, (policies, lams) in _tilts(uniform=False).items()}


def _objective(policy, options):
    return policy @ jnp.asarray(REWARD) - BETA * f_divergence(policy, jnp.asarray(REF), **options)


def _optimum() -> list[Claim]:
    def cost(z):  # All divergences at once, each with its own row of logits.
        return -sum(_objective(jax.nn.softmax(z[i]), options) for i, options in enumerate(SMOOTH.values()))

    found = softmax(minimiser(cost, np.tile(np.log(REF), (len(SMOOTH), 1))), -1)
    links = _links(np.stack([np.log(_optima()[name][0] / REF) for name in SMOOTH]))
    out, spread, rng = [], [], np.random.default_rng(0)
    for numerical, link, name in zip(found, links, SMOOTH, strict=True):
        policy, lam = _optima()[name]
        out.append(
            at_most(f"The maximum of E r - beta D_f is ref (f')^-1((r - lambda) / beta): {name}",
                    "largest |pi - that|, numerical maximum", np.abs(numerical - policy).max(), 1e-8)
        )  # fmt: skip
        spread.append(np.abs(REWARD - BETA * np.asarray(link) - lam).max())
    return [
        *out,
        at_most("r - beta f'(pi/ref) is the same multiplier for every completion", "largest deviation, five of them",
                max(spread), 1e-12),
        at_most("The links of f-DPO are the derivatives of their f", "largest deviation from a constant, five of them",
                _link_errors(rng.dirichlet(np.ones(len(REF)))).max(), 1e-12),
    ]  # fmt: skip


@jax.jit
def _links(log_ratio):
    """The links, each at its own row."""
    return [divergence_link(row, **options) for row, options in zip(log_ratio, SMOOTH.values(), strict=True)]


@jax.jit
def _link_errors(policy):
    """How far the slope of each D_f by the policy, over the table, is from the link up to a constant."""
    ref = jnp.asarray(REF)

    def error(options):
        slope = jax.grad(lambda policy: f_divergence(policy, ref, **options))(policy)
        return jnp.ptp(slope - divergence_link(jnp.log(policy / ref), **options))

    return jnp.stack([error(options) for options in SMOOTH.values()])


def _printed(name: str, shift: float = 0.0) -> np.ndarray:
    """The printed form: ``ref (f')^-1(r / beta)`` over its sum."""
    mass = REF * INVERSES[name]((REWARD + shift) / BETA)
    return mass / mass.sum()


def _outside() -> list[Claim]:
    same = np.abs(_printed("reverse KL") - _optima()["reverse KL"][0]).max()
    printed, (policy, _) = _printed("alpha 0.5", -1.0), _optima()["alpha 0.5"]
    shifted = float(bandit.total_variation(printed, _printed("alpha 0.5", -2.0)))
    options = SMOOTH["alpha 0.5"]
    best, worse = jax.jit(jax.vmap(functools.partial(_objective, options=options)))(np.stack([policy, printed]))
    loss = float(best) - float(worse)
    negative = INVERSES["forward KL"]((REWARD[1:]) / BETA)
    far = float(bandit.total_variation(printed, policy))
    shift = jax.jit(lambda reward: f_divergence_tilt(reward, REF, beta=BETA, divergence="forward_kl").weights)
    return [
        at_most("pi* = ref (f')^-1(r / beta) / Z holds for reverse KL", "largest |pi - that|", same, 1e-14),
        holds("pi* = ref (f')^-1(r / beta) / Z for any f-divergence",
              "TV to the optimum, alpha 0.5, rewards in [-1, 0]", far, "not 0", far > 0.05, verdict="refuted"),
        holds("The printed form is worth less than the optimum", "E r - beta D_f, optimum less printed form", loss,
              "> 0", loss > 1e-3, verdict="sharpened"),
        holds("The printed form depends on the origin of the rewards", "TV after a shift of the rewards by -1", shifted,
              "not 0",
              shifted > 0.02, verdict="sharpened"),
        at_most("The optimum does not depend on the origin of the rewards", "largest |pi(r) - pi(r + 7)|, forward KL",
                np.abs(shift(REWARD) - shift(REWARD + 7)).max(), 1e-12, verdict="sharpened"),
        holds("For forward KL the printed form is no distribution where a reward is positive",
              "largest (f')^-1(r / beta) over positive rewards", negative.max(), "< 0", negative.max() < 0,
              verdict="sharpened"),
    ]  # fmt: skip


def _pairs() -> list[Claim]:
    labels = jnp.asarray(expit(REWARD[PAIRS[:, 0]] - REWARD[PAIRS[:, 1]]))
    ref_logp = np.log(REF)[PAIRS]

    def population(z):
        total = 0.0
        for row, (name, options) in zip(z, SMOOTH.items(), strict=True):
            loss = functools.partial(chi_po_loss if name == MIXED else dpo_loss, beta=BETA)
            options = {} if name == MIXED else options
            total += labels @ loss(jax.nn.log_softmax(row)[PAIRS], ref_logp, **options)
        return total

    found = softmax(minimiser(population, np.tile(np.log(REF), (len(SMOOTH), 1))), -1)
    return [
        at_most(f"{'Chi-squared PO' if name == MIXED else 'f-DPO'} learns the optimum from labels: {name}",
                "largest |pi - pi*|", np.abs(policy - _optima()[name][0]).max(), 1e-8)
        for name, policy in zip(SMOOTH, found, strict=True)
    ]  # fmt: skip


def _limits() -> list[Claim]:
    tilt = jax.jit(lambda alpha: f_divergence_tilt(REWARD, REF, beta=BETA, divergence="alpha", alpha=alpha).weights)
    near, far = np.asarray(tilt(1e-7)), np.asarray(tilt(1.0))
    return [
        at_most("As alpha goes to 0 the optimum is the tilt", "largest |pi - p*|, alpha 1e-7",
                np.abs(near - bandit.tilted(REF, REWARD, beta=BETA)).max(), 1e-5),
        at_most("At alpha = 1 the optimum is that of forward KL", "largest difference",
                np.abs(far - _optima()["forward KL"][0]).max(), 1e-12),
    ]  # fmt: skip


def _sparse() -> list[Claim]:
    reward = np.array([0.0, 0.1, 0.5, 0.9, 1.0])
    policy = np.asarray(
        jax.jit(lambda reward: f_divergence_tilt(reward, beta=0.2, divergence="chi_squared").weights)(reward)
    )
    rivals = np.random.default_rng(1).dirichlet(np.ones(5), 5000)

    def worth(p):
        return p @ reward - 0.2 * f_divergence(p, divergence="chi_squared")

    own, *others = np.asarray(jax.jit(jax.vmap(worth))(np.vstack([policy, rivals])))
    pessimistic = np.asarray(pessimistic_weights(reward, beta=0.2)) / 5
    return [
        holds("Chi-squared drops completions, so its rewards cannot be read off the policy", "probability of the worst",
              policy[0], "0, and worth more than 5,000 random policies",
              policy[0] == 0 and own > max(others)),
        at_most("The optimum of chi-squared is inference-time pessimism", "largest difference of weights",
                np.abs(policy - pessimistic).max(), 1e-12, verdict="sharpened"),
    ]  # fmt: skip


def _entropy(policy) -> float:
    return float(-(policy @ np.log(policy)))


def _sweep(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean reward and entropy of the optimum under a uniform reference, along beta."""
    return _along(_tilts(uniform=True)[name][0])


def _along(policies: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    policies = policies[2:]
    return policies @ REWARD, np.array([_entropy(p) for p in np.maximum(policies, 1e-300)])


FORWARD, REVERSE = "forward KL", "reverse KL"


def at_one_beta(ref: np.ndarray, beta: float) -> tuple[float, float, float, float]:
    """Forward KL less reverse KL at one beta, both times ``beta^2``, and the limits of the two for a large beta.

    Args:
      ref: Of the standard rewards, ``[K]``.
      beta: Strength.

    Returns:
      ``beta^2`` times the difference of the mean rewards; its limit, half of the third cumulant of the rewards; the
      same of the entropies; its limit, minus half of the covariance of the squared deviation with log ref.
    """
    policies = {
        name: np.asarray(found.weights[0]) for name, found in _all_tilts()(ref, np.full(len(BETAS), beta)).items()
    }
    deviation = REWARD - ref @ REWARD
    square = deviation**2 - ref @ deviation**2
    forward, reverse = policies[FORWARD], policies[REVERSE]
    return (
        float(beta**2 * (forward - reverse) @ REWARD),
        float(ref @ deviation**3 / 2),
        float(beta**2 * (_entropy(forward) - _entropy(reverse))),
        float(-(ref * square) @ np.log(ref) / 2),
    )


def _one_beta() -> list[Claim]:
    here, small = ({name: policies[i] for name, (policies, _) in _tilts(uniform=False).items()} for i in (0, 1))
    forward, reverse = FORWARD, REVERSE
    negative, far = at_one_beta(REF[::-1], 0.3), at_one_beta(REF, 20.0)
    skewed, wide = at_one_beta(REF[::-1], 20.0), at_one_beta(REF, 1.0)
    return [
        holds("At one beta reverse KL earns the most reward", "E r of forward KL, beta 0.3", here[forward] @ REWARD,
              f"> {here[reverse] @ REWARD:.5g} (reverse KL)", here[forward] @ REWARD > here[reverse] @ REWARD,
              verdict="refuted"),
        holds("At one beta forward KL leaves the most entropy", "entropy of forward KL, nats, beta 0.3",
              _entropy(here[forward]), f"< {_entropy(here[reverse]):.5g} (reverse KL)",
              _entropy(here[forward]) < _entropy(here[reverse]), verdict="refuted"),
        holds("Small beta reverses both orders: tails are exponential against polynomial",
              "entropy of forward KL, nats, beta 0.03", _entropy(small[forward]),
              f"> {_entropy(small[reverse]):.5g} (reverse KL)",
              _entropy(small[forward]) > _entropy(small[reverse]) and small[forward] @ REWARD < small[reverse] @ REWARD,
              verdict="sharpened"),
        holds("Unless beta is small, forward KL earns more at one beta, whatever the rewards",
              "beta^2 (E r of forward KL - of reverse KL), beta 0.3, reference mirrored: negatively skewed rewards",
              negative[0], "< 0", negative[0] < -1e-3, verdict="refuted"),
        equal("At large beta forward KL earns more than reverse KL by the third cumulant of the rewards over 2 beta^2",
              "beta^2 (E r of forward KL - of reverse KL), beta 20", far[0], far[1], rtol=0.05, verdict="sharpened"),
        equal("... and less where that cumulant is negative",
              "beta^2 (E r of forward KL - of reverse KL), beta 20, reference mirrored", skewed[0], skewed[1],
              rtol=0.05, verdict="sharpened"),
        holds("Unless beta is small, forward KL leaves less entropy at one beta",
              "beta^2 (entropy of forward KL - of reverse KL), beta 1", wide[2], "> 0", wide[2] > 1e-3,
              verdict="refuted"),
        equal("At large beta the entropies differ by -Cov_ref((r - E r)^2, log ref) / 2 beta^2",
              "beta^2 (entropy of forward KL - of reverse KL), beta 20", far[2], far[3], rtol=0.05,
              verdict="sharpened"),
    ]  # fmt: skip


def entropy_gains(ref: np.ndarray) -> dict[str, np.ndarray]:
    """Entropy of every divergence's optimum above that of the tilt of the same mean reward, nats.

    Args:
      ref: Of the standard rewards, ``[K]``.

    Returns:
      Name -> gains at fifteen levels of mean reward that every optimum reaches.
    """
    curves = {name: _along(np.asarray(found.weights)) for name, found in _all_tilts()(ref, BETAS).items()}
    low, high = max(mean.min() for mean, _ in curves.values()), min(mean.max() for mean, _ in curves.values())
    levels = np.linspace(low + 0.1 * (high - low), high - 0.1 * (high - low), 15)
    at = {name: np.interp(levels, mean[::-1], entropy[::-1]) for name, (mean, entropy) in curves.items()}
    return {name: values - at[REVERSE] for name, values in at.items() if name != REVERSE}


def _equal_reward() -> list[Claim]:
    excess = max(gains.max() for gains in entropy_gains(np.full(len(REF), 1 / len(REF))).values())
    here = max(gains.max() for gains in entropy_gains(REF).values())
    worlds = np.random.default_rng(0).dirichlet(np.ones(len(REF)), 60)
    found = np.array([entropy_gains(ref)[FORWARD].max() for ref in worlds])
    return [
        holds("Another divergence buys diversity that reverse KL cannot: with a uniform reference",
              "largest entropy above reverse KL at equal E r, uniform reference", excess, "≤ 0", excess <= 0,
              verdict="refuted"),
        holds("Another divergence buys diversity that reverse KL cannot: with another reference it may",
              "largest entropy above reverse KL at equal E r, reference of the standard bandit", here, "> 0",
              here > 0.01),
        holds("With a random reference forward KL mostly has more entropy than the tilt at some mean reward",
              "of 60 random references, by more than 0.001 nats", int((found > 1e-3).sum()), "> 30",
              (found > 1e-3).sum() > 30, verdict="sharpened"),
        equal("At equal mean reward and a uniform reference the tilt has the largest entropy of all policies",
              "slope of its entropy, less its part along 1 and r", _residual(), 0, atol=1e-12, verdict="sharpened"),
    ]  # fmt: skip


def _residual() -> float:
    """What remains of the slope of the entropy at a tilt of the uniform law once 1 and r are projected out."""
    policy = np.asarray(bandit.tilted(np.full(len(REWARD), 1 / len(REWARD)), REWARD, beta=BETA))
    basis = np.stack([np.ones_like(REWARD), REWARD], axis=1)
    slope = -np.log(policy)
    return float(np.abs(slope - basis @ np.linalg.lstsq(basis, slope, rcond=None)[0]).max())


def draw_optima():
    """The optima at one beta, and what each divergence gives up in entropy for its reward."""
    figure, axes = plt.subplots(1, 2, figsize=(6.2, 2.8))
    best_reward, best_entropy = _sweep("reverse KL")
    for colour, marker, name in zip(PALETTE, "osD^v", SMOOTH, strict=False):
        policy, _ = _optima()[name]
        axes[0].semilogy(REWARD, policy / REF, marker, ms=5, color=colour, label=name)
        fine = np.linspace(0, 1, 101)
        ratio = _ratio(name, fine)
        axes[0].semilogy(fine, ratio, "-", lw=1, color=colour)
        reward, entropy = _sweep(name)
        lost = np.interp(reward, best_reward[::-1], best_entropy[::-1]) - entropy
        axes[1].plot(reward, lost, "-", lw=1.2, color=colour)
    axes[0].set_xlabel("reward")
    axes[0].set_ylabel("pi / ref")
    axes[0].set_title(rf"optima, $\beta = {BETA:g}$; lines: $(f')^{{-1}}((r - \lambda)/\beta)$", fontsize=9)
    axes[0].legend(fontsize=7)
    axes[1].set_xlabel("mean reward of the optimum")
    axes[1].set_ylabel("entropy below the tilt's (nats)")
    axes[1].set_title(r"uniform reference, every $\beta$", fontsize=9)
    return figure


def _ratio(name: str, reward: np.ndarray) -> np.ndarray:
    """``(f')^-1((r - lambda) / beta)``: the log-ratio at which the link reaches its argument, by interpolation."""
    log_ratio = np.linspace(-8, 4, 4001)
    links = dict(zip(SMOOTH, _links(np.tile(log_ratio, (len(SMOOTH), 1))), strict=True))
    link = np.asarray(links[name])
    return np.exp(np.interp((reward - _optima()[name][1]) / BETA, link, log_ratio))


FAMILY = Family(
    name="f_divergence",
    title="Tilts under other divergences: where the normaliser stands",
    text="""
The optimum of E r - beta D_f(pi || ref) is pi = ref (f')^-1((r - lambda) / beta) with a multiplier lambda that makes it
sum to 1. The form with an outside normaliser, ref (f')^-1(r / beta) / Z, is right for reverse KL only: for other
divergences it depends on the origin of the rewards, is worth less, or is no distribution at all. f-DPO needs no
normaliser, since lambda cancels in a difference of links, and learns the right optimum.

Divergences other than reverse KL are reported to trade accuracy for diversity. At one beta that is true where beta is
small against the gaps between rewards. Where beta is large, forward KL earns more than reverse KL if the rewards are
skewed to the right under the reference (a few completions are much better) and less if they are skewed to the left. At
equal reward the tilt is the policy nearest to the reference in KL, so with a uniform reference it is the most diverse
one there is, and entropy is bought with beta, not with f; with another reference other divergences may have more.
""",
    claims=claims,
    figures={"optima": draw_optima},
    sources=(
        "Wang et al., 2023, [arXiv:2309.16240](https://arxiv.org/abs/2309.16240)",
        "Huang et al., 2024 (chi-squared + KL), [arXiv:2407.13399](https://arxiv.org/abs/2407.13399)",
        "Huang et al., 2025 (pessimism), [arXiv:2503.21878](https://arxiv.org/abs/2503.21878)",
        "Wang, Ma & Yang, 2025, ICML tutorial (the outside normaliser)",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
