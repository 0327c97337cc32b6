"""The laws of `tiltjax.exact.bandit`, each compiled as a whole: one program a shape, not one an operation."""

import types

import jax

from tiltjax.exact import bandit as _bandit

__all__ = ["bandit"]

bandit = types.SimpleNamespace(
    **{name: jax.jit(part) for name in _bandit.__all__ if not isinstance(part := getattr(_bandit, name), type)}
)
