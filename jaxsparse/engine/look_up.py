"""Rows of an embedding table that is followed: slots' gradients out of the rows' cotangents, never a table of them."""

from dataclasses import dataclass, replace
from functools import partial, singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives
from jaxtyping import Array, Float, Int

from jaxsparse.engine.slot_rules import BlockSlots, EntrySlots, PickedSlots, SliceSlots
from jaxsparse.engine.slotted import INPUT, OUTPUT, SlotRule, SlottedWeight, UnsupportedUseError, as_matrix, cast_like

__all__ = ["RowGradient", "look_up", "slots_of_rows"]


@dataclass(frozen=True)
class RowGradient:
    """The gradient of a table of which some rows were looked up; all others have none.

    Attributes:
        numbers: which rows, sorted; a row that was looked up n times stands here n times.
        sums: at the last of the equal numbers the row's gradient.
    """

    numbers: Int[Array, " tokens"]
    sums: Float[Array, "tokens features"]

    def rows(self, wanted: Int[Array, "..."]) -> Float[Array, "... features"]:
        """Returns whole rows of the gradient."""
        found, at = self._place(wanted)
        return jnp.where(found[..., None], self.sums[at], 0)

    def entries(self, rows: Int[Array, "..."], columns: Int[Array, "..."]) -> Float[Array, "..."]:
        """Returns single entries of the gradient."""
        found, at = self._place(rows)
        return jnp.where(found, self.sums[at, columns], 0)

    def columns(self, wanted: Int[Array, " k"], table: int) -> Float[Array, "k table"]:
        """Returns whole columns of the gradient, of a table with so many rows."""
        last = jnp.append(self.numbers[1:] != self.numbers[:-1], True)
        place = jnp.where(last, self.numbers, table)
        dense = jnp.zeros((table, wanted.shape[0]), self.sums.dtype)
        return dense.at[place].set(self.sums[:, wanted], mode="drop").T

    def _place(self, rows: Array) -> tuple[Array, Array]:
        at = jnp.maximum(jnp.searchsorted(self.numbers, rows, side="right") - 1, 0)
        return self.numbers[at] == rows, at


def _row_gradient(numbers: Int[Array, " tokens"], cotangents: Float[Array, "tokens features"]) -> RowGradient:
    """Adds up the cotangents of equal rows; without a scatter, which GPUs do slowly where indices repeat."""
    order = jnp.argsort(numbers)
    numbers = numbers[order]
    values = cotangents[order].astype(jnp.promote_types(cotangents.dtype, jnp.float32))
    starts = jnp.append(True, numbers[1:] != numbers[:-1])

    def add(first: Any, second: Any) -> Any:
        return first[0] | second[0], jnp.where(second[0], second[1], first[1] + second[1])

    return RowGradient(numbers, lax.associative_scan(add, (starts[:, None], values))[1])


@singledispatch
def slots_of_rows(rule: SlotRule, slots: Any, gradient: RowGradient, table: int) -> Any:
    """Returns the cotangents of the slots of a table, None for arrays that are not differentiated.

    Args:
        rule: what the slots are.
        slots: the rule's arrays.
        gradient: the table's gradient.
        table: number of rows of the table.

    Raises:
        NotImplementedError: there is no way for this rule.
    """
    raise NotImplementedError


@slots_of_rows.register
def _(rule: EntrySlots, slots: Any, gradient: RowGradient, table: int) -> Any:
    found = gradient.entries(slots["support"] // rule.outputs, slots["support"] % rule.outputs)
    return {"support": None, "probe": found}


@slots_of_rows.register
def _(rule: SliceSlots, slots: Any, gradient: RowGradient, table: int) -> Any:
    group = rule.units.group
    members = (slots["support"][:, None] * group + jnp.arange(group, dtype=jnp.int32)).reshape(-1)
    found = gradient.rows(members) if rule.units.axis == "input" else gradient.columns(members, table)
    return {"support": None, "probe": found.reshape(slots["probe"].shape)}


@slots_of_rows.register
def _(rule: BlockSlots, slots: Any, gradient: RowGradient, table: int) -> Any:
    _, rows, columns = slots["probe"].shape
    padded = RowGradient(gradient.numbers, jnp.pad(gradient.sums, ((0, 0), (0, -gradient.sums.shape[1] % columns))))

    def block(number: Array) -> Array:
        band = padded.rows(number // rule.across * rows + jnp.arange(rows, dtype=jnp.int32))
        return lax.dynamic_slice_in_dim(band, number % rule.across * columns, columns, axis=1)

    return {"support": None, "probe": lax.map(block, slots["support"])}


def look_up(table: SlottedWeight, indices: Int[Array, "... 1"], params: dict[str, Any]) -> Float[Array, "..."]:
    """Looks up rows of a followed table.

    Args:
        table: the table, whose inputs are the rows; they must be its only input axis.
        indices: the numbers of the rows.
        params: what `lax.gather` was told.

    Returns:
        The rows; their derivative with respect to the table is the slots' cotangent.

    Raises:
        UnsupportedUseError: something else than rows is looked up, or the table's slots are of a kind of which nobody
            knows how to find the gradients.
    """
    numbers = params["dimension_numbers"]
    axes = table.axes(INPUT)
    whole_rows = tuple(1 if axis in axes else size for axis, size in enumerate(table.base.shape))
    if (
        table.layers
        or len(axes) != 1
        or (numbers.collapsed_slice_dims, numbers.start_index_map) != (axes, axes)
        or numbers.operand_batching_dims
        or tuple(params["slice_sizes"]) != whole_rows
    ):
        raise UnsupportedUseError(
            table.path, "a gather of anything but rows along its one input axis (js.Target.in_axes)"
        )
    if slots_of_rows.dispatch(type(table.rule)) is slots_of_rows.dispatch(object):
        hint = " (a support that js.with_support gives will do)" if isinstance(table.rule, PickedSlots) else ""
        raise UnsupportedUseError(table.path, f"an embedding look-up with {type(table.rule).__name__}{hint}")
    return _looked_up(tuple(params.items()), replace(table, base=None, slots=None), table.base, table.slots, indices)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _looked_up(params: Any, about: SlottedWeight, base: Array, slots: Any, indices: Array) -> Array:
    return primitives.gather_p.bind(base, indices, **dict(params))


def _looked_up_forward(params: Any, about: SlottedWeight, base: Array, slots: Any, indices: Array) -> tuple[Array, Any]:
    return _looked_up(params, about, base, slots, indices), (base, slots, indices)


def _looked_up_backward(params: Any, about: SlottedWeight, residuals: Any, cotangent: Array) -> Any:
    base, slots, indices = residuals
    options, table = dict(params), replace(about, base=base, slots=slots)
    (rows,) = table.axes(INPUT)
    size = base.shape[rows]
    numbers = indices.reshape(-1).astype(jnp.int32)
    if options["mode"] == lax.GatherScatterMode.CLIP:
        numbers = jnp.clip(numbers, 0, size - 1)

    # Where the axes of a row lie in what was looked up.
    offsets = options["dimension_numbers"].offset_dims
    place = dict(zip((axis for axis in range(base.ndim) if axis != rows), offsets, strict=True))
    tokens = [axis for axis in range(cotangent.ndim) if axis not in offsets]
    features = [place[axis] for axis in table.axes(OUTPUT)]
    gradient = _row_gradient(numbers, as_matrix(cotangent, [], tokens, features))
    return None, cast_like(slots, slots_of_rows(table.rule, slots, gradient, size)), None


_looked_up.defvjp(_looked_up_forward, _looked_up_backward)
