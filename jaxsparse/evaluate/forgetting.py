"""What tuning costs elsewhere: questions and text that the base knew and the tuned model forgot; collapsed runs."""

import math
from collections.abc import Sequence

from jaxsparse.common.errors import InputError
from jaxsparse.evaluate.held_out import Measurement

__all__ = ["collapse_rate", "forget_ratio", "forgotten_text"]


def forget_ratio(before: Sequence[bool], after: Sequence[bool]) -> float | None:
    """Returns the share of what a model answered right before tuning that it answers wrong after.

    GaLLoP's abstract names the ratio; METHODS.md defines it: of questions of tasks that were not trained on, right
    before and wrong after.

    Args:
        before: for every question whether the base answers it right.
        after: the same of the tuned model, in the same order.

    Returns:
        The share, from 0 to 1; None where the base answers nothing right, and so can forget nothing.

    Raises:
        InputError: they are of different length.

    Example:
        >>> forget_ratio([True, True, False], [True, False, True])
        0.5
    """
    if len(before) != len(after):
        raise InputError(f"before has {len(before)} answers and after {len(after)}; they must be of the same questions")
    known = [now for then, now in zip(before, after, strict=True) if then]
    return sum(not now for now in known) / len(known) if known else None


def collapse_rate(scores: Sequence[float], base: float, *, share: float = 0.5) -> float:
    """Returns the share of runs that end with less than a share of the base's score: with a model that is broken.

    The paper's own threshold is not to be had (its abstract alone is); half of the base's score is the choice here.

    Args:
        scores: of runs that differ by their seed, on a task that was not trained on.
        base: the base's score on it, above 0.
        share: of the base's score, below which a run has collapsed.

    Raises:
        InputError: there are no runs, or the base scores nothing.

    Example:
        >>> collapse_rate([0.4, 0.1, 0.5, 0.6], base=0.5)
        0.25
    """
    if not scores or base <= 0:
        raise InputError(f"there must be runs and a base with a score above 0, got {len(scores)} runs and base={base}")
    return sum(not score >= share * base for score in scores) / len(scores)


def forgotten_text(before: Measurement, after: Measurement) -> float:
    """Returns by what factor the perplexity of the same general text grew with tuning.

    Args:
        before: what `measure_text` found of the base.
        after: what it found of the tuned model, on the same windows.

    Returns:
        The factor: above 1 where the model forgot.

    Raises:
        InputError: they are not of equally many windows.

    Example:
        >>> round(forgotten_text(Measurement(2.0, float("nan"), 8, ()), Measurement(2.1, float("nan"), 8, ())), 3)
        1.105
    """
    if before.rows != after.rows:
        raise InputError(f"before has {before.rows} windows and after {after.rows}; they must be of the same text")
    try:
        return math.exp(after.loss - before.loss)
    except OverflowError:
        return math.inf
