"""What devices tell one another in a compiled program: every array of every collective operation."""

import math
import re
from typing import NamedTuple

__all__ = ["Message", "branches", "messages"]

# An instruction's result, a single array or a tuple of several, and what makes it. Asynchronous operations are written
# as a start and an end, of which the start has the arrays.
_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
    r"|collective-broadcast)(?:-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_NAME = re.compile(r"%([\w.\-]+)")
# A choice by number lists its branches; one by a truth value names them.
_BRANCHES = re.compile(r" conditional\(.*branch_computations=\{([^}]*)\}")
_TRUE, _FALSE = (re.compile(rf" conditional\(.*{word}_computation=(%[\w.\-]+)") for word in ("true", "false"))
# Who talks to whom: lists of devices; [groups, devices of each]; or the axes of a mesh, or parts of them.
_LISTED = re.compile(r"replica_groups=\{(?:\{([\d,]*)\})?")
_COUNTED = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_OF_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_AXIS = re.compile(r"'(\w+)'(?::\(\d+\)(\d+))?")
_DEVICES = re.compile(r"num_partitions=(\d+)")


class Message(NamedTuple):
    """An array that travels.

    Attributes:
        kind: of the operation, such as "all-reduce".
        dtype: as HLO writes it.
        shape: on one device.
        devices: how many talk to each other; 2 for a permutation.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]
    devices: int

    @property
    def entries(self) -> int:
        """How many numbers a device gives or gets, whichever is more: of what it gives to a reduce-scatter, it gets
        its part alone."""
        return math.prod(self.shape) * (self.devices if self.kind == "reduce-scatter" else 1)


def messages(text: str) -> list[Message]:
    """Returns all arrays that collective operations of several devices make, from a program's optimised HLO."""
    whole = _DEVICES.search(text)
    return _of_lines(text, int(whole[1]) if whole else 1)


def branches(text: str) -> list[list[list[Message]]]:
    """Returns, of every conditional and of every branch of it (that of False first), what travels if it is taken."""
    whole = _DEVICES.search(text)
    computations = dict(_COMPUTATION.findall(text))

    def taken(name: str) -> list[Message]:
        found, reached = [], [name]
        for each in reached:
            body = computations[each]
            reached += [other for other in dict.fromkeys(_NAME.findall(body)) if other in computations.keys() - reached]
            found += _of_lines(body, int(whole[1]) if whole else 1)
        return found

    conditionals = []
    for line in text.splitlines():
        if listed := _BRANCHES.search(line):
            conditionals.append(_NAME.findall(listed[1]))
        elif (true := _TRUE.search(line)) and (false := _FALSE.search(line)):
            conditionals.append([false[1].lstrip("%"), true[1].lstrip("%")])
    return [[taken(name) for name in names] for names in conditionals]


def _of_lines(text: str, whole: int) -> list[Message]:
    found = []
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match and (devices := _group(line, whole)) > 1:
            for dtype, shape in _ARRAY.findall(match["result"]):
                sizes = tuple(int(size) for size in shape.split(",") if size)
                found.append(Message(match["kind"], dtype, sizes, devices))
    return found


def _group(line: str, whole: int) -> int:
    """How many devices an operation brings together; 1 where nothing travels."""
    if "source_target_pairs=" in line:
        return 2
    if counted := _COUNTED.search(line):
        return int(counted[1])
    if of_mesh := _OF_MESH.search(line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", of_mesh[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in _AXIS.findall(of_mesh[2]))
    listed = _LISTED.search(line)
    assert listed, f"groups in no known form: {line}"
    return len(listed[1].split(",")) if listed[1] else whole
