"""Sampled products in plain XLA: by gathering rows, or tile by tile, whichever costs less."""

import jax.numpy as jnp
from jaxsparse.kernels.tiles import accumulation_dtype, scan_tiles
from jaxtyping import Array, Float, Int

__all__ = ["gathered", "sampled_matmul_reference", "tiled"]

GATHER_COST = 200
"""One sampled entry costs as much as so many entries of a dense product (CPU, 512 tokens, 576 x 576: 220)."""


def sampled_matmul_reference(
    x: Float[Array, "tokens inputs"],
    dy: Float[Array, "tokens outputs"],
    rows: Int[Array, " samples"],
    columns: Int[Array, " samples"],
) -> Float[Array, " samples"]:
    """Returns sum_t x[t, rows[j]] dy[t, columns[j]]."""
    is_few = rows.shape[0] * GATHER_COST < x.shape[1] * dy.shape[1]
    return (gathered if is_few else tiled)(x, dy, rows, columns)


def gathered(x: Array, dy: Array, rows: Array, columns: Array) -> Array:
    """The same by gathering; costs tokens * samples."""
    dtype = accumulation_dtype(x, dy)
    # Columns lie far apart in memory: transposed, each sample reads two rows.
    left, right = x.T[rows], dy.T[columns]
    return jnp.sum(left.astype(dtype) * right.astype(dtype), axis=1)


def tiled(x: Array, dy: Array, rows: Array, columns: Array) -> Array:
    """The same by tiles of the dense product, each dropped after its samples are read; costs the dense product."""

    def step(found: Array, tile: Array, first: Array) -> Array:
        height = tile.shape[0]
        is_here = (rows >= first) & (rows < first + height)
        return jnp.where(is_here, tile[jnp.clip(rows - first, 0, height - 1), columns], found)

    return scan_tiles(x, dy, step, jnp.zeros(rows.shape, accumulation_dtype(x, dy)))
