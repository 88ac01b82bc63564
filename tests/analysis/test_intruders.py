"""Intruder dimensions, planted and found."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.analysis.intruders import intruder_dimensions
from jaxsparse.common.errors import InputError

TARGETS = [js.Target("layers/kernel", stack_axes=(0,)), "o/kernel"]


def orthonormal(rng: np.random.Generator, size: int, count: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(size, count)))[0]


def matrix(left: np.ndarray, values: np.ndarray, right: np.ndarray) -> np.ndarray:
    return left * values @ right.T


def test_planted_intruders_are_counted_and_nothing_else(rng: np.random.Generator) -> None:
    planted, size = int(rng.integers(1, 5)), 64
    left, values = orthonormal(rng, size, 24), np.linspace(10, 4, 24)
    right = orthonormal(rng, size, 24)
    base = matrix(left, values, right)
    # Directions at right angles to all that the base reads and writes, and stronger than any of its own.
    news = [
        np.linalg.qr(np.concatenate([own, rng.normal(size=(size, planted))], axis=1))[0][:, 24:]
        for own in (left, right)
    ]
    tuned = base + matrix(news[0], np.linspace(20, 15, planted), news[1])
    # The base's other singular values are 0, and their vectors arbitrary: low rank would hide what is planted.
    base = base + matrix(
        orthonormal(rng, size, size), np.full(size, 1e-2) * rng.uniform(0.5, 1, size), orthonormal(rng, size, size)
    )
    for side in ("output", "input"):
        found = intruder_dimensions(
            {"o": {"kernel": jnp.asarray(base)}},
            {"o": {"kernel": jnp.asarray(tuned)}},
            targets="o/kernel",
            top=10,
            thresholds=(0.9,),
            side=side,
        )  # type: ignore[arg-type]
        assert found.total[0] == planted
        assert np.all(found.similarity["o/kernel"][0, :planted] < 0.9)
        assert np.all(found.similarity["o/kernel"][0, planted:] > 0.95)


def test_an_untouched_model_has_none_and_scaling_or_flipping_adds_none(rng: np.random.Generator) -> None:
    base = {
        "layers": {"kernel": jnp.asarray(rng.normal(size=(2, 12, 8)))},
        "o": {"kernel": jnp.asarray(rng.normal(size=(6, 9)))},
    }
    for factor in (1.0, -3.0):
        tuned = {name: {"kernel": factor * leaf["kernel"]} for name, leaf in base.items()}
        found = intruder_dimensions(base, tuned, targets=TARGETS, top=None, thresholds=(0.99,))
        assert found.total[0] == 0
        assert {path: each.shape for path, each in found.similarity.items()} == {
            "layers/kernel": (2, 8),
            "o/kernel": (1, 6),
        }


def test_counts_agree_with_numpy_and_grow_with_the_threshold(rng: np.random.Generator) -> None:
    base, tuned = rng.normal(size=(2, 2, 12, 8)).astype(np.float32)
    thresholds = (0.3, 0.5, 0.7, 1.0)
    trees = ({"layers": {"kernel": jnp.asarray(each)}} for each in (base, tuned))
    found = intruder_dimensions(*trees, targets=TARGETS[0], top=5, thresholds=thresholds)
    expected = np.zeros((2, 4), int)
    for at in range(2):
        # Written as in the paper: W is (out, in), u its left singular vectors.
        u0, u1 = (np.linalg.svd(each[at].T.astype(np.float64))[0] for each in (base, tuned))
        expected[at] = [sum(np.all(np.abs(u1[:, j] @ u0) < e) for j in range(5)) for e in thresholds]
    np.testing.assert_array_equal(found.by_path["layers/kernel"], expected)
    np.testing.assert_array_equal(found.total, expected.sum(axis=0))
    np.testing.assert_allclose(found.mean, expected.mean(axis=0))
    assert np.all(np.diff(found.total) >= 0)
    assert found.total[-1] > 0


def test_directions_of_outputs_that_the_base_never_writes_are_intruders(rng: np.random.Generator) -> None:
    base = np.zeros((4, 10))
    base[:, :4] = rng.normal(size=(4, 4))
    tuned = base.copy()
    tuned[0, 7] = 50.0
    found = intruder_dimensions(
        {"o": {"kernel": jnp.asarray(base)}},
        {"o": {"kernel": jnp.asarray(tuned)}},
        targets="o/kernel",
        thresholds=(0.5,),
    )
    assert found.similarity["o/kernel"][0, 0] < 0.2
    assert found.total[0] == 1


def test_half_precision_is_decomposed_in_single(rng: np.random.Generator) -> None:
    base = {"o": {"kernel": jnp.asarray(rng.normal(size=(16, 16)), jnp.bfloat16)}}
    found = intruder_dimensions(base, base, targets="o/kernel", top=None, thresholds=(0.999,))
    assert found.total[0] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"thresholds": (0.0, 0.5)}, r"thresholds must lie in \(0, 1\]"),
        ({"top": 0}, "top must be at least 1"),
        ({"tuned": {"o": jnp.ones((3, 3))}}, "in base and"),
        ({"tuned": {}}, "the same tree"),
        ({"tuned": {"o": jnp.full((2, 2), jnp.nan)}}, "target o holds NaN"),
    ],
)
def test_what_cannot_be_compared_says_why(change: dict, words: str) -> None:
    given = {"base": {"o": jnp.eye(2)}, "tuned": {"o": jnp.eye(2)}, "targets": "o", **change}
    with pytest.raises(InputError, match=words):
        intruder_dimensions(given.pop("base"), given.pop("tuned"), **given)
