"""What every report says about numbers: medians with their spread, intervals, and what counts as within noise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Num

from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count

__all__ = ["Comparison", "Spread", "as_numbers", "bootstrap_interval", "compare_rows", "compare_seeds", "spread"]


@dataclass(frozen=True)
class Spread:
    """A median and how far the values lie apart, all in the values' unit.

    Attributes:
        median: of the values.
        least: the smallest value.
        greatest: the largest value.
        count: number of values.
    """

    median: float
    least: float
    greatest: float
    count: int

    @property
    def half_range(self) -> float:
        """Half the distance from the least to the greatest."""
        return (self.greatest - self.least) / 2


@dataclass(frozen=True)
class Comparison:
    """How far one method is from another, and between which limits noise alone may have put it.

    Attributes:
        difference: first minus second, in the values' unit.
        low: lower limit of the difference.
        high: upper limit of the difference.
        pairs: number of pairs compared.
    """

    difference: float
    low: float
    high: float
    pairs: int

    @property
    def within_noise(self) -> bool:
        """Whether no difference at all, 0, lies between the limits (they count)."""
        return self.low <= 0 <= self.high

    @property
    def lower(self) -> bool:
        """Whether the first is lower than the second by more than noise."""
        return self.high < 0

    @property
    def higher(self) -> bool:
        """Whether the first is higher than the second by more than noise."""
        return self.low > 0


def as_numbers(name: str, values: Any, *, axes: int = 1, least: int = 1) -> Float[np.ndarray, "..."]:
    """Returns values as float64, or says what is wrong with them.

    Args:
        name: what errors call them.
        values: numbers.
        axes: how many axes they must have.
        least: how many there must be along the last axis.

    Raises:
        InputError: the axes are others, there are too few values, or one is NaN or infinite.

    Example:
        >>> as_numbers("losses", [1, 2])
        array([1., 2.])
    """
    array = np.asarray(values, np.float64)
    if array.ndim != axes:
        raise InputError(f"{name} must have {axes} axes, got shape {array.shape}")
    if array.shape[-1] < least or not array.size:
        raise InputError(f"{name} must hold at least {least} values, got shape {array.shape}")
    if not np.isfinite(array).all():
        place = tuple(int(at) for at in np.argwhere(~np.isfinite(array))[0])
        raise InputError(f"{name} must be finite, got {array[place]} at {place if axes > 1 else place[0]}")
    return array


def spread(values: Num[Array | np.ndarray, "..."] | list[float]) -> Spread:
    """Returns the median over seeds with the least and the greatest.

    Args:
        values: one number a seed.

    Raises:
        InputError: there are none, or one is NaN or infinite.

    Example:
        >>> spread([3.0, 1.0, 2.5])
        Spread(median=2.5, least=1.0, greatest=3.0, count=3)
    """
    numbers = as_numbers("values", values)
    return Spread(float(np.median(numbers)), float(numbers.min()), float(numbers.max()), numbers.size)


def bootstrap_interval(
    values: Num[Array | np.ndarray, "..."] | list[float],
    statistic: Callable[[Any], Any] = np.mean,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns an interval for a statistic by the percentile bootstrap over independent values.

    Below about ten values it is too narrow: three values have but ten different resamples. For seeds, take `spread`.

    Args:
        values: independent numbers, such as one a row of a test set.
        statistic: from values (1-D) to a number.
        confidence: how often the interval is to hold the truth; between 0 and 1.
        resamples: how often values are drawn anew, with replacement.
        seed: of the draws.

    Returns:
        The lower and upper end.

    Raises:
        InputError: there are no values, one is NaN or infinite, or confidence is outside (0, 1).

    Example:
        >>> bootstrap_interval([2.0, 2.0, 2.0])
        (2.0, 2.0)
    """
    numbers = as_numbers("values", values)
    check_confidence(confidence)
    check_count("resamples", resamples)
    generator = np.random.default_rng(seed)
    drawn = [statistic(generator.choice(numbers, numbers.size)) for _ in range(resamples)]
    return interval_of(drawn, confidence)


def check_confidence(confidence: float) -> None:
    """Raises an InputError unless 0 < confidence < 1."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, such as 0.95, got {confidence}")


def interval_of(drawn: Any, confidence: float) -> tuple[float, float]:
    """Returns the middle share of resampled statistics, as its lower and upper end."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.asarray(drawn, np.float64), [tail, 1 - tail])
    return float(low), float(high)


def _paired(first: Any, second: Any, axes: int, least: int) -> tuple[np.ndarray, np.ndarray]:
    a, b = (as_numbers(name, each, axes=axes, least=least) for name, each in (("first", first), ("second", second)))
    if a.shape != b.shape:
        raise InputError(f"first and second must be paired value by value, got shapes {a.shape} and {b.shape}")
    return a, b


def compare_seeds(
    first: Num[Array | np.ndarray, "..."] | list[float], second: Num[Array | np.ndarray, "..."] | list[float]
) -> Comparison:
    """Compares two methods by a few seeds each, paired: same task, same seed, same data order.

    *Within noise* means: the median over all pairs of first minus second is no larger in size than what another seed
    does by itself. That is measured as the median over both methods (and all tasks) of half the distance from the
    least to the greatest value over seeds. It is a rule of thumb and no test: with three seeds no test could tell
    anything. Half the distance grows with the number of seeds, so compare verdicts of equally many.

    Args:
        first: values of the first method, (seeds,) or (tasks, seeds).
        second: values of the second method, in the same order.

    Returns:
        The comparison; its limits are the difference minus and plus the noise.

    Raises:
        InputError: there are fewer than two seeds (one says nothing about noise), shapes differ, or a value is NaN or
            infinite.

    Example:
        >>> compare_seeds([1.0, 1.2, 1.1], [1.05, 1.15, 1.15]).within_noise
        True
        >>> compare_seeds([1.0, 1.2, 1.1], [2.0, 2.15, 2.2]).lower
        True
    """
    a, b = _paired(first, second, np.ndim(first), least=2)
    ranges = np.stack([np.ptp(each, axis=-1) / 2 for each in (a, b)])
    difference, noise = float(np.median(a - b)), float(np.median(ranges))
    return Comparison(difference, difference - noise, difference + noise, a.size)


def compare_rows(
    first: Num[Array | np.ndarray, "..."] | list[float],
    second: Num[Array | np.ndarray, "..."] | list[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compares two models by many rows, paired: both were measured on the same rows.

    *Within noise* means: the bootstrap interval, over rows, of the mean of first minus second holds 0. It speaks of
    these two models on other rows, not of the methods on other seeds; for those, take `compare_seeds`.

    Args:
        first: loss, or 0 and 1 for wrong and right, of the first model on every row.
        second: the same of the second model, row by row.
        confidence: of the interval.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The comparison; its limits are the interval.

    Raises:
        InputError: lengths differ, there are no rows, or a value is NaN or infinite.

    Example:
        >>> compare_rows([1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0]).within_noise
        True
    """
    a, b = _paired(first, second, 1, least=1)
    low, high = bootstrap_interval(a - b, confidence=confidence, resamples=resamples, seed=seed)
    return Comparison(float(np.mean(a - b)), low, high, a.size)
