"""Kuhn poker: which learners reach an equilibrium of a game with hidden cards.

    python -m experiments.theory.kuhn

Expected: mirror descent stays away, a fixed magnet settles near the equilibria, a fading or moving magnet reaches one;
about 10 seconds on two cores.
"""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import linprog

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from tiltjax.exact import game, kuhn

__all__ = ["FAMILY", "claims"]

STEPS, RESETS = 3000, 20
"""Full-width steps from uniform play, and how many magnets in as many."""

LEARNERS = {
    "mirror descent": (0.0, 0.1, False),
    "fixed magnet, beta 0.1": (0.1, 0.1, False),
    "fixed magnet, beta 0.05": (0.05, 0.1, False),
    "fading magnet": (1.0, 1.0, True),
}
"""Strength of the KL to the magnet, step size, and whether both fall as 1/sqrt(t)."""


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page."""
    return [*_solved(), *_learned(), *(_decks(()) if fast else _decks((4, 6)))]


def _solved() -> list[Claim]:
    bluffs = np.linspace(0, 1 / 3, 7)
    uniform = kuhn.uniform_policy()
    # All pure strategies of both players, 64 each, as one batch of policies.
    pure = np.eye(2)[np.array(list(itertools.product((0, 1), repeat=6)))].reshape(64, 3, 2, 2)
    both = np.stack(np.broadcast_arrays(pure[:, None], pure[None]), axis=2)
    equilibria = jnp.stack([kuhn.equilibrium(float(b)) for b in bluffs])
    value, exploitability = jax.jit(kuhn.value), jax.jit(kuhn.exploitability)
    payoff = np.asarray(value(both))
    best = linprog([*[0] * 64, -1], np.hstack([-payoff.T, np.ones((64, 1))]), np.zeros(64), [[*[1] * 64, 0]], [1],
                   bounds=[*[(0, 1)] * 64, (-1, 1)])  # fmt: skip
    # A best reply is a pure strategy: replace one player of a policy by each.
    policy = np.random.default_rng(0).dirichlet(np.ones(2), size=(2, 3, 2))
    replies = [np.stack(np.broadcast_arrays(*pair), axis=1) for pair in ((pure, policy[1]), (policy[0], pure))]
    gains = value(replies[0]).max() - value(replies[1]).min()
    return [
        equal("The first player loses 1/18 of a chip under best play: linear program over 64 pure strategies a side",
              "value of the game, chips", -best.fun, -1 / 18, atol=1e-9),
        at_most("There is a line of equilibria, one for every chance in [0, 1/3] of betting the lowest card",
                "largest exploitability and |value + 1/18|, 7 of them",
                max(exploitability(equilibria).max(), abs(value(equilibria) + 1 / 18).max()), 1e-13),
        equal("Uniform play is far from an equilibrium", "exploitability, chips", exploitability(uniform), 0.9166667,
              atol=1e-7),
        equal("Exploitability is what the best of all pure replies gain: a random policy", "exploitability, chips",
              exploitability(policy), gains, atol=1e-13),
    ]  # fmt: skip


@functools.lru_cache
def _paths() -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """Exploitability of every learner by step, that of the moving magnet by round, its last policy, and a distance.

    That is the KL from the policies of the fixed magnet of strength 0.05 to the one it settles at, summed over all
    situations, after 1000 and 2000 steps.
    """
    uniform = kuhn.uniform_policy()

    @functools.partial(jax.vmap, in_axes=(0, 0, 0))
    def run(beta, step_size, fading):
        def update(policy, step):
            fall = jnp.where(fading, jax.lax.rsqrt(step + 1.0), 1.0)
            return kuhn.magnetic_mirror_descent(policy, ref=uniform, beta=fall * beta, step_size=fall * step_size)

        return game.iterate(update, uniform, 2 * STEPS)

    @jax.jit
    def everything(beta, step_size, fading):
        paths = run(beta, step_size, fading)
        settled = jnp.stack([bandit.kl(paths[2, -1], paths[2, k]).sum() for k in (1000, 2000)])
        magnets = _moved(uniform)
        return kuhn.exploitability(paths[:, : STEPS + 1]), kuhn.exploitability(magnets), magnets[-1], settled

    found, moving, last, settled = everything(*map(jnp.asarray, zip(*LEARNERS.values(), strict=True)))
    by_name = dict(zip(LEARNERS, np.asarray(found), strict=True))
    return by_name, np.asarray(moving), np.asarray(last), np.asarray(settled)


def _moved(policy):
    move = functools.partial(kuhn.mpo, beta=0.1, step_size=0.1, steps=STEPS // RESETS)
    return game.iterate(lambda p, _: move(p), policy, RESETS)


def _learned() -> list[Claim]:
    paths, moving, last, settled = _paths()
    mirror, strong, weak, fading = paths.values()
    bluff = float(last[0, 0, 0, 1])
    on_the_line = np.abs(last - np.asarray(kuhn.equilibrium(bluff))).max() if bluff <= 1 / 3 else np.inf
    rate = float(np.log(settled[1] / settled[0]) / 1000)
    return [
        holds("The last policy of mirror descent does not converge",
              f"least exploitability over steps 300 to {STEPS}, chips", mirror[300:].min(), "> 0.1",
              mirror[300:].min() > 0.1),
        equal("With a fixed magnet it settles next to an equilibrium", f"exploitability after {STEPS} steps, beta 0.05",
              weak[-1], 0.0144, rtol=0.01),
        at_most("A weaker fixed magnet settles nearer", "exploitability at beta 0.05 / at 0.1",
                weak[-1] / strong[-1], 1),
        at_most("It settles as fast as the bound for matrix games, log(1 + s beta) a step, though none is proved here",
                "change of log KL a step, steps 1000 to 2000, beta 0.05", rate, -np.log1p(0.1 * 0.05),
                verdict="sharpened"),
        equal("With strength and step falling as 1/sqrt(t) the last policy goes on converging",
              f"exploitability after {STEPS} steps", fading[-1], 0.0047, rtol=0.02),
        at_most(f"With the magnet moved every {STEPS // RESETS} steps the last policy reaches an equilibrium",
                f"exploitability after {STEPS} steps", moving[-1], 1e-7),
        equal("Its value is that of the game", "value, chips", kuhn.value(last), -1 / 18, atol=1e-7),
        at_most(f"It is inside the line of equilibria: it bets the lowest card with probability {bluff:.3f}",
                "largest difference of a probability from the equilibrium with that bluff", on_the_line, 1e-6,
                verdict="sharpened"),
    ]  # fmt: skip


def _decks(decks: Sequence[int]) -> list[Claim]:
    run = jax.jit(lambda p: kuhn.exploitability(_moved(_moved(p)[-1])[-1]))
    return [
        at_most(f"The same with {cards} cards", f"exploitability after {2 * STEPS} steps",
                run(kuhn.uniform_policy(cards)), 1e-4)
        for cards in decks
    ]  # fmt: skip


def draw_exploitability():
    """Exploitability against steps."""
    paths, moving, *_ = _paths()
    figure, ax = plt.subplots(figsize=(6.0, 4.0))
    shown = np.unique(np.geomspace(1, STEPS, 60).astype(int))
    for colour, (name, path) in zip(PALETTE, paths.items(), strict=False):
        ax.loglog(shown, path[shown], "o", ms=3, color=colour, label=name)
    rounds = np.arange(1, RESETS + 1)
    ax.loglog(rounds * (STEPS // RESETS), moving[1:], "s", ms=4, color=PALETTE[5], label="moving magnet, beta 0.1")
    ax.set_xlabel("full-width steps")
    ax.set_ylabel("exploitability, chips")
    ax.legend(fontsize=8, loc="lower left")
    return figure


FAMILY = Family(
    name="kuhn",
    title="Kuhn poker is solved by a magnet that moves, and not by mirror descent",
    text="""
The tutorial shows by a figure that magnetic mirror descent does better on Kuhn poker than learners without a magnet.
The game is small enough to enumerate: both players' policies are updated at every information set at once from uniform
play, without sampling, and exploitability (the sum of what both would gain by their best replies) is exact.

The last policy of mirror descent never settles. A fixed magnet makes it settle next to an equilibrium, a fading or a
moving one at an equilibrium; the moving one is as far after 20 magnets as float64 shows its policies.
""",
    claims=claims,
    figures={"exploitability": draw_exploitability},
    sources=(
        "Kuhn, 1950 (A simplified two-person poker)",
        "Sokota et al., 2022 (MMD), [arXiv:2206.05825](https://arxiv.org/abs/2206.05825)",
        "Wang et al., 2024 (MPO), [arXiv:2410.16714](https://arxiv.org/abs/2410.16714)",
        "Wang, Ma & Yang, 2025 (tutorial at ICML: Alignment Methods for Language Models)",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
