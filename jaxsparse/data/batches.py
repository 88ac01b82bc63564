"""Batches: examples as arrays of few shapes, length-bucketed or packed, from an iterator that can be resumed."""

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Float32, Int32

from jaxsparse.common.errors import InputError
from jaxsparse.data.epochs import BatchPlan, Mode, in_order, plan_epoch
from jaxsparse.data.examples import Example

__all__ = ["Batch", "batches", "default_buckets", "evaluation_batches", "steps_per_epoch"]


class Batch(NamedTuple):
    """Rows of token ids, as NumPy arrays of shape (batch, length).

    An example of n ids takes n - 1 places: all but its last id as tokens, all but its first as targets. Padding
    is 0 in every field.

    Attributes:
        tokens: int32; what the model sees.
        targets: int32; the id that follows each token.
        weights: float32; 1 where the target belongs to an answer (its closing token included), else 0.
        positions: int32; counted from 0 in every example.
        segments: int32; which example of its row a token belongs to, from 1, and 0 for padding. A token may
            attend to those of its own segment only.
    """

    tokens: Int32[np.ndarray, "batch length"]
    targets: Int32[np.ndarray, "batch length"]
    weights: Float32[np.ndarray, "batch length"]
    positions: Int32[np.ndarray, "batch length"]
    segments: Int32[np.ndarray, "batch length"]


def batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_length: int,
    mode: Mode = "bucketed",
    seed: int = 0,
    epochs: int | None = None,
    drop_remainder: bool = False,
    buckets: Sequence[int] | None = None,
) -> grain.DatasetIterator:
    """Returns the training batches of some epochs, each epoch in a new random order.

    Every epoch holds every example once (but for a dropped remainder), and no batch spans two epochs.

    Args:
        examples: the examples, none longer than `max_length`.
        batch_size: rows a batch.
        max_length: the length of a packed row, and the last bucket.
        mode: "bucketed" puts one example in a row and examples of like length in a batch, and pads each batch
            to the smallest bucket that holds it; "packed" fits whole examples into rows of `max_length`, each
            in the first row with room for it.
        seed: together with an epoch's number the only source of randomness; not negative.
        epochs: how many; None goes on for ever.
        drop_remainder: leave out an epoch's last batch where it is not full; else its missing rows are padding.
        buckets: lengths that a batch may have in "bucketed" mode; by default those of `default_buckets`.

    Returns:
        A grain iterator of `Batch`. Its `get_state()` is a dict that JSON can hold; `set_state()` on the fresh
        iterator of an equal call goes on from there, bit for bit. It works in the calling thread.

    Raises:
        InputError: a size is not positive, an example is too long, or an epoch would hold no batch.
    """
    if epochs is not None and epochs < 1:
        raise InputError(f"epochs={epochs}: must be at least 1, or None for no end")
    planner = _planner(examples, batch_size, max_length, mode, seed, drop_remainder)
    if not planner(0):
        raise InputError(
            f"batch_size={batch_size}: one epoch does not fill a batch; make it smaller, or set drop_remainder=False"
        )
    lengths = _bucket_lengths(buckets, max_length) if mode == "bucketed" else (max_length,)

    def collate(plan: BatchPlan) -> Batch:
        return _collate(examples, plan, batch_size, lengths)

    no_threads = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    numbers = grain.MapDataset.range(epochs or sys.maxsize).to_iter_dataset(no_threads)
    return iter(grain.experimental.FlatMapIterDataset(numbers, _Epoch(planner)).map(collate))


def evaluation_batches(
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_length: int,
    buckets: Sequence[int] | None = None,
) -> Iterator[Batch]:
    """Yields all examples once, in order, one a row; the last batch is filled up with padding.

    Args:
        examples: the examples, none longer than `max_length`.
        batch_size: rows a batch.
        max_length: the last bucket.
        buckets: lengths that a batch may have; by default those of `default_buckets`.

    Returns:
        The batches: ceil(examples / batch_size) of them.

    Raises:
        InputError: a size is not positive, or an example is too long.
    """
    _row_lengths(examples, batch_size, max_length)
    lengths = _bucket_lengths(buckets, max_length)
    plans = in_order([[i] for i in range(len(examples))], batch_size)
    return (_collate(examples, plan, batch_size, lengths) for plan in plans)


def steps_per_epoch(
    examples: Sequence[Example],
    *,
    batch_size: int,
    max_length: int,
    mode: Mode = "bucketed",
    seed: int = 0,
    drop_remainder: bool = False,
    epoch: int = 0,
) -> int:
    """Returns the number of batches in an epoch.

    In "bucketed" mode all epochs have as many; in "packed" mode they may differ by a few, as every epoch packs anew.

    Args:
        examples: as given to `batches`, like all but the last argument.
        batch_size: rows a batch.
        max_length: the length of a packed row.
        mode: "bucketed" or "packed".
        seed: decides the order.
        drop_remainder: whether an incomplete last batch is left out.
        epoch: the epoch's number, from 0.

    Returns:
        The number of batches, exactly.

    Raises:
        InputError: as `batches`.
    """
    return len(_planner(examples, batch_size, max_length, mode, seed, drop_remainder)(epoch))


def default_buckets(max_length: int) -> tuple[int, ...]:
    """Returns 64, 96, 128, 192, 256, …, as far as they are below `max_length`, then `max_length`.

    Every length that occurs is one more compilation of the training step, so there are few; the steps are such that
    the longest row of a batch, from 64 tokens on, is at least two thirds full.

    Args:
        max_length: the last bucket.

    Returns:
        The lengths, ascending.

    Example:
        >>> default_buckets(256), default_buckets(50)
        ((64, 96, 128, 192, 256), (50,))
    """
    lengths = (factor << i for i in range(max_length.bit_length()) for factor in (64, 96))
    return (*(length for length in lengths if length < max_length), max_length)


class _Epoch(grain.experimental.FlatMapTransform):
    """Turns an epoch's number into its batches, as example numbers."""

    def __init__(self, planner: Callable[[int], list[BatchPlan]]):
        self._planner = planner

    def flat_map(self, element: int) -> list[BatchPlan]:
        return self._planner(element)


def _planner(
    examples: Sequence[Example], batch_size: int, max_length: int, mode: Mode, seed: int, drop_remainder: bool
) -> Callable[[int], list[BatchPlan]]:
    """Returns the function from an epoch's number to its batches, the arguments checked."""
    if mode not in ("bucketed", "packed"):
        raise InputError(f"mode={mode!r}: must be 'bucketed' or 'packed'")
    if seed < 0:
        raise InputError(f"seed={seed}: must not be negative")
    lengths = _row_lengths(examples, batch_size, max_length)

    def plan(epoch: int) -> list[BatchPlan]:
        return plan_epoch(
            lengths,
            batch_size=batch_size,
            max_length=max_length,
            mode=mode,
            seed=seed,
            epoch=epoch,
            drop_remainder=drop_remainder,
        )

    return plan


def _row_lengths(examples: Sequence[Example], batch_size: int, max_length: int) -> np.ndarray:
    """Returns how many places each example takes in a row, the arguments checked."""
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size}: must be at least 1")
    if not examples:
        raise InputError("there are no examples to batch")
    for i, example in enumerate(examples):
        if not example.prompt_ids or not example.answer_ids:
            raise InputError(f"example {i}: its {'answer' if example.prompt_ids else 'prompt'} has no tokens")
        if len(example) > max_length:
            raise InputError(f"example {i}: {len(example)} tokens are more than max_length={max_length}")
    return np.array([len(example) - 1 for example in examples])


def _bucket_lengths(buckets: Sequence[int] | None, max_length: int) -> tuple[int, ...]:
    if buckets is None:
        return default_buckets(max_length)
    if any(not 1 <= length <= max_length for length in buckets):
        raise InputError(f"buckets={list(buckets)}: each must be between 1 and max_length={max_length}")
    return tuple(sorted({*buckets, max_length}))


def _collate(examples: Sequence[Example], plan: BatchPlan, batch_size: int, lengths: Sequence[int]) -> Batch:
    """Lays examples out in arrays of the smallest length that holds every row."""
    longest = max(sum(len(examples[i]) - 1 for i in row) for row in plan)
    shape = (batch_size, next(length for length in lengths if length >= longest))
    tokens, targets, positions, segments = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    for r, row in enumerate(plan):
        start = 0
        for segment, i in enumerate(row, start=1):
            prompt, answer = examples[i].prompt_ids, examples[i].answer_ids
            ids = np.array(prompt + answer, np.int32)
            end = start + len(ids) - 1
            tokens[r, start:end] = ids[:-1]
            targets[r, start:end] = ids[1:]
            weights[r, end - len(answer) : end] = 1
            positions[r, start:end] = np.arange(end - start)
            segments[r, start:end] = segment
            start = end
    return Batch(tokens, targets, weights, positions, segments)
