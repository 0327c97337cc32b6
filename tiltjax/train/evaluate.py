"""What theory predicts from N reference candidates per prompt, and what a tuned policy reached."""

import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tiltjax.exact.bandit import kl, soft_best_of_n_law
from tiltjax.ops.checks import check_at_least, check_positive
from tiltjax.ops.order import expected_max
from tiltjax.tilt.divergence import best_of_n_kl_bound, tilt_kl, tilted_reward
from tiltjax.tilt.partition import jackknife_log_partition, log_partition
from tiltjax.tilt.tails import pareto_k
from tiltjax.tilt.weights import tilt
from tiltjax.train.metrics import Interval, bootstrap_interval
from tiltjax.types import Array, Float

__all__ = [
    "Point",
    "PromptEstimates",
    "best_of_n_frontier",
    "estimate",
    "policy_point",
    "soft_best_of_n_frontier",
    "tilt_frontier",
]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class PromptEstimates:
    """Estimates for every prompt from its N reference candidates.

    Attributes:
      log_z: Plain log-partition estimate, nats, ``[P]``.
      log_z_jackknife: With the 1/N bias removed, nats, ``[P]``.
      ess: Effective sample size, in ``[1, N]``, ``[P]``.
      pareto_k: Tail index of the weights, ``[P]``; above 0.7 the estimates are not to be trusted.
      tilted_reward: Importance-weighted mean reward under the tilt, reward units, ``[P]``.
      tilt_kl: KL of the tilt from the reference, nats, ``[P]``.
    """

    log_z: Float[Array, " P"]
    log_z_jackknife: Float[Array, " P"]
    ess: Float[Array, " P"]
    pareto_k: Float[Array, " P"]
    tilted_reward: Float[Array, " P"]
    tilt_kl: Float[Array, " P"]


def estimate(reward: Float[Array, "P N"], *, beta: float) -> PromptEstimates:
    """All estimates of the E-step.

    Args:
      reward: Of N reference candidates per prompt, reward units.
      beta: Strength of the KL term, reward units.

    Returns:
      `PromptEstimates`.
    """
    return jax.device_get(_estimate(jnp.asarray(reward), beta=beta))


@functools.partial(jax.jit, static_argnames="beta")
def _estimate(reward: Array, *, beta: float) -> PromptEstimates:
    return PromptEstimates(
        log_z=log_partition(reward, beta=beta),
        log_z_jackknife=jackknife_log_partition(reward, beta=beta),
        ess=tilt(reward, beta=beta).ess,
        pareto_k=pareto_k(reward / beta),
        tilted_reward=tilted_reward(reward, beta=beta),
        tilt_kl=tilt_kl(reward, beta=beta),
    )


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Point:
    """A policy on the reward-KL plane, with 95% bootstrap intervals over prompts.

    Attributes:
      name: Of the policy.
      strength: N, beta, or None.
      reward: Reward units.
      kl: From the reference, nats per completion.
    """

    name: str
    strength: float | int | None
    reward: Interval
    kl: Interval


def policy_point(name: str, reward: Float[Array, "P N"], log_ratio: Float[Array, "P N"]) -> Point:
    """A policy from its own samples: mean reward, and ``KL = E[log pi - log ref]``.

    Args:
      name: Of the policy.
      reward: Of its candidates, reward units.
      log_ratio: ``logp - ref_logp`` of the same candidates, nats.

    Returns:
      `Point`.
    """
    means = [np.mean(np.asarray(x, np.float64), axis=1) for x in (reward, log_ratio)]
    return Point(name=name, strength=None, reward=bootstrap_interval(means[0]), kl=bootstrap_interval(means[1]))


def soft_best_of_n_frontier(reward: Float[Array, "P M"], *, beta: float, ns: Sequence[int]) -> list[Point]:
    """Soft best-of-N by its exact finite-N law, with the M observed candidates of a prompt as the reference.

    Meant for N up to M / 2: the KL of a law on M points cannot exceed log M.
    """
    check_positive("beta", beta)
    for n in ns:
        check_at_least("n", n, 1)
    return [_point("soft best-of-N", n, *_soft_best_of_n(jnp.asarray(reward), jnp.int32(n), beta)) for n in ns]


@jax.jit
def _soft_best_of_n(reward: Array, n: Array, beta: Any) -> tuple[Array, Array]:
    ref = jnp.full_like(reward, 1 / reward.shape[1])
    law = soft_best_of_n_law(ref, reward, n=n, beta=beta)
    return jnp.sum(law * reward, axis=1), kl(law, ref)


def best_of_n_frontier(reward: Float[Array, "P M"], *, ns: Sequence[int]) -> list[Point]:
    """Best-of-N: unbiased expected maximum, and the KL bound ``log N - (N-1)/N`` (an equality without ties)."""
    return [_point("best-of-N", n, *_best_of_n(reward, n)) for n in ns]


@functools.partial(jax.jit, static_argnames="n")
def _best_of_n(reward: Array, n: int) -> tuple[Array, Array]:
    return expected_max(reward, n=n), jnp.full(len(reward), best_of_n_kl_bound(n))


def tilt_frontier(reward: Float[Array, "P M"], *, betas: Sequence[float]) -> list[Point]:
    """The optimum of ``E r - beta KL`` for every beta, by self-normalised importance weights."""
    for beta in betas:
        check_positive("beta", beta)
    return [_point("tilt", b, *_tilt(jnp.asarray(reward), b)) for b in betas]


@jax.jit
def _tilt(reward: Array, beta: Any) -> tuple[Array, Array]:
    return tilted_reward(reward, beta=beta), tilt_kl(reward, beta=beta)


def _point(name: str, strength: float | int, reward: Array, divergence: Array) -> Point:
    return Point(
        name=name,
        strength=strength,
        reward=bootstrap_interval(reward),
        kl=bootstrap_interval(np.maximum(divergence, 0)),
    )
