"""What kernels for GPUs share: sizes of blocks, places that exist, and sums of chosen rows."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

__all__ = ["chosen_sums", "fits_kernels", "inside", "power_of_2"]

UPPER_HALF = -0x1_0000
"""The bits of a float32 that a bfloat16 has."""


def power_of_2(number: int) -> int:
    """Returns the smallest power of 2 that is at least `number`: Triton's arrays have no other sizes."""
    return 1 << (number - 1).bit_length()


def fits_kernels(**arrays: Any) -> str | None:
    """Returns why kernels, which sum in float32, cannot take these arrays, or None."""
    wide = [f"{name} of {array.dtype}" for name, array in arrays.items() if array.dtype.itemsize > 4]
    return " and ".join(wide) or None


def inside(index: Int[Array, "..."], size: int) -> Int[Array, "..."]:
    """Returns the indices, those beyond an array moved into it: nothing else stops a kernel from reading there."""
    return jnp.minimum(jnp.maximum(index, 0), size - 1)


def chosen_sums(
    chosen: Bool[Array, "sums entries"], terms: Float[Array, "entries tokens"]
) -> Float[Array, "sums tokens"]:
    """Returns the sums of chosen rows, as a product with ones and zeros; a row that is not finite makes all sums NaN.

    A float32 is the sum of three bfloat16, and a product of these with 1 is exact: tensor cores can do it, and what
    comes out is as if float32 were summed.

    Args:
        chosen: which rows every sum is of.
        terms: the rows.
    """
    ones = chosen.astype(jnp.float32).astype(jnp.bfloat16)
    total = jnp.zeros((chosen.shape[0], terms.shape[1]), jnp.float32)
    rest = terms
    for _ in range(3):
        # Cut off by its bits: a compiler may leave out that a number is rounded and made wide again.
        bits = jax.lax.bitcast_convert_type(rest, jnp.int32) & UPPER_HALF
        part = jax.lax.bitcast_convert_type(bits, jnp.float32)
        product = jax.lax.dot_general(
            ones, part.astype(jnp.bfloat16), (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        total, rest = total + product, rest - part
    return total
