"""The k entries of a matrix, or of every neuron, that are largest in magnitude."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxsparse.kernels.block_topk.pallas_gpu import block_topk_gpu, column_topk_gpu
from jaxsparse.kernels.block_topk.reference import TopK, block_topk_reference, column_topk_reference
from jaxsparse.kernels.blocks import check_size, fits_kernels
from jaxsparse.kernels.launch import Implementation, run
from jaxtyping import Array, Float

__all__ = ["TopK", "block_topk"]


def block_topk(
    a: Float[Array, "*stack inputs outputs"],
    k: int,
    *,
    axis: int | None = None,
    implementation: Implementation = None,
) -> TopK:
    """Returns the k entries of a matrix that are largest in magnitude; exact, without sorting the matrix.

    Ties go to the lowest index, and NaN counts as larger than any number, as in `lax.top_k`. On a GPU, blocks of a
    matrix choose their candidates on chip, so that it is read once, or a little more where one block has many.

    Args:
        a: a matrix, or a stack of matrices, each by itself.
        k: how many, between 1 and the size of a matrix, or of the axis.
        axis: -2 for k entries of every column (a neuron: one output), -1 for k of every row, None for k of the matrix.
        implementation: "xla"; "pallas", up to float32; or None for what is best on the device.

    Returns:
        Values in a's dtype and their places, best first: (*stack, k) with flat indices row * outputs + column; or
        (*stack, k, outputs) with row numbers for axis -2, (*stack, inputs, k) with column numbers for axis -1.

    Raises:
        ValueError: a is no matrix, or axis or k is out of range, or the implementation cannot take the dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> a = jnp.array([[1.0, -5.0], [3.0, 2.0]])
        >>> block_topk(a, 2)
        TopK(values=Array([-5.,  3.], dtype=float32), index=Array([1, 2], dtype=int32))
        >>> block_topk(a, 1, axis=-2).index
        Array([[1, 0]], dtype=int32)
    """
    if a.ndim < 2:
        raise ValueError(f"a must be a matrix or a stack of matrices, got shape {a.shape}")
    if axis not in (None, -1, -2):
        raise ValueError(f"axis must be None, -2 (of every column) or -1 (of every row), got {axis!r}")
    matrix = a.shape[-2:]
    most = matrix[0] * matrix[1] if axis is None else matrix[axis]
    if not 1 <= k <= most:
        raise ValueError(f"k must lie between 1 and {most}, the entries that there are, got {k}")
    if axis == -1:
        found = block_topk(jnp.swapaxes(a, -1, -2), k, axis=-2, implementation=implementation)
        return TopK(*(jnp.swapaxes(part, -1, -2) for part in found))
    if a.ndim > 2:
        of_matrix = partial(block_topk, k=k, axis=axis, implementation=implementation)
        found = jax.lax.map(of_matrix, a.reshape(-1, *matrix))
        return TopK(*(part.reshape(*a.shape[:-2], *part.shape[1:]) for part in found))
    check_size(*matrix)
    reason = fits_kernels(a=a)
    if axis is None:
        xla, gpu = partial(block_topk_reference, k=k), partial(block_topk_gpu, k=k)
        return run(implementation, (a.reshape(-1),), xla=xla, gpu=gpu, reason=reason)
    xla, gpu = partial(column_topk_reference, k=k), partial(column_topk_gpu, k=k)
    return run(implementation, (a,), xla=xla, gpu=gpu, reason=reason)
