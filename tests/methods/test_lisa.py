"""LISA beside NumPy, which is handed the layers drawn; stacked or not; and what a draw keeps and drops."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse as js
from jaxsparse.common.paths import flatten_with_paths

LAYERS, DRAWN, EVERY, STEPS, RATE = 3, 2, 7, 30, 0.05


def model(rng: np.random.Generator, layers: int = LAYERS) -> dict[str, Any]:
    return {
        "embedding": rng.normal(size=(5, 4)),
        "layers": {"kernel": rng.normal(size=(layers, 4, 4)), "bias": rng.normal(size=(layers, 4))},
        "norm": {"scale": rng.normal(size=4)},
    }


def loss(params: dict[str, Any], x: Any) -> jax.Array:
    hidden = jnp.tanh(x @ params["embedding"])
    for kernel, bias in zip(params["layers"]["kernel"], params["layers"]["bias"], strict=True):
        hidden = hidden + jnp.tanh(hidden @ kernel + bias)
    return jnp.sum((hidden * params["norm"]["scale"] - 0.5) ** 2)


def drawn(state: Any) -> list[int]:
    """The layers that train, the same for every kind of weight."""
    supports = [np.asarray(leaf)[0].tolist() for leaf in jax.tree.leaves(state.drawn.support)]
    assert all(support == supports[0] for support in supports)
    return supports[0]


class Weight:
    """One weight of one layer, or one outside the stack, in NumPy."""

    def __init__(self, value: np.ndarray) -> None:
        self.value = value
        self.wake()

    def wake(self) -> None:
        self.m, self.v, self.age = 0.0, 0.0, 0

    def step(self, g: np.ndarray, adam: bool) -> None:
        self.age += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        fast = self.m / (1 - 0.9**self.age) / (np.sqrt(self.v / (1 - 0.999**self.age)) + 1e-8)
        self.value = self.value - RATE * (fast if adam else g)


@pytest.mark.parametrize("adam", [True, False], ids=["adam", "sgd"])
def test_follows_its_paper(adam: bool, rng: np.random.Generator) -> None:
    start, x = model(rng), rng.normal(size=(6, 5))
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, start)
        tx = js.lisa(optax.adam(RATE) if adam else optax.sgd(RATE), layers=DRAWN, every=EVERY, seed=int(x[0, 0] > 0))
        state, update, gradient = tx.init(params), jax.jit(tx.update), jax.jit(jax.grad(loss))
        peers = {
            path: [Weight(layer) for layer in leaf] if path.startswith("layers") else [Weight(leaf)]
            for path, leaf in flatten_with_paths(start)[0]
        }
        draws: list[list[int]] = []
        for step in range(STEPS):
            gradients = gradient(params, x)
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            awake = drawn(state)
            if step % EVERY == 0:
                assert len(set(awake)) == DRAWN
                draws.append(awake)
                for path, weights in peers.items():
                    for layer in awake if path.startswith("layers") else []:
                        weights[layer].wake()
            assert awake == draws[-1]
            for path, g in flatten_with_paths(gradients)[0]:
                if path.startswith("layers"):
                    for layer in awake:
                        peers[path][layer].step(np.asarray(g[layer]), adam)
                else:
                    peers[path][0].step(np.asarray(g), adam)
            for path, leaf in flatten_with_paths(params)[0]:
                expected = np.stack([weight.value for weight in peers[path]])
                np.testing.assert_allclose(np.reshape(leaf, expected.shape), expected, rtol=1e-6, atol=1e-9)
    # Two of three: any two draws share a layer, whose state has been dropped nevertheless.
    assert len(draws) == 5
    assert int(state.progress.refreshes) == 5


def unstacked(params: Any, form: str) -> dict[str, Any]:
    """The same model with a subtree for each layer."""
    count = len(params["layers"]["kernel"])
    layers = [jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(count)]
    rest = {name: part for name, part in params.items() if name != "layers"}
    if form == "list":
        return rest | {"h": layers}
    return {"params": rest | {f"layers_{number}": layer for number, layer in enumerate(layers)}}


@pytest.mark.parametrize("form", ["list", "names"])
def test_layers_of_their_own_train_as_stacked_ones(form: str, rng: np.random.Generator) -> None:
    """Twelve of them: layer 10 comes after 9 in the model, but before 2 among names."""
    stacked = {name: jnp.asarray(part) for name, part in model(rng, layers=12).items() if name == "embedding"}
    stacked["layers"] = {"kernel": jnp.asarray(rng.normal(size=(12, 4)))}
    apart = unstacked(stacked, form)
    tx = js.lisa(optax.adam(RATE), layers=5, every=2, seed=3)

    @jax.jit
    def step(params: Any, state: Any, number: Any) -> Any:
        gradients = jax.tree.map(lambda leaf: jnp.sin(3 * leaf + number), params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    states = [tx.init(stacked), tx.init(apart)]
    for number in range(6):
        stacked, states[0] = step(stacked, states[0], number)
        apart, states[1] = step(apart, states[1], number)
        assert drawn(states[0]) == drawn(states[1])
    expected = unstacked(stacked, form)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), apart, expected)
    for name in ("inner", "support"):
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(getattr(state.drawn, name))) for state in states]
        assert sizes[0] == sizes[1]


@pytest.mark.parametrize("layers", [4, 40])
def test_the_state_is_of_the_size_of_the_layers_drawn(layers: int, rng: np.random.Generator) -> None:
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), model(rng, layers))
    tx = js.lisa(optax.adam(RATE), layers=DRAWN)
    state = jax.eval_shape(tx.init, params)
    trained = 20 + 4 + DRAWN * (16 + 4)
    for name, copies in (("inner", 2), ("master", 1)):
        parts = [leaf for part in (state.outside, state.drawn) for leaf in jax.tree.leaves(getattr(part, name))]
        assert sum(leaf.size for leaf in parts if leaf.shape) == copies * trained
    assert js.engine.description.count_slots(tx, params) == trained


def test_a_draw_moves_no_weight_and_leaves_the_state_outside_alone(rng: np.random.Generator) -> None:
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), model(rng))
    tx = js.lisa(optax.adam(RATE), layers=1, every=2, seed=1)
    state, update, gradient = tx.init(params), jax.jit(tx.update), jax.jit(jax.grad(loss))
    x = rng.normal(size=(6, 5))
    for step in range(6):
        gradients = gradient(params, x)
        updates, new = update(gradients, state, params)
        (awake,) = drawn(new)
        asleep = np.delete(np.asarray(updates["layers"]["kernel"]), awake, axis=0)
        assert np.all(np.signbit(asleep) & (asleep == 0))  # -0.0 leaves every bit of a weight
        adam = new.drawn.inner[0]
        assert int(adam.count) == step % 2 + 1
        assert int(new.outside.inner[0].count) == step + 1
        if step % 2 == 0:
            g = gradients["layers"]["kernel"][awake]
            np.testing.assert_allclose(adam.mu["layers"]["kernel"][0, 0], 0.1 * g, rtol=1e-5)
        gradients = jax.tree.map(np.asarray, gradients)
        kept = np.sum(np.square(gradients["embedding"])) + np.sum(np.square(gradients["norm"]["scale"]))
        layers = {path: np.square(leaf) for path, leaf in gradients["layers"].items()}
        whole = kept + sum(leaf.sum() for leaf in layers.values())
        kept += sum(leaf[awake].sum() for leaf in layers.values())
        np.testing.assert_allclose(new.progress.retention, kept / whole, rtol=1e-5)
        params, state = optax.apply_updates(params, updates), new


def test_every_layer_is_drawn_as_often_as_any_other() -> None:
    params = {"layers": {"scale": jnp.zeros((5, 1))}}
    tx = js.lisa(optax.sgd(0.1), layers=2, every=1)

    def step(state: Any, _: None) -> Any:
        _, state = tx.update(params, state, params)
        return state, state.drawn.support["layers"]["scale"][0]

    _, draws = jax.lax.scan(step, tx.init(params), length=2000)
    often = np.bincount(np.asarray(draws).ravel(), minlength=5)
    assert np.all(np.abs(often - 800) < 5 * np.sqrt(2000 * 0.4 * 0.6))
    assert np.all(draws[:, 0] != draws[:, 1])


@pytest.mark.parametrize("where", ["embedding", "layers/bias"])
def test_a_gradient_that_is_not_finite_leaves_both_parts_as_they_were(where: str, rng: np.random.Generator) -> None:
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), model(rng))
    tx = js.lisa(optax.adam(RATE), layers=LAYERS, every=1)
    state, update = tx.init(params), jax.jit(tx.update)
    gradients = jax.tree.map(np.ones_like, params)
    bad = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * np.float32(np.nan if where.endswith(path[-1].key) else 1), gradients
    )
    updates, new = update(bad, state, params)
    assert all(np.all(np.asarray(leaf) == 0) for leaf in jax.tree.leaves(updates))
    assert int(new.progress.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, (new.outside, new.drawn), (state.outside, state.drawn))
    updates, new = update(gradients, new, params)
    assert all(np.all(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(updates))
    assert (int(new.progress.steps), int(new.progress.refreshes)) == (1, 1)


def test_steps_that_bfloat16_cannot_hold_add_up_while_a_layer_is_awake() -> None:
    params = {"layers": {"bias": jnp.ones((2, 3), jnp.bfloat16)}, "head": jnp.ones(3, jnp.bfloat16)}
    tx = js.lisa(optax.sgd(1e-3), layers=1, every=10, seed=0)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(10):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    (awake,) = drawn(state)
    expected = np.full((2, 3), 1.0)
    expected[awake] = jnp.bfloat16(1 - 10e-3)
    np.testing.assert_array_equal(np.float32(params["layers"]["bias"]), expected)
    np.testing.assert_array_equal(np.float32(params["head"]), expected[awake])


class Blocks(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(3)])
        self.head = nnx.Linear(3, 2, rngs=rngs)


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({}, {"blocks", "head"}),
        ({"targets": r"blocks/.*"}, {"blocks"}),
        ({"targets": r".*/kernel", "stack": "blocks"}, {"blocks", "head"}),
    ],
)
def test_targets_bound_what_moves_in_layers_and_outside(options: dict, moves: set[str]) -> None:
    params = nnx.state(Blocks(nnx.Rngs(0)), nnx.Param)
    tx = js.lisa(layers=2, **options)
    updates, state = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, params), tx.init(params))
    moved = {path for path, leaf in flatten_with_paths(updates)[0] if leaf.any()}
    assert {path.split("/")[0] for path in moved} == moves
    assert {path.split("/")[1] for path in moved if path.startswith("blocks")} == {str(n) for n in drawn(state)}
    assert all(path.endswith("kernel") for path in moved) is options.get("targets", "").endswith("kernel")


def test_a_stack_of_any_name_can_be_named(rng: np.random.Generator) -> None:
    tower = {"kernel": jnp.ones((2, 3, 3))}
    params = {"encoder": {"layers": tower}, "decoder": {"layers": tower}, "tower": tower}
    for stack in ("encoder/layers", "tower"):
        tx = js.lisa(layers=1, stack=stack)
        updates, _ = jax.jit(tx.update)(params, tx.init(params))
        for path, leaf in flatten_with_paths(updates)[0]:
            assert int(jnp.sum(leaf != 0)) == (9 if path.startswith(stack) else 18)


SQUARE = jnp.ones((2, 3, 3))


@pytest.mark.parametrize(
    ("options", "params", "message"),
    [
        ({"layers": 0}, {}, "layers must be at least 1, got 0"),
        ({"every": 0}, {}, "every must be at least 1, got 0"),
        ({"stack": "("}, {}, r"stack: '\(' is no regular expression"),
        ({"layers": 3}, {"layers": {"k": SQUARE}}, "layers=3 is more than the 2 layers"),
        ({}, {"mlp": {"kernel": SQUARE}}, "no layers to draw from.*it has mlp/kernel.*stack names"),
        ({"targets": "mlp/k"}, {"layers": {"k": SQUARE}, "mlp": {"k": SQUARE}}, "no layers to draw from"),
        ({}, {"a": {"layers": {"k": SQUARE}}, "b": {"h": {"k": SQUARE}}}, "several stacks of layers: a/layers, b/h"),
        ({}, {"layers": {"k": SQUARE, "b": jnp.ones((3, 3))}}, r"do not agree .*b \(3, 3\), k \(2, 3, 3\)"),
        ({}, {"layers": {"k": SQUARE, "s": jnp.ones(())}}, r"s must have layers on its first axis.*layers/s \(\)"),
        (
            {},
            {"h_0": {"k": SQUARE}, "h_1": {"k": SQUARE, "b": SQUARE}},
            "b must .* alike in all 2 layers of h; .*h_1/b",
        ),
        ({}, {"h_0": {"k": SQUARE}, "h_1": {"k": SQUARE[0]}}, r"k must .* alike.*h_0/k \(2, 3, 3\), h_1/k \(3, 3\)"),
    ],
)
def test_bad_options_and_models_are_named(options: dict, params: dict, message: str) -> None:
    with pytest.raises(js.InputError, match=re.compile(message)):
        js.lisa(optax.sgd(0.1), **options).init(params)
