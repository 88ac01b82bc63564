"""LISA in the fused engine follows the reference engine, and holds no gradient of layers that sleep."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from tests.engine.buffers import large_buffers
from tests.engine.test_fused import reference_tuner

LAYERS, STEPS = 3, 8


def problem(rng: np.random.Generator, dtype: Any, unrolled: bool = False) -> tuple[Any, Callable[..., Any], Any]:
    """Layers of two kernels (one of them used transposed, with two axes of inputs), a scale and a bias."""

    def layer(x: jax.Array, w: Any) -> jax.Array:
        hidden = jnp.tanh(x * w["scale"] @ w["up"] + w["bias"])
        return x + jnp.einsum("tab,dab->td", hidden.reshape(-1, 2, 5), w["down"])

    def loss(params: Any, x: jax.Array) -> jax.Array:
        x = x @ params["embedding"]
        if unrolled:
            for number in range(LAYERS):
                x = layer(x, jax.tree.map(lambda leaf, number=number: leaf[number], params["layers"]))
        else:
            step = jax.checkpoint(layer)
            x, _ = jax.lax.scan(lambda x, w: (step(x, w), None), x, params["layers"])
        return jnp.mean((x @ params["embedding"].T - 1) ** 2)

    shapes = {"up": (8, 10), "down": (8, 2, 5), "scale": (8,), "bias": (10,)}
    params = {
        "layers": {name: jnp.asarray(rng.normal(size=(LAYERS, *s)) / 3, dtype) for name, s in shapes.items()},
        "embedding": jnp.asarray(rng.normal(size=(4, 8)) / 3, dtype),
    }
    return params, loss, jnp.asarray(rng.normal(size=(STEPS, 6, 4)), dtype)


def test_follows_the_reference_engine(rng: np.random.Generator) -> None:
    """Through three draws and a step that is skipped, whether layers are scanned or unrolled."""
    with jax.enable_x64(True):
        params, loss, batches = problem(rng, jnp.float64)
        method = js.lisa(optax.adam(0.02), layers=2, every=3, seed=int(rng.integers(99)))
        tuners = [js.fuse(function, method) for function in (loss, problem(rng, jnp.float64, unrolled=True)[1])]
        reference = reference_tuner(loss, method)
        expected, states = reference.init(params), [tuner.init(params) for tuner in tuners]
        jax.tree.map(np.testing.assert_array_equal, states[0].method, expected.method)
        steps = [t.step.lower(state, batches[0]).compile() for t, state in zip(tuners, states, strict=True)]
        for turn, batch in enumerate(batches):
            batch = batch * (np.nan if turn == 3 else 1)
            expected, told = reference.step(expected, batch)
            for number, step in enumerate(steps):
                found, metrics = step(states[number], batch)
                states[number] = found
                np.testing.assert_allclose(metrics.loss, told.loss, rtol=1e-9)
                for name in ("refreshed", "skipped"):
                    np.testing.assert_array_equal(getattr(metrics, name), getattr(told, name))
                jax.tree.map(np.testing.assert_array_equal, found.method.drawn.support, expected.method.drawn.support)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)  # noqa: E731
        for found in states:
            assert int(found.method.progress.refreshes) == 3
            jax.tree.map(close, found.params, expected.params)
            for part in ("outside", "drawn"):
                jax.tree.map(close, getattr(found.method, part).inner, getattr(expected.method, part).inner)
        # What is of the size of a stack of matrices is that stack, which steps are written into.
        matrices = [(8, 10), (10, 8), (8, 2, 5), (2, 5, 8), (80,)]
        stacks = {(*front, *matrix) for matrix in matrices for front in ((LAYERS,), (1, LAYERS))}
        stacks |= {(LAYERS * 8, 10), (LAYERS * 16, 5), (LAYERS * 80,)}
        assert not large_buffers(steps[0], stacks) | large_buffers(steps[1], stacks)


def test_accumulation_is_the_mean_over_micro_batches(rng: np.random.Generator) -> None:
    params, loss, batches = problem(rng, jnp.float32)
    method = js.lisa(optax.sgd(0.1), layers=2, every=1)
    results = []
    for accumulate in (1, 3):
        tuner = js.fuse(loss, method, accumulate=accumulate)
        state = tuner.init(params)
        for batch in batches[:3]:
            state, _ = tuner.step(state, batch)
        results.append(state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)


def test_steps_that_bfloat16_cannot_hold_add_up_while_a_layer_is_awake() -> None:
    params = {"layers": {"kernel": jnp.ones((3, 2, 2), jnp.bfloat16)}, "head": jnp.ones((2, 1), jnp.bfloat16)}

    def loss(params: Any, x: jax.Array) -> jax.Array:
        x, _ = jax.lax.scan(lambda x, w: (x @ w["kernel"], None), x, params["layers"])
        return jnp.sum(x @ params["head"]) / 16

    tuner = js.fuse(loss, js.lisa(optax.sgd(1e-3), layers=1, every=99))
    state = tuner.init(params)
    for _ in range(20):
        state, _ = tuner.step(state, jnp.ones((1, 2), jnp.bfloat16))
    awake = int(state.method.drawn.support["layers"]["kernel"][0, 0])
    moved = np.float32(state.params["layers"]["kernel"] - 1)
    np.testing.assert_allclose(moved[awake], -20 * 1e-3 * 4 / 16, rtol=0.3)
    assert not np.delete(moved, awake, axis=0).any()


def test_layers_of_their_own_are_left_to_the_reference_engine() -> None:
    params = {"layers_0": {"kernel": jnp.ones((2, 2))}, "layers_1": {"kernel": jnp.ones((2, 2))}}
    tuner = js.fuse(lambda p, x: jnp.sum(x @ p["layers_0"]["kernel"]), js.lisa(optax.sgd(0.1), layers=1))
    with pytest.raises(js.InputError, match=r"layers_0/kernel is of one layer; stack the layers, or use js\.Reference"):
        tuner.init(params)
