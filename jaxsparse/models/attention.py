"""Attention inside rows, and against a cache of keys and values."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = [
    "Attend",
    "Cache",
    "attend_cached",
    "attend_in_turns",
    "attend_rows",
    "empty_cache",
    "split_heads",
    "visible",
]

Store: TypeAlias = tuple[Array, Array] | None
"""Keys and values of all layers, (layers, batch, slots, kv_heads, head_dim) each; None in training."""

Attend: TypeAlias = Callable[[Array, Array, Array], tuple[Array, Store]]
"""What a block is given: from query, key and value to the mixed heads and the store as it is then."""


class Cache(NamedTuple):
    """Keys and values of the tokens seen so far, of static shape.

    Attributes:
        keys: of all layers.
        values: of all layers.
        positions: position of each slot's token in its sequence; -1 where there is padding or nothing yet.
        used: number of slots written; the same for all rows.
    """

    keys: Float[Array, "layers batch slots kv_heads head_dim"]
    values: Float[Array, "layers batch slots kv_heads head_dim"]
    positions: Int[Array, "batch slots"]
    used: Int[Array, ""]


def empty_cache(
    layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: jax.typing.DTypeLike
) -> Cache:
    """Returns a cache with nothing in it.

    Args:
        layers: number of layers.
        batch: number of rows.
        slots: number of tokens that fit, padding included.
        kv_heads: key and value heads of a layer.
        head_dim: width of a head.
        dtype: of the keys and values.

    Returns:
        The cache.
    """
    shape = (layers, batch, slots, kv_heads, head_dim)
    positions = jnp.full((batch, slots), -1, jnp.int32)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), positions, jnp.zeros((), jnp.int32))


def split_heads(flat: Float[Array, "batch length width"], heads: int) -> Float[Array, "batch length heads head_dim"]:
    """Splits the last axis into heads."""
    return flat.reshape(*flat.shape[:-1], heads, -1)


def attend_rows(
    store: None,
    layer: Int[Array, ""],
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    *,
    segments: Int[Array, "batch length"] | None,
    window: int | None,
) -> tuple[Float[Array, "batch length heads head_dim"], None]:
    """Causal attention inside each row, and inside each segment of a packed row.

    Args:
        store: None, there is no cache.
        layer: number of the layer, unused.
        query: queries, rotated already.
        key: keys, rotated already.
        value: values.
        segments: tokens see only tokens of their own number; None: the row is one segment.
        window: a token sees itself and window - 1 tokens before it; None: all.

    Returns:
        The mixed values, and None.
    """
    mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]
    mixed = jax.nn.dot_product_attention(
        query,
        key,
        value,
        mask=mask,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
    )
    return mixed, store


def attend_in_turns(
    store: None,
    layer: Int[Array, ""],
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    *,
    segments: Int[Array, "batch length"] | None,
    window: int | None,
    row_parts: int = 1,
) -> tuple[Float[Array, "batch length heads head_dim"], None]:
    """As `attend_rows`, a row at a time: the scores of one row exist, forward and (computed again) backward.

    Where devices share the rows, each takes one of its own at a time: a loop over rows of which each lies on one
    device would have all devices do all of them.

    Args:
        store: None, there is no cache.
        layer: number of the layer, unused.
        query: queries, rotated already.
        key: keys, rotated already.
        value: values.
        segments: as in `attend_rows`.
        window: as in `attend_rows`.
        row_parts: into how many equal parts, one after the other, devices share the rows.

    Returns:
        The mixed values, and None.
    """
    batch = query.shape[0]
    parts = row_parts if batch % row_parts == 0 else 1

    def attend(rows: tuple[Array, Array, Array, Array | None]) -> Array:
        *arrays, segments = rows
        return attend_rows(None, layer, *arrays, segments=segments, window=window)[0]

    def deal(array: Array) -> Array:
        return array.reshape(parts, batch // parts, *array.shape[1:]).swapaxes(0, 1)

    dealt = jax.tree.map(deal, (query, key, value, segments))
    mixed = jax.lax.map(jax.checkpoint(attend, prevent_cse=False), dealt)
    return mixed.swapaxes(0, 1).reshape(query.shape), store


def visible(
    query_positions: Int[Array, "batch length"], key_positions: Int[Array, "batch slots"], window: int | None
) -> Bool[Array, "batch 1 length slots"]:
    """Returns which slots of a cache each query sees.

    Args:
        query_positions: position of every query in its sequence.
        key_positions: position of every slot in its sequence, -1 where it holds none.
        window: a token sees itself and window - 1 tokens before it; None: all.

    Returns:
        The mask, True where a slot is seen.

    Example:
        >>> import jax.numpy as jnp
        >>> visible(jnp.array([[2]]), jnp.array([[-1, 0, 1, 2, 3]]), window=2)[0, 0].tolist()
        [[False, False, True, True, False]]
    """
    query, key = query_positions[:, None, :, None], key_positions[:, None, None, :]
    seen = (key >= 0) & (key <= query)
    return seen if window is None else seen & (key > query - window)


def attend_cached(
    store: tuple[Array, Array],
    layer: Int[Array, ""],
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    *,
    mask: Bool[Array, "batch 1 length slots"],
    slot: Int[Array, ""],
) -> tuple[Float[Array, "batch length heads head_dim"], tuple[Array, Array]]:
    """Writes the new keys and values into the cache, then attends to all of the layer's slots.

    Args:
        store: keys and values of all layers.
        layer: number of the layer.
        query: queries, rotated already.
        key: new keys, rotated already.
        value: new values.
        mask: from `visible`.
        slot: where the first new token goes.

    Returns:
        The mixed values, and the store with the new entries.
    """

    def written(all_layers: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_slice(all_layers, new[None], (layer, 0, slot, 0, 0))

    keys, values = written(store[0], key), written(store[1], value)
    layer_keys, layer_values = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (keys, values))
    return jax.nn.dot_product_attention(query, layer_keys, layer_values, mask=mask), (keys, values)
