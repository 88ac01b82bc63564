"""Epochs: which examples share a row, and which rows a batch, in a random order that a seed decides."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Int

__all__ = ["BatchPlan", "Mode", "in_order", "plan_epoch"]

Mode = Literal["bucketed", "packed"]
# One batch: for each of its rows, the numbers of the examples in it.
BatchPlan = list[list[int]]

# Examples are sorted by length within windows of so many batches: wide enough that the lengths in a batch are
# close, narrow enough that an epoch's order stays random.
_WINDOW = 16


def plan_epoch(
    lengths: Int[np.ndarray, " examples"],
    *,
    batch_size: int,
    max_length: int,
    mode: Mode,
    seed: int,
    epoch: int,
    drop_remainder: bool,
) -> list[BatchPlan]:
    """Plans the batches of one epoch, a function of its arguments alone.

    Args:
        lengths: how many tokens each example takes in a row; none above `max_length`.
        batch_size: rows a batch.
        max_length: tokens a packed row holds.
        mode: "bucketed": one example a row, examples of like length in a batch; "packed": first-fit packing.
        seed: decides the order, together with `epoch`.
        epoch: the epoch's number, from 0.
        drop_remainder: leave out the last batch where it is not full.

    Returns:
        The batches; only the last may have fewer rows than `batch_size`.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths)).tolist()
    if mode == "packed":
        rows = _first_fit(order, lengths, max_length)
        rows = [rows[i] for i in rng.permutation(len(rows))]
        return in_order(rows, batch_size, drop_remainder)
    # The incomplete batch is set aside before sorting, so that what is dropped is a fair sample.
    full = len(order) - len(order) % batch_size
    window = _WINDOW * batch_size
    alike = [
        i
        for start in range(0, full, window)
        for i in sorted(order[start : min(start + window, full)], key=lambda i: lengths[i])
    ]
    plans = in_order([[i] for i in alike], batch_size)
    plans = [plans[i] for i in rng.permutation(len(plans))]
    remainder = [] if drop_remainder else in_order([[i] for i in order[full:]], batch_size)
    return plans + remainder


def in_order(rows: Sequence[list[int]], batch_size: int, drop_remainder: bool = False) -> list[BatchPlan]:
    """Cuts rows into batches.

    Args:
        rows: the numbers of the examples in each row.
        batch_size: rows a batch.
        drop_remainder: leave out the last batch where it is not full.

    Returns:
        The batches, in the rows' order.

    Example:
        >>> in_order([[0], [1, 3], [2]], batch_size=2)
        [[[0], [1, 3]], [[2]]]
    """
    end = len(rows) - len(rows) % batch_size if drop_remainder else len(rows)
    return [list(rows[start : start + batch_size]) for start in range(0, end, batch_size)]


def _first_fit(order: Sequence[int], lengths: Int[np.ndarray, " examples"], max_length: int) -> list[list[int]]:
    """Puts every example, in order, into the first row that still has room for it."""
    rows: list[list[int]] = []
    room = np.full(len(order), max_length)  # of every row that may come to be
    shortest, first_open = min(lengths[i] for i in order), 0
    for i in order:
        row = first_open + int(np.argmax(room[first_open:] >= lengths[i]))
        if row == len(rows):
            rows.append([])
        rows[row].append(i)
        room[row] -= lengths[i]
        while first_open < len(rows) and room[first_open] < shortest:
            first_open += 1
    return rows
