"""From entries to the slices of matrices in which they lie."""

from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Int32, Shaped, UInt

from jaxsparse.common.fingerprints import tensor_checksum
from jaxsparse.deltas.bits import gather_bits
from jaxsparse.deltas.tensors import SliceDelta, matrix_places, slice_indices
from jaxsparse.subspaces.targets import MatrixView

__all__ = ["in_slices", "padded_slices", "slice_delta", "slices_of_axes", "whole_slices"]


def padded_slices(touched: Bool[np.ndarray, "stack size"]) -> Int32[np.ndarray, "stack slices"]:
    """Returns the numbers of slices, of every matrix as many: those with fewer add the first of the others.

    Args:
        touched: which slices of every matrix there are to be.

    Example:
        >>> padded_slices(np.array([[False, True, True], [False, False, True]]))
        array([[1, 2],
               [0, 2]], dtype=int32)
    """
    count = touched.sum(axis=1).max()
    return np.sort(np.argsort(~touched, axis=1, kind="stable")[:, :count], axis=1).astype(np.int32)


def slices_of_axes(
    view: MatrixView, indices: Int[np.ndarray, " entries"]
) -> list[tuple[str, Int32[np.ndarray, "stack slices"], int]]:
    """Returns for either axis the slices that hold all of some entries: its name, their numbers, and their weights'.

    Args:
        view: of the tensor.
        indices: positions in the flattened tensor; at least one.
    """
    layer, *along = matrix_places(view, indices)
    found = []
    for axis, own, size in zip(("input", "output"), along, (view.in_size, view.out_size), strict=True):
        touched = np.zeros((view.stack, size), bool)
        touched[layer, own] = True
        slices = padded_slices(touched)
        found.append((axis, slices, slices.size * (view.size // size)))
    return found


def whole_slices(
    view: MatrixView, indices: Int[np.ndarray, " entries"]
) -> tuple[str, Int32[np.ndarray, "stack slices"], int]:
    """Returns the slices that hold all of some entries, on the axis where these have fewer weights.

    Args:
        view: of the tensor.
        indices: positions in the flattened tensor; at least one.

    Returns:
        The axis, the numbers of the slices, and how many weights these have.

    Example:
        >>> from jaxsparse.subspaces.targets import matrix_view
        >>> whole_slices(matrix_view((3, 4), (), (0,), (1,)), np.array([4, 6]))
        ('input', array([[1]], dtype=int32), 4)
    """
    return min(slices_of_axes(view, indices), key=lambda one: one[2])


def in_slices(
    indices: Int[np.ndarray, "stack slices others"],
    entries: Int[np.ndarray, " entries"],
    values: Shaped[np.ndarray, " entries"],
) -> Shaped[np.ndarray, "stack slices others"]:
    """Returns entries' values where they lie in slices, and zeros elsewhere.

    Args:
        indices: what `slice_indices` returns.
        entries: positions in the flattened tensor, all of them in the slices.
        values: one for each.

    Example:
        >>> in_slices(np.array([[[2, 3]]]), np.array([3]), np.array([1.5]))
        array([[[0. , 1.5]]])
    """
    order = np.argsort(indices, axis=None)
    whole = np.zeros(indices.shape, values.dtype)
    whole.reshape(-1)[order[np.searchsorted(indices.reshape(-1)[order], entries)]] = values
    return whole


def slice_delta(
    leaf: Any,
    view: MatrixView,
    axis: str,
    slices: Int32[np.ndarray, "stack slices"],
    xor: UInt[np.ndarray, "stack slices others"],
) -> SliceDelta:
    """Returns the delta of one tensor that changes in slices.

    Args:
        leaf: the base's tensor.
        view: of the tensor.
        axis: "input" or "output".
        slices: the numbers of the slices.
        xor: old bits XOR new bits of their weights.

    Raises:
        InputError: see `SliceDelta`.
    """
    indices = slice_indices(view, axis, slices)
    before = gather_bits(leaf, indices.reshape(-1)).reshape(indices.shape)
    checksums = tensor_checksum(before), tensor_checksum(before ^ xor)
    return SliceDelta(tuple(leaf.shape), leaf.dtype.name, *checksums, view, axis, slices, xor)
