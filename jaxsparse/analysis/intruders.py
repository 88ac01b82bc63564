"""Intruder dimensions (Shuttleworth et al., arXiv 2410.21228; Beyond LoRA, section 4.3 and appendix E.4.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxsparse.analysis.statistics import as_numbers
from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count
from jaxsparse.subspaces.targets import ResolvedTarget, Targets, is_masked, resolve_targets

__all__ = ["THRESHOLDS", "Intruders", "intruder_dimensions"]

THRESHOLDS = tuple(round(0.1 * at, 1) for at in range(1, 11))
"""Thresholds ε, over the range (0, 1] of Beyond LoRA's figure 4."""

Side = Literal["output", "input"]


@dataclass(frozen=True)
class Intruders:
    """How alike a tuned model's singular vectors are to its base's, and how many are intruders.

    Attributes:
        thresholds: the thresholds ε.
        similarity: by path, (stack, top): of each leading singular vector of a tuned matrix, largest singular value
            first, the largest |cosine| to any singular vector of the base's matrix.
    """

    thresholds: tuple[float, ...]
    similarity: dict[str, Float[np.ndarray, "stack top"]]

    @property
    def by_path(self) -> dict[str, Int[np.ndarray, "stack thresholds"]]:
        """Number of intruders of every matrix at every threshold."""
        limits = np.asarray(self.thresholds)
        return {path: np.sum(each[:, :, None] < limits, axis=1) for path, each in self.similarity.items()}

    @property
    def total(self) -> Int[np.ndarray, " thresholds"]:
        """Number of intruders of all matrices together at every threshold."""
        return np.concatenate(list(self.by_path.values())).sum(axis=0)

    @property
    def mean(self) -> Float[np.ndarray, " thresholds"]:
        """Mean number of intruders of a matrix at every threshold, what Beyond LoRA's figure 4 shows."""
        return np.concatenate(list(self.by_path.values())).mean(axis=0)


def intruder_dimensions(
    base: Any,
    tuned: Any,
    *,
    targets: Targets = None,
    top: int | None = 10,
    thresholds: Sequence[float] = THRESHOLDS,
    side: Side = "output",
) -> Intruders:
    """Counts the singular vectors of tuned weights that are like none of their base's.

    A leading singular vector u of a tuned matrix is an intruder at threshold ε where |cos(u, v)| < ε for every singular
    vector v of the base's matrix. Shuttleworth et al. look at the ten leading ones (`top`); Beyond LoRA's appendix
    E.4.2 looks at all (`top=None`). Both take the left singular vectors of the paper's W (out, in), which live in the
    space of outputs: the right ones of a Flax kernel. A matrix has min(in, out) singular vectors; where it has fewer
    inputs than outputs, directions of outputs that the base never writes to are in none of them.

    Where singular values coincide, or nearly so, single vectors are not defined and a small change turns them among
    themselves; such vectors look like intruders. The smallest singular values of a large matrix lie close together:
    with `top=None` even a small change is counted many times.

    Args:
        base: parameters before fine-tuning.
        tuned: parameters after it, factors merged.
        targets: which weights; a stack of matrices is taken apart.
        top: number of leading singular vectors of a tuned matrix, or None for all; a smaller matrix has all.
        thresholds: ε, each in (0, 1].
        side: space of the singular vectors, "output" or "input".

    Returns:
        The similarities and counts.

    Raises:
        InputError: the trees differ, a target is not finite, or a threshold is outside (0, 1].

    Example:
        >>> base = {"q_proj": {"kernel": jnp.diag(jnp.array([4.0, 3.0, 2.0, 0.0]))}}
        >>> new = jnp.full((4, 4), 5.0)     # stronger than any direction of the base, and like none of them
        >>> found = intruder_dimensions(base, {"q_proj": {"kernel": new}}, targets=".*", top=1, thresholds=(0.4, 0.6))
        >>> found.total
        array([0, 1])
    """
    if side not in ("output", "input"):
        raise InputError(f'side must be "output" or "input", got {side!r}')
    if top is not None:
        check_count("top", top)
    limits = as_numbers("thresholds", thresholds)
    if limits.min() <= 0 or limits.max() > 1:
        raise InputError(f"thresholds must lie in (0, 1], got {tuple(thresholds)}")
    resolved = resolve_targets(base, targets)
    pairs = _pairs(resolved, base, tuned)
    similarity = {target.path: _stack_similarity(target, before, after, top, side) for target, before, after in pairs}
    return Intruders(tuple(float(limit) for limit in limits), similarity)


def _pairs(resolved: list[ResolvedTarget], base: Any, tuned: Any) -> list[tuple[ResolvedTarget, Any, Any]]:
    before, after = (jax.tree.leaves(tree, is_leaf=is_masked) for tree in (base, tuned))
    if len(before) != len(after):
        raise InputError(f"base and tuned must be the same tree, got {len(before)} and {len(after)} leaves")
    for target in resolved:
        shapes = [tuple(leaves[target.position].shape) for leaves in (before, after)]
        if shapes[0] != shapes[1]:
            raise InputError(f"target {target.path} has shape {shapes[0]} in base and {shapes[1]} in tuned")
    return [(target, before[target.position], after[target.position]) for target in resolved]


def _stack_similarity(
    target: ResolvedTarget, before: Any, after: Any, top: int | None, side: Side
) -> Float[np.ndarray, "stack top"]:
    """The similarities of every matrix of a stack, one at a time: a decomposition takes several times its size."""
    smaller = min(target.view.in_size, target.view.out_size)
    count = smaller if top is None else min(top, smaller)
    stacks = [target.view.matrices(jnp.asarray(each)) for each in (before, after)]
    rows = [np.asarray(_similarity(*(stack[at] for stack in stacks), count, side)) for at in range(target.view.stack)]
    similarity = np.stack(rows)
    if not np.isfinite(similarity).all():
        raise InputError(f"target {target.path} holds NaN or infinity in base or tuned")
    return similarity


@partial(jax.jit, static_argnames=("top", "side"))
def _similarity(
    base: Float[Array, "in out"], tuned: Float[Array, "in out"], top: int, side: Side
) -> Float[Array, " top"]:
    dtype = jnp.promote_types(base.dtype, jnp.float32)
    of_base, of_tuned = (_vectors(matrix.astype(dtype), side) for matrix in (base, tuned))
    cosines = jnp.abs(jnp.matmul(of_tuned[:top], of_base.T, precision=jax.lax.Precision.HIGHEST))
    return jnp.max(cosines, axis=1)


def _vectors(matrix: Float[Array, "in out"], side: Side) -> Float[Array, "smaller size"]:
    """Singular vectors as rows, the largest singular value's first."""
    left, _, right = jnp.linalg.svd(matrix, full_matrices=False)
    return right if side == "output" else left.T
