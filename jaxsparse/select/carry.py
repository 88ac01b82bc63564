"""What a refresh does to the inner optimizer's moments."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from jaxsparse.common.errors import InputError

__all__ = ["Carry", "carry_inner_state", "check_carry"]

Carry = Literal["slot", "coordinate", "reset"]


@dataclass(frozen=True)
class _Mirror:
    """A leaf of the slots: its shape, and how its values follow their units."""

    shape: tuple[int, ...]
    moved: Any


def check_carry(carry: str) -> None:
    """Raises an InputError for an unknown carry."""
    if carry not in get_args(Carry):
        raise InputError(f"carry must be one of {', '.join(map(repr, get_args(Carry)))}, got {carry!r}")


def carry_inner_state(
    carry: Carry, inner: optax.GradientTransformation, inner_state: Any, slots: Any, moved: Any
) -> Any:
    """Returns the inner optimizer's state for a new support.

    Args:
        carry: "slot": slot j keeps its moments for its new unit (GASDU, appendix F); "coordinate": a unit that
            stays keeps its moments, a newcomer's start afresh; "reset": everything starts afresh, the step count
            included.
        inner: the inner optimizer.
        inner_state: its state.
        slots: zeros, as the inner optimizer was initialised with.
        moved: structured as `slots`, how values follow their units: leaves with `follow(values, newcomer)`.

    Returns:
        A state of the same structure, shapes and dtypes.
    """
    if carry == "slot":
        return inner_state
    fresh = inner.init(slots)
    if carry == "reset":
        return jax.tree.map(lambda old, new: jnp.asarray(new, jnp.asarray(old).dtype), inner_state, fresh)
    # What mirrors the slots follows its units; the rest, such as Adam's step count, stays.
    mirrored = jax.tree.map(lambda zeros, how: _Mirror(zeros.shape, how), slots, moved)
    try:
        mirrors = optax.tree.map_params(
            inner,
            # An inner optimizer such as optax.partition leaves targets out of parts of its state.
            lambda leaf, mirror: None if isinstance(leaf, optax.MaskedNode) else mirror,
            *(inner_state, mirrored),
            transform_non_params=lambda _: None,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
    except (ValueError, TypeError) as error:
        raise InputError(
            "carry='coordinate' needs an inner optimizer whose state mirrors the slots, which this one's does not; "
            "use carry='slot' or 'reset'"
        ) from error

    def follow(mirror: _Mirror | None, old: Any, new: Any) -> Any:
        if mirror is None or jnp.shape(old) != mirror.shape:
            return old
        return mirror.moved.follow(old, new)

    return jax.tree.map(follow, mirrors, inner_state, fresh, is_leaf=lambda node: node is None)
