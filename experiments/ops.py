"""The ops of kernels/ on the shapes of models: a table that tests compile, and experiments.kernels measures.

An op is a function from a projection, a density and a dtype to a `Case`. Costs are counted here, in one place: bytes
of arguments and results that have to cross the device's memory once, and what a kernel writes between its passes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxsparse.kernels import (
    adapter_matmul,
    adapter_slices_matmul,
    block_topk,
    gather_matmul,
    gradient_topk,
    sampled_matmul,
    scatter_add_unique,
    scatter_unique,
)
from jaxsparse.kernels.block_topk import pallas_gpu as block_topk_gpu
from jaxsparse.kernels.gradient_topk import pallas_gpu as gradient_topk_gpu
from jaxsparse.kernels.merge import candidates_of_tile

from experiments.shapes import Projection

__all__ = ["OPS", "Argument", "Bare", "Case", "Cost"]

INDEX = 4
"""Bytes of an index, and of a float32."""


@dataclass(frozen=True)
class Argument:
    """What an op takes.

    Attributes:
        shape: its shape.
        dtype: its dtype.
        below: for integers: they are distinct along the first axis, and below this.
    """

    shape: tuple[int, ...]
    dtype: str
    below: int = 0

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape and dtype, as JAX takes them."""
        return jax.ShapeDtypeStruct(self.shape, jnp.dtype(self.dtype))

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Returns random numbers."""
        if not self.below:
            return rng.standard_normal(self.shape, np.float32).astype(jnp.dtype(self.dtype))
        columns = [rng.choice(self.below, self.shape[0], replace=False) for _ in range(int(np.prod(self.shape[1:])))]
        return np.stack(columns, -1).reshape(self.shape).astype(np.int32)


@dataclass(frozen=True)
class Cost:
    """What a route takes of a device.

    Attributes:
        flops: of multiplying and adding.
        read_bytes: of the arguments, each read once.
        moved_bytes: whatever else crosses the memory: results, and what is written to be read again.
    """

    flops: int
    read_bytes: int
    moved_bytes: int

    @property
    def bytes(self) -> int:
        """All that crosses the memory."""
        return self.read_bytes + self.moved_bytes


@dataclass(frozen=True)
class Bare:
    """A GPU kernel by itself, to be compiled.

    Attributes:
        function: calls it.
        arguments: shapes.
    """

    function: Callable[..., Any]
    arguments: Sequence[jax.ShapeDtypeStruct]


@dataclass(frozen=True)
class Case:
    """An op on a shape, and the dense route that it replaces.

    Attributes:
        arguments: of both routes.
        sparse: the op; takes `implementation` too, where it has several.
        dense: the dense route in plain JAX.
        cost: of the op.
        dense_cost: of the dense route.
        kernels: the op's GPU kernels.
    """

    arguments: Sequence[Argument]
    sparse: Callable[..., Any]
    dense: Callable[..., Any]
    cost: Cost
    dense_cost: Cost
    kernels: Sequence[Bare] = field(default_factory=list)


def _bytes(*arguments: Argument) -> int:
    return sum(int(np.prod(a.shape)) * jnp.dtype(a.dtype).itemsize for a in arguments)


def _activations(shape: Projection, dtype: str) -> tuple[Argument, Argument]:
    return Argument((shape.tokens, shape.inputs), dtype), Argument((shape.tokens, shape.outputs), dtype)


def _product(x: jax.Array, dy: jax.Array) -> jax.Array:
    return jnp.matmul(x.T, dy, preferred_element_type=jnp.float32)


def _gradient_topk(shape: Projection, density: float, dtype: str) -> Case:
    """Reads x and dy; candidates are written and read again; a second pass only where the answer crowds in a tile.

    The dense route writes the product, in float32 as the op has it, and reads it twice: for the sum of squares and, at
    the least once, for the largest. Its second reading is not counted.
    """
    x, dy = _activations(shape, dtype)
    k, size = shape.entries(density), shape.inputs * shape.outputs
    cut = gradient_topk_gpu.tiling(x.abstract, dy.abstract)
    tiles = -(-shape.inputs // cut.rows) * -(-shape.outputs // cut.columns)
    count = candidates_of_tile(k, tiles, cut.rows * cut.columns, gradient_topk_gpu.FEWEST)
    written = tiles * count * 2 * INDEX + tiles * INDEX

    def dense(x: jax.Array, dy: jax.Array) -> Any:
        product = _product(x, dy)
        _, best = jax.lax.top_k(jnp.abs(product).reshape(-1), k)
        return product.reshape(-1)[best], best, jnp.sum(jnp.square(product))

    bare = partial(gradient_topk_gpu.best_of_tiles, count=count, cut=cut, interpret=False)
    flops, read, answer = 2 * shape.tokens * size, _bytes(x, dy), k * 3 * INDEX
    return Case(
        (x, dy),
        partial(gradient_topk, k=k),
        dense,
        Cost(flops, read, 2 * written + answer),
        Cost(flops, read, 2 * size * INDEX + answer),
        [Bare(bare, (x.abstract, dy.abstract, jax.ShapeDtypeStruct((tiles,), jnp.int32)))],
    )


def _block_topk(shape: Projection, density: float, dtype: str) -> Case:
    """The matrix is read once, candidates written and read again; the dense route sorts: it reads at least as much."""
    a = Argument((shape.inputs, shape.outputs), dtype)
    k, size, item = shape.entries(density), shape.inputs * shape.outputs, jnp.dtype(dtype).itemsize
    cut = block_topk_gpu.Blocks()
    blocks = -(-size // cut.size)
    count = candidates_of_tile(k, blocks, cut.size)
    bare = partial(block_topk_gpu.best_of_blocks, count=count, cut=cut, interpret=False)
    return Case(
        (a,),
        partial(block_topk, k=k),
        lambda a: jax.lax.top_k(jnp.abs(a).reshape(-1), k),
        Cost(0, _bytes(a), 2 * blocks * count * (item + INDEX) + k * (item + INDEX)),
        # XLA on GPU sorts pairs of a value and an index for a k above 16: written and read again, once at the least.
        Cost(0, _bytes(a), 2 * size * (item + INDEX) + k * (item + INDEX)),
        [Bare(bare, (jax.ShapeDtypeStruct((size,), dtype), jax.ShapeDtypeStruct((blocks,), jnp.int32)))],
    )


NEURON = 20
"""Entries of an output, and slices of an adapter, for which kernels of these forms are compiled."""


def _column_topk(shape: Projection, density: float, dtype: str) -> Case:
    """Some entries of every column, whatever the density; the matrix is read once for each bit of a threshold."""
    a = Argument((shape.inputs, shape.outputs), dtype)
    k, item = NEURON, jnp.dtype(dtype).itemsize
    answer = k * shape.outputs * (item + INDEX)
    return Case(
        (a,),
        partial(block_topk, k=k, axis=-2),
        lambda a: jax.lax.top_k(jnp.abs(a).T, k),
        Cost(0, _bytes(a), _PASSES * _bytes(a) + answer),
        Cost(0, _bytes(a), 2 * shape.inputs * shape.outputs * (item + INDEX) + answer),
        [Bare(lambda a: block_topk_gpu.column_topk_gpu(a, k=k, interpret=False), (a.abstract,))],
    )


_PASSES = 16
"""About how often column_topk reads its matrix again: 31 times if there are ties, half of that if not."""


def _whole(function: Callable[..., Any], arguments: Sequence[Argument]) -> list[Bare]:
    """The op's kernels, with whatever XLA adds around them."""
    return [Bare(partial(function, implementation="pallas"), [argument.abstract for argument in arguments])]


def _of_neurons(shape: Projection, dtype: str, *lead: int) -> tuple[Argument, Argument]:
    """Indices and values of some entries of every output."""
    sizes = (*lead, NEURON, shape.outputs)
    return Argument(sizes, "int32", below=shape.inputs), Argument(sizes, dtype)


def _sampled_matmul(shape: Projection, density: float, dtype: str) -> Case:
    """Every sample reads a column of x and one of dy; the dense route writes the product, and reads samples of it."""
    x, dy = _activations(shape, dtype)
    k, size, item = shape.entries(density), shape.inputs * shape.outputs, jnp.dtype(dtype).itemsize
    flat = Argument((k,), "int32", below=size)
    flops = 2 * shape.tokens
    # No more is read than all of x and dy: with many samples, most columns are met several times.
    read = min(_bytes(x, dy), 2 * k * shape.tokens * item) + _bytes(flat)

    def sparse(x: jax.Array, dy: jax.Array, flat: jax.Array, implementation: str | None = None) -> jax.Array:
        return sampled_matmul(x, dy, flat // shape.outputs, flat % shape.outputs, implementation=implementation)

    return Case(
        (x, dy, flat),
        sparse,
        lambda x, dy, flat: _product(x, dy).reshape(-1)[flat],
        Cost(flops * k, read, k * INDEX),
        Cost(flops * size, _bytes(x, dy, flat), size * INDEX + k * 2 * INDEX),
        _whole(sparse, (x, dy, flat)) + _whole(sampled_matmul, (x, dy, _of_neurons(shape, dtype)[0])),
    )


def _gather_matmul(shape: Projection, density: float, dtype: str) -> Case:
    """The dense route scatters the entries into a matrix, which it writes and reads."""
    x, _ = _activations(shape, dtype)
    k, size, item = shape.entries(density), shape.inputs * shape.outputs, jnp.dtype(dtype).itemsize
    flat, values = Argument((k,), "int32", below=size), Argument((k,), dtype)

    def dense(x: jax.Array, flat: jax.Array, values: jax.Array) -> jax.Array:
        matrix = jnp.zeros(size, x.dtype).at[flat].set(values, unique_indices=True)
        return jnp.matmul(x, matrix.reshape(shape.inputs, shape.outputs), preferred_element_type=jnp.float32)

    def transposed(x: jax.Array, index: jax.Array, values: jax.Array, implementation: str) -> jax.Array:
        """What the backward pass multiplies by."""
        return jax.grad(lambda x: jnp.sum(gather_matmul(x, index, values, implementation=implementation)))(x)

    result, neurons = shape.tokens * shape.outputs * INDEX, (x, *_of_neurons(shape, dtype))
    return Case(
        (x, flat, values),
        partial(gather_matmul, outputs=shape.outputs),
        dense,
        Cost(2 * shape.tokens * k, min(_bytes(x), k * shape.tokens * item) + _bytes(flat, values), result),
        Cost(2 * shape.tokens * size, _bytes(x, flat, values), 2 * size * item + result),
        _whole(partial(gather_matmul, outputs=shape.outputs), (x, flat, values))
        + _whole(gather_matmul, neurons)
        + _whole(transposed, neurons),
    )


ADAPTERS = 8
"""So many adapters are served at once."""


def _adapter_matmul(shape: Projection, density: float, dtype: str) -> Case:
    """Tokens of a batch choose among adapters; the dense route makes a matrix of each, and multiplies its tokens."""
    x, _ = _activations(shape, dtype)
    k, size, item = shape.entries(density), shape.inputs * shape.outputs, jnp.dtype(dtype).itemsize
    chosen = Argument((1, shape.tokens), "int32", below=ADAPTERS)
    flat, values = Argument((k, ADAPTERS), "int32", below=size), Argument((ADAPTERS, k), dtype)

    def sparse(
        x: jax.Array, chosen: jax.Array, flat: jax.Array, values: jax.Array, implementation: str | None = None
    ) -> jax.Array:
        return adapter_matmul(x, chosen[0], flat.T, values, shape.outputs, implementation=implementation)

    def dense(x: jax.Array, chosen: jax.Array, flat: jax.Array, values: jax.Array) -> jax.Array:
        def add(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
            matrix = jnp.zeros(size, x.dtype).at[flat.T[number]].set(values[number], unique_indices=True)
            own = jnp.where((chosen[0] == number)[:, None], x, 0)
            return total + jnp.matmul(own, matrix.reshape(shape.inputs, shape.outputs)), None

        start = jnp.zeros((shape.tokens, shape.outputs), jnp.float32)
        return jax.lax.scan(add, start, jnp.arange(ADAPTERS))[0]

    def of_neurons(
        x: jax.Array, chosen: jax.Array, index: jax.Array, values: jax.Array, implementation: str
    ) -> jax.Array:
        return adapter_matmul(x, chosen[0], index, values, implementation=implementation)

    def of_slices(
        x: jax.Array, chosen: jax.Array, index: jax.Array, values: jax.Array, implementation: str
    ) -> jax.Array:
        return adapter_slices_matmul(x, chosen[0], index, values, implementation=implementation)

    index, entries = _of_neurons(shape, dtype, ADAPTERS)
    slices = Argument((ADAPTERS, NEURON), "int32", below=shape.inputs)
    # A token is multiplied by its own adapter alone.
    result, arguments = shape.tokens * shape.outputs * INDEX, (x, chosen, flat, values)
    return Case(
        arguments,
        sparse,
        dense,
        Cost(2 * shape.tokens * k, _bytes(*arguments), result),
        Cost(2 * shape.tokens * size, _bytes(*arguments), 2 * ADAPTERS * size * item + result),
        _whole(sparse, arguments)
        + _whole(of_neurons, (x, chosen, index, entries))
        + _whole(of_slices, (x, chosen, slices, entries)),
    )


def _scatter_add_unique(shape: Projection, density: float, dtype: str) -> Case:
    """In place; the dense route makes a matrix of the values, and adds all of it."""
    w = Argument((shape.inputs, shape.outputs), dtype)
    k, size, item = shape.entries(density), shape.inputs * shape.outputs, jnp.dtype(dtype).itemsize
    flat, values = Argument((k,), "int32", below=size), Argument((k,), "float32")

    def dense(w: jax.Array, flat: jax.Array, values: jax.Array) -> jax.Array:
        delta = jnp.zeros(size, w.dtype).at[flat].set(values.astype(w.dtype), unique_indices=True)
        return w + delta.reshape(w.shape)

    return Case(
        (w, flat, values),
        scatter_add_unique,
        dense,
        Cost(k, _bytes(flat, values) + k * item, k * item),
        Cost(size, _bytes(w, flat, values), 3 * size * item),
        _whole(scatter_add_unique, (w, flat, values)) + _whole(scatter_unique, (w, flat, Argument((k,), dtype))),
    )


OPS: dict[str, Callable[[Projection, float, str], Case]] = {
    "gradient_topk": _gradient_topk,
    "block_topk": _block_topk,
    "column_topk": _column_topk,
    "sampled_matmul": _sampled_matmul,
    "gather_matmul": _gather_matmul,
    "adapter_matmul": _adapter_matmul,
    "scatter_add_unique": _scatter_add_unique,
}
"""Ops by name: from a projection, a density and a dtype to the op's case."""
