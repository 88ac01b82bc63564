"""The k largest of many numbers from the few largest of every tile: exact, and told apart where a tile had more."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxsparse.kernels.blocks import power_of_2
from jaxsparse.kernels.select import IS_NONE, magnitude_keys
from jaxtyping import Array, Bool, Float, Int

__all__ = ["Best", "by_sorting", "candidates_of_tile", "keys_of", "largest_of_tiles"]


class Best(NamedTuple):
    """Entries that may be among the largest.

    Attributes:
        values: the entries.
        index: where they are, -1 for none.
    """

    values: Float[Array, "..."]
    index: Int[Array, "..."]


def candidates_of_tile(k: int, tiles: int, size: int, fewest: int = 16) -> int:
    """Returns how many candidates of a tile are written: four times its share of the answer, a power of 2.

    Args:
        k: entries of the answer.
        tiles: how many.
        size: entries of a tile, a power of 2.
        fewest: so many at least, a power of 2: where the answer lies is uneven.
    """
    share = -(-k // tiles)
    return min(size, max(fewest, power_of_2(4 * share)))


MORE = 8
"""So many times as many candidates are taken of a tile that is looked at a second time."""


def largest_of_tiles(
    candidates: Best,
    best_of: Callable[[Int[Array, " n"], int], Best],
    otherwise: Callable[[], Best],
    *,
    size: int,
    k: int,
    choose: Callable[[Best, int], Best] | None = None,
) -> Best:
    """Returns the k largest entries in magnitude, best first, ties to the lowest index.

    A tile may hold more of the answer than its candidates. It does only if all of these are in the answer, so that at
    most k // count tiles can: they are looked at a second time, for 8 times as many, which are at most 8 k. Where even
    that is too few, the answer is found otherwise.

    Args:
        candidates: the largest entries of every tile, (tiles, count); ties went to the lowest index.
        best_of: from numbers of tiles and a count to the like of some tiles; to none for tiles beyond the last.
        otherwise: the answer by another way, which may take longer.
        size: entries of a tile, a power of 2.
        k: how many entries.
        choose: the best of some entries, in any order; None: by sorting all of them.
    """
    choose, in_order = (by_sorting, lambda best: best) if choose is None else (choose, partial(by_sorting, k=k))
    tiles, count = candidates.index.shape
    first = choose(_at_least(k, candidates), k)
    again = min(tiles, k // count)
    if count == size or again == 0:
        return in_order(first)
    has_more = _all_chosen(candidates, first)

    def second() -> Best:
        numbers = jnp.nonzero(has_more, size=again, fill_value=tiles)[0].astype(jnp.int32)
        more = best_of(numbers, min(size, MORE * count))
        kept = candidates._replace(index=jnp.where(has_more[:, None], IS_NONE, candidates.index))
        both = (jnp.concatenate([a.reshape(-1), b.reshape(-1)]) for a, b in zip(kept, more, strict=True))
        found = choose(_at_least(k, Best(*both)), k)
        if MORE * count >= size:
            return found
        return jax.lax.cond(jnp.any(_all_chosen(more, found)), otherwise, lambda: found)

    return in_order(jax.lax.cond(jnp.any(has_more), second, lambda: first))


def by_sorting(entries: Best, k: int) -> Best:
    """Returns the k entries that are largest in magnitude, best first, ties to the lowest index.

    Candidates are few: to sort them took less time on a GPU than any other way tried.

    Args:
        entries: at least k.
        k: how many.
    """
    values, index = entries.values.reshape(-1), entries.index.reshape(-1)
    _, index, values = jax.lax.sort((-keys_of(entries).reshape(-1), index, values), num_keys=2)
    return Best(values[:k], index[:k])


def keys_of(entries: Best) -> Int[Array, "..."]:
    """Returns integers in the order of the entries' magnitudes; `IS_NONE` for none."""
    return jnp.where(entries.index >= 0, magnitude_keys(entries.values), IS_NONE)


def _at_least(k: int, entries: Best) -> Best:
    """The entries in a row, with as many that are none as k of them take."""
    values, index = entries.values.reshape(-1), entries.index.reshape(-1)
    missing = max(0, k - index.shape[0])
    return Best(jnp.pad(values, (0, missing)), jnp.pad(index, (0, missing), constant_values=IS_NONE))


def _all_chosen(candidates: Best, chosen: Best) -> Bool[Array, " tiles"]:
    """Tiles of which every candidate was chosen, and that may have had more."""
    keys, chosen_keys = keys_of(candidates), keys_of(chosen)
    last = jnp.min(chosen_keys)
    last_index = jnp.max(jnp.where(chosen_keys == last, chosen.index, IS_NONE))
    is_chosen = (keys > last) | ((keys == last) & (candidates.index <= last_index))
    return jnp.all(is_chosen & (candidates.index >= 0), axis=-1)
