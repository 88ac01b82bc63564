"""Rules of operations that change how a weight lies in memory, and not what it is."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives

from jaxsparse.engine.rules import first_followed, is_followed, register_rule
from jaxsparse.engine.slotted import INPUT, OUTPUT, Role, SlottedWeight, UnsupportedUseError

__all__: list[str] = []


def _same_axes(primitive: Any) -> None:
    @register_rule(primitive)
    def _unchanged(params: dict[str, Any], weight: Any, *others: Any) -> Sequence[Any]:
        if not is_followed(weight):
            raise UnsupportedUseError(first_followed(others).path, f"primitive {primitive}")
        return [_replace(weight, primitive.bind(weight.base, *others, **params))]


def _replace(weight: SlottedWeight, base: Any, **changes: Any) -> SlottedWeight:
    fields = {"slots": weight.slots, "rule": weight.rule, "roles": weight.roles, "path": weight.path} | changes
    return SlottedWeight(base, **fields)


for _primitive in (
    *(primitives.convert_element_type_p, primitives.copy_p, primitives.sharding_constraint_p),
    *(primitives.reduce_precision_p, primitives.name_p),
):
    _same_axes(_primitive)


@register_rule(primitives.stop_gradient_p)
def _stop_gradient(params: dict[str, Any], weight: SlottedWeight) -> Sequence[Any]:
    return [weight.base]  # nothing comes back from here, so nobody needs to follow it


@register_rule(lax.optimization_barrier_p)
def _optimization_barrier(params: dict[str, Any], *values: Any) -> Sequence[Any]:
    bases = lax.optimization_barrier_p.bind(*(value.base if is_followed(value) else value for value in values))
    return [_replace(value, base) if is_followed(value) else base for value, base in zip(values, bases, strict=True)]


@register_rule(primitives.transpose_p)
def _transpose(params: dict[str, Any], weight: SlottedWeight) -> Sequence[Any]:
    order, layers = params["permutation"], weight.layers
    if tuple(order[:layers]) != tuple(range(layers)):
        raise UnsupportedUseError(weight.path, f"a transpose {tuple(order)} that moves its layer axes")
    roles = tuple(weight.roles[axis - layers] for axis in order[layers:])
    return [_replace(weight, lax.transpose(weight.base, order), roles=roles)]


@register_rule(primitives.reshape_p)
def _reshape(params: dict[str, Any], weight: SlottedWeight) -> Sequence[Any]:
    layers, new = weight.layers, tuple(params["new_sizes"])
    if new[:layers] != weight.base.shape[:layers]:
        raise UnsupportedUseError(weight.path, f"a reshape of its layer axes, {weight.base.shape} to {new}")
    roles = _reshaped_roles(weight, weight.base.shape[layers:], new[layers:])
    return [_replace(weight, lax.reshape(weight.base, new), roles=roles)]


def _reshaped_roles(weight: SlottedWeight, old: Sequence[int], new: Sequence[int]) -> tuple[Role, ...]:
    """The roles of the new axes: an axis may split, and neighbours of one kind may merge, in their order."""
    keys: list[tuple[str, int, int]] = []
    at, after = 0, 0
    while after < len(new) or at < len(old):
        first, first_new = at, after
        size, size_new = 1, 1
        at, size = (at + 1, size * old[at]) if at < len(old) else (at, size)
        after, size_new = (after + 1, size_new * new[after]) if after < len(new) else (after, size_new)
        while size != size_new:
            if size < size_new:
                at, size = at + 1, size * old[at]
            else:
                after, size_new = after + 1, size_new * new[after]
        group = [weight.roles[axis] for axis in range(first, at)]
        if not group:  # trailing axes of size 1 belong to what came before
            group = [(keys[-1][0], keys[-1][1])] if keys else [weight.roles[0]]
        kind, place = group[0]
        if group != [(kind, place + step) for step in range(len(group))]:
            raise UnsupportedUseError(weight.path, f"a reshape of {tuple(old)} to {tuple(new)} that mixes its axes")
        keys += [(kind, place, axis) for axis in range(first_new, after)]
    order = {kind: sorted(key for key in keys if key[0] == kind) for kind in (INPUT, OUTPUT)}
    return tuple((key[0], order[key[0]].index(key)) for key in keys)


# Taking one layer out of a stack.


@register_rule(primitives.slice_p)
def _slice(params: dict[str, Any], weight: SlottedWeight) -> Sequence[Any]:
    starts, ends = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * len(starts)
    layers = weight.layers
    if not layers or any(
        (s, e, d) != (0, n, 1) for s, e, d, n in _last(layers, starts, ends, steps, weight.base.shape)
    ):
        raise UnsupportedUseError(weight.path, f"a slice {starts} to {ends} of {weight.base.shape}")

    def cut(leaf: Any) -> Any:
        rest = leaf.ndim - layers
        return lax.slice(
            leaf,
            (*starts[:layers], *[0] * rest),
            (*ends[:layers], *leaf.shape[layers:]),
            (*steps[:layers], *[1] * rest),
        )

    return [_replace(weight, cut(weight.base), slots=jax.tree.map(cut, weight.slots))]


def _last(layers: int, *columns: Sequence[int]) -> list[tuple[int, ...]]:
    return list(zip(*(column[layers:] for column in columns), strict=True))


@register_rule(primitives.dynamic_slice_p)
def _dynamic_slice(params: dict[str, Any], weight: Any, *starts: Any) -> Sequence[Any]:
    if not is_followed(weight) or any(is_followed(start) for start in starts):
        raise UnsupportedUseError(first_followed((weight, *starts)).path, "an index")
    layers, sizes = weight.layers, params["slice_sizes"]
    if tuple(sizes[layers:]) != weight.base.shape[layers:]:
        raise UnsupportedUseError(weight.path, f"a dynamic slice of sizes {tuple(sizes)} of {weight.base.shape}")

    def cut(leaf: Any) -> Any:
        zeros = [jnp.zeros((), jnp.int32)] * (leaf.ndim - layers)
        begin = [jnp.asarray(start, jnp.int32) for start in starts[:layers]]
        return lax.dynamic_slice(leaf, [*begin, *zeros], (*sizes[:layers], *leaf.shape[layers:]))

    return [_replace(weight, cut(weight.base), slots=jax.tree.map(cut, weight.slots))]


@register_rule(primitives.squeeze_p)
def _squeeze(params: dict[str, Any], weight: SlottedWeight) -> Sequence[Any]:
    gone = sorted(axis % weight.base.ndim for axis in params["dimensions"])
    layers = [axis for axis in gone if axis < weight.layers]
    roles = tuple(role for at, role in enumerate(weight.roles) if at + weight.layers not in gone)
    slots = jax.tree.map(lambda leaf: lax.squeeze(leaf, layers), weight.slots)
    return [_replace(weight, lax.squeeze(weight.base, gone), slots=slots, roles=_renumbered(roles))]


def _renumbered(roles: tuple[Role, ...]) -> tuple[Role, ...]:
    """The same order within each kind, counted from 0 without gaps."""
    order = {kind: sorted(place for role, place in roles if role == kind) for kind in (INPUT, OUTPUT)}
    return tuple((kind, order[kind].index(place)) for kind, place in roles)


@register_rule(primitives.broadcast_in_dim_p)
def _broadcast(params: dict[str, Any], weight: SlottedWeight, *sizes: Any) -> Sequence[Any]:
    shape = tuple(params["shape"])
    if math.prod(shape) != weight.base.size:
        raise UnsupportedUseError(weight.path, f"a broadcast from {weight.base.shape} to {shape}")
    return _reshape({"new_sizes": shape}, weight)
