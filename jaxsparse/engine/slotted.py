"""The weight that carries its own update rule: its products give gradients of its slots, never of itself."""

import abc
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxsparse.subspaces.targets import MatrixView

__all__ = [
    *("INPUT", "OUTPUT", "Role", "SlotRule", "SlottedWeight", "UnsupportedUseError"),
    *("as_matrix", "cast_like", "contract", "over_layers", "slot_cotangents", "slotted"),
]

INPUT, OUTPUT = "input", "output"
Role = tuple[str, int]
"""What an axis of a weight is: its kind, and its place among the axes of that kind."""


class UnsupportedUseError(NotImplementedError):
    """A weight is used in a way from which its slots' gradients cannot be had."""

    def __init__(self, path: str, what: str) -> None:
        self.path, self.what = path, what
        super().__init__(
            f"the fused engine cannot follow weight {path} through {what}; run the method in the reference engine "
            "(js.ReferenceTuner), leave the weight out of targets, or register a rule for the primitive with "
            "jaxsparse.engine.interpreter.register_rule"
        )


class SlotRule(abc.ABC):
    """What a weight's slots are, and how their gradients come out of a product; immutable and hashable.

    With x (tokens, in) going into y = x W (tokens, out), `left` is x and `right` is dL/dy: dL/dW = left.T @ right.
    Where the model multiplies by the transposed weight the two change places.
    """

    overlay = False
    """Whether the slots add a term of their own to the product; JAX then differentiates that."""

    def keep(self, slots: Any, values: Float[Array, "tokens features"], side: str) -> Any:
        """Returns what the backward pass needs of the values that the product read.

        Args:
            slots: the rule's arrays.
            values: the values.
            side: INPUT if they are x, OUTPUT if the weight is used transposed and they come from its output side.
        """
        return values

    @abc.abstractmethod
    def gradients(self, slots: Any, left: Any, right: Any) -> Any:
        """Returns the cotangents of the slots, None for arrays that are not differentiated.

        Args:
            slots: the rule's arrays.
            left: (tokens, in), or what `keep` made of it.
            right: (tokens, out), or what `keep` made of it.
        """

    def term(self, slots: Any, values: Float[Array, "tokens features"], side: str) -> Float[Array, "tokens ..."]:
        """Returns what an overlay adds to the product of values with the weight."""
        raise NotImplementedError

    def factor(self, slots: Any, added: Float[Array, "tokens outputs"]) -> Float[Array, "#tokens outputs"] | None:
        """Returns what an overlay multiplies every output by, its own term `added` included; None: nothing."""
        return None

    def check_use(self, weight: "SlottedWeight", tokens: tuple[int, ...], side: str) -> None:  # noqa: B027
        """Raises an UnsupportedUseError where an overlay cannot be part of a product.

        Args:
            weight: the weight.
            tokens: sizes of the axes that the values' tokens are counted by.
            side: INPUT, or OUTPUT if the weight is used transposed.
        """


@partial(jax.tree_util.register_dataclass, data_fields=["base", "slots"], meta_fields=["rule", "roles", "path"])
@dataclass(frozen=True)
class SlottedWeight:
    """A weight inside a model that is being followed.

    Attributes:
        base: the weight as the model sees it; axes that count layers come first.
        slots: the rule's arrays, whose leading axes count the same layers.
        rule: what the slots are.
        roles: the role of every axis of the base that counts no layers.
        path: the parameter's path.
    """

    base: Any
    slots: Any
    rule: SlotRule
    roles: tuple[Role, ...]
    path: str

    @property
    def layers(self) -> int:
        """Number of leading axes that count layers."""
        return self.base.ndim - len(self.roles)

    def axes(self, kind: str) -> tuple[int, ...]:
        """Returns the axes of one kind, in the order in which the matrix's rows or columns count them."""
        found = [(place, self.layers + at) for at, (role, place) in enumerate(self.roles) if role == kind]
        return tuple(axis for _, axis in sorted(found))


def slotted(weight: Array, view: MatrixView, slots: Any, rule: SlotRule, path: str) -> SlottedWeight:
    """Wraps a target.

    Args:
        weight: the parameter.
        view: which of its axes are layers, inputs and outputs.
        slots: the rule's arrays, (stack, ...).
        rule: what the slots are.
        path: the parameter's path.

    Raises:
        UnsupportedUseError: the axes that count layers do not come first.
    """
    layers = view.layer_axes
    if view.order[:layers] != tuple(range(layers)):
        raise UnsupportedUseError(path, f"layer axes {view.order[:layers]} that do not come first")
    shape = weight.shape[:layers]
    slots = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), slots)
    inputs = view.order[layers : layers + view.input_axes]
    roles = [
        (INPUT, inputs.index(axis)) if axis in inputs else (OUTPUT, view.order.index(axis) - layers - len(inputs))
        for axis in range(layers, len(view.shape))
    ]
    return SlottedWeight(weight, slots, rule, tuple(roles), path)


@dataclass(frozen=True)
class _Product:
    """A product of values with a weight, written with the values first."""

    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batched: tuple[tuple[int, ...], tuple[int, ...]]
    options: tuple[tuple[str, Any], ...]

    def of(self, values: Array, weight: Array) -> Array:
        """The product, (batch, values' free axes, weight's free axes)."""
        return lax.dot_general(values, weight, (self.contracted, self.batched), **dict(self.options))


def contract(
    weight: SlottedWeight, values: Array, contracted: Any, batched: Any, options: dict[str, Any]
) -> Float[Array, "..."]:
    """Multiplies values by a followed weight.

    Args:
        weight: the weight.
        values: the other operand.
        contracted: axes that are summed: of the values, of the weight.
        batched: axes that run along in both: of the values, of the weight.
        options: precision and the like, as `lax.dot_general` takes them.

    Returns:
        The product with axes (batched, free of the values, free of the weight); its derivative with respect to the
        weight is the slots' cotangent.

    Raises:
        UnsupportedUseError: the product sums over a part of the inputs, or over inputs and outputs.
    """
    side = next((kind for kind in (INPUT, OUTPUT) if sorted(weight.axes(kind)) == sorted(contracted[1])), None)
    if side is None or tuple(batched[1]) != tuple(range(weight.layers)):
        raise UnsupportedUseError(
            weight.path, f"a product over axes {tuple(contracted[1])} of {weight.base.shape}, batched {batched[1]}"
        )
    product = _Product(_pair(contracted), _pair(batched), tuple(options.items()))
    if weight.rule.overlay:
        return _overlaid(weight, product, side, values)
    return _linear(product, replace(weight, base=None, slots=None), side, values, weight.base, weight.slots)


def _overlaid(weight: SlottedWeight, product: _Product, side: str, values: Array) -> Array:
    """The product with the weight as it stands, and what the slots add to it; JAX differentiates the latter."""
    features = {*product.contracted[0], *product.batched[0]}
    tokens = tuple(size for axis, size in enumerate(values.shape) if axis not in features)
    weight.rule.check_use(weight, tokens, side)
    plain = product.of(values, weight.base)
    term = over_layers(weight, lambda slots, x: weight.rule.term(slots, x, side))
    added = term(weight.slots, _values_matrix(weight, product, side, values))
    total = plain + _as_output(weight, added, plain, side).astype(plain.dtype)
    factor = over_layers(weight, weight.rule.factor)(weight.slots, added)
    if factor is None:
        return total
    if side == OUTPUT:
        raise UnsupportedUseError(weight.path, "a product with the transposed weight, whose outputs are scaled")
    scaled = jnp.broadcast_to(factor, added.shape)
    return (total * _as_output(weight, scaled, plain, side)).astype(plain.dtype)


def _pair(axes: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return tuple(axes[0]), tuple(axes[1])


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _linear(product: _Product, about: SlottedWeight, side: str, values: Array, base: Array, slots: Any) -> Array:
    return product.of(values, base)


def _linear_forward(
    product: _Product, about: SlottedWeight, side: str, values: Array, base: Array, slots: Any
) -> tuple[Array, Any]:
    weight = replace(about, base=base, slots=slots)
    keep = over_layers(weight, lambda slots, x: about.rule.keep(slots, x, side))
    kept = keep(slots, _values_matrix(weight, product, side, values))
    shape = jax.eval_shape(lambda values: values, values)  # with what it varies over inside shard_map
    return product.of(values, base), (kept, base, slots, _Shape(shape))


@partial(jax.tree_util.register_dataclass, data_fields=[], meta_fields=["struct"])
@dataclass(frozen=True)
class _Shape:
    """A shape that travels with residuals."""

    struct: jax.ShapeDtypeStruct


def _linear_backward(product: _Product, about: SlottedWeight, side: str, residuals: Any, cotangent: Array) -> Any:
    kept, base, slots, shape = residuals
    weight = replace(about, base=base, slots=slots)
    (values_cotangent,) = jax.linear_transpose(lambda values: product.of(values, base), shape.struct)(cotangent)
    other = _output_matrix(weight, product, side, shape.struct, cotangent)
    other = over_layers(weight, lambda slots, y: about.rule.keep(slots, y, OUTPUT if side == INPUT else INPUT))(
        slots, other
    )
    left, right = (kept, other) if side == INPUT else (other, kept)
    return values_cotangent, None, slot_cotangents(weight, left, right)


def slot_cotangents(weight: SlottedWeight, left: Any, right: Any) -> Any:
    """Returns the cotangents of a weight's slots.

    Args:
        weight: the weight.
        left: (layers..., tokens, in), or what the rule's `keep` made of it.
        right: (layers..., tokens, out), or what the rule's `keep` made of it.
    """
    return cast_like(weight.slots, over_layers(weight, weight.rule.gradients)(weight.slots, left, right))


def cast_like(slots: Any, found: Any) -> Any:
    """Returns cotangents in the dtypes of the slots; None stays None."""
    return jax.tree.map(
        lambda slot, g: None if g is None else g.astype(slot.dtype), slots, found, is_leaf=lambda node: node is None
    )


_linear.defvjp(_linear_forward, _linear_backward)


def over_layers(weight: SlottedWeight, function: Any) -> Any:
    """Returns a function of one matrix, mapped over the layers of a weight."""
    for _ in range(weight.layers):
        function = jax.vmap(function)
    return function


def _values_matrix(weight: SlottedWeight, product: _Product, side: str, values: Array) -> Array:
    """The values as (layers, tokens, features), features in the matrix's order."""
    partner = dict(zip(product.contracted[1], product.contracted[0], strict=True))
    features = [partner[axis] for axis in weight.axes(side)]
    batch = list(product.batched[0])
    return as_matrix(values, batch, [axis for axis in range(values.ndim) if axis not in {*batch, *features}], features)


def _output_matrix(weight: SlottedWeight, product: _Product, side: str, values: Any, output: Array) -> Array:
    """An array like the product as (layers, tokens, features), features in the matrix's order."""
    layers, features = _output_axes(weight, side, output.ndim)
    tokens = [axis for axis in range(output.ndim) if axis >= layers and axis not in features]
    return as_matrix(output, list(range(layers)), tokens, features)


def _output_axes(weight: SlottedWeight, side: str, ndim: int) -> tuple[int, list[int]]:
    """Number of leading axes of the product that count layers, and those that the weight brought, in its order."""
    free = weight.axes(OUTPUT if side == INPUT else INPUT)
    place = {axis: ndim - len(free) + at for at, axis in enumerate(sorted(free))}
    return weight.layers, [place[axis] for axis in free]


def _as_output(weight: SlottedWeight, matrix: Array, like: Array, side: str) -> Array:
    """The inverse of `_output_matrix`."""
    layers, features = _output_axes(weight, side, like.ndim)
    tokens = [axis for axis in range(layers, like.ndim) if axis not in features]
    order = [*range(layers), *tokens, *features]
    return jnp.transpose(
        matrix.reshape([like.shape[axis] for axis in order]), [order.index(a) for a in range(like.ndim)]
    )


def as_matrix(array: Array, batch: list[int], tokens: list[int], features: list[int]) -> Array:
    """Returns an array transposed and flattened to (*batch, tokens, features), given its axes of each kind."""
    sizes = [math.prod(array.shape[axis] for axis in group) for group in (tokens, features)]
    return jnp.transpose(array, [*batch, *tokens, *features]).reshape(*(array.shape[axis] for axis in batch), *sizes)
