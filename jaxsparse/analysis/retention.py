"""How much of the gradient a support keeps (GASDU, equation 4 and figure 4), measured with the dense gradient."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from jaxsparse.analysis.statistics import as_numbers
from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count, check_positive
from jaxsparse.subspaces.budgets import Budget
from jaxsparse.subspaces.targets import Targets, is_masked, resolve_targets
from jaxsparse.subspaces.units import Coordinates, Units

__all__ = [
    "Retention",
    "RetentionSummary",
    "measure_retention",
    "moving_average",
    "reuse_bound",
    "summarise_retention",
]

_ENTRIES = Coordinates(Budget(density=1.0))
"""Entries by their flat index; how many there are is the support's business."""


class Retention(NamedTuple):
    """α = ‖Λ ⊙ g‖² / ‖g‖² of one step, from 0 to 1; 1 where the gradient is 0.

    Attributes:
        overall: numerator and denominator summed over all targets (equation 4; the theory's).
        mean: the mean over matrices (figure 4).
        by_path: of every matrix of every target, (stack,) each.
    """

    overall: Float[Array, ""]
    mean: Float[Array, ""]
    by_path: dict[str, Float[Array, " stack"]]


def measure_retention(gradients: Any, support: Any, *, targets: Targets = None, units: Units = _ENTRIES) -> Retention:
    """Measures the retention of a support on a dense gradient; may be called inside `jax.jit`.

    The gradient may be of other rows than those that the support was picked by, or of the same rows later.

    Args:
        gradients: dense gradients, a tree shaped like the parameters.
        support: the same tree with supports (stack, ...) for targets and `optax.MaskedNode` elsewhere, as in the state
            of a method (`state.support`).
        targets: which weights, as the method was told.
        units: what the support counts; without it entries by flat index, as for gasdu, neuroada and their kin. For
            slices `js.subspaces.Slices(...)`, and so on.

    Returns:
        The retention.

    Raises:
        InputError: the trees do not fit one another, or a target has no support.

    Example:
        >>> gradients = {"q_proj": {"kernel": jnp.array([[3.0, 0.0], [1.0, 4.0]])}}
        >>> kept = measure_retention(gradients, {"q_proj": {"kernel": jnp.array([[3, 0]])}}, targets=".*/kernel")
        >>> round(float(kept.overall), 4)
        0.9615
    """
    resolved = resolve_targets(gradients, targets, whole=units.whole)
    if not resolved:
        raise InputError("gradients hold no target: every leaf is an optax.MaskedNode")
    leaves, supports = (jax.tree.leaves(tree, is_leaf=is_masked) for tree in (gradients, support))
    if len(leaves) != len(supports):
        raise InputError(
            f"support must have a leaf for every leaf of the gradients, {len(leaves)}, got {len(supports)}; "
            "weights that do not move have an optax.MaskedNode"
        )
    kept, whole = {}, {}
    for target in resolved:
        own = supports[target.position]
        if is_masked(own) or own.ndim < 2 or own.shape[0] != target.view.stack:
            shape = "none" if is_masked(own) else f"one of shape {tuple(own.shape)}"
            raise InputError(f"target {target.path} needs a support ({target.view.stack}, ...), got {shape}")
        matrices = target.view.matrices(leaves[target.position])
        # In units of the matrix's largest entry: squares of small or large gradients would leave float32.
        dtype = jnp.promote_types(matrices.dtype, jnp.float32)
        unit = jnp.max(jnp.abs(matrices)).astype(dtype)
        scaled = matrices.astype(dtype) / jnp.where(unit == 0, 1, unit)
        kept[target.path] = unit, _energy((target.subspace or units).gather(scaled, own))
        whole[target.path] = _energy(scaled)
    return _combined(kept, whole)


def _energy(entries: Float[Array, "stack ..."]) -> Float[Array, " stack"]:
    return jnp.sum(jnp.square(entries.reshape(entries.shape[0], -1)), axis=-1)


def _combined(kept: dict[str, Any], whole: dict[str, Any]) -> Retention:
    largest = jnp.max(jnp.stack([unit for unit, _ in kept.values()]))
    weights = {path: (unit / jnp.where(largest == 0, 1, largest)) ** 2 for path, (unit, _) in kept.items()}
    by_path = {path: _ratio(energy, whole[path]) for path, (_, energy) in kept.items()}
    numerator = sum(weights[path] * jnp.sum(energy) for path, (_, energy) in kept.items())
    denominator = sum(weights[path] * jnp.sum(energy) for path, energy in whole.items())
    return Retention(_ratio(numerator, denominator), jnp.mean(jnp.concatenate(list(by_path.values()))), by_path)


def _ratio(part: Any, whole: Any) -> Any:
    return jnp.where(whole == 0, 1, part / jnp.where(whole == 0, 1, whole))


@dataclass(frozen=True)
class RetentionSummary:
    """The retention of a run.

    Attributes:
        mean: over the steps measured.
        least: the lowest of them.
        refreshes: number of refreshes.
        by_age: mean retention by the number of steps since the last refresh, 0 first; NaN for an age never measured.
        relative_by_age: the same of the retention relative to that at the last refresh, which is 1 at age 0.
        measured: number of steps at every age of which the relative retention is known.
    """

    mean: float
    least: float
    refreshes: int
    by_age: Float[np.ndarray, " ages"]
    relative_by_age: Float[np.ndarray, " ages"]
    measured: Num[np.ndarray, " ages"]

    @property
    def decay(self) -> float:
        """Relative loss per step of age: the slope, by least squares over all steps measured, with its sign turned.

        NaN where no support grew older than a step of age 0.
        """
        known = self.measured > 0
        ages, values, weights = np.arange(self.by_age.size)[known], self.relative_by_age[known], self.measured[known]
        if ages.size < 2:
            return float("nan")
        middle = ages - np.average(ages, weights=weights)
        return float(-np.sum(weights * middle * values) / np.sum(weights * middle**2))


def summarise_retention(
    retention: Num[Array | np.ndarray, "..."] | list[float], refreshed: Bool[Array | np.ndarray, "..."] | list[bool]
) -> RetentionSummary:
    """Summarises the retention of a run, and how it falls as supports age.

    Args:
        retention: α of every step, (steps,); NaN where it was not measured.
        refreshed: whether the support was picked at that step, (steps,); the first step must pick.

    Returns:
        The summary. Periods whose refreshing step was not measured, or kept nothing, have no relative retention.

    Raises:
        InputError: lengths differ, the first step did not pick, nothing was measured, or a value is outside [0, 1].

    Example:
        >>> summary = summarise_retention([0.8, 0.6, 0.8, 0.4], [True, False, True, False])
        >>> summary.by_age
        array([0.8, 0.5])
        >>> round(summary.decay, 3)
        0.375
    """
    alpha, picked = np.asarray(retention, np.float64), np.asarray(refreshed, bool)
    if alpha.ndim != 1 or alpha.shape != picked.shape:
        raise InputError(f"retention and refreshed must be (steps,) both, got shapes {alpha.shape} and {picked.shape}")
    if not alpha.size or not picked[0]:
        raise InputError("refreshed must be true at the first step: no support is older than the run")
    known = np.isfinite(alpha)
    if not known.any():
        raise InputError("retention was measured at no step: all are NaN")
    if alpha[known].min() < 0 or alpha[known].max() > 1 + 1e-5:
        raise InputError(
            f"retention must lie between 0 and 1, got {alpha[known].min():.3g} to {alpha[known].max():.3g}; "
            "it is a share of squares"
        )
    last = np.maximum.accumulate(np.where(picked, np.arange(alpha.size), 0))
    age = np.arange(alpha.size) - last
    fresh = alpha[last]
    relative = np.divide(alpha, fresh, out=np.full_like(alpha, np.nan), where=fresh > 0)
    ages = int(age.max()) + 1
    return RetentionSummary(
        mean=float(alpha[known].mean()),
        least=float(alpha[known].min()),
        refreshes=int(picked.sum()),
        by_age=_means(alpha, age, ages)[0],
        relative_by_age=_means(relative, age, ages)[0],
        measured=_means(relative, age, ages)[1],
    )


def _means(values: np.ndarray, age: np.ndarray, ages: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean and number of the finite values of every age."""
    known = np.isfinite(values)
    counts = np.bincount(age[known], minlength=ages)
    sums = np.bincount(age[known], weights=values[known], minlength=ages)
    return np.divide(sums, counts, out=np.full(ages, np.nan), where=counts > 0), counts


def moving_average(
    values: Num[Array | np.ndarray, "..."] | list[float], window: int = 25
) -> Float[np.ndarray, " windows"]:
    """Smooths a series as GASDU's figure 4 does: the mean of every `window` steps in a row.

    Args:
        values: one number a step, (steps,).
        window: steps averaged; the figure's is 25.

    Returns:
        (steps − window + 1,) means, the first of the first `window` steps.

    Raises:
        InputError: there are fewer steps than the window, or a value is NaN.

    Example:
        >>> moving_average([1.0, 3.0, 5.0], 2)
        array([2., 4.])
    """
    check_count("window", window)
    numbers = as_numbers("values", values, least=window)
    return np.convolve(numbers, np.ones(window) / window, mode="valid")


def reuse_bound(retention_at_refresh: float, age: int, *, learning_rate: float, smoothness: float, mu: float) -> float:
    """Bounds the retention of an ageing support from below (GASDU, theorem 4.3), for gradient descent.

    α_t ≥ [√α_ref − ρ]₊² / (1 + ρ)² with ρ = L/√(2μ) · √(γτ / (1 − Lγ/2)).

    Args:
        retention_at_refresh: α_ref, at the step that picked the support.
        age: τ, steps since then.
        learning_rate: γ, at most 1/L.
        smoothness: L, the gradient's Lipschitz constant.
        mu: μ of the Polyak-Łojasiewicz condition.

    Raises:
        InputError: a number is not positive, γ > 1/L, or α_ref is outside [0, 1].

    Example:
        >>> reuse_bound(0.81, 0, learning_rate=0.1, smoothness=1.0, mu=0.5)
        0.81
    """
    check_count("age", age, least=0)
    for name, value in (("learning_rate", learning_rate), ("smoothness", smoothness), ("mu", mu)):
        check_positive(name, value)
    if not 0 <= retention_at_refresh <= 1:
        raise InputError(f"retention_at_refresh must lie between 0 and 1, got {retention_at_refresh}")
    if learning_rate * smoothness > 1:
        raise InputError(f"learning_rate={learning_rate} must be at most 1 / smoothness = {1 / smoothness:.3g}")
    drift = smoothness / (2 * mu) ** 0.5 * (learning_rate * age / (1 - smoothness * learning_rate / 2)) ** 0.5
    return float(max(retention_at_refresh**0.5 - drift, 0.0) ** 2 / (1 + drift) ** 2)
