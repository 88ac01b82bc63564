"""SpIEL in the fused engine follows the reference engine, and keeps the reference engine's promises."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.engine.slotted import UnsupportedUseError
from tests.engine.test_fused import TARGETS, problem, reference_tuner

OPTIONS: dict[str, Any] = {
    "total_steps": 40,
    "density": 0.3,
    "budget": None,
    "reselect_every": 5,
    "accumulation_steps": 2,
    "reselection_rate": 0.5,
    "targets": TARGETS,
}


@pytest.mark.parametrize(
    ("grow", "more"), [("AG", {"clip": 0.05, "weight_decay": 0.1}), ("MA", {"decay": "cosine"})], ids=["AG", "MA"]
)
def test_follows_the_reference_engine(grow: str, more: dict[str, Any], rng: np.random.Generator) -> None:
    """Through three reselections, and a step right after one that is skipped."""
    with jax.enable_x64(True):
        params, loss, batches = problem(rng, jnp.float64)
        method = js.spiel(lambda step: 0.05 - 0.001 * step, grow=grow, seed=int(rng.integers(99)), **OPTIONS, **more)
        reference, fused = reference_tuner(loss, method), js.fuse(loss, method)
        expected, found = reference.init(params), fused.init(params)
        jax.tree.map(np.testing.assert_array_equal, found.method, expected.method)
        changes = 0
        for turn in range(14):
            batch = batches[turn % len(batches)] * (np.nan if turn in (1, 8) else 1)
            before = found.method.support["head"].copy()
            expected, told = reference.step(expected, batch)
            found, metrics = fused.step(found, batch)
            np.testing.assert_allclose(metrics.loss, told.loss, rtol=1e-9)
            for name in ("refreshed", "skipped"):
                np.testing.assert_array_equal(getattr(metrics, name), getattr(told, name))
            for part in ("support", "left"):
                pair = getattr(found.method, part), getattr(expected.method, part)
                jax.tree.map(lambda a, b: a.dtype != jnp.int32 or np.testing.assert_array_equal(a, b), *pair)
            if grow == "AG":
                jax.tree.map(
                    np.testing.assert_array_equal, found.method.candidates.index, expected.method.candidates.index
                )
                if turn == 0:
                    np.testing.assert_allclose(metrics.retention, told.retention, rtol=1e-6)
                    np.testing.assert_allclose(metrics.retention_mean, told.retention_mean, rtol=1e-6)
            changes += int(jnp.sum(~jnp.isin(found.method.support["head"], before)))
        assert int(found.method.progress.refreshes) == 4  # the start and three reselections
        assert int(found.method.progress.skipped) == 2
        assert changes > 3
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)  # noqa: E731
        jax.tree.map(close, found.params, expected.params)
        jax.tree.map(close, found.method.optimizer, expected.method.optimizer)


@pytest.mark.parametrize(("grow", "accumulate"), [("AG", 3), ("MA", 1)])
def test_narrow_weights_outside_the_support_are_at_their_base(
    grow: str, accumulate: int, rng: np.random.Generator
) -> None:
    """Bit for bit, at every step; inside it, they are base + delta, rounded."""
    params, loss, batches = problem(rng, jnp.bfloat16)
    tuner = js.fuse(loss, js.spiel(0.05, grow=grow, **OPTIONS), accumulate=accumulate)
    state = tuner.init(params)
    bits = {name: np.asarray(leaf).view(np.uint16) for name, leaf in _flat(params).items()}
    touched = {name: np.zeros_like(leaf, bool) for name, leaf in bits.items()}
    for turn in range(8):
        before = _flat(state.method.support)
        state, _ = tuner.step(state, batches[turn])
        support, delta, base = (_flat(getattr(state.method, part)) for part in ("support", "delta", "base"))
        for name, weight in _flat(state.params).items():
            rows = np.arange(len(weight))[:, None]
            touched[name][rows, before[name]] = True
            outside = np.ones_like(bits[name], bool)
            outside[rows, support[name]] = False
            np.testing.assert_array_equal(weight.view(np.uint16)[outside], bits[name][outside])
            expected = jnp.asarray(np.float32(base[name]) + delta[name], jnp.bfloat16)
            np.testing.assert_array_equal(np.float32(weight[rows, support[name]]), np.float32(expected))
    for name, places in touched.items():
        places[np.arange(len(places))[:, None], support[name]] = False
        assert places.any()  # something went back to its base


def _flat(tree: Any) -> dict[str, np.ndarray]:
    """The targets' leaves as (stack, entries), copied."""
    leaves = {**tree["layers"], "head": tree["head"]}
    stacks = {"up": 3, "down": 3, "head": 1}
    return {name: np.array(leaf).reshape(stacks[name], -1) for name, leaf in leaves.items()}


def test_candidates_are_chosen_on_the_first_micro_batch_and_watched_on_all(rng: np.random.Generator) -> None:
    params, loss, batches = problem(rng)
    method = js.spiel(0.05, **OPTIONS)
    whole, first = js.fuse(loss, method, accumulate=3), js.fuse(loss, method)
    found, _ = whole.step(whole.init(params), batches[0])
    expected, _ = first.step(first.init(params), batches[0][:2])
    jax.tree.map(np.testing.assert_array_equal, found.method.candidates.index, expected.method.candidates.index)
    dense = jax.grad(loss)(params, batches[0])
    index = found.method.candidates.index
    for name, matrices in _flat(dense).items():
        places, sums = _flat(index)[name], _flat(found.method.candidates.gradient)[name]
        np.testing.assert_allclose(sums, np.take_along_axis(matrices, places, axis=1), rtol=1e-4, atol=1e-6)


def _twice(loss: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, x: loss(params, x) + jnp.sum(x @ params["head"])


def test_a_matrix_that_is_used_twice_can_grow_by_sm3_only(rng: np.random.Generator) -> None:
    params, loss, batches = problem(rng)
    loss = _twice(loss)
    tuner = js.fuse(loss, js.spiel(0.05, **OPTIONS))
    with pytest.raises(UnsupportedUseError, match="weight head through several products with one matrix"):
        tuner.step(tuner.init(params), batches[0])
    method = js.spiel(0.05, grow="MA", **OPTIONS)
    fused, reference = js.fuse(loss, method), reference_tuner(loss, method)
    found, _ = fused.step(fused.init(params), batches[0])
    expected, _ = reference.step(reference.init(params), batches[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found.params, expected.params)
