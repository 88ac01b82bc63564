"""A method written down: the choices that both engines run."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jaxtyping import DTypeLike

from jaxsparse.common.errors import InputError
from jaxsparse.select.carry import Carry, check_carry
from jaxsparse.select.schedules import Schedule
from jaxsparse.select.scores import Score, score_dtype
from jaxsparse.subspaces.budgets import Budget
from jaxsparse.subspaces.coordinates import Coordinates
from jaxsparse.subspaces.targets import Targets

__all__ = ["Description", "SlotsDType", "SubspaceTransformation"]

SlotsDType = DTypeLike | None | Literal["promote"]


@dataclass(frozen=True)
class Description:
    """A method's four choices, and what they are applied to.

    Attributes:
        name: the constructor's name.
        inner: the optimizer of the slots; None: the method only masks gradients.
        subspace: where a weight may move.
        score: which subspace of that kind is picked.
        schedule: when it is picked again.
        carry: what then happens to the inner optimizer's moments.
        budget: how many slots each target gets.
        targets: which weights may move; None: the attention projections of a known model.
        slots_dtype: "promote": slots and masters are kept in promote_types(weight dtype, float32); None: in the
            weight's own dtype without masters, as the papers' code does; or a dtype.
        seed: source of all randomness of the method.
    """

    name: str
    inner: optax.GradientTransformationExtraArgs | None
    subspace: Coordinates
    score: Score
    schedule: Schedule
    carry: Carry
    budget: Budget
    targets: Targets = None
    slots_dtype: SlotsDType = "promote"
    seed: Any = 0

    def __post_init__(self) -> None:
        check_carry(self.carry)
        if self.inner is not None and not isinstance(self.inner, optax.GradientTransformation):
            raise TypeError(
                f"{self.name}: the inner optimizer must be an optax.GradientTransformation, got {self.inner!r}"
            )
        if self.slots_dtype not in (None, "promote") and not jnp.issubdtype(self.slots_dtype, jnp.floating):
            raise InputError(f"slots_dtype must be a floating-point dtype, None or 'promote', got {self.slots_dtype!r}")

    def slot_dtype(self, weight_dtype: jnp.dtype) -> jnp.dtype:
        """Returns the dtype of the slots of a weight.

        Raises:
            InputError: the slots' dtype cannot hold the weight's values.
        """
        if self.slots_dtype is None:
            return jnp.dtype(weight_dtype)
        if isinstance(self.slots_dtype, str) and self.slots_dtype == "promote":
            return score_dtype(weight_dtype)
        dtype = jnp.dtype(self.slots_dtype)
        if jnp.promote_types(dtype, weight_dtype) != dtype:
            raise InputError(
                f"slots_dtype={dtype} cannot hold weights of {weight_dtype}; use 'promote' or a wider dtype"
            )
        return dtype


class SubspaceTransformation(optax.GradientTransformationExtraArgs):
    """An optax gradient transformation that still knows the description it runs.

    Attributes:
        description: the method's choices.
    """

    description: Description

    def __new__(
        cls, init: Callable[..., Any], update: Callable[..., Any], description: Description
    ) -> "SubspaceTransformation":
        """Makes the (init, update) pair that optax knows and remembers the description."""
        transformation = super().__new__(cls, init, update)
        transformation.description = description
        return transformation
