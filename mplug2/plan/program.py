"""What a compiled step does, read off its HLO, the compiler's own listing: which collectives run among which
devices, how many bytes each device sends in them, and how many bytes go through its memory.

A loop's body counts as often as it runs (XLA's own cost analysis counts it once). On TPUs a reduce-scatter
is listed as an all-reduce inside a computation called `all-reduce-scatter`.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_ELSEWHERE = re.compile(r"[a-z]\w*\[[\d,]*\]\{[^}]*S\([1-9][^}]*\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_BODIES = re.compile(r"(?:calls|body|true_computation|false_computation|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast while conditional call after-all partition-id "
    "replica-id opt-barrier".split()
)
"""Operations that move nothing themselves."""


@dataclass(frozen=True)
class Collective:
    """`members`: the devices of one of its groups, as places of the mesh counted row by row; `sent`: bytes
    that one of them sends in one run by a ring; `times`: runs a step; `operation`: where in the program."""

    kind: str
    members: tuple[int, ...]
    sent: float
    times: int
    operation: str


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool

    @cached_property
    def bytes(self) -> int:
        """In main memory, layout space 0."""
        return _bytes(re.sub(_ELSEWHERE, "", self.shape))

    @property
    def bodies(self) -> list[str]:
        """The computations that it runs; what ends in the background has run them when it began."""
        if self.opcode not in ("fusion", "while", "conditional", "call", "async-start"):
            return []
        branches = [name for found in _BRANCHES.findall(self.rest) for name in re.split(r"[,\s%]+", found)]
        return [name for name in [*_BODIES.findall(self.rest), *branches] if name]


class Program:
    """The HLO `text` of a compiled step for `devices` devices."""

    def __init__(self, text: str, devices: int):
        self.devices = devices
        self.entry = ""
        self._computations: dict[str, dict[str, _Instruction]] = {}
        current: dict[str, _Instruction] = {}
        for line in text.splitlines():
            if header := _HEADER.match(line):
                current = self._computations.setdefault(header[2], {})
                self.entry = header[2] if header[1] else self.entry
            elif instruction := _read(line):
                current[instruction.name] = instruction

    def collectives(self) -> list[Collective]:
        """All that a step runs, in no order."""
        return list(self._collectives(self.entry, 1))

    def _collectives(self, name: str, times: int) -> Iterator[Collective]:
        computation = self._computations.get(name, {})
        for instruction in computation.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                yield self._collective(kind, name, instruction, times)
            for body in instruction.bodies:
                yield from self._collectives(body, times * self._trips(instruction))

    def _collective(self, kind: str, computation: str, instruction: _Instruction, times: int) -> Collective:
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"
        known = self._computations[computation]
        given = sum(_bytes(known[operand].shape) for operand in instruction.operands)
        members = _members(instruction.rest, self.devices)
        share = (len(members) - 1) / len(members)
        sent = {
            "all-gather": given * (len(members) - 1),
            "all-reduce": 2 * given * share,
            "reduce-scatter": given * share,
            "all-to-all": given * share,
            "collective-permute": given,
        }[kind]
        operation = re.search(r'op_name="([^"]*)"', instruction.rest)
        return Collective(kind, members, sent, times, operation[1] if operation else "")

    def memory_bytes(self) -> float:
        """Bytes that a step reads from and writes to a device's main memory, if each operation reads its
        operands and writes its results once: arrays that the compiler keeps in a TPU's vector memory are not
        counted, of a stack that is cut only the cut."""
        return self._memory_bytes(self.entry)

    def _memory_bytes(self, name: str) -> float:
        total = 0.0
        for it in self._computations.get(name, {}).values():
            if it.opcode in ("while", "conditional", "call"):
                total += self._trips(it) * sum(self._memory_bytes(body) for body in it.bodies)
            elif it.opcode not in _FREE and not it.opcode.endswith(("-done", "-update")):
                total += self._moved(name, it)
        return total

    def _moved(self, computation: str, it: _Instruction) -> float:
        sizes = [self._size(computation, operand) for operand in it.operands]
        if it.opcode in ("dynamic-slice", "gather", "slice"):
            return 2 * it.bytes
        if it.opcode == "dynamic-update-slice":
            return 2 * sizes[1]
        if it.opcode.endswith("-start"):  # its result names its operands again
            return 2 * sum(sizes)
        if it.opcode != "fusion":
            return it.bytes + sum(sizes)
        inner = self._computations.get(next(iter(it.bodies), ""), {})
        written = it.bytes
        for user in inner.values():
            if user.opcode == "dynamic-update-slice" and user.bytes <= written:
                written -= user.bytes - inner[user.operands[1]].bytes
        return max(written, 0) + sum(min(size, _cut(inner, place, size)) for place, size in enumerate(sizes))

    def _trips(self, instruction: _Instruction) -> int:
        """How often a loop runs: what XLA notes, or the number that its condition compares with."""
        if instruction.opcode != "while":
            return 1
        if noted := _TRIPS.search(instruction.rest):
            return int(noted[1])
        condition = re.search(r"condition=%?([\w.\-]+)", instruction.rest)
        inner = self._computations.get(condition[1], {}) if condition else {}
        bounds = [
            int(found[1])
            for it in inner.values()
            if it.opcode == "constant" and (found := re.search(r"constant\((\d+)\)", it.rest))
        ]
        return max(bounds, default=1)

    def _size(self, computation: str, name: str) -> int:
        found = self._computations[computation].get(name)
        return found.bytes if found else 0


def _read(line: str) -> _Instruction | None:
    """An instruction `%name = shape opcode(operands), attributes`."""
    named = _NAME.match(line)
    if named is None:
        return None
    rest = line[named.end() :]
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    close = _closing(rest)
    operands = tuple(re.findall(r"%([\w.\-]+)", rest[len(opcode) : close]))
    return _Instruction(named[2], shape, opcode, operands, rest, bool(named[1]))


def _closing(text: str) -> int:
    """Where the first parenthesis of `text` is closed."""
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if letter == ")" and not depth:
            return place
    return len(text)


def _bytes(shape: str) -> int:
    """Bytes of the arrays of a shape, `bf16[4,2]` or a tuple of such."""
    total = 0
    for kind, sizes in _ARRAY.findall(shape):
        bits = re.search(r"\d+", kind)
        count = math.prod(int(size) for size in sizes.split(",") if size)
        total += count * max(int(bits[0]) // 8, 1) if bits else count
    return total


def _cut(inner: dict[str, _Instruction], place: int, size: int) -> int:
    """The bytes that a fusion reads of its operand `place`: less than all where it only cuts pieces off it or
    overwrites a piece."""
    (parameter,) = (
        it.name for it in inner.values() if it.opcode == "parameter" and f"parameter({place})" in it.rest
    )
    read = 0
    for user in inner.values():
        if parameter in user.operands:
            if user.opcode in ("dynamic-slice", "gather", "slice") and user.operands[0] == parameter:
                read += user.bytes
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter:
                return size
    return read


# ------------------------------------------------------------------------------------------------------------
# Groups of devices: {{0,1},{2,3}}, [2,2]<=[2,2]T(1,0), or mesh['a'=2,'b'=2], device_ids=(..) {'a'}


def _members(rest: str, devices: int) -> tuple[int, ...]:
    """The devices of the first group; all of them where no group is named."""
    if found := re.search(r"source_target_pairs=\{(.*?)\}\}", rest):
        pairs = re.findall(r"(\d+),(\d+)", found[1])
        source, target = next(((one, other) for one, other in pairs if one != other), pairs[0])
        return int(source), int(target)
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(int(place) for place in found[1].split(","))
    if found := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return tuple(_iota(found[1])[0].tolist())
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^ ]*)\))? \{([^}]*)\}", rest):
        return _of_mesh(*found.groups())
    return tuple(range(devices))


def _iota(text: str) -> np.ndarray:
    """`[2,3]<=[3,2]T(1,0)`: 0 1 2 ... shaped [3,2], transposed, reshaped to [2,3]."""
    found = re.match(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?", text)
    assert found is not None
    shape, source, order = ([int(n) for n in part.split(",")] if part else None for part in found.groups())
    assert shape is not None
    numbers = np.arange(math.prod(shape)).reshape(source or shape)
    return (numbers.transpose(order) if order else numbers).reshape(-1 if source is None else shape)


def _of_mesh(axes: str, ids: str | None, along: str) -> tuple[int, ...]:
    """The first group along some axes of XLA's own mesh; `'a':(2)4`: a part of an axis, 4 of it, inside 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    total = math.prod(sizes.values())
    numbers = (np.arange(total) if ids is None else _iota(ids).ravel()).reshape(tuple(sizes.values()))
    index: list[np.ndarray] = [np.zeros(1, int) for _ in sizes]
    names = list(sizes)
    for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along):
        step = sizes[name] // (int(before) * int(size)) if before else 1
        axis = names.index(name)
        steps = np.arange(int(size) if before else sizes[name]) * step
        index[axis] = (index[axis][:, None] + steps).ravel()
    return tuple(numbers[np.ix_(*index)].ravel().tolist())
