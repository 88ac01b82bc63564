"""How the changes of several deltas become one: weighted sums, TIES and DARE, on the host, a tensor at a time."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from jaxsparse.common.errors import InputError

__all__ = ["Combined", "Recipe", "combine", "kept_at_random", "kept_by_size"]

_HOW = ("sum", "ties", "dare", "dare_ties")
_OVERLAP = ("sum", "first", "error")


@dataclass(frozen=True)
class Recipe:
    """How to mix; the fields are arguments of `mix`.

    Raises:
        InputError: a value that is not possible, or that has no meaning beside the others.
    """

    how: str = "sum"
    density: float | None = None
    seed: int = 0
    overlap: str = "sum"

    def __post_init__(self) -> None:
        for name, choices in (("how", _HOW), ("overlap", _OVERLAP)):
            if getattr(self, name) not in choices:
                raise InputError(f"{name}={getattr(self, name)!r} is not known; possible are {', '.join(choices)}")
        if self.how == "sum" and self.density is not None:
            raise InputError(f"density={self.density} has no meaning for how='sum', which keeps every change")
        if self.how != "sum" and self.density is None:
            raise InputError(f"how={self.how!r} needs a density: the share of its changes that every delta keeps")
        if self.density is not None and not 0 < self.density <= 1:
            raise InputError(f"density must lie in (0, 1], got {self.density}")
        if self.seed < 0:
            raise InputError(f"seed must not be negative, got {self.seed}")
        if self.elects and self.overlap != "sum":
            raise InputError(f"overlap={self.overlap!r} has no meaning for how={self.how!r}, which elects signs there")

    @property
    def elects(self) -> bool:
        """Whether signs are elected."""
        return self.how in ("ties", "dare_ties")

    @property
    def drops(self) -> bool:
        """Whether changes are dropped at random."""
        return self.how in ("dare", "dare_ties")

    @property
    def keeps_all(self) -> bool:
        """Whether no change is dropped or scaled but by the deltas' weights."""
        return self.density in (None, 1)


class Combined(NamedTuple):
    """What becomes of the changes at some entries of a tensor.

    Attributes:
        changes: what is added to the base.
        sources: the number of the one delta whose change this is, unscaled, or -1.
    """

    changes: Float[np.ndarray, " entries"]
    sources: Int[np.ndarray, " entries"]


def kept_by_size(changes: Float[np.ndarray, " entries"], density: float) -> Bool[np.ndarray, " entries"]:
    """Returns which changes TIES keeps: the largest in size, round(density · number), at least one.

    Of changes of one size those at the lowest indices come first, as in `lax.top_k`. What is 0 is no change.

    Args:
        changes: tuned minus base.
        density: the share to keep, in (0, 1].

    Example:
        >>> kept_by_size(np.array([0.1, -3.0, 0.0, 2.0, 2.0], np.float32), 0.5)
        array([False,  True, False,  True, False])
    """
    sizes = np.abs(changes)
    kept = changes != 0
    count = np.count_nonzero(kept)
    wanted = max(1, round(density * count))
    if wanted >= count:
        return kept
    threshold = np.partition(sizes, sizes.size - wanted)[sizes.size - wanted]
    kept = sizes > threshold
    equal = np.flatnonzero(sizes == threshold)
    kept[equal[: wanted - np.count_nonzero(kept)]] = True
    return kept


def kept_at_random(count: int, density: float, seed: int, number: int, path: str) -> Bool[np.ndarray, " entries"]:
    """Returns which changes DARE keeps, each with probability `density`.

    Args:
        count: of the changes.
        density: 1 - p.
        seed: the only source of randomness.
        number: of the delta.
        path: of the tensor. Delta and path have their own key, so that no tensor's draw depends on the others.

    Example:
        >>> kept_at_random(5, 1.0, 0, 0, "layers/q_proj/kernel")
        array([ True,  True,  True,  True,  True])
    """
    key = hashlib.sha256(f"{seed} {number} {path}".encode()).digest()
    draws = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
    return draws.random(count, np.float32) < density


def combine(
    path: str,
    changes: Float[np.ndarray, "deltas entries"],
    moved: Bool[np.ndarray, "deltas entries"],
    numbers: list[int],
    weights: list[float],
    recipe: Recipe,
) -> Combined:
    """Combines the changes of several deltas at the same entries; formulas in `mix`.

    Args:
        path: of the tensor.
        changes: tuned minus base, 0 where a delta does not move an entry.
        moved: which entries each delta moves.
        numbers: of the deltas.
        weights: of the deltas.
        recipe: how.

    Example:
        >>> changes = np.array([[1.0, 2.0, 0.0], [0.0, -3.0, 4.0]], np.float32)
        >>> combine("w", changes, changes != 0, [0, 1], [1.0, 0.5], Recipe("ties", 1.0)).changes
        array([1., 2., 2.], dtype=float32)
    """
    kept = moved.copy()
    if recipe.overlap == "first":
        kept[1:] &= ~np.logical_or.accumulate(moved, axis=0)[:-1]
    factors = np.array(weights, changes.dtype)
    if recipe.drops:
        assert recipe.density is not None
        for row, number in zip(kept, numbers, strict=True):
            row[row] = kept_at_random(int(np.count_nonzero(row)), recipe.density, recipe.seed, number, path)
        factors = factors / changes.dtype.type(recipe.density)
    elif recipe.elects:
        assert recipe.density is not None
        kept &= np.stack([kept_by_size(row, recipe.density) for row in changes])
    # Weights may overflow; what is not finite is found, with its tensor's name, where the sum is rounded.
    with np.errstate(over="ignore", invalid="ignore"):
        weighted = np.where(kept, factors[:, None] * changes, 0)
        if recipe.elects:
            kept &= np.sign(weighted) == np.sign(weighted.sum(axis=0))
            kept &= weighted != 0
            weighted[~kept] = 0
        total = weighted.sum(axis=0)
        if recipe.elects:
            total /= np.maximum(np.count_nonzero(kept, axis=0), 1).astype(total.dtype)
    source = kept.argmax(axis=0)
    alone = (np.count_nonzero(kept, axis=0) == 1) & (factors[source] == 1)
    return Combined(total, np.where(alone, source, -1))
