"""Products with adapters in plain XLA: one adapter at a time, those that no token has left out, or token by token."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxsparse.kernels.blocks import split_flat
from jaxsparse.kernels.gather_matmul.reference import entries_product, neurons_product
from jaxsparse.kernels.tiles import accumulation_dtype, scan_start
from jaxtyping import Array, Float, Int

__all__ = ["entries_reference", "neurons_reference", "slices_reference"]

FEW = 2
"""Up to so many adapters are multiplied by one after the other, each by all tokens; more cost less token by token."""
AT_ONCE = 1 << 22
"""Entries gathered for tokens at a time."""


def neurons_reference(
    x: Float[Array, "tokens inputs"],
    adapter_of_token: Int[Array, " tokens"],
    index: Int[Array, "adapters k outputs"],
    values: Float[Array, "adapters k outputs"],
) -> Float[Array, "tokens outputs"]:
    """Returns y[t, o] = sum_j values[a, j, o] x[t, index[a, j, o]]."""

    def product(x: Array, index: Array, values: Array) -> Array:
        return jnp.sum(values * x[index], axis=0)

    return _product(x, adapter_of_token, index, values, index.shape[2], neurons_product, product)


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

    of_token = partial(_entries_of_token, outputs)
    return _product(x, adapter_of_token, index, values, outputs, product, of_token)


def _entries_of_token(outputs: int, x: Array, index: Array, values: Array) -> Array:
    rows, columns, values, _ = split_flat(index, values, x.shape[0], outputs)
    terms = values * x[jnp.minimum(rows, x.shape[0] - 1)]
    return jnp.zeros(outputs, terms.dtype).at[columns].add(terms, mode="drop")


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


def _product(
    x: Array,
    adapter_of_token: Array,
    index: Array,
    values: Array,
    outputs: int,
    of_adapter: Callable[..., Array],
    of_token: Callable[..., Array],
) -> Array:
    """The product by whichever way costs less; a GPU gathers so fast that token by token is always the way."""
    by_adapter = partial(_by_adapter, outputs=outputs, product=of_adapter)
    by_token = partial(_by_token, outputs=outputs, product=of_token)
    arguments = (x, adapter_of_token, index, values)
    if index.shape[0] > FEW:
        return by_token(*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=by_adapter, default=by_token)


def _by_token(
    x: Array, adapter_of_token: Array, index: Array, values: Array, outputs: int, product: Callable[..., Array]
) -> Array:
    """The product of every token with its own adapter, so many tokens at a time as keep the gathered entries few."""
    dtype = accumulation_dtype(x, values)

    def of(token: tuple[Array, Array]) -> Array:
        values_of_x, adapter = token
        has = (adapter >= 0) & (adapter < index.shape[0])
        own = jnp.where(has, adapter, 0)
        found = product(values_of_x.astype(dtype), index[own], values[own].astype(dtype))
        return jnp.where(has, found, 0)

    entries = max(1, index.size // index.shape[0])
    return jax.lax.map(of, (x, adapter_of_token), batch_size=max(1, AT_ONCE // entries))


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
