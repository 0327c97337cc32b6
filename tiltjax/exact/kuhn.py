"""Kuhn poker: the smallest game of hidden cards, solved and played by full enumeration.

Two players put 1 into the pot and get a card each. The first may check or bet 1; a check may be answered by a bet of 1;
a bet is folded to or called, and after two checks or a call the higher card takes the pot. Three cards are the usual
game, whose first player loses 1/18 under best play; any number works.

A policy is ``[*batch, 2, C, 2, 2]``: player, own card, situation, action. Situations of the first player are *to open*
and *to answer a bet after a check*; of the second, *to follow a check* and *to answer a bet*. Action 0 is to check or
fold, 1 to bet or call. Values are in chips.
"""

import jax
import jax.numpy as jnp

from tiltjax.exact import bandit, game
from tiltjax.ops.checks import check_at_least, check_positive
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Dtype, Float, Numeric

__all__ = [
    "action_values",
    "equilibrium",
    "exploitability",
    "magnetic_mirror_descent",
    "mirror_descent",
    "mpo",
    "uniform_policy",
    "value",
]

_Policy = Float[Array, "*batch 2 C 2 2"]


def uniform_policy(cards: int = 3, *, dtype: Dtype = float) -> Float[Array, "2 C 2 2"]:
    """Both actions with probability 1/2 everywhere.

    Args:
      cards: How many cards the deck has, at least 2.
      dtype: Of the result.

    Returns:
      Policy ``[2, cards, 2, 2]``.

    Raises:
      ValueError: If ``cards`` is below 2.
    """
    check_at_least("cards", cards, 2)
    return jnp.full((2, cards, 2, 2), 0.5, dtype)


def equilibrium(bluff: Numeric = 0.0) -> Float[Array, "2 3 2 2"]:
    """The equilibria of the game with three cards, by how often the first player bets the lowest.

    Args:
      bluff: In [0, 1/3].

    Returns:
      Policy ``[2, 3, 2, 2]``.

    Raises:
      ValueError: If ``bluff`` is a Python number outside of [0, 1/3].

    Example:
      >>> abs(float(exploitability(equilibrium(0.25)))) < 1e-6, round(float(18 * value(equilibrium(0.25))), 4)
      (True, -1.0)

    References:
      Kuhn, 1950, A simplified two-person poker.
    """
    if isinstance(bluff, int | float) and not 0 <= bluff <= 1 / 3:
        raise ValueError(f"bluff must lie in [0, 1/3], got {bluff!r}")
    bet = jnp.array([[[bluff, 0], [0, bluff + 1 / 3], [3 * bluff, 1]], [[1 / 3, 0], [0, 1 / 3], [1, 1]]])
    return jnp.stack([1 - bet, bet], axis=-1)


def action_values(policy: _Policy, *, conditional: bool = True) -> _Policy:
    """What each action is worth to its player, given both policies from there on.

    Args:
      policy: Probabilities, ``[*batch, 2, C, 2, 2]``.
      conditional: Whether to divide the counterfactual value by the probability that chance and the opponent lead to
        the situation, which makes it the mean payoff there (0 where they never do).

    Returns:
      Chips, ``[*batch, 2, C, 2, 2]``.
    """
    policy = as_float(policy)
    deal, won = _deal(policy)
    opening, answer, following, called = (policy[..., p, :, s, :] for p in (0, 1) for s in (0, 1))
    check, bet = 0, 1

    def per_card(table, weight):
        return jnp.einsum("ij,...j->...i", table, weight)

    # The first player sums over the second's cards.
    fold_1 = -per_card(deal, following[..., bet])
    call_1 = 2 * per_card(won, following[..., bet])
    after_check = answer[..., 0] * fold_1 + answer[..., 1] * call_1
    check_1 = per_card(won, following[..., check]) + after_check
    bet_1 = per_card(deal, called[..., 0]) + 2 * per_card(won, called[..., 1])
    # The second over the first's; `won` is skew, so it reads the same from the other side.
    checked, bettor = opening[..., check], opening[..., bet]
    check_2 = per_card(won, checked)
    bet_2 = per_card(deal, checked * answer[..., 0]) + 2 * per_card(won, checked * answer[..., 1])
    fold_2, call_2 = -per_card(deal, bettor), 2 * per_card(won, bettor)
    values = _assemble((check_1, bet_1), (fold_1, call_1), (check_2, bet_2), (fold_2, call_2))
    if not conditional:
        return values
    ones = jnp.ones_like(checked)
    reach = jnp.stack(
        [
            jnp.stack([per_card(deal, ones), per_card(deal, following[..., bet])], axis=-1),
            jnp.stack([per_card(deal, checked), per_card(deal, bettor)], axis=-1),
        ],
        axis=-3,
    )[..., None]
    return jnp.where(reach > 0, values / jnp.where(reach > 0, reach, 1), 0)


def value(policy: _Policy) -> Float[Array, "*batch"]:
    """Mean winnings of the first player, chips, ``[*batch]``; the second loses as much."""
    policy = as_float(policy)
    opening = policy[..., 0, :, 0, :] * action_values(policy, conditional=False)[..., 0, :, 0, :]
    return jnp.sum(opening, axis=(-2, -1))


def exploitability(policy: _Policy) -> Float[Array, "*batch"]:
    """What the players together would gain by each playing its best reply to the other: 0 at an equilibrium.

    Args:
      policy: ``[*batch, 2, C, 2, 2]``.

    Returns:
      Sum of both gains, chips, ``[*batch]`` (some papers divide it by the number of players).

    Example:
      >>> round(float(exploitability(uniform_policy())), 5)
      0.91667
    """
    policy = as_float(policy)
    values = action_values(policy, conditional=False)
    best = jnp.max(values, axis=-1)
    # The first player's check is worth its answer to a bet; the second's two situations exclude each other.
    answered = jnp.sum(policy[..., 0, :, 1, :] * values[..., 0, :, 1, :], axis=-1)
    check = values[..., 0, :, 0, 0] - answered + best[..., 0, :, 1]
    first = jnp.sum(jnp.maximum(check, values[..., 0, :, 0, 1]), axis=-1)
    return first + jnp.sum(best[..., 1, :, :], axis=(-2, -1))


def mirror_descent(policy: _Policy, *, beta: Numeric) -> _Policy:
    """Tilts every information set of both players by its conditional `action_values`, all at once.

    Args:
      policy: ``[*batch, 2, C, 2, 2]``.
      beta: Strength of the KL term to the present policy, > 0, chips: 1 / step size.

    Returns:
      The next policy, ``[*batch, 2, C, 2, 2]``.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.
    """
    return bandit.tilted(policy, action_values(policy), beta=beta)


def magnetic_mirror_descent(policy: _Policy, *, ref: _Policy, beta: Numeric, step_size: Numeric) -> _Policy:
    """One `tiltjax.exact.game.magnetic_tilt` at every information set of both players, all at once.

    For constant ``beta`` it settles at a smoothed equilibrium, whose exploitability falls with ``beta``. With
    ``beta`` and ``step_size`` lowered like ``1 / sqrt(t)``, or with the magnet moved (`mpo`), it goes to 0.

    Args:
      policy: ``[*batch, 2, C, 2, 2]``.
      ref: The magnet, of the same shape.
      beta: Strength of the KL term to the magnet, >= 0, chips.
      step_size: > 0, per chip.

    Returns:
      The next policy, ``[*batch, 2, C, 2, 2]``.

    Raises:
      ValueError: If ``beta`` is a negative Python number, or ``step_size`` one that is not positive and finite.

    References:
      Sokota et al., 2022, arXiv:2206.05825.
    """
    return game.magnetic_tilt(policy, action_values(policy), ref=ref, beta=beta, step_size=step_size)


def mpo(policy: _Policy, *, beta: Numeric, step_size: Numeric, steps: int) -> _Policy:
    """The policy becomes the magnet of ``steps`` steps of `magnetic_mirror_descent`; see `tiltjax.exact.game.mpo`.

    Args:
      policy: ``[*batch, 2, C, 2, 2]``.
      beta: Strength of the KL term to the magnet, > 0, chips.
      step_size: > 0, per chip.
      steps: How many steps the magnet stays, at least 1.

    Returns:
      The policy after the round, ``[*batch, 2, C, 2, 2]``.

    Raises:
      ValueError: If ``beta``, ``step_size`` or ``steps`` is a Python number out of its range.

    References:
      Wang et al., 2024, arXiv:2410.16714.
    """
    check_positive("beta", beta)
    check_at_least("steps", steps, 1)
    policy = as_float(policy)

    def step(_, present):
        return magnetic_mirror_descent(present, ref=policy, beta=beta, step_size=step_size)

    return jax.lax.fori_loop(0, steps, step, policy)


def _deal(policy):
    """Chance of two cards, and that times the sign of what the holder of the first wins at showdown."""
    cards = jnp.arange(policy.shape[-3])
    own, other = cards[:, None], cards[None, :]
    deal = jnp.where(own == other, 0, 1 / (cards.size * (cards.size - 1))).astype(policy.dtype)
    return deal, deal * jnp.sign(own - other)


def _assemble(opening, answer, following, called):
    """Pairs of action values per situation and player into one array."""
    players = [[jnp.stack(pair, axis=-1) for pair in pairs] for pairs in ((opening, answer), (following, called))]
    return jnp.stack([jnp.stack(situations, axis=-2) for situations in players], axis=-4)
