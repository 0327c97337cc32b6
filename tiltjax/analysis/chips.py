"""What the datasheets say of a few chips, and what a step that does so much work must take on them at least."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from tiltjax.analysis.hlo import Collective

__all__ = ["CHIPS", "Chip", "Prediction", "network_seconds", "predict"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator; bandwidths are bytes per second in one direction.

    Attributes:
      name: As the vendor calls it.
      flops: Peak of dense bfloat16 products, per second.
      memory: Capacity, bytes.
      bandwidth: Of the memory, bytes per second.
      near: What one chip sends over its links along one mesh axis. Behind a switch that is all of its links; in a torus
        the two of one ring, both ways round.
      domain: How many chips these links connect.
      far: What one chip sends beyond them, over the network of the data centre; None where the datasheet does not say.
      source: Where the figures stand.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    near: float
    domain: int
    far: float | None
    source: str


_TPU = "https://docs.cloud.google.com/tpu/docs/"
_GPU = "https://www.nvidia.com/en-us/data-center/"
_DGX = "NIC: 8 x 400 Gbit/s for 8 GPUs, https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html"

CHIPS = {
    "h100": Chip("NVIDIA H100 SXM", 989e12, 80e9, 3.35e12, 450e9, 8, 50e9,
                 f"{_GPU}h100/ (1,979 TFLOP/s with sparsity, half without; NVLink 900 GB/s both ways); {_DGX}"),
    "h200": Chip("NVIDIA H200 SXM", 989e12, 141e9, 4.8e12, 450e9, 8, 50e9,
                 f"{_GPU}h200/ (likewise); {_DGX}"),
    "v5e": Chip("TPU v5e", 197e12, 16e9, 819e9, 100e9, 256, 6.4e12 / 8 / 256,
                f"{_TPU}v5e (ICI 400 GB/s both ways on 4 ports: 50 GB/s a port and direction; 6.4 Tbit/s a pod)"),
    "v5p": Chip("TPU v5p", 459e12, 95e9, 2765e9, 200e9, 8960, 50e9 / 8,
                f"{_TPU}v5p (ICI 1,200 GB/s both ways; 6 ports of a 3D torus: 100 GB/s a port and direction)"),
    "trillium": Chip("TPU v6e (Trillium)", 918e12, 32e9, 1638e9, 200e9, 256, None,
                     f"{_TPU}v6e (ICI 800 GB/s both ways on 4 ports: 100 GB/s a port and direction)"),
}  # fmt: skip
"""Datasheet figures by the name that ``--chip`` takes."""


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The least seconds a step can take, by what it would wait for if that were all.

    Attributes:
      compute: Of the products at peak.
      memory: Of the traffic to memory.
      network: Of the collectives, one after the other; None where the far bandwidth is not known.
      fits: Whether the peak memory fits.
    """

    compute: float
    memory: float
    network: float | None
    fits: bool

    @property
    def parts(self) -> dict[str, float]:
        """The known ones, by name."""
        named = {"compute": self.compute, "memory": self.memory, "network": self.network}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def seconds(self) -> float:
        """The step where all three run at once: no step is faster."""
        return max(self.parts.values())

    @property
    def serial(self) -> float:
        """The step where nothing overlaps, every unit still at its peak."""
        return sum(self.parts.values())

    @property
    def bound(self) -> str:
        """Which of them is the longest."""
        return max(self.parts, key=lambda name: self.parts[name])


def network_seconds(chip: Chip, collectives: Sequence[Collective]) -> float | None:
    """Seconds of all collectives, each at the bandwidth of the slowest link it must cross.

    A group that leaves the domain sends its bytes through as many network cards as it has members in one domain.
    """
    total = 0.0
    for one in collectives:
        domains = [device // chip.domain for device in one.group]
        if len(set(domains)) == 1:
            total += one.wire_bytes / chip.near
        elif chip.far is None:
            return None
        else:
            members = min(domains.count(d) for d in set(domains))
            total += one.wire_bytes / min(chip.near, chip.far * members)
    return total


def predict(chip: Chip, result: dict[str, Any], collectives: Sequence[Collective]) -> Prediction:
    """The roofline of one device.

    Args:
      chip: One of `CHIPS`.
      result: Of `experiments.plan.compile.analyse`.
      collectives: Of one step, with their repetitions counted.

    Returns:
      `Prediction`.
    """
    return Prediction(
        compute=result["flops"]["counted"] / chip.flops,
        memory=result["traffic"]["least"] / chip.bandwidth,
        network=network_seconds(chip, collectives),
        fits=result["memory"]["peak"] <= chip.memory,
    )
