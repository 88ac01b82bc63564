"""Products with a sparse matrix, given by its entries."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxsparse.kernels.blocks import as_index, check_size, fits_kernels, split_flat
from jaxsparse.kernels.gather_matmul.pallas_gpu import entries_product_gpu, neurons_product_gpu, neurons_transposed_gpu
from jaxsparse.kernels.gather_matmul.reference import entries_product, neurons_product, neurons_transposed
from jaxsparse.kernels.launch import Implementation, alike, run
from jaxsparse.kernels.sampled_matmul.op import sampled_matmul
from jaxsparse.kernels.tiles import accumulation_dtype
from jaxtyping import Array, Float, Int

__all__ = ["gather_matmul"]


def gather_matmul(
    x: Float[Array, "tokens inputs"],
    index: Int[Array, "..."],
    values: Float[Array, "..."],
    outputs: int | None = None,
    *,
    implementation: Implementation = None,
) -> Float[Array, "tokens outputs"]:
    """Returns x @ D for a sparse matrix D (inputs, outputs) that holds `values` at `index` and never exists as a whole.

    It can be differentiated, once and in reverse, with respect to x and values: the former is a sparse product again,
    the latter a sampled one. Cotangents are read in x's dtype. Many entries are multiplied as bands of D, in x's dtype
    and summed in at least float32; else all arithmetic is in at least float32. What is not finite among flat entries or
    what they read may make other outputs of its token NaN, as in a dense product.

    Args:
        x: activations.
        index: without `outputs`, (k, outputs): the inputs of every output, distinct and in range, so that
            y[t, o] = sum_j values[j, o] x[t, index[j, o]]. With `outputs`, (k,): distinct flat indices
            row * outputs + column in D; those beyond D are left out, and their values get cotangents of 0.
        values: the entries, of the shape of `index`.
        outputs: columns of D, for flat indices.
        implementation: "xla"; "pallas", up to float32; or None for what is best on the device.

    Returns:
        The product in promote_types(x and values, float32).

    Raises:
        ValueError: shapes do not fit, or the implementation cannot take the arguments.
        TypeError: `index` holds no integers.

    Example:
        >>> import jax.numpy as jnp
        >>> x, index = jnp.array([[1.0, 2.0, 3.0]]), jnp.array([[2, 0]])
        >>> gather_matmul(x, index, jnp.array([[10.0, 0.5]]))
        Array([[30. ,  0.5]], dtype=float32)
        >>> gather_matmul(x, jnp.array([4, 0]), jnp.array([10.0, 0.5]), outputs=2)
        Array([[30.5,  0. ]], dtype=float32)
    """
    axes = 2 if outputs is None else 1
    if x.ndim != 2:
        raise ValueError(f"x must be (tokens, inputs), got shape {x.shape}")
    if index.shape != values.shape:
        raise ValueError(f"index and values must have one shape, got {index.shape} and {values.shape}")
    if index.ndim != axes:
        form = "(k, outputs) without outputs" if outputs is None else f"(k,) with outputs={outputs}"
        raise ValueError(f"index must be {form}, got shape {index.shape}")
    index = as_index("index", index)
    if outputs is not None and outputs < 1:
        raise ValueError(f"outputs must be at least 1, got {outputs}")
    if outputs is not None:
        check_size(x.shape[1], outputs)
    if x.size == 0 or index.size == 0:
        return jnp.zeros((x.shape[0], outputs or index.shape[-1]), accumulation_dtype(x, values))
    # Inside shard_map: so that the cotangents of these vary as they do.
    (x, index, values), _ = alike((x, index, values))
    if outputs is None:
        return _neurons(implementation, x, index, values)
    return _entries((implementation, outputs), x, index, values)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _neurons(implementation: Implementation, x: Array, index: Array, values: Array) -> Array:
    return run(
        implementation,
        (x, index, values),
        xla=neurons_product,
        gpu=neurons_product_gpu,
        reason=fits_kernels(x=x, values=values),
    )


def _neurons_forward(implementation: Implementation, *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return _neurons(implementation, *arrays), arrays


def _neurons_backward(implementation: Implementation, kept: tuple[Array, ...], dy: Array) -> tuple[Array, None, Array]:
    x, index, values = kept
    dy = dy.astype(x.dtype)
    dx = run(
        implementation,
        (dy, index, values),
        xla=partial(neurons_transposed, inputs=x.shape[1]),
        gpu=partial(neurons_transposed_gpu, inputs=x.shape[1]),
        reason=fits_kernels(x=x, values=values),
    )
    dvalues = sampled_matmul(x, dy, index, implementation=implementation)
    return dx.astype(x.dtype), None, dvalues.astype(values.dtype)


_neurons.defvjp(_neurons_forward, _neurons_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _entries(options: tuple[Implementation, int], x: Array, index: Array, values: Array) -> Array:
    implementation, outputs = options
    entries = split_flat(index, values, x.shape[1], outputs)[:3]
    return _entries_product(implementation, x, *entries, size=outputs)


def _entries_forward(options: tuple[Implementation, int], *arrays: Array) -> tuple[Array, tuple[Array, ...]]:
    return _entries(options, *arrays), arrays


def _entries_backward(
    options: tuple[Implementation, int], kept: tuple[Array, ...], dy: Array
) -> tuple[Array, None, Array]:
    implementation, outputs = options
    x, index, values = kept
    dy = dy.astype(x.dtype)
    rows, columns, present, is_entry = split_flat(index, values, x.shape[1], outputs)
    dx = _entries_product(implementation, dy, columns, rows, present, size=x.shape[1])
    found = sampled_matmul(x, dy, rows, columns, implementation=implementation)
    found = jnp.where(is_entry, found, 0)
    return dx.astype(x.dtype), None, found.astype(values.dtype)


_entries.defvjp(_entries_forward, _entries_backward)


def _entries_product(implementation: Implementation, x: Array, *entries: Array, size: int) -> Array:
    return run(
        implementation,
        (x, *entries),
        xla=partial(entries_product, size=size),
        gpu=partial(entries_product_gpu, size=size),
        reason=fits_kernels(x=x, values=entries[-1]),
    )
