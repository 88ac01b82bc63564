"""Sparse products on a GPU: a program owns some outputs of some tokens, and sums what it gathers; no atomics.

All gather from x.T, where the tokens of an input lie together.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxsparse.kernels.blocks import chosen_sums, inside, power_of_2
from jaxsparse.kernels.launch import triton_call
from jaxtyping import Array, Float, Int

__all__ = [
    "Tiling",
    "entries_product_gpu",
    "entries_tiling",
    "neurons_product_gpu",
    "neurons_tiling",
    "neurons_transposed_gpu",
]

LEAST = 16
"""Tensor cores take no smaller side of a matrix."""


@dataclass(frozen=True)
class Tiling:
    """How the product is cut.

    Attributes:
        outputs: of a program.
        tokens: of a program.
        entries: read at a time, where their number is not that of the others.
        warps: of a program.
        stages: how deeply reading is pipelined.
    """

    outputs: int
    tokens: int
    entries: int = 32
    warps: int = 4
    stages: int = 2


def neurons_tiling(x: Any) -> Tiling:
    """Returns the tiling for entries of every output."""
    tokens = min(64, power_of_2(x.shape[0]))
    return Tiling(min(256, 2048 // tokens), tokens)


def entries_tiling(x: Any) -> Tiling:
    """Returns the tiling for entries anywhere."""
    return Tiling(32, max(LEAST, min(64, power_of_2(x.shape[0]))))


def neurons_product_gpu(
    x: Float[Array, "tokens inputs"],
    index: Int[Array, "k outputs"],
    values: Float[Array, "k outputs"],
    *,
    interpret: bool,
    cut: Tiling | None = None,
) -> Float[Array, "tokens outputs"]:
    """Returns y[t, o] = sum_j values[j, o] x[t, index[j, o]].

    Args:
        x: activations.
        index: inputs of every output.
        values: the entries.
        interpret: run it as plain JAX.
        cut: how the product is cut; None: `neurons_tiling`.
    """
    cut = cut or neurons_tiling(x)
    (tokens, inputs), (k, outputs) = x.shape, index.shape
    return triton_call(
        partial(_neurons, cut=cut, sizes=(tokens, inputs, k, outputs)),
        (x.T, index, values),
        name="gather_matmul_neurons",
        grid=(pl.cdiv(outputs, cut.outputs), pl.cdiv(tokens, cut.tokens)),
        results=(((tokens, outputs), jnp.float32),),
        interpret=interpret,
        warps=cut.warps,
        stages=cut.stages,
    )[0]


def _neurons(features: Any, index: Any, values: Any, product: Any, *, cut: Tiling, sizes: tuple[int, ...]) -> None:
    tokens, inputs, k, outputs = sizes
    output = pl.program_id(0) * cut.outputs + jnp.arange(cut.outputs)
    token = pl.program_id(1) * cut.tokens + jnp.arange(cut.tokens)
    is_output, exists = output < outputs, (output < outputs)[:, None] & (token < tokens)[None, :]

    def add(number: Array, total: Array) -> Array:
        source = inside(plgpu.load(index.at[number, output], mask=is_output, other=0), inputs)
        factor = plgpu.load(values.at[number, output], mask=is_output, other=0.0)
        feature = plgpu.load(features.at[source[:, None], token[None, :]], mask=exists, other=0.0)
        return total + factor.astype(jnp.float32)[:, None] * feature.astype(jnp.float32)

    total = jax.lax.fori_loop(0, k, add, jnp.zeros((cut.outputs, cut.tokens), jnp.float32))
    plgpu.store(product.at[token[None, :], output[:, None]], total, mask=exists)


def neurons_transposed_gpu(
    y: Float[Array, "tokens outputs"],
    index: Int[Array, "k outputs"],
    values: Float[Array, "k outputs"],
    *,
    inputs: int,
    interpret: bool,
    cut: Tiling | None = None,
) -> Float[Array, "tokens inputs"]:
    """Returns the product with the transposed matrix: x[t, i] = sum of values[j, o] y[t, o] where index[j, o] = i.

    Args:
        y: cotangents of the outputs.
        index: inputs of every output.
        values: the entries.
        inputs: how many there are.
        interpret: run it as plain JAX.
        cut: how the product is cut; None: `entries_tiling`.
    """
    columns = jnp.broadcast_to(jnp.arange(index.shape[1], dtype=index.dtype), index.shape)
    entries = columns.reshape(-1), index.reshape(-1), values.reshape(-1)
    return entries_product_gpu(y, *entries, size=inputs, interpret=interpret, cut=cut)


def entries_product_gpu(
    x: Float[Array, "tokens sources"],
    sources: Int[Array, " entries"],
    targets: Int[Array, " entries"],
    values: Float[Array, " entries"],
    *,
    size: int,
    interpret: bool,
    cut: Tiling | None = None,
) -> Float[Array, "tokens size"]:
    """Returns y[t, i] = sum of values[j] x[t, sources[j]] where targets[j] = i.

    Args:
        x: activations.
        sources: which feature of x every entry reads.
        targets: which feature of the product it is added to.
        values: the entries.
        size: features of the product.
        interpret: run it as plain JAX.
        cut: how the product is cut; None: `entries_tiling`.
    """
    cut = cut or entries_tiling(x)
    tokens, blocks = x.shape[0], pl.cdiv(size, cut.outputs)
    order = jnp.argsort(targets)
    targets = targets[order]
    # The entries of a block of the product lie together.
    starts = jnp.searchsorted(targets, jnp.arange(blocks + 1, dtype=targets.dtype) * cut.outputs).astype(jnp.int32)
    return triton_call(
        partial(_entries, cut=cut, sizes=(tokens, x.shape[1], size)),
        (x.T, sources[order], targets, values[order], starts),
        name="gather_matmul_entries",
        grid=(blocks, pl.cdiv(tokens, cut.tokens)),
        results=(((tokens, size), jnp.float32),),
        interpret=interpret,
        warps=cut.warps,
        stages=cut.stages,
    )[0]


def _entries(
    features: Any,
    sources: Any,
    targets: Any,
    values: Any,
    starts: Any,
    product: Any,
    *,
    cut: Tiling,
    sizes: tuple[int, ...],
) -> None:
    tokens, inputs, size = sizes
    block = pl.program_id(0)
    output = block * cut.outputs + jnp.arange(cut.outputs)
    token = pl.program_id(1) * cut.tokens + jnp.arange(cut.tokens)
    start, stop = starts[block], starts[block + 1]

    def add(step: Array, total: Array) -> Array:
        entry = start + step * cut.entries + jnp.arange(cut.entries)
        is_entry = entry < stop
        source = inside(plgpu.load(sources.at[entry], mask=is_entry, other=0), inputs)
        target = plgpu.load(targets.at[entry], mask=is_entry, other=-1)
        factor = plgpu.load(values.at[entry], mask=is_entry, other=0.0)
        exists = is_entry[:, None] & (token < tokens)[None, :]
        feature = plgpu.load(features.at[source[:, None], token[None, :]], mask=exists, other=0.0)
        terms = factor.astype(jnp.float32)[:, None] * feature.astype(jnp.float32)
        return total + chosen_sums(output[:, None] == target[None, :], terms)

    steps = (stop - start + cut.entries - 1) // cut.entries
    total = jax.lax.fori_loop(0, steps, add, jnp.zeros((cut.outputs, cut.tokens), jnp.float32))
    exists = (output < size)[:, None] & (token < tokens)[None, :]
    plgpu.store(product.at[token[None, :], output[:, None]], total, mask=exists)
