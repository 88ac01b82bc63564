"""Where the slots of all targets lie: a support for every matrix, or one support over all of them."""

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from jaxsparse.common.errors import InputError
from jaxsparse.subspaces.targets import ResolvedTarget, is_masked
from jaxsparse.subspaces.units import follow

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
        targets: the weights that may move, each with its subspace.
        structure: the parameters' tree structure.
    """

    def __init__(self, targets: Sequence[ResolvedTarget], structure: Any) -> None:
        self.targets, self.structure = targets, structure

    def spread(self, values: Sequence[Any]) -> Any:
        """Puts one value per target into a tree shaped like the parameters, MaskedNode everywhere else."""
        leaves: list[Any] = [optax.MaskedNode()] * self.structure.num_leaves
        for target, value in zip(self.targets, values, strict=True):
            leaves[target.position] = value
        return jax.tree.unflatten(self.structure, leaves)

    @abc.abstractmethod
    def empty(self, model_size: int) -> Any:
        """Returns supports to start from, for a model of so many parameters."""

    @abc.abstractmethod
    def counts(self, support: Any) -> list[int]:
        """Returns how many units may be picked of each target's matrices."""

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

    def empty(self, model_size: int) -> Any:
        """Returns the first units of every matrix."""
        supports: list[Any] = [None] * len(self.targets)
        for subspace in dict.fromkeys(target.subspace for target in self.targets):
            # A subspace shares its budget over its own targets.
            own = [at for at, target in enumerate(self.targets) if target.subspace == subspace]
            for at, count in zip(own, subspace.counts([self.targets[at] for at in own], model_size), strict=True):
                supports[at] = subspace.empty_support(self.targets[at].view, count)
        return self.spread(supports)

    def counts(self, support: Any) -> list[int]:
        """Returns how many units of each matrix are picked."""
        return [leaf.shape[1] for leaf in leaves_of(self.targets, support)]

    def pick(self, unit_scores: list[Array], old: Any) -> Any:
        """Returns the best units of every matrix."""
        picks = zip(self.targets, unit_scores, leaves_of(self.targets, old), strict=True)
        return self.spread([target.subspace.pick(scores, like, target.view) for target, scores, like in picks])

    def gather(self, matrices: list[Array], support: Any) -> Any:
        """Returns the slots, a tree."""
        cuts = zip(self.targets, matrices, leaves_of(self.targets, support), strict=True)
        return self.spread([target.subspace.gather(dense, units) for target, dense, units in cuts])

    def scatter(self, support: Any, slots: Any) -> list[Array]:
        """Returns dense matrices with the slots in their places, and -0.0 elsewhere."""
        placed = zip(self.targets, leaves_of(self.targets, support), leaves_of(self.targets, slots), strict=True)
        return [target.subspace.scatter(target.view, s, v, NOTHING) for target, s, v in placed]

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

    Slots are one array (units, *entries of a unit), whatever the targets' number. All targets have one subspace and
    one dtype. Units that are smaller than those of other targets are filled up with entries that are none: they hold
    0, and nothing is read from them.
    """

    def __init__(self, targets: Sequence[ResolvedTarget], structure: Any) -> None:
        super().__init__(targets, structure)
        stacks = [target.view.stack for target in targets]
        self.first_matrix = [sum(stacks[:at]) for at in range(len(stacks))]

    def empty(self, model_size: int) -> GlobalSupport:
        """Returns a support that frees nothing yet."""
        if len({target.subspace for target in self.targets}) > 1:
            raise InputError("scope='global' needs one subspace for all targets; give none to js.Target")
        total = self.targets[0].subspace.total(self.targets, model_size)
        return GlobalSupport(jnp.full(total, -1, jnp.int32), jnp.zeros(total, jnp.int32))

    def counts(self, support: GlobalSupport) -> list[int]:
        """Returns the number of all units: they may all lie in one matrix."""
        return [support.matrix.shape[0]] * len(self.targets)

    def pick(self, unit_scores: list[Array], old: GlobalSupport) -> GlobalSupport:
        """Returns the best units of all matrices; ties to the first matrix, then to the lowest unit."""
        pool = self.no_pool(old, unit_scores[0].dtype)
        for at, scores in enumerate(unit_scores):
            pool = self.pooled(pool, at, scores)
        return pool[1]

    def no_pool(self, old: GlobalSupport, dtype: jnp.dtype) -> tuple[Array, GlobalSupport]:
        """Returns an empty pool, (scores, units), as large as a support."""
        total = old.matrix.shape[0]
        nowhere = GlobalSupport(jnp.full(total, -1, jnp.int32), jnp.zeros(total, jnp.int32))
        return jnp.full(total, -jnp.inf, dtype), nowhere

    def pooled(self, pool: tuple[Array, GlobalSupport], at: int, scores: Array) -> tuple[Array, GlobalSupport]:
        """Returns the best of a pool and of the units (stack, units) of target `at`."""
        # A pool of the best so far: memory stays at the size of the support, and no index spans matrices.
        best, (matrix, unit) = pool
        total = best.shape[0]
        values, units = jax.lax.top_k(scores, min(total, scores.shape[1]))
        first = self.first_matrix[at]
        numbers = jnp.broadcast_to(first + jnp.arange(scores.shape[0], dtype=jnp.int32)[:, None], units.shape)
        best, chosen = jax.lax.top_k(jnp.concatenate([best, values.reshape(-1)]), total)
        matrix = jnp.concatenate([matrix, numbers.reshape(-1)])[chosen]
        unit = jnp.concatenate([unit, units.reshape(-1)])[chosen]
        return best, GlobalSupport(matrix, unit)

    def _rows(self, support: GlobalSupport) -> list[Array]:
        """For each target the matrix of each unit within it, or one past the end where it lies in another target."""
        rows = []
        for first, target in zip(self.first_matrix, self.targets, strict=True):
            row = support.matrix - first
            rows.append(jnp.where((row >= 0) & (row < target.view.stack), row, target.view.stack))
        return rows

    def _unit_shapes(self) -> list[tuple[int, ...]]:
        """For each target the shape of a unit."""
        return [target.subspace.shape(target.view)[2:] for target in self.targets]

    def gather(self, matrices: list[Array], support: GlobalSupport) -> Array:
        """Returns the slots, one array."""
        shapes = self._unit_shapes()
        largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
        slots: Any = 0
        for rows, dense, shape in zip(self._rows(support), matrices, shapes, strict=True):
            units = self.targets[0].subspace.cut(dense).at[rows, support.unit].get(mode="fill", fill_value=0)
            missing = [(0, most - size) for most, size in zip(largest, shape, strict=True)]
            slots = slots + jnp.pad(units, [(0, 0), *missing])
        return slots

    def scatter(self, support: GlobalSupport, slots: Array) -> list[Array]:
        """Returns dense matrices with the slots in their places, and -0.0 elsewhere."""
        dense = []
        for rows, target, shape in zip(self._rows(support), self.targets, self._unit_shapes(), strict=True):
            units = target.subspace.filled(target.view, NOTHING, slots.dtype)
            own = slots[(slice(None), *(slice(size) for size in shape))]
            dense.append(target.subspace.join(units.at[rows, support.unit].set(own, mode="drop"), target.view))
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
