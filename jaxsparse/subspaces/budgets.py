"""How many slots each target gets."""

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

from jaxsparse.common.errors import InputError
from jaxsparse.subspaces.targets import ResolvedTarget

__all__ = ["Budget", "Share", "check_fraction"]

Share = Literal["even", "proportional"]


def check_fraction(name: str, value: Any) -> None:
    """Raises unless a value is a number in (0, 1].

    Raises:
        InputError: it is out of range.
        TypeError: it is traced, or no number.
    """
    if isinstance(value, jax.Array | jax.core.Tracer):
        raise TypeError(
            f"{name} sets array shapes and must be a Python number; "
            f"under optax.inject_hyperparams name it in static_args=({name!r},)"
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in (0, 1], got {value!r}")
    if not 0 < float(value) <= 1:
        raise InputError(f"{name} must lie in (0, 1], got {value}")


@dataclass(frozen=True)
class Budget:
    """The number of free coordinates, as a share of each target or of the whole model.

    Attributes:
        density: free coordinates / size of each target matrix; k = max(1, round(density * size)).
        budget: free coordinates / all parameters of the model (the papers' "Upd. %").
        share: how a `budget` is spread: "even" gives every matrix the same number (GASDU, section 5),
            "proportional" gives each in proportion to its size.

    Raises:
        InputError: neither or both of density and budget are given, or one is outside (0, 1].
        TypeError: a value is traced or not a number.

    Example:
        >>> Budget(density=0.5).density
        0.5
    """

    density: float | None = None
    budget: float | None = None
    share: Share = "even"

    def __post_init__(self) -> None:
        if (self.density is None) == (self.budget is None):
            raise InputError(
                "give exactly one of density (share of each target) and budget (share of the model), and None for the "
                f"other; got density={self.density} and budget={self.budget}"
            )
        for name in ("density", "budget"):
            if getattr(self, name) is not None:
                check_fraction(name, getattr(self, name))
        if self.share not in ("even", "proportional"):
            raise InputError(f"share must be 'even' or 'proportional', got {self.share!r}")

    def counts(self, targets: Sequence[ResolvedTarget], model_size: int) -> list[int]:
        """Returns k, the number of slots of each matrix of each target.

        Args:
            targets: the resolved targets; a stacked target counts once for every layer.
            model_size: N, the number of all parameters of the model.

        Returns:
            One number per target, at least 1 and at most the matrix's size.

        Raises:
            InputError: the budget is smaller than one slot a matrix.
        """
        for target in targets:
            if target.density is not None:
                check_fraction(f"density of target {target.path}", target.density)
        return [
            max(1, round(target.density * target.view.size))
            if target.density is not None
            else self._count(target, targets, model_size)
            for target in targets
        ]

    def total(self, targets: Sequence[ResolvedTarget], model_size: int) -> int:
        """Returns the number of slots of all targets together, rounded once: met to within one slot.

        Args:
            targets: the resolved targets.
            model_size: N, the number of all parameters of the model.

        Raises:
            InputError: the budget is smaller than one slot.
        """
        own = sum((t.density or 0) * t.view.size * t.view.stack for t in targets)
        rest = sum(t.view.size * t.view.stack for t in targets if t.density is None)
        shared = self.density * rest if self.density is not None else min((self.budget or 0) * model_size, rest)
        total = round(own + shared)
        if total < 1:
            raise InputError(
                f"density={self.density}, budget={self.budget}: the {len(targets)} targets get no slot; raise it"
            )
        return total

    def _count(self, target: ResolvedTarget, targets: Sequence[ResolvedTarget], model_size: int) -> int:
        size = target.view.size
        if self.density is not None:
            return max(1, round(self.density * size))
        assert self.budget is not None
        # Targets with a density of their own neither take from the budget nor share in it.
        sharing = [other.view for other in targets if other.density is None]
        total = self.budget * model_size
        if self.share == "even":
            count = math.floor(total / sum(view.stack for view in sharing))
        else:
            count = math.floor(total * size / sum(view.stack * view.size for view in sharing))
        if count < 1:
            raise InputError(
                f"budget={self.budget} of {model_size} parameters gives target {target.path} no slot; "
                "raise it or name fewer targets"
            )
        return min(count, size)
