r"""Gaussian mixtures under diffusion noise: every score, class posterior, soft value and reverse kernel in closed form.

A mixture that is noised, blurred, conditioned on a class or on a noisy observation of itself is a mixture again, so a
handful of functions from mixtures to mixtures says everything: with ``m`` the law of ``x_0``, ``noised(m, a)`` is the
law of ``x_t``, ``posterior(m, x, a)`` that of ``x_0`` given ``x_t = x``, and
``posterior(noised(m, a'), x, a / a')`` the exact reverse kernel from level ``a`` to the cleaner ``a'``.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tiltjax.ops.logspace import logsumexp
from tiltjax.samplers.denoise import Denoiser
from tiltjax.types import Array, Float, Int, Numeric, PRNGKey

__all__ = [
    "GuidedVariance",
    "Mixture",
    "blurred",
    "class_denoiser",
    "conditioned",
    "denoiser",
    "guided_variance",
    "linear_soft_value",
    "log_class",
    "log_prob",
    "mixture",
    "noised",
    "posterior",
    "sample",
    "score",
    "soft_value",
]

_AlphaBar = Numeric | Float[Array, "*batch"]


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Mixture:
    """M Gaussians in D dimensions, each of a class; a batch of mixtures shares their axes and labels.

    Attributes:
      log_weight: Log-probability of each component, ``[*batch, M]``; -inf switches one off.
      mean: ``[*batch, M, D]``.
      variance: Along the principal axes, ``[*batch, M, D]``.
      axes: The principal axes as columns, ``[M, D, D]``: noise leaves them as they are.
      label: Class of each component, ``[M]``.
    """

    log_weight: Float[Array, "*batch M"]
    mean: Float[Array, "*batch M D"]
    variance: Float[Array, "*batch M D"]
    axes: Float[Array, "M D D"]
    label: Int[Array, " M"]


def mixture(
    weight: Float[Array, " M"],
    mean: Float[Array, "M D"],
    covariance: Float[Array, "M D D"],
    label: Int[Array, " M"] | None = None,
) -> Mixture:
    """A mixture from its covariances.

    Args:
      weight: Positive; normalised here.
      mean: Of the components.
      covariance: Of the components, symmetric, positive definite.
      label: Class of each component; None makes each its own.

    Returns:
      `Mixture`, in the floating type of ``mean``.
    """
    mean = jnp.asarray(mean)
    variance, axes = jnp.linalg.eigh(jnp.asarray(covariance, mean.dtype))
    weight = jnp.asarray(weight, mean.dtype)
    label = jnp.arange(len(weight)) if label is None else jnp.asarray(label)
    return Mixture(log_weight=jnp.log(weight / jnp.sum(weight)), mean=mean, variance=variance, axes=axes, label=label)


def conditioned(m: Mixture, label: int | Int[Array, ""]) -> Mixture:
    """The law given a class: the components of other classes are switched off."""
    where = jnp.broadcast_to(m.label == label, m.log_weight.shape)
    kept = jnp.where(where, m.log_weight, -jnp.inf)
    return dataclasses.replace(m, log_weight=kept - logsumexp(kept)[..., None])


def noised(m: Mixture, alpha_bar: _AlphaBar) -> Mixture:
    r"""The law of ``sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise``: the variance-preserving noise.

    Args:
      m: Law of ``x_0``.
      alpha_bar: In (0, 1]; a scalar, or ``[*batch]`` for a batch of laws.

    Returns:
      `Mixture`.
    """
    a = _wide(jnp.asarray(alpha_bar, m.mean.dtype)[..., None, None], m.mean)
    return _moved(m, mean=jnp.sqrt(a) * _wide(m.mean, a), variance=a * _wide(m.variance, a) + (1 - a))


def blurred(m: Mixture, sigma2: _AlphaBar) -> Mixture:
    """The law of ``x_0`` plus noise of variance ``sigma2``: the variance-exploding noise; see `noised`."""
    s = _wide(jnp.asarray(sigma2, m.mean.dtype)[..., None, None], m.mean)
    return _moved(m, mean=_wide(m.mean, s) + 0 * s, variance=_wide(m.variance, s) + s)


def posterior(m: Mixture, x: Float[Array, "*batch D"], alpha_bar: _AlphaBar) -> Mixture:
    r"""The law of ``x_0`` given its noisy ``x``: components are reweighed by how well they explain it.

    .. math:: \Sigma' = \left(\Sigma^{-1} + \frac{\bar\alpha}{1 - \bar\alpha}\right)^{-1}, \qquad
              \mu' = \mu + \frac{\sqrt{\bar\alpha}}{1 - \bar\alpha} \Sigma' (x - \sqrt{\bar\alpha} \mu)

    Args:
      m: Law of ``x_0``.
      x: Noisy observations.
      alpha_bar: In (0, 1); a scalar or ``[*batch]``.

    Returns:
      `Mixture` of leading shape ``[*batch]``.
    """
    a = jnp.broadcast_to(jnp.asarray(alpha_bar, m.mean.dtype), x.shape[:-1])[..., None, None]
    prior, noisy = _wide(m.variance, a), noised(m, a[..., 0, 0])
    variance = prior * (1 - a) / (a * prior + (1 - a))
    pull = _rotate(m.axes, _along(m.axes, _away(noisy, x)) * prior / noisy.variance)
    return _moved(
        m,
        log_weight=jax.nn.log_softmax(_component_logp(noisy, x), axis=-1),
        mean=_wide(m.mean, a) + jnp.sqrt(a) * pull,
        variance=variance,
    )


def log_prob(m: Mixture, x: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """Log-density at ``x``, nats."""
    return logsumexp(_component_logp(m, x))


def score(m: Mixture, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Gradient of the log-density at ``x``."""
    share = jax.nn.softmax(_component_logp(m, x), axis=-1)
    away = _along(m.axes, _away(m, x))
    pull = _rotate(m.axes, away / _wide(m.variance, away))
    return -jnp.sum(share[..., None] * pull, axis=-2)


def log_class(m: Mixture, x: Float[Array, "*batch D"], label: int | Int[Array, ""]) -> Float[Array, "*batch"]:
    """Log-probability of a class given ``x``, nats: ``log p_t(c | x)`` where ``m`` is `noised`."""
    logp = _component_logp(m, x)
    where = jnp.broadcast_to(m.label == label, logp.shape)
    return logsumexp(logp, where=where) - logsumexp(logp)


def denoiser(m: Mixture) -> Denoiser:
    """The exact ``(x [*batch, D], alpha_bar) -> noise``, ``-sqrt(1 - alpha_bar)`` times the score of the noised law."""

    def predict(x: Array, alpha_bar: Numeric | Array) -> Array:
        spread = jnp.sqrt(1 - jnp.asarray(alpha_bar, m.mean.dtype))
        return -(spread if spread.ndim == 0 else spread[..., None]) * score(noised(m, alpha_bar), x)

    return predict


def class_denoiser(m: Mixture, label: int | Int[Array, ""]) -> Denoiser:
    """The exact denoiser given a class."""
    return denoiser(conditioned(m, label))


def sample(key: PRNGKey, m: Mixture, num: int) -> tuple[Float[Array, "num D"], Int[Array, " num"]]:
    """Draws from one mixture, with their classes.

    Args:
      key: Consumed.
      m: Not a batch.
      num: How many.

    Returns:
      Draws ``[num, D]`` and labels ``[num]``.
    """
    pick, draw = jax.random.split(key)
    chosen = jax.random.categorical(pick, m.log_weight, shape=(num,))
    z = jax.random.normal(draw, (num, m.mean.shape[-1]), m.mean.dtype)
    x = m.mean[chosen] + jnp.einsum("nij,nj->ni", m.axes[chosen], jnp.sqrt(m.variance[chosen]) * z)
    return x, m.label[chosen]


def soft_value(
    m: Mixture,
    x: Float[Array, "*batch 1"],
    alpha_bar: _AlphaBar,
    reward: Callable[[Array], Array],
    *,
    beta: Numeric,
    nodes: int = 64,
) -> Float[Array, "*batch"]:
    r"""The soft value ``beta log E[exp(r(x_0) / beta) | x]`` of any reward in one dimension, by quadrature.

    Gauss and Hermite's nodes for every component of the `posterior`: exact to rounding where ``exp(r / beta)`` is a
    polynomial of degree below ``2 nodes`` there, and very nearly so where it is smooth on its scale.

    Args:
      m: Law of ``x_0``, D = 1.
      x: Noisy observations.
      alpha_bar: In (0, 1); a scalar or ``[*batch]``.
      reward: ``x_0 [*batch, 1] -> [*batch]``, any leading dimensions, reward units.
      beta: Strength of the KL term, > 0, reward units.
      nodes: Of the quadrature.

    Returns:
      The soft value, reward units, ``[*batch]``. Its gradient over ``beta`` is what tilting adds to the score.
    """
    points, mass = (jnp.asarray(a, m.mean.dtype) for a in np.polynomial.hermite_e.hermegauss(nodes))
    law = posterior(m, x, alpha_bar)
    spread = jnp.sqrt(law.variance) * points.reshape((1,) * (law.mean.ndim - 1) + (-1,))
    exponent = reward((law.mean + spread)[..., None]) / beta
    log_mass = law.log_weight[..., None] + jnp.log(mass / jnp.sum(mass)).reshape((1,) * (law.mean.ndim - 1) + (-1,))
    total = exponent + log_mass
    return beta * logsumexp(total.reshape(*total.shape[:-2], -1))


def linear_soft_value(
    m: Mixture, x: Float[Array, "*batch D"], alpha_bar: _AlphaBar, slope: Float[Array, " D"], *, beta: Numeric
) -> Float[Array, "*batch"]:
    """The soft value of the reward ``slope . x_0``, closed form in any dimension; arguments as for `soft_value`."""
    law = posterior(m, x, alpha_bar)
    along = jnp.einsum("mij,i->mj", m.axes, slope / beta)
    mean = jnp.einsum("...md,d->...m", law.mean, slope / beta)
    spread = jnp.sum(_wide(jnp.square(along), law.variance) * law.variance, axis=-1) / 2
    return beta * logsumexp(law.log_weight + mean + spread)


@chex.dataclass(frozen=True, mappable_dataclass=False)
class GuidedVariance:
    """Variances that three readings of one guidance end in; they agree at ``scale`` 0 and 1 alone.

    Attributes:
      sde: Of the reverse stochastic equation with the guided score (DDPM of many steps).
      ode: Of the probability flow with it (DDIM of many steps).
      tilt: Of the law ``p(x) p(c | x)^scale / Z`` itself.
    """

    sde: Float[Array, "..."]
    ode: Float[Array, "..."]
    tilt: Float[Array, "..."]


def guided_variance(
    unconditional: Numeric, conditional: Numeric, scale: Numeric | Float[Array, "..."]
) -> GuidedVariance:
    r"""Where guidance leads ``p(x) = N(0, v)`` and ``p(x | c) = N(0, u)``, in continuous time.

    .. math:: V_\text{ode} = v^{1-g} u^g, \qquad
              V_\text{sde} = \frac{v u - v^{2-2g} u^{2g}}{(2g - 1)(v - u)}, \qquad
              V_\text{tilt} = \left(\frac{1-g}{v} + \frac{g}{u}\right)^{-1}

    Soft best-of-N of small reverse steps of the unconditional chain, with odds ``p(c | x)^g``, ends at the variance of
    the stochastic equation at ``(1 - 1/N) g``.

    Args:
      unconditional: Variance v of ``p(x)``, > 0.
      conditional: Variance u of ``p(x | c)``, > 0, another one.
      scale: Guidance ``g = 1 + w``.

    Returns:
      `GuidedVariance`; a tilt that is no law any more has a negative variance.

    Example:
      >>> found = guided_variance(2.0, 1.0, 3.0)
      >>> round(float(found.sde), 4), round(float(found.ode), 4), round(float(found.tilt), 4)
      (0.3875, 0.25, 0.5)
    """
    v, u, g = (jnp.asarray(value, jnp.result_type(float)) for value in (unconditional, conditional, scale))
    power = 2 * g - 1
    log_ratio = jnp.log(v / u)
    # (v / u)^power - 1 over power: continuous at power 0.
    growth = jnp.where(power == 0, log_ratio, jnp.expm1(power * log_ratio) / jnp.where(power == 0, 1, power))
    flow = jnp.exp((1 - g) * jnp.log(v) + g * jnp.log(u))
    return GuidedVariance(sde=jnp.square(flow) * growth / (v - u), ode=flow, tilt=1 / ((1 - g) / v + g / u))


def _moved(m: Mixture, **fields: Array) -> Mixture:
    """``m`` with other fields, its weights as many as its means."""
    batch = fields["mean"].shape[:-2]
    fields.setdefault("log_weight", jnp.broadcast_to(m.log_weight, (*batch, m.log_weight.shape[-1])))
    return dataclasses.replace(m, **fields)


def _wide(x: Array, like: Array) -> Array:
    """``x`` with leading dimensions of 1 up to the rank of ``like``."""
    return x.reshape((1,) * max(like.ndim - x.ndim, 0) + x.shape)


def _away(m: Mixture, x: Array) -> Array:
    x = x[..., None, :]
    return x - _wide(m.mean, x)


def _along(axes: Array, x: Array) -> Array:
    return jnp.einsum("mij,...mi->...mj", axes, x)


def _rotate(axes: Array, x: Array) -> Array:
    return jnp.einsum("mij,...mj->...mi", axes, x)


def _component_logp(m: Mixture, x: Array) -> Array:
    """``log weight + log N(x)`` of every component, ``[*batch, M]``."""
    away = _along(m.axes, _away(m, x))
    variance = _wide(m.variance, away)
    square = jnp.square(away) / variance + jnp.log(2 * jnp.pi * variance)
    return _wide(m.log_weight, square[..., 0]) - jnp.sum(square, axis=-1) / 2
