"""Several hosts, one program: how they find each other, who holds which rows, who writes, and how they end.

Every host runs the same code on the same settings; arrays on devices span all of them, arrays in NumPy belong to one.
With one process every function here is the identity or does nothing. The directory of a run must be one that all hosts
see, as Orbax asks too.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from tiltjax.ops.checks import check_at_least
from tiltjax.train.config import field
from tiltjax.train.lost import LOST, end, in_time, watch
from tiltjax.types import Array, Int, PyTree

__all__ = [
    "LOST",
    "Hosts",
    "agree",
    "barrier",
    "by_main",
    "ends_with_the_others",
    "fetch",
    "gather_rows",
    "global_batch",
    "global_sharding",
    "host_rows",
    "initialize",
    "is_main",
    "localize",
    "replicate",
    "share",
    "together",
]

_ALONE = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")
"""Where a launcher says how many processes it started."""

ResultT = TypeVar("ResultT")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The flags with which the processes of a run find each other."""

    coordinator: str = field(
        "",
        "Several hosts: host:port of process 0. Empty detects it (SLURM, Open MPI, GKE, TPU pods, "
        "JAX_COORDINATOR_ADDRESS) and otherwise runs one process; off detects nothing.",
    )
    num_processes: int = field(0, "Several hosts: number of processes; 0 detects it.")
    process_id: int = field(-1, "Several hosts: index of this process, from 0; -1 detects it.")
    heartbeat_timeout: int = field(
        int(os.environ.get("TILTJAX_HEARTBEAT_TIMEOUT", "100")),
        "Several hosts: seconds of silence after which a host is taken for dead and the run ends "
        "(TILTJAX_HEARTBEAT_TIMEOUT sets the default).",
    )
    start_timeout: int = field(300, "Several hosts: seconds to wait for all of them at the start.")

    def __post_init__(self):
        check_at_least("num_processes", self.num_processes, 0)
        check_at_least("process_id", self.process_id, -1)
        check_at_least("heartbeat_timeout", self.heartbeat_timeout, 1)
        check_at_least("start_timeout", self.start_timeout, 1)
        if self.coordinator not in ("", "off"):
            _check_address("coordinator", self.coordinator)
        if self.num_processes and self.process_id >= self.num_processes:
            raise ValueError(f"process_id must be below num_processes={self.num_processes}, got {self.process_id}")


def _check_address(name: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{name} must be host:port, such as host0:8476, got {address!r}")


def initialize(hosts: Hosts = Hosts()) -> None:
    """Joins the other processes of the run, if there are any; call it before anything touches a device.

    Where they do not come in time, this process ends in one line with status 2; where one is lost later, likewise with
    status `LOST`, at once.

    Args:
      hosts: What is left open is taken from the environment.

    Raises:
      ValueError: If only some of the three settings are there; the message names the missing ones.
      RuntimeError: If JAX has been used already.
    """
    given: dict[str, Any] = {
        "coordinator": hosts.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS", ""),
        "num_processes": hosts.num_processes or None,
        "process_id": None if hosts.process_id < 0 else hosts.process_id,
    }
    asked = any(value not in ("", None) for value in given.values())
    if hosts.coordinator == "off" or jax.distributed.is_initialized():
        return
    if not asked and any(os.environ.get(name) == "1" for name in _ALONE):
        return  # A job of one process; to join itself, JAX would hide all of its devices but one.
    if given["coordinator"]:
        _check_address("JAX_COORDINATOR_ADDRESS", given["coordinator"])
    # How CPUs talk to each other; GPUs and TPUs have their own ways, whatever is said here.
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Else SIGTERM would only be noted, and a host told to stop would go on.
    with contextlib.suppress(AttributeError):
        jax.config.update("jax_enable_preemption_service", False)
    try:
        with in_time(hosts.start_timeout, f"not all processes met at {given['coordinator'] or 'the coordinator'}"):
            jax.distributed.initialize(
                coordinator_address=given["coordinator"] or None,
                num_processes=given["num_processes"],
                process_id=given["process_id"],
                initialization_timeout=hosts.start_timeout + 60,
                heartbeat_timeout_seconds=hosts.heartbeat_timeout,
                shutdown_timeout_seconds=hosts.heartbeat_timeout,
            )
    except (TypeError, ValueError) as error:
        if not asked:
            return
        known = ", ".join(f"{name}={value}" for name, value in given.items() if value not in ("", None))
        missing = ", ".join(f"--{name}" for name, value in given.items() if value in ("", None))
        reason = f"{missing} must be given too" if missing else str(error)
        raise ValueError(f"several hosts: {known}, but {reason}") from None
    except RuntimeError:
        if asked:
            raise
        return
    if jax.process_count() > 1:
        watch(given["coordinator"].rpartition(":")[0], silence=hosts.heartbeat_timeout)


def is_main() -> bool:
    """Whether this is process 0, the one that writes files, reports and progress."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every host is here.

    Args:
      name: Of this place in the program, the same on all hosts.
    """
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(value: int | bool) -> int:
    """What process 0 says, on every host: hosts that look at files at different times must not decide differently.

    Args:
      value: This host's view.

    Returns:
      Process 0's.

    Example:
      >>> agree(7)
      7
    """
    return int(multihost_utils.broadcast_one_to_all(np.int32(value))) if jax.process_count() > 1 else int(value)


def together(work: Callable[[], ResultT]) -> ResultT:
    """Runs work of each host's own (host-side rewards); if it fails on one host, it fails on all.

    Args:
      work: Does not communicate.

    Returns:
      What ``work`` returned on this host.

    Raises:
      ValueError: On the hosts where it went well, when it failed on another; where it failed, the error itself.
    """
    if jax.process_count() == 1:
        return work()
    fault: Exception | None = None
    try:
        result = work()
    except Exception as error:  # Whatever it is, the others must hear of it before it goes on.
        fault = error
    failed = multihost_utils.process_allgather(np.int32(fault is not None))
    if fault is not None:
        raise fault
    if failed.any():
        raise ValueError(f"host {int(failed.argmax())} of {jax.process_count()} failed; its own message says why")
    return result


def by_main(work: Callable[[], ResultT]) -> ResultT | None:
    """Runs work of process 0 alone, such as writing a file, while the others wait; if it fails, it fails on all.

    Args:
      work: Does not communicate.

    Returns:
      What ``work`` returned on process 0, None on the others.

    Raises:
      ValueError: On the others, when it failed; on process 0, the error itself.
    """
    return together(lambda: work() if is_main() else None)


def share(num_rows: int) -> slice:
    """The part of ``num_rows`` items of host-side work that is this host's: equal, in order, the last may be short.

    Args:
      num_rows: Of all hosts together.

    Returns:
      A slice; `gather_rows` puts the results together.

    Example:
      >>> share(5)
      slice(0, 5, None)
    """
    each = -(-num_rows // jax.process_count())
    start = min(jax.process_index() * each, num_rows)
    return slice(start, min(start + each, num_rows))


def gather_rows(values: Array, num_rows: int) -> Array:
    """The results of `share` from all hosts, on every host.

    Args:
      values: This host's, ``[rows of this host, ...]``, of at most 32 bits each.
      num_rows: Of all hosts together.

    Returns:
      NumPy ``[num_rows, ...]``.
    """
    if jax.process_count() == 1:
        return np.asarray(values)
    each = -(-num_rows // jax.process_count())
    padded = np.zeros((each, *values.shape[1:]), values.dtype)
    padded[: len(values)] = values
    return np.asarray(multihost_utils.process_allgather(padded)).reshape(-1, *values.shape[1:])[:num_rows]


def host_rows(sharding: Sharding | None, num_rows: int) -> Int[Array, " _"]:
    """Which rows of a global batch this host's devices hold, and so which it must load.

    Args:
      sharding: Of the batch, whose first axis is rows; None means all rows.
      num_rows: Rows of the global batch.

    Returns:
      Indices in ``[0, num_rows)``, rising. Where an axis that is not split over rows spans hosts, several hosts hold
      the same ones.

    Example:
      >>> host_rows(None, 3).tolist()
      [0, 1, 2]
    """
    if sharding is None:
        return np.arange(num_rows)
    held = np.zeros(num_rows, bool)
    for (rows,) in sharding.addressable_devices_indices_map((num_rows,)).values():
        held[rows] = True
    return np.flatnonzero(held)


def global_batch(rows: PyTree, sharding: Sharding | None, num_rows: int) -> PyTree:
    """Arrays over all hosts from each host's rows; nothing is sent between hosts.

    Args:
      rows: Pytree of NumPy arrays whose first axis is the rows that `host_rows` names.
      sharding: Of the batch; None puts it on the default device.
      num_rows: Rows of the global batch.

    Returns:
      The same structure of global arrays ``[num_rows, ...]``.
    """
    if sharding is None or jax.process_count() == 1:
        return jax.device_put(rows, sharding)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x), (num_rows, *np.shape(x)[1:])), rows
    )


def fetch(tree: PyTree) -> PyTree:
    """The whole value of every array on every host, wherever its parts lie.

    Args:
      tree: Pytree of arrays; all hosts call this together.

    Returns:
      The same structure of NumPy arrays.
    """

    def whole(x):
        if getattr(x, "is_fully_addressable", True) or x.is_fully_replicated:
            return np.asarray(x)
        return np.asarray(multihost_utils.process_allgather(x, tiled=True))

    return jax.tree.map(whole, tree)


def replicate(tree: PyTree, mesh: Mesh | None = None) -> PyTree:
    """Global arrays from values that every host has whole (as `jax.pmap` leaves them); global arrays pass.

    Args:
      tree: Pytree of arrays, the same on all hosts.
      mesh: Over all devices of all hosts; None makes one.

    Returns:
      The same structure, replicated over every device.
    """
    if jax.process_count() == 1:
        return tree
    place = _everywhere() if mesh is None else NamedSharding(mesh, PartitionSpec())

    def spread(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return x
        value = np.asarray(x)
        return jax.make_array_from_callback(value.shape, place, lambda index: value[index])

    return jax.tree.map(spread, tree)


def global_sharding(sharding: Sharding) -> Sharding:
    """A sharding over all hosts for one that may lie within this host.

    Args:
      sharding: Of an array.

    Returns:
      The same, or, with several hosts and where it lies within one, whole on every device.
    """
    return sharding if jax.process_count() == 1 or not sharding.is_fully_addressable else _everywhere()


def localize(tree: PyTree) -> PyTree:
    """Values on every device of this host, as `jax.pmap` takes what it does not map without sending it anywhere.

    Args:
      tree: Pytree of arrays; with several hosts all must be fully replicated.

    Returns:
      The same structure; where a device has the value already, it is that one and no copy.
    """
    here = NamedSharding(Mesh(np.array(jax.local_devices()), ("here",)), PartitionSpec())

    def place(x):
        if x.is_fully_addressable:
            return jax.device_put(x, here)
        return jax.make_array_from_single_device_arrays(x.shape, here, [part.data for part in x.addressable_shards])

    return jax.tree.map(place, tree)


@contextlib.contextmanager
def ends_with_the_others() -> Iterator[None]:
    """Ends this process in one line when communication fails under it, instead of waiting for a host that is gone.

    A host that is killed closes its connections, and the others come here at once. One that is silent (a machine
    without power, a stopped process) is found out by the coordinator after the heartbeat timeout, which ends the others
    with a message of its own.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or os.environ.get("TILTJAX_TRACEBACK"):
            raise
        end(error)


def _everywhere() -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()), ("all",)), PartitionSpec())
