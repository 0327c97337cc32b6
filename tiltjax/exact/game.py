"""Games of preference small enough to solve: winners, equilibria, and self-play one exact step at a time.

``preference[i, j]`` is the probability that arm i is preferred to arm j; it and ``preference[j, i]`` add up to 1. A
policy is a distribution over the n arms, its reward the win rate against an opponent, and rewards, ``beta``, ``eta``
and exploitability are all in units of win probability. A paper that plays the skew payoff ``A = 2 P - 1`` has the same
updates at twice these strengths, and twice these values.

Every update here is a tilt: the best reply to an opponent under KL terms to a reference (the magnet), to the present
policy, or to both. Strengths and step sizes are those of the losses that the updates minimise exactly
(`tiltjax.losses.game`, `tiltjax.losses.regression`). ``jax.enable_x64(True)`` makes them exact to about 1e-15.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tiltjax.exact import bandit
from tiltjax.losses.game import geometric_mixture_logits
from tiltjax.ops.checks import check_at_least, check_positive
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Bool, Float, Int, Numeric

__all__ = [
    "MinmaxWinner",
    "bradley_terry",
    "check_preference",
    "copeland_score",
    "copeland_winners",
    "dno",
    "exploitability",
    "from_payoff",
    "harmonic_eta",
    "inpo",
    "inpo_bound",
    "iterate",
    "magnetic_mirror_descent",
    "magnetic_mirror_descent_bound",
    "magnetic_tilt",
    "minmax_winner",
    "mirror_descent",
    "mirror_descent_bound",
    "mpo",
    "nash_md",
    "nash_md_bound",
    "regularised_equilibrium",
    "sppo",
    "win_rates",
]

_Matrix = Float[Array, "*#batch n n"]
_Policy = Float[Array, "*batch n"]
_Strength = Numeric | Float[Array, "*batch"]
_Step = int | Int[Array, ""] | Int[Array, " steps"]


def check_preference(preference: _Matrix, *, tol: float = 1e-6) -> None:
    """Raises ValueError unless ``P_ij + P_ji = 1`` and ``0 <= P_ij <= 1``, or the matrix is traced.

    Args:
      preference: ``[*batch, n, n]``.
      tol: Largest deviation that is taken for rounding.
    """
    if isinstance(preference, jax.core.Tracer):
        return
    p = np.asarray(preference, np.float64)
    wrong = ~((np.abs(p + np.swapaxes(p, -1, -2) - 1) <= tol) & (p >= -tol) & (p <= 1 + tol))
    if wrong.any():
        at = tuple(int(i) for i in np.argwhere(wrong)[0])
        raise ValueError(
            f"preference must lie in [0, 1] and add up to 1 with its transpose, got {p[at]!r} at {at} "
            f"and {np.swapaxes(p, -1, -2)[at]!r} across"
        )


def bradley_terry(reward: Float[Array, "*batch n"]) -> Float[Array, "*batch n n"]:
    """Preferences of Bradley and Terry: ``P_ij = sigmoid(r_i - r_j)``.

    Args:
      reward: Reward of every arm, in nats of log-odds.

    Returns:
      ``[*batch, n, n]``.

    Example:
      >>> bradley_terry(jnp.log(jnp.array([1.0, 3.0]))).round(4).tolist()
      [[0.5, 0.25], [0.75, 0.5]]
    """
    reward = as_float(reward)
    return jax.nn.sigmoid(reward[..., :, None] - reward[..., None, :])


def from_payoff(payoff: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Preferences ``P = (1 + A) / 2`` of a skew payoff ``A`` in [-1, 1].

    Args:
      payoff: What row i wins from column j, ``A_ij = -A_ji``.

    Returns:
      ``[*batch, n, n]``.

    Raises:
      ValueError: If a payoff that is not traced is not skew, or leaves [-1, 1].
    """
    preference = (1 + as_float(payoff)) / 2
    check_preference(preference)
    return preference


def win_rates(preference: _Matrix, opponent: _Policy) -> Float[Array, "... n"]:
    """Chance of every arm to be preferred to a draw from the opponent: ``P q``, ``[*batch, n]``."""
    return jnp.einsum("...ij,...j->...i", as_float(preference), as_float(opponent))


def exploitability(preference: _Matrix, policy: _Policy) -> Float[Array, "..."]:
    """How much more than a half the best arm wins against the policy: ``max_i (P q)_i - 1/2``, 0 at a minmax winner.

    Args:
      preference: ``[*batch, n, n]``; one matrix serves many policies.
      policy: ``[*batch, n]``.

    Returns:
      ``[*batch]``, in units of win probability.
    """
    return jnp.max(_centred_win_rates(preference, policy), axis=-1)


def copeland_score(preference: _Matrix) -> Float[Array, "*batch n"]:
    """Arms that each arm beats by majority, less arms that beat it: ``sum_j sign(P_ij - 1/2)``."""
    preference = as_float(preference)
    return jnp.sum(jnp.sign(preference - jnp.swapaxes(preference, -1, -2)), axis=-1)


def copeland_winners(preference: _Matrix) -> Bool[Array, "*batch n"]:
    """True for the arms of the highest `copeland_score`: often several.

    Example:
      >>> copeland_winners(bradley_terry(jnp.array([0.0, 2.0, 2.0]))).tolist()
      [False, True, True]
    """
    score = copeland_score(preference)
    return score == jnp.max(score, axis=-1, keepdims=True)


@chex.dataclass(frozen=True, mappable_dataclass=False)
class MinmaxWinner:
    """A policy that no arm beats more than half of the time: a symmetric Nash equilibrium, the von Neumann winner.

    Attributes:
      policy: One such policy, ``[*batch, n]``; a vertex of the set of them.
      value: Its worst win rate, ``[*batch]``; 1/2 by the minimax theorem.
      low: Least probability of every arm over all such policies, ``[*batch, n]``.
      high: Greatest, ``[*batch, n]``.
    """

    policy: Float[Array, "*batch n"]
    value: Float[Array, "*batch"]
    low: Float[Array, "*batch n"]
    high: Float[Array, "*batch n"]

    @property
    def unique(self) -> Bool[Array, "*batch"]:
        """Whether there is one such policy only (to the solver's 1e-6)."""
        return np.asarray(np.max(self.high - self.low, axis=-1) < 1e-6)


def minmax_winner(preference: Float[Array, "*batch n n"]) -> MinmaxWinner:
    r"""Minmax winner by linear programming, and the range of all of them. On the host, in float64: not for `jax.jit`.

    .. math:: \max_q \min_j \sum_i q_i P_{ij}

    One exists always; two clones, or arms that all tie, make a continuum. Two linear programs, of ``n + 1`` and
    ``2 n^2`` variables.

    Args:
      preference: ``[*batch, n, n]``, concrete.

    Returns:
      `MinmaxWinner`, of NumPy arrays.

    Raises:
      ValueError: If ``preference`` is not one; see `check_preference`.

    Example:
      >>> found = minmax_winner(bradley_terry(jnp.array([0.0, 2.0, 1.0])))
      >>> found.policy.round(6).tolist(), float(found.value.round(6)), bool(found.unique)
      ([0.0, 1.0, 0.0], 0.5, True)

    References:
      Dudik et al., 2015, arXiv:1502.06362 (the von Neumann winner).
    """
    from scipy import sparse
    from scipy.optimize import linprog

    check_preference(preference)

    def solve(p):
        n, skew = len(p), p - p.T
        tight = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
        best = linprog(
            np.append(np.zeros(n), -1),
            A_ub=np.hstack([-skew.T, np.ones((n, 1))]),
            b_ub=np.zeros(n),
            A_eq=np.append(np.ones(n), 0)[None],
            b_eq=[1],
            bounds=[*[(0, 1)] * n, (-1, 1)],
            options=tight,
        )
        # Against a skew payoff every winner has value 0 exactly: the set is {q : A q <= 0}.
        # Its lowest and highest entries are so many independent programs, which the solver is handed as one.
        each = sparse.eye_array(2 * n)
        ends = linprog(
            np.concatenate([np.eye(n), -np.eye(n)]).ravel(),
            A_ub=sparse.kron(each, skew, format="csr"),
            b_ub=np.zeros(2 * n * n),
            A_eq=sparse.kron(each, np.ones((1, n)), format="csr"),
            b_eq=np.ones(2 * n),
            bounds=(0, 1),
            options=tight,
        )
        low, high = np.diagonal(ends.x.reshape(2, n, n), axis1=1, axis2=2)
        return best.x[:n], (1 + best.x[n]) / 2, low, high

    solve_all = np.vectorize(solve, signature="(n,n)->(n),(),(n),(n)", otypes=[np.float64] * 4)
    policy, value, low, high = solve_all(np.asarray(preference, np.float64))
    return MinmaxWinner(policy=policy, value=np.asarray(value), low=low, high=high)


def regularised_equilibrium(preference: _Matrix, ref: _Policy, *, beta: _Strength) -> _Policy:
    r"""Equilibrium of the game in which both players pay ``beta`` per nat of KL to a reference.

    .. math:: \pi = \frac{\mathrm{ref} \cdot \exp(P \pi / \beta)}{Z}

    A tilt of the reference by its own win rates. There is exactly one: written in the exponents the fixed point has the
    derivative ``I - A D`` with ``A`` skew and ``D`` positive semi-definite, which is never singular, so damped Newton
    steps descend from anywhere; ``beta`` is lowered in stages on the way.

    Args:
      preference: ``[*batch, n, n]``.
      ref: Reference of both players (the magnet), ``[*batch, n]``; arms of probability 0 stay out.
      beta: Strength of the KL term, > 0; a number, or one per row.

    Returns:
      Policy, ``[*batch, n]``.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Munos et al., 2023, arXiv:2312.00886 (existence and uniqueness).
    """
    check_positive("beta", beta)
    ref = as_float(ref)
    fractions = jnp.asarray(0.5, ref.dtype) ** jnp.arange(40)

    def row(preference, ref, beta):
        def newton(state):
            x, miss, _, count, now = state

            def gap(x):
                return x - _centred_win_rates(preference, bandit.tilted(ref, x, beta=1.0)) / now

            tries = x[None] - fractions[:, None] * jnp.linalg.solve(jax.jacfwd(gap)(x), gap(x))[None]
            misses = jnp.max(jnp.abs(jax.vmap(gap)(tries)), axis=-1)
            best = jnp.argmin(misses)
            better = misses[best] < miss
            return jnp.where(better, tries[best], x), jnp.minimum(miss, misses[best]), better, count + 1, now

        def stage(k, x):
            # From a strength at which the reference is nearly the answer down to the one asked for.
            now = beta * jnp.maximum(1 / beta, 1) ** (1 - k / stages)
            state = x, jnp.asarray(jnp.inf, x.dtype), jnp.asarray(True), 0, now
            return jax.lax.while_loop(lambda s: s[2] & (s[3] < 100), newton, state)[0]

        stages = jnp.ceil(jnp.maximum(-jnp.log2(beta), 0)).astype(jnp.int32) + 1
        x = jax.lax.fori_loop(1, stages + 1, stage, jnp.zeros_like(ref))
        return bandit.tilted(ref, x, beta=1.0)

    return jnp.vectorize(row, signature="(n,n),(n),()->(n)")(as_float(preference), ref, jnp.asarray(beta, ref.dtype))


def magnetic_tilt(
    policy: _Policy, reward: _Policy, *, ref: _Policy, beta: Numeric, step_size: Numeric
) -> Float[Array, "*batch n"]:
    r"""One proximal step: the best reply to a reward under two KL terms, one to a magnet and one to the present policy.

    .. math:: \arg\max_q\; E_q r - \beta\, \mathrm{KL}(q \,\|\, \mathrm{ref}) - \tfrac1s\, \mathrm{KL}(q \,\|\, \pi)
              = \frac{(\pi\, \mathrm{ref}^{\beta s} e^{s r})^{1/(1 + \beta s)}}{Z}

    Args:
      policy: The present policy, ``[*batch, n]``.
      reward: Reward of every arm, ``[*batch, n]``, in the units of ``beta``.
      ref: The magnet, ``[*batch, n]``.
      beta: Strength of the KL term to the magnet, >= 0.
      step_size: 1 / strength of the KL term to the present policy, > 0.

    Returns:
      Policy, ``[*batch, n]``.

    Raises:
      ValueError: If ``beta`` is a negative Python number, or ``step_size`` one that is not positive and finite.
    """
    check_at_least("beta", beta, 0)
    check_positive("step_size", step_size)
    share = beta * step_size / (1 + beta * step_size)
    return bandit.tilted(_mixture(policy, ref, share), reward, beta=beta + 1 / step_size)


def mirror_descent(policy: _Policy, preference: _Matrix, *, beta: _Strength) -> _Policy:
    r"""Multiplicative weights in self-play: the policy tilted by its own win rates.

    .. math:: \pi_{t+1} = \frac{\pi_t \exp(P \pi_t / \beta)}{Z}

    The average policy approaches a minmax winner (`mirror_descent_bound`); where that is interior, the policy itself
    circles around it, ever farther away. Self-play preference optimisation makes this step, with an approximate
    normaliser: see `sppo`.

    Args:
      policy: ``[*batch, n]``.
      preference: ``[*batch, n, n]``.
      beta: Strength of the KL term to the present policy, > 0: 1 / step size; a number, or one per row.

    Returns:
      The next policy, ``[*batch, n]``.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> p = mirror_descent(jnp.array([0.5, 0.5]), jnp.array([[0.5, 1.0], [0.0, 0.5]]), beta=0.5 / jnp.log(3.0))
      >>> [round(float(x), 4) for x in p]  # the win rates are 3/4 and 1/4
      [0.75, 0.25]

    References:
      Freund and Schapire, 1999, Games and Economic Behavior 29.
    """
    check_positive("beta", beta)
    return bandit.tilted(policy, win_rates(preference, policy), beta=beta)


def dno(policy: _Policy, preference: _Matrix, *, beta: _Strength) -> _Policy:
    """Direct Nash optimisation: the minimiser of its loss over pairs, which is `mirror_descent` exactly.

    The loss classifies pairs with the odds of their win rates against the present policy; log-ratios that are the
    differences of those win rates over ``beta`` fit every pair, and the normaliser cancels.

    Args:
      policy: ``[*batch, n]``.
      preference: ``[*batch, n, n]``.
      beta: Strength of the KL term to the present policy, > 0; the loss multiplies its log-ratios by it.

    Returns:
      The next policy, ``[*batch, n]``.

    References:
      Rosset et al., 2024, arXiv:2404.03715, Algorithm 1.
    """
    return mirror_descent(policy, preference, beta=beta)


def sppo(policy: _Policy, preference: _Matrix, *, beta: _Strength) -> _Policy:
    r"""Self-play preference optimisation: the minimiser of its squared loss over candidates of the present policy.

    .. math:: \arg\min_\pi E_{\pi_t} \left( \log \frac{\pi}{\pi_t} - \frac{P \pi_t - 1/2}{\beta} \right)^2, \qquad
              u + c\, e^u = \frac{P \pi_t - 1/2}{\beta}, \quad u = \log \frac{\pi}{\pi_t}

    The loss puts :math:`1/(2 \beta)` for the log of the normaliser, short of it by half the variance of the win rates
    over :math:`\beta^2`. A normalised policy cannot follow, and the multiplier ``c >= 0`` of its constraint says by how
    much: the step is `mirror_descent` for large ``beta`` only.

    Args:
      policy: ``[*batch, n]``.
      preference: ``[*batch, n, n]``.
      beta: Strength of the KL term to the present policy, > 0: 1 / the paper's, whose code has 1e-3 here.

    Returns:
      The next policy, ``[*batch, n]``.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Wu et al., 2024, arXiv:2405.00675, Eqs. 4.4-4.7.
    """
    check_positive("beta", beta)
    policy = as_float(policy)
    target = _centred_win_rates(preference, policy) / _column(beta)

    def log_ratio(c):
        c = c[..., None]
        # Newton's method for a convex increasing function, from above the root.
        above = jnp.log(jnp.maximum(target, jnp.finfo(policy.dtype).tiny)) - jnp.log(c)
        start = jnp.where(target > c, jnp.minimum(target, above), jnp.minimum(target, 0))

        def newton(_, u):
            slope = c * jnp.exp(u)
            return u - (u + slope - target) / (1 + slope)

        return jax.lax.fori_loop(0, 12, newton, start)

    def halve(_, bracket):
        low, high = bracket
        middle = (low + high) / 2
        over = jnp.sum(policy * jnp.exp(log_ratio(middle)), axis=-1) > 1
        return jnp.where(over, middle, low), jnp.where(over, high, middle)

    top = jnp.maximum(jnp.max(target, axis=-1), jnp.finfo(policy.dtype).tiny)
    low, high = jax.lax.fori_loop(0, 80, halve, (jnp.zeros_like(top), top))
    mass = policy * jnp.exp(log_ratio((low + high) / 2))
    return mass / jnp.sum(mass, axis=-1, keepdims=True)


def magnetic_mirror_descent(
    policy: _Policy, preference: _Matrix, *, ref: _Policy, beta: Numeric, step_size: Numeric
) -> Float[Array, "*batch n"]:
    r"""Magnetic mirror descent in self-play: mirror descent with a pull towards a reference.

    .. math:: \pi_{t+1} = \frac{(\pi_t\, \mathrm{ref}^{\beta s} e^{s P \pi_t})^{1/(1 + \beta s)}}{Z}

    Its last iterate converges to the `regularised_equilibrium` at a geometric rate where ``step_size <= 4 beta``
    (`magnetic_mirror_descent_bound`), and may not where the step is longer. It is `inpo` at
    ``eta = beta + 1 / step_size``.

    Args:
      policy: ``[*batch, n]``.
      preference: ``[*batch, n, n]``.
      ref: The magnet, ``[*batch, n]``.
      beta: Strength of the KL term to the magnet, >= 0; ``alpha`` of the paper.
      step_size: > 0; ``eta`` of the paper.

    Returns:
      The next policy, ``[*batch, n]``.

    Raises:
      ValueError: If ``beta`` is a negative Python number, or ``step_size`` one that is not positive and finite.

    References:
      Sokota et al., 2022, arXiv:2206.05825.
    """
    return magnetic_tilt(policy, win_rates(preference, policy), ref=ref, beta=beta, step_size=step_size)


def inpo(policy: _Policy, preference: _Matrix, *, ref: _Policy, beta: Numeric, eta: Numeric) -> _Policy:
    r"""Iterative Nash policy optimisation: the pull towards the reference inside the step.

    .. math:: \pi_{t+1} = \frac{\mathrm{ref}^{\beta/\eta}\, \pi_t^{1 - \beta/\eta}\, \exp(P \pi_t / \eta)}{Z}

    That is `nash_md` but for the opponent, and `magnetic_mirror_descent` at ``step_size = 1 / (eta - beta)``. At
    ``eta = beta`` it is the optimum of IPO against opponents from the present policy, at ``beta = 0`` `mirror_descent`.

    Args:
      policy: ``[*batch, n]``.
      preference: ``[*batch, n, n]``.
      ref: Reference, ``[*batch, n]``.
      beta: Strength of the KL term to the reference, >= 0 (the paper's tau).
      eta: Inverse step size, the strength of both KL terms together, at least ``beta``; `harmonic_eta` is the
        paper's schedule.

    Returns:
      The next policy, ``[*batch, n]``.

    Raises:
      ValueError: If ``beta`` or ``eta`` is a Python number out of its range.

    References:
      Zhang et al., 2024, arXiv:2407.00617.
    """
    _check_strengths(beta, eta)
    return bandit.tilted(_mixture(policy, ref, beta / eta), win_rates(preference, policy), beta=eta)


def nash_md(policy: _Policy, preference: _Matrix, *, ref: _Policy, beta: Numeric, eta: Numeric) -> _Policy:
    r"""Nash mirror descent: the policy's mixture with the reference, tilted by the win rates against that mixture.

    .. math:: m_t = \frac{\pi_t^{1 - \beta/\eta}\, \mathrm{ref}^{\beta/\eta}}{Z}, \qquad
              \pi_{t+1} = \frac{m_t \exp(P m_t / \eta)}{Z}

    Args:
      policy: ``[*batch, n]``.
      preference: ``[*batch, n, n]``.
      ref: Reference, ``[*batch, n]``.
      beta: Strength of the KL term to the reference, >= 0 (the paper's tau).
      eta: Inverse step size, at least ``beta``: 1 / the paper's eta, whose schedule is `harmonic_eta`.

    Returns:
      The next policy, ``[*batch, n]``.

    Raises:
      ValueError: If ``beta`` or ``eta`` is a Python number out of its range.

    References:
      Munos et al., 2023, arXiv:2312.00886.
    """
    _check_strengths(beta, eta)
    opponent = _mixture(policy, ref, beta / eta)
    return mirror_descent(opponent, preference, beta=eta)


def mpo(policy: _Policy, preference: _Matrix, *, beta: Numeric, step_size: Numeric, steps: int) -> _Policy:
    r"""One round of magnetic preference optimisation: the policy becomes the magnet of ``steps`` steps.

    The rounds (`iterate` them) approach a minmax winner of the game itself, with no regularisation left: every
    round that reaches its `regularised_equilibrium` comes nearer to the winners in KL.

    Args:
      policy: ``[*batch, n]``.
      preference: ``[*batch, n, n]``.
      beta: Strength of the KL term to the magnet, > 0; ``alpha`` of the paper.
      step_size: > 0; see `magnetic_mirror_descent`.
      steps: How many steps the magnet stays, at least 1.

    Returns:
      The policy after the round, ``[*batch, n]``.

    Raises:
      ValueError: If ``beta``, ``step_size`` or ``steps`` is a Python number out of its range.

    References:
      Wang et al., 2024, arXiv:2410.16714.
    """
    check_positive("beta", beta)
    check_at_least("steps", steps, 1)

    def step(_, present):
        return magnetic_mirror_descent(present, preference, ref=policy, beta=beta, step_size=step_size)

    policy = as_float(policy)
    return jax.lax.fori_loop(0, steps, step, policy)


def iterate(update: Callable[[Any, Int[Array, ""]], Any], policy: Any, steps: int) -> Any:
    """Applies ``update(policy, step)`` over and over, under `jax.lax.scan`.

    Args:
      update: From a policy and the number of the step (0, 1, ...) to the next policy, of the same shape and type.
      policy: The first policy; any array or pytree.
      steps: How many times, at least 1.

    Returns:
      Every policy, the first one included, along a new leading axis of length ``steps + 1``.

    Raises:
      ValueError: If ``steps`` is below 1.

    Example:
      >>> rock_paper_scissors = from_payoff(jnp.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]))
      >>> start = jnp.array([0.5, 0.3, 0.2])
      >>> path = iterate(lambda p, step: mirror_descent(p, rock_paper_scissors, beta=5.0), start, 5000)
      >>> last, average = exploitability(rock_paper_scissors, jnp.stack([path[-1], path[:-1].mean(0)]))
      >>> bool(last > 0.4), bool(average < 0.01)
      (True, True)
    """
    check_at_least("steps", steps, 1)

    def body(policy, step):
        policy = update(policy, step)
        return policy, policy

    _, path = jax.lax.scan(body, policy, jnp.arange(steps))
    return jax.tree.map(lambda first, rest: jnp.concatenate([jnp.asarray(first, rest.dtype)[None], rest]), policy, path)


def harmonic_eta(step: _Step, *, beta: Numeric) -> Float[Array, "..."]:
    """``beta (step + 2) / 2`` for step 0, 1, ...: the schedule of `nash_md` and `inpo` that their bounds are for.

    At step 0 it equals ``beta``: the first policy is forgotten, and both start from the reference.
    """
    return jnp.asarray(beta) * (jnp.asarray(step) + 2) / 2


def mirror_descent_bound(steps: _Step, *, arms: int, beta: Numeric) -> Float[Array, "..."]:
    """Exploitability of the average of the first ``steps`` policies of `mirror_descent`, at most.

    ``beta log(n) / T + 1 / (8 beta)`` for n arms, from the uniform policy: the regret of multiplicative weights.
    """
    check_positive("beta", beta)
    return beta * jnp.log(jnp.asarray(arms, float)) / jnp.asarray(steps) + 1 / (8 * jnp.asarray(beta))


def magnetic_mirror_descent_bound(
    initial_kl: Numeric, steps: _Step, *, beta: Numeric, step_size: Numeric
) -> Float[Array, "..."]:
    """``KL(equilibrium || policy)`` after ``steps`` of `magnetic_mirror_descent`, at most.

    Args:
      initial_kl: That of the first policy, nats.
      steps: How many steps, one or several numbers.
      beta: Strength of the KL term to the magnet, > 0.
      step_size: At most ``4 beta``: win rates are less than 1/2 apart for every unit that opponents are apart in L1.

    Returns:
      ``initial_kl / (1 + beta step_size)^steps``, nats.

    Raises:
      ValueError: If ``beta`` or ``step_size`` is a Python number for which the bound is not proved.

    References:
      Sokota et al., 2022, arXiv:2206.05825, Theorem 3.4.
    """
    check_positive("beta", beta)
    check_positive("step_size", step_size)
    if isinstance(beta, int | float) and isinstance(step_size, int | float) and step_size > 4 * beta * (1 + 1e-9):
        raise ValueError(f"step_size must be at most 4 beta, got {step_size!r} with beta {beta!r}")
    return jnp.asarray(initial_kl) * jnp.exp(-jnp.asarray(steps) * jnp.log1p(jnp.asarray(beta) * step_size))


def nash_md_bound(steps: _Step, *, beta: Numeric) -> Float[Array, "..."]:
    """``KL(equilibrium || policy)`` after ``steps`` of `nash_md` at `harmonic_eta`, at most: ``8 / (beta^2 (T + 1))``.

    References:
      Munos et al., 2023, arXiv:2312.00886, Theorem 1.
    """
    check_positive("beta", beta)
    return 8 / (jnp.square(jnp.asarray(beta)) * (jnp.asarray(steps) + 1))


def inpo_bound(steps: _Step, *, beta: Numeric, log_ratio: Numeric) -> Float[Array, "..."]:
    """``KL(equilibrium || policy)`` after ``steps`` of `inpo` at `harmonic_eta`, at most.

    Args:
      steps: How many steps, one or several numbers.
      beta: Strength of the KL term to the reference, > 0.
      log_ratio: Largest ``|log(policy / ref)|`` met on the way, nats.

    Returns:
      ``32 C^2 / (beta^2 (T + 1))`` with ``C = max(beta log_ratio, 1)``, nats.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Zhang et al., 2024, arXiv:2407.00617.
    """
    check_positive("beta", beta)
    return 4 * jnp.square(jnp.maximum(beta * jnp.asarray(log_ratio), 1)) * nash_md_bound(steps, beta=beta)


def _centred_win_rates(preference, opponent):
    """``P q - 1/2`` from the skew part, without the cancellation."""
    preference = as_float(preference)
    return win_rates((preference - jnp.swapaxes(preference, -1, -2)) / 2, opponent)


def _column(x):
    return x if jnp.ndim(x) == 0 else x[..., None]


def _mixture(policy, ref, share):
    """``policy^(1 - share) ref^share / Z``."""
    logits = geometric_mixture_logits(jnp.log(as_float(policy)), jnp.log(as_float(ref)), mixture=share)
    return jnp.exp(logits)


def _check_strengths(beta, eta):
    check_at_least("beta", beta, 0)
    check_positive("eta", eta)
    if isinstance(beta, int | float) and isinstance(eta, int | float) and eta < beta:
        raise ValueError(f"eta must be at least beta, got {eta!r} with beta {beta!r}")
