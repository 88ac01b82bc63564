"""SpIEL, written down: its choices, and what it keeps of every matrix."""

import math
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.common.errors import InputError
from jaxsparse.engine.description import Method
from jaxsparse.select.schedules import value_at
from jaxsparse.subspaces.budgets import Budget
from jaxsparse.subspaces.targets import ResolvedTarget, Targets, resolve_targets, tree_size
from jaxsparse.subspaces.units import Coordinates

__all__ = ["SM3", "Adam", "Candidates", "Left", "Matrix", "Now", "Spiel"]


class Adam(NamedTuple):
    """Moments that each know how much they have seen.

    Attributes:
        age: int32 number of gradients in each slot's moments, (stack, k).
        mean: of the slot's gradient, biased towards 0 as at that age.
        square: of its square, likewise.
    """

    age: Any
    mean: Any
    square: Any


class SM3(NamedTuple):
    """Sums of squared gradients that a row and a column of entries share.

    Attributes:
        inputs: of every input, (stack, in).
        outputs: of every output, (stack, out).
    """

    inputs: Any
    outputs: Any


class Candidates(NamedTuple):
    """Entries that may grow, watched over the accumulation steps.

    Attributes:
        index: int32 flat indices, (stack, k).
        gradient: sum of the gradients so far.
        square: sum of their squares.
    """

    index: Any
    gradient: Any
    square: Any


class Left(NamedTuple):
    """What the last reselection dropped, for one more step.

    A sum of two numbers of very different size rounds, so that the step which takes a weight back to its base may miss
    it by the last bits. A second one does not.

    Attributes:
        index: int32 flat indices, (stack, k); the matrix's size where the slot dropped nothing.
        base: their base weights.
    """

    index: Any
    base: Any


class Matrix(NamedTuple):
    """The state of one matrix, or of a stack of them: the fields of a `SpielState`, which explains them."""

    support: Any
    delta: Any
    base: Any
    optimizer: Any
    candidates: Any
    left: Any


class Now(NamedTuple):
    """What is due at a step.

    Attributes:
        begins: new candidates are chosen.
        watches: the candidates' gradients are added up.
        reselects: slots are exchanged after the step.
        share: how many of them.
        rate: the learning rate.
    """

    begins: Bool[Array, ""]
    watches: Bool[Array, ""]
    reselects: Bool[Array, ""]
    share: Float[Array, ""]
    rate: Any


@dataclass(frozen=True)
class Spiel(Method):
    """SpIEL, written down.

    Attributes:
        name: the constructor's name.
        budget: free coordinates.
        learning_rate: a value, or a schedule of the method's own step count.
        total_steps: T, after which nothing is exchanged any more.
        grow: "AG", accumulated gradients and Adam, or "MA", moments approximated by SM3.
        reselect_every: S, steps from one reselection to the next.
        accumulation_steps: steps that watch the candidates; the last of them reselects.
        reselection_rate: share of the slots that the second reselection would exchange at step 0.
        decay: how that share falls to 0 at step T.
        b1: decay of Adam's mean.
        b2: decay of Adam's mean square.
        epsilon: keeps the quotient of Adam or SM3 finite.
        weight_decay: of the deltas, decoupled.
        clip: largest global norm of the slots' gradient; None: no limit.
        targets: the weights that may move.
        seed: of the first support.
    """

    name: str
    budget: Budget
    learning_rate: Any
    total_steps: int
    grow: Literal["AG", "MA"]
    reselect_every: int
    accumulation_steps: int
    reselection_rate: Any
    decay: Literal["linear", "cosine"]
    b1: Any
    b2: Any
    epsilon: Any
    weight_decay: Any
    clip: Any
    targets: Targets
    seed: Any

    @property
    def trains(self) -> bool:
        """Always: SpIEL brings its own optimizer."""
        return True

    @property
    def subspace_name(self) -> str:
        """Coordinates, whatever becomes of them."""
        return "coordinates"

    def resolve(self, tree: Any) -> list[ResolvedTarget]:
        """Returns the targets in a tree shaped like the parameters."""
        targets = resolve_targets(tree, self.targets)
        for target in targets:
            if target.subspace is not None:
                raise InputError(f"{self.name} trains coordinates: the js.Target of {target.path} can have no subspace")
        return targets

    def moving(self, params: Any) -> list[int]:
        """Returns the positions of the targets."""
        return [target.position for target in self.resolve(params)]

    def counts(self, params: Any) -> list[int]:
        """Returns k for each target."""
        return Coordinates(self.budget).counts(self.resolve(params), tree_size(params))

    def slots(self, params: Any) -> Any:
        """Returns the shapes of the deltas, a list."""
        pairs = zip(self.resolve(params), self.counts(params), strict=True)
        return [jax.ShapeDtypeStruct((target.view.stack, count), jnp.float32) for target, count in pairs]

    def share(self, steps: Int[Array, ""]) -> Float[Array, ""]:
        """Returns p, the share of the slots that are exchanged after a step: all of them the first time."""
        done = steps + 1
        part = jnp.minimum(done / self.total_steps, 1)
        falling = (1 + jnp.cos(math.pi * part)) / 2 if self.decay == "cosine" else 1 - part
        return jnp.where(done == self.accumulation_steps, 1.0, self.reselection_rate * falling)

    def now(self, steps: Int[Array, ""]) -> Now:
        """Returns what is due after so many steps."""
        place = steps % self.reselect_every
        return Now(
            begins=place == 0,
            watches=place < self.accumulation_steps,
            reselects=place == self.accumulation_steps - 1,
            share=self.share(steps),
            rate=value_at(self.learning_rate, steps),
        )

    @property
    def parts(self) -> Any:
        """The structure of a `Matrix`."""
        if self.grow == "AG":
            return jax.tree.structure(Matrix(0, 0, 0, Adam(0, 0, 0), Candidates(0, 0, 0), Left(0, 0)))
        return jax.tree.structure(Matrix(0, 0, 0, SM3(0, 0), (), Left(0, 0)))
