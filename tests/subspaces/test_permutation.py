"""Coupled permutations: the model computes what it did, chosen units come first, and the way back is exact."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen

import jaxsparse as js
from jaxsparse.models.functional import LanguageModel
from tests.models.small import CONFIGS, LLAMA, random_params, random_tokens

NINE = dataclasses.replace(LLAMA, hidden_size=36, num_heads=9, num_kv_heads=3, head_dim=4, num_layers=2)
MODELS = {name: CONFIGS[name] for name in ("grouped", "wide_heads", "biases", "gpt2")} | {"nine_heads": NINE}


def joints(config: Any) -> dict[str, int]:
    """The paths whose inputs are heads or channels, and how many there are."""
    if config.family == "gpt2":
        return {"layers/attn/c_proj/kernel": config.num_heads, "layers/mlp/c_proj/kernel": config.intermediate_size}
    return {
        "layers/self_attn/o_proj/kernel": config.num_heads,
        "layers/mlp/down_proj/kernel": config.intermediate_size,
    }


def random_selection(config: Any, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A third of the units of every layer."""
    return {
        path: np.stack([rng.choice(units, units // 3, replace=False) for _ in range(config.num_layers)])
        for path, units in joints(config).items()
    }


def at(tree: Any, path: str) -> Any:
    for name in path.split("/"):
        tree = tree[name]
    return tree


def assert_same_bits(one: Any, other: Any) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)),
        one,
        other,
    )


@pytest.mark.parametrize("name", MODELS)
def test_the_model_computes_what_it_did_and_the_inverse_is_exact(name: str, rng: np.random.Generator) -> None:
    config = MODELS[name]
    model, tokens = LanguageModel(config), random_tokens(rng, 2, 9)
    params = random_params(model, rng)
    permuted, inverse = js.permute_coupled(params, random_selection(config, rng), head_size=config.head_dim)
    for path in joints(config):
        assert np.any(np.asarray(at(permuted, path) != at(params, path)))
    logits = jax.jit(model.logits)
    before, after = logits(params, tokens), logits(permuted, tokens)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(before))))
    assert_same_bits(jax.jit(inverse)(permuted), params)


def test_narrow_weights_come_back_bit_for_bit(rng: np.random.Generator) -> None:
    params = random_params(LanguageModel(NINE), rng, jnp.bfloat16)
    params = jax.tree.map(lambda leaf: leaf.at[..., 0].set(jnp.nan).at[..., 1].set(-0.0), params)
    permuted, inverse = js.permute_coupled(params, random_selection(NINE, rng), head_size=NINE.head_dim)
    assert {leaf.dtype for leaf in jax.tree.leaves(permuted)} == {jnp.dtype(jnp.bfloat16)}
    assert_same_bits(inverse(permuted), params)


def test_a_support_is_a_selection_and_chosen_units_come_first_in_its_order(rng: np.random.Generator) -> None:
    config = CONFIGS["wide_heads"]
    params = random_params(LanguageModel(config), rng)
    tx = js.s2ft(output=0.5, down=0.2, head_size=config.head_dim)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    permuted, inverse = js.permute_coupled(params, state.support, head_size=config.head_dim)
    for path, size in zip(joints(config), (config.head_dim, 1), strict=True):
        slots = at(state.support, path)
        before, after = (
            np.asarray(at(tree, path)).reshape(config.num_layers, -1, size, config.hidden_size)
            for tree in (params, permuted)
        )
        for layer, units in enumerate(slots):
            np.testing.assert_array_equal(after[layer, : len(units)], before[layer, units])
            rest = [unit for unit in range(before.shape[1]) if unit not in units]
            np.testing.assert_array_equal(after[layer, len(units) :], before[layer, rest])
        np.testing.assert_array_equal(inverse.sources(state.support)[path][0], range(slots.shape[1]))


def numbered(heads: int, groups: int, channels: int) -> dict[str, Any]:
    """One layer whose weights are the numbers of their heads, groups and channels; heads of width 2."""

    def outputs(units: int, size: int) -> dict[str, Any]:
        return {"kernel": jnp.tile(jnp.repeat(jnp.arange(float(units)), size), (3, 1))}

    def inputs(units: int, size: int) -> dict[str, Any]:
        return {"kernel": outputs(units, size)["kernel"].T, "bias": jnp.arange(3.0)}

    attention = {"q_proj": outputs(heads, 2), "k_proj": outputs(groups, 2), "v_proj": outputs(groups, 2)}
    mlp = {"gate_proj": outputs(channels, 1), "up_proj": outputs(channels, 1), "down_proj": inputs(channels, 1)}
    return {"h_0": {"self_attn": attention | {"o_proj": inputs(heads, 2)}, "mlp": mlp}}


@pytest.mark.parametrize(
    ("heads", "groups", "selection", "head_order", "group_order"),
    [
        (6, 3, {"o_proj": [4, 1]}, [4, 5, 1, 0, 2, 3], [2, 0, 1]),
        (6, 3, {"o_proj": [3], "k_proj": [0]}, [3, 2, 0, 1, 4, 5], [1, 0, 2]),
        (6, 3, {"q_proj": [5, 2], "o_proj": [2]}, [2, 3, 5, 4, 0, 1], [1, 2, 0]),
        (4, 4, {"o_proj": [2, 0]}, [2, 0, 1, 3], [2, 0, 1, 3]),
        (4, 1, {"o_proj": [2, 0]}, [2, 0, 1, 3], [0]),
        (4, 2, {"v_proj": [1]}, [2, 3, 0, 1], [1, 0]),
    ],
)
def test_groups_with_chosen_heads_come_first_and_stay_together(
    heads: int, groups: int, selection: dict[str, list[int]], head_order: list[int], group_order: list[int]
) -> None:
    params = numbered(heads, groups, 5)
    chosen = {f"h_0/self_attn/{name}/kernel": units for name, units in selection.items()}
    permuted, _ = js.permute_coupled(params, chosen | {"h_0/mlp/down_proj/kernel": [3, 0]}, head_size=2)
    attention, mlp = permuted["h_0"]["self_attn"], permuted["h_0"]["mlp"]
    np.testing.assert_array_equal(attention["q_proj"]["kernel"][0], np.repeat(head_order, 2))
    np.testing.assert_array_equal(attention["o_proj"]["kernel"][:, 0], np.repeat(head_order, 2))
    for name in ("k_proj", "v_proj"):
        np.testing.assert_array_equal(attention[name]["kernel"][0], np.repeat(group_order, 2))
    for name in ("gate_proj", "up_proj"):
        np.testing.assert_array_equal(mlp[name]["kernel"][0], [3, 0, 1, 2, 4])
    np.testing.assert_array_equal(mlp["down_proj"]["kernel"][:, 0], [3, 0, 1, 2, 4])
    np.testing.assert_array_equal(attention["o_proj"]["bias"], range(3))


def test_heads_on_an_axis_of_their_own_are_permuted_too(rng: np.random.Generator) -> None:
    """Linen's attention: its shapes show the head size, and biases of the heads move along."""
    module = linen.MultiHeadDotProductAttention(num_heads=4, qkv_features=12, out_features=5)
    tokens = jnp.asarray(rng.normal(size=(2, 6, 5)), jnp.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), tokens)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes)
    permuted, inverse = js.permute_coupled(params, {"params/out/kernel": np.array([3, 1])})
    np.testing.assert_array_equal(permuted["params"]["out"]["kernel"][0], params["params"]["out"]["kernel"][3])
    np.testing.assert_array_equal(permuted["params"]["query"]["bias"][1], params["params"]["query"]["bias"][1])
    np.testing.assert_allclose(module.apply(permuted, tokens), module.apply(params, tokens), rtol=1e-4, atol=1e-5)
    assert_same_bits(inverse(permuted), params)


def test_training_the_permuted_model_is_training_the_model(rng: np.random.Generator) -> None:
    """With `sources` as support, a step on the permuted model is the permuted step, under grouped queries too."""
    params, gradients = (random_params(LanguageModel(NINE), rng) for _ in range(2))
    options = {"output": 0.35, "down": 0.2, "head_size": NINE.head_dim}
    tx = js.s2ft(optax.adam(0.1), **options)
    updates, state = jax.jit(tx.update)(gradients, tx.init(params), params)
    permuted, inverse = js.permute_coupled(params, state.support, head_size=NINE.head_dim)
    forth = inverse.inverse()
    placed = js.with_support(js.s2ft(optax.adam(0.1), **options), inverse.sources(state.support))
    moved, _ = jax.jit(placed.update)(jax.jit(forth)(gradients), placed.init(permuted), permuted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), jax.jit(inverse)(moved), updates)
    assert np.any(updates["layers"]["self_attn"]["o_proj"]["kernel"])


def with_leaf(path: str, leaf: Any) -> dict[str, Any]:
    """The numbered model with one more parameter in its attention."""
    params = numbered(4, 2, 5)
    name, last = path.split("/")
    params["h_0"]["self_attn"].setdefault(name, {})[last] = leaf
    return params


OUTPUT = "h_0/self_attn/o_proj/kernel"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda params: js.permute_coupled(params, {"h_0/norm": [0]}),
            "names h_0/norm, which is no kernel of a coupled",
        ),
        (lambda params: js.permute_coupled(params, {OUTPUT: [4]}, head_size=2), "units from 0 to 3, got 4..4"),
        (lambda params: js.permute_coupled(params, {OUTPUT: [-1]}, head_size=2), "units from 0 to 3, got -1..-1"),
        (lambda params: js.permute_coupled(params, {OUTPUT: [1, 1]}, head_size=2), "names a unit twice"),
        (lambda params: js.permute_coupled(params, {OUTPUT: np.ones((2, 1), int)}, head_size=2), "with 1 layers; got"),
        (lambda params: js.permute_coupled(params, {OUTPUT: np.array([0.5])}, head_size=2), "must hold whole numbers"),
        (lambda params: js.permute_coupled(params, {OUTPUT: [0]}), "head_size is not given"),
        (
            lambda params: js.permute_coupled(params, {OUTPUT: [0]}, head_size=3),
            "does not split into heads of head_size=3",
        ),
        (
            lambda _: js.permute_coupled(with_leaf("q_norm/scale", jnp.ones(8)), {OUTPUT: [0]}, head_size=2),
            r"does not know how h_0/self_attn/q_norm/scale of shape \(8,\)",
        ),
        (
            lambda _: js.permute_coupled(with_leaf("v_proj/lora_a", jnp.ones((3, 2))), {OUTPUT: [0]}, head_size=2),
            "does not know how h_0/self_attn/v_proj/lora_a",
        ),
    ],
)
def test_what_cannot_be_permuted_is_named(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(js.InputError, match=message):
        make(numbered(4, 2, 5))


def test_norms_of_single_heads_stay_as_they_are() -> None:
    params = with_leaf("q_norm/scale", jnp.array([3.0, 4.0]))
    permuted, _ = js.permute_coupled(params, {OUTPUT: [2]}, head_size=2)
    np.testing.assert_array_equal(permuted["h_0"]["self_attn"]["q_norm"]["scale"], [3, 4])
