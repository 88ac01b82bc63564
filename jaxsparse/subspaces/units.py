"""Subspaces made of units: entries, inputs of a neuron, slices, or everything; blocks.py has those of blocks.

A stack of matrices (stack, in, out) is cut into units: (stack, units, *entries of a unit). A support is an int32 array
(stack, ...) of unit numbers, distinct within a matrix; slots hold the entries of its units, (*support, *entries).
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Num

from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count
from jaxsparse.subspaces.budgets import Budget, check_fraction
from jaxsparse.subspaces.targets import MatrixView, ResolvedTarget, Targets, resolve_targets

__all__ = ["Coordinates", "Everything", "Neurons", "Slices", "Subspace", "Units", "follow", "matrix_numbers"]


class Subspace(abc.ABC):
    """Where the weights of a model may move."""

    @abc.abstractmethod
    def resolve(self, tree: Any, targets: Targets) -> list[ResolvedTarget]:
        """Returns the targets in a tree shaped like the parameters, each with its `Units`.

        Raises:
            InputError: the model lacks what the targets or the subspace name.
        """


class Units(Subspace):
    """A way to cut a weight's matrices into units, some of which are free.

    Attributes:
        whole: weights are free as a whole, so that they need not be matrices.
    """

    whole: ClassVar[bool] = False

    @property
    def takes_density(self) -> bool:
        """Whether a `Target` may have a density of its own."""
        return False

    def resolve(self, tree: Any, targets: Targets) -> list[ResolvedTarget]:
        """Returns the targets; those without units of their own have these."""
        resolved = resolve_targets(tree, targets, whole=self.whole)
        return [replace(target, subspace=target.subspace or self) for target in resolved]

    @abc.abstractmethod
    def counts(self, targets: Sequence[ResolvedTarget], model_size: int) -> list[int]:
        """Returns the number of free units of each matrix (for `Neurons`: of each neuron) of each target."""

    def total(self, targets: Sequence[ResolvedTarget], model_size: int) -> int:
        """Returns the number of free units of all matrices together, for scope "global"."""
        counts = self.counts(targets, model_size)
        return sum(count * target.view.stack for count, target in zip(counts, targets, strict=True))

    @abc.abstractmethod
    def cut(self, matrices: Num[Array, "stack in out"]) -> Num[Array, "stack units ..."]:
        """Returns matrices cut into units."""

    @abc.abstractmethod
    def join(self, units: Num[Array, "stack units ..."], view: MatrixView) -> Num[Array, "stack in out"]:
        """Returns units put together again; the inverse of `cut`."""

    @abc.abstractmethod
    def unit_scores(self, scores: Float[Array, "stack in out"]) -> Float[Array, "stack units"]:
        """Turns scores of entries into scores of units."""

    def activations(self, norms: Num[Array, "..."], view: MatrixView) -> Num[Array, "stack ..."]:
        """Returns the 2-norm of every input's activation for each entry of the matrices."""
        inputs = norms.reshape(view.stack, view.in_size, 1)
        return jnp.broadcast_to(inputs, (view.stack, view.in_size, view.out_size))

    def pick(
        self, unit_scores: Float[Array, "stack units"], like: Int[Array, "stack ..."], view: MatrixView
    ) -> Int[Array, "stack ..."]:
        """Returns the units of matrices with the largest scores, as many as in `like`.

        Best first, ties to the lowest number; NaN counts as larger than any number.
        """
        return jax.lax.top_k(unit_scores, like.shape[-1])[1]

    def empty_support(self, view: MatrixView, count: int) -> Int[Array, "stack ..."]:
        """Returns a valid support to start from: the first units."""
        return jnp.tile(jnp.arange(count, dtype=jnp.int32), (view.stack, 1))

    def gather(self, matrices: Num[Array, "stack in out"], support: Int[Array, "stack ..."]) -> Num[Array, "stack ..."]:
        """Returns the entries of dense matrices that the support frees.

        Example:
            >>> import jax.numpy as jnp
            >>> dense = jnp.arange(6.0).reshape(1, 2, 3)
            >>> Slices(1).gather(dense, jnp.array([[1]]))
            Array([[[3., 4., 5.]]], dtype=float32)
        """
        return self.cut(matrices)[matrix_numbers(support), support]

    def shape(self, view: MatrixView) -> tuple[int, ...]:
        """Returns the shape of matrices cut into units, (stack, units, *entries of a unit)."""
        dense = jax.ShapeDtypeStruct((view.stack, view.in_size, view.out_size), jnp.float32)
        return jax.eval_shape(self.cut, dense).shape

    def filled(self, view: MatrixView, fill: float, dtype: jnp.dtype) -> Num[Array, "stack units ..."]:
        """Returns the units of matrices that hold one number everywhere."""
        return jnp.full(self.shape(view), fill, dtype)

    def scatter(
        self, view: MatrixView, support: Int[Array, "stack ..."], slots: Num[Array, "stack ..."], fill: float
    ) -> Num[Array, "stack in out"]:
        """Returns dense matrices that hold the slots where the support frees them, and `fill` everywhere else."""
        units = self.filled(view, fill, slots.dtype)
        return self.join(units.at[matrix_numbers(support), support].set(slots, unique_indices=True), view)


def matrix_numbers(support: Int[Array, "stack ..."]) -> Int[Array, "stack ..."]:
    """Returns the number of the matrix that each unit of a support belongs to; broadcasts against it."""
    return jnp.arange(support.shape[0], dtype=jnp.int32).reshape(-1, *[1] * (support.ndim - 1))


def follow(
    values: Num[Array, "stack ..."], old: Int[Array, "stack ..."], new: Int[Array, "stack ..."], newcomer: ArrayLike
) -> Num[Array, "stack ..."]:
    """Rearranges values of slots so that they stay with their units.

    Args:
        values: the slots of the old support, (*support, *entries of a unit).
        old: the old support, distinct within a matrix.
        new: the new support, of the same shape.
        newcomer: value of units that the old support lacks; broadcasts against the slots.

    Returns:
        The slots of the new support.

    Example:
        >>> import jax.numpy as jnp
        >>> follow(jnp.array([[1.0, 2.0]]), jnp.array([[7, 4]]), jnp.array([[4, 9]]), 0.0)
        Array([[2., 0.]], dtype=float32)
    """
    flat_old, flat_new = (support.reshape(support.shape[0], -1) for support in (old, new))
    order = jnp.argsort(flat_old, axis=-1)
    place = jax.vmap(jnp.searchsorted)(jnp.take_along_axis(flat_old, order, axis=-1), flat_new)
    slot = jnp.take_along_axis(order, jnp.minimum(place, flat_old.shape[-1] - 1), axis=-1)
    stayed = jnp.take_along_axis(flat_old, slot, axis=-1) == flat_new
    entries = values.shape[old.ndim :]
    moved = values.reshape(*flat_old.shape, *entries)[matrix_numbers(slot), slot].reshape(values.shape)
    return jnp.where(stayed.reshape(*old.shape, *[1] * len(entries)), moved, newcomer).astype(values.dtype)


class _Entries(Units):
    """Units that are single entries, numbered in (in, out) order."""

    def cut(self, matrices: Num[Array, "stack in out"]) -> Num[Array, "stack size"]:
        """Returns the entries in flat order."""
        return matrices.reshape(matrices.shape[0], -1)

    def join(self, units: Num[Array, "stack size"], view: MatrixView) -> Num[Array, "stack in out"]:
        """Returns the matrices."""
        return units.reshape(view.stack, view.in_size, view.out_size)

    def unit_scores(self, scores: Float[Array, "stack in out"]) -> Float[Array, "stack size"]:
        """Returns the scores in flat order."""
        return self.cut(scores)


def _check_indices(targets: Sequence[ResolvedTarget]) -> None:
    """Raises an InputError for a matrix whose entries int32 cannot number."""
    for target in targets:
        if target.view.size >= 2**31:
            raise InputError(
                f"target {target.path}: a matrix of {target.view.in_size} x {target.view.out_size} entries does not "
                "fit int32 indices; split it by stack_axes"
            )


@dataclass(frozen=True)
class Coordinates(_Entries):
    """k free coordinates of every matrix, anywhere in it; a unit is an entry, numbered in (in, out) order.

    Attributes:
        budget: how many.
    """

    budget: Budget

    @property
    def takes_density(self) -> bool:
        """Yes: k = round(density * size)."""
        return True

    def counts(self, targets: Sequence[ResolvedTarget], model_size: int) -> list[int]:
        """Returns k for each target."""
        _check_indices(targets)
        return self.budget.counts(targets, model_size)

    def total(self, targets: Sequence[ResolvedTarget], model_size: int) -> int:
        """Returns the budget, rounded once over all targets."""
        _check_indices(targets)
        return self.budget.total(targets, model_size)


@dataclass(frozen=True)
class Neurons(_Entries):
    """k free inputs of every neuron, a neuron being one output; the support is (stack, k, neurons) of flat indices.

    Attributes:
        inputs: k.
        neurons: neurons with free inputs / all neurons of a matrix, rounded, at least one: those whose k inputs have
            the largest scores in sum.
    """

    inputs: int
    neurons: float = 1.0

    def __post_init__(self) -> None:
        check_count("k, the inputs of every neuron,", self.inputs)
        check_fraction("neurons", self.neurons)

    def counts(self, targets: Sequence[ResolvedTarget], model_size: int) -> list[int]:
        """Returns k for each target."""
        for target in targets:
            if self.inputs > target.view.in_size:
                raise InputError(f"k={self.inputs} is more than the {target.view.in_size} inputs of {target.path}")
        _check_indices(targets)
        return [self.inputs] * len(targets)

    def empty_support(self, view: MatrixView, count: int) -> Int[Array, "stack k neurons"]:
        """Returns the first k inputs of the first neurons."""
        first = jnp.arange(count * view.out_size, dtype=jnp.int32).reshape(count, view.out_size)
        return jnp.tile(first[:, : max(1, round(self.neurons * view.out_size))], (view.stack, 1, 1))

    def pick(
        self, unit_scores: Float[Array, "stack size"], like: Int[Array, "stack k neurons"], view: MatrixView
    ) -> Int[Array, "stack k neurons"]:
        """Returns the k inputs of every neuron with the largest scores, neurons in ascending order."""
        _, k, trained = like.shape
        by_neuron = jnp.swapaxes(unit_scores.reshape(view.stack, view.in_size, view.out_size), 1, 2)
        values, inputs = jax.lax.top_k(by_neuron, k)
        neurons = jnp.arange(view.out_size, dtype=jnp.int32)[None]
        if trained < view.out_size:
            neurons = jnp.sort(jax.lax.top_k(jnp.sum(values, axis=2), trained)[1], axis=1)
            inputs = jnp.take_along_axis(inputs, neurons[:, :, None], axis=1)
        return jnp.swapaxes(inputs, 1, 2) * view.out_size + neurons[:, None, :]


@dataclass(frozen=True)
class Slices(Units):
    """Free input slices (rows of a Flax kernel), or output slices, of every matrix.

    Attributes:
        count: free slices; None: a share of them.
        share: free slices / all slices, rounded, at least one.
        axis: "input" or "output".
        group: slices that are free together, such as the inputs of one attention head; a unit is a group.
    """

    count: int | None = None
    share: float | None = None
    axis: Literal["input", "output"] = "input"
    group: int = 1

    def __post_init__(self) -> None:
        if (self.count is None) == (self.share is None):
            raise InputError(
                f"give exactly one of the number and the share of slices, got {self.count} and {self.share}"
            )
        if self.count is not None:
            check_count("the number of slices", self.count)
        if self.share is not None:
            check_fraction("the share of slices", self.share)
        check_count("group", self.group)
        if self.axis not in ("input", "output"):
            raise InputError(f"axis must be 'input' or 'output', got {self.axis!r}")

    def counts(self, targets: Sequence[ResolvedTarget], model_size: int) -> list[int]:
        """Returns the number of free groups of slices of each target."""
        counts = []
        for target in targets:
            size = target.view.in_size if self.axis == "input" else target.view.out_size
            if size % self.group:
                raise InputError(f"{target.path}: its {size} {self.axis}s do not split into groups of {self.group}")
            groups = size // self.group
            count = self.count if self.count is not None else max(1, round((self.share or 0) * groups))
            if count > groups:
                raise InputError(f"{count} slices are more than the {groups} {self.axis} slices of {target.path}")
            counts.append(count)
        return counts

    def activations(self, norms: Num[Array, "..."], view: MatrixView) -> Num[Array, "stack ..."]:
        """Returns 2-norms of activations, one for each slice, in a shape that broadcasts against the matrices.

        For output slices `norms` are those of the outputs, or of the inputs that couple to them: several groups for
        each of ours under grouped-query attention, which are taken together.
        """
        if self.axis == "input":
            return norms.reshape(view.stack, view.in_size, 1)
        grouped = norms.reshape(view.stack, view.out_size // self.group, -1, self.group)
        return jnp.linalg.norm(grouped, axis=2).reshape(view.stack, 1, view.out_size)

    def cut(self, matrices: Num[Array, "stack in out"]) -> Num[Array, "stack groups ..."]:
        """Returns the slices; (stack, in, out) for single input slices."""
        slices = matrices if self.axis == "input" else jnp.swapaxes(matrices, 1, 2)
        if self.group == 1:
            return slices
        return slices.reshape(slices.shape[0], -1, self.group, slices.shape[2])

    def join(self, units: Num[Array, "stack groups ..."], view: MatrixView) -> Num[Array, "stack in out"]:
        """Returns the matrices."""
        slices = units.reshape(view.stack, -1, units.shape[-1])
        return slices if self.axis == "input" else jnp.swapaxes(slices, 1, 2)

    def unit_scores(self, scores: Float[Array, "stack in out"]) -> Float[Array, "stack groups"]:
        """Returns the 2-norm of every slice's scores (S2FT's W and G)."""
        units = self.cut(scores)
        return jnp.linalg.norm(units.reshape(*units.shape[:2], -1), axis=-1)


@dataclass(frozen=True)
class Everything(Units):
    """Every entry is free: one unit, the whole matrix. Its slots are dense, and weights of any shape will do."""

    whole: ClassVar[bool] = True

    def counts(self, targets: Sequence[ResolvedTarget], model_size: int) -> list[int]:
        """Returns one unit for each target."""
        return [1] * len(targets)

    def cut(self, matrices: Num[Array, "stack in out"]) -> Num[Array, "stack 1 in out"]:
        """Returns the matrices, each one unit."""
        return matrices[:, None]

    def join(self, units: Num[Array, "stack 1 in out"], view: MatrixView) -> Num[Array, "stack in out"]:
        """Returns the matrices."""
        return units[:, 0]

    def unit_scores(self, scores: Float[Array, "stack in out"]) -> Float[Array, "stack 1"]:
        """Returns one number for each matrix; there is nothing to choose."""
        return jnp.zeros((scores.shape[0], 1))

    def gather(self, matrices: Num[Array, "stack in out"], support: Int[Array, "stack 1"]) -> Num[Array, "stack ..."]:
        """Returns the matrices; the support says nothing."""
        return self.cut(matrices)

    def scatter(
        self, view: MatrixView, support: Int[Array, "stack 1"], slots: Num[Array, "stack ..."], fill: float
    ) -> Num[Array, "stack in out"]:
        """Returns the slots as matrices."""
        return self.join(slots, view)
