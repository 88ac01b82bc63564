"""Sparse products in plain XLA: by gathering rows, or by bands of the dense matrix, whichever costs less.

Nothing is ever added to one place twice in one scatter: that is very slow on GPUs.
"""

import math

import jax
import jax.numpy as jnp
from jaxsparse.kernels.tiles import TILE_ENTRIES, TILES, accumulation_dtype, scan_start
from jaxtyping import Array, Float, Int

__all__ = [
    "entries_by_bands",
    "entries_by_blocks",
    "entries_product",
    "neurons_by_bands",
    "neurons_by_gather",
    "neurons_product",
    "neurons_transposed",
    "neurons_transposed_by_bands",
]

NEURON_COST = 25
"""An entry gathered for its own neuron costs as much as so many entries of a dense product (CPU, 512 tokens, k = 20:
12 for 576 x 576, 25 for 1536 x 576)."""
ENTRY_COST = 150
"""The same for an entry that is summed with others of its output (CPU, 512 tokens, 576 x 576: 160 for k = 1, 90 for
k = 4)."""
BLOCK = 32
"""So many entries are summed at a time: they stay in the cache, and sums by a small product cost little."""


def neurons_product(
    x: Float[Array, "tokens inputs"], index: Int[Array, "k outputs"], values: Float[Array, "k outputs"]
) -> Float[Array, "tokens outputs"]:
    """Returns y[t, o] = sum_j values[j, o] x[t, index[j, o]]."""
    is_few = index.shape[0] * NEURON_COST < x.shape[1]
    return (neurons_by_gather if is_few else neurons_by_bands)(x, index, values)


def neurons_transposed(
    y: Float[Array, "tokens outputs"], index: Int[Array, "k outputs"], values: Float[Array, "k outputs"], inputs: int
) -> Float[Array, "tokens inputs"]:
    """Returns the product with the transposed matrix: x[t, i] = sum of values[j, o] y[t, o] where index[j, o] = i."""
    if index.size * ENTRY_COST >= inputs * y.shape[1]:
        return neurons_transposed_by_bands(y, index, values, inputs)
    columns = jnp.broadcast_to(jnp.arange(index.shape[1], dtype=index.dtype), index.shape)
    return entries_by_blocks(y, columns.reshape(-1), index.reshape(-1), values.reshape(-1), inputs)


def entries_product(
    x: Float[Array, "tokens sources"],
    sources: Int[Array, " entries"],
    targets: Int[Array, " entries"],
    values: Float[Array, " entries"],
    size: int,
) -> Float[Array, "tokens size"]:
    """Returns y[t, i] = sum of values[j] x[t, sources[j]] where targets[j] = i."""
    is_few = sources.shape[0] * ENTRY_COST < x.shape[1] * size
    return (entries_by_blocks if is_few else entries_by_bands)(x, sources, targets, values, size)


def neurons_by_gather(x: Array, index: Array, values: Array) -> Array:
    """The same by gathering; costs tokens * k * outputs."""
    dtype = accumulation_dtype(x, values)
    # Columns lie far apart in memory: transposed, each entry reads a row.
    features = x.T

    def add(total: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        inputs, factors = row
        return total + factors.astype(dtype)[:, None] * features[inputs].astype(dtype), None

    start = scan_start(jnp.zeros((index.shape[1], x.shape[0]), dtype), x, index, values)
    return jax.lax.scan(add, start, (index, values))[0].T


def entries_by_blocks(x: Array, sources: Array, targets: Array, values: Array, size: int) -> Array:
    """The same by gathering entries sorted by target, a block at a time; costs tokens * entries."""
    dtype = accumulation_dtype(x, values)
    order, missing = jnp.argsort(targets), -targets.shape[0] % BLOCK
    features, earlier = x.T, jnp.tril(jnp.ones((BLOCK, BLOCK), bool))
    beyond = size + jnp.arange(BLOCK, dtype=targets.dtype)

    def blocks(entries: Array, fill: int) -> Array:
        return jnp.pad(entries[order], (0, missing), constant_values=fill).reshape(-1, BLOCK)

    def add(total: Array, block: tuple[Array, Array, Array]) -> tuple[Array, None]:
        source, target, factors = block
        terms = factors.astype(dtype)[:, None] * features[source].astype(dtype)
        # Running sums of the entries of one target; the last of each is the whole, so that no target comes twice.
        same = ((target[:, None] == target) & earlier).astype(dtype)
        sums = jnp.matmul(same, terms, precision=jax.lax.Precision.HIGHEST)
        is_last = jnp.concatenate([target[1:] != target[:-1], jnp.ones(1, bool)])
        place = jnp.where(is_last, target, beyond)
        return total.at[place].add(sums, mode="drop", unique_indices=True), None

    start = scan_start(jnp.zeros((size, x.shape[0]), dtype), x, sources, targets, values)
    return jax.lax.scan(add, start, (blocks(sources, 0), blocks(targets, size), blocks(values, 0)))[0].T


def _bands(size: int, other: int) -> tuple[int, int]:
    """Number and width of the bands of a matrix along the side of `size`, as in `scan_tiles`."""
    count = min(size, max(TILES, math.ceil(size * other / TILE_ENTRIES)))
    width = math.ceil(size / count)
    return math.ceil(size / width), width


def _neuron_bands(inputs: int, index: Array, values: Array, dtype: jnp.dtype) -> tuple[int, int, Array, Array]:
    """Number and width of bands of outputs, and their entries (bands, k, width); padding has values of 0."""
    k, outputs = index.shape
    count, width = _bands(outputs, inputs)

    def banded(entries: Array) -> Array:
        padded = jnp.pad(entries, ((0, 0), (0, count * width - outputs)))
        return jnp.swapaxes(padded.reshape(k, count, width), 0, 1)

    # Padding repeats indices of its output, each with a value of 0.
    return count, width, banded(index), banded(values.astype(dtype))


def _neuron_band(inputs: int, index: Array, values: Array) -> Array:
    # Added, since an output may name an input twice, as padding with zeros does.
    columns = jnp.arange(index.shape[1], dtype=index.dtype)
    return jnp.zeros((inputs, index.shape[1]), values.dtype).at[index, columns].add(values)


def neurons_by_bands(x: Array, index: Array, values: Array) -> Array:
    """The same by products with bands of outputs, each dropped after its product; costs the dense product."""
    dtype, (tokens, inputs) = accumulation_dtype(x, values), x.shape
    count, width, indices, factors = _neuron_bands(inputs, index, values, x.dtype)

    def multiply(_: None, band: tuple[Array, Array]) -> tuple[None, Array]:
        return None, jnp.matmul(x, _neuron_band(inputs, *band), preferred_element_type=dtype)

    _, found = jax.lax.scan(multiply, None, (indices, factors))
    return jnp.swapaxes(found, 0, 1).reshape(tokens, count * width)[:, : index.shape[1]]


def neurons_transposed_by_bands(y: Array, index: Array, values: Array, inputs: int) -> Array:
    """The same by products with bands of outputs; costs the dense product."""
    dtype, tokens = accumulation_dtype(y, values), y.shape[0]
    count, width, indices, factors = _neuron_bands(inputs, index, values, y.dtype)
    padded = jnp.pad(y, ((0, 0), (0, count * width - y.shape[1])))

    def add(total: Array, band: tuple[Array, Array, Array]) -> tuple[Array, None]:
        number, index, values = band
        part = jax.lax.dynamic_slice_in_dim(padded, number * width, width, axis=1)
        return total + jnp.matmul(part, _neuron_band(inputs, index, values).T, preferred_element_type=dtype), None

    numbers = jnp.arange(count, dtype=jnp.int32)
    start = scan_start(jnp.zeros((tokens, inputs), dtype), y, index, values)
    return jax.lax.scan(add, start, (numbers, indices, factors))[0]


def entries_by_bands(x: Array, sources: Array, targets: Array, values: Array, size: int) -> Array:
    """The same by products with bands of sources, each dropped after its product; costs the dense product."""
    dtype, (tokens, inputs) = accumulation_dtype(x, values), x.shape
    count, height = _bands(inputs, size)
    padded, factors = jnp.pad(x, ((0, 0), (0, count * height - inputs))), values.astype(x.dtype)

    def add(total: Array, number: Array) -> tuple[Array, None]:
        first = number * height
        is_here = (sources >= first) & (sources < first + height)
        rows = jnp.where(is_here, sources - first, height)
        # Entries that are none are zeros in one place: adding them does no harm.
        band = jnp.zeros((height, size), x.dtype).at[rows, targets].add(factors, mode="drop")
        part = jax.lax.dynamic_slice_in_dim(padded, first, height, axis=1)
        return total + jnp.matmul(part, band, preferred_element_type=dtype), None

    numbers = jnp.arange(count, dtype=jnp.int32)
    start = scan_start(jnp.zeros((tokens, size), dtype), x, sources, targets, values)
    return jax.lax.scan(add, start, numbers)[0]
