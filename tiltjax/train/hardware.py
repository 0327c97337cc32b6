"""What this machine computes fast."""

import pathlib

import jax

__all__ = ["fast_dtype"]


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
