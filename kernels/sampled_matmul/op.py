"""Entries of x.T @ dy at given places."""

from jaxsparse.kernels.sampled_matmul.reference import sampled_matmul_reference
from jaxtyping import Array, Float, Int

__all__ = ["sampled_matmul"]


def sampled_matmul(
    x: Float[Array, "tokens inputs"],
    dy: Float[Array, "tokens outputs"],
    rows: Int[Array, "..."],
    columns: Int[Array, "..."],
) -> Float[Array, "..."]:
    """Returns sum_t x[t, rows[j]] dy[t, columns[j]]: entries of x.T @ dy, which never exists as a whole.

    Args:
        x: activations.
        dy: cotangents of the outputs, of the same tokens.
        rows: columns of x, in range.
        columns: columns of dy, in range; of the shape of `rows`.

    Returns:
        The entries in promote_types(x and dy, float32), of the shape of `rows`.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> import jax.numpy as jnp
        >>> x, dy = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 0.0], [1.0, 1.0]])
        >>> sampled_matmul(x, dy, jnp.array([1, 0]), jnp.array([0, 1]))
        Array([6., 3.], dtype=float32)
    """
    if x.shape[0] != dy.shape[0]:
        raise ValueError(f"x and dy must have the same tokens, got shapes {x.shape} and {dy.shape}")
    if rows.shape != columns.shape:
        raise ValueError(f"rows and columns must have one shape, got {rows.shape} and {columns.shape}")
    return sampled_matmul_reference(x, dy, rows.reshape(-1), columns.reshape(-1)).reshape(rows.shape)
