"""Promises of the low-rank engine that do not depend on the method."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse as js
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.engine.description import count_slots


def array(rng: np.random.Generator, *shape: int, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), dtype)


def test_narrow_weights_are_warned_about_once(rng: np.random.Generator) -> None:
    params = {name: array(rng, 4, 5, dtype=jnp.bfloat16) for name in "ab"} | {"c": array(rng, 4, 5)}
    tx = js.lora(optax.adam(0.1), rank=2, targets=".*")
    with pytest.warns(UserWarning, match="2 of them, such as a of dtype bfloat16") as caught:
        state = tx.init(params)
    assert len(caught) == 1
    assert {leaf.dtype for leaf in jax.tree.leaves(state.factors)} == {jnp.dtype(jnp.float32)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx.update(params, state, params)
        tx.init({name: leaf.astype(jnp.float32) for name, leaf in params.items()})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(bad: float, rng: np.random.Generator) -> None:
    params, good = ({"kernel": array(rng, 6, 5)} for _ in range(2))
    spoiled = {"kernel": good["kernel"].at[2, 3].set(bad)}
    for tx, looks in (
        (js.cola(optax.adam(0.1), rank=2, chain_every=2, targets="kernel"), False),
        (js.dora(optax.adam(0.1), rank=2, targets="kernel"), False),
        (js.lora_one(optax.adam(0.1), rank=2, calibration_steps=3, targets="kernel"), True),
    ):
        update, state, current = jax.jit(tx.update), jax.jit(tx.init)(params), params
        for _ in range(2):
            updates, state = update(good, state, current)
            current = optax.apply_updates(current, updates)
        updates, after = update(spoiled, state, current)  # for the chain, a reset is due
        assert np.all(np.signbit(updates["kernel"]) & (np.asarray(updates["kernel"]) == 0))
        assert int(after.progress.skipped) == int(state.progress.skipped) + (not looks)
        restored = after._replace(progress=after.progress._replace(skipped=state.progress.skipped))
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        _, made_up = update(good, after, current)
        if tx.description.name == "cola":
            assert int(made_up.progress.last_refresh) == 2


def test_layers_of_a_stack_are_matrices_of_their_own(rng: np.random.Generator) -> None:
    """A kernel (layers, in, heads, head_dim) trains like its layers alone, from the same A."""
    kernel, gradient = array(rng, 2, 6, 2, 3), array(rng, 2, 6, 2, 3)

    def update(weight: jax.Array, slope: jax.Array, target: Any, a: Any = None) -> tuple[jax.Array, jax.Array]:
        tx = js.lora(optax.adam(0.1), rank=2, targets=target)
        state = jax.jit(tx.init)({"k": weight})
        if a is not None:
            state = state._replace(factors=state.factors._replace(a={"k": a}))
        return jax.jit(tx.update)({"k": slope}, state)[0]["k"], state.factors.a["k"]

    updates, a = update(kernel, gradient, js.Target("k", in_axes=(1,), out_axes=(2, 3), stack_axes=(0,)))
    assert np.all(a[0] != a[1])
    for layer in range(2):
        alone, _ = update(kernel[layer].reshape(6, 6), gradient[layer].reshape(6, 6), "k", a[layer : layer + 1])
        np.testing.assert_allclose(updates[layer].reshape(6, 6), alone, rtol=1e-5, atol=1e-7)


class Mlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.tanh(self.up(x)))


@pytest.mark.parametrize("name", ["dora", "lora_ga"])
def test_nnx_and_plain_trees_train_alike(name: str, rng: np.random.Generator) -> None:
    x, y = array(rng, 6, 4), array(rng, 6, 3)
    model = Mlp(nnx.Rngs(int(rng.integers(2**31))))
    graph, state = nnx.split(model, nnx.Param)
    tx = getattr(js, name)(optax.adam(0.05), rank=1, targets=r".*/kernel")

    def loss(params: Any) -> jax.Array:
        return jnp.mean((nnx.merge(graph, params)(x) - y) ** 2)

    @jax.jit
    def train(params: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=3)[0][0]

    plain, other = train(nnx.to_pure_dict(state)), train(state)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)  # init sees Variables, update sees plain arrays

    @nnx.jit
    def step(model: Mlp, optimizer: nnx.Optimizer) -> None:
        optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(model))

    for _ in range(3):
        step(model, optimizer)
    for result in (other, nnx.state(model, nnx.Param)):
        for (path, leaf), (same, expected) in zip(*(flatten_with_paths(t)[0] for t in (result, plain)), strict=True):
            assert path == same
            np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(plain["up"]["bias"], jax.tree.leaves(nnx.to_pure_dict(state)["up"]["bias"])[0])


def test_a_small_step_on_a_large_factor_is_exact(rng: np.random.Generator) -> None:
    """The change of the product is not the difference of two rounded products."""
    params, gradient = {"kernel": array(rng, 16, 12)}, {"kernel": array(rng, 16, 12)}
    tx = js.lora(optax.sgd(1e-7), rank=4, targets="kernel")
    state = tx.init(params)
    a, b = array(rng, 1, 16, 4), array(rng, 1, 4, 12)
    state = state._replace(factors=state.factors._replace(a={"kernel": a}, b={"kernel": b}))
    updates, new = tx.update(gradient, state, params)
    wide = [np.asarray(x["kernel"][0], np.float64) for x in (*state.factors[:2], *new.factors[:2])]
    exact = 2 * (wide[2] @ wide[3] - wide[0] @ wide[1])
    np.testing.assert_allclose(updates["kernel"], exact, rtol=1e-3, atol=1e-5 * np.abs(exact).max())


def test_counts_what_trains(rng: np.random.Generator) -> None:
    params = {"kernel": array(rng, 3, 6, 5)}
    options = {"rank": 2, "targets": js.Target("kernel", stack_axes=(0,))}
    counts = {
        name: count_slots(getattr(js, name)(optax.sgd(0.1), **options), params)
        for name in ("lora", "asym_lora", "dora", "lora_ga")
    }
    assert counts == {"lora": 3 * 2 * 11, "asym_lora": 3 * 2 * 5, "dora": 3 * (2 * 11 + 5), "lora_ga": 3 * 2 * 11}


def test_dora_asks_for_parameters(rng: np.random.Generator) -> None:
    params = {"kernel": array(rng, 6, 5)}
    tx = js.dora(optax.sgd(0.1), rank=1, targets="kernel")
    with pytest.raises(ValueError, match="dora needs params"):
        tx.update(params, tx.init(params))
