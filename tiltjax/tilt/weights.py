"""The tilt itself: rewards of N candidates -> weights, log Z, effective sample size."""

import chex

from tiltjax.ops.checks import check_positive
from tiltjax.ops.logspace import exp_sum
from tiltjax.types import Array, AxisName, Bool, Float, Numeric

__all__ = ["Tilt", "tilt"]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Tilt:
    """A reference distribution tilted towards a reward, as seen by N of its candidates.

    Attributes:
      weights: ``exp(r_i / beta) / sum_j exp(r_j / beta)``, ``[*batch, N]``; sums to 1 over the real candidates.
      log_z: ``log (1/N) sum_i exp(r_i / beta)``, nats, ``[*batch]``: estimates ``log E_ref exp(r / beta)``.
      ess: ``1 / sum_i weights_i^2``, ``[*batch]``, in ``[1, N]``: how many untilted candidates these weigh as much as.
    """

    weights: Float[Array, "*batch N"]
    log_z: Float[Array, "*batch"]
    ess: Float[Array, "*batch"]


def tilt(
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Tilt:
    r"""Tilts N reference candidates towards their reward.

    .. math:: w_i = \frac{\exp(r_i/\beta)}{\sum_j \exp(r_j/\beta)}, \qquad
              \log \hat Z = \log \frac1N \sum_i \exp(r_i/\beta), \qquad \mathrm{ESS} = \frac{(\sum w)^2}{\sum w^2}

    The largest reward is subtracted before the division by ``beta`` and the weights are normalised by their own summed
    mass, so they sum to 1 where ``|r / beta|`` is 1e5. ``Z`` is unbiased, ``log Z`` is low by ``Var(w) / 2N`` to first
    order: see `tiltjax.tilt.partition`. A row without a real candidate gets weights 0, log Z 0 and ESS 0.

    Args:
      reward: Reward of every candidate, drawn from the reference, reward units.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split; weights stay local, ``log_z`` and ``ess`` are global.

    Returns:
      `Tilt` of weights, log Z (nats) and effective sample size.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> import jax.numpy as jnp
      >>> t = tilt(jnp.array([0.0, jnp.log(3.0)]), beta=1.0)
      >>> [round(float(w), 4) for w in t.weights], round(float(t.log_z), 4), round(float(t.ess), 4)
      ([0.25, 0.75], 0.6931, 1.6)

    References:
      Jiao, Chen, Li, 2025, arXiv:2509.04372, Eqs. 19-20; Rafailov et al., 2023, arXiv:2305.18290, Eq. 4.
    """
    check_positive("beta", beta)
    weights, total = exp_sum(reward, beta=beta, where=where, axis_name=axis_name)
    mass = total.mass[..., None]
    return Tilt(weights=weights / (mass + (mass == 0)), log_z=total.log_mean, ess=total.ess)
