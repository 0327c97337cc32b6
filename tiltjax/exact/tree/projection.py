"""The nearest policy of a class, in either direction of the KL divergence.

A class of policies is a function from its parameters to the log-probability of every completion. On the class of all
policies both projections are the target itself (`conditionals` writes it token by token); a class that cannot express
the target has two different nearest policies: forward KL is what weighted maximum likelihood ends in, reverse KL what
reinforcement learning does.
"""

from collections.abc import Callable
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp

from tiltjax.exact.tree.newton import Minimum, minimise
from tiltjax.exact.tree.world import completions, horizon, sequence_logp
from tiltjax.ops.checks import check_choice
from tiltjax.ops.logspace import logsumexp
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Float, PyTree

__all__ = [
    "Projection",
    "log_linear",
    "memoryless",
    "memoryless_marginals",
    "memoryless_projection",
    "project",
]

_DIRECTIONS = ("forward", "reverse")


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Projection:
    """The nearest policy of a class.

    Attributes:
      params: Its parameters.
      logp: Its log-probability of every completion, ``[K]``, nats.
      divergence: KL divergence in the direction asked for, nats.
      gradient: Largest absolute entry of the divergence's gradient there: 0 to rounding at a stationary point.
    """

    params: PyTree
    logp: Float[Array, " K"]
    divergence: Float[Array, ""]
    gradient: Float[Array, ""]


def project(
    target_logp: Float[Array, " K"], policy_of: Callable[[PyTree], Array], start: PyTree, *, direction: str
) -> Projection:
    r"""The policy of a class nearest to a target: a local minimum, found by Newton's method.

    .. math:: \arg\min_\theta \mathrm{KL}(p \| \pi_\theta) \ \text{("forward")}, \qquad
              \arg\min_\theta \mathrm{KL}(\pi_\theta \| p) \ \text{("reverse")}

    Forward projection on `log_linear` is convex and matches the moments of the features; reverse projections are
    not convex in general, and depend on the start.

    Args:
      target_logp: Log-probability of every completion under the target, nats. "reverse" needs all of them finite
        unless the class leaves the others out.
      policy_of: From parameters to ``[K]`` log-probabilities that sum to one.
      start: Parameters to begin at.
      direction: "forward" or "reverse".

    Returns:
      `Projection`.

    Raises:
      ValueError: If ``direction`` is unknown.
    """
    check_choice("direction", direction, _DIRECTIONS)
    return _projection(policy_of, minimise(_divergence(target_logp, policy_of, direction), start))


def memoryless(table: Float[Array, "*batch H V"]) -> list[Float[Array, "*batch n V"]]:
    """The policy whose token at position ``t`` has law ``table[t]`` whatever was written before.

    Args:
      table: Log-probability of every token at every position, nats.

    Returns:
      H levels ``[*batch, V**t, V]``.
    """
    *batch, H, V = table.shape
    return [jnp.broadcast_to(table[..., t, None, :], (*batch, V**t, V)) for t in range(H)]


def memoryless_marginals(
    logp: Float[Array, "*batch K"], *, vocab_size: int, stationary: bool = False
) -> Float[Array, "*batch H V"]:
    """The forward-KL projection on memoryless policies: the target's own marginals.

    Args:
      logp: Log-probability of every completion under the target, nats.
      vocab_size: ``V``.
      stationary: Whether all positions share one law, which is then the mean of the marginals.

    Returns:
      Log-probability of every token at every position, ``[*batch, H, V]``, for `memoryless`.

    Raises:
      ValueError: If ``logp`` does not list the completions of a whole number of tokens.

    Example:
      >>> table = memoryless_marginals(jnp.log(jnp.array([0.1, 0.2, 0.3, 0.4])), vocab_size=2)
      >>> [round(float(p), 4) for p in jnp.exp(table).ravel()]
      [0.3, 0.7, 0.4, 0.6]
    """
    V = vocab_size
    H = horizon(logp.shape[-1], vocab_size=V)
    batch, logp = logp.shape[:-1], as_float(logp)
    split = [logp.reshape(*batch, V**t, V, V ** (H - t - 1)) for t in range(H)]
    table = jnp.stack([logsumexp(jnp.moveaxis(x, -2, -3).reshape(*batch, V, -1)) for x in split], axis=-2)
    if stationary:
        mean = logsumexp(jnp.moveaxis(table, -2, -1)) - jnp.log(float(H))
        table = jnp.broadcast_to(mean[..., None, :], table.shape)
    return table - logsumexp(table)[..., None]


def memoryless_projection(
    target_logp: Float[Array, " K"], *, vocab_size: int, direction: str, stationary: bool = False
) -> Projection:
    """The nearest memoryless policy.

    Forward KL has a closed form. Reverse KL (mean field) has several local minima: Newton's method starts at the
    forward projection and half-way from there to every single completion, and the best end counts.

    Args:
      target_logp: Log-probability of every completion under the target, nats; finite for "reverse".
      vocab_size: ``V``.
      direction: "forward" or "reverse".
      stationary: Whether all positions share one law.

    Returns:
      `Projection` whose parameters are the table ``[H, V]`` of log-probabilities. Map over several with `jax.vmap`.

    Raises:
      ValueError: If ``direction`` is unknown, or ``target_logp`` does not list the completions of a whole number of
        tokens.
    """
    check_choice("direction", direction, _DIRECTIONS)
    target_logp = as_float(target_logp)
    H = horizon(target_logp.shape[-1], vocab_size=vocab_size)
    marginals = memoryless_marginals(target_logp, vocab_size=vocab_size, stationary=stationary)

    def table_of(logits):
        table = jax.nn.log_softmax(logits)
        return jnp.broadcast_to(table[None], (H, vocab_size)) if stationary else table

    def policy_of(logits):
        return sequence_logp(memoryless(table_of(logits)))

    divergence = _divergence(target_logp, policy_of, direction)
    start = marginals[0] if stationary else marginals
    if direction == "forward":
        size = jnp.max(jnp.abs(jax.grad(divergence)(start)))
        found = Minimum(params=start, value=divergence(start), gradient=size, steps=jnp.int32(0))
    else:
        peaks = jax.nn.one_hot(completions(vocab_size=vocab_size, horizon=H), vocab_size, dtype=start.dtype)
        peaks = jnp.mean(peaks, axis=1) if stationary else peaks
        starts = jnp.concatenate([start[None], jnp.log((jnp.exp(start)[None] + peaks) / 2)])
        every = jax.vmap(lambda logits: minimise(divergence, logits))(starts)
        found = jax.tree.map(lambda x: x[jnp.argmin(every.value)], every)
    return replace(_projection(policy_of, found), params=table_of(found.params))


def log_linear(
    params: Float[Array, " D"], base_logp: Float[Array, " K"], features: Float[Array, "K D"]
) -> Float[Array, " K"]:
    r"""Log-probabilities of the log-linear policy :math:`\pi(y) \propto p_0(y)\, e^{f(y) \cdot \theta}`.

    These are the tilts of ``base`` by rewards linear in the features.

    Args:
      params: One number per feature, nats per unit of the feature.
      base_logp: Log-probability of every completion at ``params = 0``, nats.
      features: Features of every completion.

    Returns:
      ``[K]``, nats.
    """
    x = as_float(base_logp) + as_float(features) @ as_float(params)
    return x - logsumexp(x)[..., None]


def _divergence(target_logp: Array, policy_of: Callable[[PyTree], Array], direction: str) -> Callable[[PyTree], Array]:
    target_logp = as_float(target_logp)
    if direction == "forward":
        return lambda params: _kl(target_logp, policy_of(params))
    return lambda params: _kl(policy_of(params), target_logp)


def _projection(policy_of: Callable[[PyTree], Array], found: Minimum) -> Projection:
    logp = policy_of(found.params)
    return Projection(params=found.params, logp=logp, divergence=found.value, gradient=found.gradient)


def _kl(p: Array, q: Array) -> Array:
    """``KL(p || q)`` of log-probabilities, with gradients in both; its digits are absolute, as those of a sum."""
    real = p > -jnp.inf
    return jnp.sum(jnp.where(real, jnp.exp(p) * (jnp.where(real, p, 0) - jnp.where(real, q, 0)), 0), axis=-1)
