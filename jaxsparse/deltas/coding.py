"""Deltas as bytes: sorted indices as gaps, and values, each split into one plane for every byte of significance.

The gaps between random sorted indices are geometrically distributed: the low byte is noise, the high bytes
are small and compress to their entropy once they stand by themselves. A changed weight keeps its sign and
mostly its exponent, so the high plane of the XOR is nearly empty. Entries of all tensors follow each other
in the order of their paths, because a file entry for each tensor would cost more than a small delta itself.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from jaxsparse.common.errors import InputError
from jaxsparse.deltas.delta import Delta
from jaxsparse.deltas.tensors import CoordinateDelta, TensorDelta, bits_dtype, index_dtype

__all__ = ["TensorHeader", "decode", "encode", "plane_sizes"]

_MAX_GAP_BYTES = 6  # a tensor has at most 2⁴⁸ entries


class TensorHeader(NamedTuple):
    """What the metadata says of one tensor; with the planes it gives a TensorDelta."""

    shape: tuple[int, ...]
    dtype: str
    entries: int
    base_checksum: str
    tuned_checksum: str


def _split(name: str, values: np.ndarray, count: int) -> dict[str, np.ndarray]:
    little_endian = values.astype(values.dtype.newbyteorder("<"), copy=False)
    columns = little_endian.view(np.uint8).reshape(-1, values.itemsize)
    return {f"{name}_{i}": np.ascontiguousarray(columns[:, i]) for i in range(count)}


def _join(name: str, planes: Mapping[str, np.ndarray], count: int, width: int) -> np.ndarray:
    columns = np.zeros((planes[f"{name}_0"].size, width), np.uint8)
    for i in range(count):
        columns[:, i] = planes[f"{name}_{i}"]
    return columns.view(f"<u{width}").reshape(-1).astype(f"u{width}", copy=False)


def encode(delta: Delta) -> dict[str, UInt8[np.ndarray, " entries"]]:
    """Returns the planes of a delta: `gaps_0`, `gaps_1`, … and `xor16_0`, `xor16_1` (also xor8, xor32, xor64).

    Plane i holds byte i, the lowest first. A gap counts the entries left out before an index. Values of
    one width stand together, whatever their dtype.

    Args:
        delta: any delta.

    Returns:
        The planes by name; none for a delta without entries.
    """
    if not delta.entries:
        return {}
    gaps = np.concatenate(
        [np.diff(t.indices.astype(np.int64, copy=False), prepend=-1) - 1 for t in delta.tensors.values()]
    )
    planes = _split("gaps", gaps, max(1, -(-int(gaps.max()).bit_length() // 8)))
    for width in (1, 2, 4, 8):
        values = [t.xor for t in delta.tensors.values() if t.xor.itemsize == width]
        if values:
            planes |= _split(f"xor{8 * width}", np.concatenate(values), width)
    return planes


def plane_sizes(headers: Mapping[str, TensorHeader], gap_planes: int) -> dict[str, int]:
    """Returns the names of the planes that these tensors need, and how many bytes each one has.

    Args:
        headers: the tensors by path.
        gap_planes: how many bytes the largest gap takes.

    Raises:
        InputError: the number of planes cannot be.
    """
    entries: dict[int, int] = {}
    for header in headers.values():
        width = bits_dtype(header.dtype).itemsize
        entries[width] = entries.get(width, 0) + header.entries
    if not 1 <= gap_planes <= _MAX_GAP_BYTES:
        raise InputError(f"gaps of {gap_planes} bytes are not possible")
    sizes = {f"gaps_{i}": sum(entries.values()) for i in range(gap_planes)}
    return sizes | {f"xor{8 * width}_{i}": entries[width] for width in sorted(entries) for i in range(width)}


def decode(
    headers: Mapping[str, TensorHeader], planes: Mapping[str, UInt8[np.ndarray, "..."]]
) -> dict[str, TensorDelta]:
    """Returns the tensors whose planes these are: the inverse of `encode`.

    Args:
        headers: the tensors by path, each with at least one entry.
        planes: what `plane_sizes` names, in the sizes it gives.

    Returns:
        The tensors' deltas by path.

    Raises:
        InputError: an index is out of range, or an entry does not change.
    """
    if not headers:
        return {}
    gap_planes = sum(name.startswith("gaps_") for name in planes)
    gaps = _join("gaps", planes, gap_planes, 4 if gap_planes <= 4 else 8)
    values = {
        width: _join(f"xor{8 * width}", planes, width, width) for width in (1, 2, 4, 8) if f"xor{8 * width}_0" in planes
    }
    read_gaps, read_values = 0, dict.fromkeys(values, 0)
    tensors = {}
    for path, header in sorted(headers.items()):
        width = bits_dtype(header.dtype).itemsize
        own_gaps = gaps[read_gaps : read_gaps + header.entries]
        own_values = values[width][read_values[width] : read_values[width] + header.entries]
        read_gaps += header.entries
        read_values[width] += header.entries
        tensors[path] = _tensor(path, header, own_gaps, own_values)
    return tensors


def _tensor(path: str, header: TensorHeader, gaps: np.ndarray, xor: np.ndarray) -> TensorDelta:
    size = np.prod(header.shape, dtype=object)
    # Summed as floats first: hostile gaps could overflow the exact sum, and then look harmless.
    if float(gaps.sum(dtype=np.float64)) > 2.0**62:
        raise InputError(f"tensor {path}: an index is out of range for shape {header.shape}")
    indices = np.cumsum(gaps, dtype=np.int64)
    indices += np.arange(header.entries)
    if indices[-1] >= size:
        raise InputError(f"tensor {path}: an index is out of range for shape {header.shape}")
    try:
        return CoordinateDelta(
            shape=header.shape,
            dtype=header.dtype,
            indices=indices.astype(index_dtype(size), copy=False),
            xor=xor.copy(),
            base_checksum=header.base_checksum,
            tuned_checksum=header.tuned_checksum,
        )
    except InputError as error:
        raise InputError(f"tensor {path}: {error}") from error
