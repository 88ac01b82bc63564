"""Entries of x.T @ dy at given places."""

import jax.numpy as jnp
from jaxsparse.kernels.blocks import as_index, fits_kernels
from jaxsparse.kernels.launch import Implementation, run
from jaxsparse.kernels.sampled_matmul.pallas_gpu import sampled_matmul_gpu
from jaxsparse.kernels.sampled_matmul.reference import sampled_matmul_reference
from jaxsparse.kernels.tiles import accumulation_dtype
from jaxtyping import Array, Float, Int

__all__ = ["sampled_matmul"]


def sampled_matmul(
    x: Float[Array, "tokens inputs"],
    dy: Float[Array, "tokens outputs"],
    rows: Int[Array, "..."],
    columns: Int[Array, "..."] | None = None,
    *,
    implementation: Implementation = None,
) -> Float[Array, "..."]:
    """Returns sum_t x[t, rows[j]] dy[t, columns[j]]: entries of x.T @ dy, which never exists as a whole.

    Args:
        x: activations.
        dy: cotangents of the outputs, of the same tokens.
        rows: columns of x, in range.
        columns: columns of dy, in range; of the shape of `rows`. None: `rows` is (k, outputs), inputs of every output,
            and the entries are sum_t x[t, rows[j, o]] dy[t, o].
        implementation: "xla"; "pallas", up to float32; or None for what is best on the device.

    Returns:
        The entries in promote_types(x and dy, float32), of the shape of `rows`.

    Raises:
        ValueError: shapes do not fit, or the implementation cannot take the arguments.
        TypeError: `rows` or `columns` hold no integers.

    Example:
        >>> import jax.numpy as jnp
        >>> x, dy = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 0.0], [1.0, 1.0]])
        >>> sampled_matmul(x, dy, jnp.array([1, 0]), jnp.array([0, 1]))
        Array([6., 3.], dtype=float32)
        >>> sampled_matmul(x, dy, jnp.array([[1, 0]]))
        Array([[6., 3.]], dtype=float32)
    """
    if x.ndim != 2 or dy.ndim != 2 or x.shape[0] != dy.shape[0]:
        raise ValueError(f"x and dy must have the same tokens, got shapes {x.shape} and {dy.shape}")
    rows, columns = as_index("rows", rows), None if columns is None else as_index("columns", columns)
    if columns is None and (rows.ndim != 2 or rows.shape[1] != dy.shape[1]):
        raise ValueError(f"rows must be (k, {dy.shape[1]}) without columns, got shape {rows.shape}")
    if columns is not None and rows.shape != columns.shape:
        raise ValueError(f"rows and columns must have one shape, got {rows.shape} and {columns.shape}")
    if rows.size == 0 or x.shape[0] == 0:
        return jnp.zeros(rows.shape, accumulation_dtype(x, dy))
    found = run(
        implementation,
        (x, dy, rows) if columns is None else (x, dy, rows.reshape(-1), columns.reshape(-1)),
        xla=sampled_matmul_reference,
        gpu=sampled_matmul_gpu,
        reason=fits_kernels(x=x, dy=dy),
    )
    return found.reshape(rows.shape)
