"""Deltas as bytes: sorted indices as gaps, and values, each split into one plane for every byte of significance.

The gaps between random sorted indices are geometrically distributed: the low byte is noise, the high bytes
are small and compress to their entropy once they stand by themselves. A changed weight keeps its sign and
mostly its exponent, so the high plane of the XOR is nearly empty. Entries of all tensors follow each other
in the order of their paths, because a file entry for each tensor would cost more than a small delta itself.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8

from jaxsparse.common.errors import InputError
from jaxsparse.deltas.delta import Delta
from jaxsparse.deltas.headers import GAPS, Header, header_of
from jaxsparse.deltas.tensors import TensorDelta

__all__ = ["decode", "encode", "plane_sizes"]

_MAX_GAP_BYTES = 6  # a tensor has at most 2⁴⁸ entries
_WIDTHS = {f"{stream}{8 * width}": width for stream in ("xor", "factor") for width in (1, 2, 4, 8)}


def _split(name: str, values: np.ndarray, count: int) -> dict[str, np.ndarray]:
    little_endian = values.astype(values.dtype.newbyteorder("<"), copy=False)
    columns = little_endian.view(np.uint8).reshape(-1, values.itemsize)
    return {f"{name}_{i}": np.ascontiguousarray(columns[:, i]) for i in range(count)}


def _join(name: str, planes: Mapping[str, np.ndarray], count: int, width: int) -> np.ndarray:
    columns = np.zeros((planes[f"{name}_0"].size, width), np.uint8)
    for i in range(count):
        columns[:, i] = planes[f"{name}_{i}"]
    return columns.view(f"<u{width}").reshape(-1).astype(f"u{width}", copy=False)


def encode(delta: Delta) -> dict[str, UInt8[np.ndarray, " numbers"]]:
    """Returns the planes of a delta: `gaps_0`, `gaps_1`, … and `xor16_0`, `xor16_1` (also xor8, xor32, xor64).

    Plane i holds byte i, the lowest first. A gap counts the entries, or slices, left out before an index. Values of
    one width stand together, whatever their dtype; those of factors are `factor32_0` … (or factor64).

    Args:
        delta: any delta.

    Returns:
        The planes by name; none for a delta without entries.
    """
    streams: dict[str, list[np.ndarray]] = {}
    for tensor in delta.tensors.values():
        for name, numbers in header_of(tensor).streams(tensor).items():
            streams.setdefault(name, []).append(numbers)
    planes: dict[str, np.ndarray] = {}
    for name, parts in sorted(streams.items()):
        numbers = np.concatenate(parts)
        width = _WIDTHS.get(name) or max(1, -(-int(numbers.max()).bit_length() // 8))
        planes |= _split(name, numbers, width)
    return planes


def plane_sizes(headers: Mapping[str, Header], gap_planes: int) -> dict[str, int]:
    """Returns the names of the planes that these tensors need, and how many bytes each one has.

    Args:
        headers: the tensors by path.
        gap_planes: how many bytes the largest gap takes.

    Raises:
        InputError: the number of planes cannot be.
    """
    counts: dict[str, int] = {}
    for header in headers.values():
        for name, count in header.counts().items():
            counts[name] = counts.get(name, 0) + count
    if GAPS in counts and not 1 <= gap_planes <= _MAX_GAP_BYTES:
        raise InputError(f"gaps of {gap_planes} bytes are not possible")
    widths = {GAPS: gap_planes} | _WIDTHS
    return {f"{name}_{i}": count for name, count in sorted(counts.items()) for i in range(widths[name])}


def decode(headers: Mapping[str, Header], planes: Mapping[str, UInt8[np.ndarray, "..."]]) -> dict[str, TensorDelta]:
    """Returns the tensors whose planes these are: the inverse of `encode`.

    Args:
        headers: the tensors by path.
        planes: by name, of the sizes that `plane_sizes` tells.

    Returns:
        The tensors' deltas by path.

    Raises:
        InputError: an index is out of range, or an entry does not change.
    """
    streams = {}
    for name in {plane.rpartition("_")[0] for plane in planes}:
        count = sum(plane.rpartition("_")[0] == name for plane in planes)
        streams[name] = _join(name, planes, count, _WIDTHS.get(name) or (4 if count <= 4 else 8))
    read = dict.fromkeys(streams, 0)
    tensors = {}
    for path, header in sorted(headers.items()):
        own = {}
        for name, count in header.counts().items():
            own[name] = streams[name][read[name] : read[name] + count]
            read[name] += count
        try:
            tensors[path] = header.tensor(own)
        except InputError as error:
            raise InputError(f"tensor {path}: {error}") from error
    return tensors
