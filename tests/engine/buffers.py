"""What optimised HLO holds in memory of its own."""

import re
from typing import Any

NOT_BUFFERS = {"parameter", "get-tuple-element", "bitcast", "tuple", "while", "constant"}
WRITES = ("scatter", "dynamic-update-slice")


def large_buffers(compiled: Any, shapes: set[tuple[int, ...]]) -> set[tuple[str, tuple[int, ...]]]:
    """(operation, shape) of everything in optimised HLO that has one of the shapes and memory of its own."""
    text = compiled.as_text()
    bodies = dict(re.findall(r"^%?([\w.\-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    fused = set(re.findall(r"calls=%?([\w.\-]+)", text)) | set(re.findall(r"to_apply=%?([\w.\-]+)", text))
    found = set()
    for name, body in {**bodies, "entry": text[text.index("\nENTRY") :]}.items():
        if name in fused:
            continue
        for dims, operation, rest in re.findall(r" = \w+\[([\d,]*)\]\S* ([\w\-]+)\((.*)", body):
            shape = tuple(int(size) for size in dims.split(",") if size)
            inner = bodies.get("".join(re.findall(r"calls=%?([\w.\-]+)", rest)), "")
            # What is written into had memory before: where that is new, the operation that made it is found.
            in_place = operation in WRITES or any(f" {write}(" in inner for write in WRITES)
            if shape in shapes and operation not in NOT_BUFFERS and not in_place:
                found.add((operation, shape))
    return found


def shapes_of(params: Any, groups: tuple[str, ...]) -> set[tuple[int, ...]]:
    """The shapes of the projections of some parts of a layer: a layer or the stack, either orientation, or flat."""
    found: set[tuple[int, ...]] = set()
    for group in groups:
        for name, leaf in params["layers"][group].items():
            if name.endswith("_proj"):
                stack, inputs, outputs = leaf["kernel"].shape
                for matrix in ((inputs, outputs), (outputs, inputs), (inputs * outputs,)):
                    found |= {matrix, (1, *matrix), (stack, *matrix)}
                found.add((stack * inputs * outputs,))
    return found
