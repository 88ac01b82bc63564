"""What a delta is: the changed entries of every tensor, and what they belong to."""

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Int, UInt

from jaxsparse.common.errors import InputError

__all__ = ["Delta", "Metadata", "TensorDelta", "bits_dtype", "index_dtype"]

# Bit patterns are kept for dtypes whose entries are whole bytes; booleans, int4 and complex numbers are no weights.
_DTYPES = {
    1: ("int8", "uint8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3b11fnuz"),
    2: ("bfloat16", "float16", "int16", "uint16"),
    4: ("float32", "int32", "uint32"),
    8: ("float64", "int64", "uint64"),
}
_BYTES = {name: width for width, names in _DTYPES.items() for name in names}
_MAX_TENSOR = 2**48


def bits_dtype(dtype: str) -> np.dtype:
    """Returns the unsigned integer dtype that holds the bit patterns of a tensor's dtype.

    Args:
        dtype: the name of the tensor's dtype, such as "bfloat16".

    Returns:
        uint8, uint16, uint32 or uint64.

    Raises:
        InputError: deltas do not hold this dtype.

    Example:
        >>> bits_dtype("bfloat16")
        dtype('uint16')
    """
    if dtype not in _BYTES:
        raise InputError(f"dtype {dtype!r} cannot be part of a delta; possible are {', '.join(sorted(_BYTES))}")
    return np.dtype(f"uint{8 * _BYTES[dtype]}")


def index_dtype(size: int) -> np.dtype:
    """Returns int32 where it can index a tensor of `size` entries, else int64."""
    return np.dtype(np.int32 if size <= np.iinfo(np.int32).max else np.int64)


@dataclass(frozen=True, eq=False)
class TensorDelta:
    """The changed entries of one tensor.

    Attributes:
        shape: the tensor's shape, stacked layers included.
        dtype: the name of the tensor's dtype.
        indices: positions in the flattened tensor (C order), strictly increasing; int32, or int64 for
            tensors of 2³¹ entries and more.
        xor: old bit pattern XOR new bit pattern of each entry, never 0, as unsigned integers as wide as the dtype.
        base_checksum: SHA-256 of the base's bits at `indices`.
        tuned_checksum: SHA-256 of the tuned model's bits at `indices`.

    Raises:
        InputError: indices out of range, unsorted or repeated; a dtype or shape that cannot be; lengths
            that differ.
    """

    shape: tuple[int, ...]
    dtype: str
    indices: Int[np.ndarray, " entries"]
    xor: UInt[np.ndarray, " entries"]
    base_checksum: str
    tuned_checksum: str

    def __post_init__(self) -> None:
        size = self.size
        if any(axis < 0 for axis in self.shape) or size > _MAX_TENSOR:
            raise InputError(f"shape {self.shape} is not that of a tensor")
        if self.xor.dtype != bits_dtype(self.dtype) or self.indices.dtype != index_dtype(size):
            raise InputError(
                f"a {self.dtype} tensor of shape {self.shape} takes {bits_dtype(self.dtype)} bits "
                f"at {index_dtype(size)} indices, not {self.xor.dtype} at {self.indices.dtype}"
            )
        if self.indices.shape != self.xor.shape or self.indices.ndim != 1:
            raise InputError(f"{self.indices.shape} indices do not match {self.xor.shape} bit patterns")
        if self.indices.size and not (self.indices[0] >= 0 and self.indices[-1] < size):
            raise InputError(f"an index is out of range for shape {self.shape}")
        if not np.all(self.indices[1:] > self.indices[:-1]):
            raise InputError("the indices are not strictly increasing")
        if not np.all(self.xor):
            raise InputError("an entry is listed that does not change")
        for array in (self.indices, self.xor):
            array.setflags(write=False)

    @property
    def size(self) -> int:
        """The number of entries of the whole tensor."""
        return math.prod(self.shape)

    @property
    def entries(self) -> int:
        """The number of changed entries."""
        return self.indices.size

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return self.indices.nbytes + self.xor.nbytes


def _current_versions() -> dict[str, str]:
    packages = ("jaxsparse", "jax", "numpy", "orbax-checkpoint", "safetensors")
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


@dataclass(frozen=True)
class Metadata:
    """Where a delta comes from and what it belongs to. All of it is optional but `versions`.

    Attributes:
        method: the name of the method that made the change, such as "gasdu".
        options: the method's options, as JSON can hold them.
        budget: free coordinates / all parameters, in (0, 1].
        base_name: the base's name, for people.
        base_fingerprint: `jaxsparse.common.fingerprints.fingerprint` of the base.
        step: the optimizer step at which the tuned model was taken.
        versions: what the delta was made with; default: what is installed.

    Raises:
        InputError: a value that is out of range, or that JSON cannot hold.
    """

    method: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: float | None = None
    base_name: str | None = None
    base_fingerprint: str | None = None
    step: int | None = None
    versions: Mapping[str, str] = field(default_factory=_current_versions)

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget <= 1:
            raise InputError(f"budget={self.budget} is not in (0, 1]")
        if self.step is not None and self.step < 0:
            raise InputError(f"step={self.step} is negative")
        for name in ("options", "versions"):
            try:
                plain = json.loads(json.dumps(dict(getattr(self, name)), allow_nan=False))
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(f"{name} must be what JSON can hold: {error}") from error
            object.__setattr__(self, name, MappingProxyType(plain))

    def as_dict(self) -> dict[str, Any]:
        """Returns all fields as a dict that JSON can hold."""
        return {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(self).items()}


def _check_path(path: str) -> None:
    # The paths are never opened as files here, but exporters and viewers downstream may.
    parts = path.split("/")
    if path.startswith("/") or "\\" in path or not path.isprintable() or {".", ".."} & set(parts):
        raise InputError(f"{path!r} is not the path of a parameter; expected one like layers/q_proj/kernel")


@dataclass(frozen=True, eq=False, repr=False)
class Delta:
    """A tuned model minus its base: immutable, on the host, exact bit for bit.

    Attributes:
        tensors: the changed entries, by the tensor's path, sorted by path; tensors without a change are
            left out.
        metadata: where it comes from and what it belongs to.

    Raises:
        InputError: a path that no parameter can have.
    """

    tensors: Mapping[str, TensorDelta]
    metadata: Metadata

    def __post_init__(self) -> None:
        for path in self.tensors:
            _check_path(path)
        changed = {path: tensor for path, tensor in sorted(self.tensors.items()) if tensor.entries}
        object.__setattr__(self, "tensors", MappingProxyType(changed))

    @property
    def entries(self) -> int:
        """The number of changed entries of all tensors."""
        return sum(tensor.entries for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes in host memory, metadata left out."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def __repr__(self) -> str:
        origin = "".join(
            f", {name}={value!r}"
            for name in ("method", "base_name", "step")
            if (value := getattr(self.metadata, name)) is not None
        )
        return f"Delta({self.entries:,} entries in {len(self.tensors)} tensors, {self.nbytes:,} bytes{origin})"
