"""Kernels as one program each, for tests that call them outside of any other."""

import functools

import jax


def compiled(fn):
    """``fn`` under `jax.jit`: arguments are traced, keywords that are plain Python values are static."""

    @functools.cache
    def program(static):
        return jax.jit(fn, static_argnames=static)

    @functools.wraps(fn)
    def call(*args, **options):
        plain = bool, int, float, str, type(None)
        return program(tuple(name for name, value in options.items() if isinstance(value, plain)))(*args, **options)

    return call
