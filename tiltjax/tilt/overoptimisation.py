r"""Scaling laws of over-optimisation: true reward against distance, while a proxy of that reward is optimised.

Both are functions of :math:`d = \sqrt{\mathrm{KL}(\pi \| p_\text{ref})}` with two coefficients: ``alpha``, what the
proxy first buys, and ``b``, how fast its faults are found. (The paper calls the second one beta, a word that here
divides a reward.) They describe proxies with a few hackable or heavy-tailed errors; a Gaussian error never makes the
true reward fall. Exactly, on a tilt towards a proxy, the true reward changes with ``1 / beta`` at the rate
:math:`\mathrm{Cov}(\text{true}, \text{proxy})` and peaks where that covariance is 0.
"""

import chex
import jax.numpy as jnp

from tiltjax.ops.checks import check_choice, check_one_shape
from tiltjax.ops.masked import as_float, check_alike, masked_mean, masked_sum
from tiltjax.types import Array, Bool, Float, Numeric

__all__ = ["Overoptimisation", "best_of_n_curve", "fit_overoptimisation", "peak_distance", "rl_curve"]

_FORMS = ("best_of_n", "rl")


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Overoptimisation:
    """A fitted law.

    Attributes:
      alpha: Slope at the start, reward units per square root of a nat, ``[*batch]``.
      b: What the curve loses, reward units per nat ("best_of_n") or as ``alpha`` ("rl"), ``[*batch]``.
      r_squared: Share of the variance of the reward that the curve explains, at most 1, ``[*batch]``; 0 where there is
        no variance.
      peak_kl: Divergence at the maximum of the curve, nats, ``[*batch]``; inf where it never turns, 0 where it only
        falls. Trust it no further than the range of the data.
    """

    alpha: Float[Array, "*batch"]
    b: Float[Array, "*batch"]
    r_squared: Float[Array, "*batch"]
    peak_kl: Float[Array, "*batch"]


def best_of_n_curve(
    distance: Float[Array, "*batch"], *, alpha: Numeric | Float[Array, "*batch"], b: Numeric | Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    r"""True reward of best-of-n over the reference's: :math:`d\,(\alpha - b\,d)`.

    Args:
      distance: ``d``, square root of the KL from the reference in nats; of best-of-n,
        :math:`\log n - (n - 1)/n` (`tiltjax.tilt.divergence.best_of_n_kl_bound`).
      alpha: Slope at the start; a number, or the shape of ``distance``.
      b: What the curve loses; likewise. The paper's beta.

    Returns:
      Reward units, the shape of ``distance``.

    Example:
      >>> [float(best_of_n_curve(jnp.float32(d), alpha=2.0, b=0.5)) for d in (0.0, 2.0, 4.0)]
      [0.0, 2.0, 0.0]

    References:
      Gao, Schulman, Hilton, 2023, arXiv:2210.10760, section 1.
    """
    check_one_shape(distance=distance, alpha=alpha, b=b)
    distance = as_float(distance)
    return distance * (alpha - b * distance)


def rl_curve(
    distance: Float[Array, "*batch"], *, alpha: Numeric | Float[Array, "*batch"], b: Numeric | Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
    r"""True reward of a policy trained by RL over the reference's: :math:`d\,(\alpha - b \log d)`.

    Its slope at 0 is infinite, so it describes no policy that is close to the reference.

    Args:
      distance: ``d``, square root of the KL from the reference in nats, >= 0.
      alpha: As in `best_of_n_curve`.
      b: As in `best_of_n_curve`.

    Returns:
      Reward units, the shape of ``distance``; 0 at 0.

    Example:
      >>> round(float(rl_curve(jnp.float32(1.0), alpha=2.0, b=0.5)), 4)
      2.0

    References:
      Gao, Schulman, Hilton, 2023, arXiv:2210.10760, section 1.
    """
    check_one_shape(distance=distance, alpha=alpha, b=b)
    distance = as_float(distance)
    return jnp.where(distance == 0, 0, distance * (alpha - b * _log(distance)))


def peak_distance(
    *, alpha: Numeric | Float[Array, "*batch"], b: Numeric | Float[Array, "*batch"], form: str = "best_of_n"
) -> Float[Array, "*batch"]:
    r"""Where a curve is highest: :math:`d = \alpha / 2b` of best-of-n, :math:`d = e^{\alpha/b - 1}` of RL.

    Args:
      alpha: Slope at the start; a number or an array.
      b: What the curve loses; likewise.
      form: "best_of_n" or "rl".

    Returns:
      ``d``, square root of nats, ``[*batch]``; inf where the curve rises for ever, 0 where it only falls.

    Raises:
      ValueError: If ``form`` is unknown.

    Example:
      >>> float(peak_distance(alpha=2.0, b=0.5)), round(float(peak_distance(alpha=2.0, b=0.5, form="rl")), 3)
      (2.0, 20.086)
    """
    check_choice("form", form, _FORMS)
    check_one_shape(alpha=alpha, b=b)
    alpha, b = as_float(jnp.asarray(alpha)), as_float(jnp.asarray(b))
    turns = ~(b <= 0) | jnp.isnan(alpha)
    ratio = alpha / jnp.where(turns, b, 1)
    peak = jnp.exp(ratio - 1) if form == "rl" else jnp.maximum(ratio, 0) / 2
    return jnp.where(turns, peak, jnp.where((b < 0) | (alpha > 0), jnp.inf, 0))


def fit_overoptimisation(
    kl: Float[Array, "*batch M"],
    reward: Float[Array, "*batch M"],
    *,
    form: str = "best_of_n",
    where: Bool[Array, "*batch M"] | None = None,
) -> Overoptimisation:
    r"""Least squares of a law of over-optimisation, which is linear in its two coefficients.

    .. math:: \min_{\alpha, b} \sum_m \left( R_m - \alpha\, d_m + b\, g(d_m) \right)^2, \qquad
              g(d) = d^2 \text{ or } d \log d, \quad d = \sqrt{\mathrm{KL}}

    in closed form, the second feature made orthogonal to the first. Points at ``kl = 0`` say nothing and are left out.

    Args:
      kl: Divergence of M policies (or of best-of-n at M sizes) from the reference, nats.
      reward: Their mean true reward less the reference's, reward units.
      form: "best_of_n" or "rl".
      where: True for real points; None means all.

    Returns:
      `Overoptimisation`; with fewer than two different divergences ``b`` is 0, without any point all fields are.

    Raises:
      ValueError: If ``form`` is unknown.

    Example:
      >>> kl = jnp.array([1.0, 4.0, 9.0])
      >>> fit = fit_overoptimisation(kl, best_of_n_curve(jnp.sqrt(kl), alpha=2.0, b=0.5))
      >>> [round(float(x), 3) for x in (fit.alpha, fit.b, fit.r_squared, fit.peak_kl)]
      [2.0, 0.5, 1.0, 4.0]

    References:
      Gao, Schulman, Hilton, 2023, arXiv:2210.10760, section 1.
    """
    check_choice("form", form, _FORMS)
    kl, reward = as_float(kl), as_float(reward)
    check_alike(where, kl, reward)
    real = ~(kl <= 0) if where is None else where & ~(kl <= 0)
    distance = jnp.where(real, jnp.sqrt(jnp.where(real, kl, 1)), 0)
    second = distance * (_log(distance) if form == "rl" else distance)
    reward = jnp.where(real, reward, 0)

    first_square = masked_sum(jnp.square(distance))
    along = _over(masked_sum(distance * second), first_square)
    rest = second - along[..., None] * distance
    rest_square = masked_sum(jnp.square(rest))
    # What is left of a multiple of the first feature is rounding.
    dependent = rest_square <= jnp.square(8 * jnp.finfo(kl.dtype).eps) * masked_sum(jnp.square(second))
    b = -jnp.where(dependent, 0, _over(masked_sum(rest * reward), rest_square))
    alpha = _over(masked_sum(distance * (reward + b[..., None] * second)), first_square)

    error = reward - alpha[..., None] * distance + b[..., None] * second
    spread = masked_sum(jnp.square(reward - masked_mean(reward, real)[..., None]), real)
    explained = jnp.where(spread <= 0, 0, 1 - _over(masked_sum(jnp.square(error), real), spread))
    peak_kl = jnp.square(peak_distance(alpha=alpha, b=b, form=form))
    return Overoptimisation(alpha=alpha, b=b, r_squared=explained, peak_kl=peak_kl)


def _log(distance: Array) -> Array:
    return jnp.log(jnp.where(distance > 0, distance, 1))


def _over(x: Array, y: Array) -> Array:
    return x / jnp.where(y <= 0, 1, y)
