"""What this machine computes fast, what was compiled for it, and the memory that compiling took."""

import ctypes
import functools
import os
import pathlib
import sys
from typing import Any, cast

import jax

from tiltjax.ops.matmul import multiplies_bfloat16
from tiltjax.train.config import field

__all__ = ["CACHE", "compilation_cache", "compilation_cache_field", "fast_dtype", "return_memory_after_compiling"]

CACHE = "~/.cache/tiltjax"
"""Where compiled programs are kept from run to run."""

_STAGES = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")
_LONG = 0.2


def compilation_cache_field() -> Any:
    """The field of an experiment's configuration whose value `compilation_cache` takes."""
    return field(CACHE, "Directory where compiled programs are kept from run to run; empty keeps none.")


def compilation_cache(directory: str = CACHE) -> str | None:
    """Keeps what is compiled from now on, and takes from there what was compiled before.

    Args:
      directory: Need not exist; empty turns it off. One that JAX was told before (``JAX_COMPILATION_CACHE_DIR``) stays.

    Returns:
      The directory in use, None where there is none or it cannot be written.
    """
    told = cast(Any, jax.config).jax_compilation_cache_dir
    if told or not directory:
        return told or None
    path = pathlib.Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    if not os.access(path, os.W_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    return str(path)


@functools.cache
def return_memory_after_compiling() -> bool:
    """Gives what was freed back to the operating system before and after every longer compilation, from now on.

    glibc keeps what XLA has freed for this process: half a GB after a step or a sampler that takes seconds to compile,
    and the peak of what runs after it is higher by that much.

    Returns:
      Whether the C library can (glibc does).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is None:
        return False

    def done(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event in _STAGES and duration_secs > _LONG:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(done)
    return True


def fast_dtype() -> str:
    """Operand type of matrix products that this machine has units for: "bfloat16" or "float32"."""
    return "bfloat16" if multiplies_bfloat16() else "float32"
