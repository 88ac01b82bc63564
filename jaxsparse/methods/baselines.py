"""Sparse baselines of the papers: masks picked once, by gradient, by size, or at random."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax

from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count
from jaxsparse.engine.description import Description, Scope, SlotsDType, SubspaceTransformation
from jaxsparse.engine.reference import reference_engine
from jaxsparse.methods.mean_gradient import mean_gradient
from jaxsparse.select.scores import GRADIENT, RANDOM, WEIGHT, smallest
from jaxsparse.subspaces.budgets import Budget
from jaxsparse.subspaces.targets import ResolvedTarget, Targets
from jaxsparse.subspaces.units import Coordinates

__all__ = ["saft", "shira", "sift", "super_tuning"]


def sift(
    inner: optax.GradientTransformation | None = None,
    *,
    density: float | None = None,
    budget: float | None = None,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    """Trains the entries whose first gradient is largest, per matrix; that gradient only picks, it does not train.

    SIFT (arXiv 2312.11875). The released code takes k = int(rate * size) + 1; here k = round(density * size), like all
    others (METHODS.md).

    Args:
        inner: optimizer of the slots; it sees zeros as parameters.
        density: free coordinates / size of each target. Give this or `budget`.
        budget: free coordinates / all parameters.
        targets: the weights that may move; None: the attention projections of a known model.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        seed: kept for the common signature; nothing is drawn.

    Returns:
        A gradient transformation with state `js.SubspaceState`, which holds a dense gradient.

    Raises:
        InputError: density or budget out of range.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.zeros((2, 2))}
        >>> tx = js.sift(optax.sgd(1.0), density=0.25, targets="kernel")
        >>> first, state = tx.update({"kernel": jnp.array([[1.0, 2.0], [3.0, 4.0]])}, tx.init(params), params)
        >>> second, state = tx.update({"kernel": jnp.ones((2, 2))}, state, params)
        >>> int((first["kernel"] != 0).sum()), float(second["kernel"][1, 1])
        (0, -1.0)
    """
    return reference_engine(
        Description(
            name="sift",
            inner=inner,
            subspace=Coordinates(Budget(density, budget)),
            score=GRADIENT,
            calibration_steps=1,
            targets=targets,
            slots_dtype=slots_dtype,
            seed=seed,
        )
    )


def saft(
    inner: optax.GradientTransformation | None = None,
    *,
    density: float | None = 1e-3,
    budget: float | None = None,
    scope: Scope = "global",
    calibration_steps: int = 1,
    gradients: Mapping[str, Any] | None = None,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    """Trains the entries whose mean gradient over calibration data is largest, with one threshold over all targets.

    SAFT, as METHODS.md has it.

    Args:
        inner: optimizer of the slots; it sees zeros as parameters.
        density: free coordinates / size of the targets; 0.1 % in the paper. None with a `budget`.
        budget: free coordinates / all parameters.
        scope: "global": entries compete over all targets; "matrix": inside each matrix.
        calibration_steps: so many first updates change nothing; the mean of their gradients picks. The state then
            holds a dense sum, which `gradients` spare.
        gradients: mean gradients by parameter path, in place of calibration steps.
        targets: the weights that may move; None: the attention projections of a known model.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        seed: kept for the common signature; nothing is drawn.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: a value out of range, or neither calibration steps nor gradients.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros((2, 2))}
        >>> means = {"a": jnp.ones((2, 2)), "b": 2 * jnp.ones((2, 2))}
        >>> tx = js.saft(optax.sgd(1.0), density=0.5, gradients=means, targets=".*")
        >>> updates, state = tx.update(means, tx.init(params), params)
        >>> float(jnp.abs(updates["a"]).sum()), float(jnp.abs(updates["b"]).sum())
        (0.0, 8.0)
    """
    return reference_engine(
        Description(
            name="saft",
            inner=inner,
            subspace=Coordinates(Budget(density, budget, "proportional")),
            score=GRADIENT,
            scope=scope,
            **mean_gradient("saft", gradients, calibration_steps),
            targets=targets,
            slots_dtype=slots_dtype,
            seed=seed,
        )
    )


def super_tuning(
    inner: optax.GradientTransformation | None = None,
    *,
    density: float | None = 0.01,
    budget: float | None = None,
    which: Literal["largest", "smallest"] = "largest",
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    """Trains the entries of every matrix with the largest (or smallest) weights, picked once.

    Super-Tuning, as METHODS.md has it.

    Args:
        inner: optimizer of the slots; it sees zeros as parameters.
        density: free coordinates / size of each target; sparsity 0.99 in the paper. None with a `budget`.
        budget: free coordinates / all parameters.
        which: "largest" or "smallest" |W|.
        targets: the weights that may move; None: the attention projections of a known model.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        seed: kept for the common signature; nothing is drawn.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: a value out of range.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.array([[1.0, -4.0], [3.0, 2.0]])}
        >>> tx = js.super_tuning(optax.sgd(1.0), density=0.25, targets="kernel")
        >>> _, state = tx.update(params, tx.init(params), params)
        >>> state.support["kernel"]
        Array([[1]], dtype=int32)
    """
    if which not in ("largest", "smallest"):
        raise InputError(f"which must be 'largest' or 'smallest', got {which!r}")
    return reference_engine(
        Description(
            name="super_tuning",
            inner=inner,
            subspace=Coordinates(Budget(density, budget)),
            score=WEIGHT if which == "largest" else smallest(WEIGHT),
            targets=targets,
            slots_dtype=slots_dtype,
            seed=seed,
        )
    )


@dataclass(frozen=True)
class _LikeLora(Coordinates):
    """As many coordinates of a matrix as LoRA of rank r has parameters: r (in + out)."""

    budget: Any = None
    rank: int = 32

    def __post_init__(self) -> None:
        check_count("rank", self.rank)

    @property
    def takes_density(self) -> bool:
        """No: the rank says how many."""
        return False

    def counts(self, targets: Sequence[ResolvedTarget], model_size: int) -> list[int]:
        """Returns r (in + out) for each target."""
        counts = [self.rank * (target.view.in_size + target.view.out_size) for target in targets]
        for target, count in zip(targets, counts, strict=True):
            if count > target.view.size:
                raise InputError(
                    f"rank={self.rank} frees {count} entries of {target.path}, which has {target.view.size}"
                )
        return counts


def shira(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 32,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    """Trains r (in + out) random entries of every matrix, as many as LoRA of rank r has parameters.

    SHiRA, as METHODS.md has it.

    Args:
        inner: optimizer of the slots; it sees zeros as parameters.
        rank: r; 32 in the paper.
        targets: the weights that may move; None: the attention projections of a known model.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        seed: of the draw.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: a rank that does not fit a matrix.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> js.shira(optax.sgd(1.0), rank=1, targets="k").init({"k": jnp.zeros((4, 3))}).support["k"].shape
        (1, 7)
    """
    return reference_engine(
        Description(
            name="shira",
            inner=inner,
            subspace=_LikeLora(rank=rank),
            score=RANDOM,
            targets=targets,
            slots_dtype=slots_dtype,
            seed=seed,
        )
    )
