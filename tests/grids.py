"""The eight devices along one mesh axis, and along two that stand as one."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

__all__ = ["each_grid", "mesh_over"]

each_grid = pytest.mark.parametrize("names", ["n", ("data", "fsdp")], ids=["one axis", "two axes"])
"""Runs a test with either ``axis_name``."""


def mesh_over(names: str | tuple[str, str]) -> Mesh:
    """The mesh of an ``axis_name``: 8 devices, or 4 by 2."""
    return Mesh(np.reshape(jax.devices(), (8,) if isinstance(names, str) else (4, 2)), names)
