"""What a refresh does to the inner optimizer's moments."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Int, Num

from jaxsparse.common.errors import InputError

__all__ = ["Carry", "carry_inner_state", "check_carry", "follow_coordinate"]

Carry = Literal["slot", "coordinate", "reset"]


@dataclass(frozen=True)
class _Moved:
    """The old and new support of one target, kept together as a leaf."""

    old: Int[Array, "stack k"]
    new: Int[Array, "stack k"]


def check_carry(carry: str) -> None:
    """Raises an InputError for an unknown carry."""
    if carry not in get_args(Carry):
        raise InputError(f"carry must be one of {', '.join(map(repr, get_args(Carry)))}, got {carry!r}")


def follow_coordinate(
    values: Num[Array, "stack k"], old: Int[Array, "stack k"], new: Int[Array, "stack k"], newcomer: ArrayLike
) -> Num[Array, "stack k"]:
    """Rearranges values of slots so that they stay with their coordinates.

    Args:
        values: one number per slot of the old support.
        old: flat indices of the old support, distinct within a matrix.
        new: flat indices of the new support.
        newcomer: value of coordinates that the old support lacks; a scalar, or one per new slot.

    Returns:
        One number per slot of the new support.

    Example:
        >>> import jax.numpy as jnp
        >>> follow_coordinate(jnp.array([[1.0, 2.0]]), jnp.array([[7, 4]]), jnp.array([[4, 9]]), 0.0)
        Array([[2., 0.]], dtype=float32)
    """
    order = jnp.argsort(old, axis=-1)
    place = jax.vmap(jnp.searchsorted)(jnp.take_along_axis(old, order, axis=-1), new)
    slot = jnp.take_along_axis(order, jnp.minimum(place, old.shape[-1] - 1), axis=-1)
    stayed = jnp.take_along_axis(old, slot, axis=-1) == new
    return jnp.where(stayed, jnp.take_along_axis(values, slot, axis=-1), newcomer).astype(values.dtype)


def carry_inner_state(
    carry: Carry,
    inner: optax.GradientTransformation,
    inner_state: Any,
    slots: Any,
    old_support: Any,
    new_support: Any,
) -> Any:
    """Returns the inner optimizer's state for a new support.

    Args:
        carry: "slot": slot j keeps its moments for its new coordinate (GASDU, appendix F); "coordinate": a
            coordinate that stays keeps its moments, a newcomer's start afresh; "reset": everything starts
            afresh, step count included.
        inner: the inner optimizer.
        inner_state: its state.
        slots: zeros, a tree of (stack, k) arrays, as the inner optimizer was initialised with.
        old_support: tree of int32 (stack, k) flat indices before the refresh, structured as `slots`.
        new_support: the same after it.

    Returns:
        A state of the same structure, shapes and dtypes.
    """
    if carry == "slot":
        return inner_state
    fresh = inner.init(slots)
    if carry == "reset":
        return jax.tree.map(lambda old, new: jnp.asarray(new, jnp.asarray(old).dtype), inner_state, fresh)
    # What mirrors the slots follows its coordinate; the rest, such as Adam's step count, stays.
    supports = jax.tree.map(lambda old, new: _Moved(old, new), old_support, new_support)
    moved_of = optax.tree.map_params(
        inner, lambda _, moved: moved, inner_state, supports, transform_non_params=lambda _: None
    )

    def follow(moved: _Moved | None, old: Any, new: Any) -> Any:
        if moved is None or jnp.shape(old) != moved.old.shape:
            return old
        return follow_coordinate(old, moved.old, moved.new, new)

    return jax.tree.map(
        follow, moved_of, inner_state, fresh, is_leaf=lambda node: node is None or isinstance(node, _Moved)
    )
