"""What XLA did in one call: its operations, each with its stretch of time and the source line that asked for it.

The time comes from a trace of `jax.profiler`, the line from the stack frames in the text of the compiled program.
"""

import collections
import dataclasses
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

from tiltjax.analysis.hlo import Computation, Instruction, flops_of, parse

__all__ = ["Place", "Places", "Sum", "Trace", "Work", "places", "read", "sums"]

_HELPERS = ("tiltjax/ops/", "tiltjax/models/layers.py")
"""Files whose functions say little of what they are called for: their callers stand in the tables."""

_PHASES = {
    "Transformer.decode_step": "step",
    "Transformer.prefill": "prompt",
    "make_sampler.<locals>.sampler": "sampler",
}
"""What a function on the stack says of the phase, the first that is there."""

_CONTAINERS = {"while", "call", "conditional"}
_FRAME = re.compile(r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}")
_LOCATION = re.compile(r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)")
_NAMED = re.compile(r'^(\d+) "(.*)"')


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an operation comes from.

    Attributes:
      phase: "prompt", "step" and "sampler" in decoding, "forward", "recomputed", "gradient" and "update" in training,
        "unknown" where the program does not say.
      function: That asked for it, helpers apart; empty where the program does not say.
      line: ``file:line`` in it, likewise.
      flops: Of the products in it.
      container: Whether it only runs others.
    """

    phase: str
    function: str
    line: str
    flops: float
    container: bool


@dataclasses.dataclass(frozen=True)
class Work:
    """A stretch of one thread's time in nanoseconds, and the operation it went into."""

    start: int | float
    end: int | float
    thread: str
    module: str
    operation: str


@dataclasses.dataclass
class Sum:
    """What many stretches took together.

    Attributes:
      seconds: Of threads.
      alone: Those in which no other thread worked.
      flops: Of products.
      runs: How many operations began.
    """

    seconds: float = 0.0
    alone: float = 0.0
    flops: float = 0.0
    runs: int = 0


@dataclasses.dataclass(frozen=True)
class Trace:
    """How often each operation ran, by module and name, and who worked when."""

    runs: dict[tuple[str, str], int]
    work: list[Work]


Places = dict[tuple[str, str], Place]
"""By module and name of an operation."""


def places(module: str, text: str) -> Places:
    """Every instruction of a program.

    Args:
      module: Name of the program.
      text: Of its compiled form, with the tables of stack frames.

    Returns:
      Where each comes from.
    """
    frames = _frames(text)
    computations, _ = parse(text)
    return {
        (module, name): _place(one, inside, computations, frames)
        for inside in computations.values()
        for name, one in inside.items()
    }


def _place(one: Instruction, inside: Computation, computations: dict[str, Computation], frames) -> Place:
    told = next(_told_by(one, inside, computations), "")
    found, scope = re.search(r"stack_frame_id=(\d+)", told), re.search(r'op_name="([^"]*)"', told)
    chain = frames(int(found[1])) if found else []
    phase = _phase({function for _, function, _ in chain}, scope[1] if scope else "")
    file, function, number = _telling(chain)
    line = f"{file}:{number}" if file else ""
    return Place(phase, function, line, flops_of(one, inside, computations), one.opcode in _CONTAINERS)


def _phase(functions: set[str], scope: str) -> str:
    named = {
        "Transformer.decode_step": "step",
        "Transformer.prefill": "prompt",
        "make_sampler.<locals>.sampler": "sampler",
    }
    for function, phase in named.items():
        if function in functions:
            return phase
    if not functions:
        return "unknown"
    if "rematted_computation" in scope:
        return "recomputed"
    if "transpose(" in scope:
        return "gradient"
    return "update" if "train_step" in functions and "jvp(" not in scope else "forward"


def _told_by(
    one: Instruction, inside: Computation, computations: dict[str, Computation], asked: set[int] | None = None
) -> Iterator[str]:
    """What has a stack frame: the instruction, or what it has fused, the last first, or what it is made of."""
    asked = set() if asked is None else asked  # Where nothing has one, every path through the program leads here.
    if id(one) in asked:
        return
    asked.add(id(one))
    if "stack_frame_id=" in one.attributes:
        yield one.attributes
    if one.opcode == "fusion":
        body = computations[one.called("calls")]
        for part in reversed([part for part in body.values() if part.opcode != "parameter"]):
            yield from _told_by(part, body, computations, asked)
    for operand in one.operands:
        if inside[operand].opcode != "parameter":
            yield from _told_by(inside[operand], inside, computations, asked)


def _telling(chain: list[tuple[str, str, int]]) -> tuple[str, str, int]:
    """The innermost frame that is neither a helper nor a function inside the one that called it."""
    outer = [name.partition(".<locals>")[0] for _, name, _ in chain]
    for i in range(len(chain) - 1, -1, -1):
        file, _, line = chain[i]
        if not file.startswith(_HELPERS) and not (i and outer[i - 1] == outer[i]):
            return file, outer[i], line
    return (chain[-1][0], outer[-1], chain[-1][2]) if chain else ("", "", 0)


def _frames(text: str) -> Callable[[int], list[tuple[str, str, int]]]:
    """``id -> [(file, function, line), ...]``, the outermost first, of the files of this repository."""
    tables: dict[str, dict[int, Any]] = {}
    current: dict[int, Any] | None = None
    for row in text.splitlines():
        if row in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            current = tables.setdefault(row, {})
        elif current is not None and row:
            if found := _NAMED.match(row) or _FRAME.match(row) or _LOCATION.match(row):
                current[int(found[1])] = found[2] if found.re is _NAMED else [int(i) for i in found.groups()[1:]]
            else:
                current = None
    root = f"{pathlib.Path(__file__).parents[2]}{os.sep}"
    stacks = tables.get("StackFrames", {})
    # A frame comes after its caller; where the first one names itself, the numbers of callers are one too high.
    shift = int(bool(stacks) and stacks[min(stacks)][1] >= min(stacks))

    def chain(i: int) -> list[tuple[str, str, int]]:
        found = []
        while i in stacks:
            location, parent = stacks[i]
            file, function, line = tables["FileLocations"][location]
            name = tables["FileNames"][file]
            if name.startswith(root) and "site-packages" not in name:
                found.append((name.removeprefix(root), tables["FunctionNames"][function], line))
            i = parent - shift
        return found[::-1]

    return chain


def read(folder: str | os.PathLike) -> Trace:
    """What a trace that `jax.profiler.trace` wrote says of XLA's operations.

    A thread works at an operation while it runs it, and at a task of the thread pool for the operation that handed it
    in; where one stands inside another the inner one counts, and a wait for other threads counts for none.

    Args:
      folder: Where it wrote.

    Returns:
      All operations, those that only run others too.
    """
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    lines = [line for plane in jax.profiler.ProfileData.from_file(str(path)).planes for line in plane.lines]
    runs: collections.Counter = collections.Counter()
    stretches: dict[str, list[_Stretch]] = {}
    handed_in: dict[int, tuple[str, str]] = {}
    for line in lines:
        found = stretches.setdefault(line.name, [])
        last: _Stretch = (0, 0, None, None)
        began: tuple[int | float, int] | None = None
        for event in sorted(line.events, key=lambda event: event.start_ns):
            stats, start, end = dict(event.stats), event.start_ns, event.end_ns
            if "hlo_op" in stats:
                last = (start, end, (stats["hlo_module"], stats["hlo_op"]), None)
                found.append(last)
                runs[last[2]] += 1
            elif event.name.endswith("::Record") and last[2] is not None and start <= last[1]:
                handed_in[stats["_p"]] = last[2]
            elif event.name.endswith("::StartRegion"):
                began = start, stats["_c"]
            elif event.name.endswith("::StopRegion") and began is not None:
                found.append((began[0], end, None, began[1]))
                began = None
            elif event.name.endswith("::Await"):
                found.append((start, end, None, None))
    work = []
    for thread, found in stretches.items():
        for start, end, key, task in _innermost(found):
            key = key or handed_in.get(task or 0)
            if key is not None:
                work.append(Work(start, end, thread, *key))
    return Trace(dict(runs), work)


_Stretch = tuple[int | float, int | float, tuple[str, str] | None, int | None]
"""From, to, and the operation, or the number of the task; neither is a wait."""


def _innermost(stretches: list[_Stretch]) -> Iterator[_Stretch]:
    """Nested stretches as ones that follow each other, each instant given to the innermost."""
    open_: list[_Stretch] = []
    now: float = 0
    for one in [*sorted(stretches, key=lambda one: (one[0], -one[1])), (1 << 62, 1 << 62, None, None)]:
        while open_ and open_[-1][1] <= one[0]:
            _, end, *who = open_.pop()
            if end > now:
                yield (now, end, *who)
                now = end
        if open_ and one[0] > now:
            yield (now, one[0], *open_[-1][2:])
        now = max(now, one[0])
        open_.append(one)


def sums(trace: Trace, known: Places, key: Callable[[Place], Any]) -> dict[Any, Sum]:
    """Sums the work of a trace.

    Args:
      trace: From `read`.
      known: Places; what is not there, and what only runs other operations, is left out.
      key: Under what an operation is summed.

    Returns:
      The sums; their seconds add up to all that the threads worked.
    """
    labels = {name: key(place) for name, place in known.items() if not place.container}
    out: dict[Any, Sum] = {labels[name]: Sum() for name in trace.runs if name in labels}
    for name, runs in trace.runs.items():
        if name in labels:
            out[labels[name]].runs += runs
            out[labels[name]].flops += runs * known[name].flops
    ends: list[tuple[int | float, int, Work]] = []
    for one in trace.work:
        if (one.module, one.operation) in labels:
            ends += [(one.start, 1, one), (one.end, -1, one)]
    at_work: dict[str, Work] = {}
    before: float = 0
    for now, change, one in sorted(ends, key=lambda end: end[:2]):
        for other in at_work.values():
            total = out[labels[other.module, other.operation]]
            total.seconds += (now - before) / 1e9
            total.alone += (now - before) / 1e9 * (len(at_work) == 1)
        before = now
        if change > 0:
            at_work[one.thread] = one
        else:
            at_work.pop(one.thread, None)
    return out
