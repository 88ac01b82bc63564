"""Followed weights inside `jax.shard_map`: every device sees its shard of the weight, and slots of that shard."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import singledispatch
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Int

from jaxsparse.engine.rules import as_closed, is_followed, register_rule
from jaxsparse.engine.slot_rules import EntrySlots, SliceSlots
from jaxsparse.engine.slotted import INPUT, OUTPUT, SlotRule, SlottedWeight, UnsupportedUseError

__all__ = ["Shard", "map_shards", "of_shard"]


@dataclass(frozen=True)
class Shard:
    """The part of a matrix that one device sees.

    Attributes:
        sizes: for inputs and for outputs the sizes of the whole weight's axes, in the matrix's order.
        own: the sizes of this part.
        starts: where it begins.
    """

    sizes: dict[str, tuple[int, ...]]
    own: dict[str, tuple[int, ...]]
    starts: dict[str, tuple[Any, ...]]

    def is_whole(self, kind: str) -> bool:
        """Whether all inputs, or all outputs, are here."""
        return self.sizes[kind] == self.own[kind]

    def number(self, kind: str, number: Int[Array, "..."]) -> tuple[Array, Array]:
        """Returns whether inputs or outputs are here, and the numbers that they have here, 0 for the others."""
        here, local, stride = jnp.ones(number.shape, bool), jnp.zeros_like(number), 1
        for size, own, start in reversed(list(zip(self.sizes[kind], self.own[kind], self.starts[kind], strict=True))):
            at, number = number % size - start, number // size
            here, local, stride = here & (at >= 0) & (at < own), local + at * stride, stride * own
        here &= number == 0  # not beyond the matrix
        return here, jnp.where(here, local, 0)

    def cut(self, kind: str, values: Array) -> Array:
        """Returns this part of values, whose last axis counts inputs, or outputs."""
        rest = values.shape[:-1]
        split = values.reshape(*rest, *self.sizes[kind])
        starts = [jnp.asarray(start, jnp.int32) for start in (*[0] * len(rest), *self.starts[kind])]
        own = lax.dynamic_slice(split, starts, (*rest, *self.own[kind]))
        return own.reshape(*rest, -1)


@singledispatch
def of_shard(rule: SlotRule, slots: Any, shard: Shard) -> tuple[SlotRule, Any]:
    """Returns rule and slots of one matrix as they are for a part of it; slots elsewhere get the gradient 0.

    Args:
        rule: what the slots are.
        slots: the rule's arrays, of the whole matrix.
        shard: the part.

    Raises:
        NotImplementedError: there is no way for this rule.
    """
    raise NotImplementedError


@of_shard.register
def _(rule: EntrySlots, slots: Any, shard: Shard) -> tuple[SlotRule, Any]:
    here, row = shard.number(INPUT, slots["support"] // rule.outputs)
    there, column = shard.number(OUTPUT, slots["support"] % rule.outputs)
    outputs = math.prod(shard.own[OUTPUT])
    support = jnp.where(here & there, row * outputs + column, math.prod(shard.own[INPUT]) * outputs)
    by_output = rule.by_output and shard.is_whole(OUTPUT)
    return EntrySlots(outputs, by_output), {"support": support, "probe": slots["probe"]}


@of_shard.register
def _(rule: SliceSlots, slots: Any, shard: Shard) -> tuple[SlotRule, Any]:
    kind, other = (INPUT, OUTPUT) if rule.units.axis == "input" else (OUTPUT, INPUT)
    support, probe = slots["support"], slots["probe"]
    probe = shard.cut(other, probe)
    if shard.is_whole(kind):
        return rule, {"support": support, "probe": probe}
    if rule.units.group != 1:
        raise NotImplementedError
    here, support = shard.number(kind, support)
    return rule, {"support": support, "probe": jnp.where(here.reshape(-1, *[1] * (probe.ndim - 1)), probe, 0)}


def map_shards(params: dict[str, Any], values: Sequence[Any], evaluate: Callable[..., list[Any]]) -> Sequence[Any]:
    """Maps a function over shards of arrays and followed weights.

    Args:
        params: what `jax.shard_map` was told.
        values: the arrays and weights.
        evaluate: evaluates a jaxpr on such.

    Raises:
        UnsupportedUseError: a weight is divided between devices, and its slots are of a kind of which nobody knows how
            to divide them; or it is a result of the function.
    """
    mesh, specs = params["mesh"], params["in_specs"]

    def body(*shards: Any) -> Sequence[Any]:
        own = [_own(value, spec, mesh) for value, spec in zip(shards, specs, strict=True)]
        outputs = evaluate(as_closed(params["jaxpr"]), own)
        for output in outputs:
            if is_followed(output):
                raise UnsupportedUseError(output.path, "a result of jax.shard_map")
        return tuple(outputs)

    in_specs = tuple(_spec(value, spec) for value, spec in zip(values, specs, strict=True))
    mapped = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=tuple(params["out_specs"]),
        check_vma=params["check_vma"],
        axis_names=params["newly_manual_axes"],
    )
    return mapped(*values)


def _spec(value: Any, spec: PartitionSpec) -> Any:
    """How a value is divided; slots are divided as layers are, and otherwise whole on every device."""
    if not is_followed(value):
        return spec
    layers = PartitionSpec(*tuple(spec)[: value.layers])
    return replace(value, base=spec, slots=jax.tree.map(lambda _: layers, value.slots))


def _own(value: Any, spec: PartitionSpec, mesh: Any) -> Any:
    """A device's part of a weight, with slots of its own."""
    if not is_followed(value):
        return value
    names = [axes if isinstance(axes, tuple) else (axes,) if axes else () for axes in spec]
    names += [()] * (value.base.ndim - len(names))
    divided = tuple(name for axes in names[value.layers :] for name in axes)
    if not divided:
        return value
    # Where JAX keeps account of what varies, slots must vary as the weight does.
    slots = _varied(value.slots, tuple(name for name in divided if name in _varies_over(value.base)))

    def by_kind(of_axis: Callable[[int], Any]) -> dict[str, tuple[Any, ...]]:
        return {kind: tuple(of_axis(axis) for axis in value.axes(kind)) for kind in (INPUT, OUTPUT)}

    own = value.base.shape
    shard = Shard(
        sizes=by_kind(lambda axis: own[axis] * math.prod(tuple(mesh.shape[name] for name in names[axis]))),
        own=by_kind(lambda axis: own[axis]),
        starts=by_kind(lambda axis: lax.axis_index(names[axis]) * own[axis] if names[axis] else 0),
    )
    rules: list[SlotRule] = []

    def of_matrix(slots: Any) -> Any:
        rule, slots = of_shard(value.rule, slots, shard)
        rules.append(rule)
        return slots

    for _ in range(value.layers):
        of_matrix = jax.vmap(of_matrix)
    try:
        slots = of_matrix(slots)
    except NotImplementedError:
        raise UnsupportedUseError(
            value.path, f"jax.shard_map, which divides {type(value.rule).__name__} between devices"
        ) from None
    return replace(value, slots=slots, rule=rules[0])


def _varies_over(array: Array) -> frozenset[Any]:
    """The axes of the mesh over which devices hold different values, as far as JAX keeps account."""
    kind = jax.typeof(array)
    return kind.mat.varying if hasattr(kind, "mat") else kind.vma


def _varied(slots: Any, names: tuple[Any, ...]) -> Any:
    """Slots marked as varying over axes of the mesh; their gradients are then summed over these."""

    def mark(leaf: Array) -> Array:
        new = tuple(name for name in names if name not in _varies_over(leaf))
        return lax.pcast(leaf, new, to="varying") if new else leaf

    return jax.tree.map(mark, slots)


@register_rule("pvary")
def _pvary(params: dict[str, Any], weight: SlottedWeight) -> Sequence[Any]:
    names = tuple(params["axes"])
    return [replace(weight, base=lax.pcast(weight.base, names, to="varying"), slots=_varied(weight.slots, names))]
