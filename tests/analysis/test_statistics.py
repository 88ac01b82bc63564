"""Medians, intervals and what counts as within noise."""

import numpy as np
import pytest

from jaxsparse.analysis.gap import generalisation_gap
from jaxsparse.analysis.statistics import bootstrap_interval, compare_rows, compare_seeds, spread
from jaxsparse.common.errors import InputError


def test_a_spread_holds_all_values_and_its_median_stands_up_to_one_that_diverged(rng: np.random.Generator) -> None:
    values = rng.normal(size=7)
    whole = spread(values)
    assert whole.least == values.min()
    assert whole.greatest == values.max()
    assert whole.median == np.sort(values)[3]
    values[np.argmax(values)] = 1e9
    assert spread(values).median == whole.median


def test_an_interval_covers_the_mean_about_as_often_as_it_says(rng: np.random.Generator) -> None:
    def covers() -> bool:
        low, high = bootstrap_interval(
            rng.exponential(size=60), confidence=0.8, resamples=200, seed=int(rng.integers(99))
        )
        return low <= 1.0 <= high

    share = np.mean([covers() for _ in range(300)])
    assert 0.65 < share < 0.9


def test_an_interval_is_of_the_statistic_asked_for_and_the_same_for_the_same_seed(rng: np.random.Generator) -> None:
    values = np.concatenate([rng.normal(size=40), [1e6]])
    low, high = bootstrap_interval(values, np.median, seed=3)
    assert -2 < low <= np.median(values) <= high < 2
    assert (low, high) == bootstrap_interval(values, np.median, seed=3)
    wider = bootstrap_interval(values, np.median, seed=3, confidence=0.999)
    assert wider[0] <= low
    assert wider[1] >= high


def test_seeds_differ_by_more_than_noise_only_where_the_shift_is_larger_than_half_their_range(
    rng: np.random.Generator,
) -> None:
    seeds = rng.normal(size=5)
    noise = np.ptp(seeds) / 2
    for factor, verdict in ((0.9, "within_noise"), (1.1, "higher"), (-1.1, "lower"), (-0.9, "within_noise")):
        comparison = compare_seeds(seeds + factor * noise, seeds)
        np.testing.assert_allclose(comparison.difference, factor * noise, rtol=1e-6)
        assert [name for name in ("within_noise", "higher", "lower") if getattr(comparison, name)] == [verdict]


def test_tasks_that_lie_far_apart_are_no_noise(rng: np.random.Generator) -> None:
    tasks = np.array([[0.0], [100.0]]) + 0.01 * rng.uniform(size=(2, 4))
    assert compare_seeds(tasks + 1.0, tasks).higher
    assert compare_seeds((tasks + 1.0).ravel(), tasks.ravel()).within_noise


def test_rows_are_compared_in_pairs(rng: np.random.Generator) -> None:
    hard = 10 * rng.normal(size=200)
    better = hard - 0.5 + 0.1 * rng.normal(size=200)
    assert compare_rows(better, hard).lower
    assert compare_rows(hard, better).higher
    assert not compare_rows(better, rng.permutation(hard)).lower


def test_a_gap_is_test_minus_train_and_its_interval_narrows_with_rows(rng: np.random.Generator) -> None:
    train, test = rng.exponential(size=4000), 0.5 + rng.exponential(size=4000)
    many = generalisation_gap(train, test, resamples=300)
    few = generalisation_gap(train[:100], test[:100], resamples=300)
    np.testing.assert_allclose(many.gap, test.mean() - train.mean())
    assert many.low < many.gap < many.high
    assert many.high - many.low < 0.5 * (few.high - few.low)
    assert abs(many.gap - 0.5) < 0.15
    for rows in ((train[:100], test), (train, test[:100])):  # either set alone makes the gap uncertain
        one = generalisation_gap(*rows, resamples=300)
        assert one.high - one.low > 2 * (many.high - many.low)
    swapped = generalisation_gap(test, train, resamples=300)
    assert swapped.gap == -many.gap
    assert swapped.high < 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: spread([]), "values must hold at least 1"),
        (lambda: spread([1.0, float("nan")]), "finite, got nan at 1"),
        (lambda: compare_seeds([1.0], [2.0]), "at least 2"),
        (lambda: compare_seeds([1.0, 2.0], [1.0, 2.0, 3.0]), "paired"),
        (lambda: compare_rows([1.0], []), "second must hold"),
        (lambda: bootstrap_interval([1.0], confidence=95.0), "confidence must lie between 0 and 1"),
        (lambda: bootstrap_interval([1.0], resamples=0), "resamples must be at least 1"),
        (lambda: generalisation_gap([], [1.0]), "train_losses must hold"),
    ],
)
def test_what_cannot_be_summed_up_says_why(call: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()  # type: ignore[operator]
