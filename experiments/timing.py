"""Times of things done in turns, in one process: on a noisy machine only ratios of such times mean anything."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

__all__ = ["in_turns", "median_and_spread"]


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Returns the median, and half the distance between the quartiles.

    Example:
        >>> median_and_spread([1.0, 2.0, 3.0, 4.0, 5.0])
        (3.0, 1.0)
    """
    low, middle, high = np.percentile(seconds, (25, 50, 75))
    return float(middle), float(high - low) / 2


def in_turns(
    routes: Mapping[str, Callable[[], Any]], rounds: int, *, calls: int = 1, warm_up: int = 1
) -> dict[str, tuple[float, float]]:
    """Times functions in turns; a round waits for what they return.

    Args:
        routes: functions without arguments, by name.
        rounds: how often each is timed.
        calls: one after the other and timed together: on an accelerator, starting one hides behind running another.
        warm_up: rounds before these, not counted.

    Returns:
        Median and spread of the seconds of one call, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in routes}
    for turn in range(rounds + warm_up):
        for name, route in routes.items():
            start = time.perf_counter()
            jax.block_until_ready([route() for _ in range(calls)][-1])
            if turn >= warm_up:
                seconds[name].append((time.perf_counter() - start) / calls)
    return {name: median_and_spread(each) for name, each in seconds.items()}
