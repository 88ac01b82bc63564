"""Where the slots of all targets lie: a support for every matrix, or one support over all of them."""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxsparse.subspaces.targets import ResolvedTarget, is_masked
from jaxsparse.subspaces.units import Units, follow

__all__ = ["GlobalPlaces", "GlobalSupport", "MatrixPlaces", "Moved", "Places", "leaves_of"]

# -0.0 is the number that changes nothing when it is added; +0.0 would turn a frozen -0.0 into +0.0.
NOTHING = -0.0


def leaves_of(targets: Sequence[ResolvedTarget], tree: Any) -> list[Any]:
    """Returns a tree's nodes at the targets; by position, since NNX hands over two kinds of trees for one model."""
    leaves = jax.tree.leaves(tree, is_leaf=is_masked)
    return [leaves[target.position] for target in targets]


@dataclass(frozen=True)
class Moved:
    """How the slots of one array follow their units; a leaf in trees.

    Attributes:
        follow: from (values, newcomer) to the values rearranged, `newcomer` for units without a value.
    """

    follow: Callable[[Array, Any], Array]


class Places(abc.ABC):
    """Supports and slots of all targets, as trees.

    Args:
        subspace: how matrices are cut into units.
        targets: the weights that may move.
        structure: the parameters' tree structure.
    """

    def __init__(self, subspace: Units, targets: Sequence[ResolvedTarget], structure: Any) -> None:
        self.subspace, self.targets, self.structure = subspace, targets, structure

    def spread(self, values: Sequence[Any]) -> Any:
        """Puts one value per target into a tree shaped like the parameters, MaskedNode everywhere else."""
        leaves: list[Any] = [optax.MaskedNode()] * self.structure.num_leaves
        for target, value in zip(self.targets, values, strict=True):
            leaves[target.position] = value
        return jax.tree.unflatten(self.structure, leaves)

    @abc.abstractmethod
    def empty(self, counts: Sequence[int]) -> Any:
        """Returns supports to start from."""

    @abc.abstractmethod
    def pick(self, unit_scores: list[Array], old: Any) -> Any:
        """Returns the supports of the units with the largest scores, as many as there were."""

    @abc.abstractmethod
    def gather(self, matrices: list[Array], support: Any) -> Any:
        """Returns the slots of dense matrices."""

    @abc.abstractmethod
    def scatter(self, support: Any, slots: Any) -> list[Array]:
        """Returns dense matrices with the slots in their places, and -0.0 elsewhere."""

    @abc.abstractmethod
    def moved(self, old: Any, new: Any) -> Any:
        """Returns, shaped like the slots, how values follow their units from the old to the new support."""


class MatrixPlaces(Places):
    """A support for every matrix; trees mirror the parameters."""

    def empty(self, counts: Sequence[int]) -> Any:
        """Returns the first units of every matrix."""
        views = (target.view for target in self.targets)
        return self.spread([self.subspace.empty_support(view, n) for view, n in zip(views, counts, strict=True)])

    def pick(self, unit_scores: list[Array], old: Any) -> Any:
        """Returns the best units of every matrix."""
        olds = leaves_of(self.targets, old)
        return self.spread([self.subspace.pick(s, like) for s, like in zip(unit_scores, olds, strict=True)])

    def gather(self, matrices: list[Array], support: Any) -> Any:
        """Returns the slots, a tree."""
        supports = leaves_of(self.targets, support)
        return self.spread([self.subspace.gather(m, s) for m, s in zip(matrices, supports, strict=True)])

    def scatter(self, support: Any, slots: Any) -> list[Array]:
        """Returns dense matrices with the slots in their places, and -0.0 elsewhere."""
        placed = zip(self.targets, leaves_of(self.targets, support), leaves_of(self.targets, slots), strict=True)
        return [self.subspace.scatter(target.view, s, v, NOTHING) for target, s, v in placed]

    def moved(self, old: Any, new: Any) -> Any:
        """Returns how slots follow their units, target by target."""
        return jax.tree.map(
            lambda old, new: Moved(lambda values, newcomer: follow(values, old, new, newcomer)), old, new
        )


class GlobalSupport(NamedTuple):
    """One support over all matrices; no index spans matrices.

    Attributes:
        matrix: number of the matrix of each unit, counted over targets and their layers.
        unit: number of the unit inside its matrix.
    """

    matrix: Int[Array, " units"]
    unit: Int[Array, " units"]


class GlobalPlaces(Places):
    """One support over all matrices: units compete across targets.

    Slots are one array (units, *entries of a unit), whatever the targets' number. All targets have one dtype, and
    units of one shape.
    """

    def __init__(self, subspace: Units, targets: Sequence[ResolvedTarget], structure: Any) -> None:
        super().__init__(subspace, targets, structure)
        stacks = [target.view.stack for target in targets]
        self.first_matrix = [sum(stacks[:at]) for at in range(len(stacks))]

    def empty(self, counts: Sequence[int]) -> GlobalSupport:
        """Returns a support that frees nothing yet."""
        total = sum(count * target.view.stack for count, target in zip(counts, self.targets, strict=True))
        return GlobalSupport(jnp.full(total, -1, jnp.int32), jnp.zeros(total, jnp.int32))

    def pick(self, unit_scores: list[Array], old: GlobalSupport) -> GlobalSupport:
        """Returns the best units of all matrices; ties to the first matrix, then to the lowest unit."""
        total = old.matrix.shape[0]
        best = jnp.full(total, -jnp.inf, unit_scores[0].dtype)
        matrix, unit = GlobalSupport(jnp.full(total, -1, jnp.int32), jnp.zeros(total, jnp.int32))
        for first, scores in zip(self.first_matrix, unit_scores, strict=True):
            values, units = jax.lax.top_k(scores, min(total, scores.shape[1]))
            numbers = jnp.broadcast_to(first + jnp.arange(scores.shape[0], dtype=jnp.int32)[:, None], units.shape)
            # A pool of the best so far: memory stays at the size of the support, and no index spans matrices.
            best, chosen = jax.lax.top_k(jnp.concatenate([best, values.reshape(-1)]), total)
            matrix = jnp.concatenate([matrix, numbers.reshape(-1)])[chosen]
            unit = jnp.concatenate([unit, units.reshape(-1)])[chosen]
        return GlobalSupport(matrix, unit)

    def _rows(self, support: GlobalSupport) -> list[Array]:
        """For each target the matrix of each unit within it, or one past the end where it lies in another target."""
        rows = []
        for first, target in zip(self.first_matrix, self.targets, strict=True):
            row = support.matrix - first
            rows.append(jnp.where((row >= 0) & (row < target.view.stack), row, target.view.stack))
        return rows

    def gather(self, matrices: list[Array], support: GlobalSupport) -> Array:
        """Returns the slots, one array."""
        slots: Any = 0
        for rows, dense in zip(self._rows(support), matrices, strict=True):
            slots = slots + self.subspace.cut(dense).at[rows, support.unit].get(mode="fill", fill_value=0)
        return slots

    def scatter(self, support: GlobalSupport, slots: Array) -> list[Array]:
        """Returns dense matrices with the slots in their places, and -0.0 elsewhere."""
        dense = []
        for rows, target in zip(self._rows(support), self.targets, strict=True):
            units = self.subspace.filled(target.view, NOTHING, slots.dtype)
            dense.append(self.subspace.join(units.at[rows, support.unit].set(slots, mode="drop"), target.view))
        return dense

    def moved(self, old: GlobalSupport, new: GlobalSupport) -> Moved:
        """Returns how slots follow their units."""
        total = old.matrix.shape[0]
        matrix, unit = (jnp.concatenate(pair) for pair in zip(old, new, strict=True))
        is_new = jnp.repeat(jnp.array([0, 1]), total)
        order = jnp.lexsort((is_new, unit, matrix))
        before = jnp.roll(order, 1)
        stayed = (matrix[order] == matrix[before]) & (unit[order] == unit[before]) & (is_new[order] > is_new[before])
        source = jnp.full(2 * total, -1).at[order].set(jnp.where(stayed, before, -1))[total:]

        def rearrange(values: Array, newcomer: Any) -> Array:
            keep = (source >= 0).reshape(-1, *[1] * (values.ndim - 1))
            return jnp.where(keep, values[source], newcomer).astype(values.dtype)

        return Moved(rearrange)
