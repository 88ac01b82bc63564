"""What devices tell one another in a compiled program: every array of every collective operation."""

import re
from typing import NamedTuple

__all__ = ["Message", "messages"]

# An instruction's result, a single array or a tuple of several, and what makes it. Asynchronous operations are written
# as a start and an end, of which the start has the arrays.
_COLLECTIVE = re.compile(
    r"= (?P<result>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute"
    r"|collective-broadcast)(?:-start)?\("
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
# Groups of one device, as a list or as [groups, devices of each]: nothing travels.
_ALONE = re.compile(r"replica_groups=(\{\{\d+\}(,\{\d+\})*\}|\[\d+,1\]<=)")


class Message(NamedTuple):
    """An array that travels.

    Attributes:
        kind: of the operation, such as "all-reduce".
        dtype: as HLO writes it.
        shape: on one device.
    """

    kind: str
    dtype: str
    shape: tuple[int, ...]


def messages(text: str) -> list[Message]:
    """Returns all arrays that collective operations of several devices make, from a program's optimised HLO."""
    found = []
    for line in text.splitlines():
        match = _COLLECTIVE.search(line)
        if match and not _ALONE.search(line):
            for dtype, shape in _ARRAY.findall(match["result"]):
                found.append(Message(match["kind"], dtype, tuple(int(size) for size in shape.split(",") if size)))
    return found
