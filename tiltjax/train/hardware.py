"""What this machine computes fast."""

import os
import pathlib
from typing import Any, cast

import jax

from tiltjax.train.config import field

__all__ = ["CACHE", "compilation_cache", "compilation_cache_field", "fast_dtype"]

CACHE = "~/.cache/tiltjax"
"""Where compiled programs are kept from run to run."""


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


def fast_dtype() -> str:
    """Operand type of matrix products that this machine has units for: "bfloat16" or "float32".

    GPUs and TPUs take bfloat16; a CPU does where it has the AVX-512 or AMX instructions for it.
    """
    if jax.default_backend() != "cpu":
        return "bfloat16"
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        return "float32"
    return "bfloat16" if "avx512_bf16" in text or "amx_bf16" in text else "float32"
