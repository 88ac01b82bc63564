"""The best of every tile of x.T @ dy, on a TPU: the tile is summed up in VMEM, and never leaves it."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxsparse.kernels.blocks import dot_over_tokens
from jaxsparse.kernels.count import by_counting, key_of
from jaxsparse.kernels.gradient_topk.reference import GradientTopK, best_by_xla, gradient_topk_reference
from jaxsparse.kernels.launch import mosaic_call
from jaxsparse.kernels.merge import Best, candidates_of_tile, largest_of_tiles
from jaxsparse.kernels.select import IS_NONE, magnitude_keys
from jaxtyping import Array, Float, Int

__all__ = ["Tiling", "best_of_tiles", "gradient_topk_tpu"]

MOST = 256
"""So many candidates of a tile at most: each takes a look at the whole tile."""


@dataclass(frozen=True)
class Tiling:
    """How the product is cut; powers of 2, of at least 128 on a TPU.

    Attributes:
        rows: of a tile.
        columns: of a tile.
        tokens: read at a time.
    """

    rows: int = 256
    columns: int = 256
    tokens: int = 512


def gradient_topk_tpu(
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
        cut: how the product is cut.
        count: candidates of a tile, a power of 2; None: `candidates_of_tile`.
    """
    cut = cut or Tiling()
    outputs, size = dy.shape[1], cut.rows * cut.columns
    tiles = pl.cdiv(x.shape[1], cut.rows) * pl.cdiv(outputs, cut.columns)
    count = count or candidates_of_tile(k, tiles, size)
    if count > MOST:
        return gradient_topk_reference(x, dy, k)
    best_of = partial(best_of_tiles, x, dy, cut=cut, interpret=interpret)
    values, index, energy = best_of(jnp.arange(tiles, dtype=jnp.int32), count, jnp.int32(0))
    candidates = Best(values, index)

    def again(tiles: Array, count: int) -> Best:
        # What is smaller than the k-th candidate is not in the answer.
        return Best(*best_of(tiles, count, jnp.maximum(key_of(candidates, k), 0))[:2])

    best = largest_of_tiles(candidates, again, partial(best_by_xla, x, dy, k), size=size, k=k, choose=by_counting)
    return GradientTopK(best.index // outputs, best.index % outputs, best.values, jnp.sum(energy))


def best_of_tiles(
    x: Float[Array, "tokens inputs"],
    dy: Float[Array, "tokens outputs"],
    tiles: Int[Array, " n"],
    count: int,
    least: Int[Array, ""],
    *,
    cut: Tiling,
    interpret: bool,
) -> tuple[Float[Array, "n count"], Int[Array, "n count"], Float[Array, " n"]]:
    """Returns the entries of some tiles that are largest in magnitude, best first.

    Args:
        x: activations.
        dy: cotangents of the outputs.
        tiles: numbers of tiles, counted along the outputs first; what lies beyond the last has no entries.
        count: how many of each; each takes a look at the whole tile.
        least: entries with smaller keys may be left out.
        cut: how the product is cut.
        interpret: run it as plain JAX.

    Returns:
        Values, flat indices in the product, -1 for none, and sums of squares of the tiles.
    """
    n, tokens, inputs, outputs = tiles.shape[0], *x.shape, dy.shape[1]
    down, across = pl.cdiv(inputs, cut.rows), pl.cdiv(outputs, cut.columns)

    def left(program: Any, step: Any, tiles: Any, least: Any) -> tuple[Any, Any]:
        # A tile beyond the last reads the last: all of it is masked.
        return step, jnp.minimum(tiles[program] // across, down - 1)

    def right(program: Any, step: Any, tiles: Any, least: Any) -> tuple[Any, Any]:
        return step, tiles[program] % across

    # A block takes in whole axes, or multiples of what a register holds: hence the axis of 1.
    def result(width: int, dtype: Any) -> Any:
        return (n, 1, width), dtype, pl.BlockSpec((None, 1, width), lambda program, *_: (program, 0, 0))

    values, index, energy = mosaic_call(
        partial(_kernel, cut=cut, sizes=(tokens, inputs, outputs)),
        (tiles, least.reshape(1), x, dy),
        name="gradient_topk",
        grid=(n, pl.cdiv(tokens, cut.tokens)),
        blocks=[pl.BlockSpec((cut.tokens, cut.rows), left), pl.BlockSpec((cut.tokens, cut.columns), right)],
        results=[result(count, jnp.float32), result(count, jnp.int32), result(1, jnp.float32)],
        scratch=[pltpu.VMEM((cut.rows, cut.columns), dtype) for dtype in (jnp.float32, jnp.int32)],
        interpret=interpret,
    )
    return values[:, 0], index[:, 0], energy[:, 0, 0]


def _kernel(
    tiles: Any,
    least: Any,
    x: Any,
    dy: Any,
    values: Any,
    index: Any,
    energy: Any,
    product: Any,
    keys: Any,
    *,
    cut: Tiling,
    sizes: tuple[int, ...],
) -> None:
    tokens, inputs, outputs = sizes
    tile, across = tiles[pl.program_id(0)], pl.cdiv(outputs, cut.columns)
    step, steps = pl.program_id(1), pl.cdiv(tokens, cut.tokens)

    @pl.when(step == 0)
    def _() -> None:
        product[...] = jnp.zeros(product.shape, product.dtype)

    left, right = (_up_to(tokens - step * cut.tokens, block[...], tokens % cut.tokens) for block in (x, dy))
    product[...] += dot_over_tokens(left, right)

    @pl.when(step == steps - 1)
    def _() -> None:
        shape = (cut.rows, cut.columns)
        row = tile // across * cut.rows + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        column = tile % across * cut.columns + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        exists = (row < inputs) & (column < outputs)
        # What is beyond the product is made of whatever lies there.
        product[...] = jnp.where(exists, product[...], 0)
        keys[...] = jnp.where(exists, magnitude_keys(product[...]), IS_NONE)
        energy[...] = jnp.sum(product[...] * product[...], axis=(0, 1), keepdims=True)
        _store_best(product, keys, row * outputs + column, least[0], values, index)


def _store_best(product: Any, keys: Any, flat: Array, least: Array, values: Any, index: Any) -> None:
    """Stores the entries with the largest keys, best first; what is taken loses its key."""
    slot = jax.lax.broadcasted_iota(jnp.int32, values.shape, 1)
    values[...] = jnp.zeros(values.shape, values.dtype)
    index[...] = jnp.full(index.shape, -1, index.dtype)

    def store(state: tuple[Array, Array]) -> tuple[Array, Array]:
        number, key = state
        place = jnp.min(jnp.where(keys[...] == key, flat, jnp.iinfo(jnp.int32).max))
        taken = flat == place
        values[...] = jnp.where(slot == number, jnp.sum(jnp.where(taken, product[...], 0)), values[...])
        index[...] = jnp.where(slot == number, place, index[...])
        keys[...] = jnp.where(taken, IS_NONE, keys[...])
        return number + 1, jnp.max(keys[...])

    def is_next(state: tuple[Array, Array]) -> Array:
        number, key = state
        return (number < values.shape[1]) & (key >= least)

    jax.lax.while_loop(is_next, store, (jnp.int32(0), jnp.max(keys[...])))


def _up_to(size: Array, block: Array, rest: int) -> Array:
    """A block, 0 where the array ends; `rest`: of the last block."""
    if rest == 0:
        return block
    return jnp.where(jax.lax.broadcasted_iota(jnp.int32, block.shape, 0) < size, block, jnp.zeros_like(block))
