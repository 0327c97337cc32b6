r"""Reverse chains of a one-dimensional diffusion on a grid: whole laws instead of samples.

A law is a vector of probabilities at equally spaced points, a reverse step a matrix of them, one row per point that it
leaves. Sums at the points of a smooth density are exact to rounding as soon as its narrowest kernel is as wide as their
spacing, so guidance, soft best-of-N of any N, and the tilt are compared without Monte Carlo. Float64 is meant.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from tiltjax.exact import bandit
from tiltjax.exact.gaussian import Mixture, log_prob, noised, posterior
from tiltjax.ops.checks import check_at_least
from tiltjax.samplers.denoise import Denoiser, levels, probability_flow, reverse_kernel
from tiltjax.types import Array, Float, Int, Numeric

__all__ = [
    "exact_kernel",
    "flow_law",
    "gaussian_kernel",
    "guided_kernel",
    "law_of",
    "linear_variance",
    "run_chain",
    "soft_best_of_n_kernel",
    "variance",
]

Kernel = Callable[[Array, Array, Array], Array]
"""``(points, alpha_bar_from, alpha_bar_to) -> [G, G]``, rows summing to 1."""


def law_of(m: Mixture, points: Float[Array, " G"]) -> Float[Array, " G"]:
    """A one-dimensional mixture as probabilities at the points."""
    return jax.nn.softmax(log_prob(m, points[:, None]))


def variance(law: Float[Array, "*batch G"], points: Float[Array, " G"]) -> Float[Array, "*batch"]:
    """Variance of a law on the grid."""
    mean = law @ points
    return law @ jnp.square(points) - jnp.square(mean)


def gaussian_kernel(
    points: Float[Array, " G"], mean: Float[Array, " G"], std: Numeric | Float[Array, " G"]
) -> Float[Array, "G G"]:
    """Rows of Gaussians: from point g to the law ``N(mean_g, std^2)``."""
    std = jnp.broadcast_to(std, mean.shape)[:, None]
    return jax.nn.softmax(-jnp.square((points[None] - mean[:, None]) / std) / 2, axis=-1)


def exact_kernel(m: Mixture) -> Kernel:
    """The reverse kernel ``p(x' | x)`` of the noised mixture itself: no score, no discretisation of time.

    Args:
      m: Law of ``x_0``, D = 1; `tiltjax.exact.gaussian.conditioned` for that of a class.

    Returns:
      `Kernel`; a chain of any number of its steps from the noised law ends in ``m``.
    """

    def kernel(points: Array, before: Array, after: Array) -> Array:
        clean = noised(m, after)

        def row(x: Array) -> Array:
            return log_prob(posterior(clean, x, before / after), points[:, None])

        logp = jax.vmap(row)(points[:, None])
        return jax.nn.softmax(logp, axis=-1)

    return kernel


def guided_kernel(denoiser: Denoiser) -> Kernel:
    r"""One step of Euler and Maruyama on the reverse stochastic equation of a denoiser.

    .. math:: x' = \frac{x - (1 - a)\, \epsilon / \sqrt{1 - \bar\alpha}}{\sqrt a} + \sqrt{1 - a}\, z, \qquad
              a = \bar\alpha / \bar\alpha'

    DDPM with the larger of its two variances: unlike `tiltjax.samplers.denoise.reverse_kernel` it is nowhere
    degenerate, and of the same limit.

    Args:
      denoiser: ``(x [G, 1], alpha_bar) -> noise``, guided or not.

    Returns:
      `Kernel`.
    """

    def kernel(points: Array, before: Array, after: Array) -> Array:
        keep = before / after
        noise = denoiser(points[:, None], before)[:, 0]
        mean = (points - (1 - keep) / jnp.sqrt(1 - before) * noise) / jnp.sqrt(keep)
        return gaussian_kernel(points, mean, jnp.sqrt(1 - keep))

    return kernel


def soft_best_of_n_kernel(
    base: Kernel, log_weight: Callable[[Array, Array], Array], *, n: int | Int[Array, ""] | None, beta: Numeric = 1.0
) -> Kernel:
    """The exact law of `tiltjax.samplers.guidance.soft_best_of_n_step` from every point.

    Args:
      base: What the candidates are drawn from.
      log_weight: ``(x [G, 1], alpha_bar) -> [G]`` at the level that a step leads to, nats, or reward units.
      n: Number of candidates; None is infinitely many: the kernel times ``exp(log_weight / beta)``.
      beta: Divides ``log_weight``, > 0.

    Returns:
      `Kernel`.

    Raises:
      ValueError: If ``n`` is below 1.
    """
    if n is not None:
        check_at_least("n", n, 1)

    def kernel(points: Array, before: Array, after: Array) -> Array:
        ref = base(points, before, after)
        reward = jnp.broadcast_to(log_weight(points[:, None], after), ref.shape)
        # Points that a row never reaches must not widen the range of the quadrature.
        seen = ref > jnp.finfo(ref.dtype).eps ** 2
        low = jnp.min(reward, axis=-1, keepdims=True, where=seen, initial=jnp.inf)
        high = jnp.max(reward, axis=-1, keepdims=True, where=seen, initial=-jnp.inf)
        reward = jnp.clip(reward, low, high)
        if n is None:
            return bandit.tilted(ref, reward, beta=beta)
        return bandit.soft_best_of_n_law(ref, reward, n=n, beta=beta)

    return kernel


def run_chain(
    kernel: Kernel, points: Float[Array, " G"], alpha_bar: Float[Array, " levels"], start: Float[Array, " G"]
) -> Float[Array, " G"]:
    """The law of ``x_0``.

    Args:
      kernel: Of every step.
      points: The grid, equally spaced, wide enough for every level.
      alpha_bar: The schedule, ``[K + 1]``, falling from 1.
      start: Law at the last level.

    Returns:
      Probabilities at the points.
    """

    def step(law: Array, level: tuple) -> tuple[Array, None]:
        _, before, after = level
        return law @ kernel(points, before, after), None

    return jax.lax.scan(step, start, levels(alpha_bar))[0]


def linear_variance(denoiser: Denoiser, alpha_bar: Float[Array, " levels"], *, eta: Numeric = 1.0) -> Float[Array, ""]:
    """Variance that `tiltjax.samplers.denoise.ddim` ends in, from 1, where the denoiser is linear: exact at any K.

    A step is then ``x' = A x + std z``, and ``V' = A^2 V + std^2``. Centred Gaussians have such denoisers, and guidance
    between two of them is one too.

    Args:
      denoiser: ``(x [1, 1], alpha_bar) -> noise``, linear in x.
      alpha_bar: The schedule, ``[K + 1]``, falling from 1.
      eta: Share of the noise that is drawn anew.

    Returns:
      Variance of ``x_0``.
    """
    one = jnp.ones((1, 1), alpha_bar.dtype)

    def step(found: Array, level: tuple) -> tuple[Array, None]:
        _, before, after = level
        mean, std = reverse_kernel(one, denoiser(one, before), before, after, eta=eta)
        return jnp.square(mean[0, 0]) * found + jnp.square(std), None

    return jax.lax.scan(step, jnp.ones((), alpha_bar.dtype), levels(alpha_bar))[0]


def flow_law(
    denoiser: Denoiser,
    points: Float[Array, " G"],
    alpha_bar: Float[Array, " levels"],
    *,
    num_quantiles: int = 20_001,
) -> Float[Array, " G"]:
    """The law that the probability flow of a denoiser ends in, from a standard normal.

    A flow on the line keeps the order of its points, so it maps the quantiles of its start to those of its end.

    Args:
      denoiser: ``(x [n, 1], alpha_bar) -> noise``, guided or not.
      points: The grid.
      alpha_bar: The schedule, ``[K + 1]``, falling from 1.
      num_quantiles: How many quantiles are followed.

    Returns:
      Probability of the cell around every point.
    """
    start = jnp.linspace(-6.0, 6.0, num_quantiles)
    end = probability_flow(denoiser, start[:, None], alpha_bar)[:, 0]
    edges = (points[1:] + points[:-1]) / 2
    inner = jnp.interp(edges, end, jax.scipy.stats.norm.cdf(start), left=0.0, right=1.0)
    return jnp.diff(jnp.concatenate([jnp.zeros(1), inner, jnp.ones(1)]))
