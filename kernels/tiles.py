"""A product of two matrices, tile by tile."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxsparse.kernels.launch import alike
from jaxtyping import Array, Float, Int

__all__ = ["accumulation_dtype", "scan_start", "scan_tiles"]

TILES = 4
"""So many tiles at least: a tile stays well below the size of the product."""
TILE_ENTRIES = 2**22
"""So many entries at most in a tile."""


def accumulation_dtype(*arrays: Any) -> jnp.dtype:
    """Returns the dtype in which products of arrays are summed: at least float32."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def scan_start(start: Any, *arrays: Array) -> Any:
    """Returns what a scan over arrays starts from: inside `shard_map`, it must vary as the arrays do.

    Args:
        start: arrays, zeros for example.
        arrays: all that the scan reads.
    """
    leaves, structure = jax.tree.flatten(start)
    return jax.tree.unflatten(structure, alike((*leaves, *arrays))[0][: len(leaves)])


def scan_tiles(
    x: Float[Array, "tokens inputs"],
    dy: Float[Array, "tokens outputs"],
    step: Callable[[Any, Float[Array, "rows outputs"], Int[Array, ""]], Any],
    start: Any,
) -> Any:
    """Folds over tiles of x.T @ dy, each a band of its rows, of which one exists at a time.

    Args:
        x: activations.
        dy: cotangents of the outputs.
        step: (carry, tile, first row) -> carry. Rows of the last tile may lie beyond the product's; they hold 0.
        start: the first carry.

    Returns:
        The last carry.
    """
    inputs, outputs = x.shape[1], dy.shape[1]
    count = min(inputs, max(TILES, math.ceil(inputs * outputs / TILE_ENTRIES)))
    height = math.ceil(inputs / count)
    count = math.ceil(inputs / height)
    dtype = accumulation_dtype(x, dy)
    padded = jnp.pad(x, ((0, 0), (0, count * height - inputs)))

    def body(carry: Any, number: Array) -> tuple[Any, None]:
        band = jax.lax.dynamic_slice_in_dim(padded, number * height, height, axis=1)
        tile = jax.lax.dot_general(band, dy, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        return step(carry, tile, number * height), None

    return jax.lax.scan(body, scan_start(start, x, dy), jnp.arange(count, dtype=jnp.int32))[0]
