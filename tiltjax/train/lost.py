"""How the processes of a run notice that one of them was lost, and how they end: at once, and in one line."""

import atexit
import contextlib
import json
import logging
import os
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

__all__ = ["LOST", "end", "in_time", "watch"]

LOST = 3
"""Exit status of a host that could not go on, most often because another was lost."""

_BYE = b"."
_ENDS = threading.Lock()
_LOG = logging.getLogger(__name__)


def end(reason: Any) -> NoReturn:
    """Ends this process in one line that says that a host was lost; called from any thread, once."""
    _ENDS.acquire()  # Never released: whoever is second waits for the end.
    sys.stdout.flush()
    _last_words(
        f"\nerror: process {jax.process_index()} of {jax.process_count()} cannot communicate, another probably died "
        f"({str(reason).strip().splitlines()[0]}); restart all of them with --resume to go on from the last "
        "checkpoint\n"
    )
    os._exit(LOST)  # An orderly exit would wait for the host that is gone.


def _last_words(text: str) -> None:
    """Writes to standard error, after which nobody does: JAX's threads report the same loss over several lines."""
    sys.stderr.flush()
    try:
        shown = sys.stderr.fileno()
        ours = os.dup(shown)
        os.dup2(os.open(os.devnull, os.O_WRONLY), shown)
        os.write(ours, text.encode())
    except (OSError, ValueError):  # No file, as in a notebook.
        sys.stderr.write(text)
        sys.stderr.flush()


@contextlib.contextmanager
def in_time(seconds: int | float, message: str) -> Iterator[None]:
    """Ends this process in one line with status 2 if what is done in the context takes longer.

    JAX itself aborts with 35 lines of stacks.

    Args:
      seconds: From now on.
      message: What has not happened.
    """

    def late() -> None:
        sys.stderr.write(f"error: {message} within {seconds} s\n")
        sys.stderr.flush()
        os._exit(2)

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def watch(host: str = "", *, silence: int = 100) -> None:
    """Ends this process in one line as soon as another is killed, also where it computes alone or compiles.

    Every process holds a connection to process 0, which breaks when either is killed: within milliseconds, where JAX
    may need the heartbeat timeout, and then aborts with 40 lines of stacks. Where no connection can be made, JAX's way
    stays. All processes call this.

    Args:
      host: Of process 0; empty takes the name that it has for itself.
      silence: Seconds after which a machine that answers nothing, not even its kernel, is taken for dead.
    """
    listener = None
    told = np.zeros(256, np.uint8)
    if jax.process_index() == 0:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=jax.process_count())
        token = secrets.token_hex(8)
        text = json.dumps([host or socket.getfqdn(), listener.getsockname()[1], token]).encode()
        told[: len(text)] = np.frombuffer(text, np.uint8)
    told = np.asarray(multihost_utils.broadcast_one_to_all(told), np.uint8)
    address, port, token = json.loads(told.tobytes().rstrip(b"\0"))
    if listener is not None:
        threading.Thread(target=_watch_all, args=(listener, token, silence), daemon=True).start()
        return
    try:
        connection = socket.create_connection((address, port), timeout=10)
        connection.settimeout(None)
        _keep_alive(connection, silence)
        connection.sendall(f"{token} {jax.process_index()}\n".encode())
    except OSError as error:
        _LOG.warning("process 0 cannot be watched (%s): a host that is killed may be missed for longer", error)
        return
    atexit.register(_leave, connection)
    threading.Thread(target=_watch_one, args=(connection, "process 0"), daemon=True).start()


def _watch_all(listener: socket.socket, token: str, silence: int) -> None:
    """Of process 0: a thread for each of the others."""
    for _ in range(4 * jax.process_count()):  # Whoever else knocks here is not heard for ever.
        connection, _ = listener.accept()
        _keep_alive(connection, silence)
        threading.Thread(target=_greet, args=(connection, token), daemon=True).start()


def _greet(connection: socket.socket, token: str) -> None:
    said = b""
    while not said.endswith(b"\n") and len(said) < 64:
        part = connection.recv(64)
        if not part:
            return
        said += part
    name, _, index = said.decode(errors="replace").strip().partition(" ")
    if name == token:
        atexit.register(_leave, connection)
        _watch_one(connection, f"process {index}")


def _keep_alive(connection: socket.socket, silence: int) -> None:
    """The kernels ask each other whether they are there; a process that is busy or stopped needs not answer."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", silence // 4), ("TCP_KEEPINTVL", silence // 8), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), max(1, value))


def _watch_one(connection: socket.socket, name: str) -> None:
    try:
        last = connection.recv(1)
    except OSError:
        last = b""
    if last != _BYE:
        end(f"{name} was killed, or its machine is gone")


def _leave(connection: socket.socket) -> None:
    """Says that this process ends by itself."""
    with contextlib.suppress(OSError):
        connection.sendall(_BYE)
