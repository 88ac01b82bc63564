"""The k largest of many numbers without sorting them: the k-th largest is found bit by bit, by counting."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt

__all__ = ["by_threshold", "largest"]


def largest(scores: Float[Array, " n"], k: int) -> Int[Array, " k"]:
    """Returns the places of the k largest scores, in no promised order.

    Ties go to the lowest place, and NaN counts as larger than any number, as in `lax.top_k`.

    Args:
        scores: the scores.
        k: how many, between 1 and n.

    Example:
        >>> import jax.numpy as jnp
        >>> sorted(largest(jnp.array([3.0, 1.0, 3.0, 2.0]), 2).tolist())
        [0, 2]
    """
    # `lax.top_k` is fast on CPU and TPU. XLA on GPU sorts everything for a k above 16.
    return jax.lax.platform_dependent(
        scores, cpu=lambda s: jax.lax.top_k(s, k)[1], tpu=lambda s: jax.lax.top_k(s, k)[1],
        default=lambda s: by_threshold(s, k),
    )  # fmt: skip


def by_threshold(scores: Float[Array, " n"], k: int) -> Int[Array, " k"]:
    """Returns the places of the k largest scores, ascending; reads the scores once for every bit of their dtype."""
    keys = _ordered(scores)
    bits = keys.dtype.itemsize * 8

    def lower_bit(number: Int[Array, ""], threshold: UInt[Array, ""]) -> UInt[Array, ""]:
        higher = threshold | (jnp.ones((), keys.dtype) << (bits - 1 - number).astype(keys.dtype))
        return jnp.where(jnp.sum(keys >= higher) >= k, higher, threshold)

    threshold = jax.lax.fori_loop(0, bits, lower_bit, jnp.zeros((), keys.dtype))
    above, equal = keys > threshold, keys == threshold
    room = k - jnp.sum(above)
    chosen = above | (equal & (jnp.cumsum(equal) <= room))
    slot = jnp.where(chosen, jnp.cumsum(chosen) - 1, k)
    places = jnp.arange(scores.shape[0], dtype=jnp.int32)
    return jnp.zeros(k, jnp.int32).at[slot].set(places, mode="drop", unique_indices=True)


def _ordered(scores: Float[Array, " n"]) -> UInt[Array, " n"]:
    """Unsigned integers in the order of the scores, both zeros alike and NaN last."""
    bits = scores.dtype.itemsize * 8
    unsigned = jnp.dtype(f"uint{bits}")
    positive = jnp.where(jnp.isnan(scores), jnp.array(jnp.nan, scores.dtype), scores + jnp.zeros((), scores.dtype))
    raw = jax.lax.bitcast_convert_type(positive, unsigned)
    sign = jnp.ones((), unsigned) << (bits - 1)
    is_negative = (raw & sign) != 0
    return jnp.where(is_negative & ~jnp.isnan(scores), ~raw, raw | sign)
