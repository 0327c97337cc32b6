"""How far a tilt goes and what it buys: divergences from the reference, their bounds, and the candidates they need.

Notation: ``p*`` the tilted distribution, ``w = p* / p_ref``, ``chi2 = Var_ref(w)``. Estimates are from N reference
candidates; the exact values on a small world are in `tiltjax.exact.bandit`.
"""

import chex
import jax.numpy as jnp

from tiltjax.ops.checks import check_one_shape, check_positive
from tiltjax.ops.collectives import pmax, pmin, psum
from tiltjax.ops.logspace import divide, exp_remainder
from tiltjax.ops.masked import as_float, check_alike, masked_sum
from tiltjax.tilt.weights import tilt
from tiltjax.types import Array, AxisName, Bool, Float, Int, Numeric

__all__ = [
    "Deviation",
    "best_of_n_kl_bound",
    "candidates_needed",
    "chi_squared",
    "chi_squared_bound",
    "soft_best_of_n_kl_bound",
    "tilt_kl",
    "tilted_reward",
    "weights_kl",
]

_Count = int | float | Int[Array, "*batch"] | Float[Array, "*batch"]
_Amount = int | float | Float[Array, "*batch"]

# Exponents above this are summed relative to their largest; below it, relative to their mean (see `Deviation`).
_LARGE = 30.0


def tilt_kl(
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""Estimated ``KL(p* || p_ref)`` of the tilt, from N reference candidates.

    .. math:: \widehat{\mathrm{KL}} = \sum_i w_i \log(N w_i), \qquad
              \text{bias} = \frac{\chi^2 - 2 (1 + \chi^2) (E_{\beta/2} r - E_{\beta} r) / \beta}{2N} + O(N^{-2})

    where ``E_beta`` is the mean under the tilt of strength ``beta``. It never exceeds ``log N``: a tilt further away
    than that cannot be seen. Accurate in relative terms however small it is.

    Args:
      reward: Reward of every candidate, drawn from the reference, reward units.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      The divergence, nats, ``[*batch]``; 0 for a row without a real candidate.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> round(float(tilt_kl(jnp.array([0.0, jnp.log(3.0)]), beta=1.0)), 6)  # .25 log .5 + .75 log 1.5
      0.130812
    """
    check_positive("beta", beta)
    return Deviation.of(reward, where=where, axis_name=axis_name).kl(beta, axis_name=axis_name)


def chi_squared(
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""Estimated ``chi2(p* || p_ref)``: the squared coefficient of variation of ``exp(r / beta)``.

    .. math:: \hat\chi^2 = \frac{\frac1N \sum_i e^{2 r_i/\beta}}{(\frac1N \sum_i e^{r_i/\beta})^2} - 1
              = \frac{N}{\mathrm{ESS}} - 1, \qquad
              \text{bias} = \frac{3 \chi^4 - \chi^2 - 2 E_{ref}(w - 1)^3}{N} + O(N^{-2})

    It governs every rate of the library: the bias and variance of ``log Z`` are ``-chi2 / 2N`` and ``chi2 / N``, and
    about ``1 + chi2`` candidates are needed. It never exceeds ``N - 1``.

    Args:
      reward: Reward of every candidate, drawn from the reference, reward units.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      The divergence, ``[*batch]``; 0 for a row without a real candidate.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> round(float(chi_squared(jnp.array([0.0, jnp.log(3.0)]), beta=1.0)), 6)  # 2 / 1.6 - 1
      0.25
    """
    check_positive("beta", beta)
    return Deviation.of(reward, where=where, axis_name=axis_name).chi_squared(beta, axis_name=axis_name)


def tilted_reward(
    reward: Float[Array, "*batch N"],
    *,
    beta: Numeric | Float[Array, "*batch"],
    where: Bool[Array, "*batch N"] | None = None,
    axis_name: AxisName = None,
) -> Float[Array, "*batch"]:
    r"""Estimated mean reward under the tilt, by self-normalised importance weighting.

    .. math:: \hat E = \sum_i w_i r_i, \qquad
              \text{bias} = -\frac{1 + \chi^2}{N} \bigl(E_{\beta/2} r - E_{\beta} r\bigr) + O(N^{-2})

    Always low; it is also the exact mean reward of soft best-of-N given these N candidates. With `tilt_kl` it traces
    the reward-KL frontier.

    Args:
      reward: Reward of every candidate, drawn from the reference, reward units.
      beta: Strength of the KL term, > 0, reward units; a number, or one per prompt.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      The mean, reward units, ``[*batch]``; 0 for a row without a real candidate.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> round(float(tilted_reward(jnp.array([0.0, jnp.log(3.0)]), beta=1.0)), 6)  # 3/4 log 3
      0.823959
    """
    weights = tilt(reward, beta=beta, where=where, axis_name=axis_name).weights
    deviation = Deviation.of(reward, where=where, axis_name=axis_name)
    return deviation.mean + masked_sum(weights * deviation.value, axis_name=axis_name)


def weights_kl(
    weights: Float[Array, "*batch N"], *, where: Bool[Array, "*batch N"] | None = None, axis_name: AxisName = None
) -> Float[Array, "*batch"]:
    r"""KL of any normalised weights from the uniform ones.

    .. math:: \sum_i w_i \log(N w_i) = \frac1N \sum_i h(N w_i), \qquad h(u) = u \log u - u + 1 \ge 0

    For the weights of `tiltjax.tilt.weights.tilt` prefer `tilt_kl`, which keeps its relative accuracy near 0.

    Args:
      weights: Non-negative, summing to 1 over the real candidates.
      where: True for real candidates; None means all.
      axis_name: Mapped axis over which the candidates are split.

    Returns:
      The divergence, nats, ``[*batch]``; 0 for a row without a real candidate.
    """
    weights = as_float(weights)
    check_alike(where, weights)
    count = masked_sum(jnp.ones_like(weights), where, axis_name=axis_name)
    u = weights * count[..., None]
    present = ~(u <= 0) if where is None else where & ~(u <= 0)
    log_u = jnp.log(jnp.where(present, u, 1))
    # u log u - u + 1 = u (e^{-log u} - 1 + log u).
    term = jnp.where(present, jnp.where(present, u, 0) * exp_remainder(-log_u), 1)
    return masked_sum(term, where, axis_name=axis_name) / jnp.maximum(count, 1)


def best_of_n_kl_bound(n: _Count) -> Float[Array, "*batch"]:
    r"""Upper bound on the KL of hard best-of-n from the reference.

    .. math:: \mathrm{KL}(\mathrm{BoN} \| \mathrm{ref}) \le \log n - \frac{n-1}{n}

    An equality only where rewards never tie (a continuous law). With ties, or a finite support, the truth is smaller
    and saturates at ``-log p_ref(best level)``: see `tiltjax.exact.bandit.best_of_n_law`.

    Args:
      n: How many candidates; a number or an array.

    Returns:
      The bound, nats.

    Raises:
      ValueError: If ``n`` is a Python number that is not positive and finite.

    Example:
      >>> round(float(best_of_n_kl_bound(16)), 6)
      1.835089

    References:
      Beirami et al., 2024, arXiv:2401.01879, Theorem 1.
    """
    check_positive("n", n)
    n = as_float(jnp.asarray(n))
    return jnp.log(n) - (1 - 1 / n)


def soft_best_of_n_kl_bound(n: _Count, *, reward_range: _Amount, beta: _Amount) -> Float[Array, "*batch"]:
    r"""Upper bound on the KL of soft best-of-n from the reference, for rewards within a known range.

    .. math:: \mathrm{KL}(P_n \| \mathrm{ref}) \le \log \frac{n}{1 + (n-1) e^{-\Delta/\beta}} \le \log n, \qquad
              \Delta = r_{\max} - r_{\min}

    Args:
      n: How many candidates; a number or an array.
      reward_range: Largest minus smallest possible reward, reward units.
      beta: Strength of the KL term, > 0, reward units.

    Returns:
      The bound, nats.

    Raises:
      ValueError: If ``n`` or ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> round(float(soft_best_of_n_kl_bound(16, reward_range=1.0, beta=0.5)), 6)
      1.664016

    References:
      Aminian et al., 2025, arXiv:2507.05913.
    """
    check_positive("n", n)
    check_positive("beta", beta)
    check_one_shape(n=n, reward_range=reward_range, beta=beta)
    n, exponent = as_float(jnp.asarray(n)), as_float(jnp.asarray(reward_range) / beta)
    return -jnp.log1p((1 - 1 / n) * jnp.expm1(-exponent))


def chi_squared_bound(*, reward_range: _Amount, beta: _Amount) -> Float[Array, "*batch"]:
    r"""Largest ``chi2(p* || p_ref)`` that rewards within a known range can have.

    .. math:: \chi^2(p^* \| p_{ref}) \le \sinh^2\frac{\Delta}{2\beta}

    Attained by two reward levels at the ends of the range; other laws are far below (uniform rewards: about
    ``Delta / 2 beta``).

    Args:
      reward_range: Largest minus smallest possible reward ``Delta``, reward units.
      beta: Strength of the KL term, > 0, reward units.

    Returns:
      The bound.

    Raises:
      ValueError: If ``beta`` is a Python number that is not positive and finite.

    Example:
      >>> round(float(chi_squared_bound(reward_range=1.0, beta=0.5)), 6)
      1.381098
    """
    check_positive("beta", beta)
    check_one_shape(reward_range=reward_range, beta=beta)
    return jnp.square(jnp.sinh(as_float(jnp.asarray(reward_range) / beta) / 2))


def candidates_needed(chi2: _Amount, *, kl: _Amount) -> Float[Array, "*batch"]:
    r"""How many candidates bring soft best-of-N within ``kl`` nats of the tilted distribution.

    .. math:: \mathrm{KL}(p^* \| P_N) \le \log(1 + \chi^2/N) \le \mathrm{kl}
              \quad\Leftarrow\quad N = \lceil \chi^2 / (e^{\mathrm{kl}} - 1) \rceil

    Sufficient for any reward law. The true divergence falls as ``1/N^2``, so fewer will often do.

    Args:
      chi2: ``chi2(p* || p_ref)``, from `chi_squared` or `chi_squared_bound`.
      kl: The divergence that is good enough, > 0, nats.

    Returns:
      A whole number of candidates, at least 1, as a float.

    Raises:
      ValueError: If ``kl`` is a Python number that is not positive and finite.

    Example:
      >>> float(candidates_needed(3.0, kl=0.01))
      299.0
    """
    check_positive("kl", kl)
    check_one_shape(chi2=chi2, kl=kl)
    needed = as_float(jnp.asarray(chi2)) / jnp.expm1(as_float(jnp.asarray(kl)))
    return jnp.maximum(jnp.ceil(needed), 1)


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Deviation:
    """Rewards relative to their mean: what the divergences of a tilt are computed from, at any ``beta``.

    Near the mean a divergence is a small difference of large sums; in terms of ``exp(d) - 1`` and ``exp(d) - 1 - d``
    with ``d = (r - mean r) / beta`` it is a ratio of small sums, and float32 keeps its digits.

    Attributes:
      value: ``r - mean r``, ``[*batch, N]``; 0 where masked.
      mean: ``mean r`` over the real candidates, ``[*batch]``.
      top: Largest deviation, ``[*batch]``.
      span: Largest minus smallest reward, ``[*batch]``.
      count: Real candidates, ``[*batch]``.
      real: True for real candidates, ``[*batch, N]``.
    """

    value: Float[Array, "*batch N"]
    mean: Float[Array, "*batch"]
    top: Float[Array, "*batch"]
    span: Float[Array, "*batch"]
    count: Float[Array, "*batch"]
    real: Bool[Array, "*batch N"]

    @classmethod
    def of(
        cls, reward: Float[Array, "*batch N"], *, where: Bool[Array, "*batch N"] | None, axis_name: AxisName = None
    ) -> "Deviation":
        """Centres the rewards of real candidates; ``span`` carries no gradient."""
        reward = as_float(reward)
        real = jnp.ones(reward.shape, bool) if where is None else where
        check_alike(where, reward)
        reward = jnp.where(real, reward, 0)
        count = psum(jnp.sum(real, axis=-1, dtype=reward.dtype), axis_name)
        high = pmax(jnp.max(reward, axis=-1, where=real, initial=-jnp.inf), axis_name)
        low = pmin(jnp.min(reward, axis=-1, where=real, initial=jnp.inf), axis_name)
        some = count > 0
        high, low = jnp.where(some, high, 0), jnp.where(some, low, 0)
        below = jnp.where(real, reward - high[..., None], 0)
        offset = masked_sum(below, axis_name=axis_name) / jnp.maximum(count, 1)
        return cls(
            value=jnp.where(real, below - offset[..., None], 0),
            mean=high + offset,
            top=-offset,
            span=high - low,
            count=count,
            real=real,
        )

    def kl(self, beta: Numeric | Float[Array, "*batch"], *, axis_name: AxisName = None) -> Float[Array, "*batch"]:
        """`tilt_kl` at this ``beta``."""
        d, top, n = divide(self.value, beta), self.top / beta, jnp.maximum(self.count, 1)
        near, c = jnp.minimum(d, _LARGE), jnp.where(self.real, d - top[..., None], 0)
        u = jnp.where(self.real, jnp.exp(c), 0)
        sums = exp_remainder(near), near * jnp.expm1(near), u, c * u
        remainder, slope, mass, moment = psum(tuple(jnp.sum(x, axis=-1) for x in sums), axis_name)
        mass = jnp.where(mass == 0, n, mass)
        close = slope / n / (1 + remainder / n) - jnp.log1p(remainder / n)
        return jnp.where(top > _LARGE, moment / mass - jnp.log(mass / n), jnp.maximum(close, 0))

    def chi_squared(
        self, beta: Numeric | Float[Array, "*batch"], *, axis_name: AxisName = None
    ) -> Float[Array, "*batch"]:
        """`chi_squared` at this ``beta``."""
        d, top, n = divide(self.value, beta), self.top / beta, jnp.maximum(self.count, 1)
        near = jnp.minimum(d, _LARGE)
        u = jnp.where(self.real, jnp.exp(jnp.where(self.real, d - top[..., None], 0)), 0)
        sums = exp_remainder(near), jnp.square(jnp.expm1(near)), u, jnp.square(u)
        remainder, square, mass, mass_square = psum(tuple(jnp.sum(x, axis=-1) for x in sums), axis_name)
        mass = jnp.where(mass == 0, n, mass)
        close = (square / n - jnp.square(remainder / n)) / jnp.square(1 + remainder / n)
        return jnp.where(top > _LARGE, n * mass_square / jnp.square(mass) - 1, jnp.maximum(close, 0))
