"""Best-of-N, hard and soft, over candidates that sit on one device, on many, or stream past and are thrown away.

Soft best-of-N draws candidate ``i`` of N with probability ``softmax(reward / beta)_i`` by the Gumbel-max trick: the
largest ``reward_i + beta g_i`` wins. The noise ``g_i`` is a function of the key, the global index ``i`` and the leading
shape alone, and the sum is held with its rounding error (an unevaluated pair of floats), so that candidates are ordered
by one number each, whatever their arrangement: the winner does not depend on how N is split, and the law is exact
where ``|reward / beta|`` is 1e5.
"""

import chex
import jax
import jax.numpy as jnp

from tiltjax.ops.checks import check_positive
from tiltjax.ops.collectives import axis_index, axis_size, pmax, pmin, psum
from tiltjax.ops.logspace import over_row
from tiltjax.ops.masked import as_float, check_alike
from tiltjax.types import Array, AxisName, Bool, Dtype, Float, Int, Numeric, PRNGKey, PyTree

__all__ = ["Winner", "best_of_n", "init", "merge", "merge_over", "soft_best_of_n", "update"]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Winner:
    """The winner so far of a stream of candidates: a monoid under `merge`, constant in size.

    Attributes:
      index: Global index of the winner, ``[*batch]``; 0 while there is none.
      reward: Its reward, ``[*batch]``; -inf while there is none.
      perturbed: Its ``reward + beta * gumbel``, rounded, ``[*batch]``, reward units; -inf while there is none.
      remainder: What the rounding of ``perturbed`` lost: their sum is exact, and decides.
      count: How many candidates have gone by, masked ones included: the global index of the next one.
      payload: What to keep of the winner (its tokens, say), leaves ``[*batch, ...]``; None keeps nothing.
    """

    index: Int[Array, "*batch"]
    reward: Float[Array, "*batch"]
    perturbed: Float[Array, "*batch"]
    remainder: Float[Array, "*batch"]
    count: Int[Array, "..."]
    payload: PyTree = None


def best_of_n(
    reward: Float[Array, "*batch N"], *, where: Bool[Array, "*batch N"] | None = None, axis_name: AxisName = None
) -> Int[Array, "*batch"]:
    r"""Index of the largest reward; the lowest index wins ties.

    Without ties this is a draw from :math:`N F(r)^{N-1} p_\text{ref}`, at
    :math:`\mathrm{KL} = \log N - (N-1)/N` from the reference; with ties that figure is an upper bound.

    Args:
      reward: Reward of every candidate, reward units. NaN never wins, and -inf only against what is masked.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      Index over all candidates, ``[*batch]``, the same on every device; 0 for a row without a real candidate.

    Example:
      >>> int(best_of_n(jnp.array([0.5, 2.0, 2.0])))
      1

    References:
      Stiennon et al., 2020, arXiv:2009.01325; Beirami et al., 2024, arXiv:2401.01879.
    """
    reward = as_float(reward)
    start = axis_index(axis_name) * reward.shape[-1]
    entered = _enter(reward, jnp.zeros_like(reward), where)
    winner = _challenge(init(reward.shape[:-1], start=start, dtype=reward.dtype), *entered, None)
    return merge_over(winner, axis_name=axis_name).index


def soft_best_of_n(
    key: PRNGKey,
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Int[Array, "*batch"]:
    r"""One of N candidates, drawn with probability ``softmax(reward / beta)``.

    .. math:: \arg\max_i \; r_i + \beta g_i, \qquad g_i \sim \mathrm{Gumbel}(0, 1)

    With candidates drawn from the reference, ``beta -> 0`` is best-of-N, ``beta -> inf`` and ``N = 1`` are the
    reference, and ``N -> inf`` is the tilt :math:`p_\text{ref} e^{r/\beta} / Z`. Never remove duplicates among the
    candidates first: their number is how the reference enters. Equal keys give equal winners on one device, over
    many (`shard_map`, `pmap`, a sharded `jit`) and through `update`. Where *prompts* are split under a mapped axis,
    fold ``axis_index`` into the key, or all devices share their noise.

    Args:
      key: Consumed. The noise of candidate ``i`` is drawn under ``jax.random.fold_in(key, i)``.
      reward: Reward of every candidate, reward units. NaN never wins, and -inf only where all real ones are.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      Index over all candidates, ``[*batch]``, the same on every device; 0 for a row without a real candidate.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> draws = jnp.broadcast_to(jnp.array([0.0, jnp.log(3.0)]), (4000, 2))
      >>> 0.73 < float(soft_best_of_n(jax.random.key(0), draws, beta=1.0).mean()) < 0.77
      True

    References:
      Verdun et al., 2025, arXiv:2505.03156; Jiao, Chen, Li, 2025, arXiv:2509.04372, Eq. 15.
    """
    reward = as_float(reward)
    start = axis_index(axis_name) * reward.shape[-1]
    winner = update(key, init(reward.shape[:-1], start=start, dtype=reward.dtype), reward, beta=beta, where=where)
    return merge_over(winner, axis_name=axis_name).index


def init(
    batch: tuple[int, ...] = (),
    *,
    start: int | Int[Array, ""] = 0,
    payload: PyTree = None,
    dtype: Dtype = jnp.float32,
) -> Winner:
    """A `Winner` of no candidate yet.

    Args:
      batch: Leading shape of the rewards to come.
      start: Global index of the first candidate: 0, or where this stream begins among several.
      payload: Arrays (or shapes with dtypes) like the payload of one winner per row, leaves ``[*batch, ...]``;
        the winner starts with zeros.
      dtype: Of the rewards, float32 or wider.

    Returns:
      `Winner`, the carry of a `jax.lax.scan` over `update`.
    """
    none = jnp.full(batch, -jnp.inf, dtype)
    return Winner(
        index=jnp.zeros(batch, jnp.int32),
        reward=none,
        perturbed=none,
        remainder=jnp.zeros(batch, dtype),
        count=jnp.asarray(start, jnp.int32),
        payload=jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), payload),
    )


def update(
    key: PRNGKey,
    winner: Winner,
    reward: Float[Array, "*batch n"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch n"] | None = None,
    payload: PyTree = None,
) -> Winner:
    """Soft best-of-N over one more chunk of candidates, which can then be thrown away.

    Args:
      key: The same key for every chunk of one stream: the noise is told apart by the global index.
      winner: The winner so far, from `init`.
      reward: Rewards of the next ``n`` candidates, reward units.
      beta: Strength of the KL term, > 0, reward units; the same for every chunk.
      where: True for real candidates; None means all.
      payload: What is kept of a candidate that wins, leaves ``[*batch, n, ...]``; the structure given to `init`.

    Returns:
      The winner among all candidates so far: the one that `soft_best_of_n` picks from all of them at once.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> key, reward = jax.random.key(0), jnp.linspace(0.0, 1.0, 12)
      >>> step = lambda winner, chunk: (update(key, winner, chunk, beta=0.3), None)
      >>> winner, _ = jax.lax.scan(step, init(), reward.reshape(3, 4))
      >>> int(winner.index) == int(soft_best_of_n(key, reward, beta=0.3)), int(winner.count)
      (True, 12)
    """
    check_positive("beta", beta)
    reward = jnp.asarray(reward, winner.reward.dtype)
    beta = jnp.asarray(beta, reward.dtype)
    noise = _gumbel(key, winner.count, reward.shape, reward.dtype)
    noise = _unfused(noise * over_row("beta", beta, reward))
    return _challenge(winner, *_enter(reward, noise, where), payload)


def merge(a: Winner, b: Winner) -> Winner:
    """The better of two winners, of disjoint streams that used the same key; the lower index wins a tie."""
    ahead = (b.perturbed > a.perturbed) | ((b.perturbed == a.perturbed) & (b.remainder > a.remainder))
    tied = (b.perturbed == a.perturbed) & (b.remainder == a.remainder)
    ahead = ahead | (tied & (b.index < a.index))

    def pick(x: Array, y: Array) -> Array:
        return jnp.where(_over(ahead, y), y, x)

    return Winner(
        index=pick(a.index, b.index),
        reward=pick(a.reward, b.reward),
        perturbed=pick(a.perturbed, b.perturbed),
        remainder=pick(a.remainder, b.remainder),
        count=jnp.maximum(a.count, b.count),
        payload=jax.tree.map(pick, a.payload, b.payload),
    )


def merge_over(winner: Winner, *, axis_name: AxisName) -> Winner:
    """The best of every device's winner, on every device; the lowest index wins a tie.

    Args:
      winner: This device's winner; the streams began at different ``start`` and used the same key.
      axis_name: The mapped axis; None returns ``winner`` as it is.

    Returns:
      The same `Winner` everywhere, its payload included.
    """
    if axis_name is None:
        return winner
    perturbed = pmax(winner.perturbed, axis_name)
    tied = winner.perturbed == perturbed
    remainder = pmax(jnp.where(tied, winner.remainder, -jnp.inf), axis_name)
    tied = tied & (winner.remainder == remainder)
    index = pmin(jnp.where(tied, winner.index, jnp.iinfo(winner.index.dtype).max), axis_name)
    # Where no device has a candidate all of them say index 0: the first one speaks.
    rank, size = axis_index(axis_name), axis_size(axis_name)
    mine = rank == pmin(jnp.where(tied & (winner.index == index), rank, size), axis_name)

    def take(x: Array) -> Array:
        return psum(jnp.where(_over(mine, x), x, 0), axis_name).astype(x.dtype)

    return Winner(
        index=index,
        reward=take(winner.reward),
        perturbed=perturbed,
        remainder=remainder,
        count=pmax(winner.count, axis_name),
        payload=jax.tree.map(take, winner.payload),
    )


def _gumbel(key: PRNGKey, start: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
    """Noise ``[*batch, n]`` of candidates ``start ... start + n - 1``; "high": no ties at the top of a long stream."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(start + jnp.arange(shape[-1]))
    return jax.vmap(lambda k: jax.random.gumbel(k, shape[:-1], dtype, mode="high"), out_axes=-1)(keys)


def _unfused(product: Array) -> Array:
    """One bit less, a rounding no compiler may skip: contracted into the next sum, it would differ by program."""
    info = jnp.finfo(product.dtype)
    return jax.lax.reduce_precision(product, info.nexp, info.nmant - 1)


def _enter(reward: Array, noise: Array, where: Array | None) -> tuple[Array, Array, Array]:
    """The reward, ``reward + noise`` rounded, and what the rounding lost (Knuth's two-sum); -inf and 0 where masked."""
    check_alike(where, reward)
    real = ~jnp.isnan(reward) if where is None else ~jnp.isnan(reward) & where
    reward = jnp.where(real, reward, -jnp.inf)
    total = reward + noise
    part = total - reward
    lost = (reward - (total - part)) + (noise - part)
    # A real reward of -inf still comes before what is masked.
    total = jnp.where(real, jnp.maximum(total, jnp.finfo(total.dtype).min), -jnp.inf)
    return reward, total, jnp.where(jnp.isfinite(lost), lost, 0)


def _challenge(winner: Winner, reward: Array, perturbed: Array, remainder: Array, payload: PyTree) -> Winner:
    """The winner after its contest with the best of one chunk."""
    tied = perturbed == jnp.max(perturbed, axis=-1, keepdims=True)
    place = jnp.argmax(jnp.where(tied, remainder, -jnp.inf), axis=-1).astype(jnp.int32)

    def take(x: Array) -> Array:
        index = _over(place[..., None], x)
        return jnp.squeeze(jnp.take_along_axis(jnp.asarray(x), index, axis=place.ndim), axis=place.ndim)

    challenger = Winner(
        index=winner.count + place,
        reward=take(reward),
        perturbed=take(perturbed),
        remainder=take(remainder),
        count=winner.count + reward.shape[-1],
        payload=jax.tree.map(take, payload),
    )
    return merge(winner, challenger)


def _over(x: Array, like: Array) -> Array:
    """``x`` with trailing dimensions of 1 up to the rank of ``like``."""
    return jnp.reshape(x, x.shape + (1,) * (jnp.ndim(like) - x.ndim))
