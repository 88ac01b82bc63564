"""Follows weights through any JAX function: its jaxpr is evaluated with some inputs replaced by `SlottedWeight`s.

Every operation that touches no followed weight is bound as it stands, custom derivatives included.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.engine import layouts  # noqa: F401  (registers its rules)
from jaxsparse.engine.custom_derivatives import CUSTOM, customised
from jaxsparse.engine.look_up import look_up
from jaxsparse.engine.rules import (
    as_closed,
    as_it_stands,
    is_followed,
    read,
    register_rule,
    rule_for,
)
from jaxsparse.engine.shards import map_shards
from jaxsparse.engine.slotted import UnsupportedUseError, contract

__all__ = ["evaluate", "followed", "passed_through", "register_rule", "scan_groups"]


def followed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a function accept `SlottedWeight`s as leaves of its arguments, in the place of arrays.

    Args:
        function: any function of pytrees of arrays to a pytree of arrays that JAX can trace.

    Returns:
        The function, to be called with positional arguments; it can be differentiated, jitted and so on.

    Raises:
        UnsupportedUseError: when called: a weight is used in a way that has no rule.
    """

    def call(*arguments: Any) -> Any:
        values, structure = jax.tree.flatten(arguments, is_leaf=is_followed)
        shapes = [jax.eval_shape(lambda x: x, value.base if is_followed(value) else value) for value in values]
        closed, out = jax.make_jaxpr(function, return_shape=True)(*jax.tree.unflatten(structure, shapes))
        outputs = evaluate(closed, values)
        for output, (path, _) in zip(outputs, flatten_with_paths(out)[0], strict=True):
            if is_followed(output):
                raise UnsupportedUseError(output.path, f"the function's own result {path or 'as a whole'}")
        # Constants come as NumPy's arrays.
        return jax.tree.unflatten(jax.tree.structure(out), [jnp.asarray(output) for output in outputs])

    return call


def evaluate(closed: core.ClosedJaxpr, values: Sequence[Any]) -> list[Any]:
    """Evaluates a jaxpr on arrays and followed weights.

    Args:
        closed: the jaxpr.
        values: its inputs.

    Returns:
        Its outputs; a weight that only passes through stays followed.
    """
    jaxpr = closed.jaxpr
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known.update(zip(jaxpr.invars, values, strict=True))

    for equation in jaxpr.eqns:
        operands = [read(known, variable) for variable in equation.invars]
        stands = as_it_stands(jaxpr, equation)
        if not any(is_followed(operand) for operand in operands):
            outputs: Sequence[Any] = stands(*operands)
        elif equation.primitive in CUSTOM:
            outputs = customised(equation, stands, operands)
        else:
            outputs = rule_for(equation.primitive, operands)(equation.params, *operands)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(known, variable) for variable in jaxpr.outvars]


# Functions inside functions.


@register_rule(primitives.jit_p)
def _jit(params: dict[str, Any], *values: Any) -> Sequence[Any]:
    return evaluate(params["jaxpr"], values)


@register_rule(primitives.closed_call_p)
def _closed_call(params: dict[str, Any], *values: Any) -> Sequence[Any]:
    return evaluate(as_closed(params["call_jaxpr"]), values)


@register_rule(primitives.remat_p)
def _remat(params: dict[str, Any], *values: Any) -> Sequence[Any]:
    closed = as_closed(params["jaxpr"])
    sources = passed_through(closed.jaxpr)

    def function(values: list[Any]) -> list[Any]:
        outputs = evaluate(closed, values)
        return [output if at is None else None for output, at in zip(outputs, sources, strict=True)]

    outputs = jax.checkpoint(function, prevent_cse=params["prevent_cse"], policy=params["policy"])(list(values))
    return [output if at is None else values[at] for output, at in zip(outputs, sources, strict=True)]


def _evaluate_tree(closed: core.ClosedJaxpr, values: list[Any]) -> list[Any]:
    return evaluate(closed, values)


@register_rule(primitives.scan_p)
def _scan(params: dict[str, Any], *values: Any) -> Sequence[Any]:
    constants, carry, scanned = scan_groups(params, values)
    _no_carried_weight(carry, "the carry of lax.scan")
    # Flax's nnx.scan returns the layers that it was given.
    given = len(constants) + len(carry)
    sources = [at if at is not None and at >= given else None for at in passed_through(params["jaxpr"].jaxpr)]
    kept = {place: scanned[at - given] for place, at in enumerate(sources) if at is not None and place >= len(carry)}

    def body(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = evaluate(params["jaxpr"], [*constants, *carry, *row])
        outputs = [None if place in kept else output for place, output in enumerate(outputs)]
        _no_carried_weight(outputs, "a result of lax.scan's body")
        return outputs[: len(carry)], outputs[len(carry) :]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = lax.scan(body, carry, scanned, **options)
    return [kept.get(place, output) for place, output in enumerate([*carry, *stacked])]


def passed_through(jaxpr: core.Jaxpr) -> list[int | None]:
    """Returns for every result of a jaxpr which input it is, unchanged; None if it is none."""
    place = {variable: at for at, variable in enumerate(jaxpr.invars)}
    for equation in jaxpr.eqns:
        if equation.primitive in (primitives.jit_p, primitives.remat_p):
            inner = passed_through(as_closed(equation.params["jaxpr"]).jaxpr)
            sources = [None if at is None else equation.invars[at] for at in inner]
            place |= {
                v: at for v, s in zip(equation.outvars, sources, strict=True) if (at := _place(place, s)) is not None
            }
    return [_place(place, variable) for variable in jaxpr.outvars]


def _place(place: dict[Any, int], variable: Any) -> int | None:
    return None if variable is None or isinstance(variable, core.Literal) else place.get(variable)


def scan_groups(params: dict[str, Any], operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Returns the constants, the carry and the scanned operands of a `lax.scan`."""
    if "ft_in" in params:  # jax 0.11 and later
        constants, carry, scanned = (list(group.vals) for group in params["ft_in"].update(operands).unpack())
        return constants, carry, scanned
    ends = params["num_consts"], params["num_consts"] + params["num_carry"]
    return list(operands[: ends[0]]), list(operands[ends[0] : ends[1]]), list(operands[ends[1] :])


@register_rule(primitives.while_p)
def _while(params: dict[str, Any], *values: Any) -> Sequence[Any]:
    ends = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    conditions, bodies, carry = values[: ends[0]], values[ends[0] : ends[1]], list(values[ends[1] :])
    _no_carried_weight(carry, "the carry of lax.while_loop")
    return lax.while_loop(
        lambda carry: evaluate(params["cond_jaxpr"], [*conditions, *carry])[0],
        lambda carry: evaluate(params["body_jaxpr"], [*bodies, *carry]),
        carry,
    )


@register_rule(primitives.cond_p)
def _cond(params: dict[str, Any], index: Any, *values: Any) -> Sequence[Any]:
    branches = [partial(_evaluate_tree, branch) for branch in params["branches"]]
    return lax.switch(index, branches, list(values))


def _no_carried_weight(values: Sequence[Any], where: str) -> None:
    for value in values:
        if is_followed(value):
            raise UnsupportedUseError(value.path, where)


@register_rule("shard_map")
def _shard_map(params: dict[str, Any], *values: Any) -> Sequence[Any]:
    return map_shards(params, values, evaluate)


# Products, and the choice of rows.


@register_rule(primitives.dot_general_p)
def _dot_general(params: dict[str, Any], left: Any, right: Any) -> Sequence[Any]:
    (left_contracted, right_contracted), (left_batch, right_batch) = params["dimension_numbers"]
    options = {name: value for name, value in params.items() if name != "dimension_numbers" and value is not None}
    if not is_followed(left):
        return [contract(right, left, (left_contracted, right_contracted), (left_batch, right_batch), options)]
    if is_followed(right):
        raise UnsupportedUseError(left.path, f"a product with another followed weight, {right.path}")
    flipped = (right_contracted, left_contracted), (right_batch, left_batch)
    product = contract(left, right, *flipped, options)
    # contract() writes the values' axes before the weight's; here the weight's come first.
    batch = len(left_batch)
    weight_free = left.base.ndim - batch - len(left_contracted)
    order = [*range(batch), *range(product.ndim - weight_free, product.ndim), *range(batch, product.ndim - weight_free)]
    return [jnp.transpose(product, order)]


@register_rule(primitives.gather_p)
def _gather(params: dict[str, Any], table: Any, indices: Any) -> Sequence[Any]:
    if is_followed(indices):
        raise UnsupportedUseError(indices.path, "an index")
    return [look_up(table, indices, params)]
