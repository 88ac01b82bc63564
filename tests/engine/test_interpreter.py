"""Weights are followed through any model: slots' gradients are entries of the dense gradient."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import primitives

import jaxsparse as js
from jaxsparse.engine.interpreter import followed, register_rule
from jaxsparse.engine.slotted import SlotRule, UnsupportedUseError, slotted
from jaxsparse.subspaces.targets import resolve_targets


@dataclass(frozen=True)
class AllEntries(SlotRule):
    """Every entry of the matrix is a slot."""

    def gradients(self, slots: Any, left: Any, right: Any) -> Any:
        return left.T @ right


def slot_gradients(loss: Callable[..., Any], params: Any, targets: Any, *inputs: Any) -> dict[str, Any]:
    """The gradients of all entries of the targets, by way of slots."""
    found = resolve_targets(params, targets)
    leaves, structure = jax.tree.flatten(params)

    @jax.jit
    def gradients(leaves: list[Any]) -> Any:
        def of_slots(probes: list[Any]) -> Any:
            wrapped = list(leaves)
            for target, probe in zip(found, probes, strict=True):
                weight = leaves[target.position]
                wrapped[target.position] = slotted(weight, target.view, probe, AllEntries(), target.path)
            return followed(loss)(jax.tree.unflatten(structure, wrapped), *inputs)

        views = [target.view for target in found]
        return jax.grad(of_slots)([jnp.zeros((view.stack, view.in_size, view.out_size)) for view in views])

    found_gradients = zip(found, gradients(leaves), strict=True)
    return {target.path: target.view.weight(gradient) for target, gradient in found_gradients}


def assert_dense(loss: Callable[..., Any], params: Any, targets: Any, *inputs: Any, atol: float = 1e-5) -> None:
    dense = jax.jit(jax.grad(loss))(params, *inputs)
    leaves = jax.tree.leaves(dense)
    found = slot_gradients(loss, params, targets, *inputs)
    for target in resolve_targets(params, targets):
        expected = leaves[target.position]
        scale = float(jnp.max(jnp.abs(expected)))
        assert scale > 0
        np.testing.assert_allclose(found[target.path] / scale, expected / scale, atol=atol)


def normal(rng: np.random.Generator, *shape: int) -> jax.Array:
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@jax.custom_vjp
def half_gradient(x: jax.Array) -> jax.Array:
    """The identity, whose derivative is a half: a custom rule must survive."""
    return x


half_gradient.defvjp(lambda x: (x, None), lambda _, cotangent: (cotangent / 2,))


def through_loops(params: Any, x: jax.Array) -> jax.Array:
    stack = params["stack"]
    remembered = jax.checkpoint(lambda x, w: jnp.tanh(x @ w), policy=jax.checkpoint_policies.dots_saveable)
    x, _ = jax.lax.scan(lambda x, w: (remembered(x, w), None), x, stack)
    x = jax.lax.cond(x.sum() < 1e9, lambda x: jax.nn.relu(x @ stack[0]) + x, lambda x: x, x)
    x = jax.jit(lambda x: half_gradient(x) @ jax.lax.dynamic_index_in_dim(stack, 1, keepdims=False))(x)
    x = jax.vmap(lambda row: row @ stack[1].T)(x)
    x, _ = jax.lax.scan(lambda x, _: (jnp.sin(x @ stack[0]), None), x, length=2)  # one weight, used twice
    return jnp.sum(x**2)


def through_contractions(params: Any, x: jax.Array) -> jax.Array:
    heads, stack = params["heads"], params["stack"]  # (4, 2, 3) and (2, 4, 4)
    y = jnp.einsum("ti,ihd->htd", x, heads)
    y = jnp.einsum("htd,ihd->ti", jnp.sin(y), heads)  # over its outputs: the transposed weight
    y = y @ heads.reshape(4, 6) @ heads.reshape(4, 3, 2).reshape(4, 6).T
    y = (heads.reshape(4, 6).T @ y.T).T @ jnp.ones((6, 4))
    experts = jnp.einsum("lti,lio->lto", jnp.stack([y, x]), stack)
    half = jnp.dot(experts.sum(0).astype(jnp.bfloat16), stack[0].astype(jnp.bfloat16))
    return jnp.sum(experts**2) + jnp.sum(half.astype(jnp.float32) ** 2)


@pytest.mark.parametrize("loss", [through_loops, through_contractions])
def test_slots_have_the_dense_gradient_s_entries(loss: Callable[..., Any], rng: np.random.Generator) -> None:
    params = {"stack": normal(rng, 2, 4, 4)}
    targets = [js.Target("stack", stack_axes=(0,))]
    if loss is through_contractions:
        params["heads"] = normal(rng, 4, 2, 3)
        targets.append(js.Target("heads", in_axes=(0,)))
    # A part of the contractions is in bfloat16, where sums round differently.
    atol = 1e-2 if loss is through_contractions else 1e-5
    assert_dense(loss, params, targets, normal(rng, 3, 4), atol=atol)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = linen.Dense(8)(x)
        x = x + linen.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(x)
        x = linen.DenseGeneral((2, 4), axis=-1)(x)
        x = linen.DenseGeneral(8, axis=(-2, -1))(x)
        return linen.Einsum((8, 2, 3), "...i,ihd->...hd")(x)


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.general = nnx.LinearGeneral(8, (2, 4), rngs=rngs)
        self.einsum = nnx.Einsum("thd,hdo->to", (2, 4, 5), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first(x)
        return self.einsum(self.general(x + self.attention(x)))


def test_unmodified_linen_models_are_followed(rng: np.random.Generator) -> None:
    model, x = LinenBlock(), normal(rng, 2, 5, 4)
    params = model.init(jax.random.key(0), x)
    targets = [
        js.Target(r".*Dense_0/kernel"),
        js.Target(r".*/(query|key|value)/kernel", in_axes=(0,)),
        js.Target(r".*/out/kernel", out_axes=(2,)),
        js.Target(r".*DenseGeneral_0/kernel", in_axes=(0,)),
        js.Target(r".*DenseGeneral_1/kernel", out_axes=(2,)),
        js.Target(r".*Einsum_0/kernel", in_axes=(0,)),
    ]
    assert_dense(lambda p, x: jnp.sum(jnp.sin(model.apply(p, x)) ** 2), params, targets, x)


def test_unmodified_nnx_models_are_followed(rng: np.random.Generator) -> None:
    graph, state = nnx.split(NnxBlock(nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    targets = [
        js.Target(r"first/kernel"),
        js.Target(r"attention/(query|key|value)/kernel", in_axes=(0,)),
        js.Target(r"attention/out/kernel", out_axes=(2,)),
        js.Target(r"general/kernel", in_axes=(0,)),
        js.Target(r"einsum/kernel", out_axes=(2,)),
    ]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(nnx.merge(graph, _state(state, params))(x)) ** 2)

    assert_dense(loss, params, targets, normal(rng, 5, 4))


def _state(like: Any, params: Any) -> Any:
    state = jax.tree.map(lambda leaf: leaf, like)
    nnx.replace_by_pure_dict(state, params)
    return state


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda w, x: x @ jnp.sin(w), "primitive sin"),
        (lambda w, x: x @ w[:, :2], "slice"),
        (lambda w, x: jnp.einsum("ti,ij->t", x, w), "reduce_sum|product"),
        (lambda w, x: x @ (w + w.T), "primitive add"),
        (lambda w, x: w @ w, "another followed weight"),
        (lambda w, x: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] * 2), (0, w))[1], "carry"),
        (lambda w, x: x @ w.reshape(2, 2, 2, 2).transpose(0, 2, 1, 3).reshape(4, 4), "mixes its axes"),
    ],
)
def test_what_cannot_be_followed_is_named_with_the_weight_and_the_way_out(
    use: Callable[..., Any], what: str, rng: np.random.Generator
) -> None:
    with pytest.raises(UnsupportedUseError, match=rf"weight layer/kernel through .*({what}).*js\.ReferenceTuner"):
        slot_gradients(
            lambda p, x: jnp.sum(use(p["layer"]["kernel"], x)),
            {"layer": {"kernel": normal(rng, 4, 4)}},
            ".*",
            normal(rng, 3, 4),
        )


def test_a_user_can_register_a_rule(rng: np.random.Generator) -> None:
    @register_rule(primitives.neg_p)
    def _negated(params: Any, weight: Any) -> list[Any]:
        # d loss / d w of a use of -w is minus the use's gradient: scale the slots' cotangent by -1.
        return [dataclasses.replace(weight, base=-weight.base, slots=-weight.slots)]

    assert_dense(lambda p, x: jnp.sum(jnp.sin(x @ -p["w"])), {"w": normal(rng, 4, 2)}, "w", normal(rng, 3, 4))
