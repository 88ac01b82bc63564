"""Reading slots out of weights and writing them back in place, without a copy of any weight."""

from collections.abc import Sequence
from functools import partial, singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Num

from jaxsparse.engine.sharding import Divided
from jaxsparse.subspaces.blocks import Blocks
from jaxsparse.subspaces.budgets import Budget
from jaxsparse.subspaces.targets import MatrixView, ResolvedTarget
from jaxsparse.subspaces.units import Coordinates, Everything, Neurons, Slices, Units, matrix_numbers

__all__ = ["commit_moves", "commit_slots", "entry_index", "read_slots"]


_SINGLE = Coordinates(Budget(density=1.0))
"""Entries by their flat indices."""


@singledispatch
def entry_index(units: Units, view: MatrixView, support: Int[Array, "stack ..."]) -> Int[Array, "stack ..."]:
    """Returns the flat index in its matrix, in (in, out) order, of every slot.

    Args:
        units: the subspace.
        view: of the weight.
        support: the free units.

    Returns:
        An index for every slot; the matrix's size for slots that are none (a block's beyond the matrix).

    Example:
        >>> import jax.numpy as jnp
        >>> entry_index(Slices(1), MatrixView((2, 3), (0, 1), 1, 2, 3), jnp.array([[1]]))
        Array([[[3, 4, 5]]], dtype=int32)
    """
    raise NotImplementedError(f"the fused engine does not know where the slots of {type(units).__name__} lie")


@entry_index.register(Coordinates)
@entry_index.register(Neurons)
def _of_entries(units: Units, view: MatrixView, support: Int[Array, "stack ..."]) -> Int[Array, "stack ..."]:
    return support


@entry_index.register
def _of_slices(units: Slices, view: MatrixView, support: Int[Array, "stack ..."]) -> Int[Array, "stack ..."]:
    members = support[..., None] * units.group + jnp.arange(units.group, dtype=jnp.int32)
    slices = members if units.group > 1 else support
    if units.axis == "input":
        return slices[..., None] * view.out_size + jnp.arange(view.out_size, dtype=jnp.int32)
    return jnp.arange(view.in_size, dtype=jnp.int32) * view.out_size + slices[..., None]


@entry_index.register
def _of_blocks(units: Blocks, view: MatrixView, support: Int[Array, "stack ..."]) -> Int[Array, "stack ..."]:
    rows, columns, _, across = units.grid(view.in_size, view.out_size)
    row = (support // across * rows)[..., None, None] + jnp.arange(rows, dtype=jnp.int32)[:, None]
    column = (support % across * columns)[..., None, None] + jnp.arange(columns, dtype=jnp.int32)
    exists = (row < view.in_size) & (column < view.out_size)
    return jnp.where(exists, row * view.out_size + column, view.size)


def _lies_in_rows(units: Units, view: MatrixView) -> bool:
    """Whether slots are whole input slices that lie together in memory."""
    return isinstance(units, Slices) and units.axis == "input" and view.is_in_order


def read_slots(
    units: Units,
    view: MatrixView,
    weight: Num[Array, "..."],
    support: Int[Array, "stack ..."],
    divided: Divided | None = None,
) -> Num[Array, "stack ..."]:
    """Returns the entries of a weight that a support frees, (stack, units, *entries of a unit).

    Args:
        units: the subspace.
        view: of the weight; the axes that count layers come first.
        weight: the weight.
        support: the free units.
        divided: how the weight is divided between devices, where that is known.
    """
    if isinstance(units, Everything):
        return units.cut(view.matrices(weight))
    if divided is not None:
        return divided.read(_entries, view, weight, entry_index(units, view, support))
    if _lies_in_rows(units, view):
        return units.gather(view.matrices(weight), support)
    return _entries(view, weight, entry_index(units, view, support))


def _entries(view: MatrixView, weight: Array, index: Array) -> Array:
    index = view.place(index)
    return weight.reshape(view.stack, view.size).at[matrix_numbers(index), index].get(mode="fill", fill_value=0)


def commit_slots(
    units: Units,
    view: MatrixView,
    weight: Num[Array, "..."],
    support: Int[Array, "stack ..."],
    values: Num[Array, "stack ..."],
    divided: Divided | None = None,
) -> Num[Array, "..."]:
    """Returns the weight with its free entries replaced; in place where the weight's memory is donated.

    Args:
        units: the subspace.
        view: of the weight; the axes that count layers come first.
        weight: the weight.
        support: the free units, distinct within a matrix.
        values: what the slots are to be, in the weight's dtype.
        divided: how the weight is divided between devices, where that is known.
    """
    if isinstance(units, Everything):
        return view.weight(units.join(values, view))
    if divided is not None:
        return divided.write(_write_entries, view, weight, entry_index(units, view, support), values)
    # What is read of the weight must be read before, and not once more inside the scatter: that would take a copy.
    values = jax.lax.optimization_barrier(values)
    if weight.dtype.itemsize >= 4:
        return _put(units, view, weight, support, values)
    return jax.lax.platform_dependent(
        *(weight, support, values), cpu=partial(_put_bits, units, view), default=partial(_put, units, view)
    )


def _write_entries(view: MatrixView, weight: Array, index: Array, values: Array) -> Array:
    return commit_slots(_SINGLE, view, weight, index, values)


def commit_moves(
    targets: Sequence[ResolvedTarget],
    leaves: list[Any],
    supports: Sequence[Any],
    weights: Sequence[Array],
    moves: Sequence[Array],
    finite: Bool[Array, ""],
    divided: Sequence[Divided | None] | None = None,
) -> None:
    """Adds moves to the free entries of weights, in place in the list; nothing moves if not all is finite.

    Args:
        targets: the weights.
        leaves: of the parameters; those of the targets are replaced.
        supports: of every target.
        weights: what the free entries are.
        moves: what is added to them, rounded once to the weight's dtype.
        finite: whether the step counts.
        divided: how the weights are divided between devices.
    """
    parts = divided or [None] * len(targets)
    for target, support, weight, move, part in zip(targets, supports, weights, moves, parts, strict=True):
        # Where nothing moves the weight keeps its bits.
        new = jnp.where(finite & (move != 0), (weight.astype(move.dtype) + move).astype(weight.dtype), weight)
        leaf = leaves[target.position]
        leaves[target.position] = commit_slots(target.subspace, target.view, leaf, support, new, part)


def _put(units: Units, view: MatrixView, weight: Array, support: Array, values: Array) -> Array:
    if _lies_in_rows(units, view):
        cut = units.cut(view.matrices(weight))
        return cut.at[matrix_numbers(support), support].set(values, unique_indices=True).reshape(weight.shape)
    index = view.place(entry_index(units, view, support))
    flat = weight.reshape(view.stack, view.size)
    return flat.at[matrix_numbers(index), index].set(values, mode="drop", unique_indices=True).reshape(weight.shape)


def _put_bits(units: Units, view: MatrixView, weight: Array, support: Array, values: Array) -> Array:
    """The same by bits: XLA on CPU widens narrow floats in a scatter, and does not keep all of them."""
    bits = jnp.dtype(f"uint{8 * weight.dtype.itemsize}")
    as_bits = partial(jax.lax.bitcast_convert_type, new_dtype=bits)
    return jax.lax.bitcast_convert_type(_put(units, view, as_bits(weight), support, as_bits(values)), weight.dtype)
