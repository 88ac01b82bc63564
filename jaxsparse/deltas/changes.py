"""What a delta adds to the weights, as numbers: for mixing, serving and export."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike, Float, Int, UInt

from jaxsparse.common.errors import InputError
from jaxsparse.deltas.bits import gather_bits
from jaxsparse.deltas.tensors import CoordinateDelta, SliceDelta

__all__ = ["added_bits", "entry_changes", "moved_entries"]


def entry_changes(path: str, tensor: CoordinateDelta | SliceDelta, leaf: Any) -> Float[np.ndarray, "..."]:
    """Returns tuned minus base at the entries of a delta.

    Args:
        path: of the tensor, for error messages.
        tensor: its delta.
        leaf: the base's tensor, to which the delta belongs; NumPy or JAX.

    Returns:
        The differences in promote_types(dtype, float32), of the shape of `tensor.xor`.

    Raises:
        InputError: the tensor holds no floating-point numbers, or a difference is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> base = {"w": jnp.ones(3)}
        >>> entry_changes("w", diff(base, {"w": jnp.arange(3.0)}).tensors["w"], base["w"])
        array([-1.,  1.], dtype=float32)
    """
    dtype = np.dtype(leaf.dtype)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"tensor {path} of dtype {tensor.dtype} holds no floating-point numbers")
    wide = np.promote_types(dtype, np.float32)
    old = gather_bits(leaf, *tensor.runs).reshape(tensor.xor.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        change = (old ^ tensor.xor).view(dtype).astype(wide) - old.view(dtype).astype(wide)
    if not np.all(np.isfinite(change)):
        raise InputError(f"tensor {path} changes to or from numbers that are not finite")
    return change


def moved_entries(
    tensor: CoordinateDelta | SliceDelta,
) -> tuple[Int[np.ndarray, " entries"], Int[np.ndarray, " entries"]]:
    """Returns which weights a delta moves: of slices those that change.

    Args:
        tensor: its delta.

    Returns:
        Their positions in the flattened tensor, strictly increasing, and where each is in the flattened `tensor.xor`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> moved_entries(diff({"w": jnp.ones(3)}, {"w": jnp.arange(3.0)}).tensors["w"])
        (array([0, 2], dtype=int32), array([0, 1]))
    """
    if isinstance(tensor, CoordinateDelta):
        return tensor.indices, np.arange(tensor.indices.size)
    places = np.flatnonzero(tensor.xor)
    indices = tensor.indices.reshape(-1)[places]
    order = np.argsort(indices)
    return indices[order], places[order]


def added_bits(
    path: str, old: UInt[np.ndarray, "..."], dtype: DTypeLike, changes: Float[np.ndarray, "..."]
) -> UInt[np.ndarray, "..."]:
    """Returns the bits of weights plus changes, rounded once; a change of 0 alters no bit, not those of -0.0 either.

    Args:
        path: of the tensor, for error messages.
        old: the weights' bits.
        dtype: of the weights.
        changes: what is added, in at least float32.

    Raises:
        InputError: a sum is not finite.

    Example:
        >>> added_bits("w", np.float32([1.0]).view(np.uint32), np.float32, np.float32([0.5])).view(np.float32)
        array([1.5], dtype=float32)
    """
    narrow = np.dtype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = (old.view(narrow).astype(changes.dtype) + changes).astype(narrow)
    moves = changes != 0
    if not np.all(np.isfinite(rounded[moves].astype(changes.dtype))):
        raise InputError(f"tensor {path}: a sum is not finite in {narrow.name}; scale the changes down")
    return np.where(moves, rounded.view(old.dtype), old)
