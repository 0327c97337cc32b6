"""Token trees: every completion of H tokens from a vocabulary of V, and the policies that write them.

A policy is its H *levels*: level ``t`` is ``[*batch, V**t, V]``, one row of next-token log-probabilities per prefix of
``t`` tokens. Completions, and prefixes of any length, are numbered in lexicographic order, so the children of prefix
``i`` are ``V i ... V i + V - 1``, and what is known of completions is ``[*batch, K]`` with ``K = V**H``. A reward is
either such an array, or levels of one reward per token, which `total_reward` sums.
"""

from collections.abc import Sequence

import chex
import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_at_least
from tiltjax.ops.logspace import logsumexp
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Float, Int, PRNGKey

__all__ = [
    "Levels",
    "completions",
    "conditionals",
    "horizon",
    "path_sums",
    "random_policy",
    "sequence_logp",
    "total_reward",
]

Levels = Sequence[Float[Array, "..."]]
"""One array per prefix length: ``[*batch, V**t, V]`` of next tokens, or ``[*batch, V**t]`` of prefixes."""


def path_sums(levels: Levels) -> list[Float[Array, "*batch n"]]:
    """Sums along the path from the root to every prefix, the empty one first.

    Args:
      levels: H arrays ``[*batch, V**t, V]``, a term for every next token.

    Returns:
      H + 1 arrays ``[*batch, V**t]``: of a policy's log-probabilities, the log-probability of every prefix.

    Example:
      >>> levels = [jnp.array([[1.0, 2.0]]), jnp.array([[10.0, 20.0], [30.0, 40.0]])]
      >>> [x.tolist() for x in path_sums(levels)]
      [[0.0], [1.0, 2.0], [11.0, 21.0, 32.0, 42.0]]
    """
    *batch, _, V = levels[0].shape
    for t, level in enumerate(levels):
        chex.assert_shape(level, (*batch, V**t, V))
    sums = [jnp.zeros((*batch, 1), as_float(levels[0]).dtype)]
    for level in levels:
        sums.append((sums[-1][..., None] + as_float(level)).reshape(*batch, -1))
    return sums


def sequence_logp(policy: Levels) -> Float[Array, "*batch K"]:
    """Log-probability of every completion, ``[*batch, V**H]``, nats: the inverse of `conditionals`."""
    return path_sums(policy)[-1]


def total_reward(reward: Levels) -> Float[Array, "*batch K"]:
    """Reward of every completion, ``[*batch, V**H]``, from the rewards of its tokens."""
    return path_sums(reward)[-1]


def conditionals(logp: Float[Array, "*batch K"], *, vocab_size: int) -> list[Float[Array, "*batch n V"]]:
    r"""The token policy of a law over completions.

    .. math:: \pi(z | s) = \frac{p(s z)}{p(s)}, \qquad p(s) = \sum_{y \text{ begins with } s} p(y)

    Args:
      logp: Log-probability of every completion, nats, up to a constant.
      vocab_size: ``V``.

    Returns:
      H levels ``[*batch, V**t, V]`` of log-probabilities; uniform after a prefix that never occurs.

    Raises:
      ValueError: If ``logp`` does not list the completions of a whole number of tokens.

    Example:
      >>> first, second = conditionals(jnp.log(jnp.array([0.1, 0.3, 0.6, 0.0])), vocab_size=2)
      >>> [[round(float(p), 4) for p in jnp.exp(row)] for row in (*first, *second)]
      [[0.4, 0.6], [0.25, 0.75], [1.0, 0.0]]
    """
    H, batch = horizon(logp.shape[-1], vocab_size=vocab_size), logp.shape[:-1]
    levels, child = [], as_float(logp)
    for t in reversed(range(H)):
        child = child.reshape(*batch, vocab_size**t, vocab_size)
        parent = logsumexp(child)
        occurs = (parent > -jnp.inf)[..., None]
        row = jnp.where(occurs, child, 0) - jnp.where(occurs, parent[..., None], jnp.log(float(vocab_size)))
        levels.append(row)
        child = parent
    return levels[::-1]


def completions(*, vocab_size: int, horizon: int) -> Int[Array, "K H"]:
    """The tokens of every completion, ``[V**H, H]``, in lexicographic order.

    Example:
      >>> completions(vocab_size=2, horizon=2).tolist()
      [[0, 0], [0, 1], [1, 0], [1, 1]]
    """
    check_at_least("vocab_size", vocab_size, 2)
    check_at_least("horizon", horizon, 1)
    place = vocab_size ** jnp.arange(horizon)[::-1]
    return jnp.arange(vocab_size**horizon)[:, None] // place[None] % vocab_size


def horizon(count: int, *, vocab_size: int) -> int:
    """Number of tokens ``H`` of each of ``count = V**H`` completions.

    Args:
      count: Number of completions.
      vocab_size: ``V``, at least 2.

    Returns:
      ``H``.

    Raises:
      ValueError: If ``vocab_size`` is below 2, or ``count`` none of its powers.
    """
    check_at_least("vocab_size", vocab_size, 2)
    H = 0
    while vocab_size**H < count:
        H += 1
    if H == 0 or vocab_size**H != count:
        raise ValueError(f"vocab_size must have the number of completions, {count}, as a power; got {vocab_size!r}")
    return H


def random_policy(
    key: PRNGKey, *, vocab_size: int, horizon: int, batch: tuple[int, ...] = (), scale: float = 1.0
) -> list[Float[Array, "*batch n V"]]:
    """A policy whose every row is the softmax of independent normal logits, in the default precision.

    Args:
      key: Consumed.
      vocab_size: ``V``.
      horizon: ``H``.
      batch: Leading shape.
      scale: Standard deviation of the logits, nats.

    Returns:
      H levels ``[*batch, V**t, V]`` of log-probabilities.

    Raises:
      ValueError: If ``vocab_size`` is below 2 or ``horizon`` below 1.
    """
    check_at_least("vocab_size", vocab_size, 2)
    check_at_least("horizon", horizon, 1)
    shapes = [(*batch, vocab_size**t, vocab_size) for t in range(horizon)]
    keys = jax.random.split(key, horizon)
    return [jax.nn.log_softmax(scale * jax.random.normal(k, s)) for k, s in zip(keys, shapes, strict=True)]
