"""How the compiler is set for tests, before JAX is imported."""

import importlib.util
import mmap
import os
import pathlib

__all__ = ["quick_flags", "xla_flags"]

DEVICES = "--xla_force_host_platform_device_count=8"
QUICK = ("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true")
"""Compiling is what tests spend their time on: little optimisation, the same semantics."""

MAYBE = {"xla_cpu_use_fusion_emitters": "false", "xla_cpu_parallel_codegen_split_count": "1"}
"""Small programs are compiled in half the time. A compiler ends the process at a flag that it does not know."""


def xla_flags() -> str:
    """``XLA_FLAGS`` of the tests, behind those that are set."""
    return f"{quick_flags()} {DEVICES}"


def quick_flags() -> str:
    """The same on the devices that there are."""
    maybe = [f"--{flag}={value}" for flag, value in MAYBE.items() if _known(flag)]
    return " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK, *maybe])


def _known(flag: str) -> bool:
    spec = importlib.util.find_spec("jaxlib")
    library = pathlib.Path(spec.origin if spec and spec.origin else "").parent / "libjax_common.so"
    if not library.exists():
        return False
    # As a string of its own: a field of a message keeps the name of a flag that is gone.
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(f"\0{flag}\0".encode()) >= 0
