"""Products with sparse matrices, adapters, of which every token has its own: for serving many at once."""

from functools import partial

import jax.numpy as jnp
from jaxsparse.kernels.adapter_matmul.pallas_gpu import entries_gpu, neurons_gpu, slices_gpu
from jaxsparse.kernels.adapter_matmul.reference import entries_reference, neurons_reference, slices_reference
from jaxsparse.kernels.blocks import as_index, check_size, fits_kernels
from jaxsparse.kernels.launch import Implementation, run
from jaxsparse.kernels.tiles import accumulation_dtype
from jaxtyping import Array, Float, Int

__all__ = ["adapter_matmul", "adapter_slices_matmul"]


def adapter_matmul(
    x: Float[Array, "tokens inputs"],
    adapter_of_token: Int[Array, " tokens"],
    index: Int[Array, "adapters ..."],
    values: Float[Array, "adapters ..."],
    outputs: int | None = None,
    *,
    is_sorted: bool = False,
    implementation: Implementation = None,
) -> Float[Array, "tokens outputs"]:
    """Returns x[t] @ D[a] with a = adapter_of_token[t], for sparse matrices D (inputs, outputs) that never exist.

    No token is touched by the adapter of another, whatever that holds. What is not finite may make other outputs of its
    own token NaN, as in a dense product.

    Args:
        x: activations.
        adapter_of_token: which adapter; -1, or any other number that is none, for none: a row of zeros.
        index: without `outputs`, (adapters, k, outputs): inputs of every output, in range, so that
            y[t, o] = sum_j values[a, j, o] x[t, index[a, j, o]]. With `outputs`, (adapters, k): distinct flat indices
            row * outputs + column; those beyond the matrix are left out.
        values: the entries, of the shape of `index`.
        outputs: columns of a matrix, for flat indices.
        is_sorted: whether flat indices are in the order of their columns in every adapter, those beyond the matrix
            last: then they need not be sorted at every call.
        implementation: "xla"; "pallas", up to float32; or None for what is best on the device: for flat indices XLA,
            which gathers every token's own entries and takes half the kernel's time on an H200
            (`python -m experiments.kernels --device gpu --ops adapter_matmul`).

    Returns:
        The product in promote_types(x and values, float32).

    Raises:
        ValueError: shapes do not fit, or the implementation cannot take the arguments.
        TypeError: `adapter_of_token` or `index` hold no integers.

    Example:
        >>> import jax.numpy as jnp
        >>> x, index = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), jnp.array([[[0]], [[1]]])
        >>> adapter_matmul(x, jnp.array([1, -1, 0]), index, jnp.array([[[10.0]], [[100.0]]]))
        Array([[200.],
               [  0.],
               [ 50.]], dtype=float32)
    """
    adapter_of_token, index = _checked(x, adapter_of_token, index)
    if index.shape != values.shape:
        raise ValueError(f"index and values must have one shape, got {index.shape} and {values.shape}")
    if index.ndim != (3 if outputs is None else 2):
        form = "(adapters, k, outputs) without outputs" if outputs is None else f"(adapters, k) with outputs={outputs}"
        raise ValueError(f"index must be {form}, got shape {index.shape}")
    if outputs is not None and outputs < 1:
        raise ValueError(f"outputs must be at least 1, got {outputs}")
    if outputs is not None:
        check_size(x.shape[1], outputs)
    if index.size == 0 or x.size == 0:
        return jnp.zeros((x.shape[0], outputs or index.shape[-1]), accumulation_dtype(x, values))
    arguments, reason = (x, adapter_of_token, index, values), fits_kernels(x=x, values=values)
    if outputs is None:
        return run(implementation, arguments, xla=neurons_reference, gpu=neurons_gpu, reason=reason)
    return run(
        implementation or "xla",
        arguments,
        xla=partial(entries_reference, outputs=outputs),
        gpu=partial(entries_gpu, outputs=outputs, is_sorted=is_sorted),
        reason=reason,
    )


def adapter_slices_matmul(
    x: Float[Array, "tokens inputs"],
    adapter_of_token: Int[Array, " tokens"],
    index: Int[Array, "adapters slices"],
    values: Float[Array, "adapters slices outputs"],
    *,
    implementation: Implementation = None,
) -> Float[Array, "tokens outputs"]:
    """Returns x[t, index[a]] @ values[a] with a = adapter_of_token[t]: matrices of which a few rows are not zero.

    No token is touched by the adapter of another, whatever that holds.

    Args:
        x: activations.
        adapter_of_token: which adapter; -1, or any other number that is none, for none: a row of zeros.
        index: inputs that an adapter reads, in range.
        values: the rows of its matrix for these.
        implementation: "xla"; "pallas", up to float32; or None for what is best on the device.

    Returns:
        The product in promote_types(x and values, float32).

    Raises:
        ValueError: shapes do not fit, or the implementation cannot take the arguments.
        TypeError: `adapter_of_token` or `index` hold no integers.

    Example:
        >>> import jax.numpy as jnp
        >>> adapter_slices_matmul(jnp.array([[1.0, 2.0]]), jnp.array([0]), jnp.array([[1]]), jnp.array([[[3.0, 4.0]]]))
        Array([[6., 8.]], dtype=float32)
    """
    adapter_of_token, index = _checked(x, adapter_of_token, index)
    if values.ndim != 3 or values.shape[:2] != index.shape:
        raise ValueError(f"values must be {index.shape} + (outputs,) as index is {index.shape}, got {values.shape}")
    if values.size == 0 or x.size == 0:
        return jnp.zeros((x.shape[0], values.shape[2]), accumulation_dtype(x, values))
    return run(
        implementation,
        (x, adapter_of_token, index, values),
        xla=slices_reference,
        gpu=slices_gpu,
        reason=fits_kernels(x=x, values=values),
    )


def _checked(x: Array, adapter_of_token: Array, index: Array) -> tuple[Array, Array]:
    if x.ndim != 2:
        raise ValueError(f"x must be (tokens, inputs), got shape {x.shape}")
    if adapter_of_token.shape != x.shape[:1]:
        given = f"as x has so many tokens, got {adapter_of_token.shape}"
        raise ValueError(f"adapter_of_token must be ({x.shape[0]},), {given}")
    return as_index("adapter_of_token", adapter_of_token), as_index("index", index)
