"""The fit of the Polyak-Łojasiewicz condition, on functions that are known."""

import numpy as np
import pytest

from jaxsparse.analysis.pl_fit import fit_pl
from jaxsparse.common.errors import InputError


def descend(curvatures: np.ndarray, start: np.ndarray, rate: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """f and ‖g‖² of gradient descent on ½ Σ h x²."""
    x = start * (1 - rate * curvatures) ** np.arange(steps)[:, None]
    return 0.5 * (x**2) @ curvatures, (x**2) @ curvatures**2


def test_a_round_quadratic_has_slope_one_and_its_curvature_as_mu(rng: np.random.Generator) -> None:
    h = rng.uniform(0.1, 5)
    f, squares = descend(
        np.full(3, h), rng.normal(size=3), 0.02 / h, 200
    )  # f falls to 1/400: the lift rounds away more
    lift = rng.normal()
    fit = fit_pl(f + lift, squares, optimum=lift, drop_last=50)
    np.testing.assert_allclose(fit.slope, 1, atol=1e-4)
    np.testing.assert_allclose(fit.slope_interval, 1, atol=1e-4)
    np.testing.assert_allclose([fit.mu, fit.typical_mu, np.exp(fit.intercept) / 2], h, rtol=1e-3)
    assert fit.points == 150


def test_mu_of_any_quadratic_lies_above_its_least_curvature_and_reaches_it_at_the_end(rng: np.random.Generator) -> None:
    h = rng.uniform(0.5, 10, size=6)
    f, squares = descend(h, rng.uniform(0.5, 1, size=6), 0.05 / h.max() * 10, 400)
    fit = fit_pl(f, squares, optimum=0.0, drop_last=0)
    assert h.min() * (1 - 1e-9) <= fit.mu <= fit.typical_mu <= h.max()
    assert np.all(squares >= 2 * fit.mu * f * (1 - 1e-9))
    early = fit_pl(f, squares, optimum=0.0, drop_last=350)
    assert early.mu >= fit.mu


@pytest.mark.parametrize("power", [1.5, 3.0, 4.0])
def test_the_slope_of_a_power_is_known(power: float, rng: np.random.Generator) -> None:
    x = rng.uniform(0.5, 2) * 0.97 ** np.arange(300)
    fit = fit_pl(x**power, power**2 * x ** (2 * power - 2), optimum=0.0)
    np.testing.assert_allclose(fit.slope, 2 - 2 / power, rtol=1e-6)
    assert fit.explained > 1 - 1e-9


def test_without_an_optimum_the_least_loss_of_the_whole_run_is_taken(rng: np.random.Generator) -> None:
    f, squares = descend(np.full(2, 1.0), rng.uniform(0.5, 1, size=2), 0.05, 300)
    fit = fit_pl(f + 2.0, squares, drop_last=50)
    assert fit.optimum == (f + 2.0).min()
    assert fit.points == 250
    assert fit.left_out == 0
    np.testing.assert_allclose(fit.slope, 1, atol=0.02)
    whole = fit_pl(f + 2.0, squares, drop_last=0)
    assert whole.left_out == 1
    # What the docstring warns of: at the end, f − f* is too small, the slope too.
    assert whole.slope < fit.slope < 1
    assert whole.mu >= 1


def test_the_interval_holds_the_slope_where_neighbours_err_together(rng: np.random.Generator) -> None:
    def covers() -> tuple[bool, bool]:
        noise = np.zeros(200)
        for at in range(1, 200):
            noise[at] = 0.8 * noise[at - 1] + 0.2 * rng.normal()
        f = np.exp(np.linspace(0, -3, 200))
        fit = fit_pl(f, 4 * f * np.exp(noise), optimum=0.0, drop_last=0, resamples=200, seed=int(rng.integers(99)))
        assert fit.autocorrelation > 0.4
        x, residuals = np.log(f), noise
        textbook = 1.97 * residuals.std() / (x.std() * np.sqrt(200))
        low, high = fit.slope_interval
        return low <= 1 <= high, abs(fit.slope - 1) <= textbook

    ours, naive = np.mean([covers() for _ in range(80)], axis=0)
    assert ours > 0.7
    assert ours > naive + 0.1


def test_steps_at_the_optimum_or_without_a_gradient_are_left_out_of_the_line(rng: np.random.Generator) -> None:
    f, squares = descend(np.full(2, 1.0), rng.uniform(0.5, 1, size=2), 0.05, 100)
    clean = fit_pl(f, squares, optimum=0.0, drop_last=0)
    f[3], squares[7] = 0.0, 0.0
    fit = fit_pl(f, squares, optimum=0.0, drop_last=0)
    assert fit.left_out == 2
    np.testing.assert_allclose(fit.slope, clean.slope, atol=1e-6)
    assert fit.mu == 0  # no gradient above the optimum: no μ > 0 holds


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"losses": np.ones(99)}, "as many, got 99 and 100"),
        ({"losses": np.ones(100), "optimum": 0.0}, "hardly change"),
        ({"losses": np.full(100, np.nan)}, "losses must be finite, got nan at 0"),
        ({"squared_gradient_norms": -np.ones(100)}, "must not be negative"),
        ({"optimum": 0.5}, "optimum=0.5 lies above the least loss"),
        ({"drop_last": 95}, "drop_last=95 of 100 steps leaves 5"),
        ({"drop_last": 200}, "leaves 0"),
        ({"drop_last": -1}, "drop_last must be at least 0"),
        ({"confidence": 1.0}, "confidence"),
    ],
)
def test_series_without_a_slope_say_why(change: dict, words: str) -> None:
    f = 0.95 ** np.arange(100)
    given = {"losses": f, "squared_gradient_norms": 2 * f, "optimum": 0.0, "drop_last": 10, **change}
    with pytest.raises(InputError, match=words):
        fit_pl(given.pop("losses"), given.pop("squared_gradient_norms"), **given)
