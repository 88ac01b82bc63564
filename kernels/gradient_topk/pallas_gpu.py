"""The best of every tile of x.T @ dy, on a GPU: the tile is made in registers, and never leaves them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxsparse.kernels.blocks import dot_over_tokens
from jaxsparse.kernels.gradient_topk.reference import GradientTopK, best_by_xla, gradient_topk_reference
from jaxsparse.kernels.launch import triton_call
from jaxsparse.kernels.merge import Best, candidates_of_tile, largest_of_tiles
from jaxsparse.kernels.select import IS_NONE, magnitude_keys, places_among_largest
from jaxtyping import Array, Float, Int

__all__ = ["Tiling", "best_of_tiles", "gradient_topk_gpu", "tiling"]


FEWEST = 64
"""So many candidates of a tile at least. Gradients pile up: of SmolLM2's (q, k, v, o; 256 tokens) no tile of 64 x 64
held more of the best at densities up to 1e-3, where most matrices had one that held more than 16."""


MOST = 1 / 16
"""So much of a tile at most is written as its candidates: more is found by XLA, a band of the product at a time."""


@dataclass(frozen=True)
class Tiling:
    """How the product is cut.

    Attributes:
        rows: of a tile.
        columns: of a tile.
        tokens: read at a time.
        warps: of a program.
        stages: how deeply reading is pipelined.
    """

    rows: int
    columns: int
    tokens: int
    warps: int
    stages: int


def tiling(x: Any, dy: Any) -> Tiling:
    """Returns the tiling for arrays like these: what was fastest on an H200, without register spills."""
    if jnp.promote_types(x.dtype, dy.dtype).itemsize > 2:
        return Tiling(64, 64, 32, warps=4, stages=2)
    return Tiling(64, 64, 64, warps=4, stages=4)


def gradient_topk_gpu(
    x: Float[Array, "tokens inputs"],
    dy: Float[Array, "tokens outputs"],
    *,
    k: int,
    interpret: bool,
    cut: Tiling | None = None,
    count: int | None = None,
) -> GradientTopK:
    """Returns the k entries of x.T @ dy with the largest magnitudes.

    Args:
        x: activations.
        dy: cotangents of the outputs.
        k: how many.
        interpret: run it as plain JAX.
        cut: how the product is cut; None: `tiling`.
        count: candidates of a tile, a power of 2; None: `candidates_of_tile`.
    """
    cut = cut or tiling(x, dy)
    outputs, size = dy.shape[1], cut.rows * cut.columns
    tiles = pl.cdiv(x.shape[1], cut.rows) * pl.cdiv(outputs, cut.columns)
    if count is None:
        count = candidates_of_tile(k, tiles, size, FEWEST)
        if count > MOST * size:
            return gradient_topk_reference(x, dy, k)

    def best_of(tiles: Array, count: int) -> tuple[Best, Array]:
        values, index, energy = best_of_tiles(x, dy, tiles, count, cut, interpret=interpret)
        return Best(values, index), energy

    candidates, energy = best_of(jnp.arange(tiles, dtype=jnp.int32), count)
    best = largest_of_tiles(
        candidates, lambda tiles, count: best_of(tiles, count)[0], partial(best_by_xla, x, dy, k), size=size, k=k
    )
    return GradientTopK(best.index // outputs, best.index % outputs, best.values, jnp.sum(energy))


def best_of_tiles(
    x: Float[Array, "tokens inputs"],
    dy: Float[Array, "tokens outputs"],
    tiles: Int[Array, " n"],
    count: int,
    cut: Tiling,
    *,
    interpret: bool,
) -> tuple[Float[Array, "n count"], Int[Array, "n count"], Float[Array, " n"]]:
    """Returns the entries of some tiles that are largest in magnitude.

    Args:
        x: activations.
        dy: cotangents of the outputs.
        tiles: numbers of tiles, counted along the outputs first; what lies beyond the last has no entries.
        count: how many of each; a power of 2, at most a tile's size.
        cut: how the product is cut.
        interpret: run it as plain JAX.

    Returns:
        Values, flat indices in the product, -1 for entries that do not exist, and sums of squares of the tiles.
    """
    n = tiles.shape[0]
    values, index, energy = triton_call(
        partial(_kernel, count=count, cut=cut, sizes=(x.shape[0], x.shape[1], dy.shape[1])),
        (x, dy, tiles),
        name="gradient_topk",
        grid=(n,),
        results=(((n, count), jnp.float32), ((n, count), jnp.int32), ((n,), jnp.float32)),
        interpret=interpret,
        warps=cut.warps,
        stages=cut.stages,
    )
    return values, index, energy


def _kernel(
    x: Any,
    dy: Any,
    tiles: Any,
    values: Any,
    index: Any,
    energy: Any,
    *,
    count: int,
    cut: Tiling,
    sizes: tuple[int, ...],
) -> None:
    tokens, inputs, outputs = sizes
    program = pl.program_id(0)
    across = pl.cdiv(outputs, cut.columns)
    last = pl.cdiv(inputs, cut.rows) * across - 1
    # A tile beyond the last reads the last, and nothing beyond the arrays: all of it is masked.
    is_tile, tile = tiles[program] <= last, jnp.minimum(tiles[program], last)
    row = tile // across * cut.rows + jnp.arange(cut.rows, dtype=jnp.int32)
    column = tile % across * cut.columns + jnp.arange(cut.columns, dtype=jnp.int32)
    token = jnp.arange(cut.tokens, dtype=jnp.int32)

    def add(step: Array, total: Array) -> Array:
        now = step * cut.tokens + token
        left = _read(x, now, row, tokens, inputs)
        right = _read(dy, now, column, tokens, outputs)
        return total + dot_over_tokens(left, right)

    steps = pl.cdiv(tokens, cut.tokens)
    product = jax.lax.fori_loop(0, steps, add, jnp.zeros((cut.rows, cut.columns), jnp.float32))
    exists = is_tile & (row < inputs)[:, None] & (column < outputs)[None, :]
    # What is beyond the product is made of other entries, or of zeros.
    product = jnp.where(exists, product, 0)
    keys = jnp.where(exists, magnitude_keys(product), IS_NONE)
    chosen, place = places_among_largest(keys, count)
    flat = jnp.where(exists, row[:, None] * outputs + column[None, :], -1)
    # Lanes that are idle must not share a place with one that is not: see tests/kernels/test_traps.py.
    place = jnp.where(chosen, place, count)
    plgpu.store(values.at[program, place], product, mask=chosen)
    plgpu.store(index.at[program, place], flat, mask=chosen)
    energy[program] = jnp.sum(product * product)


def _read(array: Any, tokens: Array, features: Array, size: int, width: int) -> Array:
    """A block of an array, 0 where it ends."""
    # A block that may end beyond the array is read again from its start: only what is beyond in tokens must be 0.
    inside = features if width % features.shape[0] == 0 else features % width
    if size % tokens.shape[0] == 0:
        return array[tokens[:, None], inside[None, :]]
    is_token = (tokens < size)[:, None] & jnp.ones(features.shape, bool)[None, :]
    return plgpu.load(array.at[tokens[:, None], inside[None, :]], mask=is_token, other=0.0)
