"""When reinforcement learning on a fitted reward is maximum likelihood: the theorems of "All Roads Lead to Likelihood".

    python -m experiments.theory.all_roads

Expected: each theorem holds to rounding under its premises; refuted: premises and equations that forget the constant of
each prompt, and the objective said to be common to both roads; about 20 seconds on two cores.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import optimize, special

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from tiltjax.exact import tree
from tiltjax.losses.game import spin_loss
from tiltjax.losses.mle import sft_loss
from tiltjax.losses.preference import local_reward_loss
from tiltjax.losses.reward_model import bradley_terry_loss

__all__ = ["FAMILY", "claims"]

V, H, PROMPTS, PAIRS = 3, 3, 2, 4000
K = V**H
"""Completions of three tokens of three, two prompts, and how many labelled pairs of each."""

BETA = 0.3


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page."""
    return [*_lemmas(), *_likelihood(), *_existence(fast), *_self_play(), *_simple(fast)]


_tilted, _total_variation = bandit.tilted, bandit.total_variation
_sequence_logp, _expected_wins = jax.jit(tree.sequence_logp), jax.jit(tree.expected_wins)


def _levels(rng: np.random.Generator, scale: float, *batch: int) -> list[Any]:
    """A token policy of softmaxes of normal logits."""
    return [special.log_softmax(scale * rng.normal(size=(*batch, V**t, V)), -1) for t in range(H)]


@functools.lru_cache
def _world() -> dict[str, Any]:
    """References and rewards of both prompts, and the labels of sampled pairs, which are noisy."""
    rng = np.random.default_rng(0)
    ref, sampler = _levels(rng, 0.5, PROMPTS), _levels(rng, 0.3, PROMPTS)
    reward = rng.normal(size=(PROMPTS, K)) * np.array([[1.0], [1.6]])
    chances = np.asarray(_expected_wins(reward, np.exp(_sequence_logp(sampler))))
    wins = [rng.multinomial(PAIRS, p.ravel() / p.sum()).reshape(K, K).astype(float) for p in chances]
    ref_logp = _sequence_logp(ref)
    return {"ref": ref, "ref_logp": np.asarray(ref_logp), "reward": reward, "wins": np.stack(wins)}


def _uniform() -> list[Any]:
    return [np.full((V**t, V), -np.log(V)) for t in range(H)]


@jax.jit
def _nearest(target_logp):
    """The reverse-KL projection on memoryless policies, ``[K]`` log-probabilities."""
    return tree.memoryless_projection(target_logp, vocab_size=V, direction="reverse").logp


def _lemmas() -> list[Claim]:
    w = _world()
    ref_logp, reward = w["ref_logp"][0], w["reward"][0]
    uniform = np.full(K, -np.log(K))

    @jax.jit
    def identities(policies):
        """``J + beta KL(pi || p*) - beta log Z`` of random policies, with entropy and with a reference."""
        logp = tree.sequence_logp(policies)

        def wide(x):
            return jnp.broadcast_to(x, logp.shape)

        def of(base, beta):
            target = bandit.tilted(jnp.exp(base), reward, beta=beta)
            gain = tree.regularised_reward(logp, wide(base), wide(reward), beta=beta)
            distance = bandit.kl(jnp.exp(logp), wide(target))
            return jnp.max(jnp.abs(gain + beta * (distance - bandit.log_partition(jnp.exp(base), reward, beta=beta))))

        return of(uniform, 1.0), of(ref_logp, BETA)

    entropy, relative = identities(_levels(np.random.default_rng(1), 2.0, 64))

    @jax.jit
    def best_memoryless(starts):
        """The best memoryless policy by what soft reinforcement learning maximises."""

        def policy(logits):
            return tree.sequence_logp(tree.memoryless(jax.nn.log_softmax(logits)))

        def loss(logits):
            return -tree.regularised_reward(policy(logits), uniform, reward, beta=1.0)

        ends = jax.vmap(lambda start: tree.minimise(loss, start))(starts)
        return policy(ends.params[jnp.argmin(ends.value)])

    target = jax.nn.log_softmax(reward)
    best = jnp.exp(best_memoryless(2 * np.random.default_rng(2).normal(size=(24, H, V))))
    reverse = jnp.exp(_nearest(target))
    table = tree.memoryless_marginals(target, vocab_size=V)
    forward = jnp.exp(_sequence_logp(tree.memoryless(table)))
    soft = jax.jit(lambda: tree.tilted_policy(_uniform(), tree.soft_values(_uniform(), reward, beta=1.0), beta=1.0))()
    # Eq. 12, by enumeration: the completions of a prefix lie next to each other.
    q = [special.logsumexp(np.asarray(reward).reshape(V**t, V, -1), axis=-1) for t in range(H)]
    error = max(np.abs(special.log_softmax(x, -1) - np.asarray(level)).max() for x, level in zip(q, soft, strict=True))
    whole = np.exp(_sequence_logp(soft))
    return [
        at_most("Lemma 2.1: E r + H(pi) is log Z - KL(pi || p*), whatever the policy", "largest error, 64 random "
                "policies", entropy, 1e-12),
        at_most("Lemma A.1: the same with a reference and a beta", "largest error of E r - beta KL, beta 0.3", relative,
                1e-12),
        at_most("Lemma 2.1: within memoryless policies soft RL ends in the reverse-KL projection of the tilt",
                "TV(best of 24 searches, projection)", _total_variation(best, reverse), 1e-8),
        holds("In that class maximum likelihood of samples of the tilt ends elsewhere, in the forward-KL projection",
              "TV(forward, reverse)", _total_variation(forward, reverse), "> 0.01",
              _total_variation(forward, reverse) > 0.01),
        at_most("Eq. 12: the softmax of soft Q-values, token by token, is the tilt", "largest error of a "
                "log-probability", max(error, np.abs(whole - special.softmax(reward)).max()), 1e-13),
    ]  # fmt: skip


@functools.lru_cache
def _fits() -> dict[str, Any]:
    """Rewards and policies of maximum likelihood, ``[PROMPTS, K]``; a uniform reference is none."""
    w = _world()
    none = [np.broadcast_to(level, (PROMPTS, *level.shape)) for level in _uniform()]
    refs = [np.stack([first, second, second]) for first, second in zip(none, w["ref"], strict=True)]
    betas = jnp.array([1.0, 1.0, BETA])

    @jax.jit
    def fit(wins):
        reward = tree.fit_reward(wins)
        policies = jax.vmap(lambda ref, beta: tree.fit_dpo(wins, ref, beta=beta))(refs, betas)
        return reward.params, jax.vmap(tree.sequence_logp)(policies.params), reward.value, policies.value

    reward, (mle, *dpo), *nll = (np.asarray(x) for x in fit(w["wins"]))
    return {"reward": reward, "mle": mle, "dpo": dpo, "nll": nll}


@jax.jit
def _common_objective(wins):
    """The minimiser of pair likelihood less entropy, ``[K]``: Eq. 3 read for pairs."""

    def objective(logits):
        logp = jax.nn.log_softmax(logits)
        return tree.mean_pair_loss(wins, functools.partial(local_reward_loss, beta=1.0), logp) + jnp.sum(
            jnp.exp(logp) * logp
        )

    return jax.nn.softmax(tree.minimise(objective, jnp.zeros(K)).params)


def _likelihood() -> list[Claim]:
    w, f = _world(), _fits()
    reward, mle, (dpo, dpo_beta), ref_logp = f["reward"], f["mle"], f["dpo"], np.asarray(w["ref_logp"])
    norm = special.logsumexp(reward, axis=-1, keepdims=True)
    shift = -special.logsumexp(mle + ref_logp, axis=-1, keepdims=True)
    spread = dpo - mle - ref_logp
    printed = reward - (dpo - ref_logp)
    log_z = special.logsumexp(ref_logp + reward, axis=-1, keepdims=True)
    eq3 = np.asarray(_common_objective(w["wins"][0]))
    own = float(_total_variation(eq3, np.exp(mle[0])))
    rlhf = [_tilted(np.exp(ref_logp), reward, beta=beta) for beta in (1.0, BETA)]
    return [
        holds("Eq. 3: RLHF and offline likelihood both minimise D_KL(P_D || P_pi) - H(pi), read as the likelihood of "
              "pairs less the entropy", "TV(its minimiser, the policy of maximum likelihood)", own, "not 0",
              own > 0.05, verdict="refuted"),
        at_most("Theorem 2.2: both maximise the likelihood of the labels alone, so RLHF with entropy is the policy "
                "of maximum likelihood", f"largest |pi_rlhf - pi_mle|, {PAIRS} pairs a prompt",
                np.abs(special.softmax(reward, -1) - np.exp(mle)).max(), 1e-9),
        equal("Theorem 2.2: rewards and policies have one likelihood", "negative log-likelihood, nats, two prompts",
              f["nll"][1][0], f["nll"][0], rtol=1e-12),
        holds("The premise of Theorem 2.2, R = R(Pi), can hold as it stands: a policy's reward has log sum exp r = 0",
              "log sum exp of the fitted reward of mean 0", norm[0, 0], "not 0", (np.abs(norm) > 1).all(),
              verdict="refuted"),
        at_most("Rewards and log-probabilities of policies are equal up to a constant of each prompt, which suffices",
                "spread of r - log pi_mle over completions, nats", np.ptp(reward - mle, axis=-1).max(), 1e-8,
                verdict="sharpened"),
        at_most("Theorem 2.3: DPO is RLHF with a reference, for any beta", "largest |pi_rlhf - pi_dpo|, beta 1 and 0.3",
                max(np.abs(rlhf[0] - np.exp(dpo)).max(), np.abs(rlhf[1] - np.exp(dpo_beta)).max()), 1e-8),
        holds("Eq. 36: log pi_dpo = log pi_mle + log pi_ref", "log pi_dpo - log pi_mle - log pi_ref, prompt 1",
              spread[0, 0], "not 0", (np.abs(spread) > 1).all(), verdict="refuted"),
        at_most("Eq. 36 lacks the constant -log sum pi_mle pi_ref of each prompt, which cancels in pairs",
                "largest error with the constant, nats", np.abs(spread - shift).max(), 1e-8, verdict="sharpened"),
        holds("Eq. 37: r_mle = log pi_dpo - log pi_ref", "r_mle - log pi_dpo + log pi_ref, prompt 1, r_mle of mean 0",
              printed[0, 0], "not 0", (np.abs(printed) > 0.1).all(), verdict="refuted"),
        at_most("Eq. 37 lacks log Z = log E_ref exp r_mle", "largest error with the constant, nats",
                np.abs(printed - log_z).max(), 1e-8, verdict="sharpened"),
    ]  # fmt: skip


def _noiseless() -> Any:
    reward = np.asarray(_world()["reward"][0])
    return (reward[:, None] > reward[None]).astype(float)


@functools.lru_cache
def _rays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Likelihood of multiples of a reward: on noiseless labels of it, and of the fit on noisy ones."""
    scale = np.geomspace(0.05, 60, 41)
    fitted = jnp.asarray(_fits()["reward"][0])

    def along(wins, reward):
        return jax.vmap(lambda t: tree.mean_pair_loss(wins, bradley_terry_loss, t * reward))(jnp.asarray(scale))

    w = _world()
    clean, noisy = jax.jit(along)(_noiseless(), w["reward"][0]), jax.jit(along)(w["wins"][0], fitted)
    return scale, np.asarray(clean), np.asarray(noisy)


def _existence(fast: bool) -> list[Claim]:
    sets, arms, pairs = (32 if fast else 128), 6, 24

    @jax.jit
    @jax.vmap
    def try_fit(wins):
        found = tree.minimise(lambda x: tree.mean_pair_loss(wins, bradley_terry_loss, x), jnp.zeros(arms), max_steps=80)
        return tree.strongly_connected(wins), jnp.ptp(found.params)

    chances = np.asarray(_expected_wins(np.linspace(-1, 1, arms), np.full(arms, 1 / arms)))
    drawn = np.random.default_rng(1).multinomial(pairs, chances.ravel() / chances.sum(), sets)
    connected, width = map(np.asarray, try_fit(drawn.reshape(sets, arms, arms).astype(float)))
    far = width > 25  # Newton's method adds about one to a margin that has no limit, until rounding stops it.
    scale, clean, _ = _rays()
    return [
        holds("Theorems 2.2 and 2.3 hold whatever the coverage and the number of the pairs",
              "negative log-likelihood of 60 r* on noiseless labels, nats: it has no minimum", clean[-1],
              f"less than at every smaller multiple ({clean[np.argmin(abs(scale - 1))]:.3f} at r*)",
              (np.diff(clean) < 0).all() and not bool(jax.jit(tree.strongly_connected)(_noiseless())),
              verdict="refuted"),
        equal("A fit exists where each completion beat each other one through a chain of wins (Ford, 1957): "
              f"{sets} sets of {pairs} pairs of {arms} completions, {int(far.sum())} of them without",
              "sets where chain and bounded fit disagree", int((connected == far).sum()), 0, verdict="sharpened"),
    ]  # fmt: skip


@functools.lru_cache
def _gradients() -> dict[str, np.ndarray]:
    """Expected gradients of SFT and SPIN at one policy, against opponents ever further from it."""
    rng = np.random.default_rng(5)
    policy, other, levels = (_levels(rng, 0.7) for _ in range(3))
    data = np.exp(_sequence_logp(levels))
    steps = jnp.linspace(0, 1, 11)

    def sequence(logits) -> Any:
        return tree.sequence_logp([jax.nn.log_softmax(level) for level in logits])

    def flat(tangent):
        return jax.flatten_util.ravel_pytree(tangent)[0]

    @jax.jit
    def compute():
        imitate = flat(jax.grad(lambda x: data @ sft_loss(sequence(x)[:, None]))(policy))
        every = jnp.concatenate([x.reshape(K, -1) for x in jax.jacrev(sequence)(policy)], -1)
        opponents = jax.vmap(lambda t: sequence([(1 - t) * a + t * b for a, b in zip(policy, other, strict=True)]))(
            steps
        )

        def play(opponent_logp, link):
            pairs = data[:, None] * jnp.exp(opponent_logp)[None]
            loss = functools.partial(spin_loss, beta=1.0, link=link)
            return flat(jax.grad(lambda x: tree.mean_pair_loss(pairs, loss, sequence(x), opponent_logp))(policy))

        links = {link: jax.vmap(functools.partial(play, link=link))(opponents) for link in ("linear", "logistic")}
        return links | {"sft": imitate, "score": every, "opponents": jnp.exp(opponents)}

    found = {name: np.asarray(value) for name, value in compute().items()}
    return found | {"data": np.asarray(data)}


def _self_play() -> list[Claim]:
    g = _gradients()
    sft, score, data, policy = g["sft"], g["score"], g["data"], g["opponents"][0]
    size = np.linalg.norm(sft)
    away = np.linalg.norm(g["linear"] - sft, axis=-1) / size
    cosine = g["logistic"] @ sft / size / np.linalg.norm(g["logistic"], axis=-1)
    # Of single samples: a completion of the data, or a pair of one of the data and one of the policy.
    pair = (score[None] - score[:, None]).reshape(K * K, -1)
    chance = np.outer(data, policy).ravel()
    paired = chance @ (pair**2).sum(-1) - ((chance @ pair) ** 2).sum()
    single = data @ (score**2).sum(-1) - ((data @ score) ** 2).sum()
    fisher = policy @ (score**2).sum(-1)
    return [
        at_most("Theorem 2.4: with a linear link and the current policy as opponent, SPIN's expected gradient is "
                "that of fine-tuning", "|g_spin - g_sft|", away[0] * size, 1e-14),
        holds("Theorem 2.4 does not reach SPIN as it is run: an opponent left from an earlier iterate changes the "
              "gradient", "|g_spin - g_sft| / |g_sft|, a tenth of the way, all the way to another policy",
              f"{away[1]:.4f}, {away[-1]:.4f}", "growing from 0", (np.diff(away) > 0).all(), verdict="sharpened"),
        holds("SPIN's own logistic link gives half of fine-tuning's gradient at the opponent, away from it another "
              "direction", "cosine with fine-tuning's gradient, at the opponent and at the far end",
              f"{cosine[0]:.4f}, {cosine[-1]:.4f}", "1, < 0.99",
              np.abs(g["logistic"][0] - sft / 2).max() < 1e-14 and cosine[-1] < 0.99, verdict="sharpened"),
        equal("Pair by pair SPIN adds the trace of the policy's Fisher information to the variance of fine-tuning's "
              "gradient", "trace of covariance, pair less single", paired - single, fisher, rtol=1e-12,
              verdict="sharpened"),
    ]  # fmt: skip


def _simple(fast: bool) -> list[Claim]:
    """Theorem 3.1, on the first prompt: rewards linear in two features."""
    wins = _world()["wins"][0]
    features = np.random.default_rng(9).normal(size=(K, 2))
    uniform = jnp.zeros(K)

    @jax.jit
    def likelihood(logp):
        return tree.mean_pair_loss(wins, functools.partial(local_reward_loss, beta=1.0), logp)

    @jax.jit
    def fits():
        def both(params):
            """Independent fits in one sum: a linear reward, and a policy that is optimal for one."""
            policy = tree.log_linear(params["policy"], uniform, features)
            return tree.mean_pair_loss(wins, bradley_terry_loss, features @ params["reward"]) + likelihood(policy)

        found = tree.minimise(both, {"reward": jnp.zeros(2), "policy": jnp.zeros(2)}).params
        return found["reward"], tree.log_linear(found["policy"], uniform, features)

    reward, simple = fits()
    simple = np.asarray(simple)
    without = np.linalg.lstsq(np.asarray(features), simple, rcond=None)[0]
    design = np.column_stack([features, np.ones(K)])
    within = np.linalg.lstsq(design, simple, rcond=None)[0]

    @jax.jit
    def projected(params):
        """The memoryless policy nearest to the optimum of a linear reward, and its likelihood."""
        logp = _nearest(tree.log_linear(params, uniform, features))
        return likelihood(logp), jnp.exp(logp)

    tolerance = 1e-3 if fast else 1e-5
    search = optimize.minimize(lambda x: float(projected(x)[0]), np.asarray(reward), method="Nelder-Mead",
                               options={"xatol": tolerance, "fatol": tolerance**2})  # fmt: skip
    rlhf, likeliest = projected(reward), projected(search.x)
    gap, apart = float(rlhf[0] - likeliest[0]), float(_total_variation(rlhf[1], likeliest[1]))
    return [
        at_most("Theorem 3.1: RLHF on a simple reward is maximum likelihood over the policies that are optimal for one",
                "largest |pi_rlhf - pi_sim|, rewards of two features, all policies",
                np.abs(special.softmax(features @ np.asarray(reward)) - np.exp(simple)).max(), 1e-9),
        holds("The premise of Theorem 3.1 that log pi_sim is itself a simple reward can hold without intercepts",
              "largest residual of log pi_sim on the features, nats",
              np.abs(np.asarray(features) @ without - simple).max(), "not 0",
              np.abs(np.asarray(features) @ without - simple).max() > 0.1, verdict="refuted"),
        at_most("Theorem 3.1 needs log pi_sim to be a simple reward up to the constant of the prompt only",
                "largest residual with an intercept, nats", np.abs(design @ within - simple).max(), 1e-12,
                verdict="sharpened"),
        holds("Theorem 3.1 fails where the policies cannot follow the reward, here memoryless ones",
              "likelihood that RLHF loses within Pi(R_sim), nats a pair; TV(pi_rlhf, pi_sim)",
              f"{gap:.5f}, {apart:.5f}", "above 1e-5, above 0.01", gap > 1e-5 and apart > 0.01, verdict="sharpened"),
    ]  # fmt: skip


def draw_likelihood():
    """The constant between a reward and its policy, and where there is no fit."""
    figure, axes = plt.subplots(1, 2, figsize=(7.8, 3.6))
    f = _fits()
    for row, (colour, marker) in enumerate(zip(PALETTE, "os", strict=False)):
        reward, logp = f["reward"][row], f["mle"][row]
        norm = special.logsumexp(reward)
        ends = np.array([reward.min(), reward.max()])
        axes[0].plot(ends, ends - norm, "-", lw=1, color=colour)
        axes[0].plot(
            reward, logp, marker, ms=5, mfc="none", color=colour, label=f"prompt {row + 1}: log sum exp r = {norm:.3f}"
        )
    axes[0].axline((0, 0), slope=1, lw=1, ls="--", color="black", label="as printed")
    axes[0].set_ylim(-8, 1)
    axes[0].set_xlabel(r"fitted reward $r_{mle}$ (mean 0)")
    axes[0].set_ylabel(r"log $\pi_{mle}$ (nats)")
    axes[0].legend(fontsize=8, loc="lower right")
    scale, clean, noisy = _rays()
    axes[1].loglog(scale, clean, "o", ms=4, color=PALETTE[2], label="noiseless labels: no minimum")
    axes[1].loglog(scale, noisy, "s", ms=4, mfc="none", color=PALETTE[1], label="noisy labels: minimum at 1")
    axes[1].axhline(f["nll"][0] - _second_nll(), lw=1, color=PALETTE[1])
    axes[1].set_ylim(5e-3, 30)
    axes[1].set_xlabel("multiple of the reward")
    axes[1].set_ylabel("negative log-likelihood (nats)")
    axes[1].legend(fontsize=8, loc="upper left")
    return figure


def _second_nll() -> float:
    """What the second prompt adds to the likelihood of the fit."""
    w, f = _world(), _fits()
    return float(jax.jit(lambda *x: tree.mean_pair_loss(x[0], bradley_terry_loss, x[1]))(w["wins"][1], f["reward"][1]))


def draw_self_play():
    """SPIN's gradient against the distance of its opponent."""
    g = _gradients()
    figure, ax = plt.subplots(figsize=(5.8, 4.0))
    distance = 0.5 * np.abs(g["opponents"] - g["opponents"][0]).sum(-1)
    size = np.linalg.norm(g["sft"])
    ax.plot(distance, np.linalg.norm(g["opponents"] @ g["score"], axis=-1) / size, "-", lw=1, color=PALETTE[0])
    linear = np.linalg.norm(g["linear"] - g["sft"], axis=-1) / size
    logistic = np.linalg.norm(2 * g["logistic"] - g["sft"], axis=-1) / size
    ax.plot(distance, linear, "o", ms=5, color=PALETTE[0], label="linear link")
    ax.plot(distance, logistic, "s", ms=5, mfc="none", color=PALETTE[1], label="logistic link, doubled")
    ax.set_xlabel("total variation between opponent and current policy")
    ax.set_ylabel(r"$|g_{spin} - g_{sft}|\; /\; |g_{sft}|$")
    ax.set_title("line: mean score of the opponent's completions", fontsize=10)
    ax.legend(fontsize=8)
    return figure


FAMILY = Family(
    name="all_roads",
    title="All roads lead to likelihood, up to a constant of each prompt",
    text="""
Two prompts with all 27 completions of three tokens, so that soft reinforcement learning, its projections and every
maximum of a likelihood are exact. Under their premises the theorems hold to rounding: reinforcement learning on a
fitted reward is maximum likelihood (2.2), with a reference it is DPO (2.3), on a simple reward it is maximum likelihood
over the policies optimal for one (3.1), and linear SPIN is fine-tuning while the opponent is the policy itself (2.4).

What has to be mended are premises. Rewards and log-probabilities agree up to a constant of each prompt and never
literally, a maximum of the likelihood exists only where wins connect all completions, and where the policies cannot
follow the reward the roads end in different places.
""",
    claims=claims,
    figures={"likelihood": draw_likelihood, "self_play": draw_self_play},
    sources=(
        "Swamy et al., 2025, [arXiv:2503.01067](https://arxiv.org/abs/2503.01067)",
        "Rafailov et al., 2023, [arXiv:2305.18290](https://arxiv.org/abs/2305.18290)",
        "Chen et al., 2024, [arXiv:2401.01335](https://arxiv.org/abs/2401.01335)",
        "Ford, 1957, Solution of a ranking problem from binary comparisons",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
