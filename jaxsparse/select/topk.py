"""Exact top-k of every matrix."""

import jax
from jaxtyping import Array, Float, Int

__all__ = ["matrix_topk"]


def matrix_topk(scores: Float[Array, "stack in out"], k: int) -> Int[Array, "stack k"]:
    """Returns the flat indices of the k largest scores of each matrix, largest first.

    Ties go to the lowest flat index, and NaN counts as larger than any number, like `jax.lax.top_k`.

    Example:
        >>> import jax.numpy as jnp
        >>> matrix_topk(jnp.array([[[1.0, 3.0], [3.0, 2.0]]]), 3)
        Array([[1, 2, 3]], dtype=int32)
    """
    return jax.lax.top_k(scores.reshape(scores.shape[0], -1), k)[1]
