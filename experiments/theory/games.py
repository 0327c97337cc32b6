"""Games of preference: which winners there are, what one step of each method is, and which methods arrive.

    python -m experiments.theory.games

Expected: every loss of self-play is minimised by its tabular step; mirror descent circles, methods with a magnet arrive
within their bounds; refuted: that the minmax winner is unique, and two formulas of the tutorial; about 20 seconds on
two cores.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import special

from experiments.theory.claims import PALETTE, Claim, Family, at_most, equal, holds, main
from experiments.theory.compiled import bandit
from experiments.theory.tabular import minimiser, ordered_pairs
from tiltjax.exact import game
from tiltjax.losses.game import dno_loss, inpo_loss, magnetic_kl_loss
from tiltjax.losses.regression import sppo_loss

__all__ = ["FAMILY", "claims"]

TUTORIAL = np.array([[0.0, 1, -1, 1], [-1, 0, 1, -1], [1, -1, 0, -1], [-1, 1, 1, 0]])
"""Payoffs of the tutorial's four options a, b, c, d, as far as its text determines them."""

CYCLE = np.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]])
"""Rock, paper, scissors."""

START, CENTRE = np.array([0.5, 0.3, 0.2]), np.full(3, 1 / 3)

_RNG = np.random.default_rng(0)
_NOISE = _RNG.normal(size=(8, 5, 5))
GAMES = (1 + np.tanh(_NOISE - np.swapaxes(_NOISE, -1, -2))) / 2
"""Eight games of five arms without any reward behind them."""

REFS, POLICIES = _RNG.dirichlet(3 * np.ones(5), size=(2, 8))

_exploitability, _kl = jax.jit(game.exploitability), bandit.kl

BETA, ETA, STEP = 0.2, 0.5, 0.7
"""Strengths of the single steps: KL to the reference, inverse step size, step size of magnetic mirror descent."""

MAGNET, ROUNDS = 0.15, 60
"""Strength of the KL to a magnet that moves, and how often it does."""


def claims(fast: bool) -> Sequence[Claim]:
    """Judges every claim of this page."""
    return [*_winners(), *_steps(), *_circles(), *_magnetic(), *_harmonic(1000 if fast else 4000), *_resets()]


_copeland = jax.jit(game.copeland_winners)


def _winners() -> list[Claim]:
    tutorial = game.from_payoff(TUTORIAL)
    found = game.minmax_winner(tutorial)
    names = ", ".join(np.array(list("abcd"))[np.asarray(_copeland(tutorial))])
    clones = game.from_payoff(CYCLE[np.ix_([0, 1, 2, 0], [0, 1, 2, 0])])
    cloned, every = game.minmax_winner(clones), game.minmax_winner(GAMES)
    width = cloned.high - cloned.low
    reward = np.random.default_rng(1).permuted(np.tile(np.linspace(0, 2, 5), (8, 1)), axis=-1)
    rewarded = game.bradley_terry(reward)
    best, worst = (np.eye(5)[pick] for pick in (reward.argmax(-1), reward.argmin(-1)))
    both = [game.minmax_winner(rewarded).policy - best, np.asarray(_copeland(rewarded)) - best]
    printed, right = (_magnets(p, np.full((8, 5), 0.2), 40)[-1] for p in (np.swapaxes(rewarded, -1, -2), rewarded))
    return [
        holds("Copeland winners are often not unique: in the tutorial's game of four options there are two",
              "argmax_i sum_j sign(P_ij - 1/2)", names, "a, d", names == "a, d"),
        at_most("Its minmax winner is unique: (1/3, 0, 1/3, 1/3)", "largest |q - that| over all winners",
                np.abs([x - np.array([1 / 3, 0, 1 / 3, 1 / 3]) for x in (found.low, found.high)]).max(), 1e-9),
        holds("The minmax winner is unique: false in rock, paper, scissors with a clone of rock",
              "widest range of an arm's probability over all winners", width.max(), "0", width.max() > 0.3,
              verdict="refuted"),
        at_most("All its winners agree but for how the clones share their mass",
                "widest range of an arm that has no clone", width[1:3].max(), 1e-9, verdict="sharpened"),
        at_most("A minmax winner exists always, and no arm beats it: 8 random games of 5 arms",
                "largest |value - 1/2| and exploitability",
                max(np.abs(every.value - 0.5).max(), _exploitability(GAMES, every.policy).max()), 1e-9),
        at_most("Where a reward explains the preferences, both winners are its best arm: 8 Bradley-Terry games",
                "largest |q - argmax r|", np.abs(both).max(), 1e-9),
        holds("MPO's games min_1 max_2 P(1 > 2), Eq. 19 as the tutorial prints it, lead to a winner: player 1 loses on "
              "purpose", "least mass on the worst arm after 40 magnets, 8 Bradley-Terry games",
              (printed * worst).sum(-1).min(), "0", (printed * worst).sum(-1).min() > 0.999, verdict="refuted"),
        equal("With the sign turned, max_1 min_2, they lead to the best arm", "least mass on the best arm",
              (right * best).sum(-1).min(), 1, atol=1e-6),
    ]  # fmt: skip


@jax.jit
def _equilibrium(preference: Any, magnet: Any, beta: Any) -> Any:
    """Of eight games at once: one compilation serves the page."""
    return game.regularised_equilibrium(preference, magnet, beta=jnp.full(8, beta))


def _magnets(preference: Any, magnet: Any, rounds: int) -> np.ndarray:
    """The magnet moved to the regularised equilibrium again and again, ``[rounds + 1, 8, 5]``."""
    path = [jnp.asarray(magnet)]
    for _ in range(rounds):
        path.append(_equilibrium(jnp.asarray(preference), path[-1], MAGNET))
    return np.asarray(jnp.stack(path))


def _steps() -> list[Claim]:
    """Minimisers of the sampled losses, each summed over everything that could be drawn, against the tabular steps."""
    preference, policy, ref = GAMES[0], POLICIES[0], REFS[0]
    rates, logp, pairs = preference @ policy, np.log(policy), ordered_pairs(5)
    drawn = policy[pairs].prod(-1) * preference[pairs[:, 0], pairs[:, 1]]

    def total(logits):  # Five losses of five policies: the sum is smallest where each of them is.
        x = jax.nn.log_softmax(logits.reshape(5, 5))
        pulls = magnetic_kl_loss(x[2], np.log(ref), logp, beta=BETA, step_size=STEP)
        return (
            jnp.sum(dno_loss(x[0][pairs], logp[pairs], rates[pairs], beta=BETA))
            + drawn @ inpo_loss(x[1][pairs], np.log(ref)[pairs], logp[pairs], beta=BETA, eta=ETA)
            + (pulls - jnp.exp(x[2]) @ rates)
            + policy @ sppo_loss(x[3], logp, rates, beta=BETA)
            # The printed target eta P - 1/2 is that of win rates lower by (beta - 1) / 2.
            + policy @ sppo_loss(x[4], logp, rates - (BETA - 1) / 2, beta=BETA)
        )

    dno, inpo, magnetic, sppo, printed = special.softmax(minimiser(total, np.tile(logp, 5)).reshape(5, 5), -1)
    weak = 20.0

    @jax.jit
    def tabular(policy, preference, ref):
        reward = game.win_rates(preference, policy) - BETA * (jnp.log(policy) - jnp.log(ref))
        return (
            game.mirror_descent(policy, preference, beta=BETA),
            game.inpo(policy, preference, ref=ref, beta=BETA, eta=ETA),
            game.magnetic_mirror_descent(policy, preference, ref=ref, beta=BETA, step_size=STEP),
            game.sppo(policy, preference, beta=BETA),
            bandit.tilted(policy, reward, beta=BETA + 1 / STEP),
            game.inpo(policy, preference, ref=ref, beta=BETA, eta=BETA + 1 / STEP),
        )

    exact = [np.asarray(x) for x in tabular(*map(jnp.asarray, (policy, preference, ref)))]
    mirror, magnet, fitted, same = exact[0], exact[2], exact[3], exact[4:]
    gap, short = (float(bandit.total_variation(x, mirror)) for x in (printed, fitted))
    excess = bandit.log_partition(policy, rates, beta=weak) - 1 / (2 * weak)
    return [
        at_most("The losses of DNO, INPO and MPO are smallest at their tabular steps (DNO: pi_t tilted by win rates)",
                "largest |pi - that|, a random game of 5 arms",
                np.abs(np.stack([dno, inpo, magnetic]) - exact[:3]).max(),
                1e-8),
        at_most("Magnetic mirror descent is mirror descent on the regularised game at step size s / (1 + s beta), and "
                "INPO at eta = beta + 1/s", "largest difference of the three", np.abs(np.stack(same) - magnet).max(),
                1e-14),
        holds("SPPO makes the step of DNO by regressing log(pi / pi_t) on eta P - 1/2, as the tutorial prints",
              f"TV of its minimiser and DNO's step, eta = {1 / BETA:g}", gap, "0", gap > 0.1, verdict="refuted"),
        equal("The target of its paper, eta (P - 1/2), is right to first order: log Z = eta/2 + eta^2 Var/2 + ...",
              f"(log Z - eta/2) / (eta^2 Var / 2), eta = {1 / weak:g}",
              excess * 2 * weak**2 / (policy @ rates**2 - 0.25), 1, atol=0.02),
        at_most(f"A normalised policy fits it as u + c e^u = eta (P - 1/2), u = log(pi / pi_t): {short:.3f} from DNO",
                f"largest |pi - that|, eta = {1 / BETA:g}", np.abs(sppo - fitted).max(), 1e-8, verdict="sharpened"),
    ]  # fmt: skip


@functools.lru_cache
def _circling() -> tuple[np.ndarray, np.ndarray]:
    """Mirror descent on rock, paper, scissors at two step sizes: policies ``[20001, 2, 3]``, and KL from the winner.

    Step sizes are 0.1 and 0.001 for the payoff in [-1, 1].
    """
    betas, preference = jnp.array([5.0, 500.0]), game.from_payoff(CYCLE)
    run = jax.jit(lambda p: game.iterate(lambda p, _: game.mirror_descent(p, preference, beta=betas), p, 20_000))
    path = np.asarray(run(jnp.tile(START, (2, 1))))
    return path, _away(CENTRE, path)


def _away(target: Any, path: np.ndarray) -> np.ndarray:
    return np.asarray(_kl(np.broadcast_to(target, path.shape), path))


def _circles() -> list[Claim]:
    path, away = _circling()
    preference = game.from_payoff(CYCLE)
    last, average = (float(_exploitability(preference, p)) for p in (path[5000, 0], path[:5000, 0].mean(0)))
    rounds, betas = np.arange(1, 1001), jnp.array([20.0, 10.0, 5.0, 2.0, 1.0, 0.5, 0.25, 0.1])
    run = jax.jit(lambda p: game.iterate(lambda p, _: game.mirror_descent(p, GAMES, beta=betas), p, 1000))
    averages = np.cumsum(np.asarray(run(jnp.full((8, 5), 0.2)))[:-1], axis=0) / rounds[:, None, None]
    bound = jax.jit(jax.vmap(lambda b: game.mirror_descent_bound(rounds, arms=5, beta=b), out_axes=1))(betas)
    excess = np.asarray(_exploitability(GAMES, averages)) / np.asarray(bound)
    return [
        equal(f"The last policy of mirror descent moves away: rock, paper, scissors, from KL {away[0, 0]:.4f}",
              "KL(winner || pi_k), nats, k = 5000, step 0.1", away[5000, 0], 2.863, rtol=2e-3),
        at_most("It never comes nearer: each step adds log E exp((P pi - 1/2) / beta) >= 0 to KL",
                "largest decrease of KL in a step", np.maximum(-np.diff(away[:5000, 0]), 0).max(), 0,
                verdict="sharpened"),
        equal("In the limit of small steps it circles at a constant distance (Poincare recurrence)",
              "KL(winner || pi_k) / KL(winner || pi_0), step 0.001, k = 20,000",
              away[-1, 1] / away[0, 1], 1.006, atol=5e-4),
        at_most("The average of T policies is at most beta log(n)/T + 1/(8 beta) exploitable: 8 games and step sizes",
                "largest exploitability / bound, T up to 1000", excess.max(), 1),
        at_most(f"The average arrives: in rock, paper, scissors the last policy is {last:.3f} exploitable",
                "exploitability of the average, k = 5000", average, 5e-3),
    ]  # fmt: skip


@functools.lru_cache
def _with_magnet() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Magnetic mirror descent on rock, paper, scissors: strengths, step sizes, and KL from the winner ``[3, 1001]``."""
    preference, beta, step = game.from_payoff(CYCLE), np.array([0.05, 0.25, 0.05]), np.array([0.2, 1.0, 10.0])

    def run(beta, step):
        update = functools.partial(game.magnetic_mirror_descent, ref=jnp.asarray(CENTRE), beta=beta, step_size=step)
        return game.iterate(lambda p, _: update(p, preference), jnp.asarray(START), 1000)

    return beta, step, _away(CENTRE, np.asarray(jax.jit(jax.vmap(run))(beta, step)))


def _magnetic() -> list[Claim]:
    beta, step, away = _with_magnet()

    def run(p):
        update = functools.partial(game.magnetic_mirror_descent, ref=jnp.asarray(REFS), beta=0.1, step_size=0.4)
        return game.iterate(lambda p, _: update(p, GAMES), p, 300)

    distance = _away(_equilibrium(GAMES, REFS, 0.1), np.asarray(jax.jit(run)(jnp.asarray(POLICIES))))
    falls = functools.partial(game.magnetic_mirror_descent_bound, steps=np.arange(301), beta=0.1, step_size=0.4)
    bound = np.asarray(jax.jit(jax.vmap(falls, out_axes=1))(distance[0]))
    # Linearised at the winner the map is a rotation: |1 + i s / sqrt(12)|^2 / (1 + beta s)^2 is what KL shrinks by.
    rate = np.log1p(step**2 / 12) - 2 * np.log1p(beta * step)
    return [
        at_most("Magnetic mirror descent obeys KL_k <= KL_0 / (1 + s beta)^k at the longest step allowed, s = 4 beta",
                "largest KL / bound, k = 1 to 100, 8 games", (distance / bound)[1:101].max(), 1),
        equal("In rock, paper, scissors its rate is log(1 + s^2/12) - 2 log(1 + s beta), where the bound says "
              f"{-np.log1p(0.01):.4f}", "change of log KL a step, beta 0.05, s 0.2",
              np.log(away[0, 400] / away[0, 300]) / 100,
              rate[0], rtol=2e-3, verdict="sharpened"),
        holds("A step 50 times too long (s = 200 beta) does not converge: the same formula gives a rate above 0",
              "least KL over steps 500 to 1000, nats", away[2, 500:].min(), "> 1",
              rate[2] > 0 and away[2, 500:].min() > 1),
    ]  # fmt: skip


@functools.lru_cache
def _approach(steps: int, beta: float = 0.1) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Nash-MD and INPO at their schedule: KL from the regularised equilibrium and its bound, ``[steps, 8]`` each."""
    methods: dict[str, Callable] = {"Nash-MD": game.nash_md, "INPO": game.inpo}

    def run(policy):
        def step(paths, t):
            eta = game.harmonic_eta(t, beta=beta)
            return {k: f(paths[k], GAMES, ref=jnp.asarray(REFS), beta=beta, eta=eta) for k, f in methods.items()}

        return game.iterate(step, dict.fromkeys(methods, policy), steps)

    paths, target = jax.jit(run)(jnp.asarray(POLICIES)), _equilibrium(GAMES, REFS, beta)
    rounds = np.arange(1, steps + 1)
    furthest = np.abs(np.log(paths["INPO"][1:]) - np.log(REFS)).max()

    @jax.jit
    def bounds_of(furthest):
        inpo = game.inpo_bound(rounds, beta=beta, log_ratio=furthest)
        return {"Nash-MD": game.nash_md_bound(rounds, beta=beta), "INPO": inpo}

    bounds = bounds_of(furthest)
    return {k: (_away(target, np.asarray(paths[k][1:])), np.asarray(bounds[k])[:, None]) for k in methods}


def _nash_md_constant(beta: float = 0.1) -> np.ndarray:
    """Limit of ``T^2 KL`` under Nash-MD at its schedule, by linearising it at the equilibrium, ``[8]``.

    With J the covariance of an arm's indicator, c, how far the log-odds are off times T, solves
    ``(I - 2 P J / beta) c = -(4 / beta^2) P J P pi*``.
    """
    target = np.asarray(_equilibrium(GAMES, REFS, beta))
    out = []
    for p, q in zip(GAMES - 0.5, target, strict=True):
        spread = np.diag(q) - np.outer(q, q)
        c = np.linalg.solve(np.eye(5) - 2 / beta * p @ spread, -4 / beta**2 * p @ spread @ p @ q)
        out.append(c @ spread @ c / 2)
    return np.array(out)


def _harmonic(steps: int) -> list[Claim]:
    found = _approach(steps)
    constant = _nash_md_constant()
    away = {k: v for k, (v, _) in found.items()}
    # A window of one octave averages over the turns around the equilibrium.
    slope = {k: np.polyfit(np.log(np.arange(steps // 8, steps)), np.log(v[steps // 8 :]).mean(-1), 1)[0]
             for k, v in away.items()}  # fmt: skip
    scaled = steps**2 * away["Nash-MD"][-1] / constant
    return [
        at_most("Nash-MD and INPO are within 8 / (tau^2 (T + 1)) and 32 C^2 / (tau^2 (T + 1)) of their equilibrium",
                f"largest KL / bound, 8 games, tau 0.1, T up to {steps}",
                max((v / b).max() for v, b in found.values()), 1),
        equal("Without noise Nash-MD is faster, T^-2, with the constant that linearising it gives",
              f"T^2 KL / constant, mean of 8 games, T = {steps}", scaled.mean(), 1, rtol=30 / steps,
              verdict="sharpened"),
        equal("Without noise INPO is faster still, T^-4: the equilibrium is a fixed point of its step at every eta",
              f"slope of log KL, T = {steps // 8} to {steps}", slope["INPO"], -4, atol=0.1, verdict="sharpened"),
    ]  # fmt: skip


@functools.lru_cache
def _moving() -> tuple[np.ndarray, np.ndarray]:
    """KL from the winner and exploitability by round, for exact equilibria and for 150 steps each, ``[2, 61, 8]``."""
    winner = game.minmax_winner(GAMES)

    def run(magnet):
        move = functools.partial(game.mpo, beta=MAGNET, step_size=4 * MAGNET, steps=150)
        return game.iterate(lambda m, _: move(m, GAMES), magnet, ROUNDS)

    paths = np.stack([_magnets(GAMES, REFS, ROUNDS), jax.jit(run)(jnp.asarray(REFS))])
    return _away(winner.policy, paths), np.asarray(_exploitability(GAMES, paths))


UNEVEN = np.array([0.4, 0.3, 0.3])
"""A magnet for rock, paper, scissors, whose winner is even."""


@jax.jit
def _regularised(preference: Any, magnet: Any, beta: Any) -> Any:
    return game.regularised_equilibrium(preference, magnet, beta=beta)


def weaker_magnets(rng: np.random.Generator, games: int) -> tuple[int, float]:
    """What halving the strength of a fixed magnet from 0.8 to 0.05 does in random games of five arms.

    Returns:
      After how many halvings the equilibrium was more exploitable, and the largest ratio of its KL from the winner to
      the KL before.
    """
    noise = rng.normal(size=(games, 5, 5))
    preference = (1 + np.tanh(noise - np.swapaxes(noise, -1, -2))) / 2
    magnet = rng.dirichlet(3 * np.ones(5), size=games)
    found = jax.jit(jax.vmap(lambda beta: game.regularised_equilibrium(preference, magnet, beta=jnp.full(games, beta))))
    policies = np.asarray(found(0.8 / 2.0 ** jnp.arange(5)))
    exploitable = np.asarray(_exploitability(preference, policies))
    away = _away(game.minmax_winner(preference).policy, policies)
    return int((exploitable[1:] > exploitable[:-1]).sum()), float((away[1:] / away[:-1]).max())


def _resets() -> list[Claim]:
    away, exploitability = _moving()
    # Once it has arrived, rounding is all that changes.
    ratio = (away[:, 1:] / away[:, :-1])[away[:, :-1] > 1e-9].max()
    grown, nearer = weaker_magnets(np.random.default_rng(0), 100)
    uneven = [
        float(_exploitability(game.from_payoff(CYCLE), _regularised(game.from_payoff(CYCLE), UNEVEN, b)))
        for b in (3.2, 1.6)
    ]
    return [
        holds("With a fixed magnet, the weaker it is the less exploitable the equilibrium is",
              "exploitability at beta 3.2, 1.6; rock, paper, scissors, magnet (.4, .3, .3)",
              ", ".join(f"{x:.5f}" for x in uneven), "growing", uneven[0] < uneven[1], verdict="refuted"),
        holds("In most random games it is",
              "halvings of beta, 0.8 to 0.05, after which exploitability is larger, of 400 in 100 random games",
              int(grown), "above 0, below 40", 0 < grown < 40, verdict="sharpened"),
        at_most("The weaker the fixed magnet the nearer the equilibrium is to the game's own in KL",
                "largest KL(winner || pi) at beta / at 2 beta, in the same 100 games", nearer, 1, verdict="sharpened"),
        at_most("Moved to each equilibrium in turn, the magnet comes nearer to the winners in every round",
                "largest KL(winner || pi) / that of the round before, exact or 150 steps", ratio, 1),
        at_most(f"After {ROUNDS} rounds of 150 steps the policy is a winner of the game itself, where after one it is "
                f"{exploitability[1, 1].max():.3f} exploitable", "largest exploitability, 8 games",
                exploitability[1, -1].max(), 1e-6),
    ]  # fmt: skip


def draw_circles():
    """Paths over the simplex of rock, paper, scissors."""
    path = _circling()[0][:700, 0]
    average = np.cumsum(path, axis=0) / np.arange(1, len(path) + 1)[:, None]
    preference = game.from_payoff(CYCLE)
    update = functools.partial(game.magnetic_mirror_descent, ref=jnp.asarray(CENTRE), beta=0.05, step_size=0.2)
    magnetic = np.asarray(jax.jit(lambda p: game.iterate(lambda p, _: update(p, preference), p, 300))(START))
    corners = np.array([[0.5, np.sqrt(0.75)], [0.0, 0.0], [1.0, 0.0]])
    figure, ax = plt.subplots(figsize=(5.2, 4.4))
    ax.plot(*np.concatenate([corners, corners[:1]]).T, color="0.6", lw=1)
    shown = (("mirror descent, last", path), ("mirror descent, average", average),
             ("magnetic mirror descent", magnetic))  # fmt: skip
    for colour, (label, points) in zip(PALETTE, shown, strict=False):
        ax.plot(*(points @ corners).T, "o", ms=2, mew=0, color=colour)
        ax.plot([], [], "o", ms=4, color=colour, label=label)
    ax.plot(*(START @ corners), "s", ms=5, color="black", label="start")
    ax.plot(*(CENTRE @ corners), "+", ms=9, mew=1.5, color="black", label="minmax winner")
    for name, (x, y), vertical in zip(("rock", "paper", "scissors"), corners, ("bottom", "top", "top"), strict=True):
        ax.annotate(
            name, (x, y), (0, 4 if vertical == "bottom" else -4), textcoords="offset points", ha="center", va=vertical
        )
    ax.set_aspect("equal")
    ax.set_axis_off()
    ax.set_ylim(-0.08, 0.95)
    ax.set_xlim(-0.08, 1.08)
    ax.legend(fontsize=8, loc="upper right", bbox_to_anchor=(1.12, 1.0))
    return figure


def draw_distances():
    """Distance to the equilibrium against the steps taken."""
    figure, axes = plt.subplots(1, 3, figsize=(9.6, 3.2), dpi=95)
    beta, step, away = _with_magnet()
    circling = _circling()[1][:401, 0]
    k = np.arange(401)
    axes[0].semilogy(k[::16], circling[::16], "o", ms=3, color=PALETTE[0], label="mirror descent")
    for colour, b, s, kl in zip(PALETTE[1:], beta[:2], step[:2], away, strict=False):
        near = k[kl[:401] > 1e-9]
        every = max(len(near) // 25, 1)
        axes[0].semilogy(
            near[::every], kl[near[::every]], "o", ms=3, color=colour, label=rf"magnetic, $\beta$ = {b:g}, s = {s:g}"
        )
        axes[0].semilogy(
            near, game.magnetic_mirror_descent_bound(kl[0], near, beta=b, step_size=s), "--", lw=1, color=colour
        )
        rate = np.log1p(s**2 / 12) - 2 * np.log1p(b * s)
        axes[0].semilogy(near, kl[0] * np.exp(rate * near), "-", lw=1, color=colour)
    axes[0].set_title("rock, paper, scissors: - - bound, — linearised", fontsize=9)
    axes[0].set_ylabel("KL(equilibrium || policy), nats")
    axes[0].set_ylim(1e-8, 300)
    steps = 1000
    rounds = np.arange(1, steps + 1)
    shown = np.unique(np.geomspace(1, steps, 26).astype(int)) - 1
    for colour, (name, (kl, bound)) in zip(PALETTE, _approach(steps).items(), strict=False):
        axes[1].loglog(rounds[shown], kl[shown, 0], "o", ms=3, color=colour, label=name)
        axes[1].loglog(rounds, bound[:, 0], "--", lw=1, color=colour)
    axes[1].loglog(rounds, _nash_md_constant()[0] / rounds**2, "-", lw=1, color=PALETTE[0])
    axes[1].set_ylabel("KL(equilibrium || policy), nats")
    axes[1].set_title(r"one of 8 games, $\tau$ = 0.1: - - bound, — $C / T^2$", fontsize=9)
    number = np.arange(ROUNDS + 1)
    for colour, row in zip(PALETTE, _moving()[1][1].T[:3], strict=False):
        axes[2].semilogy(number[row > 1e-12], row[row > 1e-12], "o", ms=3, color=colour)
    axes[2].set_ylabel("exploitability, win probability")
    axes[2].set_title(rf"moving magnet, $\beta$ = {MAGNET:g}, three games", fontsize=9)
    for ax, label in zip(axes, ("step", "step T", "magnets so far"), strict=True):
        ax.set_xlabel(label)
    axes[0].legend(fontsize=8, loc="upper right")
    axes[1].legend(fontsize=8, loc="lower left")
    return figure


FAMILY = Family(
    name="games",
    title="In games of preference the last policy arrives only with a magnet",
    text="""
Preferences that run in a circle have no best completion, and what replaces it is a minmax winner: a policy that
nothing beats more than half of the time. Methods of self-play tilt the present policy by its win rate against itself.
Here each of their losses is minimised exactly and compared with its tabular step, and the steps are followed for
thousands of rounds. Strengths `beta`, `tau`, `eta` and exploitability are in units of win probability.

Plain tilting (SPO, SPPO, DNO) spirals outwards and only its average arrives. A pull to a fixed magnet (MMD, Nash-MD,
INPO) makes the last policy arrive at a regularised equilibrium, faster than the published bounds; moving the magnet to
it again and again (MPO) reaches a winner of the game itself.
""",
    claims=claims,
    figures={"circles": draw_circles, "distances": draw_distances},
    sources=(
        "Wang, Ma & Yang, 2025 (tutorial at ICML: Alignment Methods for Language Models)",
        "Swamy et al., 2024 (SPO), [arXiv:2401.04056](https://arxiv.org/abs/2401.04056)",
        "Wu et al., 2024 (SPPO), [arXiv:2405.00675](https://arxiv.org/abs/2405.00675)",
        "Rosset et al., 2024 (DNO), [arXiv:2404.03715](https://arxiv.org/abs/2404.03715)",
        "Zhang et al., 2024 (INPO), [arXiv:2407.00617](https://arxiv.org/abs/2407.00617)",
        "Munos et al., 2023 (Nash-MD), [arXiv:2312.00886](https://arxiv.org/abs/2312.00886)",
        "Sokota et al., 2022 (MMD), [arXiv:2206.05825](https://arxiv.org/abs/2206.05825)",
        "Wang et al., 2024 (MPO), [arXiv:2410.16714](https://arxiv.org/abs/2410.16714)",
    ),
)

if __name__ == "__main__":
    main(FAMILY)
