"""Sampled products in plain XLA: by gathering rows, or tile by tile, whichever costs less."""

import jax
import jax.numpy as jnp
from jaxsparse.kernels.tiles import accumulation_dtype, scan_tiles
from jaxtyping import Array, Float, Int

__all__ = ["gathered", "neurons_gathered", "sampled_matmul_reference", "tiled"]

GATHER_COST = 200
"""One sampled entry costs as much as so many entries of a dense product (CPU, 512 tokens, 576 x 576: 220)."""
NEURON_COST = 25
"""The same for an entry of every output (CPU, 512 tokens, k = 20: 23 to 25 for 576 x 576, 1536 x 576, 576 x 1536)."""


def sampled_matmul_reference(
    x: Float[Array, "tokens inputs"],
    dy: Float[Array, "tokens outputs"],
    rows: Int[Array, "..."],
    columns: Int[Array, "..."] | None = None,
) -> Float[Array, "..."]:
    """Returns sum_t x[t, rows[j]] dy[t, columns[j]]; without columns, rows are (k, outputs), of every output."""
    if columns is None and rows.shape[0] * NEURON_COST < x.shape[1]:
        return neurons_gathered(x, dy, rows)
    if columns is None:
        columns = jnp.broadcast_to(jnp.arange(rows.shape[1], dtype=rows.dtype), rows.shape)
    elif rows.size * GATHER_COST < x.shape[1] * dy.shape[1]:
        return gathered(x, dy, rows, columns)
    return tiled(x, dy, rows, columns)


def gathered(x: Array, dy: Array, rows: Array, columns: Array) -> Array:
    """The same by gathering; costs tokens * samples."""
    dtype = accumulation_dtype(x, dy)
    # Columns lie far apart in memory: transposed, each sample reads two rows.
    left, right = x.T[rows], dy.T[columns]
    return jnp.sum(left.astype(dtype) * right.astype(dtype), axis=-1)


def neurons_gathered(x: Array, dy: Array, rows: Array) -> Array:
    """The same for rows of every output, one of each at a time: never are more than x and dy gathered."""
    dtype = accumulation_dtype(x, dy)
    left, right = x.T, dy.T

    def one_of_each(_: None, rows: Array) -> tuple[None, Array]:
        return None, jnp.sum(left[rows].astype(dtype) * right.astype(dtype), axis=1)

    return jax.lax.scan(one_of_each, None, rows)[1]


def tiled(x: Array, dy: Array, rows: Array, columns: Array) -> Array:
    """The same by tiles of the dense product, each dropped after its samples are read; costs the dense product."""

    def step(found: Array, tile: Array, first: Array) -> Array:
        height = tile.shape[0]
        is_here = (rows >= first) & (rows < first + height)
        return jnp.where(is_here, tile[jnp.clip(rows - first, 0, height - 1), columns], found)

    return scan_tiles(x, dy, step, jnp.zeros(rows.shape, accumulation_dtype(x, dy)))
