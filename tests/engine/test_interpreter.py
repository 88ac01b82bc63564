"""Weights are followed through any model: slots' gradients are entries of the dense gradient."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives

import jaxsparse as js
from jaxsparse.engine.interpreter import followed, register_rule
from jaxsparse.engine.single_use import check_used_once
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


@jax.custom_vjp
def product(x: jax.Array, w: jax.Array, scale: jax.Array) -> jax.Array:
    """A product whose backward pass is not that of its forward pass: the weight's gradient is three times too large."""
    return scale * (x @ w)


def product_forward(x: jax.Array, w: jax.Array, scale: jax.Array) -> Any:
    return product(x, w, scale), (x, w, scale)


def product_backward(residuals: Any, cotangent: jax.Array) -> Any:
    x, w, scale = residuals
    gradient = jnp.einsum("...i,...o->oi", x, scale * cotangent).T.astype(w.dtype)
    return scale * (cotangent @ w.T), gradient * 3, jnp.zeros_like(scale)


product.defvjp(product_forward, product_backward)


@jax.custom_jvp
def biased(w: jax.Array, x: jax.Array) -> jax.Array:
    return x @ w.T


@biased.defjvp
def _(primals: Any, tangents: Any) -> Any:
    (w, x), (w_tangent, x_tangent) = primals, tangents
    return x @ w.T, 5 * (x_tangent @ w.T) - (x @ w_tangent.T) / 2


@jax.custom_vjp
def rounded(w: jax.Array) -> jax.Array:
    return jnp.round(w * 4) / 4


rounded.defvjp(lambda w: (rounded(w), None), lambda _, cotangent: (cotangent,))


def through_custom_derivatives(params: Any, x: jax.Array) -> jax.Array:
    stack, w = params["stack"], params["w"]
    x, _ = jax.lax.scan(jax.checkpoint(lambda x, w: (jnp.tanh(product(x, w, jnp.array(2.0))), None)), x, stack)
    x = jnp.tanh(biased(w, x)) + x @ rounded(w)
    return jnp.sum(jnp.sin(jax.vmap(product, (0, 0, None))(jnp.stack([x, 2 * x]), stack, jnp.array(0.5))) ** 2)


def test_custom_derivatives_are_honoured(rng: np.random.Generator) -> None:
    params = {"stack": normal(rng, 2, 4, 4), "w": normal(rng, 4, 4)}
    targets = [js.Target("stack", stack_axes=(0,)), js.Target("w")]
    assert_dense(through_custom_derivatives, params, targets, normal(rng, 3, 4))


def through_layouts(params: Any, x: jax.Array) -> jax.Array:
    w = checkpoint_name(params["w"][None, :, :, None].reshape(1, 4, 4)[0], "w")
    frozen = x @ jax.lax.stop_gradient(params["w"]) @ jax.lax.stop_gradient(w.T)
    return jnp.sum(jnp.sin(frozen + x @ jnp.expand_dims(w, 2).squeeze(2)) ** 2)


def test_gradients_stop_where_the_model_stops_them(rng: np.random.Generator) -> None:
    assert_dense(through_layouts, {"w": normal(rng, 4, 4)}, "w", normal(rng, 3, 4))


@jax.custom_vjp
def summed(w: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(w) * x


summed.defvjp(lambda w, x: (summed(w, x), (w, x)), lambda res, g: (jnp.vdot(res[1], g) * jnp.ones_like(res[0]), g))


@pytest.mark.parametrize(
    ("use", "what"),
    [
        (lambda w, x: x @ jnp.sin(w), "primitive sin"),
        (lambda w, x: x @ w[:, :2], "slice"),
        (lambda w, x: jnp.einsum("ti,ij->t", x, w), "reduce_sum|product"),
        (lambda w, x: x @ (w + w.T), "primitive add"),
        (lambda w, x: w @ w, "another followed weight"),
        (lambda w, x: jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] * 2), (0, w))[1], "carry"),
        (lambda w, x: x @ jnp.broadcast_to(w, (3, 4, 4)), "a broadcast"),
        (lambda w, x: x[:, :2] @ w[jnp.array([0, 2])], "an embedding look-up with AllEntries"),
        (lambda w, x: w[:, jnp.array([0, 2])], "a gather of anything but rows"),
        (lambda w, x: summed(w, x), "custom_vjp_call of summed at .*, whose derivative"),
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


@pytest.mark.parametrize(
    "same",
    [
        lambda w: jax.jit(jnp.transpose)(w).T,
        lambda w: jax.checkpoint(lambda w: w.T)(w).T,
        lambda w: jax.lax.cond(True, lambda w: w, lambda w: w, w),
        rounded,
    ],
)
def test_uses_are_counted_behind_functions_that_return_the_weight(
    same: Callable[..., Any], rng: np.random.Generator
) -> None:
    params, x = {"w": normal(rng, 4, 4)}, normal(rng, 3, 4)
    targets = resolve_targets(params, "w")
    check_used_once(lambda p, x: jnp.sum(x @ same(p["w"])), params, x, targets)
    with pytest.raises(UnsupportedUseError, match="several products with one matrix"):
        check_used_once(lambda p, x: jnp.sum(x @ same(p["w"]) @ same(p["w"])), params, x, targets)
    with pytest.raises(UnsupportedUseError, match="several products with one matrix"):
        check_used_once(lambda p, x: jnp.sum(x @ (w := same(p["w"])) + jnp.sin(x) @ w), params, x, targets)
