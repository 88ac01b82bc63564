"""SMT: blocks of any matrices compete by the magnitude of their mean gradient."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.engine.description import count_slots

SIZE, LOOKS, STEPS = 4, 3, 30
# Edges in both directions, and one target narrower than a block.
SHAPES = {"k": (2, 6, 3), "q": (2, 6, 5)}
TARGETS = js.Target("k|q", stack_axes=(0,))


def tiles(shape: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """Every block of a stack of matrices, as something to index it with."""
    stack, rows, columns = shape
    return [
        (layer, slice(i, i + SIZE), slice(j, j + SIZE))
        for layer in range(stack)
        for i in range(0, rows, SIZE)
        for j in range(0, columns, SIZE)
    ]


def best_blocks(means: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Masks of the best blocks of all matrices together."""
    scored = [(abs(g[tile].mean()), name, tile) for name, g in means.items() for tile in tiles(g.shape)]
    masks = {name: np.zeros(g.shape, bool) for name, g in means.items()}
    for _, name, tile in sorted(scored, key=lambda item: -item[0])[:count]:
        masks[name][tile] = True
    return masks


@pytest.mark.parametrize("adam", [True, False], ids=["adam", "sgd"])
def test_follows_its_paper(adam: bool, rng: np.random.Generator) -> None:
    goal = {name: rng.normal(size=shape) for name, shape in SHAPES.items()}
    start = {name: rng.normal(size=shape) for name, shape in SHAPES.items()} | {"norm": rng.normal(size=3)}
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, start)
        tx = js.smt(
            optax.adam(0.05) if adam else optax.sgd(0.05),
            blocks=5,
            size=SIZE,
            calibration_steps=LOOKS,
            targets=TARGETS,
        )
        gradient = jax.jit(jax.grad(lambda p: sum(jnp.sum(jnp.tanh(p[name] - goal[name]) ** 2) for name in goal)))
        state, update = tx.init(params), jax.jit(tx.update)
        weights, masks = {name: start[name].copy() for name in goal}, {}
        m, v = ({name: np.zeros(shape) for name, shape in SHAPES.items()} for _ in range(2))
        sums = {name: np.zeros(shape) for name, shape in SHAPES.items()}
        for step in range(STEPS):
            noise = {name: rng.normal(size=shape) for name, shape in SHAPES.items()} | {"norm": np.zeros(3)}
            gradients = jax.tree.map(jnp.add, gradient(params), noise)
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            for name in goal:
                g, age = np.asarray(gradients[name]), step - LOOKS + 1
                if age <= 0:
                    sums[name] += g
                    continue
                masks = masks or best_blocks({name: total / LOOKS for name, total in sums.items()}, 5)
                m[name], v[name] = 0.9 * m[name] + 0.1 * g, 0.999 * v[name] + 0.001 * g * g
                moment = (m[name] / (1 - 0.9**age)) / (np.sqrt(v[name] / (1 - 0.999**age)) + 1e-8)
                weights[name] -= 0.05 * masks[name] * (moment if adam else g)
                np.testing.assert_allclose(params[name], weights[name], rtol=1e-6, atol=1e-9)
        for name in goal:
            np.testing.assert_array_equal(np.asarray(params[name]) != start[name], masks[name])
        np.testing.assert_array_equal(params["norm"], start["norm"])
        kept = sum(np.sum((np.asarray(gradients[name]) * masks[name]) ** 2) for name in goal)
        whole = sum(np.sum(np.asarray(gradients[name]) ** 2) for name in goal)
        assert float(state.progress.retention) == pytest.approx(kept / whole, rel=1e-5)


def test_in_matrices_every_matrix_gets_its_blocks(rng: np.random.Generator) -> None:
    means = {name: jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for name, shape in SHAPES.items()}
    tx = js.smt(optax.sgd(1.0), blocks=1, size=SIZE, scope="matrix", gradients=means, targets=TARGETS)
    updates, state = tx.update(means, tx.init(means), means)
    for name, g in means.items():
        exact = np.asarray(g, np.float64)
        for layer in range(2):
            mask = best_blocks({name: exact[layer : layer + 1]}, 1)[name][0]
            np.testing.assert_array_equal(np.asarray(updates[name][layer], np.float32) != 0, mask & (exact[layer] != 0))
    assert state.evidence == ()


def shapes(**sizes: tuple[int, ...]) -> dict[str, Any]:
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}


@pytest.mark.parametrize(
    ("given", "blocks"),
    [
        ({"blocks": 7}, 7),
        ({"density": 0.5}, 15),  # half of the 24 blocks of a and the 6 of b
        ({"budget": 0.25}, 10),  # 400 of 1600 entries, where 30 blocks have 1200
    ],
)
def test_a_budget_is_a_number_of_blocks(given: dict[str, Any], blocks: int) -> None:
    model = shapes(a=(2, 30, 17), b=(1, 9, 20), rest=(400,))
    tx = js.smt(size=8, targets=js.Target("a|b", stack_axes=(0,)), **given)
    assert count_slots(tx, model) == blocks * 8 * 8


def test_default_targets_are_queries_keys_and_values() -> None:
    def names(*paths: str) -> dict[str, Any]:
        return {path: jax.ShapeDtypeStruct((2, 4, 4), jnp.float32) for path in paths}

    llama = names(*(f"layers/self_attn/{name}_proj/kernel" for name in "qkvo"), "layers/mlp/down_proj/kernel")
    gpt2 = names("layers/attn/c_attn/kernel", "layers/attn/c_proj/kernel", "layers/mlp/c_proj/kernel")
    for model, wanted in ((llama, ["k", "q", "v"]), (gpt2, ["c_attn"])):
        found = js.smt(blocks=1).description.resolve(model)
        assert [target.path.split("/")[2].removesuffix("_proj") for target in found] == wanted
    assert len(js.smt(blocks=1, targets=js.Target(".*o_proj/kernel", stack_axes=(0,))).description.resolve(llama)) == 1
    with pytest.raises(js.InputError, match="this is no known model; name its weights"):
        js.smt(blocks=1).init({"dense": {"kernel": jnp.ones((4, 4))}})


def test_calibrate_picks_what_calibration_steps_pick(rng: np.random.Generator) -> None:
    widths = {"q_proj": 6, "k_proj": 3, "v_proj": 3, "o_proj": 6}
    attention = {name: {"kernel": jnp.asarray(rng.normal(size=(2, 6, width)))} for name, width in widths.items()}
    params = {"layers": {"self_attn": attention}}

    def loss_fn(params: Any, batch: jax.Array) -> jax.Array:
        kernels = jax.tree.leaves(params)
        return sum(jnp.sum(jnp.tanh(jnp.einsum("bi,lio->blo", batch, kernel)) ** 2) for kernel in kernels)

    batches = [jnp.asarray(rng.normal(size=(4, 6))) for _ in range(2)]
    method = js.smt(optax.sgd(0.1), blocks=3, size=SIZE, calibration_steps=2)
    looking, gradient = method.init(params), jax.jit(jax.grad(loss_fn))
    for batch in batches:
        _, looking = method.update(gradient(params, batch), looking, params)
    given = js.with_support(method, js.calibrate(loss_fn, params, batches, method))
    results = [
        tx.update(gradient(params, batches[0]), state, params)[0]
        for tx, state in ((method, looking), (given, given.init(params)))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *results)
    assert any(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(results[1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of blocks, density and budget; got none"),
        ({"blocks": 1, "budget": 0.1}, "got blocks and budget"),
        ({"blocks": 0}, "count must be at least 1, got 0"),
        ({"blocks": 1, "size": 0}, "size must be at least 1, got 0"),
        ({"blocks": 13}, "13 blocks are more than the 12 of all 2 targets"),
        ({"blocks": 5, "scope": "matrix"}, "5 blocks are more than the 2 of k"),
        ({"density": 0.01}, "less than half a block of 8"),
        ({"density": 1.5}, "density must lie in"),
        ({"blocks": 1, "calibration_steps": 0}, "smt needs gradients, or calibration_steps"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    params = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    with pytest.raises(js.InputError, match=message):
        js.smt(**{"size": SIZE, "targets": TARGETS, **options}).init(params)
