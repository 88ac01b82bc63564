"""Products with adapters on a GPU: a program owns some outputs of some tokens, which may have several adapters."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxsparse.kernels.blocks import chosen_sums, inside
from jaxsparse.kernels.launch import triton_call
from jaxtyping import Array, Float, Int

__all__ = ["Tiling", "entries_gpu", "neurons_gpu", "slices_gpu"]


@dataclass(frozen=True)
class Tiling:
    """How the product is cut.

    Attributes:
        tokens: of a program; for entries and slices at least 16, which tensor cores need.
        outputs: of a program.
        entries: or slices, read at a time, at least 16.
        warps: of a program.
        stages: how deeply reading is pipelined.
    """

    tokens: int
    outputs: int
    entries: int = 32
    warps: int = 4
    stages: int = 2


def neurons_gpu(
    x: Float[Array, "tokens inputs"],
    adapter_of_token: Int[Array, " tokens"],
    index: Int[Array, "adapters k outputs"],
    values: Float[Array, "adapters k outputs"],
    *,
    interpret: bool,
    cut: Tiling | None = None,
) -> Float[Array, "tokens outputs"]:
    """Returns y[t, o] = sum_j values[a, j, o] x[t, index[a, j, o]].

    Args:
        x: activations.
        adapter_of_token: which adapter a.
        index: inputs of every output.
        values: the entries.
        interpret: run it as plain JAX.
        cut: how the product is cut.
    """
    cut = cut or Tiling(1, 256)
    return _call(_neurons, x, (x, adapter_of_token, index, values), index.shape[2], cut, interpret, "neurons")


def entries_gpu(
    x: Float[Array, "tokens inputs"],
    adapter_of_token: Int[Array, " tokens"],
    index: Int[Array, "adapters k"],
    values: Float[Array, "adapters k"],
    *,
    outputs: int,
    is_sorted: bool = False,
    interpret: bool,
    cut: Tiling | None = None,
) -> Float[Array, "tokens outputs"]:
    """Returns y[t] = x[t] @ D[a], where D has values at flat indices row * outputs + column.

    Args:
        x: activations.
        adapter_of_token: which adapter a.
        index: flat indices; those beyond the matrix are none.
        values: the entries.
        outputs: columns of the matrix.
        is_sorted: whether the entries are in the order of their columns.
        interpret: run it as plain JAX.
        cut: how the product is cut.
    """
    cut = cut or Tiling(16, 64)
    is_entry = (index >= 0) & (index < x.shape[1] * outputs)
    targets = jnp.where(is_entry, index % outputs, outputs)
    if not is_sorted:
        order = jnp.argsort(targets, axis=1)
        index, targets, values = (jnp.take_along_axis(a, order, axis=1) for a in (index, targets, values))
    # The entries of a block of outputs lie together.
    firsts = jnp.minimum(jnp.arange(pl.cdiv(outputs, cut.outputs) + 1, dtype=targets.dtype) * cut.outputs, outputs)
    starts = jax.vmap(lambda targets: jnp.searchsorted(targets, firsts))(targets).astype(jnp.int32)
    arrays = x, adapter_of_token, index // outputs, targets, values, starts
    return _call(_entries, x, arrays, outputs, cut, interpret, "entries")


def slices_gpu(
    x: Float[Array, "tokens inputs"],
    adapter_of_token: Int[Array, " tokens"],
    index: Int[Array, "adapters slices"],
    values: Float[Array, "adapters slices outputs"],
    *,
    interpret: bool,
    cut: Tiling | None = None,
) -> Float[Array, "tokens outputs"]:
    """Returns y[t] = x[t, index[a]] @ values[a].

    Args:
        x: activations.
        adapter_of_token: which adapter a.
        index: inputs that an adapter reads.
        values: the rows of its matrix.
        interpret: run it as plain JAX.
        cut: how the product is cut.
    """
    cut = cut or Tiling(16, 128 if jnp.promote_types(x.dtype, values.dtype).itemsize < 4 else 64, 16)
    return _call(_slices, x, (x, adapter_of_token, index, values), values.shape[2], cut, interpret, "slices")


def _call(
    kernel: Callable[..., None], x: Array, arrays: Any, outputs: int, cut: Tiling, interpret: bool, form: str
) -> Array:
    tokens = x.shape[0]
    return triton_call(
        partial(kernel, cut=cut, sizes=(tokens, x.shape[1], outputs)),
        arrays,
        name=f"adapter_matmul_{form}",
        grid=(pl.cdiv(outputs, cut.outputs), pl.cdiv(tokens, cut.tokens)),
        results=(((tokens, outputs), jnp.float32),),
        interpret=interpret,
        warps=cut.warps,
        stages=cut.stages,
    )[0]


def _block(adapter_of_token: Any, adapters: int, cut: Tiling, sizes: tuple[int, ...]) -> tuple[Array, ...]:
    """A program's outputs and tokens, which of these exist, and their adapters, one too high for none."""
    output = pl.program_id(0) * cut.outputs + jnp.arange(cut.outputs)
    token = pl.program_id(1) * cut.tokens + jnp.arange(cut.tokens)
    is_token = token < sizes[0]
    adapter = plgpu.load(adapter_of_token.at[token], mask=is_token, other=-1)
    return output, token, is_token, jnp.where((adapter >= 0) & (adapter < adapters), adapter, adapters)


def _neurons(
    x: Any, adapter_of_token: Any, index: Any, values: Any, product: Any, *, cut: Tiling, sizes: tuple[int, ...]
) -> None:
    _, inputs, outputs = sizes
    adapters, k, _ = index.shape
    output, token, is_token, adapter = _block(adapter_of_token, adapters, cut, sizes)
    exists = (adapter < adapters)[:, None] & (output < outputs)[None, :]

    def add(number: Array, total: Array) -> Array:
        place = adapter[:, None], number, output[None, :]
        source = inside(plgpu.load(index.at[place], mask=exists, other=0), inputs)
        factor = plgpu.load(values.at[place], mask=exists, other=0.0)
        feature = plgpu.load(x.at[token[:, None], source], mask=exists, other=0.0)
        return total + factor.astype(jnp.float32) * feature.astype(jnp.float32)

    total = jax.lax.fori_loop(0, k, add, jnp.zeros((cut.tokens, cut.outputs), jnp.float32))
    exists = is_token[:, None] & (output < outputs)[None, :]
    plgpu.store(product.at[token[:, None], output[None, :]], total, mask=exists)


def _of_each(adapter: Array, adapters: int, product: Callable[[Array], Array], total: Array, axis: int) -> Array:
    """What every adapter of the tokens gives, for its own tokens, which are counted along an axis of the total."""

    def own(state: tuple[Array, Array]) -> tuple[Array, Array]:
        number, total = state
        # Chosen, not multiplied by 0 or 1: no adapter can spoil the tokens of another.
        total = jnp.where(jnp.expand_dims(adapter == number, axis), product(number), total)
        return jnp.min(jnp.where(adapter > number, adapter, adapters)), total

    return jax.lax.while_loop(lambda state: state[0] < adapters, own, (jnp.min(adapter), total))[1]


def _entries(
    x: Any,
    adapter_of_token: Any,
    sources: Any,
    targets: Any,
    values: Any,
    starts: Any,
    product: Any,
    *,
    cut: Tiling,
    sizes: tuple[int, ...],
) -> None:
    _, inputs, outputs = sizes
    adapters, block = sources.shape[0], pl.program_id(0)
    output, token, is_token, adapter = _block(adapter_of_token, adapters, cut, sizes)
    nothing = jnp.zeros((cut.outputs, cut.tokens), jnp.float32)

    def of(number: Array) -> Array:
        start, stop = starts[number, block], starts[number, block + 1]

        def add(step: Array, total: Array) -> Array:
            entry = start + step * cut.entries + jnp.arange(cut.entries)
            is_entry = entry < stop
            source = inside(plgpu.load(sources.at[number, entry], mask=is_entry, other=0), inputs)
            target = plgpu.load(targets.at[number, entry], mask=is_entry, other=-1)
            factor = plgpu.load(values.at[number, entry], mask=is_entry, other=0.0)
            exists = is_entry[:, None] & (adapter == number)[None, :]
            feature = plgpu.load(x.at[token[None, :], source[:, None]], mask=exists, other=0.0)
            terms = factor.astype(jnp.float32)[:, None] * feature.astype(jnp.float32)
            return total + chosen_sums(output[:, None] == target[None, :], terms)

        return jax.lax.fori_loop(0, (stop - start + cut.entries - 1) // cut.entries, add, nothing)

    total = _of_each(adapter, adapters, of, nothing, axis=0)
    exists = (output < outputs)[:, None] & is_token[None, :]
    plgpu.store(product.at[token[None, :], output[:, None]], total, mask=exists)


def _slices(
    x: Any, adapter_of_token: Any, index: Any, values: Any, product: Any, *, cut: Tiling, sizes: tuple[int, ...]
) -> None:
    _, inputs, outputs = sizes
    adapters, slices = index.shape
    output, token, is_token, adapter = _block(adapter_of_token, adapters, cut, sizes)
    nothing, dtype = jnp.zeros((cut.tokens, cut.outputs), jnp.float32), jnp.promote_types(x.dtype, values.dtype)
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def of(number: Array) -> Array:
        def add(step: Array, total: Array) -> Array:
            part = step * cut.entries + jnp.arange(cut.entries)
            is_part = part < slices
            source = inside(plgpu.load(index.at[number, part], mask=is_part, other=0), inputs)
            exists = (adapter == number)[:, None] & is_part[None, :]
            left = plgpu.load(x.at[token[:, None], source[None, :]], mask=exists, other=0.0)
            exists = is_part[:, None] & (output < outputs)[None, :]
            right = plgpu.load(values.at[number, part[:, None], output[None, :]], mask=exists, other=0.0)
            found = jax.lax.dot_general(
                left.astype(dtype),
                right.astype(dtype),
                (((1,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            return total + found

        return jax.lax.fori_loop(0, pl.cdiv(slices, cut.entries), add, nothing)

    total = _of_each(adapter, adapters, of, nothing, axis=1)
    exists = is_token[:, None] & (output < outputs)[None, :]
    plgpu.store(product.at[token[:, None], output[None, :]], total, mask=exists)
