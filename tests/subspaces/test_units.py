"""Every way of cutting matrices into units, against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse as js
from jaxsparse.subspaces.blocks import Blocks
from jaxsparse.subspaces.budgets import Budget
from jaxsparse.subspaces.targets import resolve_targets
from jaxsparse.subspaces.units import Coordinates, Everything, Neurons, Slices, Units, follow

SHAPE = (2, 6, 8)
UNITS = {
    "coordinates": Coordinates(Budget(density=0.2)),
    "neurons": Neurons(2),
    "some neurons": Neurons(2, neurons=0.4),
    "input slices": Slices(3),
    "output slices": Slices(share=0.5, axis="output"),
    "heads": Slices(1, group=3),
    "blocks": Blocks(2, size=4),
    "everything": Everything(),
}


def resolve(weight: np.ndarray) -> tuple[list, object]:
    targets = resolve_targets({"w": jnp.asarray(weight)}, js.Target("w", stack_axes=(0,)))
    return targets, targets[0].view


@pytest.mark.parametrize("name", UNITS)
def test_cut_and_join_are_inverses_and_scatter_puts_back_what_gather_took(name: str, rng: np.random.Generator) -> None:
    units = UNITS[name]
    weight = jnp.asarray(rng.normal(size=SHAPE), jnp.float32)
    targets, view = resolve(weight)
    np.testing.assert_array_equal(units.join(units.cut(weight), view), weight)
    (count,) = units.counts(targets, weight.size)
    scores = units.unit_scores(jnp.asarray(rng.normal(size=SHAPE)))
    support = units.pick(scores, units.empty_support(view, count), view)
    assert support.shape == units.empty_support(view, count).shape
    slots = units.gather(weight, support)
    dense = np.asarray(units.scatter(view, support, slots, fill=9.0))
    free = dense != 9.0
    np.testing.assert_array_equal(dense[free], np.asarray(weight)[free])
    expected = {"coordinates": 2 * 10, "neurons": 2 * 2 * 8, "input slices": 2 * 3 * 8, "output slices": 2 * 4 * 6}
    expected |= {"some neurons": 2 * 2 * 3, "heads": 2 * 3 * 8, "everything": weight.size}
    if name in expected:  # blocks at the edge are smaller
        assert free.sum() == expected[name]
    assert slots.size >= free.sum()


def test_each_picks_what_numpy_picks(rng: np.random.Generator) -> None:
    scores = rng.normal(size=SHAPE)

    def pick(units: Units, like: tuple[int, ...]) -> np.ndarray:
        view = resolve(scores)[1]
        return np.asarray(units.pick(units.unit_scores(jnp.asarray(scores)), jnp.zeros(like, jnp.int32), view))

    neurons = pick(UNITS["neurons"], (2, 2, 8))
    some = pick(UNITS["some neurons"], (2, 2, 3))
    slices = pick(UNITS["input slices"], (2, 3))
    outputs = pick(UNITS["output slices"], (2, 4))
    heads = pick(UNITS["heads"], (2, 1))
    blocks = pick(UNITS["blocks"], (2, 2))
    for layer in range(2):
        best = np.argsort(-scores[layer], axis=0, kind="stable")[:2]  # inputs of every neuron
        np.testing.assert_array_equal(neurons[layer], best * 8 + np.arange(8))
        strong = np.sort(np.argsort(-np.sort(scores[layer], axis=0)[-2:].sum(axis=0))[:3])
        np.testing.assert_array_equal(some[layer], (best * 8 + np.arange(8))[:, strong])
        np.testing.assert_array_equal(slices[layer], np.argsort(-np.linalg.norm(scores[layer], axis=1))[:3])
        np.testing.assert_array_equal(outputs[layer], np.argsort(-np.linalg.norm(scores[layer], axis=0))[:4])
        groups = np.linalg.norm(scores[layer].reshape(2, 24), axis=1)
        assert heads[layer, 0] == np.argmax(groups)
        tiles = [scores[layer, i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4)]
        np.testing.assert_array_equal(blocks[layer], np.argsort([-abs(tile.mean()) for tile in tiles])[:2])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), stack=st.integers(1, 3), k=st.integers(1, 9), width=st.integers(0, 3))
def test_values_stay_with_their_units(seed: int, stack: int, k: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    old, new = (np.stack([rng.permutation(12)[:k] for _ in range(stack)]).astype(np.int32) for _ in range(2))
    values = rng.normal(size=(stack, k, *[2] * min(width, 1))).astype(np.float32)
    followed = follow(jnp.asarray(values), jnp.asarray(old), jnp.asarray(new), -7.0)
    for row in range(stack):
        owner = {int(unit): values[row, slot] for slot, unit in enumerate(old[row])}
        for slot, unit in enumerate(new[row]):
            np.testing.assert_array_equal(followed[row, slot], owner.get(int(unit), np.full(values.shape[2:], -7.0)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Neurons(0), "k, the inputs of every neuron"),
        (lambda: Neurons(1, neurons=0.0), "neurons must lie in"),
        (lambda: Neurons(7).counts(resolve(np.ones(SHAPE))[0], 96), "more than the 6 inputs of w"),
        (lambda: Slices(), "exactly one of"),
        (lambda: Slices(0), "at least 1"),
        (lambda: Slices(share=1.5), "share of slices must lie"),
        (lambda: Slices(7).counts(resolve(np.ones(SHAPE))[0], 96), "more than the 6 input slices of w"),
        (lambda: Slices(1, group=4).counts(resolve(np.ones(SHAPE))[0], 96), "do not split into groups of 4"),
        (lambda: Blocks(0), "count must be at least 1"),
        (lambda: Blocks(3, size=9).counts(resolve(np.ones(SHAPE))[0], 96), "more than the 1 of w"),
    ],
)
def test_bad_subspaces_are_named(make: object, message: str) -> None:
    with pytest.raises(js.InputError, match=message):
        make()
