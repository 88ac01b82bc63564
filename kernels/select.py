"""The largest of many numbers inside a kernel: what both gradient_topk and block_topk choose on chip.

Neither Triton nor Mosaic sorts. The bits of a non-negative float, read as an integer, are in its order: the c-th
largest is found bit by bit, by counting, and what is above it is packed together by a running sum.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["IS_NONE", "magnitude_keys", "places_among_largest"]

IS_NONE = -1
"""Key of an entry that does not exist."""
LARGEST_NUMBER = 0x7F80_0000
"""Key of infinity."""
HALF = 2**15
"""Keys that can be told apart in half of an integer: more than a kernel can hold."""


def magnitude_keys(values: Float[Array, "..."]) -> Int[Array, "..."]:
    """Returns integers in the order of |values|, in float32; all NaN are alike, and larger than any number.

    Args:
        values: numbers of at most 32 bits.

    Example:
        >>> import jax.numpy as jnp
        >>> keys = magnitude_keys(jnp.array([-2.0, 1.0, 0.0, -0.0, jnp.nan, -jnp.inf]))
        >>> keys.argsort().tolist()
        [2, 3, 1, 0, 5, 4]
    """
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    return jnp.minimum(bits & 0x7FFF_FFFF, LARGEST_NUMBER + 1)


def places_among_largest(
    keys: Int[Array, "rows columns"], count: int
) -> tuple[Bool[Array, "rows columns"], Int[Array, "rows columns"]]:
    """Returns which are the largest keys, exactly `count` of them, and where each of these goes if they are packed.

    Ties go to the first. Reads the keys up to 31 times, so that they should be in registers.

    Args:
        keys: of `magnitude_keys`, or `IS_NONE`; fewer than 2**15, in the order of memory.
        count: how many, at most the number of keys.
    """
    assert keys.size < HALF, keys.shape

    def lower_bit(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        bit, threshold, reached = state
        higher = threshold | (jnp.int32(1) << bit)
        found = _count(keys >= higher)
        return bit - 1, jnp.where(found >= count, higher, threshold), jnp.where(found >= count, found, reached)

    # Any threshold that as many reach will do: without ties, that is found in half of the bits.
    start = jnp.int32(30), jnp.int32(0), _count(keys >= 0)
    _, threshold, exist = jax.lax.while_loop(lambda s: (s[0] >= 0) & (s[2] != count), lower_bit, start)
    threshold = jnp.where(exist >= count, threshold, IS_NONE)
    above, equal = keys > threshold, keys == threshold
    # One running sum for both: the keys above count in the upper half of an integer, those equal in the lower. Row by
    # row, it took an H200 a third of the time of one over all keys.
    both = above.astype(jnp.int32) * HALF + equal.astype(jnp.int32)
    rows = jnp.sum(both, axis=1, dtype=jnp.int32)
    sums = (jnp.cumsum(rows, dtype=jnp.int32) - rows)[:, None] + jnp.cumsum(both, axis=1, dtype=jnp.int32)
    all_above, equal_up_to = _count(above), sums % HALF
    chosen = above | (equal & (equal_up_to <= count - all_above))
    return chosen, jnp.where(above, sums // HALF - 1, all_above + equal_up_to - 1)


def _count(mask: Bool[Array, "rows columns"]) -> Int[Array, ""]:
    return jnp.sum(mask, dtype=jnp.int32)
