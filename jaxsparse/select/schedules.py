"""When a subspace is picked again."""

import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count

__all__ = [
    "Adaptive",
    "Every",
    "Once",
    "Progress",
    "RefreshEvery",
    "Schedule",
    "adaptive",
    "refresh_schedule",
    "value_at",
]


class Progress(NamedTuple):
    """How far a run is, and how well its supports fit; part of every method's state.

    Attributes:
        steps: optimizer steps taken; skipped ones do not count.
        refreshes: how often a support was picked, the first time included.
        last_refresh: the step of the last refresh; -1 before the first.
        retention: ||masked g||^2 / ||g||^2 over all targets at the last step (GASDU, equation 4).
        retention_mean: the mean of the same ratio over matrices (GASDU, figure 4).
        retention_at_refresh: `retention` right after the last refresh.
        skipped: steps left out because a slot's gradient was NaN or infinite.
    """

    steps: Int[Array, ""]
    refreshes: Int[Array, ""]
    last_refresh: Int[Array, ""]
    retention: Float[Array, ""]
    retention_mean: Float[Array, ""]
    retention_at_refresh: Float[Array, ""]
    skipped: Int[Array, ""]

    @classmethod
    def start(cls) -> "Progress":
        """Returns the progress of a run that has not begun."""
        # An array of its own for every field: a step may donate them all.
        counts = {name: jnp.array(start, jnp.int32) for name, start in _COUNTS.items()}
        ratios = {name: jnp.ones([], jnp.float32) for name in cls._fields if name not in _COUNTS}
        return cls(**counts, **ratios)


_COUNTS = {"steps": 0, "refreshes": 0, "last_refresh": -1, "skipped": 0}


def value_at(value: Any, step: Any) -> Any:
    """Returns a value, or what a schedule says at a step.

    Example:
        >>> value_at(0.5, 3), value_at(lambda step: 2 * step, 3)
        (0.5, 6)
    """
    return value(step) if callable(value) else value


@dataclass(frozen=True)
class Once:
    """Pick at the first step and never again."""

    def due(self, progress: Progress) -> Bool[Array, ""]:
        """Returns whether this step picks."""
        return progress.last_refresh < 0


@dataclass(frozen=True)
class Every:
    """Pick at step 0 and whenever M steps have gone by since the last pick.

    For a constant M these are the steps 0, M, 2M, ..., as the authors' code of GASDU (METHODS.md).

    Attributes:
        period: M, a number (it may be traced), or a schedule from the step to M.
    """

    period: Any

    def __post_init__(self) -> None:
        if isinstance(self.period, numbers.Real):
            check_count("the period of a schedule", self.period)

    def due(self, progress: Progress) -> Bool[Array, ""]:
        """Returns whether this step picks."""
        period = value_at(self.period, progress.steps)
        return (progress.last_refresh < 0) | (progress.steps - progress.last_refresh >= jnp.maximum(period, 1))


@dataclass(frozen=True)
class Adaptive:
    """Pick again when the measured retention has fallen (GASDU's proposed extension).

    The retention of the last step is held against the value right after the last pick.

    Attributes:
        threshold: pick when retention < threshold * retention at the last pick; in (0, 1].
        minimum: never pick sooner than so many steps after the last pick.
        maximum: always pick after so many steps.
    """

    threshold: float
    minimum: int
    maximum: int

    def due(self, progress: Progress) -> Bool[Array, ""]:
        """Returns whether this step picks."""
        age = progress.steps - progress.last_refresh
        fallen = progress.retention < self.threshold * progress.retention_at_refresh
        return (progress.last_refresh < 0) | ((age >= self.minimum) & fallen) | (age >= self.maximum)


Schedule = Once | Every | Adaptive
RefreshEvery = int | jax.Array | Callable[[Any], Any] | Adaptive | str


def adaptive(threshold: float = 0.8, *, minimum: int = 10, maximum: int = 400) -> Adaptive:
    """Refresh when retention, relative to the value right after the last refresh, falls under a threshold.

    Args:
        threshold: share of the retention at the last refresh; in (0, 1]. 0.8 is this package's choice; the
            paper proposes the rule without a number.
        minimum: fewest steps between refreshes, at least 1.
        maximum: most steps between refreshes, at least `minimum`; 400 is the largest period of GASDU's
            table 3 that stays competitive.

    Returns:
        A schedule for `gasdu(refresh_every=...)`.

    Raises:
        InputError: a value is out of range.

    Example:
        >>> adaptive(0.9, minimum=5, maximum=100)
        Adaptive(threshold=0.9, minimum=5, maximum=100)
    """
    if not 0 < threshold <= 1:
        raise InputError(f"threshold must lie in (0, 1], got {threshold}")
    if not 1 <= minimum <= maximum:
        raise InputError(f"minimum and maximum must satisfy 1 <= minimum <= maximum, got {minimum} and {maximum}")
    return Adaptive(threshold, minimum, maximum)


def refresh_schedule(refresh_every: RefreshEvery) -> Schedule:
    """Turns what a user gives as `refresh_every` into a schedule.

    Args:
        refresh_every: M in steps, at least 1 (it may be a traced array), a schedule from the step to M,
            `adaptive(...)`, or its text for command lines, "adaptive:THRESHOLD:MINIMUM:MAXIMUM", which may end early.

    Raises:
        InputError: M is below 1, or the text is no schedule.
        TypeError: M is not an integer.

    Example:
        >>> refresh_schedule(50)
        Every(period=50)
        >>> refresh_schedule("adaptive:0.9:5")
        Adaptive(threshold=0.9, minimum=5, maximum=400)
    """
    if isinstance(refresh_every, str):
        return _adaptive_from_text(refresh_every)
    if isinstance(refresh_every, Adaptive):
        return refresh_every
    if callable(refresh_every) or isinstance(refresh_every, jax.Array):
        return Every(refresh_every)
    if isinstance(refresh_every, bool) or not isinstance(refresh_every, numbers.Integral):
        raise TypeError(
            f"refresh_every must be a whole number of steps, a schedule or js.adaptive(...), got {refresh_every!r}"
        )
    if refresh_every < 1:
        raise InputError(f"refresh_every must be at least 1 step, got {refresh_every}")
    return Every(int(refresh_every))


def _adaptive_from_text(text: str) -> Adaptive:
    """Reads `adaptive`, `adaptive:0.8`, `adaptive:0.8:10` or `adaptive:0.8:10:400`."""
    kind, *values = text.split(":")
    try:
        if kind != "adaptive" or len(values) > 3:
            raise ValueError(text)
        given: dict[str, Any] = dict(zip(("minimum", "maximum"), map(int, values[1:]), strict=False))
        threshold = [float(value) for value in values[:1]]
    except ValueError:
        raise InputError(
            "refresh_every must be a whole number of steps, or adaptive:THRESHOLD:MINIMUM:MAXIMUM such as "
            f"adaptive:0.8:10:400, which may end early; got {text!r}"
        ) from None
    return adaptive(*threshold, **given)
