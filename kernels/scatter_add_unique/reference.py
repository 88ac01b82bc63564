"""Scatters in plain XLA."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxsparse.kernels.tiles import accumulation_dtype
from jaxtyping import Array, Int, Num

__all__ = ["scatter_reference"]


def scatter_reference(
    w: Num[Array, "stack size"], index: Int[Array, "stack k"], values: Num[Array, "stack k"], *, adds: bool
) -> Num[Array, "stack size"]:
    """Returns w with its entries at `index` replaced by values, or by their sums with what was there."""
    scatter = partial(_scatter, adds=adds)
    if w.dtype.itemsize >= 4:
        return scatter(w, index, values)
    return jax.lax.platform_dependent(w, index, values, cpu=partial(scatter, by_bits=True), default=scatter)


def _scatter(w: Array, index: Array, values: Array, *, adds: bool, by_bits: bool = False) -> Array:
    # XLA on CPU widens narrow floats in a scatter, and does not keep all of their bits.
    kept = jnp.dtype(f"uint{8 * w.dtype.itemsize}") if by_bits else w.dtype
    (stack, size), flat = w.shape, _as(w, kept)
    # Negative numbers would count from the end.
    place = jnp.arange(stack, dtype=index.dtype)[:, None], jnp.where(index < 0, size, index)
    if adds:
        dtype = accumulation_dtype(w, values)
        old = _as(flat.at[place].get(mode="fill", fill_value=0, unique_indices=True), w.dtype)
        values = (old.astype(dtype) + values.astype(dtype)).astype(w.dtype)
        # What is read of w must be read before, and not once more inside the scatter: that would take a copy.
        values = jax.lax.optimization_barrier(values)
    return _as(flat.at[place].set(_as(values, kept), mode="drop", unique_indices=True), w.dtype)


def _as(array: Array, dtype: Any) -> Array:
    return array if array.dtype == dtype else jax.lax.bitcast_convert_type(array, dtype)
