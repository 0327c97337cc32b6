"""A minimiser for small smooth problems that ends at rounding error: the exact answer where there is no formula."""

from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from tiltjax.ops.checks import check_at_least
from tiltjax.ops.masked import as_float
from tiltjax.types import Array, Float, Int, PyTree

__all__ = ["Minimum", "minimise"]

_HALVINGS = 40


@chex.dataclass(frozen=True, mappable_dataclass=False)
class Minimum:
    """Where a minimisation ended.

    Attributes:
      params: The minimiser, of the structure of the start.
      value: The function there, scalar.
      gradient: Largest absolute entry of its gradient there, scalar: about 1e-15 at a minimum in float64, and not
        small where the function has none.
      steps: How many steps it took, scalar.
    """

    params: PyTree
    value: Float[Array, ""]
    gradient: Float[Array, ""]
    steps: Int[Array, ""]


def minimise(fn: Callable[[PyTree], Array], start: PyTree, *, max_steps: int = 200) -> Minimum:
    r"""A local minimum of a smooth function of up to a few hundred numbers.

    Newton's method on the whole Hessian :math:`Q \Lambda Q^\top`, with its eigenvalues made positive, so that saddles
    repel, and floored, so that directions which change nothing (a constant added to logits) are left alone:

    .. math:: x \leftarrow x - 2^{-k} Q\, |\Lambda|^{-1} Q^\top \nabla f

    Of 40 halvings the one with the smallest value is taken; once values differ by rounding only, the full step is, as
    long as it halves the gradient. Deterministic; runs under `jax.jit` and `jax.vmap`.

    Args:
      fn: From a pytree of floats to a scalar; twice differentiable.
      start: Where to begin; its precision is that of the answer.
      max_steps: Steps after which to give up, at least 1: a function without a minimum gets this far.

    Returns:
      `Minimum`; look at its ``gradient`` where it is not sure that there is one.

    Raises:
      ValueError: If ``max_steps`` is below 1.

    Example:
      >>> found = minimise(lambda x: jnp.sum(jnp.cosh(x - 2.0)), jnp.zeros(3))
      >>> found.params.round(4).tolist(), bool(found.gradient < 1e-5)
      ([2.0, 2.0, 2.0], True)

    References:
      Dauphin et al., 2014, arXiv:1406.2572 (the absolute values).
    """
    check_at_least("max_steps", max_steps, 1)
    x, unravel = ravel_pytree(jax.tree.map(as_float, start))
    eps = jnp.finfo(x.dtype).eps
    sizes = (0.5 ** jnp.arange(_HALVINGS)).astype(x.dtype)

    # Traced once, however many derivatives are taken.
    loss = jax.jit(lambda x: fn(unravel(x)))
    gradient = jax.jit(jax.grad(loss))
    hessian = jax.jacfwd(gradient)

    def step(state):
        x, value, slope, steps, _ = state
        curvature, basis = jnp.linalg.eigh(hessian(x))
        curvature = jnp.abs(curvature)
        floor = jnp.maximum(eps ** (2 / 3) * jnp.max(curvature), jnp.finfo(x.dtype).tiny)
        direction = -basis @ (basis.T @ slope / jnp.maximum(curvature, floor))
        trials = x[None] + sizes[:, None] * direction[None]
        values = jax.vmap(loss)(trials)
        values = jnp.where(jnp.isnan(values), jnp.inf, values)
        lowest = jnp.argmin(values)
        slopes = jax.vmap(gradient)(jnp.stack([trials[0], trials[lowest]]))
        level = values[0] <= value + 64 * eps * jnp.maximum(jnp.abs(value), 1)
        settled = level & (_size(slopes[0]) < _size(slope) / 2)
        better = settled | (values[lowest] < value)
        fulls, lowests = (trials[0], values[0], slopes[0]), (trials[lowest], values[lowest], slopes[1])
        end = jax.tree.map(lambda full, low: jnp.where(settled, full, low), fulls, lowests)
        kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), end, (x, value, slope))
        return *kept, steps + 1, better

    def running(state):
        _, _, slope, steps, better = state
        return better & (steps < max_steps) & (_size(slope) > eps)

    first = x, loss(x), gradient(x), jnp.int32(0), jnp.bool_(True)
    x, value, slope, steps, _ = jax.lax.while_loop(running, step, first)
    return Minimum(params=unravel(x), value=value, gradient=_size(slope), steps=steps)


def _size(slope: Array) -> Array:
    return jnp.max(jnp.abs(slope))
