"""Numbers that are not finite stop a run by name, before anything is kept that was made of them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tiltjax.types import Array, PyTree

__all__ = ["NonFiniteError", "check_candidates", "check_leaves", "check_scalars", "check_tree", "finite_leaves"]


class NonFiniteError(ValueError):
    """A loss, gradient, reward, log-probability or parameter that is NaN or infinite; says which, and where."""


def check_scalars(place: str, scalars: Mapping[str, float]) -> None:
    """Refuses scalars that are not finite.

    Args:
      place: Where they were computed, such as "step 3".
      scalars: Name -> value.

    Raises:
      NonFiniteError: If one is not finite; names all of those.

    Example:
      >>> check_scalars("step 3", {"loss": 0.5})
    """
    found = ", ".join(f"{name} is {value}" for name, value in scalars.items() if not np.isfinite(value))
    if found:
        raise NonFiniteError(f"{place}: {found}; the run ends here, and nothing of this step is kept")


def check_candidates(place: str, name: str, values: Any, rows: Any = None) -> None:
    """Refuses an array of candidates that holds a number that is not finite.

    Args:
      place: What is being done, such as "sample train".
      name: Of the values.
      values: ``[P, N]`` or ``[P, N, T]``, on the host.
      rows: Number of each prompt in messages; None counts from 0.

    Raises:
      NonFiniteError: With the first prompt and candidate.
    """
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.floating):
        return
    for p, n in np.argwhere(~np.isfinite(values.reshape(*values.shape[:2], -1)).all(axis=-1))[:1].tolist():
        bad = values[p, n]
        prompt = p if rows is None else int(rows[p])
        raise NonFiniteError(f"{place}: {name} is {bad[~np.isfinite(bad)].flat[0]} at prompt {prompt}, candidate {n}")


def finite_leaves(tree: PyTree) -> tuple[list[str], Array]:
    """Which leaves of a pytree hold finite numbers only, computed on the devices; waits for nothing.

    Args:
      tree: Pytree of arrays.

    Returns:
      Paths of the leaves of floating type, and one bool for each.

    Example:
      >>> names, finite = finite_leaves({"a": jnp.ones(2), "b": jnp.array([0.0, jnp.nan]), "n": jnp.int32(0)})
      >>> names, finite.tolist()
      (['a', 'b'], [True, False])
    """
    leaves = [(path, x) for path, x in jax.tree_util.tree_flatten_with_path(tree)[0] if _is_float(x)]
    names = [jax.tree_util.keystr(path, simple=True, separator=".").lstrip(".") for path, _ in leaves]
    return names, _finite([x for _, x in leaves]) if leaves else jnp.zeros(0, bool)


@jax.jit
def _finite(leaves: list[Array]) -> Array:
    return jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves])


def check_tree(place: str, tree: PyTree) -> None:
    """Refuses a pytree that holds a number that is not finite; see `check_leaves`.

    Args:
      place: Where it was made, such as "step 3".
      tree: Pytree of arrays.

    Raises:
      NonFiniteError: With the path of the first such leaf.
    """
    check_leaves(place, *finite_leaves(tree))


def check_leaves(place: str, names: Sequence[str], finite: Any) -> None:
    """Refuses what `finite_leaves` found.

    Args:
      place: Where it was made, such as "step 3".
      names: Of the leaves.
      finite: Whether each is finite, on the host.

    Raises:
      NonFiniteError: With the path of the first leaf that is not.
    """
    bad = [name for name, good in zip(names, np.asarray(finite).tolist(), strict=True) if not good]
    if bad:
        said = f"{bad[0]} is" if len(bad) == 1 else f"{bad[0]} and {len(bad) - 1} others are"
        raise NonFiniteError(f"{place}: {said} not finite; the run ends here, and nothing of this step is kept")


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
