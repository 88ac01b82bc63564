"""Statistics over a calibration set, and the supports they pick."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

TARGETS = [js.Target("layers/kernel", stack_axes=(0,)), js.Target("head/kernel")]


def model(rng: np.random.Generator) -> tuple[Any, list[Any], Any]:
    """Two scanned layers and a head; the batches have padding that the loss does not see."""
    shapes = {"layers": {"kernel": (2, 4, 4)}, "head": {"kernel": (4, 3)}}
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=_is_shape)
    batches = [(jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), jnp.arange(5) < seen) for seen in (5, 3)]

    def loss(params: Any, batch: Any) -> tuple[jax.Array, dict]:
        x, mask = batch
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"]["kernel"])
        return jnp.sum(jnp.where(mask[:, None], x @ params["head"]["kernel"], 0) ** 2), {}

    return params, batches, loss


def _is_shape(node: Any) -> bool:
    return isinstance(node, tuple)


def test_activations_are_the_norms_of_what_goes_in(rng: np.random.Generator) -> None:
    params, batches, loss = model(rng)
    found = js.collect_activations(loss, params, batches, TARGETS)
    squares: list[Any] = [0.0, 0.0, 0.0]
    for x, mask in batches:
        inputs = np.asarray(x)[np.asarray(mask)]
        for layer in range(3):
            squares[layer] = squares[layer] + np.sum(inputs**2, axis=0)
            if layer < 2:
                inputs = np.tanh(inputs @ np.asarray(params["layers"]["kernel"][layer]))
    np.testing.assert_allclose(found["layers/kernel"], np.sqrt(squares[:2]), rtol=1e-4)
    np.testing.assert_allclose(found["head/kernel"][0], np.sqrt(squares[2]), rtol=1e-4)


@pytest.mark.parametrize("at_once", [1, 2**30])
@pytest.mark.parametrize(("name", "scope"), [("gallop", "global"), ("saft", "global"), ("gallop", "matrix")])
def test_calibrate_picks_what_calibration_steps_pick(
    name: str, scope: Any, at_once: int, rng: np.random.Generator
) -> None:
    params, batches, loss = model(rng)
    options: Any = {"density": 0.3, "scope": scope, "targets": TARGETS}
    stepping = getattr(js, name)(optax.adam(0.1), calibration_steps=2, **options)
    state = stepping.init(params)
    for batch in batches:
        _, state = stepping.update(jax.grad(lambda p, b: loss(p, b)[0])(params, batch), state, params)
    support = js.calibrate(loss, params, batches, stepping, at_once=at_once)
    found = js.with_support(stepping, support)
    updates, found_state = found.update(jax.tree.map(jnp.ones_like, params), found.init(params), params)
    _, state = stepping.update(jax.tree.map(jnp.ones_like, params), state, params)
    jax.tree.map(np.testing.assert_array_equal, found_state.support, state.support)
    moved = sum(int(jnp.sum(leaf != 0)) for leaf in jax.tree.leaves(updates))
    assert moved == (round(0.3 * 44) if scope == "global" else 2 * round(0.3 * 16) + round(0.3 * 12))


def test_gradients_are_the_mean_over_batches(rng: np.random.Generator) -> None:
    params, batches, loss = model(rng)
    found = js.collect_gradients(loss, params, batches, TARGETS)
    dense = [jax.grad(lambda p, b: loss(p, b)[0])(params, batch) for batch in batches]
    for path, keys in (("layers/kernel", "layers"), ("head/kernel", "head")):
        mean = sum(gradient[keys]["kernel"] for gradient in dense) / 2
        np.testing.assert_allclose(found[path], mean, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_calibrated_says_so(rng: np.random.Generator) -> None:
    params, batches, loss = model(rng)
    method = js.gallop(optax.adam(0.1), density=0.3, targets=TARGETS)
    with pytest.raises(js.InputError, match="batches is empty"):
        js.calibrate(loss, params, [], method)
    with pytest.raises(TypeError, match="picks units of matrices"):
        js.calibrate(loss, params, batches, optax.adam(0.1))
    tx = js.with_support(js.fixed_mask(density=0.3, targets=TARGETS), {"layers/kernel": jnp.zeros((2, 5))})
    with pytest.raises(js.InputError, match="no support is given for target head/kernel"):
        tx.update(params, tx.init(params))
