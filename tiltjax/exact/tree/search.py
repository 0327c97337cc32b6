"""Search over a token tree, guided by values of its prefixes: what each procedure returns, exactly.

Values are H + 1 arrays ``[*batch, V**t]`` as from `mean_values`, `max_values` or `soft_values`; the last of them is the
reward of the completions themselves, which all procedures see once they get there. A prefix of value -inf is
taken only where there is no other. `uct_search` draws its roll-outs and takes a key; the others are deterministic, or
give a law.
"""

import jax
import jax.numpy as jnp

from tiltjax.exact.bandit import best_of_n_law
from tiltjax.exact.tree.world import Levels, path_sums
from tiltjax.ops.checks import check_at_least, check_positive
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Float, Int, Numeric, PRNGKey

__all__ = ["beam_search", "blockwise_best_of_n_law", "lookahead_search", "uct_search"]


def beam_search(values: Levels, *, width: int) -> Int[Array, "*batch"]:
    """The completion that beam search returns: at every length the ``width`` prefixes of the largest value survive.

    Exact with `max_values` at any width, and with any values once the width is ``V**(H - 1)``; a larger width is not
    always better in between.

    Args:
      values: H + 1 arrays ``[*batch, V**t]``, reward units.
      width: Number of prefixes kept, at least 1; 1 is greedy search. Static.

    Returns:
      Index of the completion, ``[*batch]``; of equal values the prefix of the better parent, then the lower index wins.

    Raises:
      ValueError: If ``width`` is below 1.

    Example:
      >>> values = [jnp.array([1.5]), jnp.array([2.0, 1.0]), jnp.array([2.0, 2.0, 5.0, -3.0])]
      >>> [int(beam_search(values, width=w)) for w in (1, 2)]
      [0, 2]
    """
    check_at_least("width", width, 1)
    V = values[1].shape[-1]
    beam = jnp.zeros(values[0].shape, jnp.int32)
    for value in values[1:]:
        children = beam[..., None] * V + jnp.arange(V, dtype=beam.dtype).reshape(*[1] * beam.ndim, V)
        children = children.reshape(*beam.shape[:-1], -1)
        kept = min(width, children.shape[-1])
        _, place = jax.lax.top_k(jnp.take_along_axis(as_float(value), children, axis=-1), kept)
        beam = jnp.take_along_axis(children, place, axis=-1)
    return beam[..., 0]


def lookahead_search(values: Levels, *, depth: int) -> Int[Array, "*batch"]:
    """The completion of a search that writes one token at a time, looking ``depth`` tokens past each.

    Every token is the first step towards the largest value among all prefixes ``depth`` tokens beyond it, or among the
    completions where the tree ends before. Exact with `max_values`, and with any values at ``depth = H - 1``.

    Args:
      values: H + 1 arrays ``[*batch, V**t]``, reward units.
      depth: How many tokens to look past the next one, at least 0; 0 is greedy search. Static.

    Returns:
      Index of the completion, ``[*batch]``; the lower token wins ties.

    Raises:
      ValueError: If ``depth`` is below 0.

    Example:
      >>> values = [jnp.array([1.5]), jnp.array([2.0, 1.0]), jnp.array([2.0, 2.0, 5.0, -3.0])]
      >>> [int(lookahead_search(values, depth=d)) for d in (0, 1)]
      [0, 2]
    """
    check_at_least("depth", depth, 0)
    V, H = values[1].shape[-1], len(values) - 1
    prefix = jnp.zeros(values[0].shape, jnp.int32)
    for t in range(H):
        horizon = as_float(values[min(t + 1 + depth, H)])
        best = jnp.max(horizon.reshape(*horizon.shape[:-1], V ** (t + 1), -1), axis=-1)
        token = jnp.argmax(best.reshape(*best.shape[:-1], V**t, V), axis=-1).astype(jnp.int32)
        prefix = prefix * V + jnp.take_along_axis(token, prefix, axis=-1)
    return prefix[..., 0]


def blockwise_best_of_n_law(
    ref: Levels, values: Levels, *, n: int | Int[Array, ""], block: int
) -> Float[Array, "*batch K"]:
    r"""The law of blockwise best-of-n: again and again, the best by value of ``n`` blocks drawn from the reference.

    Args:
      ref: The reference, H levels ``[*batch, V**t, V]`` of log-probabilities, nats.
      values: H + 1 arrays ``[*batch, V**t]``, reward units.
      n: Blocks drawn at a time, at least 1; ties among them are broken uniformly.
      block: Tokens in a block, at least 1; the last block ends with the completion. ``H`` is best-of-n. Static.

    Returns:
      Probability of every completion, ``[*batch, K]``.

    Raises:
      ValueError: If ``n`` or ``block`` is below 1.

    Example:
      >>> ref = [jnp.log(jnp.array([[0.5, 0.5]]))]
      >>> blockwise_best_of_n_law(ref, [jnp.array([0.5]), jnp.array([0.0, 1.0])], n=2, block=1).round(4).tolist()
      [0.25, 0.75]

    References:
      Mudgal et al., 2023, arXiv:2310.17022.
    """
    check_at_least("n", n, 1)
    check_at_least("block", block, 1)
    H, batch = len(ref), values[0].shape[:-1]
    logp = path_sums(ref)
    law = jnp.ones((*batch, 1), logp[0].dtype)
    for t in range(0, H, block):
        end = min(t + block, H)
        child = logp[end].reshape(*batch, law.shape[-1], -1)
        conditional = jnp.exp(child - jnp.where(logp[t] > -jnp.inf, logp[t], 0)[..., None])
        chosen = best_of_n_law(conditional, as_float(values[end]).reshape(child.shape), n=n)
        law = (law[..., None] * chosen).reshape(*batch, -1)
    return law


def uct_search(
    key: PRNGKey,
    ref: Levels,
    reward: Float[Array, " K"],
    *,
    num_simulations: int | Int[Array, ""],
    exploration: Numeric,
) -> Int[Array, ""]:
    r"""The completion that Monte-Carlo tree search returns.

    A simulation descends from the root by

    .. math:: \arg\max_z \; \bar r(s z) + c \sqrt{\frac{\log n(s)}{n(s z)}}

    where every child of a prefix has been visited, else to an unvisited one, drawn by the reference, from which
    the reference writes the rest; the reward of the completion is added to every prefix down to the new one. The
    completion returned follows the most visited child from the root (the reference where none was visited).

    Args:
      key: Consumed.
      ref: The reference, H levels ``[V**t, V]`` of log-probabilities, nats. Impossible tokens are never tried.
      reward: Reward of every completion, reward units.
      num_simulations: At least 1.
      exploration: ``c``, > 0, reward units.

    Returns:
      Index of the completion. Map over keys or trees with `jax.vmap`.

    Raises:
      ValueError: If ``num_simulations`` is below 1 or ``exploration`` not positive and finite, as Python numbers.

    References:
      Kocsis, Szepesvari, 2006, "Bandit based Monte-Carlo planning".
    """
    check_at_least("num_simulations", num_simulations, 1)
    check_positive("exploration", exploration)
    V, H = ref[0].shape[-1], len(ref)
    reward = as_float(reward)
    # Nodes are numbered as in a heap: the children of node i are V i + 1 ... V i + V.
    prior = jnp.concatenate([jnp.asarray(level, reward.dtype) for level in ref])
    nodes = len(prior) + V**H
    offsets = jnp.arange(1, V + 1, dtype=jnp.int32)

    def descend(t, state, visits, totals, key):
        node, path, growing = state
        children = node * V + offsets
        n, row = visits[children], prior[node]
        possible = row > -jnp.inf
        drawn = row + jax.random.gumbel(jax.random.fold_in(key, t), (V,), row.dtype)
        bonus = exploration * jnp.sqrt(jnp.log(jnp.maximum(visits[node], 1)) / jnp.maximum(n, 1))
        bound = jnp.where(possible, totals[children] / jnp.maximum(n, 1) + bonus, -jnp.inf)
        fresh = possible & (n == 0)
        new = jnp.argmax(jnp.where(fresh, drawn, -jnp.inf))
        inside = jnp.where(jnp.any(fresh), new, jnp.argmax(bound))
        token = jnp.where(growing, inside, jnp.argmax(drawn))
        # Below the new node nothing is counted: an index outside the tree is dropped.
        path = path.at[t + 1].set(jnp.where(growing, children[token], nodes))
        return children[token], path, growing & (n[token] > 0)

    def simulate(i, state):
        visits, totals = state
        root = jnp.int32(0), jnp.zeros(H + 1, jnp.int32), jnp.bool_(True)
        this = jax.random.fold_in(key, i)
        leaf, path, _ = jax.lax.fori_loop(0, H, lambda t, s: descend(t, s, visits, totals, this), root)
        return visits.at[path].add(1, mode="drop"), totals.at[path].add(reward[leaf - len(prior)], mode="drop")

    start = jnp.zeros(nodes, reward.dtype), jnp.zeros(nodes, reward.dtype)
    visits, _ = jax.lax.fori_loop(0, num_simulations, simulate, start)

    def follow(_, node):
        children = node * V + offsets
        return children[jnp.argmax(visits[children] + jnp.exp(prior[node]) / 2)]

    return jax.lax.fori_loop(0, H, follow, jnp.int32(0)) - len(prior)
