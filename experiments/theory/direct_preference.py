"""Direct preference losses on small worlds: where they end, how they get there, and when they part from RLHF.

    python -m experiments.theory.direct_preference

Expected: DPO ends at the tilt for any weights of the pairs; refuted: that the likelihood of the chosen always moves
more slowly than that of the rejected; about 15 seconds on two cores.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.special import expit, softmax

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from experiments.theory.soft_best_of_n import REF, REWARD
from experiments.theory.tabular import minimiser, ordered_pairs
from tiltjax.losses.binary import kto_loss
from tiltjax.losses.preference import dpo_loss, ipo_loss, robust_dpo_loss

__all__ = ["FAMILY", "claims"]

BETA = 0.5

PAIRS = ordered_pairs(len(REF))

MAJORITY, SKEWED = 0.6, np.array([0.05, 0.95])
"""Of two completions the first is preferred by 6 of 10 annotators, and the reference hardly ever writes it."""

FEATURES = np.array([[1.0, 0.3], [2.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.5, 0.0]])
"""Of five completions of a log-linear policy: the first is chosen over the second, which has more of what both have."""


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page."""
    del fast  # Everything here takes less than a second once compiled.
    return [*_optima(), *_gradient(), *_displacement(), *_noise(), *_contradictory()]


def _labels(reward, pairs=PAIRS) -> np.ndarray:
    """Bradley-Terry probability that the first of each pair wins."""
    return expit(np.asarray(reward)[pairs[:, 0]] - np.asarray(reward)[pairs[:, 1]])


def _dpo(logp, ref_logp, beta, eps):
    return dpo_loss(logp, ref_logp, beta=beta, label_smoothing=eps)


def _ipo(logp, ref_logp, beta, eps):
    del eps
    return ipo_loss(logp, ref_logp, beta=beta, length_average=False)


def _robust(logp, ref_logp, beta, eps):
    return robust_dpo_loss(logp, ref_logp, beta=beta, label_smoothing=eps)


@functools.lru_cache
def _population(loss):
    """The loss of a policy by its logits, pairs weighing ``mass`` each; one function for every call, so one compile."""
    return lambda z, pairs, mass, ref, beta, eps: (
        mass @ loss(jax.nn.log_softmax(z)[pairs], jnp.log(ref)[pairs], beta, eps)
    )


def _argmin(loss, mass, *, ref=REF, pairs=PAIRS, beta=BETA, eps=0.0) -> np.ndarray:
    """The policy that minimises the population loss."""
    z = minimiser(_population(loss), np.log(ref), pairs, np.asarray(mass), ref, beta, eps)
    return softmax(z)


def _optima() -> list[Claim]:
    target = np.asarray(bandit.tilted(REF, REWARD, beta=BETA))
    rng = np.random.default_rng(0)
    shares = rng.random((len(REF), len(REF)))
    shares = (shares + shares.T)[PAIRS[:, 0], PAIRS[:, 1]]
    chain = (np.abs(PAIRS[:, 0] - PAIRS[:, 1]) == 1).astype(float)
    out = []
    for told, share in (("all pairs alike", np.ones(len(PAIRS))), ("pairs of random weights", shares),
                        ("neighbours only", chain)):  # fmt: skip
        found = _argmin(_dpo, share * _labels(REWARD))
        out.append(at_most(f"Over Bradley-Terry labels the minimiser of DPO is the tilt: {told}", "largest |pi - p*|",
                           np.abs(found - target).max(), 4e-8))  # fmt: skip
    # A preference that no reward explains, as IPO allows, and comparisons drawn from mu.
    preference = np.triu(rng.random((len(REF), len(REF))), 1)
    preference += np.tril(1 - preference.T, -1) + np.eye(len(REF)) / 2
    mu = rng.dirichlet(np.ones(len(REF)))
    mass = (mu[:, None] * mu * preference)[PAIRS[:, 0], PAIRS[:, 1]]
    found = _argmin(_ipo, mass)
    return [
        *out,
        at_most("The minimiser of IPO is ref exp(E_mu p(y > y') / tau) / Z for any preference, tau 0.5",
                "largest |pi - that|", np.abs(found - bandit.tilted(REF, preference @ mu, beta=BETA)).max(), 1e-8),
    ]  # fmt: skip


def _gradient() -> list[Claim]:
    slope = jax.grad(lambda logp: dpo_loss(logp, jnp.zeros(2), beta=BETA))
    value = jax.jit(lambda logp: dpo_loss(logp, jnp.zeros(2), beta=BETA))(np.zeros(2))
    ratios = np.exp(np.random.default_rng(1).normal(size=(2000, 2)))  # x = pi / ref of chosen and rejected
    by_x = jax.jit(jax.vmap(jax.grad(lambda x: dpo_loss(jnp.log(x), jnp.zeros(2), beta=BETA))))
    field = np.abs(np.asarray(by_x(ratios)))
    speed, printed = field[:, 0] / field[:, 1], ratios[:, 1] / ratios[:, 0]
    by_logp = np.asarray(jax.jit(jax.vmap(slope))(np.log(ratios)))
    pull = BETA * expit(-BETA * (np.log(ratios[:, 0]) - np.log(ratios[:, 1])))
    logits = np.random.default_rng(2).normal(size=6)
    of_logits = jax.jit(jax.grad(lambda z: dpo_loss(jax.nn.log_softmax(z)[:2], jnp.log(REF[:2]), beta=BETA)))
    by_logits = np.asarray(of_logits(logits))
    first = np.asarray(by_x(np.ones((1, 2))))[0]
    negative = ratios[:, 0] < ratios[:, 1]
    return [
        equal("At the reference the loss of DPO is log 2", "loss", value, math.log(2), atol=1e-15),
        at_most("The gradient by log pi is -beta sigma(-m) of the chosen and the opposite of the rejected",
                "largest error, 2,000 pairs", np.abs(by_logp - np.stack([-pull, pull], -1)).max(), 1e-15),
        at_most("By x1 = pi/ref of the chosen and x2 of the rejected, |dL/dx1| / |dL/dx2| = x2/x1",
                "largest relative error, 2,000 pairs", np.abs(speed / printed - 1).max(), 1e-12),
        holds("x2/x1 < 1 for any pair: the rejected falls faster than the chosen rises", "largest x2/x1, 2,000 pairs",
              speed.max(), "above 1", speed.max() > 1, verdict="refuted"),
        equal("x2/x1 is exactly 1 at the start of training", "|dL/dx1| / |dL/dx2| at the reference",
              abs(first[0] / first[1]), 1, atol=1e-15, verdict="sharpened"),
        equal("x2/x1 > 1 exactly where the implicit margin is negative", "share of 2,000 pairs in agreement",
              np.mean((speed > 1) == negative), 1, atol=0, verdict="sharpened"),
        at_most("By the logits of a table the two slopes are opposite, and all others are 0",
                "largest |dL/dz_w + dL/dz_l| and |dL/dz_other|", max(abs(by_logits[:2].sum()), *abs(by_logits[2:])),
                1e-16, verdict="sharpened"),
    ]  # fmt: skip


def _one_pair(theta, features):
    """DPO of one pair, the first two completions, under a uniform reference."""
    return dpo_loss(jax.nn.log_softmax(features @ theta)[:2], jnp.full(2, -jnp.log(5.0)), beta=BETA)


@functools.lru_cache
def _descent(tabular: bool, steps: int = 120, rate: float = 0.2) -> np.ndarray:
    """Probabilities along gradient descent on one pair, ``[steps + 1, 5]``, from the uniform reference."""
    features = jnp.eye(5) if tabular else jnp.asarray(FEATURES)

    def step(theta, _):
        return theta - rate * jax.grad(_one_pair)(theta, features), jax.nn.softmax(features @ theta)

    zero = jnp.zeros(features.shape[1])
    return np.asarray(jax.jit(lambda theta: jax.lax.scan(step, theta, length=steps + 1)[1])(zero))


def _displacement() -> list[Claim]:
    shared, table = _descent(False), _descent(True)
    mean = FEATURES.mean(0)
    first = BETA / 2 * (FEATURES[0] - FEATURES[1]) @ (FEATURES[0] - mean)

    @jax.jit
    def rate(theta):
        """Of the chosen completion's log-probability along the descent."""
        descent = -jax.grad(_one_pair)(theta, jnp.asarray(FEATURES))
        return jax.grad(lambda theta: jax.nn.log_softmax(jnp.asarray(FEATURES) @ theta)[0])(theta) @ descent

    slope = rate(np.zeros(2))
    margin = np.log(shared[:, 0] / shared[:, 1])
    return [
        holds("Displacement: with shared features the chosen completion becomes less likely while the margin grows",
              "pi(chosen) after 50 steps, from 0.2; two features, five completions", shared[50, 0], "< 0.2",
              shared[50, 0] < 0.2 and np.all(np.diff(margin) > 0)),
        equal("Displacement starts at the rate beta/2 (phi_w - phi_l) . (phi_w - E phi)", "d log pi(chosen) / dt",
              slope, first, rtol=1e-12, verdict="sharpened"),
        holds("In a table the chosen completion only gains", "pi(chosen) after 50 steps, from 0.2", table[50, 0],
              "> 0.2, rising at every step", np.all(np.diff(table[:, 0]) > 0)),
    ]  # fmt: skip


def _noise() -> list[Claim]:
    eps, clean = 0.2, _labels(REWARD)
    target = np.asarray(bandit.tilted(REF, REWARD, beta=BETA))
    flipped = (1 - eps) * clean + eps * (1 - clean)

    def slope(margin):
        return dpo_loss(jnp.stack([margin, jnp.zeros(())]), jnp.zeros(2), beta=1.0, label_smoothing=eps)

    @jax.jit
    def average_and_clean(logp):
        nothing = jnp.zeros_like(logp)
        average = (1 - eps) * _robust(logp, nothing, BETA, eps) + eps * _robust(logp[:, ::-1], nothing, BETA, eps)
        return average, dpo_loss(logp, nothing, beta=BETA)

    average, clean_loss = map(np.asarray, average_and_clean(np.random.default_rng(3).normal(size=(64, 2))))
    found = {
        "dpo": _argmin(_dpo, flipped),
        "cdpo": _argmin(_dpo, flipped, eps=eps),
        "robust": _argmin(_robust, flipped, eps=eps),
    }
    distance = {name: float(bandit.total_variation(policy, target)) for name, policy in found.items()}
    return [
        at_most("cDPO is stationary where sigma(m) = 1 - eps", "|slope| there, eps 0.2",
                abs(float(jax.jit(jax.grad(slope))(math.log((1 - eps) / eps)))), 1e-15),
        at_most("Robust DPO averaged over flips is the clean loss of DPO", "largest difference, 64 pairs, eps 0.2",
                np.abs(average - clean_loss).max(), 1e-14),
        at_most("From flipped labels robust DPO recovers the tilt of the clean ones", "TV(pi, p*)", distance["robust"],
                1e-8),
        holds("cDPO does not undo flips: on flipped labels it is further from that tilt than DPO", "TV(pi, p*)",
              distance["cdpo"], f"> {distance['dpo']:.5g} (DPO)", distance["cdpo"] > distance["dpo"],
              verdict="sharpened"),
    ]  # fmt: skip


@functools.lru_cache
def _dpo_choice(first: float, beta: float = BETA) -> float:
    """Chance of the majority's completion under DPO's optimum; ``first`` is its chance under the reference."""
    ref = np.array([first, 1 - first])
    mass = np.array([MAJORITY, 1 - MAJORITY])
    return float(_argmin(_dpo, mass, ref=ref, pairs=ordered_pairs(2), beta=beta)[0])


@jax.jit
def _kto_slopes(point, weight):
    """Slope of KTO's population loss by the logit of the majority's completion, on a grid; reference point held."""
    completion, desirable = np.array([0, 0, 1, 1]), np.array([True, False, True, False])
    share = jnp.asarray([MAJORITY, 1 - MAJORITY, 1 - MAJORITY, MAJORITY])

    def loss(logit):
        logp = jax.nn.log_softmax(jnp.stack([logit, jnp.zeros(())]))[completion]
        ref_logp = jnp.log(jnp.asarray(SKEWED))[completion]
        return share @ kto_loss(logp, ref_logp, desirable, point[None], beta=BETA, lambda_undesirable=weight)

    return jax.vmap(jax.grad(loss))(jnp.linspace(-12, 12, 241))


def _contradictory() -> list[Claim]:
    slopes = np.stack([_kto_slopes(jnp.asarray(point), 1.0) for point in (0.0, 1.0, 4.0)])
    averse = np.asarray(_kto_slopes(jnp.asarray(0.0), 2.0))
    clamped = np.abs(np.asarray(_kto_slopes(jnp.asarray(-2.0), 1.0)) - slopes[0]).max()
    odds = SKEWED[0] / SKEWED[1] * (MAJORITY / (1 - MAJORITY)) ** (1 / BETA)
    slope = jax.grad(lambda m, beta: dpo_loss(jnp.stack([m, 0 * m]), jnp.zeros(2), beta=beta))
    certain = jax.jit(jax.vmap(slope, (0, None)))
    margins = jnp.linspace(-20, 20, 81)
    steepest = max(float(jnp.max(certain(margins, beta))) for beta in (0.1, 1.0))
    tau = 0.5
    ipo = _argmin(_ipo, [1.0, 0.0], ref=np.array([0.5, 0.5]), pairs=ordered_pairs(2), beta=tau)
    return [
        equal("DPO can end with the minority where the reference is skewed: p = 0.6, ref (0.05, 0.95), beta 0.5",
              "pi(majority)", _dpo_choice(SKEWED[0]), 0.105882, atol=1e-6),
        equal("DPO weighs reference and votes: pi(a)/pi(b) = ref(a)/ref(b) (p / (1 - p))^(1/beta)", "odds",
              _dpo_choice(SKEWED[0]) / (1 - _dpo_choice(SKEWED[0])), odds, rtol=1e-7, verdict="sharpened"),
        holds("KTO with equal lambdas picks the majority for certain, whatever the reference point",
              "largest slope of the loss by its logit, reference points 0, 1, 4", slopes.max(), "< 0",
              slopes.max() < 0),
        at_most("A negative estimate of the KL counts as none: KTO's reference point is never below 0",
                "largest difference of the slopes, estimates -2 and 0", clamped, 0),
        holds("With unequal lambdas the loss of KTO need not fall there", "largest slope, lambda_U = 2 lambda_D",
              averse.max(), "> 0", averse.max() > 0, verdict="sharpened"),
        holds("With a deterministic preference DPO gives the loser no probability, whatever beta",
              "largest slope by the margin, beta 0.1 and 1", steepest, "< 0: no margin is large enough",
              steepest < 0),
        equal("With a deterministic preference IPO stops at the margin 1 / (2 tau)",
              "log-ratio gap at the optimum, tau 0.5",
              math.log(ipo[0] / ipo[1]), 1 / (2 * tau), rtol=1e-9),
    ]  # fmt: skip


def draw_paths():
    """What happens to one pair under descent, and to a divided vote at the optimum."""
    figure, axes = plt.subplots(1, 2, figsize=(6.0, 2.6))
    steps = np.arange(121)
    for colour, index, name in ((PALETTE[2], 0, "chosen"), (PALETTE[1], 1, "rejected")):
        axes[0].plot(steps, _descent(False)[:, index], "-", lw=1.6, color=colour, label=f"{name}, two features")
        axes[0].plot(steps, _descent(True)[:, index], "--", lw=1.2, color=colour, label=f"{name}, table")
    axes[0].axhline(0.2, lw=0.8, color="black")
    axes[0].set_xlabel("gradient steps on one pair")
    axes[0].set_ylabel("probability (ref: 0.2)")
    axes[0].set_title("displacement: shared features", fontsize=9)
    axes[0].set_ylim(0, 1)
    axes[0].legend(fontsize=6.5, loc="upper left")
    chance, few = np.linspace(0.005, 0.995, 100), np.array([0.05, 0.2, 0.35, 0.5, 0.7, 0.9])
    for colour, beta in zip(PALETTE, (0.2, 0.5, 2.0), strict=False):
        odds = chance / (1 - chance) * (MAJORITY / (1 - MAJORITY)) ** (1 / beta)
        axes[1].plot(chance, odds / (1 + odds), "-", lw=1, color=colour)
        axes[1].plot(few, [_dpo_choice(float(c), beta) for c in few], "o", ms=5, color=colour,
                     label=rf"DPO, $\beta = {beta:g}$")  # fmt: skip
    axes[1].axhline(1, lw=1.6, color=PALETTE[3], label="KTO, equal lambdas")
    axes[1].axhline(0.5, lw=0.8, ls=":", color="black")
    axes[1].set_xlabel("ref(majority's)")
    axes[1].set_ylabel("pi(majority's)")
    axes[1].set_title("optimum where 6 of 10 agree", fontsize=9)
    axes[1].set_ylim(-0.02, 1.05)
    axes[1].legend(fontsize=6.5, loc="lower right")
    return figure


FAMILY = Family(
    name="direct_preference",
    title="Direct preference losses: where they end and how they get there",
    text="""
DPO inverts the tilt: over Bradley-Terry labels its only minimiser is p*, however the pairs are weighed, as long as they
connect the completions. That says nothing about the way there. A published ratio of slopes, x2/x1 < 1 "for any pair",
is 1 at the start of training and above 1 wherever the implicit margin is negative; in a table the two logits move by
opposite amounts. That the chosen completion can lose probability comes from features that it shares with the rejected.

Where annotators contradict each other the losses part: DPO weighs votes against the reference, KTO goes to the majority
for certain (with equal lambdas), and where they all agree DPO forgets the reference and IPO does not.
""",
    claims=claims,
    figures={"paths": draw_paths},
    sources=(
        "Rafailov et al., 2023, [arXiv:2305.18290](https://arxiv.org/abs/2305.18290)",
        "Azar et al., 2023, [arXiv:2310.12036](https://arxiv.org/abs/2310.12036)",
        "Feng et al., 2024 (the ratio x2/x1), [arXiv:2404.04626](https://arxiv.org/abs/2404.04626)",
        "Ethayarajh et al., 2024, [arXiv:2402.01306](https://arxiv.org/abs/2402.01306)",
        "Chowdhury et al., 2024, [arXiv:2403.00409](https://arxiv.org/abs/2403.00409)",
        "Mitchell, 2023 (cDPO)",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
