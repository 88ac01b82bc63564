"""The k largest of a moderate number of entries in plain XLA, by counting: on a TPU, sorts take minutes to compile."""

import jax.numpy as jnp
from jaxsparse.kernels.pick import Best, largest_that
from jaxsparse.kernels.select import IS_NONE, magnitude_keys
from jaxtyping import Array, Int

__all__ = ["by_counting", "key_of"]


def key_of(entries: Best, k: int) -> Int[Array, ""]:
    """Returns the key of the entry that is k-th in magnitude; `IS_NONE` if there is none."""
    keys = _keys(entries)
    key = largest_that(lambda least: jnp.sum(keys >= least) >= k)
    return jnp.where(jnp.sum(keys >= 0) >= k, key, IS_NONE)


def by_counting(entries: Best, k: int) -> Best:
    """Returns the k entries that are largest in magnitude, in the order of the entries; ties go to the lowest index.

    Args:
        entries: at least k.
        k: how many.
    """
    values, index, keys = entries.values.reshape(-1), entries.index.reshape(-1), _keys(entries)
    key = key_of(entries, k)
    room = k - jnp.sum(keys > key)
    last = largest_that(lambda most: jnp.sum((keys == key) & (index < most)) < room)
    is_chosen = (keys > key) | ((keys == key) & (index <= last))
    place = jnp.searchsorted(jnp.cumsum(is_chosen.astype(jnp.int32)), jnp.arange(1, k + 1, dtype=jnp.int32))
    return Best(values[place], index[place])


def _keys(entries: Best) -> Int[Array, " n"]:
    index = entries.index.reshape(-1)
    return jnp.where(index >= 0, magnitude_keys(entries.values.reshape(-1)), IS_NONE)
