"""The local Polyak-Łojasiewicz condition along a run (GASDU, section 4.3 and figure 3)."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Float, Num

from jaxsparse.analysis.statistics import as_numbers, check_confidence, interval_of
from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count

__all__ = ["PLFit", "fit_pl"]

_FEWEST = 10
"""Points below which neither a slope nor its interval says anything."""


@dataclass(frozen=True)
class PLFit:
    """A straight line through log ‖g‖² against log(f − f*), natural logarithms.

    Attributes:
        slope: of the line; 1 where the condition is tight along the run (GASDU, section 4.3).
        slope_interval: lower and upper end of the slope's interval.
        intercept: of the line; log 2μ where the slope is 1.
        optimum: f*, as given or estimated.
        mu: the largest μ for which ½‖g‖² ≥ μ (f − f*) holds at every point, the lower envelope.
        typical_mu: the median over the points of ½‖g‖² / (f − f*).
        autocorrelation: of neighbouring points' distances from the line, −1 to 1; NaN where all lie on the line.
        explained: share of the variance of log ‖g‖² that the line explains (r²).
        points: number of points in the fit.
        left_out: number of points before the cut at the end whose logarithm does not exist: f = f*, or g = 0.
    """

    slope: float
    slope_interval: tuple[float, float]
    intercept: float
    optimum: float
    mu: float
    typical_mu: float
    autocorrelation: float
    explained: float
    points: int
    left_out: int


def fit_pl(
    losses: Num[Array | np.ndarray, "..."] | list[float],
    squared_gradient_norms: Num[Array | np.ndarray, "..."] | list[float],
    *,
    optimum: float | None = None,
    drop_last: int = 50,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> PLFit:
    """Fits log ‖g‖² = a + b·log(f − f*) over the steps of a run (GASDU, section 4.3, equation 5).

    As in the paper, f* is the least loss seen in the run unless it is given, and the last 50 steps take no part, "to
    avoid artifacts introduced by convergence plateaus". The least loss is at best as low as the true f*, so that near
    the end f − f* comes out too small: that bends the points to a slope below 1 and makes μ too large. Give a bound
    (0 for a cross-entropy) to see how much depends on it. Noise in the losses flattens the slope as well: the paper
    takes f on a held-out set, and the gradient of the training loss.

    Steps follow one another, so their distances from the line are not independent, and the interval that textbooks
    give would be too narrow. This one resamples blocks of √n neighbouring steps (the moving-block bootstrap) and takes
    percentiles of the slope; `autocorrelation` says how much that was needed.

    Args:
        losses: f at every step, (steps,).
        squared_gradient_norms: ‖g‖² at the same steps, (steps,).
        optimum: f*; None: the least of the losses.
        drop_last: steps at the end that only serve to find f*.
        confidence: how often the interval is to hold the slope; between 0 and 1.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Returns:
        The fit.

    Raises:
        InputError: lengths differ, a value is not finite, a squared norm is negative, f* lies above a loss, or too few
            different points are left.

    Example:
        >>> x = 0.9 ** np.arange(100)       # gradient descent on 3/2 x²
        >>> fit = fit_pl(1.5 * x**2, 9.0 * x**2, optimum=0.0)
        >>> round(fit.slope, 6), round(fit.mu, 6)
        (1.0, 3.0)
    """
    check_count("drop_last", drop_last, least=0)
    check_count("resamples", resamples)
    check_confidence(confidence)
    f = as_numbers("losses", losses)
    squares = as_numbers("squared_gradient_norms", squared_gradient_norms)
    if f.shape != squares.shape:
        raise InputError(f"losses and squared_gradient_norms must be as many, got {f.size} and {squares.size}")
    if squares.min() < 0:
        raise InputError(f"squared_gradient_norms must not be negative, got {squares.min()}")
    if optimum is not None and not optimum <= f.min():
        raise InputError(f"optimum={optimum} lies above the least loss, {f.min()}")
    best = float(f.min() if optimum is None else optimum)
    kept = max(f.size - drop_last, 0)
    excess, squares = f[:kept] - best, squares[:kept]
    usable = (excess > 0) & (squares > 0)
    if usable.sum() < _FEWEST:
        raise InputError(
            f"drop_last={drop_last} of {f.size} steps leaves {usable.sum()} with f > f* and a gradient; "
            f"a slope needs at least {_FEWEST}"
        )
    x, y = np.log(excess[usable]), np.log(squares[usable])
    if np.ptp(x) <= 1e-9 * max(1.0, float(np.abs(x).max())):
        raise InputError(f"losses hardly change (f − f* stays at {excess[usable][0]:.3g}): no slope can be fitted")
    slope, intercept = _line(x, y)
    residuals = y - intercept - slope * x
    drawn = _resampled_slopes(x, y, resamples, np.random.default_rng(seed))
    ratios = squares[excess > 0] / (2 * excess[excess > 0])
    return PLFit(
        slope=slope,
        slope_interval=interval_of(drawn, confidence),
        intercept=intercept,
        optimum=best,
        mu=float(ratios.min()),
        typical_mu=float(np.median(ratios)),
        autocorrelation=_autocorrelation(residuals, y),
        explained=float(1 - residuals.var() / y.var()) if y.var() else math.nan,
        points=int(usable.sum()),
        left_out=int(kept - usable.sum()),
    )


def _line(x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"]) -> tuple[float, float]:
    """Slope and intercept of the least-squares line."""
    middle = x - x.mean()
    slope = float(middle @ (y - y.mean()) / (middle @ middle))
    return slope, float(y.mean() - slope * x.mean())


def _resampled_slopes(
    x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"], resamples: int, generator: np.random.Generator
) -> Float[np.ndarray, " resamples"]:
    """Slopes of as many points, drawn as blocks of neighbours; draws of one x alone, which have none, are left out."""
    block = math.isqrt(x.size)
    starts = generator.integers(0, x.size - block + 1, (resamples, -(-x.size // block), 1))
    at = (starts + np.arange(block)).reshape(resamples, -1)[:, : x.size]
    xs, ys = x[at] - x[at].mean(axis=1, keepdims=True), y[at]
    variances = (xs * xs).sum(axis=1)
    sound = variances > 0
    return (xs * ys).sum(axis=1)[sound] / variances[sound]


def _autocorrelation(residuals: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"]) -> float:
    """Correlation of neighbours; NaN where the residuals are rounding."""
    if residuals.std() <= 1e-9 * max(float(np.abs(y).max()), 1e-300):
        return math.nan
    middle = residuals - residuals.mean()
    return float(middle[1:] @ middle[:-1] / (middle @ middle))
