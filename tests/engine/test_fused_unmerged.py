"""Slots beside frozen weights: what the reference engine trains, and the weights never move."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.engine.tuner import ReferenceTuner

COORDINATES = js.subspaces.Coordinates(js.subspaces.Budget(density=0.1))
TARGETS = [
    js.Target("layers/up", stack_axes=(0,)),
    js.Target("layers/down", stack_axes=(0,), subspace=js.subspaces.Neurons(1, neurons=0.5)),
    js.Target("head", subspace=COORDINATES),
]


def problem(rng: np.random.Generator) -> tuple[Any, Callable[..., Any], Any]:
    """Scanned and rematerialised layers, and a head that is used as it is and transposed."""

    def loss(params: Any, x: jax.Array) -> jax.Array:
        layer = jax.checkpoint(lambda x, w: x + jnp.tanh(x @ w["up"]) @ w["down"])
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["layers"])
        return jnp.mean((jnp.tanh(x @ params["head"]) @ params["head"].T - 1) ** 2)

    shapes = {"layers": {"up": (3, 8, 10), "down": (3, 10, 8)}, "head": (8, 60)}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape) / 3)  # noqa: E731
    params = jax.tree.map(draw, shapes, is_leaf=lambda node: isinstance(node, tuple))
    return params, loss, jnp.asarray(rng.normal(size=(5, 6, 8)))


def reference_tuner(loss: Callable[..., Any], method: Any) -> ReferenceTuner:
    return ReferenceTuner(lambda params, batch: (loss(params, batch), {"tokens": jnp.ones(())}), method)


def test_follows_the_reference_engine(rng: np.random.Generator) -> None:
    """Weight decay acts on the slots, micro-batches are means, and a step that is not finite is left out."""
    with jax.enable_x64(True):
        params, loss, batches = problem(rng)
        method = lambda **options: js.neuroada(  # noqa: E731
            optax.adamw(0.02, weight_decay=0.5), k=2, targets=TARGETS, **options
        )
        reference, fused = reference_tuner(loss, method()), js.fuse(loss, method(unmerged=True), accumulate=3)
        expected, found = reference.init(params), fused.init(params)
        for batch in (batches[0], batches[1], batches[2].at[0, 0].set(jnp.nan), batches[3], batches[4]):
            expected, told = reference.step(expected, batch)
            found, metrics = fused.step(found, batch)
            np.testing.assert_allclose(metrics.loss, told.loss, rtol=1e-10)
            assert bool(metrics.refreshed) == bool(told.refreshed)
        assert int(metrics.skipped) == int(told.skipped) == 1
        jax.tree.map(np.testing.assert_array_equal, found.method.support, expected.method.support)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)  # noqa: E731
        jax.tree.map(close, found.method.slots, expected.method.slots)
        jax.tree.map(close, found.method.inner, expected.method.inner)
        jax.tree.map(close, fused.params(found), expected.params)
        jax.tree.map(np.testing.assert_array_equal, found.params, params)


@pytest.mark.parametrize("slots_dtype", ["promote", "bfloat16"])
def test_small_steps_add_up_beside_the_weights(slots_dtype: str, rng: np.random.Generator) -> None:
    """Far below an ulp of narrow weights, without masters; the reference engine gets there by masters."""
    drawn = jnp.asarray(rng.uniform(0.5, 1.0, size=(2, 6, 5)), jnp.bfloat16)
    params = {"narrow": drawn[0], "wide": drawn[1].astype(jnp.float32)}
    loss = lambda p, x: jnp.sum(x @ p["narrow"]) + jnp.sum(x @ p["wide"])  # noqa: E731
    x = jnp.ones((1, 6), jnp.bfloat16)
    method = js.neuroada(optax.sgd(1e-4), k=1, targets=".*", slots_dtype=slots_dtype, unmerged=True)
    fused, reference = js.fuse(loss, method), reference_tuner(loss, method)
    found, expected = fused.init(params), reference.init(params)
    assert not jax.tree.leaves(found.method.master)
    for _ in range(100):
        found, _ = fused.step(found, x)
        expected, _ = reference.step(expected, x)
    if slots_dtype == "bfloat16":
        assert all(slots.dtype == jnp.bfloat16 for slots in jax.tree.leaves(found.method.slots))
    jax.tree.map(np.testing.assert_array_equal, found.params, params)
    merged = fused.params(found)
    for name, weight in params.items():
        moved = np.float32(weight) - np.float32(merged[name])
        assert np.sum(moved != 0) == 5
        np.testing.assert_allclose(moved[moved != 0], 0.01, atol=2**-8)
    np.testing.assert_array_equal(merged["narrow"], expected.params["narrow"])
    # The reference engine adds up in the weight, and rounds there every step.
    np.testing.assert_allclose(merged["wide"], expected.params["wide"], rtol=1e-5)


def test_slots_may_be_narrower_than_weights_only_beside_them() -> None:
    with pytest.raises(js.InputError, match="slots_dtype=bfloat16 cannot hold weights of float32"):
        js.neuroada(optax.sgd(0.01), targets="w", slots_dtype="bfloat16").init({"w": jnp.ones((3, 4))})


def test_what_cannot_stay_beside_the_weights_says_so() -> None:
    entries = {"subspace": COORDINATES, "score": js.select.WEIGHT}
    with pytest.raises(js.InputError, match=r"unmerged=True .* needs sees='change'.* got sees='zeros'"):
        js.subspace_descent(optax.sgd(0.1), **entries, unmerged=True)
    with pytest.raises(js.InputError, match=r"needs .*Once\(\), got sees='change' and Every"):
        js.subspace_descent(optax.sgd(0.1), **entries, sees="change", schedule=js.select.Every(3), unmerged=True)
    slices = {"subspace": js.subspaces.Slices(1), "score": js.select.WEIGHT, "sees": "change"}
    tuner = js.fuse(jnp.sum, js.subspace_descent(optax.sgd(0.1), **slices, targets="w", unmerged=True))
    with pytest.raises(js.InputError, match=r"unmerged=True is for single entries.* w has Slices"):
        tuner.init({"w": jnp.ones((3, 4))})
    by_gradient = js.neuroada(optax.sgd(0.1), select="gradient", targets="w", unmerged=True)
    with pytest.raises(js.InputError, match=r"pick the support by js\.calibrate"):
        js.fuse(jnp.sum, by_gradient).init({"w": jnp.ones((3, 4))})
