"""What several pages need of a table of K completions: its samples, its pairs, and the exact minimiser of a loss."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy import optimize

__all__ = ["minimiser", "multisets", "ordered_pairs"]


def minimiser(loss: Callable[..., Any], start: Any, *args: Any) -> np.ndarray:
    """Where a smooth loss is smallest: BFGS, then Powell's method for the root of the gradient, to the last digits.

    Args:
      loss: Of an array and ``args``; compiled once for every function and shape. A loss of a policy takes logits.
      start: First point.
      *args: Arrays.

    Returns:
      The minimiser, the shape of ``start``.
    """
    shape = np.shape(start)

    def both(x):
        value, gradient = _both(loss, x.reshape(shape), *args)
        return float(value), np.asarray(gradient).ravel()

    near = optimize.minimize(both, np.ravel(start), jac=True, method="BFGS", options={"gtol": 1e-12, "maxiter": 2000}).x
    root = optimize.root(lambda x: both(x)[1], near, method="hybr", options={"xtol": 1e-15}).x
    return (root if both(root)[0] <= both(near)[0] + 1e-12 else near).reshape(shape)


@functools.partial(jax.jit, static_argnums=0)
def _both(loss: Callable[..., Any], x: Any, *args: Any) -> tuple[Any, Any]:
    return jax.value_and_grad(loss)(x, *args)


@functools.lru_cache
def multisets(arms: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Every unordered sample of ``n`` from ``arms``, ``[M, n]``, and in how many orders each can be drawn, ``[M]``."""
    drawn = np.array(list(itertools.combinations_with_replacement(range(arms), n)), np.int32)
    counts = (drawn[:, :, None] == np.arange(arms)).sum(1)
    factorials = np.array([math.factorial(k) for k in range(n + 1)], float)
    return drawn, factorials[n] / factorials[counts].prod(1)


def ordered_pairs(arms: int) -> np.ndarray:
    """Every ordered pair of two different completions, ``[arms (arms - 1), 2]``."""
    return np.array(list(itertools.permutations(range(arms), 2)))
