"""The subspace of k free coordinates of every matrix.

A support is an int32 array (stack, k): for each matrix the flat indices, in (in, out) order, of its free
coordinates. Indices of one matrix are distinct. Slots are arrays of the same shape.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxsparse.subspaces.targets import MatrixView

__all__ = ["Coordinates"]


def _rows(support: Int[Array, "stack k"]) -> Int[Array, "stack 1"]:
    return jnp.arange(support.shape[0], dtype=jnp.int32)[:, None]


@dataclass(frozen=True)
class Coordinates:
    """k free coordinates of every matrix, anywhere in it.

    Example:
        >>> import jax.numpy as jnp
        >>> dense = jnp.arange(6.0).reshape(1, 2, 3)
        >>> Coordinates().gather(dense, jnp.array([[5, 0]]))
        Array([[5., 0.]], dtype=float32)
    """

    def empty_support(self, view: MatrixView, count: int) -> Int[Array, "stack k"]:
        """Returns a valid support to start from: the first `count` coordinates of every matrix."""
        return jnp.tile(jnp.arange(count, dtype=jnp.int32), (view.stack, 1))

    def gather(self, dense: Float[Array, "stack in out"], support: Int[Array, "stack k"]) -> Float[Array, "stack k"]:
        """Returns the entries of the dense matrices at the support."""
        return dense.reshape(dense.shape[0], -1)[_rows(support), support]

    def scatter(
        self, view: MatrixView, support: Int[Array, "stack k"], slots: Float[Array, "stack k"], fill: float
    ) -> Float[Array, "stack in out"]:
        """Returns dense matrices that hold the slots at the support and `fill` everywhere else."""
        dense = jnp.full((view.stack, view.size), fill, slots.dtype)
        dense = dense.at[_rows(support), support].set(slots, unique_indices=True)
        return dense.reshape(view.stack, view.in_size, view.out_size)
