"""What the metadata says of each kind of tensor: written, read back with distrust, and made whole by its numbers.

A header tells how many numbers a tensor has in each stream of a file (gaps between indices, bit patterns of one width,
entries of factors), and makes the tensor out of them.
"""

import abc
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from jaxsparse.common.errors import InputError
from jaxsparse.deltas.tensors import (
    CoordinateDelta,
    FactorDelta,
    SliceDelta,
    TensorDelta,
    bits_dtype,
    check_shape,
    index_dtype,
)
from jaxsparse.subspaces.targets import MatrixView, matrix_view

__all__ = ["Header", "field", "header_of", "read_header", "sha256_field"]

GAPS = "gaps"
Streams = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Header(abc.ABC):
    """What the metadata says of one tensor.

    Attributes:
        shape: the tensor's shape.
        dtype: the name of its dtype.
        base_checksum: as in `TensorDelta`.
        tuned_checksum: as in `TensorDelta`.
    """

    kind: ClassVar[str]
    shape: tuple[int, ...]
    dtype: str
    base_checksum: str
    tuned_checksum: str

    @classmethod
    @abc.abstractmethod
    def of(cls, tensor: Any) -> "Header":
        """Returns the header of a tensor's delta."""

    @classmethod
    @abc.abstractmethod
    def read(cls, common: dict[str, Any], spec: Mapping[str, Any]) -> "Header":
        """Returns the header that JSON describes.

        Raises:
            InputError: it is not valid, or impossible.
        """

    @abc.abstractmethod
    def own(self) -> dict[str, Any]:
        """Returns what JSON says of this kind alone."""

    @abc.abstractmethod
    def counts(self) -> dict[str, int]:
        """Returns how many numbers the tensor has in each stream."""

    @staticmethod
    @abc.abstractmethod
    def streams(tensor: Any) -> dict[str, np.ndarray]:
        """Returns the numbers of a tensor's delta by stream."""

    @abc.abstractmethod
    def tensor(self, streams: Streams) -> TensorDelta:
        """Returns the delta of a tensor with these numbers.

        Raises:
            InputError: they are impossible.
        """

    def spec(self) -> dict[str, Any]:
        """Returns the header as JSON holds it."""
        common = {"kind": self.kind, "shape": list(self.shape), "dtype": self.dtype}
        return common | {"base_sha256": self.base_checksum, "tuned_sha256": self.tuned_checksum} | self.own()

    def _common(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("shape", "dtype", "base_checksum", "tuned_checksum")}


def _common_of(tensor: TensorDelta) -> dict[str, Any]:
    return {name: getattr(tensor, name) for name in ("shape", "dtype", "base_checksum", "tuned_checksum")}


def _bits_stream(dtype: str) -> str:
    return f"xor{8 * bits_dtype(dtype).itemsize}"


@dataclass(frozen=True)
class CoordinateHeader(Header):
    """Of changed entries; `entries` of them."""

    kind = "coordinates"
    entries: int

    @classmethod
    def of(cls, tensor: CoordinateDelta) -> "CoordinateHeader":
        """Returns the header of a tensor's delta."""
        return cls(**_common_of(tensor), entries=tensor.entries)

    @classmethod
    def read(cls, common: dict[str, Any], spec: Mapping[str, Any]) -> "CoordinateHeader":
        """Returns the header that JSON describes."""
        bits_dtype(common["dtype"])
        entries, shape = field(spec, "entries", int), common["shape"]
        if not 1 <= entries <= math.prod(shape):
            raise InputError(f"{entries} changed entries in a tensor of shape {str(shape)[:80]} are not possible")
        return cls(**common, entries=entries)

    def own(self) -> dict[str, Any]:
        """Returns what JSON says of this kind alone."""
        return {"entries": self.entries}

    def counts(self) -> dict[str, int]:
        """Returns how many numbers the tensor has in each stream."""
        return {GAPS: self.entries, _bits_stream(self.dtype): self.entries}

    @staticmethod
    def streams(tensor: CoordinateDelta) -> dict[str, np.ndarray]:
        """Returns the numbers of a tensor's delta by stream."""
        return {GAPS: _gaps(tensor.indices), _bits_stream(tensor.dtype): tensor.xor}

    def tensor(self, streams: Streams) -> CoordinateDelta:
        """Returns the delta of a tensor with these numbers."""
        size = math.prod(self.shape)
        indices = _indices(streams[GAPS], size, self.shape).astype(index_dtype(size), copy=False)
        return CoordinateDelta(**self._common(), indices=indices, xor=streams[_bits_stream(self.dtype)].copy())


@dataclass(frozen=True)
class SliceHeader(Header):
    """Of whole slices; so many of every matrix, along one axis of a view."""

    kind = "slices"
    view: MatrixView
    axis: Any
    slices: int

    @property
    def _sizes(self) -> tuple[int, int]:
        """Number of slices of a whole matrix, and of weights of a slice."""
        sizes = self.view.in_size, self.view.out_size
        return sizes if self.axis == "input" else sizes[::-1]

    @classmethod
    def of(cls, tensor: SliceDelta) -> "SliceHeader":
        """Returns the header of a tensor's delta."""
        return cls(**_common_of(tensor), view=tensor.view, axis=tensor.axis, slices=tensor.slices.shape[1])

    @classmethod
    def read(cls, common: dict[str, Any], spec: Mapping[str, Any]) -> "SliceHeader":
        """Returns the header that JSON describes."""
        bits_dtype(common["dtype"])
        axis, slices = field(spec, "axis", str), field(spec, "slices", int)
        header = cls(**common, view=_read_view(common["shape"], spec), axis=axis, slices=slices)
        if axis not in ("input", "output") or not 1 <= slices <= header._sizes[0]:
            raise InputError(f"{slices} slices of axis {axis[:20]!r} of a matrix are not possible")
        return header

    def own(self) -> dict[str, Any]:
        """Returns what JSON says of this kind alone."""
        return {"axis": self.axis, "slices": self.slices} | _view_spec(self.view)

    def counts(self) -> dict[str, int]:
        """Returns how many numbers the tensor has in each stream."""
        slices = self.view.stack * self.slices
        return {GAPS: slices, _bits_stream(self.dtype): slices * self._sizes[1]}

    @staticmethod
    def streams(tensor: SliceDelta) -> dict[str, np.ndarray]:
        """Returns the numbers of a tensor's delta by stream."""
        layers = np.arange(tensor.view.stack, dtype=np.int64)[:, None] * tensor.own_size
        return {GAPS: _gaps((layers + tensor.slices).reshape(-1)), _bits_stream(tensor.dtype): tensor.xor.reshape(-1)}

    def tensor(self, streams: Streams) -> SliceDelta:
        """Returns the delta of a tensor with these numbers."""
        (own, others), stack = self._sizes, self.view.stack
        numbers = _indices(streams[GAPS], stack * own, self.shape).reshape(stack, self.slices)
        slices = numbers - np.arange(stack, dtype=np.int64)[:, None] * own
        if slices.size and not (slices.min() >= 0 and slices.max() < own):
            raise InputError("an index is out of range: its matrices do not have equally many slices")
        xor = streams[_bits_stream(self.dtype)].reshape(stack, self.slices, others).copy()
        return SliceDelta(**self._common(), view=self.view, axis=self.axis, slices=slices.astype(np.int32), xor=xor)


@dataclass(frozen=True)
class FactorHeader(Header):
    """Of factors of one rank and width, with or without a gain; their scale is one more number."""

    kind = "factors"
    view: MatrixView
    rank: int
    has_gain: bool
    width: int

    @property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        view = self.view
        shapes: dict[str, tuple[int, ...]] = {"a": (view.stack, view.in_size, self.rank)}
        shapes |= {"b": (view.stack, self.rank, view.out_size), "scale": ()}
        return shapes | ({"gain": (view.stack, view.out_size)} if self.has_gain else {})

    @classmethod
    def of(cls, tensor: FactorDelta) -> "FactorHeader":
        """Returns the header of a tensor's delta."""
        own: dict[str, Any] = {"rank": tensor.rank, "has_gain": tensor.gain is not None}
        return cls(**_common_of(tensor), view=tensor.view, **own, width=8 * tensor.a.itemsize)

    @classmethod
    def read(cls, common: dict[str, Any], spec: Mapping[str, Any]) -> "FactorHeader":
        """Returns the header that JSON describes."""
        view, rank = _read_view(common["shape"], spec), field(spec, "rank", int)
        if not 1 <= rank <= view.in_size + view.out_size:
            raise InputError(f"a rank of {rank} of matrices {view.in_size} x {view.out_size} is not possible")
        if (width := field(spec, "width", int)) not in (32, 64):
            raise InputError(f"factors of {width} bits are not possible")
        return cls(**common, view=view, rank=rank, has_gain=field(spec, "gain", bool), width=width)

    def own(self) -> dict[str, Any]:
        """Returns what JSON says of this kind alone."""
        own = {"rank": self.rank, "gain": self.has_gain, "width": self.width}
        return own | _view_spec(self.view)

    def counts(self) -> dict[str, int]:
        """Returns how many numbers the tensor has in each stream."""
        return {f"factor{self.width}": sum(math.prod(shape) for shape in self._shapes.values())}

    @staticmethod
    def streams(tensor: FactorDelta) -> dict[str, np.ndarray]:
        """Returns the numbers of a tensor's delta by stream."""
        scale = np.array(tensor.scale, tensor.a.dtype)
        parts = [part.reshape(-1) for part in (tensor.a, tensor.b, scale, tensor.gain) if part is not None]
        width = 8 * tensor.a.itemsize
        return {f"factor{width}": np.concatenate(parts).view(f"u{width // 8}")}

    def tensor(self, streams: Streams) -> FactorDelta:
        """Returns the delta of a tensor with these numbers."""
        numbers, start = streams[f"factor{self.width}"].view(f"f{self.width // 8}"), 0
        parts: dict[str, Any] = {}
        for name, shape in self._shapes.items():
            size = math.prod(shape)
            parts[name] = numbers[start : start + size].reshape(shape).copy()
            start += size
        return FactorDelta(**self._common(), view=self.view, **(parts | {"scale": float(parts["scale"])}))


_HEADERS: Mapping[str, type[Header]] = {header.kind: header for header in (CoordinateHeader, SliceHeader, FactorHeader)}


def header_of(tensor: TensorDelta) -> Header:
    """Returns the header of a tensor's delta."""
    return _HEADERS[tensor.kind].of(tensor)


def read_header(path: str, spec: Any) -> Header:
    """Returns the header of one tensor that JSON describes.

    Args:
        path: the tensor's path.
        spec: what the JSON says.

    Raises:
        InputError: it is not valid, impossible, or of a kind that is not known here.
    """
    try:
        if not isinstance(spec, dict):
            raise InputError("its metadata is not valid: it is not described")
        if (kind := field(spec, "kind", str)) not in _HEADERS:
            raise InputError(f"it is stored as {kind[:60]!r}, which this jaxsparse cannot read: install a newer one")
        shape = tuple(field({"shape": axis}, "shape", int) for axis in field(spec, "shape", list))
        check_shape(shape)
        if 0 in shape:
            raise InputError(f"a tensor without weights, of shape {str(shape)[:80]}, is not possible here")
        common = {"shape": shape, "dtype": field(spec, "dtype", str)}
        common |= {name: sha256_field(spec, json) for name, json in _CHECKSUMS.items()}
        return _HEADERS[kind].read(common, spec)
    except InputError as error:
        raise InputError(f"tensor {path!r}: {error}") from error


_CHECKSUMS = {"base_checksum": "base_sha256", "tuned_checksum": "tuned_sha256"}


def field(content: Mapping[str, Any], name: str, *kinds: type) -> Any:
    """Returns a value of metadata, after a check of its type.

    Raises:
        InputError: it is missing or of another type.
    """
    value = content.get(name)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"its metadata is not valid: {name!r} is {str(value)[:60]!r}, expected {expected}")
    return value


def sha256_field(content: Mapping[str, Any], name: str) -> str:
    """Returns a checksum out of metadata; raises an InputError for anything else."""
    value = field(content, name, str)
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise InputError(f"its metadata is not valid: {name!r} is {value[:60]!r}, expected a SHA-256")
    return value


def _view_spec(view: MatrixView) -> dict[str, Any]:
    return dict(zip(("layers", "inputs", "outputs"), map(list, view.axes), strict=True))


def _read_view(shape: tuple[int, ...], spec: Mapping[str, Any]) -> MatrixView:
    axes = [[field({name: axis}, name, int) for axis in field(spec, name, list)] for name in _VIEW]
    if sorted(axis for group in axes for axis in group) != list(range(len(shape))):
        raise InputError(f"its metadata is not valid: the axes {str(axes)[:60]} do not name each axis once")
    return matrix_view(shape, *axes)


_VIEW = ("layers", "inputs", "outputs")


def _gaps(indices: np.ndarray) -> np.ndarray:
    """The numbers left out before each of increasing indices."""
    return np.diff(indices.astype(np.int64, copy=False), prepend=-1) - 1


def _indices(gaps: np.ndarray, size: int, shape: tuple[int, ...]) -> np.ndarray:
    # Summed as floats first: hostile gaps could overflow the exact sum, and then look harmless.
    if float(gaps.sum(dtype=np.float64)) > 2.0**62:
        raise InputError(f"an index is out of range for shape {shape}")
    indices = np.cumsum(gaps, dtype=np.int64)
    indices += np.arange(gaps.size)
    if indices.size and indices[-1] >= size:
        raise InputError(f"an index is out of range for shape {shape}")
    return indices
