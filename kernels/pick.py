"""The k largest of a moderate number of entries, by one program of a GPU, where sorting is slow."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxsparse.kernels.launch import triton_call
from jaxsparse.kernels.select import IS_NONE, magnitude_keys
from jaxtyping import Array, Float, Int

__all__ = ["Best", "by_picking", "by_sorting", "largest_that"]

CHUNK = 8192
"""So many entries are looked at at a time."""


class Best(NamedTuple):
    """Entries that may be among the largest.

    Attributes:
        values: the entries.
        index: where they are, -1 for none.
    """

    values: Float[Array, "..."]
    index: Int[Array, "..."]


def by_sorting(entries: Best, k: int) -> Best:
    """Returns the k entries that are largest in magnitude, best first, ties to the lowest index.

    Args:
        entries: at least k.
        k: how many.
    """
    values, index = entries.values.reshape(-1), entries.index.reshape(-1)
    keys = jnp.where(index >= 0, magnitude_keys(values), IS_NONE)
    _, index, values = jax.lax.sort((-keys, index, values), num_keys=2)
    return Best(values[:k], index[:k])


def by_picking(entries: Best, k: int, *, interpret: bool) -> Best:
    """Returns the k entries that are largest in magnitude, in the order of the entries; ties go to the lowest index.

    Args:
        entries: at least k.
        k: how many.
        interpret: run it as plain JAX.
    """
    values, index = entries.values.reshape(-1), entries.index.reshape(-1)
    return Best(
        *triton_call(
            partial(_kernel, size=index.shape[0], k=k),
            (values, index),
            name="pick",
            grid=(1,),
            results=(((k,), values.dtype), ((k,), index.dtype)),
            interpret=interpret,
            warps=16,
        )
    )


def _kernel(values: Any, index: Any, best_values: Any, best_index: Any, *, size: int, k: int) -> None:
    def chunk(number: Array) -> tuple[Array, Array, Array]:
        place = number * CHUNK + jnp.arange(CHUNK, dtype=jnp.int32)
        inside = jnp.minimum(place, size - 1)
        found, where = values[inside], index[inside]
        is_one = (place < size) & (where >= 0)
        return jnp.where(is_one, magnitude_keys(found), IS_NONE), jnp.where(place < size, where, -1), found

    def count(is_counted: Any) -> Array:
        def add(number: Array, total: Array) -> Array:
            keys, where, _ = chunk(number)
            return total + jnp.sum(is_counted(keys, where).astype(jnp.int32))

        return jax.lax.fori_loop(0, pl.cdiv(size, CHUNK), add, jnp.int32(0))

    # The k-th largest key, and then the highest index with which it is taken.
    key = largest_that(lambda least: count(lambda keys, _: keys >= least) >= k)
    key = jnp.where(count(lambda keys, _: keys >= 0) >= k, key, IS_NONE)
    room = k - count(lambda keys, _: keys > key)
    last = largest_that(lambda most: count(lambda keys, where: (keys == key) & (where < most)) < room)

    def store(number: Array, stored: Array) -> Array:
        keys, where, found = chunk(number)
        chosen = (keys > key) | ((keys == key) & (where <= last))
        place = stored + jnp.cumsum(chosen.astype(jnp.int32)) - 1
        # Of entries that are none there may be more than room.
        chosen = chosen & (place < k)
        place = jnp.where(chosen, place, k)
        plgpu.store(best_values.at[place], found, mask=chosen)
        plgpu.store(best_index.at[place], where, mask=chosen)
        return stored + jnp.sum(chosen.astype(jnp.int32))

    jax.lax.fori_loop(0, pl.cdiv(size, CHUNK), store, jnp.int32(0))


def largest_that(holds: Callable[[Array], Array], shape: tuple[int, ...] = ()) -> Int[Array, "..."]:
    """Returns the largest non-negative integers for which a condition holds that holds for 0 and, from some on, never.

    Args:
        holds: the condition, of integers of this shape, each by itself.
        shape: of the result.
    """

    def lower_bit(number: Array, found: Array) -> Array:
        higher = found | (jnp.int32(1) << (30 - number))
        return jnp.where(holds(higher), higher, found)

    return jax.lax.fori_loop(0, 31, lower_bit, jnp.zeros(shape, jnp.int32))
