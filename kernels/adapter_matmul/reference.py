"""Products with adapters in plain XLA: one adapter at a time, those that no token has left out."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxsparse.kernels.blocks import split_flat
from jaxsparse.kernels.gather_matmul.reference import entries_product, neurons_product
from jaxsparse.kernels.tiles import accumulation_dtype, scan_start
from jaxtyping import Array, Float, Int

__all__ = ["entries_reference", "neurons_reference", "slices_reference"]


def neurons_reference(
    x: Float[Array, "tokens inputs"],
    adapter_of_token: Int[Array, " tokens"],
    index: Int[Array, "adapters k outputs"],
    values: Float[Array, "adapters k outputs"],
) -> Float[Array, "tokens outputs"]:
    """Returns y[t, o] = sum_j values[a, j, o] x[t, index[a, j, o]]."""
    return _by_adapter(x, adapter_of_token, index, values, index.shape[2], neurons_product)


def entries_reference(
    x: Float[Array, "tokens inputs"],
    adapter_of_token: Int[Array, " tokens"],
    index: Int[Array, "adapters k"],
    values: Float[Array, "adapters k"],
    outputs: int,
) -> Float[Array, "tokens outputs"]:
    """Returns y[t] = x[t] @ D[a], where D has values at flat indices row * outputs + column."""

    def product(x: Array, index: Array, values: Array) -> Array:
        return entries_product(x, *split_flat(index, values, x.shape[1], outputs)[:3], outputs)

    return _by_adapter(x, adapter_of_token, index, values, outputs, product)


def slices_reference(
    x: Float[Array, "tokens inputs"],
    adapter_of_token: Int[Array, " tokens"],
    index: Int[Array, "adapters slices"],
    values: Float[Array, "adapters slices outputs"],
) -> Float[Array, "tokens outputs"]:
    """Returns y[t] = x[t, index[a]] @ values[a]."""
    dtype = accumulation_dtype(x, values)

    def product(x: Array, index: Array, values: Array) -> Array:
        # Transposed, each slice is a row; and XLA on CPU cannot multiply gathered columns of bfloat16.
        return jax.lax.dot_general(
            x.T[index],
            values,
            (((0,), (0,)), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=dtype,
        )

    return _by_adapter(x, adapter_of_token, index, values, values.shape[2], product)


def _by_adapter(
    x: Array, adapter_of_token: Array, index: Array, values: Array, outputs: int, product: Callable[..., Array]
) -> Array:
    """The product of every adapter, each for its own tokens."""
    numbers = jnp.arange(index.shape[0], dtype=adapter_of_token.dtype)
    start = scan_start(
        jnp.zeros((x.shape[0], outputs), accumulation_dtype(x, values)), x, adapter_of_token, index, values
    )

    def add(total: Array, adapter: tuple[Array, ...]) -> tuple[Array, None]:
        number, *entries = adapter
        is_own = adapter_of_token == number

        def own() -> Array:
            return jnp.where(is_own[:, None], product(x, *entries), total)

        return jax.lax.cond(jnp.any(is_own), own, lambda: total), None

    return jax.lax.scan(add, start, (numbers, index, values))[0]
