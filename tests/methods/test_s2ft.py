"""S2FT beside NumPy: what each selection picks, how its slices train, and what it says of models it does not know."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import jaxsparse as js
from jaxsparse.engine.description import count_slots

LAYERS, WIDTH, HEADS, GROUPS, SIZE, CHANNELS = 2, 5, 6, 3, 2, 12
ATTENTION, FEED_FORWARD = "layers/self_attn", "layers/mlp"


def kernels(rng: np.random.Generator) -> dict[str, Any]:
    """The weights of two stacked layers with grouped queries."""

    def kernel(*shape: int) -> dict[str, np.ndarray]:
        return {"kernel": rng.normal(size=(LAYERS, *shape))}

    shared = GROUPS * SIZE
    attention = {"q_proj": kernel(WIDTH, HEADS * SIZE), "k_proj": kernel(WIDTH, shared)}
    attention |= {"v_proj": kernel(WIDTH, shared), "o_proj": kernel(HEADS * SIZE, WIDTH)}
    mlp = {name: kernel(WIDTH, CHANNELS) for name in ("gate_proj", "up_proj")}
    return {"layers": {"self_attn": attention, "mlp": mlp | {"down_proj": kernel(CHANNELS, WIDTH)}}}


def at(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def float32(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)


# Path, options, axis of the slices, slices of a unit, number of units picked of each layer.
SIDES = {
    "output": (f"{ATTENTION}/o_proj/kernel", 1, SIZE, 2),
    "down": (f"{FEED_FORWARD}/down_proj/kernel", 1, 1, 4),
    "query": (f"{ATTENTION}/q_proj/kernel", 2, SIZE, 2),
    "key": (f"{ATTENTION}/k_proj/kernel", 2, SIZE, 1),
    "value": (f"{ATTENTION}/v_proj/kernel", 2, SIZE, 1),
    "up": (f"{FEED_FORWARD}/up_proj/kernel", 2, 1, 4),
    "gate": (f"{FEED_FORWARD}/gate_proj/kernel", 2, 1, 4),
}


def units_of(matrix: np.ndarray, axis: int, size: int) -> np.ndarray:
    """(units, entries) of one layer's matrix."""
    slices = matrix if axis == 1 else matrix.T
    return slices.reshape(slices.shape[0] // size, -1)


@pytest.mark.parametrize("which", ["large", "small"])
@pytest.mark.parametrize("score", ["weight", "activation", "product", "gradient"])
def test_each_selection_picks_what_numpy_picks(score: str, which: str, rng: np.random.Generator) -> None:
    params, gradients = kernels(rng), kernels(rng)
    activations = {
        SIDES["output"][0]: rng.uniform(0.1, 3, size=(LAYERS, HEADS * SIZE)),
        SIDES["down"][0]: rng.uniform(0.1, 3, size=(LAYERS, CHANNELS)),
    }
    given = {"gradient": {"gradients": float32(flat(gradients))}, "weight": {}}
    roles = ("output", "down", "key", "up")
    tx = js.s2ft(
        **dict.fromkeys(roles, 0.35),
        head_size=SIZE,
        score=score,
        which=which,
        **given.get(score, {"activations": float32(activations)}),
    )
    _, state = jax.jit(tx.update)(float32(kernels(rng)), tx.init(float32(params)), float32(params))
    for role in roles:
        path, axis, size, count = SIDES[role]
        joint = SIDES["down" if role in ("up", "gate", "down") else "output"][0]
        for layer in range(LAYERS):
            weight = np.linalg.norm(units_of(at(params, path)[layer], axis, size), axis=1)
            gradient = np.linalg.norm(units_of(at(gradients, path)[layer], axis, size), axis=1)
            # A head of key and value answers for all the heads that share it.
            activation = np.linalg.norm(activations[joint][layer].reshape(len(weight), -1), axis=1)
            scores = {"weight": weight, "gradient": gradient, "activation": activation, "product": weight * activation}
            order = np.argsort(scores[score] * (-1 if which == "large" else 1))
            np.testing.assert_array_equal(at(state.support, path)[layer], order[:count], err_msg=path)


def flat(tree: Any) -> dict[str, Any]:
    return {path: at(tree, path) for path, *_ in SIDES.values()}


def test_random_slices_differ_by_layer_and_seed_and_are_uniform(rng: np.random.Generator) -> None:
    params = float32(kernels(rng))
    draw = jax.vmap(lambda seed: at(picked(params, output=None, down=0.25, seed=seed), SIDES["down"][0]))
    supports = np.asarray(draw(jnp.arange(400) + int(rng.integers(1000))))
    assert all(len({*units}) == 3 for units in supports.reshape(-1, 3).tolist())
    assert len({*map(str, supports)}) > 390
    counts = np.stack([np.bincount(supports[:, layer].ravel(), minlength=CHANNELS) for layer in range(LAYERS)])
    assert 50 < counts.min() <= counts.max() < 150  # 100 expected of each; the deviation is 9


def picked(params: Any, **options: Any) -> Any:
    tx = js.s2ft(**options)
    return jax.jit(tx.update)(params, tx.init(params), params)[1].support


def test_the_default_is_the_released_scripts_share_and_at_least_one(rng: np.random.Generator) -> None:
    params = {
        "self_attn": {name: {"kernel": jnp.zeros((320, 320))} for name in ("q_proj", "k_proj", "v_proj", "o_proj")},
        "mlp": {
            name: {"kernel": jnp.zeros(shape)} for name, shape in (("up_proj", (320, 970)), ("down_proj", (970, 320)))
        },
    }
    tx = js.s2ft(head_size=10)
    slots = tx.description.slots(params)
    assert slots["self_attn"]["o_proj"]["kernel"].shape == (1, 2, 10, 320)  # 5.2 % of 32 heads is 1.66
    assert slots["mlp"]["down_proj"]["kernel"].shape == (1, 19, 320)  # 2 % of 970
    assert js.s2ft(output=0.001, down=None, head_size=10).description.slots(params)["self_attn"]["o_proj"][
        "kernel"
    ].shape == (1, 1, 10, 320)


def test_activations_pick_heads_where_kernels_have_an_axis_of_heads(rng: np.random.Generator) -> None:
    """Linen's MultiHeadDotProductAttention: the shapes show the head size, with layers stacked or numbered."""
    module = linen.MultiHeadDotProductAttention(num_heads=HEADS, qkv_features=HEADS * SIZE, out_features=WIDTH)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 2, WIDTH)))["params"]
    block = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
    weights = {name: np.asarray(block[name]["kernel"]) for name in block}
    stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), block)
    norms = np.linalg.norm(weights["out"].reshape(HEADS, -1), axis=1)
    expected = np.argsort(-norms)[:2]
    options = {"output": 0.35, "query": 0.35, "down": None, "score": "weight"}
    for tree, layers in (({"layers_0": {"attention": block}}, 1), ({"layers": {"attention": stacked}}, 2)):
        (support,) = (next(iter(group.values())) for group in picked(tree, **options).values())
        np.testing.assert_array_equal(support["out"]["kernel"], np.tile(expected, (layers, 1)))
        norms = np.linalg.norm(weights["query"], axis=(0, 2))
        np.testing.assert_array_equal(support["query"]["kernel"][0], np.argsort(-norms)[:2])
    with pytest.raises(js.InputError, match="head_size=3 does not fit the kernels of layers_0/attention/"):
        js.s2ft(head_size=3, down=None).init({"layers_0": {"attention": block}})


class Peer:
    """S2FT on one matrix, in NumPy: AdamW or gradient descent on rows of W."""

    def __init__(self, rows: np.ndarray, adam: bool) -> None:
        self.rows, self.adam, self.steps, self.m, self.v = rows, adam, 0, 0.0, 0.0

    def step(self, weight: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        weight, g = weight.copy(), gradient[self.rows]
        self.steps += 1
        if not self.adam:
            weight[self.rows] -= 0.02 * g
            return weight
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        direction = self.m / (1 - 0.9**self.steps) / (np.sqrt(self.v / (1 - 0.999**self.steps)) + 1e-8)
        weight[self.rows] -= 0.02 * (direction + 0.1 * weight[self.rows])
        return weight


@pytest.mark.parametrize("adam", [True, False], ids=["adamw", "sgd"])
def test_follows_its_paper(adam: bool, rng: np.random.Generator) -> None:
    """Heads of o and channels of down, beside NumPy for 30 steps; weight decay acts on the slices of W."""
    heads, hidden = rng.normal(size=(LAYERS, 7, HEADS * SIZE)), rng.normal(size=(LAYERS, 7, CHANNELS))
    goal = rng.normal(size=(LAYERS, 7, WIDTH))
    start = kernels(rng)
    paths = {SIDES["output"][0]: SIZE, SIDES["down"][0]: 1}

    def loss(params: Any) -> Any:
        mixed, channels = (at(params, path) for path in paths)
        return jnp.sum(jnp.tanh(heads @ mixed + hidden @ channels - goal) ** 2)

    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, start)
        inner = optax.adamw(0.02, weight_decay=0.1) if adam else optax.sgd(0.02)
        tx = js.s2ft(inner, output=0.35, down=0.25, head_size=SIZE, seed=3)
        state, update, gradient = tx.init(params), jax.jit(tx.update), jax.jit(jax.grad(loss))
        peers: dict[str, list[Peer]] = {}
        for _ in range(30):
            gradients, before = gradient(params), params
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            for path, size in paths.items():
                units = np.asarray(at(state.support, path))
                rows = (units[:, :, None] * size + np.arange(size)).reshape(LAYERS, -1)
                own = peers.setdefault(path, [Peer(picked, adam) for picked in rows])
                for layer, peer in enumerate(own):
                    assert [*peer.rows] == [*rows[layer]]
                    moved = peer.step(np.asarray(at(before, path)[layer]), np.asarray(at(gradients, path)[layer]))
                    np.testing.assert_allclose(at(params, path)[layer], moved, rtol=1e-6, atol=1e-12)
        for path, *_ in SIDES.values():
            changed = np.any(at(params, path) != at(start, path))
            assert changed == (path in paths)
        assert count_slots(tx, params) == LAYERS * WIDTH * (2 * SIZE + 3)


def test_calibrates_on_the_mean_gradient_of_its_first_steps(rng: np.random.Generator) -> None:
    params, first, second = (float32(kernels(rng)) for _ in range(3))
    tx = js.s2ft(optax.sgd(0.1), output=None, down=0.25, score="gradient", which="small", calibration_steps=2)
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in (first, second):
        updates, state = update(gradient, state, params)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(updates))
    _, state = update(first, state, params)
    path = SIDES["down"][0]
    norms = np.linalg.norm(at(first, path) + at(second, path), axis=2)
    np.testing.assert_array_equal(at(state.support, path), np.argsort(norms, axis=1)[:, :3])


def test_calibrate_measures_between_the_two_sides_of_a_structure(rng: np.random.Generator) -> None:
    """The activation of a channel, for up too, is what enters down."""
    params = float32(
        {name: {"kernel": rng.normal(size=shape)} for name, shape in (("up_proj", (5, 9)), ("down_proj", (9, 5)))}
    )
    batches = [jnp.asarray(rng.normal(size=(7, 5)), jnp.float32) for _ in range(2)]

    def loss_fn(params: Any, batch: Any) -> Any:
        return jnp.sum(jnp.sin(jax.nn.relu(batch @ params["up_proj"]["kernel"]) @ params["down_proj"]["kernel"]))

    tx = js.s2ft(optax.sgd(0.1), output=None, down=0.35, up=0.35, score="activation", which="small")
    support = js.calibrate(loss_fn, params, batches, tx)
    hidden = np.maximum(np.concatenate(batches) @ np.asarray(params["up_proj"]["kernel"]), 0)
    expected = np.argsort(np.linalg.norm(hidden, axis=0))[:3]
    for path in ("up_proj/kernel", "down_proj/kernel"):
        np.testing.assert_array_equal(support[path], expected[None])
    given = js.with_support(tx, support)
    _, state = given.update(params, given.init(params), params)
    np.testing.assert_array_equal(state.support["down_proj"]["kernel"], expected[None])


def test_targets_narrow_the_choice_or_name_slices_of_any_model(rng: np.random.Generator) -> None:
    params = float32(kernels(rng))
    stacked = {"stack_axes": (0,)}
    narrowed = js.s2ft(targets=[js.Target(".*/down_proj/kernel", **stacked)])
    assert [target.path for target in narrowed.description.resolve(params)] == [SIDES["down"][0]]
    own = js.Target(".*/up_proj/kernel", **stacked, subspace=js.subspaces.Slices(2))
    both = js.s2ft(targets=[js.Target(".*/down_proj/kernel", **stacked), own], down=0.5)
    shapes = jax.tree.leaves(both.description.slots(params))
    assert [shape.shape for shape in shapes] == [(LAYERS, 6, WIDTH), (LAYERS, 2, CHANNELS)]


def test_trains_what_masked_leaves_in(rng: np.random.Generator) -> None:
    params = float32(kernels(rng))
    mask = jax.tree.map_with_path(lambda path, _: "o_proj" in str(path) or "down" in str(path), params)
    tx, alone = (js.s2ft(optax.sgd(1.0), head_size=SIZE, score="weight") for _ in range(2))
    masked = optax.masked(tx, mask)
    updates, _ = jax.jit(masked.update)(params, masked.init(params), params)
    expected, _ = jax.jit(alone.update)(params, alone.init(params), params)
    for path in (SIDES["output"][0], SIDES["down"][0]):
        np.testing.assert_array_equal(at(updates, path), at(expected, path))


GPT2 = {
    "h": [
        {
            "attn": {"c_attn": {"kernel": jnp.ones((4, 12))}, "c_proj": {"kernel": jnp.ones((4, 4))}},
            "mlp": {"c_fc": {"kernel": jnp.ones((4, 8))}, "c_proj": {"kernel": jnp.ones((8, 4))}},
        }
    ]
}
MLP = {"Dense_0": {"kernel": jnp.ones((4, 6))}, "Dense_1": {"kernel": jnp.ones((6, 4))}}
TRANSPOSED = {
    "mlp": {"c_fc": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(8)}, "c_proj": {"kernel": jnp.ones((4, 8))}}
}


WRONG = {"h/0/mlp/c_proj/kernel": jnp.ones(7)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: js.s2ft(output=0.0), r"output must lie in \(0, 1\], got 0.0"),
        (lambda: js.s2ft(down=1.5), r"down must lie in \(0, 1\], got 1.5"),
        (lambda: js.s2ft(head_size=0), "head_size must be at least 1, got 0"),
        (lambda: js.s2ft(calibration_steps=2), "calibration_steps=2 serve score='gradient' alone"),
        (lambda: js.s2ft(score="gradient", calibration_steps=-1), "calibration_steps must be at least 0, got -1"),
        (lambda: js.s2ft(output=None, down=None), "output, down, query.* are None"),
        (lambda: js.s2ft().init(MLP), "^output, down: the model has no such projection; known are modules with q_proj"),
        (lambda: js.s2ft(targets=".*").init(MLP), "target Dense_0/kernel is no projection that is trained"),
        (lambda: js.s2ft().init(GPT2), "head_size is not given, and the shapes of h/0/attn/c_proj/kernel"),
        (lambda: js.s2ft(head_size=3).init(GPT2), "its 4 inputs do not split into groups of 3"),
        (lambda: js.s2ft(query=0.5).init(GPT2), "^query: .* no such projection .one weight holds query, key and value"),
        (lambda: js.s2ft(gate=0.5, head_size=2).init(GPT2), "^gate: the model has no such projection"),
        (
            lambda: js.s2ft(targets="h/0/attn/c_attn/kernel").init(GPT2),
            "c_attn/kernel is no projection that is trained",
        ),
        (lambda: js.s2ft(output=None).init(TRANSPOSED), r"do not couple.*kernels must be \(in, out\)"),
        (lambda: js.s2ft(head_size=2, score="activation").init(GPT2), "needs the activation of h/0/attn/c_proj/kernel"),
        (
            lambda: js.s2ft(output=None, score="product", activations=WRONG).init(GPT2),
            r"activation given for h/0/mlp/c_proj/kernel has shape \(7,\), which does not fit",
        ),
    ],
)
def test_what_does_not_work_is_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(js.InputError, match=message):
        make()
