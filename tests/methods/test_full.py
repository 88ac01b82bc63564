"""Full fine-tuning and BitFit beside NumPy, and which weights they take by themselves."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxsparse as js
from jaxsparse.common.paths import flatten_with_paths

STEPS, RATE, DECAY = 30, 0.05, 0.1


def model(rng: np.random.Generator) -> dict[str, Any]:
    """Two stacked layers, a vector, a scalar, and what is no weight."""
    return {
        "layers": {"kernel": rng.normal(size=(2, 6, 5)), "bias": rng.normal(size=(2, 5))},
        "scale": rng.normal(size=6),
        "temperature": rng.normal(size=()),
        "count": np.array(3),
    }


def loss(params: dict[str, Any], x: Any) -> jax.Array:
    y = jnp.tanh((x * params["scale"]) @ params["layers"]["kernel"] + params["layers"]["bias"][:, None])
    return jnp.sum((params["temperature"] * y - 0.5) ** 2)


def plain(weight: np.ndarray, gradients: list[np.ndarray], adam: bool) -> np.ndarray:
    """Where AdamW or gradient descent with weight decay takes a weight."""
    m, v = np.zeros_like(weight), np.zeros_like(weight)
    for step, g in enumerate(gradients, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        move = m / (1 - 0.9**step) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8) if adam else g
        weight = weight - RATE * (move + DECAY * weight)
    return weight


@pytest.mark.parametrize("adam", [True, False], ids=["adamw", "sgd"])
@pytest.mark.parametrize("name", ["full", "bitfit"])
def test_follows_its_paper(name: str, adam: bool, rng: np.random.Generator) -> None:
    start, x = model(rng), rng.normal(size=(2, 4, 6))
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, start)
        decay = optax.chain(optax.add_decayed_weights(DECAY), optax.scale(-RATE))
        tx = getattr(js, name)(optax.chain(optax.scale_by_adam(), decay) if adam else decay)
        state, update = tx.init(params), jax.jit(tx.update)
        gradient = jax.jit(jax.grad(loss, allow_int=True))
        history = []
        for _ in range(STEPS):
            gradients = gradient(params, x) | {"count": jnp.zeros((), int)}
            history.append([np.asarray(leaf) for leaf in jax.tree.leaves(gradients)])
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        moved = dict(flatten_with_paths(params)[0])
        for number, (path, weight) in enumerate(flatten_with_paths(start)[0]):
            if path == "count" or (name == "bitfit" and not path.endswith("bias")):
                np.testing.assert_array_equal(moved[path], weight)
            else:
                expected = plain(weight, [gradients[number] for gradients in history], adam)
                np.testing.assert_allclose(moved[path], expected, rtol=1e-6, atol=1e-9)
                assert not np.array_equal(moved[path], weight)


def test_full_keeps_the_shapes_that_factored_optimizers_look_at(rng: np.random.Generator) -> None:
    """Adafactor stores rows and columns of matrices, as it would without us."""
    params = {"kernel": jnp.asarray(rng.normal(size=(2, 6, 5)), jnp.float32), "scale": jnp.ones(7)}
    gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    inner = optax.scale_by_factored_rms(min_dim_size_to_factor=3)
    tx = js.full(inner)
    updates, _ = jax.jit(tx.update)(gradients, tx.init(params), params)
    alone, _ = jax.jit(inner.update)(gradients, inner.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, alone)


@pytest.mark.parametrize("slots_dtype", ["promote", None])
def test_steps_that_bfloat16_cannot_hold_add_up_in_masters(slots_dtype: Any) -> None:
    params = {"bias": jnp.ones(3, jnp.bfloat16)}
    tx = js.bitfit(optax.sgd(1e-3), slots_dtype=slots_dtype)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(10):
        updates, state = update({"bias": jnp.ones(3, jnp.bfloat16)}, state, params)
        params = optax.apply_updates(params, updates)
    expected = jnp.bfloat16(1 - 10e-3) if slots_dtype else 1.0
    np.testing.assert_array_equal(params["bias"], jnp.full(3, expected))


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x: Any) -> Any:
        return linen.LayerNorm()(linen.Dense(3)(x))


class NNX(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.dense, self.norm, self.dropout = nnx.Linear(4, 3, rngs=rngs), nnx.LayerNorm(3, rngs=rngs), nnx.Dropout(0.5)


MODELS = {
    "linen": lambda: Linen().init(jax.random.key(0), jnp.ones((1, 4))),
    "nnx": lambda: nnx.state(NNX(nnx.Rngs(0)), nnx.Param),
    "nnx with random keys": lambda: nnx.state(NNX(nnx.Rngs(0, dropout=1))),
    "plain": lambda: {"dense": {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}, "attention": {"in_proj_bias": jnp.ones(3)}},
    "with a key": lambda: {"rng": jax.random.key(0), "bias": jnp.ones(6), "steps": jnp.zeros((), jnp.int32)},
}


@pytest.mark.parametrize("model", MODELS)
def test_finds_all_biases_of_a_model_and_nothing_else(model: str) -> None:
    params = MODELS[model]()
    paths = [path for path, _ in flatten_with_paths(params)[0]]
    tx = js.bitfit(optax.adam(0.1))
    found = [paths[position] for position in tx.description.moving(params)]
    assert found == [path for path in paths if path.split("/")[-1] in ("bias", "b", "in_proj_bias")]
    assert found
    moments = tx.init(params).inner[0].mu
    assert sum(leaf.size for leaf in jax.tree.leaves(moments)) == 6
    everything = [paths[position] for position in js.full().description.moving(params)]
    assert everything == [
        path for path, leaf in flatten_with_paths(params)[0] if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]


def test_targets_of_any_shape_can_be_named() -> None:
    params = {"scale": jnp.ones(4), "layers": {"scale": jnp.ones((2, 3)), "kernel": jnp.ones((2, 3, 3))}}
    for constructor in (js.full, js.bitfit):
        for targets in (r"(.*/)?scale", ["scale", js.Target("layers/scale", stack_axes=(0,))]):
            tx = constructor(optax.sgd(1.0), targets=targets)
            updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
            moved = {path for path, leaf in flatten_with_paths(updates)[0] if leaf.any()}
            assert moved == {"scale", "layers/scale"}


@pytest.mark.parametrize(
    ("make", "params", "message"),
    [
        (js.bitfit, {"dense": {"kernel": jnp.ones((2, 2))}}, "bitfit trains biases, and this model has none.*dense/ke"),
        (js.full, {"count": jnp.ones((2, 2), int)}, "no floating-point parameters; it has count"),
        (lambda: js.full(targets="count"), {"count": jnp.ones((2, 2), int)}, "count has dtype int32"),
        (lambda: js.full(targets="empty"), {"empty": jnp.ones((0, 2))}, "empty is empty"),
        (lambda: js.bitfit(targets="bais"), {"bias": jnp.ones(2)}, "'bais' matches no parameter.*near misses: bias"),
        (lambda: js.full(slots_dtype="int32"), {}, "slots_dtype must be a floating-point dtype"),
    ],
)
def test_what_is_missing_is_named(make: Any, params: dict, message: str) -> None:
    with pytest.raises(js.InputError, match=message):
        make().init(params)
