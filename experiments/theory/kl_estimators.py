"""The estimators k1, k2 and k3 of a KL divergence: their values, their gradients as losses, and their noise.

    python -m experiments.theory.kl_estimators

Expected: k3 has the value of the reverse KL and the gradient of the forward KL, so GRPO with it does not end at the
tilt; its noise is below that of k1 if and only if chi2(ref || pi) < 2 (KL + reverse KL); about 10 seconds on two cores.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from experiments.theory.soft_best_of_n import REF, REWARD
from tiltjax.advantages import reward_to_go, token_reward
from tiltjax.exact import tree
from tiltjax.losses.penalties import full_vocabulary_kl, kl_k1, kl_k2, kl_k3, kl_k3_corrected
from tiltjax.losses.policy_gradient import reinforce_loss
from tiltjax.tilt.f_divergence import f_divergence_tilt

__all__ = ["FAMILY", "claims"]

PENALTIES: dict[str, Callable] = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}

LOGITS, OLD = np.log(REF[::-1]), np.zeros(len(REF))
"""Logits of a policy that has turned the reference `REF` around, and of the uniform one that draws off-policy."""

MOVES = np.geomspace(1 / 256, 12, 60)
"""How far the policy ref e^(t g) / Z goes, with g the standard bandit's reward less its mean."""

BETA, BETAS = 0.2, (0.05, 0.07, 0.1, 0.14, 0.2, 0.3, 0.5, 0.8, 1.3, 2.0)
"""Strength of the KL term that the claims are about, and those of the figure."""


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page; all of it is enumeration."""
    return [*_values(), *_gradients(), *_optimum(), *_noise(), *_completions()]


def _kl(logits: Any, ref: Any) -> Any:
    """Of two policies given by logits."""
    return bandit.kl(jax.nn.softmax(logits), jax.nn.softmax(ref))


@functools.lru_cache
def _table() -> dict[str, dict[str, np.ndarray]]:
    """Expected values and expected gradients as losses, by enumeration of the sample, on-policy and off-policy."""
    ref = jnp.log(REF)

    def expected(sampler, penalty):
        # The law of the sample is held fixed: a loss differentiates the penalty only.
        law = jax.lax.stop_gradient(jax.nn.softmax(sampler))
        return lambda z: jnp.sum(law * penalty(jax.nn.log_softmax(z), ref))

    @jax.jit
    def everything(z, old):
        out = {}
        for name, sampler in (("on", z), ("off", old)):
            old_logp = jax.lax.stop_gradient(jax.nn.log_softmax(sampler))
            corrected = functools.partial(lambda old_logp, logp, ref: kl_k3_corrected(logp, ref, old_logp), old_logp)
            penalties = PENALTIES | {"k3 corrected": corrected}
            for k, penalty in penalties.items():
                value, gradient = jax.value_and_grad(expected(sampler, penalty))(z)
                out[f"{k}, {name}"] = {"value": value, "gradient": gradient}
        exact: dict[str, Callable] = {
            "full": lambda z: full_vocabulary_kl(z, ref),
            "reverse": lambda z: _kl(z, ref),
            "forward": lambda z: _kl(ref, z),
        }
        for k, f in exact.items():
            value, gradient = jax.value_and_grad(f)(z)
            out[k] = {"value": value, "gradient": gradient}
        return out

    return jax.tree.map(np.asarray, everything(jnp.asarray(LOGITS), jnp.asarray(OLD)))


def _values() -> list[Claim]:
    t = _table()
    kl = t["reverse"]["value"]
    return [
        at_most("k1 and k3 are unbiased on samples of the policy", "largest error, nats",
                max(abs(t[k]["value"] - kl) for k in ("k1, on", "k3, on")), 1e-14),
        holds("k3 is unbiased on samples of another policy", "E_old k3, nats", t["k3, off"]["value"], f"{kl:.5g}",
              abs(t["k3, off"]["value"] / kl - 1) > 0.05, verdict="refuted"),
        equal("Times the importance ratio it is, on samples of any policy", "E_old k3 corrected, nats",
              t["k3 corrected, off"]["value"], kl, atol=1e-14),
        holds("k2 is not the KL, though near it where the policy is near the reference", "E k2, nats",
              t["k2, on"]["value"], f"not {kl:.5g}", abs(t["k2, on"]["value"] / kl - 1) > 0.02),
    ]  # fmt: skip


def _gradients() -> list[Claim]:
    t = {k: v["gradient"] for k, v in _table().items()}
    reverse, forward = t["reverse"], t["forward"]

    def off(name, exact):
        return np.abs(t[name] - exact).max()

    cosine = t["k3, on"] @ reverse / np.linalg.norm(t["k3, on"]) / np.linalg.norm(reverse)
    return [
        at_most("k1 as a loss does nothing: its expected gradient is 0", "largest entry of the gradient",
                off("k1, on", 0), 1e-14),
        at_most("k2 as a loss has the gradient of KL(pi || ref)", "largest error", off("k2, on", reverse), 1e-14),
        holds("k3 as a loss, as in GRPO, has the gradient of the divergence whose value it is, KL(pi || ref)",
              "cosine of the two", cosine, "1", cosine < 0.98, verdict="refuted"),
        at_most("It has that of the forward KL(ref || pi)", "largest error", off("k3, on", forward), 1e-14),
        at_most("Times the importance ratio, differentiated too, it has that of KL(pi || ref), off-policy as well",
                "largest error, on-policy and off-policy",
                max(off("k3 corrected, on", reverse), off("k3 corrected, off", reverse)), 1e-14),
        at_most("The KL summed over the vocabulary has it without samples", "largest error",
                off("full", reverse), 1e-14),
    ]  # fmt: skip


@functools.lru_cache
def _ends() -> dict[str, np.ndarray]:
    """Where the policy gradient of the reward with a penalty in the loss ends up, ``[len(BETAS), 6]`` each.

    Natural gradient steps on logits, every expectation over the sample by enumeration.
    """
    ref, reward = jnp.log(REF), jnp.asarray(REWARD)

    def run(penalty, beta):
        def loss(z, law):
            logp = jax.nn.log_softmax(z)
            return law @ (
                reinforce_loss(logp[:, None], reward, jnp.full((6, 1), True))[:, 0] + beta * penalty(logp, ref)
            )

        def step(z, _):
            policy = jax.nn.softmax(z)
            return z - 0.5 * jax.grad(loss)(z, policy) / policy, None

        return jax.nn.softmax(jax.lax.scan(step, ref, length=10_000)[0])

    @jax.jit
    def everything(betas):
        return {k: jax.vmap(functools.partial(run, PENALTIES[k]))(betas) for k in ("k2", "k3")}

    return {k: np.asarray(v) for k, v in everything(jnp.asarray(BETAS)).items()}


def _tilts(beta: Any) -> tuple[np.ndarray, np.ndarray]:
    """The tilts of the reference by the reward under reverse and forward KL, ``[len(beta), 6]`` each."""
    reward, ref = np.broadcast_to(REWARD, (len(beta), 6)), np.broadcast_to(REF, (len(beta), 6))

    @jax.jit
    def both(reward, ref, beta):
        forward = f_divergence_tilt(reward, ref, beta=beta, divergence="forward_kl")
        return bandit.tilted(ref, reward, beta=beta), forward.weights

    tilt, forward = both(reward, ref, jnp.asarray(beta))
    return np.asarray(tilt), np.asarray(forward)


def _optimum() -> list[Claim]:
    ends = _ends()
    tilts, forwards = _tilts(BETAS)
    at = BETAS.index(BETA)
    gap = bandit.total_variation(ends["k3"][at], tilts[at])
    small = 1e-4
    missed = 1 - _tilts([small])[1][0, -1]
    return [
        at_most("With k2 in the loss the policy gradient ends at the tilt", f"largest |pi - p*|, beta {BETA:g}",
                np.abs(ends["k2"] - tilts)[at].max(), 1e-12),
        holds("With k3 in the loss, as in GRPO, it ends at the tilt", f"TV(pi, p*), beta {BETA:g}", gap, "0",
              gap > 0.05, verdict="refuted"),
        at_most("With k3 it ends at ref beta / (lambda - r), the optimum under forward KL",
                f"largest |pi - that|, beta {BETA:g}",
                np.abs(ends["k3"] - forwards)[at].max(), 1e-12),
        equal("So as beta falls it gives up what is not best in proportion to beta, where the tilt does exponentially",
              "(1 - pi(best)) / (beta E[1 / (r_max - r)] over the others), beta 1e-4",
              missed / (small * np.sum(REF[:-1] / (1 - REWARD[:-1]))), 1, atol=0.01, verdict="sharpened"),
    ]  # fmt: skip


@functools.lru_cache
def _moved() -> dict[str, np.ndarray]:
    """Of policies that move away from the reference: both KLs, chi2(ref || pi), and the variance of each estimator."""
    gain = jnp.asarray(REWARD - REF @ REWARD)

    @jax.jit
    @jax.vmap
    def everything(t):
        policy = bandit.tilted(jnp.asarray(REF), t * gain, beta=1.0)
        logp, ref = jnp.log(policy), jnp.log(REF)
        out = {k: f(logp, ref) for k, f in PENALTIES.items()}
        out = {k: policy @ jnp.square(x - policy @ x) for k, x in out.items()}
        kls = {"reverse": bandit.kl(policy, jnp.asarray(REF)), "forward": bandit.kl(jnp.asarray(REF), policy)}
        return out | kls | {"chi2": bandit.chi_squared(policy, -t * gain, beta=1.0)}

    return {k: np.asarray(v) for k, v in everything(jnp.asarray(MOVES)).items()}


def _noise() -> list[Claim]:
    m = _moved()
    excess, formula = m["k3"] - m["k1"], m["chi2"] - 2 * (m["reverse"] + m["forward"])
    slope = {k: np.polyfit(np.log(m["reverse"][:10]), np.log(m[k][:10]), 1)[0] for k in ("k1", "k3")}
    ref, logits = jnp.log(REF), jnp.asarray(LOGITS)

    @jax.jit
    def per_sample(z):  # One row for each completion that could be drawn.
        logp, mask = jax.lax.stop_gradient(jax.nn.log_softmax(z)), jnp.full((6, 1), True)
        losses: tuple[Callable, ...] = (
            lambda x: reinforce_loss(x[:, None], -kl_k1(logp, ref), mask)[:, 0],
            lambda x: kl_k2(x, ref),
            lambda x: kl_k3_corrected(x, ref, logp),
            lambda x: kl_k1(x, ref),
        )
        return jax.nn.softmax(z), [jax.jacrev(lambda z, f=f: f(jax.nn.log_softmax(z)))(z) for f in losses]

    policy, (in_reward, as_k2, corrected, score) = jax.tree.map(np.asarray, per_sample(logits))
    return [
        equal("Near the reference k3 has the smaller variance: of the order of KL^2", "slope of log Var k3 by log KL",
              slope["k3"], 2, atol=0.02),
        equal("Where that of k1 is of the order of KL", "slope of log Var k1 by log KL", slope["k1"], 1, atol=0.02),
        holds("k3 has the smaller variance wherever the policy is",
              f"Var k3 / Var k1 at KL = {m['reverse'][-1]:.2f} nats",
              m["k3"][-1] / m["k1"][-1], "< 1", m["k3"][-1] > m["k1"][-1], verdict="refuted"),
        at_most("Var k3 - Var k1 = chi2(ref || pi) - 2 (KL(pi || ref) + KL(ref || pi)): that decides which is larger",
                f"largest error over Var k1, {len(MOVES)} policies", np.abs((excess - formula) / m["k1"]).max(), 1e-9,
                verdict="sharpened"),
        at_most("On-policy the gradients of k2, of corrected k3 and of k1 in the reward agree sample by sample",
                "largest difference", max(np.abs(as_k2 - in_reward).max(), np.abs(corrected - in_reward).max()), 1e-14,
                verdict="sharpened"),
        equal("k1 as a loss is pure noise: that of the score, 1 - sum pi^2", "trace of the covariance of its gradient",
              np.sum(policy[:, None] * score**2), 1 - np.sum(policy**2), atol=1e-14),
    ]  # fmt: skip


def _completions() -> list[Claim]:
    """Completions of three tokens out of three: which sums over tokens are the KL of whole completions."""
    V, H = 3, 3
    token = np.asarray(tree.completions(vocab_size=V, horizon=H))
    prefix = [np.arange(V**H) // V ** (H - t) for t in range(H)]
    draw = jax.jit(functools.partial(tree.random_policy, vocab_size=V, horizon=H))
    policy, ref = (draw(jax.random.key(k)) for k in (0, 1))
    policy, ref = ([jnp.asarray(level, float) for level in x] for x in (policy, ref))
    mask = jnp.full((V**H, H), True)

    def levels(x):
        return [jax.nn.log_softmax(level) for level in x]

    def tokens(x):
        return jnp.stack(
            [level[i, token[:, t]] for t, (level, i) in enumerate(zip(levels(x), prefix, strict=True))], -1
        )

    law = jax.jit(lambda x: jnp.exp(tree.sequence_logp(levels(x))))(policy)
    ref_logp, fixed = map(jax.jit(tokens), (ref, policy))
    togo = reward_to_go(token_reward(jnp.zeros(V**H), kl_k1(fixed, ref_logp, mask), mask, beta=1.0), mask)
    losses = {
        "exact": lambda x: bandit.kl(jnp.exp(tree.sequence_logp(levels(x))), jnp.exp(tree.sequence_logp(levels(ref)))),
        "reward": lambda x: law @ reinforce_loss(tokens(x), togo, mask).sum(-1),
        "tokens": lambda x: law @ kl_k2(tokens(x), ref_logp, mask).sum(-1),
        "whole": lambda x: law @ kl_k2(tokens(x).sum(-1), ref_logp.sum(-1)),
        "full": lambda x: law @ sum(full_vocabulary_kl(a, b)[i] for a, b, i in zip(x, ref, prefix, strict=True)),
    }

    @jax.jit
    def everything(x):
        found = {k: jax.value_and_grad(f)(x) for k, f in losses.items()}
        return {k: (v, jnp.concatenate([level.ravel() for level in g])) for k, (v, g) in found.items()}

    found = {k: (float(v), np.asarray(g)) for k, (v, g) in everything(policy).items()}
    exact = found["exact"][1]
    turned = found["tokens"][1] @ exact / np.linalg.norm(found["tokens"][1]) / np.linalg.norm(exact)
    return [
        equal("Whole completions: the next-token KLs at prefixes of the policy add up to KL(pi || ref)",
              "27 completions of three tokens, nats", found["full"][0], found["exact"][0], atol=1e-14),
        at_most("k1 in the reward of every token, with the reward to go, has its gradient", "largest error",
                np.abs(found["reward"][1] - exact).max(), 1e-14),
        holds("So has k2, or the full KL, of every token as a loss", "cosine of the two", turned, "1", turned < 0.999,
              verdict="refuted"),
        at_most("Both have that of the next-token KLs with the prefixes held fixed", "largest difference of the two",
                np.abs(found["tokens"][1] - found["full"][1]).max(), 1e-14, verdict="sharpened"),
        at_most("k2 of the log-ratio of the whole completion has the gradient of KL(pi || ref)", "largest error",
                np.abs(found["whole"][1] - exact).max(), 1e-14),
    ]  # fmt: skip


def draw_noise():
    """Standard deviation of the estimators against the divergence."""
    m = {k: v[MOVES > 0.04] for k, v in _moved().items()}
    figure, ax = plt.subplots(figsize=(5.6, 3.9))
    kl = m["reverse"]
    for colour, k in zip(PALETTE, PENALTIES, strict=False):
        ax.loglog(kl, np.sqrt(m[k]) / kl, "o", ms=3, color=colour, label=k)
    predicted = m["k1"] + m["chi2"] - 2 * (m["reverse"] + m["forward"])
    ax.loglog(
        kl, np.sqrt(2 / kl), "--", lw=1, color=PALETTE[0], label=r"k1 near the reference: $\sqrt{2 / \mathrm{KL}}$"
    )
    ax.loglog(kl, np.sqrt(predicted) / kl, "-", lw=1, color=PALETTE[2], label=r"k3 from k1 and $\chi^2$")
    ax.set_xlabel("KL(policy || reference), nats")
    ax.set_ylabel("standard deviation of one sample / KL")
    ax.legend(fontsize=8)
    return figure


def draw_ends():
    """What the policy gradient gives up of the best reward, with k2 and with k3 in the loss."""
    figure, ax = plt.subplots(figsize=(5.6, 3.9))
    fine = np.geomspace(min(BETAS), max(BETAS), 80)
    names = ("k2 in the loss; line: the tilt", r"k3 in the loss; line: ref $\beta / (\lambda - r)$")
    for colour, label, k, theory in zip(PALETTE, names, ("k2", "k3"), _tilts(fine), strict=False):
        ax.loglog(fine, 1 - theory @ REWARD, "-", lw=1, color=colour)
        ax.loglog(BETAS, 1 - _ends()[k] @ REWARD, "o", ms=5, color=colour, label=label)
    ax.axhline(1 - REF @ REWARD, ls="--", lw=1, color="black", label="reference")
    ax.set_xlabel(r"$\beta$, reward units")
    ax.set_ylabel("best reward less mean reward")
    ax.legend(fontsize=8, loc="lower right")
    return figure


FAMILY = Family(
    name="kl_estimators",
    title="k3 has the value of one KL and the gradient of the other",
    text="""
Regularised policy gradients estimate KL(pi || ref) from the log-ratio of one sample: k1 = log(pi/ref), k2 = k1^2 / 2,
k3 = ref/pi - 1 - log(ref/pi). Which of them is unbiased is well known. What a loss uses is their gradient, with the
sample held fixed, and there the answers change: k1 does nothing, k2 is right, k3 is right about the other divergence,
and the policy that it regularises ends somewhere else than at the tilt. Every expectation is an enumeration.
""",
    claims=claims,
    figures={"noise": draw_noise, "ends": draw_ends},
    sources=(
        "Schulman, 2020 (Approximating KL divergence)",
        "Shao et al., 2024 (GRPO), [arXiv:2402.03300](https://arxiv.org/abs/2402.03300)",
        "Liu et al., 2025, [arXiv:2510.01555](https://arxiv.org/abs/2510.01555)",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
