import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from jaxsparse.common.errors import InputError
from jaxsparse.data import Batch, Example, batches, default_buckets, evaluation_batches, steps_per_epoch

MODES = ["bucketed", "packed"]
modes = st.sampled_from(MODES)
seeds = st.integers(0, 2**32 - 1)


def random_examples(rng: np.random.Generator, count: int, max_length: int) -> list[Example]:
    examples = []
    for _ in range(count):
        length = int(rng.integers(2, max_length + 1))
        ids = [int(i) for i in rng.integers(1, 2**15, length)]
        answer = int(rng.integers(1, length))
        examples.append(Example(tuple(ids[:-answer]), tuple(ids[-answer:])))
    return examples


def examples_in(batch: Batch) -> list[Example]:
    """Reads the examples back out of a batch, and checks every field on the way."""
    found = []
    for tokens, targets, weights, positions, segments in zip(*batch, strict=True):
        used = int((segments > 0).sum())
        assert all(not field[used:].any() for field in (tokens, targets, weights, positions, segments))
        assert (np.diff(segments[:used]) >= 0).all()
        assert set(segments[:used]) == set(range(1, int(segments.max(initial=0)) + 1))
        for segment in range(1, int(segments.max(initial=0)) + 1):
            at = np.flatnonzero(segments == segment)
            assert (positions[at] == np.arange(len(at))).all()
            assert (tokens[at][1:] == targets[at][:-1]).all()
            ids = (int(tokens[at[0]]), *(int(i) for i in targets[at]))
            answer = int(weights[at].sum())
            assert (weights[at] == (np.arange(len(at)) >= len(at) - answer)).all()
            found.append(Example(ids[:-answer], ids[-answer:]))
    return found


def same(left: Iterable[Batch], right: Iterable[Batch]) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(a.dtype == b.dtype and np.array_equal(a, b) for pair in pairs for a, b in zip(*pair, strict=True))


@settings(deadline=None)
@given(
    seed=seeds,
    count=st.integers(1, 60),
    batch_size=st.integers(1, 9),
    max_length=st.integers(2, 150),
    mode=modes,
    epochs=st.integers(1, 3),
)
def test_every_epoch_holds_every_example_once(
    seed: int, count: int, batch_size: int, max_length: int, mode: str, epochs: int
) -> None:
    examples = random_examples(np.random.default_rng(seed), count, max_length)
    options = {"batch_size": batch_size, "max_length": max_length, "mode": mode, "seed": seed}
    stream = batches(examples, **options, epochs=epochs)
    for epoch in range(epochs):
        steps = [next(stream) for _ in range(steps_per_epoch(examples, **options, epoch=epoch))]
        assert Counter(e for batch in steps for e in examples_in(batch)) == Counter(examples)
        for batch in steps:
            assert {field.shape for field in batch} == {batch.tokens.shape}
            assert batch.tokens.shape[0] == batch_size
            assert [field.dtype for field in batch] == [np.int32, np.int32, np.float32, np.int32, np.int32]
    with pytest.raises(StopIteration):
        next(stream)


@settings(deadline=None, max_examples=50)
@given(seed=seeds, count=st.integers(1, 40), batch_size=st.integers(1, 6), mode=modes, data=st.data())
def test_a_restored_iterator_goes_on_bit_for_bit(
    seed: int, count: int, batch_size: int, mode: str, data: st.DataObject
) -> None:
    examples = random_examples(np.random.default_rng(seed), count, 70)
    options = {"batch_size": batch_size, "max_length": 70, "mode": mode, "seed": seed, "epochs": 3}
    total = len(list(batches(examples, **options)))
    stop = data.draw(st.integers(0, total))
    stream = batches(examples, **options)
    for _ in range(stop):
        next(stream)
    state = json.loads(json.dumps(stream.get_state()))
    rest = list(stream)
    assert len(rest) == total - stop
    restored = batches(examples, **options)
    restored.set_state(state)
    assert json.loads(json.dumps(restored.get_state())) == state
    assert same(restored, rest)


@pytest.mark.parametrize("mode", MODES)
def test_a_used_iterator_can_be_set_back(mode: str, rng: np.random.Generator) -> None:
    examples = random_examples(rng, 30, 40)
    stream = batches(examples, batch_size=4, max_length=40, mode=mode, seed=int(rng.integers(2**31)), epochs=2)
    next(stream)
    state = stream.get_state()
    rest = list(stream)
    stream.set_state(state)
    assert same(stream, rest)


@pytest.mark.parametrize("mode", MODES)
def test_epochs_and_seeds_differ_in_order_and_equal_seeds_do_not(mode: str, rng: np.random.Generator) -> None:
    examples = random_examples(rng, 200, 40)
    seed = int(rng.integers(2**31))

    def orders(seed: int) -> list[list[Example]]:
        options = {"batch_size": 8, "max_length": 40, "mode": mode, "seed": seed}
        stream = batches(examples, **options)
        lengths = [steps_per_epoch(examples, **options, epoch=epoch) for epoch in range(2)]
        return [[e for _ in range(length) for e in examples_in(next(stream))] for length in lengths]

    first, second = orders(seed)
    assert first != second
    assert orders(seed) == [first, second]
    assert orders(seed + 1)[0] not in (first, second)


@settings(deadline=None)
@given(seed=seeds, count=st.integers(1, 40), batch_size=st.integers(1, 6), mode=modes)
def test_a_dropped_remainder_leaves_full_batches_only(seed: int, count: int, batch_size: int, mode: str) -> None:
    examples = random_examples(np.random.default_rng(seed), count, 50)
    options = {"batch_size": batch_size, "max_length": 50, "mode": mode, "seed": seed, "drop_remainder": True}
    steps = steps_per_epoch(examples, **options)
    if steps == 0:
        with pytest.raises(InputError, match=f"batch_size={batch_size}"):
            batches(examples, **options)
        return
    if mode == "bucketed":
        assert steps == count // batch_size
    stream = list(batches(examples, **options, epochs=1))
    assert len(stream) == steps
    assert all((batch.segments[:, 0] == 1).all() for batch in stream)
    assert not Counter(e for batch in stream for e in examples_in(batch)) - Counter(examples)


@settings(deadline=None)
@given(seed=seeds, count=st.integers(1, 40), batch_size=st.integers(1, 6), max_length=st.integers(2, 300))
def test_a_bucketed_batch_has_the_smallest_bucket_that_holds_it(
    seed: int, count: int, batch_size: int, max_length: int
) -> None:
    rng = np.random.default_rng(seed)
    examples = random_examples(rng, count, max_length)
    buckets = [int(b) for b in rng.integers(1, max_length + 1, 3)]
    assert math.ceil(count / batch_size) == steps_per_epoch(examples, batch_size=batch_size, max_length=max_length)
    for chosen, lengths in ((None, default_buckets(max_length)), (buckets, sorted({*buckets, max_length}))):
        stream: Sequence[Batch] = list(
            batches(examples, batch_size=batch_size, max_length=max_length, epochs=1, seed=seed, buckets=chosen)
        )
        for batch in stream:
            longest = int((batch.segments > 0).sum(axis=1).max())
            assert batch.tokens.shape[1] == min(length for length in lengths if length >= longest)


def test_bucketing_by_length_pads_less_than_order_does(rng: np.random.Generator) -> None:
    examples = random_examples(rng, 500, 200)
    options = {"batch_size": 8, "max_length": 200, "buckets": range(10, 200, 10)}
    bucketed = sum(batch.tokens.size for batch in batches(examples, **options, epochs=1))
    assert bucketed < 0.8 * sum(batch.tokens.size for batch in evaluation_batches(examples, **options))


@settings(deadline=None)
@given(seed=seeds, count=st.integers(1, 80), max_length=st.integers(2, 100))
def test_packed_rows_are_full_as_first_fit_fills_them(seed: int, count: int, max_length: int) -> None:
    examples = random_examples(np.random.default_rng(seed), count, max_length)
    stream = list(batches(examples, batch_size=3, max_length=max_length, mode="packed", seed=seed, epochs=1))
    assert {batch.tokens.shape for batch in stream} == {(3, max_length)}
    used = [int(row) for batch in stream for row in (batch.segments > 0).sum(axis=1) if row]
    # First fit opens a row only for what no earlier row has room for.
    assert sum(2 * row <= max_length for row in used) <= 1


@settings(deadline=None)
@given(seed=seeds, count=st.integers(1, 40), batch_size=st.integers(1, 6))
def test_evaluation_sees_all_examples_in_order(seed: int, count: int, batch_size: int) -> None:
    examples = random_examples(np.random.default_rng(seed), count, 90)
    stream = list(evaluation_batches(examples, batch_size=batch_size, max_length=90))
    assert len(stream) == math.ceil(count / batch_size)
    assert [e for batch in stream for e in examples_in(batch)] == examples
    assert {batch.tokens.shape for batch in stream} <= {(batch_size, 64), (batch_size, 90)}


def test_batches_go_on_for_ever_unless_told_otherwise(rng: np.random.Generator) -> None:
    stream = batches(random_examples(rng, 3, 10), batch_size=2, max_length=10)
    seen = Counter(e for _ in range(2 * 50) for e in examples_in(next(stream)))
    assert set(seen.values()) == {50}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 9}, "example 1: 10 tokens are more than max_length=9"),
        ({"mode": "sorted"}, "'sorted'"),
        ({"seed": -1}, "seed=-1"),
        ({"epochs": 0}, "epochs=0"),
        ({"batch_size": 3, "drop_remainder": True}, "batch_size=3"),
        ({"buckets": [8, 300]}, "buckets=.8, 300."),
        ({"examples": []}, "no examples"),
        ({"examples": [Example((1,), (2,)), Example((1,), ())]}, "example 1: its answer has no tokens"),
        ({"examples": [Example((), (2,))]}, "example 0: its prompt has no tokens"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    arguments = {"examples": [Example((1, 2), (3,)), Example((4,) * 6, (5,) * 4)], "batch_size": 2, "max_length": 16}
    # In tests the type of mode is checked at run time, before our own message is reached.
    with pytest.raises(TypeCheckError if "mode" in options else InputError, match=message):
        batches(**{**arguments, **options})  # type: ignore[arg-type]
