"""What a compiled program does, read from its text: products, memory traffic and communication, loops counted.

XLA's own cost analysis counts the body of a loop once. Here every computation counts as often as it runs.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

__all__ = ["Collective", "Counts", "Instruction", "count", "flops_of", "parse", "replica_groups", "shape_bytes"]

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_GROUPS = re.compile(
    r"replica_groups=(mesh\[[^\]]*\](?:, ?device_ids=\((?:[^()]|\([^()]*\))*\))? ?\{[^}]*\}"
    r"|\[[\d,]*\]<=\[[\d,]*\](?:T\([\d,]*\))?|\{(?:\{[\d,]*\},?)*\})"
)
_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "iota",
         "after-all", "partition-id", "replica-id"}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    literal: str
    attributes: str
    root: bool

    def called(self, key: str) -> str:
        """The computation that an attribute such as ``calls`` names."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        if found is None:
            raise ValueError(f"{self.name}: no {key} in {self.attributes[:80]!r}")
        return found[1]

    def sizes(self, key: str) -> list[int]:
        """The integers of an attribute such as ``lhs_contracting_dims={1}``."""
        found = re.search(rf"\b{key}=\{{([\d,]*)\}}", self.attributes)
        return [int(i) for i in found[1].split(",") if i] if found else []


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a step.

    Attributes:
      kind: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute" or "collective-broadcast".
      group: Devices that take part in the first of its groups.
      axes: Mesh axes over which they differ, joined by "+".
      times: How often a step runs it.
      wire_bytes: What one device sends in all of these, by a ring.
    """

    kind: str
    group: tuple[int, ...]
    axes: str
    times: int
    wire_bytes: float


@dataclasses.dataclass
class Counts:
    """What one device does in one step.

    Attributes:
      flops: Of matrix products, 2 per multiply-add.
      traffic: Bytes that every instruction reads and writes, as fused by this compiler.
      product_traffic: Bytes that the matrix products alone read and write.
      collectives: All of them.
      unknown_loops: Loops whose number of turns the compiler does not know; their bodies are counted once.
      opaque: Calls that may hide a product.
    """

    flops: float = 0.0
    traffic: float = 0.0
    product_traffic: float = 0.0
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)
    opaque: list[str] = dataclasses.field(default_factory=list)


Computation = dict[str, Instruction]


def shape_bytes(shape: str) -> float:
    """Bytes of an array or of all parts of a tuple.

    Example:
      >>> shape_bytes("(f32[2,3]{1,0}, bf16[4], pred[])")
      33.0
    """
    return sum(math.prod(_dims(dims)) * _bits(kind) / 8 for kind, dims in _SHAPE.findall(shape))


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of ``compiled.as_text()`` by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line)
        header = None if line.startswith((" ", "HloModule")) else _HEADER.match(line)
        if header:
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _LINE.match(line)):
            shape, rest = _split(found[3])
            opcode, _, rest = rest.partition("(")
            inside, attributes = _split("(" + rest)
            operands = tuple(_NAME.findall(inside))
            current[found[2]] = Instruction(
                found[2], shape, opcode.strip(), operands, inside[1:-1], attributes, bool(found[1])
            )
    if not entry:
        raise ValueError("the text of the program has no entry computation")
    return computations, entry


def count(text: str, mesh: dict[str, int]) -> Counts:
    """Counts products, traffic and collectives of one device.

    Args:
      text: ``compiled.as_text()``.
      mesh: Axes with sizes, slowest first, as the devices are numbered.

    Returns:
      `Counts`.
    """
    computations, entry = parse(text)
    counts = Counts()
    _visit(computations, entry, 1, mesh, counts)
    return counts


def replica_groups(instruction: Instruction, devices: int) -> np.ndarray:
    """The groups of a collective, one per row."""
    if instruction.opcode.startswith("collective-permute"):
        pairs = re.findall(r"\{(\d+),(\d+)\}", instruction.attributes.partition("source_target_pairs=")[2])
        return np.array([[int(a), int(b)] for a, b in pairs if a != b] or [[0]])
    found = _GROUPS.search(instruction.attributes)
    text = found[1] if found else "{}"
    if text.startswith("mesh"):
        return _mesh_groups(text, devices)
    if text.startswith("["):
        shape, _, source = text.partition("<=")
        return _iota(source).reshape(_dims(shape.strip("[]")))
    rows = [[int(i) for i in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", text)]
    return np.array(rows or [list(range(devices))])


def _visit(computations, name, times, mesh, counts, fused=False):
    inside = computations[name]
    for one in inside.values():
        if one.opcode == "while":
            trips = _TRIPS.search(one.attributes)
            if trips is None:
                counts.unknown_loops.append(one.name)
            _visit(computations, one.called("body"), times * (int(trips[1]) if trips else 1), mesh, counts)
        elif one.opcode == "call":
            _visit(computations, one.called("to_apply"), times, mesh, counts)
        elif one.opcode == "fusion":
            _visit(computations, one.called("calls"), times, mesh, counts, fused=True)
        elif one.opcode == "conditional":
            branches = re.search(r"branch_computations=\{([^}]*)\}", one.attributes)
            names = _NAME.findall(branches[1]) if branches else [one.called(f"{b}_computation") for b in _BRANCHES]
            for branch in names:  # Which one runs is not known: all of them, an upper bound.
                _visit(computations, branch, times, mesh, counts)
        elif one.opcode in ("dot", "convolution"):
            if one.opcode == "convolution":
                counts.opaque.append(one.name)
                continue
            counts.flops += times * _dot_flops(one, inside)
            operands = sum(shape_bytes(inside[o].shape) for o in one.operands)
            counts.product_traffic += times * (operands + shape_bytes(one.shape))
        elif one.opcode == "custom-call" and re.search("matmul|gemm|dot|conv", one.attributes):
            counts.opaque.append(one.name)
        kind = one.opcode.removesuffix("-start")
        if kind in _KINDS:
            counts.collectives.append(_collective(one, kind, inside, times, mesh))
        if not fused:
            counts.traffic += times * _traffic(one, inside, computations)


_BRANCHES = ("true", "false")


def flops_of(one: Instruction, inside: Computation, computations: dict[str, Computation]) -> float:
    """Of the matrix products of one instruction, alone or fused, 2 per multiply-add; 0 for what only runs others."""
    if one.opcode == "fusion":
        body = computations[one.called("calls")]
        return sum(flops_of(part, body, computations) for part in body.values())
    return _dot_flops(one, inside) if one.opcode == "dot" else 0.0


def _dot_flops(one: Instruction, inside: Computation) -> float:
    dims = _dims(_SHAPE.findall(inside[one.operands[0]].shape)[0][1])
    inner = math.prod(dims[i] for i in one.sizes("lhs_contracting_dims"))
    return 2.0 * inner * math.prod(_dims(_SHAPE.findall(one.shape)[0][1]))


def _collective(one: Instruction, kind: str, inside: Computation, times: int, mesh: dict[str, int]) -> Collective:
    groups = replica_groups(one, math.prod(mesh.values()))
    size = groups.shape[1]
    places = np.stack(np.unravel_index(groups[0], tuple(mesh.values())))
    axes = [name for name, row in zip(mesh, places, strict=True) if len(set(row.tolist())) > 1]
    payload = sum(shape_bytes(inside[o].shape) for o in one.operands)
    share = (size - 1) / size
    factor = {"all-gather": size - 1, "all-reduce": 2 * share, "reduce-scatter": share, "all-to-all": share}
    return Collective(
        kind=kind,
        group=tuple(groups[0].tolist()),
        axes="+".join(axes) or "none",
        times=times,
        wire_bytes=times * payload * factor.get(kind, float(size > 1)),
    )


def _traffic(one: Instruction, inside: Computation, computations: dict[str, Computation]) -> float:
    """Bytes that one instruction reads and writes; a slice touches only itself."""
    out = shape_bytes(one.shape)
    if one.opcode in _FREE or one.opcode.endswith("-done"):
        return 0.0
    if one.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * out
    if one.opcode == "dynamic-update-slice":
        return 2 * shape_bytes(inside[one.operands[1]].shape)
    if one.opcode != "fusion":
        return out + sum(shape_bytes(inside[o].shape) for o in one.operands)
    body = computations[one.called("calls")]
    parts = [i for i in body.values() if i.opcode == "parameter"]
    return _written(body, out) + sum(_read(part, body) for part in parts)


def _written(body: Computation, out: float) -> float:
    root = next(i for i in body.values() if i.root)
    while root.opcode == "bitcast":
        root = body[root.operands[0]]
    return shape_bytes(body[root.operands[1]].shape) if root.opcode == "dynamic-update-slice" else out


def _read(part: Instruction, body: Computation) -> float:
    users = [i for i in body.values() if part.name in i.operands]
    total = 0.0
    for user in users:
        if user.opcode in ("dynamic-slice", "gather") and user.operands[0] == part.name:
            total += shape_bytes(user.shape)
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != part.name:
            return shape_bytes(part.shape)
    return total


def _mesh_groups(text: str, devices: int) -> np.ndarray:
    """``mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(1)2}``: groups differ along the named (parts of) axes."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", text.partition("]")[0])}
    listed = re.search(r"device_ids=\((.*)\) ?\{", text)
    if listed is None:
        ids = np.arange(devices)
    elif listed[1].startswith("["):
        ids = _iota(listed[1]).reshape(-1)
    else:
        ids = np.array(_dims(listed[1]))
    named = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", text[text.rindex("{") :])
    dims: list[int] = []
    along: dict[tuple[str, str], int] = {}
    for name, size in sizes.items():
        parts = sorted((int(before), int(width)) for n, before, width in named if n == name and width)
        if not parts:
            along[name, ""] = len(dims)
            dims.append(size)
            continue
        done = 1
        for before, width in parts:
            dims.append(before // done)
            along[name, str(before)] = len(dims)
            dims.append(width)
            done = before * width
        dims.append(size // done)
    last = [along[name, before] for name, before, _ in named]
    first = [i for i in range(len(dims)) if i not in last]
    groups = ids.reshape(dims).transpose(first + last)
    return groups.reshape(-1, math.prod(dims[i] for i in last))


def _iota(text: str) -> np.ndarray:
    """``[2,4]T(1,0)``: the numbers from 0, shaped and transposed."""
    shape, _, order = text.partition("T")
    numbers = np.arange(math.prod(_dims(shape.strip("[]")))).reshape(_dims(shape.strip("[]")))
    return numbers.transpose(_dims(order.strip("()"))) if order else numbers


def _split(text: str) -> tuple[str, str]:
    """A leading type or parenthesis, and what follows it."""
    if not text.startswith("("):
        head, _, rest = text.partition(" ")
        return head, rest
    return next((text[: i + 1], text[i + 1 :].lstrip()) for i in _closing(text))


def _closing(text: str) -> Iterator[int]:
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            yield i


def _dims(text: str) -> list[int]:
    return [int(i) for i in text.split(",") if i]


def _bits(kind: str) -> int:
    if kind in _BITS:
        return _BITS[kind]
    found = re.match(r"[a-z]+(\d+)", kind)
    if found is None:
        raise ValueError(f"an array type that is not known: {kind!r}")
    return int(found[1])
