"""The k largest of a moderate number of entries in plain XLA, by counting: on a TPU, sorts take minutes to compile."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxsparse.kernels.merge import Best, keys_of
from jaxsparse.kernels.select import IS_NONE
from jaxtyping import Array, Int

__all__ = ["by_counting", "key_of"]


def key_of(entries: Best, k: int) -> Int[Array, ""]:
    """Returns the key of the entry that is k-th in magnitude; `IS_NONE` if there is none."""
    keys = keys_of(entries).reshape(-1)
    key = _largest_that(lambda least: jnp.sum(keys >= least) >= k)
    return jnp.where(jnp.sum(keys >= 0) >= k, key, IS_NONE)


def by_counting(entries: Best, k: int) -> Best:
    """Returns the k entries that are largest in magnitude, in the order of the entries; ties go to the lowest index.

    Args:
        entries: at least k. Where fewer than k exist, the answer is none in particular.
        k: how many.
    """
    values, index, keys = (part.reshape(-1) for part in (*entries, keys_of(entries)))
    key = key_of(entries, k)
    room = k - jnp.sum(keys > key)
    last = _largest_that(lambda most: jnp.sum((keys == key) & (index < most)) < room)
    is_chosen = (keys > key) | ((keys == key) & (index <= last))
    place = jnp.searchsorted(jnp.cumsum(is_chosen.astype(jnp.int32)), jnp.arange(1, k + 1, dtype=jnp.int32))
    return Best(values[place], index[place])


def _largest_that(holds: Callable[[Array], Array]) -> Int[Array, ""]:
    """The largest non-negative integer for which a condition holds that holds for 0 and, from some on, never."""

    def lower_bit(number: Array, found: Array) -> Array:
        higher = found | (jnp.int32(1) << (30 - number))
        return jnp.where(holds(higher), higher, found)

    return jax.lax.fori_loop(0, 31, lower_bit, jnp.int32(0))
