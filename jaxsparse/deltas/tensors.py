"""What a delta says of one tensor: its changed entries, whole slices of it, or the factors of what is added to it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float, Int, Int32, UInt

from jaxsparse.common.errors import InputError
from jaxsparse.subspaces.targets import MatrixView

__all__ = [
    *("CoordinateDelta", "FactorDelta", "SliceDelta", "TensorDelta"),
    *("BITS", "bits_dtype", "check_shape", "index_dtype", "matrix_places", "offsets", "slice_indices"),
]

# Bit patterns are kept for dtypes whose entries are whole bytes; booleans, int4 and complex numbers are no weights.
_DTYPES = {
    1: ("int8", "uint8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e4m3b11fnuz"),
    2: ("bfloat16", "float16", "int16", "uint16"),
    4: ("float32", "int32", "uint32"),
    8: ("float64", "int64", "uint64"),
}
BITS: Mapping[str, np.dtype] = MappingProxyType(
    {name: np.dtype(f"uint{8 * width}") for width, names in _DTYPES.items() for name in names}
)
"""The unsigned integer dtype that holds the bit patterns of each dtype."""

_FLOATS = ("bfloat16", "float16", "float32", "float64")
_MAX_TENSOR = 2**48
_MAX_AXES = 32


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
    if dtype not in BITS:
        raise InputError(f"dtype {dtype!r} cannot be part of a delta; possible are {', '.join(sorted(BITS))}")
    return BITS[dtype]


def index_dtype(size: int) -> np.dtype:
    """Returns int32 where it can index a tensor of `size` entries, else int64."""
    return np.dtype(np.int32 if size <= np.iinfo(np.int32).max else np.int64)


def check_shape(shape: tuple[int, ...]) -> None:
    """Raises an InputError for a shape that no tensor has."""
    if len(shape) > _MAX_AXES or any(axis < 0 for axis in shape) or math.prod(shape) > _MAX_TENSOR:
        raise InputError(f"shape {str(shape)[:80]} is not possible for a tensor")


@dataclass(frozen=True, eq=False)
class TensorDelta:
    """What a delta says of one tensor; one of its subclasses.

    Attributes:
        shape: the tensor's shape, stacked layers included.
        dtype: the name of the tensor's dtype.
        base_checksum: SHA-256 of the base's bits at the delta's own entries.
        tuned_checksum: SHA-256 of the tuned model's bits there.
    """

    kind: ClassVar[str]
    exact: ClassVar[bool] = True
    """Whether the base's bits come back out of the tuned tensor alone."""

    shape: tuple[int, ...]
    dtype: str
    base_checksum: str
    tuned_checksum: str

    @property
    def size(self) -> int:
        """The number of entries of the whole tensor."""
        return math.prod(self.shape)

    @property
    def entries(self) -> int:
        """The number of weights that change."""
        raise NotImplementedError

    @property
    def stored(self) -> int:
        """How many weights, or entries of factors, the delta stores."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return sum(array.nbytes for array in vars(self).values() if isinstance(array, np.ndarray))

    def _freeze(self) -> None:
        for array in vars(self).values():
            if isinstance(array, np.ndarray):
                array.setflags(write=False)


@dataclass(frozen=True, eq=False)
class CoordinateDelta(TensorDelta):
    """The changed entries of one tensor.

    Attributes:
        indices: positions in the flattened tensor (C order), strictly increasing; int32, or int64 for
            tensors of 2³¹ entries and more.
        xor: old bit pattern XOR new bit pattern of each entry, never 0, as unsigned integers as wide as the dtype.

    Raises:
        InputError: indices out of range, unsorted or repeated; a dtype or shape that cannot be; lengths
            that differ.
    """

    kind = "coordinates"
    indices: Int[np.ndarray, " entries"]
    xor: UInt[np.ndarray, " entries"]

    def __post_init__(self) -> None:
        check_shape(self.shape)
        size = self.size
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
        self._freeze()

    @property
    def entries(self) -> int:
        """The number of changed entries."""
        return self.indices.size

    @property
    def stored(self) -> int:
        """The number of changed entries."""
        return self.indices.size

    @property
    def runs(self) -> tuple[Int[np.ndarray, " entries"], int]:
        """The positions, each a run of one entry."""
        return self.indices, 1


@dataclass(frozen=True, eq=False)
class SliceDelta(TensorDelta):
    """Whole input or output slices of the matrices of one tensor (S²FT, PaCA, cheap LoRA).

    Attributes:
        view: how the tensor is read as a stack of (in, out) matrices.
        axis: "input" for all weights of some inputs, "output" for all weights of some outputs.
        slices: the numbers of the slices, (stack, slices), strictly increasing in every matrix.
        xor: old bit pattern XOR new bit pattern of their weights, (stack, slices, others), 0 where one does not change.

    Raises:
        InputError: slices out of range, unsorted or repeated; a dtype, shape or view that cannot be.
    """

    kind = "slices"
    view: MatrixView
    axis: str
    slices: Int32[np.ndarray, "_ _"]
    xor: UInt[np.ndarray, "_ _ _"]

    def __post_init__(self) -> None:
        check_shape(self.shape)
        _check_view(self)
        if self.axis not in ("input", "output"):
            raise InputError(f"axis {self.axis!r} is neither 'input' nor 'output'")
        stack, own, others = self.view.stack, self.own_size, self.view.size // max(self.own_size, 1)
        if self.slices.dtype != np.int32 or self.slices.ndim != 2 or self.slices.shape[0] != stack:
            raise InputError(f"slices of {stack} matrices must be int32 ({stack}, slices), got {self.slices.shape}")
        if self.xor.dtype != bits_dtype(self.dtype) or self.xor.shape != (*self.slices.shape, others):
            raise InputError(f"{self.slices.shape} slices of {others} weights do not match {self.xor.shape} bits")
        if self.slices.size and not (self.slices.min() >= 0 and self.slices.max() < own):
            raise InputError(f"an index is out of range: there are {own} {self.axis} slices")
        if not np.all(self.slices[:, 1:] > self.slices[:, :-1]):
            raise InputError("the slices' indices are not strictly increasing")
        self._freeze()

    @property
    def own_size(self) -> int:
        """The number of slices of a whole matrix."""
        return self.view.in_size if self.axis == "input" else self.view.out_size

    @property
    def indices(self) -> Int[np.ndarray, "stack slices others"]:
        """Positions of the slices' weights in the flattened tensor (C order)."""
        return slice_indices(self.view, self.axis, self.slices)

    @property
    def runs(self) -> tuple[Int[np.ndarray, " runs"], int]:
        """Which runs of how many consecutive entries the tensor is changed at: input slices are whole runs."""
        if self.axis == "input" and self.view.is_in_order:
            layers = np.arange(self.view.stack, dtype=np.int64)[:, None] * self.view.in_size
            return (layers + self.slices).reshape(-1).astype(index_dtype(self.size)), self.view.out_size
        return self.indices.reshape(-1), 1

    @property
    def entries(self) -> int:
        """The number of weights that change."""
        return int(np.count_nonzero(self.xor))

    @property
    def stored(self) -> int:
        """The number of weights of all its slices."""
        return self.xor.size


@dataclass(frozen=True, eq=False)
class FactorDelta(TensorDelta):
    """The factors of what is added to the matrices of one tensor: W + s A B, and with a gain (W + s A B) g.

    The checksums are those of the whole tensor; the tuned one's holds where it was made, since sums are rounded
    otherwise elsewhere.

    Attributes:
        view: how the tensor is read as a stack of (in, out) matrices.
        a: A, (stack, in, r), in float32, or float64.
        b: B, (stack, r, out), of the dtype of A.
        scale: s, alpha / r, as a number of the dtype of A.
        gain: g, DoRA's m / c for every output, (stack, out), of the dtype of A; None for 1.

    Raises:
        InputError: factors that do not fit the tensor or are not finite; a dtype, shape or view that cannot be.
    """

    kind = "factors"
    exact = False
    view: MatrixView
    a: Float[np.ndarray, "_ _ _"]
    b: Float[np.ndarray, "_ _ _"]
    scale: float
    gain: Float[np.ndarray, "_ _"] | None = None

    def __post_init__(self) -> None:
        check_shape(self.shape)
        _check_view(self)
        if self.dtype not in _FLOATS:
            raise InputError(f"dtype {self.dtype!r} takes no factors; possible are {', '.join(_FLOATS)}")
        view, rank = self.view, self.a.shape[-1]
        wanted: dict[str, tuple[int, ...]] = {"a": (view.stack, view.in_size, rank)}
        wanted |= {"b": (view.stack, rank, view.out_size)}
        wanted |= {} if self.gain is None else {"gain": (view.stack, view.out_size)}
        for name, shape in wanted.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype not in (np.float32, np.float64) or array.dtype != self.a.dtype:
                raise InputError(f"{name} must be float32 or float64 {shape}, got {array.dtype} {array.shape}")
            if not np.all(np.isfinite(array)):
                raise InputError(f"{name} has entries that are not finite")
        if not math.isfinite(self.scale) or rank < 1:
            raise InputError(f"a scale of {self.scale} and a rank of {rank} are not possible")
        object.__setattr__(self, "scale", float(self.a.dtype.type(self.scale)))
        self._freeze()

    @property
    def rank(self) -> int:
        """The rank r of the product."""
        return self.a.shape[-1]

    @property
    def moved_layers(self) -> Bool[np.ndarray, " stack"]:
        """Which matrices move at all: not those whose A or B is 0, and that no gain scales."""
        moved = np.any(self.a, axis=(1, 2)) & np.any(self.b, axis=(1, 2))
        return moved if self.gain is None else moved | np.any(self.gain != 1, axis=1)

    @property
    def entries(self) -> int:
        """All weights of the matrices that move: so many change at most."""
        return int(np.count_nonzero(self.moved_layers)) * self.view.size

    @property
    def stored(self) -> int:
        """The number of entries of A, B and the gain."""
        return self.a.size + self.b.size + (0 if self.gain is None else self.gain.size)


def slice_indices(
    view: MatrixView, axis: str, slices: Int[np.ndarray, "stack slices"]
) -> Int[np.ndarray, "stack slices others"]:
    """Returns the positions of slices' weights in the flattened tensor.

    Args:
        view: of the tensor.
        axis: "input" or "output".
        slices: the numbers of the slices in every matrix.

    Example:
        >>> from jaxsparse.subspaces.targets import matrix_view
        >>> slice_indices(matrix_view((3, 2), (), (0,), (1,)), "output", np.array([[1]]))
        array([[[1, 3, 5]]], dtype=int32)
    """
    layers, inputs, outputs = offsets(view)
    own, others = (inputs, outputs) if axis == "input" else (outputs, inputs)
    found = layers[:, None, None] + own[slices][:, :, None] + others
    return found.astype(index_dtype(math.prod(view.shape)), copy=False)


def offsets(view: MatrixView) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns what each layer, input and output adds to a weight's position in the flattened tensor.

    Args:
        view: of the weight.

    Example:
        >>> from jaxsparse.subspaces.targets import matrix_view
        >>> offsets(matrix_view((3, 2), (), (1,), (0,)))
        (array([0]), array([0, 1]), array([0, 2, 4]))
    """
    strides = [math.prod(view.shape[axis + 1 :]) for axis in range(len(view.shape))]
    found = []
    for axes in view.axes:
        sums = np.zeros(1, np.int64)
        for axis in axes:
            sums = (sums[:, None] + strides[axis] * np.arange(view.shape[axis])).reshape(-1)
        found.append(sums)
    return found[0], found[1], found[2]


def matrix_places(view: MatrixView, indices: Int[np.ndarray, "..."]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the layer, the input and the output of positions in a flattened tensor.

    Args:
        view: of the tensor.
        indices: positions, in range.

    Example:
        >>> from jaxsparse.subspaces.targets import matrix_view
        >>> matrix_places(matrix_view((3, 2), (), (1,), (0,)), np.array([5]))
        (array([0]), array([1]), array([2]))
    """
    along = np.unravel_index(indices, view.shape)
    found = []
    for axes in view.axes:
        number = np.zeros_like(np.asarray(indices, np.int64))
        for axis in axes:
            number = number * view.shape[axis] + along[axis]
        found.append(number)
    return found[0], found[1], found[2]


def _check_view(tensor: SliceDelta | FactorDelta) -> None:
    if tensor.view.shape != tensor.shape:
        raise InputError(f"matrices of a tensor {tensor.view.shape} are not those of one of shape {tensor.shape}")
    if tensor.size == 0:
        raise InputError(f"shape {tensor.shape} holds no weights")
