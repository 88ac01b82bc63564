"""Every layer of Flax that multiplies by a weight, linen and NNX: its slots have the dense gradient's entries."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxsparse as js
from jaxsparse.engine.backward import slot_gradients
from jaxsparse.engine.slotted import UnsupportedUseError
from jaxsparse.engine.tuner import check_method
from jaxsparse.models.configs import GPT2Config, LlamaConfig
from jaxsparse.models.functional import LanguageModel

WIDTH, HEADS, VOCABULARY = 4, 2, 7
# Kernels of attention: (in, heads, width of a head), and (heads, width of a head, out).
ATTENTION = [js.Target(r".*(query|key|value)/kernel", in_axes=(0,)), js.Target(r".*out/kernel", out_axes=(2,))]
KERNEL, EMBEDDING = [js.Target(r".*kernel")], [js.Target(r".*embedding")]
INTO_HEADS, OUT_OF_HEADS = [js.Target(r".*kernel", in_axes=(0,))], [js.Target(r".*kernel", out_axes=(2,))]
TRANSPOSED, STACKED = [js.Target(r".*kernel", in_axes=(1,))], [js.Target(r".*kernel", stack_axes=(0,))]
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 12, "num_layers": 2, "num_heads": 4}
TINY_LLAMA = LlamaConfig(**SIZES, num_kv_heads=2, head_dim=2)
TINY_GPT2 = GPT2Config(**SIZES, max_position_embeddings=8)


class LanguageBatch(NamedTuple):
    tokens: Any
    targets: Any
    weights: Any
    positions: Any
    segments: Any


class ScannedLinen(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = linen.remat(linen.Dense)
        layers = linen.scan(
            lambda layer, x, _: (jnp.tanh(layer(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return layers(layer(WIDTH), x, None)[0]


class TiedLinen(linen.Module):
    @linen.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        table = linen.Embed(VOCABULARY, WIDTH)
        return table.attend(jnp.tanh(table(tokens)))


class ScannedNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        make = nnx.vmap(lambda rngs: nnx.Linear(WIDTH, WIDTH, rngs=rngs), in_axes=0)
        self.layers = make(rngs.split(3))

    def __call__(self, x: jax.Array) -> jax.Array:
        step = nnx.remat(lambda x, layer: jnp.tanh(layer(x)))
        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


class TiedNnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.table = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.table.attend(jnp.tanh(self.table(tokens)))


LINEN: dict[str, tuple[Any, Any]] = {
    "Dense": (linen.Dense(3), KERNEL),
    "Dense in bfloat16": (linen.Dense(3, dtype=jnp.bfloat16), KERNEL),
    "DenseGeneral into heads": (linen.DenseGeneral((HEADS, 3)), INTO_HEADS),
    "DenseGeneral over two axes": (linen.DenseGeneral(3, axis=(-2, -1)), OUT_OF_HEADS),
    "Einsum": (linen.Einsum((WIDTH, HEADS, 3), "...i,ihd->...hd"), INTO_HEADS),
    "Einsum of the transposed kernel": (
        linen.Einsum((3, WIDTH), "...i,oi->...o"),
        [js.Target(".*kernel", in_axes=(1,))],
    ),
    "MultiHeadDotProductAttention": (linen.MultiHeadDotProductAttention(HEADS), ATTENTION),
    "scan over remat": (ScannedLinen(), STACKED),
    "Embed": (linen.Embed(VOCABULARY, WIDTH), EMBEDDING),
    "Embed and attend": (TiedLinen(), EMBEDDING),
}
NNX: dict[str, tuple[Any, Any]] = {
    "Linear": (lambda rngs: nnx.Linear(WIDTH, 3, rngs=rngs), KERNEL),
    "Linear in bfloat16": (lambda rngs: nnx.Linear(WIDTH, 3, dtype=jnp.bfloat16, rngs=rngs), KERNEL),
    "LinearGeneral into heads": (lambda rngs: nnx.LinearGeneral(WIDTH, (HEADS, 3), rngs=rngs), INTO_HEADS),
    "LinearGeneral over two axes": (
        lambda rngs: nnx.LinearGeneral((5, WIDTH), 3, axis=(-2, -1), rngs=rngs),
        OUT_OF_HEADS,
    ),
    "Einsum": (lambda rngs: nnx.Einsum("...i,ihd->...hd", (WIDTH, HEADS, 3), rngs=rngs), INTO_HEADS),
    "MultiHeadAttention": (lambda rngs: nnx.MultiHeadAttention(HEADS, WIDTH, decode=False, rngs=rngs), ATTENTION),
    "scan over remat": (ScannedNnx, STACKED),
    "Embed": (lambda rngs: nnx.Embed(VOCABULARY, WIDTH, rngs=rngs), EMBEDDING),
    "Embed and attend": (TiedNnx, EMBEDDING),
}
CASES = [("linen", name) for name in LINEN] + [("nnx", name) for name in NNX]


def layer(family: str, name: str, rng: np.random.Generator) -> tuple[Any, Any, Callable[..., Any], Any]:
    """Parameters, targets, a loss, and the inputs of a layer."""
    maker, targets = (LINEN if family == "linen" else NNX)[name]
    tokens, values = rng.integers(0, VOCABULARY, (2, 5)), rng.normal(size=(2, 5, WIDTH))
    x = jnp.asarray(tokens, jnp.int32) if "Embed" in name else jnp.asarray(values, jnp.float32)
    key = jax.random.key(int(rng.integers(2**31)))
    if family == "linen":
        params = maker.init(key, x)
        apply: Callable[..., Any] = maker.apply
    else:
        graph, state = nnx.split(maker(nnx.Rngs(key)))
        params = nnx.to_pure_dict(state)

        def apply(params: Any, x: Any) -> Any:
            nnx.replace_by_pure_dict(state, params)
            return nnx.merge(graph, state)(x)

    return params, targets, lambda p, x: jnp.sum(jnp.sin(apply(p, x).astype(jnp.float32)) ** 2), x


def assert_slots_have_its_entries(
    methods: list[Any], params: Any, loss: Callable[..., Any], x: Any, atol: float
) -> None:
    """Slots' gradients, at supports that are given or picked, are the dense gradient's entries there."""

    @jax.jit  # all in one, which compiles fastest
    def pairs(params: Any, x: Any) -> Any:
        leaves = jax.tree.leaves(jax.grad(loss)(params, x))
        with_tokens, due = lambda p, x: (loss(p, x), jnp.ones(())), jnp.array(True)
        compared = []
        for method in methods:
            description = check_method(method).description
            targets, given = description.resolve(params), description.given.get("support")
            counts = description.subspace.counts(targets, 0)
            supports = [
                jnp.asarray(given[t.path]) if given else t.subspace.empty_support(t.view, n)
                for t, n in zip(targets, counts, strict=True)
            ]
            found = slot_gradients(with_tokens, description, targets, params, supports, due, x)
            for target, support, slots in zip(targets, found.supports, found.gradients, strict=True):
                matrices = target.view.matrices(leaves[target.position].astype(jnp.float32))
                compared.append((matrices, slots, target.subspace.gather(matrices, support)))
                if given is None:  # the largest
                    largest = jax.lax.top_k(jnp.abs(matrices.reshape(matrices.shape[0], -1)), support.shape[1])[0]
                    compared.append((matrices, jnp.abs(slots), largest))
        return compared

    for matrices, slots, expected in jax.tree.map(np.asarray, pairs(params, x)):
        scale = np.abs(matrices).max()
        assert scale > 0
        np.testing.assert_allclose(slots / scale, expected / scale, atol=atol)


def random_support(method: Any, params: Any, rng: np.random.Generator) -> Any:
    """The method with a support at random."""
    description = check_method(method).description
    targets = description.resolve(params)
    support = {}
    for target, count in zip(targets, description.subspace.counts(targets, 0), strict=True):
        units = target.subspace.shape(target.view)[1]
        layers = [rng.choice(units, count, replace=False) for _ in range(target.view.stack)]
        support[target.path] = jnp.asarray(np.stack(layers), jnp.int32)
    return js.with_support(method, support)


def gasdu(targets: Any) -> Any:
    return js.gasdu(optax.sgd(1.0), density=0.25, targets=targets)


def atol(name: str) -> float:
    """Relative to the largest entry; products in bfloat16 are rounded when they are formed, which ours never are."""
    return 2e-2 if "bfloat16" in name else 1e-6


@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{family} {name}" for family, name in CASES])
def test_slots_have_the_dense_gradient_s_entries(family: str, name: str, rng: np.random.Generator) -> None:
    params, targets, loss, x = layer(family, name, rng)
    given, picked = random_support(gasdu(targets), params, rng), gasdu(targets)
    if "Embed" in name:
        assert_slots_have_its_entries([given], params, loss, x, atol(name))
        with pytest.raises(UnsupportedUseError, match=r"embedding.*(look-up|several products)"):
            assert_slots_have_its_entries([picked], params, loss, x, atol(name))
    else:
        assert_slots_have_its_entries([given, picked], params, loss, x, atol(name))


def test_every_kind_of_slot_goes_through_a_tied_embedding(rng: np.random.Generator) -> None:
    params, targets, loss, tokens = layer("linen", "Embed and attend", rng)
    size = js.select.Score("|W|", lambda entries: jnp.abs(entries.weight), needs=("weight",))
    subspaces = [
        js.subspaces.Slices(3),
        js.subspaces.Slices(2, axis="output"),
        js.subspaces.Slices(1, axis="output", group=2),
        js.subspaces.Blocks(2, size=3),
    ]
    methods = [
        random_support(js.subspace_descent(optax.sgd(1.0), subspace=subspace, score=size, targets=targets), params, rng)
        for subspace in subspaces
    ]
    assert_slots_have_its_entries(methods, params, loss, tokens, 1e-6)


def test_rows_that_are_clipped_or_dropped_are_as_in_the_dense_gradient(rng: np.random.Generator) -> None:
    params = {"table": jnp.asarray(rng.normal(size=(VOCABULARY, 2, 3)), jnp.float32)}
    ids = jnp.asarray(rng.integers(-VOCABULARY - 2, VOCABULARY + 3, (3, 8)), jnp.int32)

    def loss(params: Any, ids: Any) -> jax.Array:
        table = params["table"]
        clipped, dropped = (jnp.take(table, ids, axis=0, mode=mode, fill_value=0) for mode in ("clip", "fill"))
        return jnp.sum(jnp.sin(clipped) + jnp.cos(dropped) ** 2 + jnp.sin(table[ids % VOCABULARY] ** 3))

    method = js.fixed_mask(optax.sgd(1.0), density=0.5, targets=js.Target("table", in_axes=(0,)))
    assert_slots_have_its_entries([random_support(method, params, rng)], params, loss, ids, 1e-6)


@pytest.mark.parametrize("config", [TINY_LLAMA, TINY_GPT2], ids=["llama", "gpt2 with a tied head"])
def test_every_matrix_of_our_models_is_followed(config: Any, rng: np.random.Generator) -> None:
    model = LanguageModel(config, remat="dots", loss_chunk=4)
    params = model.init(jax.random.key(int(rng.integers(2**31))))
    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (2, 6)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(6), tokens.shape)
    batch = LanguageBatch(tokens, tokens[:, ::-1], jnp.ones(tokens.shape), positions, jnp.zeros_like(tokens))
    targets = [js.Target(r"layers/.*kernel", stack_axes=(0,)), r"(?!layers/).*(kernel|embedding)"]
    method = random_support(gasdu(targets), params, rng)
    assert_slots_have_its_entries([method], params, lambda p, batch: model.loss(p, batch)[0], batch, 1e-5)
