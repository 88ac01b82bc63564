"""The largest entries on a GPU: the best of every block are chosen on chip, and merged."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxsparse.kernels.block_topk.reference import TopK, block_topk_reference
from jaxsparse.kernels.launch import triton_call
from jaxsparse.kernels.merge import Best, candidates_of_tile, largest_of_tiles
from jaxsparse.kernels.select import IS_NONE, magnitude_keys, places_among_largest
from jaxtyping import Array, Float, Int

__all__ = ["Blocks", "Columns", "best_of_blocks", "block_topk_gpu", "column_topk_gpu"]


WIDTH = 64
"""Entries of a block are held in rows of so many."""


@dataclass(frozen=True)
class Blocks:
    """How an array is cut.

    Attributes:
        size: entries of a block; a power of 2, at least `WIDTH`.
        warps: of a program.
    """

    size: int = 2048
    warps: int = 4


@dataclass(frozen=True)
class Columns:
    """How a matrix is cut whose columns are looked at each by itself.

    Attributes:
        rows: read at a time; a power of 2.
        columns: of a program; a power of 2.
        warps: of a program.
    """

    rows: int = 512
    columns: int = 8
    warps: int = 8


def block_topk_gpu(
    a: Float[Array, " n"], *, k: int, interpret: bool, cut: Blocks | None = None, count: int | None = None
) -> TopK:
    """Returns the k entries of `a` that are largest in magnitude.

    Args:
        a: the array, flat.
        k: how many.
        interpret: run it as plain JAX.
        cut: how it is cut.
        count: candidates of a block, a power of 2; None: `candidates_of_tile`.
    """
    cut = cut or Blocks()
    blocks = pl.cdiv(a.shape[0], cut.size)
    count = count or candidates_of_tile(k, blocks, cut.size)
    best_of = partial(best_of_blocks, a, cut=cut, interpret=interpret)
    candidates = best_of(jnp.arange(blocks, dtype=jnp.int32), count)

    def otherwise() -> Best:
        return Best(*block_topk_reference(a, k=k))

    best = largest_of_tiles(candidates, best_of, otherwise, size=cut.size, k=k)
    return TopK(best.values, best.index)


def best_of_blocks(
    a: Float[Array, " n"], blocks: Int[Array, " m"], count: int, *, cut: Blocks, interpret: bool
) -> Best:
    """Returns the entries of some blocks that are largest in magnitude, (m, count); index -1 where there is none.

    Args:
        a: the array, flat.
        blocks: their numbers; what lies beyond the last has no entries.
        count: how many of each; a power of 2, at most a block's size.
        cut: how it is cut.
        interpret: run it as plain JAX.
    """
    shape = (blocks.shape[0], count)
    return Best(
        *triton_call(
            partial(_best_of_block, count=count, size=a.shape[0], cut=cut),
            (a, blocks),
            name="block_topk",
            grid=(blocks.shape[0],),
            results=((shape, a.dtype), (shape, jnp.int32)),
            interpret=interpret,
            warps=cut.warps,
        )
    )


def _best_of_block(a: Any, blocks: Any, values: Any, index: Any, *, count: int, size: int, cut: Blocks) -> None:
    program = pl.program_id(0)
    lanes = (
        jnp.arange(cut.size // WIDTH, dtype=jnp.int32)[:, None] * WIDTH + jnp.arange(WIDTH, dtype=jnp.int32)[None, :]
    )
    place = blocks[program] * cut.size + lanes
    exists = place < size
    found = plgpu.load(a.at[place], mask=exists, other=0)
    chosen, slot = places_among_largest(jnp.where(exists, magnitude_keys(found), IS_NONE), count)
    # Idle lanes must not share a place with one that is not.
    slot = jnp.where(chosen, slot, count)
    plgpu.store(values.at[program, slot], found, mask=chosen)
    plgpu.store(index.at[program, slot], jnp.where(exists, place, -1), mask=chosen)


def column_topk_gpu(a: Float[Array, "rows columns"], *, k: int, interpret: bool, cut: Columns | None = None) -> TopK:
    """Returns the k entries of every column that are largest in magnitude, (k, columns).

    Args:
        a: the matrix.
        k: how many of every column.
        interpret: run it as plain JAX.
        cut: how it is cut.
    """
    cut, (rows, columns) = cut or Columns(), a.shape
    values, index = triton_call(
        partial(_best_of_columns, k=k, rows=rows, columns=columns, cut=cut),
        (a,),
        name="column_topk",
        grid=(pl.cdiv(columns, cut.columns),),
        results=(((k, columns), a.dtype), ((k, columns), jnp.int32)),
        interpret=interpret,
        warps=cut.warps,
    )
    # Best first, ties to the lowest index.
    _, index, values = jax.lax.sort((-magnitude_keys(values), index, values), num_keys=2, dimension=0)
    return TopK(values, index)


def _best_of_columns(a: Any, values: Any, index: Any, *, k: int, rows: int, columns: int, cut: Columns) -> None:
    column = pl.program_id(0) * cut.columns + jnp.arange(cut.columns, dtype=jnp.int32)
    steps = pl.cdiv(rows, cut.rows)

    def block(number: Array) -> tuple[Array, Array, Array]:
        row = number * cut.rows + jnp.arange(cut.rows, dtype=jnp.int32)
        exists = (row < rows)[:, None] & (column < columns)[None, :]
        found = plgpu.load(a.at[row[:, None], column[None, :]], mask=exists, other=0)
        return jnp.where(exists, magnitude_keys(found), IS_NONE), found, row[:, None] + jnp.zeros_like(column)[None, :]

    def count(threshold: Array) -> Array:
        def add(number: Array, total: Array) -> Array:
            return total + jnp.sum(block(number)[0] >= threshold[None, :], axis=0, dtype=jnp.int32)

        return jax.lax.fori_loop(0, steps, add, jnp.zeros(cut.columns, jnp.int32))

    def lower_bit(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        bit, threshold, reached = state
        higher = threshold | (jnp.int32(1) << bit)
        found = count(higher)
        return bit - 1, jnp.where(found >= k, higher, threshold), jnp.where(found >= k, found, reached)

    def is_open(state: tuple[Array, Array, Array]) -> Array:
        # Any threshold that k reach will do; columns beyond the last have none.
        return (state[0] >= 0) & (jnp.sum((state[2] != k) & (column < columns), dtype=jnp.int32) > 0)

    start = jnp.int32(30), jnp.zeros(cut.columns, jnp.int32), jnp.full(cut.columns, rows, jnp.int32)
    _, threshold, _ = jax.lax.while_loop(is_open, lower_bit, start)
    room = k - count(threshold + 1)

    def store(number: Array, seen: tuple[Array, Array]) -> tuple[Array, Array]:
        stored, equal_before = seen
        keys, found, row = block(number)
        equal = keys == threshold[None, :]
        equal_up_to = equal_before[None, :] + jnp.cumsum(equal, axis=0, dtype=jnp.int32)
        chosen = (keys > threshold[None, :]) | (equal & (equal_up_to <= room[None, :]))
        slot = jnp.where(chosen, stored[None, :] + jnp.cumsum(chosen, axis=0, dtype=jnp.int32) - 1, k)
        at = slot, jnp.zeros_like(slot) + column[None, :]
        plgpu.store(values.at[at], found, mask=chosen)
        plgpu.store(index.at[at], row, mask=chosen)
        now = jnp.sum(chosen, axis=0, dtype=jnp.int32), jnp.sum(equal, axis=0, dtype=jnp.int32)
        return stored + now[0], equal_before + now[1]

    jax.lax.fori_loop(0, steps, store, (jnp.zeros(cut.columns, jnp.int32),) * 2)
