"""What ops and their kernels share: indices that fit, sizes of blocks, and products on chip."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

__all__ = [
    "as_index",
    "check_size",
    "chosen_sums",
    "dot_over_tokens",
    "fits_kernels",
    "inside",
    "power_of_2",
    "split_flat",
]

LARGEST_MATRIX = 2**31 - 2**16
"""Entries of a matrix whose flat indices, and those of a block beyond its end, are int32."""

UPPER_HALF = -0x1_0000
"""The bits of a float32 that a bfloat16 has."""


def power_of_2(number: int) -> int:
    """Returns the smallest power of 2 that is at least `number`: Triton's arrays have no other sizes."""
    return 1 << (number - 1).bit_length()


def fits_kernels(**arrays: Any) -> str | None:
    """Returns why kernels, which sum in float32, cannot take these arrays, or None."""
    wide = [f"{name} of {array.dtype}" for name, array in arrays.items() if array.dtype.itemsize > 4]
    return " and ".join(wide) or None


def as_index(name: str, index: Array) -> Int[Array, "..."]:
    """Returns indices as int32; those that are none stay none.

    Args:
        name: of the argument.
        index: integers of any width.

    Raises:
        TypeError: they are no integers.
    """
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"{name} must hold integers, got {index.dtype}")
    if index.dtype.itemsize > 4 or index.dtype == jnp.uint32:
        index = jnp.clip(index, max(-1, jnp.iinfo(index.dtype).min), jnp.iinfo(jnp.int32).max)
    return index.astype(jnp.int32)


def check_size(rows: int, columns: int) -> None:
    """Raises ValueError if flat indices in such a matrix do not fit int32."""
    if rows * columns > LARGEST_MATRIX:
        raise ValueError(
            f"a matrix must have at most {LARGEST_MATRIX} entries, since flat indices are int32, got {rows} * {columns}"
        )


def split_flat(
    index: Int[Array, "..."], values: Num[Array, "..."], inputs: int, outputs: int
) -> tuple[Int[Array, "..."], Int[Array, "..."], Num[Array, "..."], Bool[Array, "..."]]:
    """Returns rows, columns and values of entries at flat indices, and which lie in the matrix: others are 0 at (0, 0).

    Args:
        index: row * outputs + column.
        values: the entries.
        inputs: rows of the matrix.
        outputs: columns of the matrix.
    """
    is_entry = (index >= 0) & (index < inputs * outputs)
    place = jnp.where(is_entry, index, 0)
    return place // outputs, place % outputs, jnp.where(is_entry, values, 0), is_entry


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


def dot_over_tokens(
    left: Float[Array, "tokens rows"], right: Float[Array, "tokens columns"]
) -> Float[Array, "rows columns"]:
    """Returns left.T @ right inside a kernel, summed in float32; float32 is not rounded to TF32."""
    dtype = jnp.promote_types(left.dtype, right.dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
    return jax.lax.dot_general(
        left.astype(dtype), right.astype(dtype), (((0,), (0,)), ((), ())),
        precision=precision, preferred_element_type=jnp.float32,
    )  # fmt: skip
