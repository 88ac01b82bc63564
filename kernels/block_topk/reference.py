"""The largest entries in plain XLA."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxsparse.kernels.threshold import largest
from jaxtyping import Array, Float, Int

__all__ = ["TopK", "block_topk_reference", "column_topk_reference"]


class TopK(NamedTuple):
    """The entries that are largest in magnitude, best first, ties to the lowest index.

    Attributes:
        values: the entries.
        index: where they are.
    """

    values: Float[Array, "..."]
    index: Int[Array, "..."]


def block_topk_reference(a: Float[Array, " n"], *, k: int) -> TopK:
    """Returns the k entries of `a` that are largest in magnitude."""
    index = largest(jnp.abs(a), k)
    magnitude = jnp.abs(a[index])
    is_number = (~jnp.isnan(magnitude)).astype(jnp.int32)
    # Sorts the answer alone: NaN first, then the largest, then the lowest index.
    _, _, index = jax.lax.sort((is_number, jnp.where(is_number, -magnitude, 0), index), num_keys=3)
    return TopK(a[index], index)


def column_topk_reference(a: Float[Array, "rows columns"], *, k: int) -> TopK:
    """Returns the k entries of every column that are largest in magnitude, (k, columns)."""
    index = jax.lax.top_k(jnp.abs(a).T, k)[1].T
    return TopK(jnp.take_along_axis(a, index, axis=0), index)
