"""What the updates of all engines have in common."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from jaxsparse.engine.places import NOTHING
from jaxsparse.select.schedules import value_at
from jaxsparse.subspaces.targets import is_masked

__all__ = ["all_finite", "at_rate", "nothing_but"]


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Returns whether no array of a tree holds NaN or infinity."""
    return jnp.array([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)], bool).all()


def at_rate(steps: Any, learning_rate: optax.ScalarOrSchedule | None, step: Array) -> Any:
    """Returns -learning_rate(step) times what an inner optimizer says; without a rate, what it says."""
    if learning_rate is None:
        return steps
    rate = value_at(learning_rate, step)
    return jax.tree.map(lambda leaf: -rate * leaf, steps)


def nothing_but(updates: Any, moves: Mapping[int, Array]) -> Any:
    """Returns a tree of updates that moves some weights, and leaves all others their bits.

    Args:
        updates: what came in, for its structure, shapes and dtypes; `optax.MaskedNode`s stay.
        moves: updates by their weight's position among the leaves.
    """
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_masked)
    filled = [leaf if is_masked(leaf) else jnp.full_like(leaf, NOTHING) for leaf in leaves]
    for position, move in moves.items():
        filled[position] = move
    return jax.tree.unflatten(structure, filled)
