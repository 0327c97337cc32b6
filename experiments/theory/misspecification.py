"""Which of RLHF and DPO wins where a model class is wrong, or too large, on whole populations.

    python -m experiments.theory.misspecification

Expected: RLHF wins where the policies are restricted, DPO where the rewards are, neither where both are alike; refuted:
the separation of the two by their printed rates; about 20 seconds on two cores.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from tiltjax.exact import tree
from tiltjax.losses.preference import dpo_loss
from tiltjax.losses.reward_model import bradley_terry_loss

__all__ = ["FAMILY", "claims"]

REWARD = np.array([2.0, 0.0, -1.0])
FEATURES = np.array([1.0, 1.6, -1.0])
"""Three completions under a uniform reference, beta 1: a class of one feature ranks the wrong one first."""

SECOND = np.linspace(-2.0, 3.0, 26)
"""Feature of the second completion, for the figure."""

WORLDS = 400
"""Random worlds of three completions, each with its reward, feature, reference and beta."""

SPARSE, DRAWS = 3, 8
"""Non-zero entries of the reward, and data sets drawn."""

SWEEP_N, SWEEP_D, OTHER_N = (1600, 3200, 6400, 12800), (100, 200, 400), 6400
FAST_N, FAST_D, FAST_OTHER_N = (800, 1600, 3200), (100, 400), 3200
"""Pairs at d = 100; dimensions, and pairs at them."""


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page."""
    return [*_three_arms(), *_any_world(), *_dense_policy(), *_sparse(fast)]


def _values(reward, features, ref, beta) -> dict[str, Any]:
    """What each method is worth, ``E r - beta KL``, where its classes are all or only those of one feature.

    Args:
      reward: True reward of every completion, ``[K]``; labels are the whole Bradley-Terry population of it.
      features: Of the restricted classes, ``[K, 1]``: rewards linear in it, and the tilts by such rewards.
      ref: The reference, which samples the pairs too, ``[K]``.
      beta: Strength of the KL term.
    """
    ref_logp = jnp.log(ref)
    wins = tree.expected_wins(reward, ref)

    def policy(params):
        return tree.log_linear(params, ref_logp, features / beta)

    def worth(logp, of=reward):
        return tree.regularised_reward(logp, ref_logp, of, beta=beta)

    def pair_loss(logp, wins):
        return tree.mean_pair_loss(
            wins, functools.partial(dpo_loss, beta=beta), logp, jnp.broadcast_to(ref_logp, logp.shape)
        )

    def likelihoods(fit):
        """Rewards and policies, of all completions and of one feature: independent fits in one sum."""
        rewards = jnp.stack([fit["reward"], features @ fit["linear"]])
        policies = jnp.stack([jax.nn.log_softmax(fit["policy"]), policy(fit["restricted"])])
        both = jnp.broadcast_to(wins, (2, *wins.shape))
        fits = tree.mean_pair_loss(both, bradley_terry_loss, rewards) + pair_loss(policies, both)
        return jnp.sum(fits)

    def online(_, params):
        # Gauss-Newton with an overestimate of the curvature: it rests where the expected gradient of online DPO is 0.
        wins = tree.expected_wins(reward, jax.lax.stop_gradient(jnp.exp(policy(params))))
        spread = features[:, None, 0] - features[None, :, 0]
        slope = jax.grad(lambda params: pair_loss(policy(params), wins))(params)
        return params - slope / (jnp.sum(wins * spread**2) / 4 + 1e-12)

    zeros = jnp.zeros(1)
    fit = {"reward": jnp.zeros_like(reward), "linear": zeros, "policy": ref_logp, "restricted": zeros}
    fit = tree.minimise(likelihoods, fit).params

    def restricted_rlhf(of):
        # The objective has several maxima.
        starts = jnp.concatenate([jnp.linspace(-4, 4, 5), fit["linear"]])[:, None]
        ends = jax.vmap(lambda at: tree.minimise(lambda params: -worth(policy(params), of), at, max_steps=60))(starts)
        return policy(ends.params[jnp.argmin(ends.value)])

    of_reward, of_linear = jax.vmap(restricted_rlhf)(jnp.stack([fit["reward"], features @ fit["linear"]]))
    dpo, any_dpo = policy(fit["restricted"]), jax.nn.log_softmax(fit["policy"])
    before = jax.lax.fori_loop(0, 2000, online, zeros)
    last = online(0, before)
    return {
        "optimum": beta * bandit.log_partition(ref, reward, beta=beta),
        "rlhf, none": worth(jnp.log(bandit.tilted(ref, fit["reward"], beta=beta))),
        "dpo, none": worth(any_dpo),
        "rlhf, policy": worth(of_reward),
        "dpo, policy": worth(dpo),
        "rlhf, reward": worth(jnp.log(bandit.tilted(ref, features @ fit["linear"], beta=beta))),
        "dpo, reward": worth(any_dpo),
        "rlhf, both": worth(of_linear),
        "dpo, both": worth(dpo),
        "online": worth(policy(last)),
        "moving": jnp.abs(last - before)[0],
        "distance": bandit.total_variation(jnp.exp(of_linear), jnp.exp(dpo)),
    }


@functools.lru_cache
def _worlds() -> dict[str, np.ndarray]:
    """Values in the world of the table, in those of the figure, and in random ones, in this order."""
    rng = np.random.default_rng(0)
    second = np.concatenate([FEATURES[1:2], SECOND])
    features = np.tile(FEATURES, (len(second), 1))
    features[:, 1] = second
    reward = np.concatenate([np.tile(REWARD, (len(second), 1)), 1.5 * rng.normal(size=(WORLDS, 3))])
    features = np.concatenate([features, rng.normal(size=(WORLDS, 3))])[..., None]
    ref = np.concatenate([np.full((len(second), 3), 1 / 3), rng.dirichlet(3 * np.ones(3), WORLDS)])
    beta = np.concatenate([np.ones(len(second)), rng.uniform(0.5, 2, WORLDS)])
    found = jax.jit(jax.vmap(_values))(reward, features, ref, beta)
    return {name: np.asarray(value) for name, value in found.items()}


def _three_arms() -> list[Claim]:
    v = {name: float(value[0]) for name, value in _worlds().items()}
    to = 5e-6
    return [
        equal("Both classes right: RLHF finds the optimum", "E r - beta KL, rewards (2, 0, -1), beta 1",
              v["rlhf, none"], 1.07123, atol=to),
        equal("Both classes right: DPO finds the optimum", "E r - beta KL", v["dpo, none"], 1.07123, atol=to),
        equal("Policies restricted to one feature (1, 1.6, -1), rewards right: RLHF", "E r - beta KL",
              v["rlhf, policy"], 0.49247, atol=to),
        equal("Policies restricted, rewards right: DPO is worth less", "E r - beta KL", v["dpo, policy"], 0.48653,
              atol=to),
        equal("Rewards restricted to that feature, policies right: RLHF", "E r - beta KL", v["rlhf, reward"], 0.48653,
              atol=to),
        equal("Rewards restricted, policies right: DPO is still at the optimum", "E r - beta KL", v["dpo, reward"],
              1.07123, atol=to),
        equal("Both restricted alike: RLHF and DPO are worth the same", "E r - beta KL of RLHF", v["rlhf, both"],
              v["dpo, both"], atol=1e-9),
        holds("Both restricted alike: online DPO, its pairs drawn from the policy itself, can outperform both",
              "E r - beta KL",
              v["online"], f"> {v['dpo, both']:.5f}, < {v['rlhf, policy']:.5f} (best of the class)",
              v["dpo, both"] + 1e-4 < v["online"] < v["rlhf, policy"] - 1e-4),
    ]  # fmt: skip


def _any_world() -> list[Claim]:
    v = {name: value[1 + len(SECOND) :] for name, value in _worlds().items()}
    best = v["rlhf, policy"] - v["dpo, policy"]
    gain = (v["online"] - v["dpo, both"])[v["moving"] < 1e-9]
    return [
        at_most(f"Rewards right: RLHF is worth at least as much as DPO, {WORLDS} random worlds",
                "largest excess of DPO, restricted policies", (-best).max(), 1e-12),
        at_most("Policies right: DPO is worth at least as much as RLHF", "largest excess of RLHF, restricted rewards",
                (v["rlhf, reward"] - v["dpo, reward"]).max(), 1e-12),
        at_most("Both restricted alike: not only the values agree, the policies do", "largest TV(RLHF, DPO)",
                v["distance"].max(), 1e-7, verdict="sharpened"),
        holds("Both restricted alike: online DPO gains in most worlds and loses in some, for it maximises nothing",
              f"worlds where it gains, where it loses, of {len(gain)} where it comes to rest",
              f"{(gain > 1e-6).sum()}, {(gain < -1e-6).sum()}", "both above 0",
              min((gain > 1e-6).sum(), (gain < -1e-6).sum()) > 0, verdict="sharpened"),
    ]  # fmt: skip


def _dense_policy() -> list[Claim]:
    """Completions of two tokens of eight: a reward of one non-zero entry whose policy's first token has six."""
    size, dims, spread = 8, 6, 0.7
    rng = np.random.default_rng(1)
    first, dense = rng.normal(size=(size, dims)), rng.normal(size=dims)
    sign = np.where(np.arange(size) % 2, 1.0, -1.0)
    sparse = np.array([1.5, 0, 0, 0, 0, 0])
    second = (first @ dense)[:, None] + spread * sign[None]
    reward = ((first @ sparse)[:, None] + second).ravel()
    ref = [jnp.full((1, size), -np.log(size)), jnp.full((size, size), -np.log(size))]
    policy = tree.tilted_policy(ref, tree.soft_values(ref, jnp.asarray(reward), beta=1.0), beta=1.0)
    logits = np.asarray(policy[0][0])
    design = np.column_stack([first, np.ones(size)])
    found = np.linalg.lstsq(design, logits, rcond=None)[0]
    return [
        at_most("Two tokens, reward s.psi(y) with one non-zero entry, second token worth b.psi(y) +- c: the optimal "
                "policy's first token has the parameters s + b, as dense as b", "largest |parameter - (s + b)|",
                np.abs(found[:dims] - sparse - dense).max(), 1e-12),
    ]  # fmt: skip


FITS = ("reward", "policy", "policy, l1")
"""The sparse reward by l1, the dense policy by maximum likelihood, and the latter by l1."""


def _problem(n: int, d: int) -> tuple[np.ndarray, ...]:
    """Pairs, the chosen completion less the rejected one.

    Returns:
      Differences of first-token features ``[DRAWS, n, d]``; what the second tokens add beside ``b``, ``[DRAWS, n]``;
      the sparse reward ``[d]`` and the dense ``b`` of each data set, ``[DRAWS, d]``.
    """
    rng = np.random.default_rng(n + d)
    x = rng.normal(size=(DRAWS, n, d))
    signs = rng.choice([-1.0, 0.0, 1.0], (DRAWS, n), p=[0.25, 0.5, 0.25])
    sparse, dense = (np.arange(d) < SPARSE).astype(float), rng.choice([-1.0, 1.0], (DRAWS, d)) / math.sqrt(d)
    margin = np.einsum("ind,id->in", x, sparse + dense) + signs
    turn = np.where(rng.uniform(size=margin.shape) * (1 + np.exp(-margin)) > 1, -1.0, 1.0)
    return tuple(a.astype(np.float32) for a in (x * turn[..., None], signs * turn, sparse, dense))


_FITTED: dict[tuple[int, int], dict[str, np.ndarray]] = {}
"""What `_errors_at` has found: the figure shows it."""


def _errors_at(n: int, d: int, *, steps: int = 80) -> dict[str, np.ndarray]:
    """Squared errors of `FITS` in every data set, ``[DRAWS]`` each, by accelerated proximal gradient descent."""
    if (n, d) in _FITTED:
        return _FITTED[n, d]
    x, signs, sparse, dense = _problem(n, d)
    penalty = np.float32(0.3 * math.sqrt(math.log(d) / n)) * np.array([[1], [0], [1]], np.float32)
    # The reward's fit knows all that the second token adds; the policy has the dense part in its own parameters.
    known = np.stack([signs + np.einsum("ind,id->in", x, dense), signs, signs], 1)
    target = np.stack([sparse + 0 * dense, sparse + dense, sparse + dense], 1)
    rate = np.float32(4 / (1.1 * (1 + math.sqrt(d / n)) ** 2))

    def loss(params, x, known):
        """Likelihood of pairs by reward, a policy's being ``log(pi / ref)``, whose normaliser cancels."""
        score = jnp.einsum("ifd,ind->ifn", params, x) + known
        return jnp.sum(bradley_terry_loss(jnp.stack([score, jnp.zeros_like(score)], -1))) / n

    @jax.jit
    def fit(x, known):
        def step(i, state):
            old, ahead = state
            z = ahead - rate * jax.grad(loss)(ahead, x, known)
            new = jnp.sign(z) * jax.nn.relu(jnp.abs(z) - rate * penalty[None])
            # A restart wherever the momentum points uphill keeps the convergence linear.
            uphill = jnp.sum((ahead - new) * (new - old), axis=-1, keepdims=True) > 0
            return new, new + jnp.where(uphill, 0, i / (i + 3)).astype(new.dtype) * (new - old)

        start = jnp.zeros(target.shape, jnp.float32)
        return jax.lax.fori_loop(0, steps, step, (start, start))[0]

    found = np.square(np.asarray(fit(x, known)) - target).sum(-1).astype(float)
    _FITTED[n, d] = dict(zip(FITS, found.T, strict=True))
    return _FITTED[n, d]


def _information_bound(n: int, d: int) -> float:
    """Trace of the inverse Fisher information of n pairs: the squared error of dense maximum likelihood, d << n."""
    node, weight = np.polynomial.hermite_e.hermegauss(120)
    weight = weight / weight.sum()
    dense = 1 / np.sqrt(d)  # One of two signs beside each non-zero entry of the reward: the mean of both norms.
    norms = [np.sqrt(4 + 2 * dense * (2 * plus - SPARSE)) for plus in range(SPARSE + 1)]
    chances = np.array([1, 3, 3, 1]) / 8
    total = 0.0
    for chance, norm in zip(chances, norms, strict=True):
        rest = np.array([-1.0, 0.0, 1.0])
        margin = norm * node[:, None] + rest
        density = weight[:, None] * np.array([0.25, 0.5, 0.25]) / (2 + 2 * np.cosh(margin))
        across, along = density.sum(), (node[:, None] ** 2 * density).sum()
        total += chance * ((d - 1) / across + 1 / along)
    return float(total / n)


def _combined(errors: Sequence[dict[str, np.ndarray]], name: str, weights: np.ndarray) -> np.ndarray:
    """A weighted sum of the logs of mean squared errors, and its standard error."""
    found = np.stack([at[name] for at in errors])
    relative = found.std(-1) / found.mean(-1) / np.sqrt(DRAWS)
    return np.array([weights @ np.log(found.mean(-1)), np.sqrt(weights**2 @ relative**2)])


def _sparse(fast: bool) -> list[Claim]:
    sizes, dims, other_n = (FAST_N, FAST_D, FAST_OTHER_N) if fast else (SWEEP_N, SWEEP_D, OTHER_N)
    by_n = [_errors_at(n, 100) for n in sizes]
    by_d = [_errors_at(other_n, d) for d in dims]
    n = sizes[-1]
    dense, bound = by_n[-1]["policy"], _information_bound(n, 100)
    slope, growth = {}, {}
    for name in ("reward", "policy"):
        log_n = np.log(sizes) - np.mean(np.log(sizes))
        weights = log_n / (log_n @ log_n)
        slope[name] = _combined(by_n, name, weights)
        growth[name] = tuple(np.exp(_combined([by_d[0], by_d[-1]], name, np.array([-1.0, 1.0])) * np.array([1, 4])))
    ratio = [at["policy"].mean() / at["reward"].mean() for at in by_d]
    printed = np.sqrt(SPARSE * np.log(100) / n) / (100 / n)
    by_l1 = by_n[-1]["policy, l1"].mean() / dense.mean()
    at_dims = f"d = {dims[0]} to {dims[-1]}, n = {other_n}"
    return [
        holds("The printed rates, sqrt(k log d / n) for the reward and d / n for the policy, separate the two",
              f"sqrt(k log d / n) / (d / n), d = 100, k = 3, n = {n}", printed,
              "> 1 from n = d^2 / (k log d) = 724 on: nothing follows", printed > 1, verdict="refuted"),
        holds("The squared errors of reward and policy are of order k log d / n and d / n: further apart the larger d",
              f"policy / reward, {at_dims}", " ".join(f"{r:.2f}" for r in ratio), "increasing",
              (np.diff(ratio) > 0).all(), verdict="sharpened"),
        holds("The squared errors of reward and policy both fall as 1 / n",
              "slopes of log squared error against log n: reward, policy",
              f"{slope['reward'][0]:.3f}, {slope['policy'][0]:.3f}", "-1 within 4 s.e. and 0.05 for the next order",
              all(abs(s + 1) < 4 * error + 0.05 for s, error in slope.values()), verdict="sharpened"),
        equal("The policy's squared error is tr I^-1 / n, I the Fisher information of a pair: of the order d / n",
              f"mean squared error / (tr I^-1 / n), d = 100, n = {n}, 4 s.e. and 3 d / n for the next order",
              dense.mean() / bound, 1, atol=4 * dense.std() / bound / np.sqrt(DRAWS) + 300 / n),
        holds("The reward's squared error grows with log d", f"its factor, {at_dims}", growth["reward"][0],
              f"< {dims[-1] // dims[0]} by 4 s.e.; log d grows by {np.log(dims[-1]) / np.log(dims[0]):.3f}",
              growth["reward"][0] * growth["reward"][1] < dims[-1] / dims[0]),
        holds("The policy's squared error grows with d", f"its factor, {at_dims}", growth["policy"][0],
              f"≥ {dims[-1] // dims[0]} within 4 s.e.",
              growth["policy"][0] * growth["policy"][1] > dims[-1] / dims[0]),
        holds("The same penalty on the policy's parameters does not help: they are not sparse",
              f"squared error with l1 / without, d = 100, n = {n}", by_l1, "> 1", by_l1 > 1),
    ]  # fmt: skip


def draw_values():
    """Values of the methods against the feature of the second completion."""
    found = {name: value[1 : 1 + len(SECOND)] for name, value in _worlds().items()}
    grid = np.linspace(-12, 12, 4801)
    figure, ax = plt.subplots(figsize=(6.2, 4.0))

    @jax.jit
    @jax.vmap
    def enumerated(features):
        """Values of all policies of the class on a grid: the largest, and that of the one of the smallest loss."""
        ref_logp = jnp.full(3, -jnp.log(3.0))
        wins = tree.expected_wins(REWARD, jnp.exp(ref_logp))
        logp = jax.vmap(lambda t: tree.log_linear(t[None], ref_logp, features[:, None]))(jnp.asarray(grid))
        worth = jax.vmap(lambda logp: tree.regularised_reward(logp, ref_logp, REWARD, beta=1.0))(logp)
        loss = jax.vmap(lambda logp: tree.mean_pair_loss(wins, bradley_terry_loss, logp))(logp)
        return jnp.max(worth), worth[jnp.argmin(loss)]

    features = np.tile(FEATURES, (len(SECOND), 1))
    features[:, 1] = SECOND
    best, likeliest = map(np.asarray, enumerated(jnp.asarray(features)))
    ax.axhline(found["optimum"][0], lw=1, color=PALETTE[6])
    for side in (SECOND < 0.99, SECOND > 0.99):  # At 1 another completion becomes the limit of the class.
        ax.plot(SECOND[side], best[side], lw=1, color=PALETTE[0])
    ax.plot(SECOND, likeliest, lw=1, color=PALETTE[1])
    marks = (
        ("dpo, reward", "DPO, rewards restricted", "s", 6, 6),
        ("rlhf, policy", "RLHF, policies restricted", "o", 0, 6),
        ("online", "online DPO, both restricted", "^", 2, 5),
        ("dpo, policy", "DPO, policies or both restricted", "x", 1, 6),
        ("rlhf, reward", "RLHF, rewards or both restricted", "o", 1, 9),
    )
    for name, label, marker, colour, size in marks:
        ax.plot(SECOND, found[name], marker, ms=size, mfc="none", color=PALETTE[colour], label=label)
    ax.set_xlabel("feature of the second completion")
    ax.set_ylabel(r"$E\,r - \beta\,$KL (reward units)")
    ax.set_ylim(0.15, 1.5)
    ax.set_title("lines: optimum, best of the class, likeliest of the class", fontsize=10)
    ax.legend(fontsize=8, ncols=2, loc="upper center")
    return figure


def draw_sparse():
    """Squared errors against pairs."""
    figure, ax = plt.subplots(figsize=(5.6, 4.1))
    sizes = np.array([n for n in SWEEP_N if (n, 100) in _FITTED])
    found = [_FITTED[n, 100] for n in sizes.tolist()]
    labels = {
        "policy, l1": "policy (DPO), l1 penalty",
        "policy": "policy (DPO), maximum likelihood",
        "reward": "sparse reward (RLHF), l1 penalty",
    }
    for name, colour, marker in zip(labels, (PALETTE[4], PALETTE[1], PALETTE[0]), "^os", strict=True):
        mean = np.array([at[name].mean() for at in found])
        error = np.array([at[name].std() / np.sqrt(len(at[name])) for at in found])
        ax.errorbar(sizes, mean, 2 * error, fmt=marker, ms=5, mfc="none", color=colour, label=labels[name])
    ax.loglog(sizes, [_information_bound(n, 100) for n in sizes], lw=1, color=PALETTE[1], label=r"tr I$^{-1}$ / n")
    at = found[-1]["reward"].mean() * sizes[-1] / (SPARSE * np.log(100))
    label = rf"{at:.0f} $\cdot$ k log d / n"
    ax.loglog(sizes, at * SPARSE * np.log(100) / sizes, "--", lw=1, color=PALETTE[0], label=label)
    ax.set_xticks(sizes, [f"{n:,}" for n in sizes])
    ax.xaxis.set_minor_locator(plt.NullLocator())
    ax.set_xlabel("labelled pairs n")
    ax.set_ylabel("squared error of the parameters")
    ax.set_title("d = 100, k = 3; bars: 2 s.e.", fontsize=10)
    ax.legend(fontsize=8)
    return figure


FAMILY = Family(
    name="misspecification",
    title="RLHF or DPO: which class is wrong decides, and a sparse reward has a dense policy",
    text="""
On the whole population of Bradley-Terry labels both methods are exact, so what separates them is their classes. Where
policies are restricted RLHF still knows the reward and finds the best policy of the class; DPO finds the likeliest,
which is another. Where rewards are restricted it is the other way round. Where the two classes are images of each other
RLHF *is* DPO. Online DPO, which draws its pairs from the policy that it trains, may then gain or lose.

With samples the sizes of the classes count: a reward with k non-zero entries can have an optimal policy with d, because
the first token of the policy contains the soft value of the second. The surrogate of that task here gives both methods
the same pairs and everything about the second token; the reward is fitted with an l1 penalty.
""",
    claims=claims,
    figures={"values": draw_values, "sparse": draw_sparse},
    sources=(
        "Shi et al., 2025, [arXiv:2505.19770](https://arxiv.org/abs/2505.19770)",
        "Rafailov et al., 2023, [arXiv:2305.18290](https://arxiv.org/abs/2305.18290)",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
