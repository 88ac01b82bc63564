"""The largest entries of a product in plain XLA: a pool of the best so far, merged with every tile's best."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxsparse.kernels.merge import Best
from jaxsparse.kernels.threshold import largest
from jaxsparse.kernels.tiles import accumulation_dtype, scan_tiles
from jaxtyping import Array, Float, Int

__all__ = ["GradientTopK", "best_by_xla", "gradient_topk_reference", "magnitude"]


class GradientTopK(NamedTuple):
    """The largest entries of x.T @ dy.

    Attributes:
        rows: their rows, best first, ties to the lowest flat index.
        columns: their columns.
        values: the entries.
        squared_norm: sum of squares of all entries.
    """

    rows: Int[Array, " k"]
    columns: Int[Array, " k"]
    values: Float[Array, " k"]
    squared_norm: Float[Array, ""]


class _Pool(NamedTuple):
    """The best entries so far; `score` is -inf where there is none yet."""

    score: Array
    index: Array
    value: Array
    squared_norm: Array


def magnitude(tile: Float[Array, "rows outputs"], first: Int[Array, ""]) -> Float[Array, "rows outputs"]:
    """The score that is meant unless another is given."""
    return jnp.abs(tile)


def best_by_xla(x: Float[Array, "tokens inputs"], dy: Float[Array, "tokens outputs"], k: int) -> Best:
    """Returns what kernels return who did not find all of the answer."""
    found = gradient_topk_reference(x, dy, k)
    return Best(found.values, found.rows * dy.shape[1] + found.columns)


def gradient_topk_reference(
    x: Float[Array, "tokens inputs"],
    dy: Float[Array, "tokens outputs"],
    k: int,
    score: Callable[[Array, Array], Array] = magnitude,
    summed_over: tuple[str, ...] = (),
) -> GradientTopK:
    """Returns the k entries of x.T @ dy with the largest scores; x.T @ dy is summed over axes of a mesh."""
    inputs, outputs = x.shape[1], dy.shape[1]
    dtype = accumulation_dtype(x, dy)
    flat = jax.eval_shape(score, jax.ShapeDtypeStruct((1, outputs), dtype), jax.ShapeDtypeStruct((), jnp.int32))
    start = _Pool(jnp.full(k, -jnp.inf, flat.dtype), jnp.zeros(k, jnp.int32), jnp.zeros(k, dtype), jnp.zeros((), dtype))

    def merge(pool: _Pool, tile: Array, first: Array) -> _Pool:
        is_row = (first + jnp.arange(tile.shape[0]) < inputs)[:, None]
        tile = jax.lax.psum(tile, summed_over) if summed_over else tile
        # Padding times infinity is no number.
        tile = jnp.where(is_row, tile, 0)
        # Rows that fill up the last tile never win: k entries exist without them.
        scores = jnp.where(is_row, score(tile, first), -jnp.inf).reshape(-1)
        at = largest(scores, min(k, scores.shape[0]))
        best = scores[at]
        _, chosen = jax.lax.top_k(jnp.concatenate([pool.score, best]), k)
        return _Pool(
            jnp.concatenate([pool.score, best])[chosen],
            jnp.concatenate([pool.index, first * outputs + at])[chosen],
            jnp.concatenate([pool.value, tile.reshape(-1)[at]])[chosen],
            pool.squared_norm + jnp.sum(jnp.square(tile)),
        )

    pool = scan_tiles(x, dy, merge, start)
    return GradientTopK(pool.index // outputs, pool.index % outputs, pool.value, pool.squared_norm)
