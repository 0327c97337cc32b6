"""Reinforcement learning from human and from internal feedback: one optimum, and what breaks the equality.

    python -m experiments.theory.rlhf_rlif

Expected: beta_hf = L beta_if - 1 to the last digit, and the exact price of preferences that are not the reference's;
refuted: the relation at L beta_if <= 1, with a mean over tokens in place of the sequence's KL, with a frozen or
detached reward, and in the other direction of the KL; about 20 seconds on two cores.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import optimize

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from tiltjax.exact import tree
from tiltjax.losses.policy_gradient import reinforce_loss
from tiltjax.rewards.internal import self_certainty, sequence_entropy_reward

__all__ = ["FAMILY", "claims"]

V, L = 3, 3
K = V**L
BETAS = (0.6, 1.0, 3.0)


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page; all are cheap, so that ``fast`` leaves out none."""
    return [*_tilts(), *_optimum(), *_collapse(), *_variants(), *_gradients(), *_gap()]


@functools.lru_cache
def _world() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """A random reference over 27 completions of three tokens, its log-probabilities, and independent normal rewards."""
    draw = jax.jit(functools.partial(tree.random_policy, vocab_size=V, horizon=L, scale=1.5))
    levels = [np.asarray(x) for x in draw(jax.random.key(0))]
    return levels, np.asarray(jax.jit(tree.sequence_logp)(levels)), np.random.default_rng(1).normal(size=K)


@jax.jit
def _tilted(ref_logp, reward, beta):
    return bandit.tilted(jnp.exp(ref_logp), reward, beta=beta)


def _tilt(reward: np.ndarray, beta: float) -> np.ndarray:
    """The tilt of the reference, ``[K]``."""
    return np.asarray(_tilted(_world()[1], reward, beta))


@functools.lru_cache
def _random(count: int, scale: float) -> list[np.ndarray]:
    levels = tree.random_policy(jax.random.key(2), vocab_size=V, horizon=L, batch=(count,), scale=scale)
    return [np.asarray(x) for x in levels]


@jax.jit
def _objectives(policies, ref, beta):
    return jax.vmap(lambda policy: tree.rlif_objective(policy, ref, beta=beta))(policies)


@jax.jit
def _objective_of(logp, ref, beta):
    return tree.rlif_objective(tree.conditionals(logp, vocab_size=V), ref, beta=beta)


def _objective(p: np.ndarray, beta: float) -> float:
    """Of a law over completions."""
    with np.errstate(divide="ignore"):
        return float(_objective_of(np.log(p), _world()[0], beta))


@jax.jit
def _extremum(ref, beta, sign):
    """Probabilities of the policy at which Newton's method finds ``sign`` times the objective stationary and lowest."""

    def loss(logits):
        return sign * tree.rlif_objective([jax.nn.log_softmax(x) for x in logits], ref, beta=beta)

    found = tree.minimise(loss, [0.9 * x for x in ref])
    return jnp.exp(tree.sequence_logp([jax.nn.log_softmax(x) for x in found.params]))


@functools.lru_cache
def _ascended(beta: float) -> np.ndarray:
    return np.asarray(_extremum(_world()[0], beta, -1.0))


@jax.jit
def _rlif_of(ref_logp, beta):
    return jnp.exp(tree.rlif_optimum(ref_logp, beta=beta, length=L))


def _rlif(beta: float) -> np.ndarray:
    return np.asarray(_rlif_of(_world()[1], beta))


_distance, _kl = bandit.total_variation, bandit.kl


def _tv(p, q) -> float:
    return float(_distance(p, q))


@jax.jit
def _of_tilts(policies, logp, reward, beta):
    """Largest error of the Gibbs identity over policies; and soft best-of-N, N = 1024, with its constant."""
    ref, target = jnp.exp(logp), bandit.tilted(jnp.exp(logp), reward, beta=beta)
    top = beta * bandit.log_partition(ref, reward, beta=beta)

    def error(policy):
        own = tree.sequence_logp(policy)
        return tree.regularised_reward(own, logp, reward, beta=beta) - top + beta * bandit.kl(jnp.exp(own), target)

    law = bandit.soft_best_of_n_law(ref, jax.nn.log_softmax(reward), n=1024, beta=beta)
    return jnp.abs(jax.vmap(error)(policies)).max(), law, bandit.expansion(ref, reward, beta=beta).tv


@jax.jit
def _of_certainty(policies):
    """Mean certainty and entropy of each policy."""

    def each(policy):
        logp = tree.sequence_logp(policy)
        return jnp.exp(logp) @ tree.certainty(policy), -jnp.exp(logp) @ logp

    return jax.vmap(each)(policies)


def _tilts() -> list[Claim]:
    _, logp, reward = _world()
    beta = 0.7
    error, law, constant = _of_tilts(_random(200, 2.0), logp, reward, beta)
    target = _tilt(reward, beta)
    preferred = np.exp(reward) / np.exp(reward).sum()
    product = np.exp(logp) * preferred ** (1 / beta)
    return [
        at_most("E r - beta KL(p || ref) = beta log Z - beta KL(p || p*)", "largest error, 200 random policies", error,
                1e-12),
        at_most("RLHF: with human preferences pi_hp ~ exp(r), its optimum is ref pi_hp^(1/beta) / Z",
                "largest error of a probability", np.abs(product / product.sum() - target).max(), 1e-14),
        equal("Soft best-of-N by pi_hp^(1/beta_tts) tends to the optimum of RLHF with beta_hf = beta_tts",
              "N TV, N = 1024; expected its limit C1", 1024 * _tv(law, target), constant, rtol=0.02),
    ]  # fmt: skip


def _optimum() -> list[Claim]:
    logp = _world()[1]
    mean, entropy = map(np.asarray, _of_certainty(_random(200, 2.0)))
    found = max(_tv(_ascended(b), _rlif(b)) for b in BETAS)
    relation = max(_tv(_rlif(b), _tilt(logp, L * b - 1)) for b in BETAS)
    power = max(_tv(_rlif(b), _tilt(2.5 * logp, 2.5 * (L * b - 1))) for b in BETAS)
    return [
        at_most("The mean over tokens of KL(policy || uniform) is log V - H / L in expectation",
                "largest error, 200 random policies", np.abs(mean - math.log(V) + entropy / L).max(), 1e-12),
        at_most("RLIF: E u - beta_if KL has its maximum at ref^(L beta_if / (L beta_if - 1)), normalised",
                "largest TV to where Newton's method ends, beta_if .6, 1 and 3", found, 1e-9),
        at_most("RLIF is RLHF with beta_hf = L beta_if - 1 where pi_hp = pi_ref", "largest TV, beta_if .6, 1 and 3",
                relation, 1e-14),
        at_most("Equal preferences are not needed: pi_hp ~ pi_ref^k gives beta_hf = k (L beta_if - 1)",
                "largest TV, k = 2.5", power, 1e-14, verdict="sharpened"),
    ]  # fmt: skip


def _reversed(beta: float) -> np.ndarray:
    """What the formula says at ``L beta < 1``: a negative power of the reference."""
    return _tilt(-_world()[1], 1 - L * beta)


def _collapse() -> list[Claim]:
    ref, logp, _ = _world()
    beta = 0.15
    vertex = {b: _objective(_rlif(b), b) - math.log(V) - b * logp.max() for b in (beta, 0.25, 1 / 3)}
    tried = max(float((np.asarray(_objectives(_random(2000, 6.0), ref, b)) - math.log(V) - b * logp.max()).max())
                for b in vertex)  # fmt: skip
    formula, top = _objective(_reversed(beta), beta), math.log(V) + beta * logp.max()
    lowest = np.asarray(_extremum(ref, beta, 1.0))
    return [
        holds("RLIF has that power of the reference as its optimum for every beta_if",
              "E u - beta KL there, beta_if = .15",
              formula, f"< {top:.5g}, of the likeliest completion alone", formula < top - 0.1, verdict="refuted"),
        at_most("At L beta_if <= 1 the policy collapses: the supremum is log V + beta log ref(likeliest completion)",
                "largest error of the objective of rlif_optimum, beta_if .15, 1/4 and 1/3",
                max(abs(x) for x in vertex.values()), 1e-12, verdict="sharpened"),
        at_most("No policy exceeds that supremum", "largest excess, 2000 random policies, beta_if .15, 1/4 and 1/3",
                tried, 0, verdict="sharpened"),
        at_most("At L beta_if < 1 the formula's negative power of the reference is the minimum",
                "TV to where descent ends, beta_if = .15",
                _tv(lowest, _reversed(beta)), 1e-9, verdict="sharpened"),
    ]  # fmt: skip


def _refrozen(beta: float, steps: int) -> np.ndarray:
    """Optima with the utility frozen at the policy before, from the reference on, ``[steps, K]``."""
    logp = _world()[1]
    policies = [np.exp(logp)]
    for _ in range(steps):
        policies.append(_tilt(np.log(policies[-1]) / L, beta))
    return np.array(policies[1:])


def _variants() -> list[Claim]:
    logp = _world()[1]
    beta = 3.0
    averaged, relation = _ascended(beta / L), _tilt(logp, L * beta - 1)
    weak = 0.6
    frozen, interior = _refrozen(weak, 60), _tilt(logp, L * weak - 1)
    slope = np.diff(_other_direction(np.array([1e-50, 1e-100]), beta))[0] / (50 * math.log(10))
    return [
        holds("beta_hf = L beta_if - 1 holds with the KL averaged over tokens", "TV to that RLHF, beta_if = 3",
              _tv(averaged, relation), "not 0", _tv(averaged, relation) > 0.05, verdict="refuted"),
        at_most("With the KL averaged over tokens beta_hf = beta_if - 1", "TV, beta_if = 3",
                _tv(averaged, _tilt(logp, beta - 1)), 1e-9, verdict="sharpened"),
        holds("beta_hf = L beta_if - 1 holds with the utility log ref / L, frozen at the reference",
              "TV to that RLHF, beta_if = .6",
              _tv(frozen[0], interior), "not 0", _tv(frozen[0], interior) > 0.05,
              verdict="refuted"),
        at_most("With that frozen utility beta_hf = L beta_if", "TV, beta_if = .6",
                _tv(frozen[0], _tilt(logp, L * weak)), 1e-14, verdict="sharpened"),
        at_most("Freezing it again at every optimum leads to L beta_if - 1", "TV after 60 rounds, beta_if = .6",
                _tv(frozen[-1], interior), 1e-12, verdict="sharpened"),
        holds("RLIF has an optimum with KL(uniform || policy), the self-certainty of Intuitor",
              "E u - 3 KL where one first token has probability 1e-100", _other_direction(np.array([1e-100]), beta)[0],
              f"> {_objective(_rlif(beta), beta):.5g}, the largest value in the other direction",
              _other_direction(np.array([1e-100]), beta)[0] > _objective(_rlif(beta), beta) + 1, verdict="refuted"),
        equal("In that direction it grows by 1 / (L V) for every nat by which one first token becomes less likely",
              "slope in -log of its probability, 1e-50 to 1e-100", slope, 1 / (L * V), rtol=1e-9, verdict="sharpened"),
    ]  # fmt: skip


def _along(policy: Sequence) -> tuple[jax.Array, jax.Array]:
    """Next-token log-probabilities along every completion, ``[K, L, V]``, and those of its own tokens, ``[K, L]``."""
    rows = jnp.stack([jnp.repeat(x, V ** (len(policy) - t), axis=0) for t, x in enumerate(policy)], axis=1)
    own = jnp.stack([jnp.repeat(x.ravel(), V ** (len(policy) - 1 - t)) for t, x in enumerate(policy)], axis=1)
    return rows, own


@jax.jit
def _intuitor(policy, ref, beta):
    logp = tree.sequence_logp(policy)
    utility = self_certainty(_along(policy)[0], direction="uniform_to_policy")
    return tree.regularised_reward(logp, tree.sequence_logp(ref), utility, beta=beta)


def _other_direction(rare: np.ndarray, beta: float) -> np.ndarray:
    """The objective in Intuitor's direction, where the first token 0 has probability ``rare``."""
    ref = _world()[0]
    out = []
    for p in rare:
        others = ref[0][:, 1:] - np.logaddexp.reduce(ref[0][:, 1:], axis=1, keepdims=True) + np.log1p(-p)
        out.append(float(_intuitor([np.concatenate([[[np.log(p)]], others], axis=1), *ref[1:]], ref, beta)))
    return np.array(out)


def _policy_gradient(logits, utility):
    """Expected gradient of REINFORCE over the logits, completions weighed by their probabilities."""
    prob = jnp.exp(tree.sequence_logp([jax.nn.log_softmax(x) for x in logits]))

    def loss(logits):
        own = _along([jax.nn.log_softmax(x) for x in logits])[1]
        return prob @ reinforce_loss(own, utility, jnp.ones(own.shape, bool)).sum(-1)

    return [-x for x in jax.grad(loss)(logits)]


@jax.jit
def _at_the_reference(ref):
    """Gradients over logits: of E u; of REINFORCE on certainty, on logp / L, and on certainty of one token alone."""

    def mean(logits):
        policy = [jax.nn.log_softmax(x) for x in logits]
        return jnp.exp(tree.sequence_logp(policy)) @ tree.certainty(policy)

    def on_certainty(policy):
        return _policy_gradient(policy, self_certainty(_along(policy)[0], direction="policy_to_uniform"))

    by_logp = _policy_gradient(ref, sequence_entropy_reward(tree.sequence_logp(ref)) / L)
    return jax.grad(mean)(ref), on_certainty(ref), by_logp, on_certainty(ref[:1])


def _gradients() -> list[Claim]:
    right, detached, by_logp, short = _at_the_reference([jnp.asarray(x) for x in _world()[0]])
    both = [np.concatenate([np.ravel(x) for x in g]) for g in (detached, right)]
    cosine = float(both[0] @ both[1] / np.linalg.norm(both[0]) / np.linalg.norm(both[1]))
    return [
        holds("A policy gradient of the detached self-certainty ascends E u", "cosine to the gradient of E u", cosine,
              "< .9", cosine < 0.9, verdict="refuted"),
        at_most("Detached, it does not teach the last token, whose certainty does not depend on what is sampled there",
                f"largest entry for the last token ({float(np.abs(right[-1]).max()):.3g} in the gradient of E u)",
                np.abs(detached[-1]).max(), 1e-15, verdict="sharpened"),
        at_most("For completions of one token the detached gradient is 0", "largest entry, L = 1",
                np.abs(short[0]).max(), 1e-15, verdict="sharpened"),
        at_most("Detached log-probabilities over L have the gradient of E u exactly", "largest error",
                max(float(np.abs(a - b).max()) for a, b in zip(by_logp, right, strict=True)), 1e-14),
    ]  # fmt: skip


DELTAS = np.geomspace(0.01, 10, 13)
BETA_IF = 1.0
"""With L = 3, RLHF at beta_hf = 2."""


@functools.partial(jax.jit, static_argnames="beta_if")
def _gaps(logp, g, deltas, beta_if):
    """KL(RLIF || RLHF), its formula, and what RLHF loses in its objective by RLIF's policy, for each delta."""
    beta = L * beta_if - 1
    rlif_logp = tree.rlif_optimum(logp, beta=beta_if, length=L)
    rlif = jnp.exp(rlif_logp)

    def gap(delta):
        preferred = jax.nn.log_softmax(logp + delta * g)
        rlhf = bandit.tilted(jnp.exp(logp), preferred, beta=beta)
        formula = bandit.log_partition(rlif, delta * g, beta=beta) - delta / beta * (rlif @ g)
        rewards = [tree.regularised_reward(x, logp, preferred, beta=beta) for x in (jnp.log(rlhf), rlif_logp)]
        return bandit.kl(rlif, rlhf), formula, rewards[0] - rewards[1]

    return jax.vmap(gap)(deltas)


def _gap() -> list[Claim]:
    _, logp, g = _world()
    beta = L * BETA_IF - 1
    away, formula, loss = map(np.asarray, _gaps(logp, g, DELTAS, BETA_IF))
    small = float(_gaps(logp, g, np.array([1e-3]), BETA_IF)[0][0])
    rlif = _rlif(BETA_IF)
    deviation, level = g - rlif @ g, logp - rlif @ logp
    variance = float(rlif @ deviation**2)
    rest = variance - float(rlif @ (deviation * level)) ** 2 / float(rlif @ level**2)

    def nearest(delta: float) -> float:
        def distance(eta: float) -> float:
            return float(_kl(rlif, _tilt(logp + delta * g, 1 / eta)))

        return float(
            optimize.minimize_scalar(distance, bounds=(0.05, 2), method="bounded", options={"xatol": 1e-9}).fun
        )

    return [
        at_most("Open question 2: with log pi_hp = log pi_ref + delta g, KL(RLIF || RLHF) = log E exp(delta g / beta) "
                "- delta E[g] / beta, E under RLIF, beta = beta_hf", "largest error, delta from .01 to 10, beta_hf = 2",
                np.abs(away - formula).max(), 1e-12, verdict="sharpened"),
        equal("That gap is delta^2 Var_RLIF(g) / 2 beta^2 to second order", "KL / delta^2, delta = .001", small / 1e-6,
              variance / (2 * beta**2), rtol=2e-3, verdict="sharpened"),
        at_most("RLHF's objective loses exactly beta KL(RLIF || RLHF) by the policy of RLIF", "largest error",
                np.abs(loss - beta * away).max(), 1e-12, verdict="sharpened"),
        holds("Some beta_hf makes RLIF and RLHF equal whatever people prefer",
              "smallest KL(RLIF || RLHF) over beta_hf, delta = 1", nearest(1.0), "not 0", nearest(1.0) > 1e-3,
              verdict="refuted"),
        equal("The best beta_hf absorbs only the part of g linear in log pi_ref: 1 - corr_RLIF^2 of the gap is left",
              "smallest KL / delta^2 over beta_hf, delta = .01", nearest(0.01) / 1e-4, rest / (2 * beta**2), rtol=0.02,
              verdict="sharpened"),
    ]  # fmt: skip


def draw_optimum():
    """Mass of the likeliest completion against L beta, and the gap against delta."""
    figure, axes = plt.subplots(1, 2, figsize=(7.3, 3.2))
    _, logp, g = _world()
    top, strengths = int(logp.argmax()), np.geomspace(0.3, 20, 120)
    axes[0].semilogx(strengths, [_rlif(x / L)[top] for x in strengths], "-", lw=1, color=PALETTE[0],
                     label=r"$ref^{L\beta / (L\beta - 1)}$")  # fmt: skip
    tried = np.array([1.15, 1.4, 1.8, 3, 5, 9, 16])
    axes[0].semilogx(tried, [_ascended(float(x) / L)[top] for x in tried], "o", ms=5, color=PALETTE[0],
                     label="RLIF, by ascent")  # fmt: skip
    axes[0].semilogx(tried, [_tilt(logp, x - 1)[top] for x in tried], "s", ms=8, mfc="none", color=PALETTE[1],
                     label=r"RLHF at $L\beta - 1$")  # fmt: skip
    axes[0].axhline(np.exp(logp[top]), lw=0.8, ls=":", color="grey")
    axes[0].set_ylim(0, 1.05)
    axes[0].set_xlabel(r"$L\,\beta_{if}$")
    axes[0].set_ylabel("mass of the likeliest completion")
    axes[0].set_title("dotted: the reference; collapse at 1", fontsize=10)
    axes[0].legend(fontsize=8)
    for colour, marker, beta_if in zip(PALETTE, "os^", BETAS, strict=False):
        away, formula, _ = map(np.asarray, _gaps(logp, g, DELTAS, beta_if))
        beta, rlif = L * beta_if - 1, _rlif(beta_if)
        variance = rlif @ (g - rlif @ g) ** 2
        axes[1].loglog(DELTAS, away, marker, ms=4, color=colour, label=rf"$\beta_{{hf}}$ = {beta:g}")
        axes[1].loglog(DELTAS, formula, "-", lw=1, color=colour)
        axes[1].loglog(DELTAS, DELTAS**2 * variance / (2 * beta**2), "--", lw=0.8, color=colour)
    axes[1].set_xlabel(r"$\delta$ in $\log \pi_{hp} = \log \pi_{ref} + \delta g$ (nats)")
    axes[1].set_ylabel("KL(RLIF || RLHF), nats")
    axes[1].set_title("solid: exact; dashed: second order", fontsize=10)
    axes[1].legend(fontsize=8)
    return figure


FAMILY = Family(
    name="rlhf_rlif",
    title="RLIF is RLHF at beta_hf = L beta_if - 1, under conditions",
    text="""
RLHF maximises E[r] - beta_hf KL(policy || ref), with human preferences pi_hp ~ exp(r). RLIF maximises the policy's own
certainty, the mean over L tokens of KL(policy || uniform), less beta_if KL(policy || ref). On a tree of 27 completions
both optima are known to all digits. They are equal at beta_hf = L beta_if - 1 where pi_hp is pi_ref, the length is
fixed, the KL is that of whole completions, L beta_if > 1, and the gradient flows through the certainty; every row that
is refuted drops one of these conditions.

The second open question of the anthology is what remains when people do not prefer as the reference writes. With
log pi_hp = log pi_ref + delta g the answer is exact: one log-partition function of g under RLIF's optimum, which is its
variance to second order. RLHF's objective loses beta_hf times that.
""",
    claims=claims,
    figures={"optimum": draw_optimum},
    sources=(
        "Jiao, Chen & Li, 2025, [arXiv:2509.04372](https://arxiv.org/abs/2509.04372)",
        "Zhao et al., 2025 (Intuitor), [arXiv:2505.19590](https://arxiv.org/abs/2505.19590)",
        "Agarwal et al., 2025, [arXiv:2505.15134](https://arxiv.org/abs/2505.15134)",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
