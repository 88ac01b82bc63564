"""Functions with derivatives of their own (`jax.custom_vjp`, `jax.custom_jvp`) that take a followed weight.

Their own derivative is honoured. It is traced, and where it finds the weight's gradient as a product of two arrays the
slots' gradients come out of those two; the product itself, the dense gradient, is never formed. Where it passes the
gradient of its result on unchanged (a straight-through estimator) the result is followed in the weight's place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives
from jaxtyping import Array

from jaxsparse.engine.rules import as_it_stands, first_followed, is_followed, read
from jaxsparse.engine.slotted import (
    INPUT,
    OUTPUT,
    SlottedWeight,
    UnsupportedUseError,
    as_matrix,
    over_layers,
    slot_cotangents,
)

__all__ = ["CUSTOM", "customised"]

CUSTOM = {primitives.custom_jvp_call_p, primitives.custom_vjp_call_p}
"""The primitives that bring derivatives of their own."""

_LAYOUT = {primitives.convert_element_type_p, primitives.copy_p, primitives.reduce_precision_p}
_SCALING = {primitives.mul_p, primitives.div_p}


def customised(equation: Any, call: Callable[..., Any], operands: Sequence[Any]) -> list[Any]:
    """Calls a function that has a derivative of its own.

    Args:
        equation: the call.
        call: the function, of the operands.
        operands: arrays and followed weights, at least one of the latter.

    Returns:
        Its results.

    Raises:
        UnsupportedUseError: its derivative finds the gradient of a weight in another way than those above.
    """
    weights = [operand for operand in operands if is_followed(operand)]
    abouts = tuple(replace(weight, base=None, slots=None) for weight in weights)
    bases = [operand.base if is_followed(operand) else operand for operand in operands]
    places = tuple(at for at, operand in enumerate(operands) if is_followed(operand))
    name = f"{equation.primitive} of {equation.params['call_jaxpr'].jaxpr.debug_info.func_src_info}"
    if any(weight.rule.overlay for weight in weights):
        raise UnsupportedUseError(first_followed(operands).path, f"{name}, which sees no overlay")

    if len(operands) == 1 and _passes_gradients_on(call, bases):
        return [replace(weights[0], base=result) for result in call(*bases)]

    @jax.custom_vjp
    def function(bases: list[Any], slots: list[Any]) -> list[Array]:
        return call(*bases)

    def forward(bases: list[Any], slots: list[Any]) -> Any:
        results, pullback = jax.vjp(call, *bases)
        return results, (pullback, bases, slots)

    def backward(residuals: Any, cotangents: list[Array]) -> Any:
        pullback, bases, slots = residuals
        found = _unformed(jax.make_jaxpr(partial(_pull, pullback, bases))(cotangents), cotangents)
        of_bases: list[Any] = [None if at in places or not _moves(base) else found[at] for at, base in enumerate(bases)]
        of_slots = [
            _of_slots(replace(about, base=bases[at], slots=own), found[at], name)
            for about, own, at in zip(abouts, slots, places, strict=True)
        ]
        return [_formed(gradient) for gradient in of_bases], of_slots

    function.defvjp(forward, backward)
    return function(bases, [weight.slots for weight in weights])


def _moves(base: Any) -> bool:
    """Whether an operand is of numbers that have derivatives."""
    return jnp.issubdtype(base.dtype, jnp.inexact)


def _pull(pullback: Callable[..., Any], bases: list[Any], cotangents: list[Array]) -> list[Array]:
    """The cotangents of the operands; 0 for those that have none."""
    found = pullback(cotangents)
    return [gradient if _moves(base) else jnp.zeros(()) for base, gradient in zip(bases, found, strict=True)]


def _passes_gradients_on(call: Callable[..., list[Array]], bases: list[Any]) -> bool:
    """Whether the one operand's cotangent is that of the one result."""

    def pull(bases: list[Any], cotangents: list[Array]) -> list[Array]:
        return _pull(jax.vjp(call, *bases)[1], bases, cotangents)

    jaxpr = jax.make_jaxpr(pull)(bases, jax.eval_shape(call, *bases)).jaxpr
    return len(jaxpr.invars) == len(bases) + 1 and jaxpr.outvars[0] is jaxpr.invars[-1]


# Gradients as products that are not formed.


@dataclass(frozen=True)
class _Product:
    """What `lax.dot_general` would give of two arrays, with its axes in another order.

    Attributes:
        operands: the two.
        contracted: the axes of each that are summed.
        batched: the axes of each that run along.
        order: which of the product's axes, (batched, free of the first, free of the second), each axis is.
        form: gives the product itself.
    """

    operands: tuple[Any, Any]
    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    batched: tuple[tuple[int, ...], tuple[int, ...]]
    order: tuple[int, ...]
    form: Callable[[Array, Array], Array]

    def free(self, which: int) -> list[int]:
        """Returns the axes of an operand that are neither summed nor run along."""
        taken = {*self.contracted[which], *self.batched[which]}
        return [axis for axis in range(self.operands[which].ndim) if axis not in taken]


def _formed(value: Any) -> Any:
    return value.form(*value.operands) if isinstance(value, _Product) else value


def _unformed(closed: core.ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr; results that are products, but for layout and a scalar factor, are returned as such."""
    jaxpr = closed.jaxpr
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known.update(zip(jaxpr.invars, values, strict=True))
    for equation in jaxpr.eqns:
        operands = [read(known, variable) for variable in equation.invars]
        outputs = _unformed_step(equation, as_it_stands(jaxpr, equation), operands)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(known, variable) for variable in jaxpr.outvars]


def _unformed_step(equation: Any, call: Callable[..., list[Any]], operands: list[Any]) -> Sequence[Any]:
    primitive, params, first = equation.primitive, equation.params, operands[0] if operands else None
    if primitive is primitives.jit_p:
        return _unformed(params["jaxpr"], operands)
    if primitive is primitives.dot_general_p:
        left, right = (_formed(operand) for operand in operands)
        contracted, batched = params["dimension_numbers"]
        order = tuple(range(equation.outvars[0].aval.ndim))
        return [_Product((left, right), contracted, batched, order, lambda *both: call(*both)[0])]
    if isinstance(first, _Product) and primitive in _LAYOUT:
        form = first.form
        return [replace(first, form=lambda *both: call(form(*both))[0])]
    if isinstance(first, _Product) and primitive is primitives.transpose_p:
        form, order = first.form, tuple(first.order[axis] for axis in params["permutation"])
        return [replace(first, order=order, form=lambda *both: call(form(*both))[0])]
    scaled = _scaled(primitive, operands)
    return call(*(_formed(operand) for operand in operands)) if scaled is None else [scaled]


def _scaled(primitive: Any, operands: list[Any]) -> _Product | None:
    """The product of two operands that are a product and a number: the number goes into one of its arrays."""
    if primitive is primitives.neg_p and isinstance(operands[0], _Product):
        return replace(operands[0], operands=(operands[0].operands[0], -operands[0].operands[1]))
    if primitive not in _SCALING:
        return None
    product, number = operands if isinstance(operands[0], _Product) else reversed(operands)
    turned = primitive is primitives.div_p and product is operands[1]
    if turned or not isinstance(product, _Product) or jnp.ndim(_formed(number)):
        return None
    left, right = product.operands
    return replace(product, operands=(left, primitive.bind(right, jnp.asarray(number, right.dtype))))


def _of_slots(weight: SlottedWeight, found: Any, name: str) -> Any:
    """The cotangents of a weight's slots, given its gradient as a product."""
    sides = _sides(weight, found) if isinstance(found, _Product) else None
    if sides is None:
        raise UnsupportedUseError(weight.path, f"{name}, whose derivative finds its gradient not by one product")

    def side(kind: str) -> Any:
        which = sides[kind]
        axes = [found.order[axis] for axis in weight.axes(kind)]
        free, batch = found.free(which), list(found.batched[which])
        before = len(batch) + (len(found.free(0)) if which else 0)
        features = [free[axis - before] for axis in axes]
        matrix = as_matrix(found.operands[which], batch, list(found.contracted[which]), features)
        return over_layers(weight, lambda slots, values: weight.rule.keep(slots, values, kind))(weight.slots, matrix)

    return slot_cotangents(weight, side(INPUT), side(OUTPUT))


def _sides(weight: SlottedWeight, product: _Product) -> dict[str, int] | None:
    """Which operand of its gradient has the weight's inputs, and which its outputs; None: neither has them alone."""
    layers, first = len(product.batched[0]), len(product.free(0))
    if layers != weight.layers or product.order[:layers] != tuple(range(layers)):
        return None
    found = {
        kind: {int(product.order[axis] >= layers + first) for axis in weight.axes(kind)} for kind in (INPUT, OUTPUT)
    }
    if sorted(map(sorted, found.values())) != [[0], [1]]:
        return None
    return {kind: which.pop() for kind, which in found.items()}
