"""Reinforcement learning from internal feedback, exactly: a policy rewarded for its own certainty.

The utility is the mean over positions of ``KL(pi(.|prefix) || uniform)``, at the *current* policy and with its
gradient: in expectation ``log V - H(pi) / L``. The relations below do not hold for a reward frozen at an earlier
policy, a KL penalty averaged over tokens, or the reverse direction of that KL.
"""

import jax
import jax.numpy as jnp

from tiltjax.exact.tree.soft import regularised_reward
from tiltjax.exact.tree.world import Levels, path_sums, sequence_logp
from tiltjax.ops.checks import check_at_least, check_positive
from tiltjax.ops.logspace import logsumexp
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Float, Numeric

__all__ = ["certainty", "rlif_objective", "rlif_optimum"]


def certainty(policy: Levels) -> Float[Array, "*batch K"]:
    r"""How certain a policy was while it wrote each completion.

    .. math:: u(y) = \frac1L \sum_{t=1}^L \mathrm{KL}\bigl(\pi(\cdot | y_{<t}) \,\big\|\, \text{uniform}\bigr)

    Args:
      policy: ``L`` levels ``[*batch, V**t, V]`` of log-probabilities, nats.

    Returns:
      ``[*batch, V**L]``, nats, in ``[0, log V]``.

    Example:
      >>> [round(float(u), 4) for u in certainty([jnp.log(jnp.array([[0.5, 0.5]]))])]
      [0.0, 0.0]

    References:
      Jiao, Chen, Li, 2025, arXiv:2509.04372.
    """
    gains = []
    for level in map(as_float, policy):
        real = level > -jnp.inf
        finite = jnp.where(real, level, 0)
        gain = jnp.sum(jnp.where(real, jnp.exp(level) * (finite + jnp.log(float(level.shape[-1]))), 0), axis=-1)
        gains.append(jnp.broadcast_to(gain[..., None], level.shape))
    return path_sums(gains)[-1] / len(policy)


def rlif_objective(policy: Levels, ref: Levels, *, beta: Numeric) -> Float[Array, "*batch"]:
    r"""Expected certainty less the KL divergence of whole completions from the reference.

    .. math:: E_\pi u_\pi - \beta\, \mathrm{KL}(\pi \| p_\text{ref})

    Differentiable in ``policy``, through the utility too. `rlif_optimum` is its maximum.

    Args:
      policy: ``L`` levels ``[*batch, V**t, V]`` of log-probabilities, nats.
      ref: The reference's.
      beta: Strength of the KL term, > 0, nats of certainty per nat.

    Returns:
      ``[*batch]``, nats.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    References:
      Jiao, Chen, Li, 2025, arXiv:2509.04372.
    """
    return regularised_reward(sequence_logp(policy), sequence_logp(ref), certainty(policy), beta=beta)


def rlif_optimum(ref_logp: Float[Array, "*batch K"], *, beta: Numeric, length: int) -> Float[Array, "*batch K"]:
    r"""The policy that maximises `rlif_objective`.

    .. math:: \pi \propto p_\text{ref}^{L \beta / (L \beta - 1)} \quad (L \beta > 1)

    This is the tilt of the reference by ``log p_ref`` at strength ``L beta - 1``: where the reference is itself the
    distribution that people prefer, reinforcement learning from them has the same optimum. For
    :math:`L \beta \le 1` the objective is convex and the optimum collapses onto the reference's likeliest completion
    (the first of several).

    Args:
      ref_logp: Reference's log-probability of every completion, nats.
      beta: Strength of the KL term, > 0.
      length: ``L``, tokens of every completion, at least 1.

    Returns:
      Log-probability of every completion, ``[*batch, K]``, nats; -inf off the mode where it collapses.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite, or ``length`` below 1.

    Example:
      >>> ref_logp = jnp.log(jnp.array([0.2, 0.8]))
      >>> [round(float(p), 4) for p in jnp.exp(rlif_optimum(ref_logp, beta=1.0, length=2))]  # 1 : 16
      [0.0588, 0.9412]
      >>> jnp.exp(rlif_optimum(ref_logp, beta=0.5, length=2)).tolist()
      [0.0, 1.0]

    References:
      Jiao, Chen, Li, 2025, arXiv:2509.04372, Eq. 10.
    """
    check_positive("beta", beta)
    check_at_least("length", length, 1)
    ref_logp = as_float(ref_logp)
    inside = jnp.asarray(length * beta > 1)
    power = length * beta / jnp.where(inside, length * beta - 1, 1)
    top = jnp.max(ref_logp, axis=-1, keepdims=True)
    raised = power * (ref_logp - top)
    raised = raised - logsumexp(raised)[..., None]
    mode = jax.nn.one_hot(jnp.argmax(ref_logp, axis=-1), ref_logp.shape[-1], dtype=ref_logp.dtype)
    return jnp.where(inside, raised, jnp.log(mode))
