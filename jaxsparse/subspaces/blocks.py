"""The subspace whose units are blocks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count
from jaxsparse.subspaces.budgets import Budget
from jaxsparse.subspaces.targets import MatrixView, ResolvedTarget
from jaxsparse.subspaces.units import Units

__all__ = ["Blocks"]


@dataclass(frozen=True)
class Blocks(Units):
    """Free blocks, numbered row by row inside a matrix; a block never exceeds the matrix.

    Attributes:
        count: free blocks: of every matrix, or of all matrices together under scope "global".
        size: rows and columns of a block; blocks at the edges are filled up with entries that are none.
        budget: how many entries are free, in place of `count`: as many blocks as have, on average, so many entries.
    """

    count: int | None = None
    size: int = 256
    budget: Budget | None = None

    def __post_init__(self) -> None:
        if (self.count is None) == (self.budget is None):
            raise InputError(f"blocks: give exactly one of count and budget, got {self.count} and {self.budget}")
        if self.count is not None:
            check_count("blocks: count", self.count)
        check_count("blocks: size", self.size)

    @property
    def takes_density(self) -> bool:
        """Whether a budget says how much is free."""
        return self.budget is not None

    def grid(self, in_size: int, out_size: int) -> tuple[int, int, int, int]:
        """Rows and columns of a block, and of the grid of blocks."""
        rows, columns = min(self.size, in_size), min(self.size, out_size)
        return rows, columns, math.ceil(in_size / rows), math.ceil(out_size / columns)

    def _blocks(self, view: MatrixView) -> int:
        """Number of blocks of a matrix."""
        _, _, down, across = self.grid(view.in_size, view.out_size)
        return down * across

    def counts(self, targets: Sequence[ResolvedTarget], model_size: int) -> list[int]:
        """Returns the number of free blocks of each matrix."""
        blocks = [self._blocks(target.view) for target in targets]
        if self.budget is not None:
            entries = self.budget.counts(targets, model_size)
            return [
                max(1, round(k * n / target.view.size)) for k, n, target in zip(entries, blocks, targets, strict=True)
            ]
        assert self.count is not None
        for target, n in zip(targets, blocks, strict=True):
            if self.count > n:
                raise InputError(f"{self.count} blocks are more than the {n} of {target.path}")
        return [self.count] * len(targets)

    def total(self, targets: Sequence[ResolvedTarget], model_size: int) -> int:
        """Returns the number of free blocks of all matrices together.

        Raises:
            InputError: more blocks than there are, or a budget of less than half a block.
        """
        blocks = sum(self._blocks(target.view) * target.view.stack for target in targets)
        count = self.count
        if self.budget is not None:
            entries = self.budget.total(targets, model_size)
            size = sum(target.view.size * target.view.stack for target in targets)
            count = round(entries * blocks / size)
            if count < 1:
                raise InputError(
                    f"a budget of {entries} entries is less than half a block of {round(size / blocks)}; "
                    f"raise it, or lower the size of a block, {self.size}"
                )
        assert count is not None
        if count > blocks:
            raise InputError(f"{count} blocks are more than the {blocks} of all {len(targets)} targets")
        return count

    def cut(self, matrices: Num[Array, "stack in out"]) -> Num[Array, "stack blocks rows columns"]:
        """Returns the blocks."""
        stack, in_size, out_size = matrices.shape
        rows, columns, down, across = self.grid(in_size, out_size)
        padded = jnp.pad(matrices, ((0, 0), (0, down * rows - in_size), (0, across * columns - out_size)))
        grid = padded.reshape(stack, down, rows, across, columns)
        return jnp.swapaxes(grid, 2, 3).reshape(stack, down * across, rows, columns)

    def join(self, units: Num[Array, "stack blocks rows columns"], view: MatrixView) -> Num[Array, "stack in out"]:
        """Returns the matrices."""
        rows, columns, down, across = self.grid(view.in_size, view.out_size)
        grid = jnp.swapaxes(units.reshape(view.stack, down, across, rows, columns), 2, 3)
        return grid.reshape(view.stack, down * rows, across * columns)[:, : view.in_size, : view.out_size]

    def unit_scores(self, scores: Float[Array, "stack in out"]) -> Float[Array, "stack blocks"]:
        """Returns |mean| of every block's signed scores (SMT); what fills up a block at the edge does not count."""
        sizes = jnp.sum(self.cut(jnp.ones_like(scores)), axis=(2, 3))
        return jnp.abs(jnp.sum(self.cut(scores), axis=(2, 3)) / sizes)
