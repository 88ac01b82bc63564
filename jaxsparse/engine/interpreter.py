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
from jaxsparse.engine.slotted import INPUT, OUTPUT, Role, SlottedWeight, UnsupportedUseError, contract

__all__ = ["evaluate", "followed", "register_rule", "scan_groups"]

Rule = Callable[..., Sequence[Any]]
_RULES: dict[Any, Rule] = {}


def register_rule(primitive: Any) -> Callable[[Rule], Rule]:
    """Registers what a primitive does to followed weights.

    Args:
        primitive: the `jax.extend.core.Primitive`.

    Returns:
        A decorator for `rule(params, *values) -> outputs`: `params` are the equation's, `values` its operands, arrays
        or `SlottedWeight`s, at least one of the latter; `outputs` a sequence of either.

    Example:
        >>> import dataclasses
        >>> from jax.extend.core import primitives
        >>> @register_rule(primitives.real_p)
        ... def _real(params, weight):
        ...     return [dataclasses.replace(weight, base=weight.base.real)]
    """

    def register(rule: Rule) -> Rule:
        _RULES[primitive] = rule
        return rule

    return register


def is_followed(value: Any) -> bool:
    """Whether a value is a followed weight."""
    return isinstance(value, SlottedWeight)


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

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else known[variable]

    for equation in jaxpr.eqns:
        operands = [read(variable) for variable in equation.invars]
        if any(is_followed(operand) for operand in operands):
            outputs = _follow(equation, operands)
        else:
            outputs = _as_it_stands(jaxpr, equation, known)
        known.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _as_it_stands(jaxpr: core.Jaxpr, equation: Any, known: dict[Any, Any]) -> Sequence[Any]:
    """Evaluates one equation by JAX's own evaluator, which knows about custom derivatives and name scopes."""
    inputs = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, core.Literal)))
    alone = jaxpr.replace(
        constvars=[], invars=inputs, outvars=equation.outvars, eqns=[equation], effects=equation.effects
    )
    return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*(known[variable] for variable in inputs))


def _follow(equation: Any, operands: list[Any]) -> Sequence[Any]:
    rule = _RULES.get(equation.primitive)
    if rule is None:
        weight = next(operand for operand in operands if is_followed(operand))
        raise UnsupportedUseError(weight.path, f"primitive {equation.primitive}")
    return rule(equation.params, *operands)


def _closed(jaxpr: Any) -> core.ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


# Functions inside functions.


@register_rule(primitives.jit_p)
def _jit(params: dict[str, Any], *values: Any) -> Sequence[Any]:
    return evaluate(params["jaxpr"], values)


@register_rule(primitives.closed_call_p)
def _closed_call(params: dict[str, Any], *values: Any) -> Sequence[Any]:
    return evaluate(_closed(params["call_jaxpr"]), values)


@register_rule(primitives.remat_p)
def _remat(params: dict[str, Any], *values: Any) -> Sequence[Any]:
    function = partial(_evaluate_tree, _closed(params["jaxpr"]))
    return jax.checkpoint(function, prevent_cse=params["prevent_cse"], policy=params["policy"])(list(values))


def _evaluate_tree(closed: core.ClosedJaxpr, values: list[Any]) -> list[Any]:
    return evaluate(closed, values)


@register_rule(primitives.scan_p)
def _scan(params: dict[str, Any], *values: Any) -> Sequence[Any]:
    constants, carry, scanned = scan_groups(params, values)
    _no_carried_weight(carry, "the carry of lax.scan")

    def body(carry: list[Any], row: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = evaluate(params["jaxpr"], [*constants, *carry, *row])
        _no_carried_weight(outputs, "a result of lax.scan's body")
        return outputs[: len(carry)], outputs[len(carry) :]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = lax.scan(body, carry, scanned, **options)
    return [*carry, *stacked]


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


# Products.


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


# Operations that change how a weight lies in memory, and not what it is.


def _same_axes(primitive: Any) -> None:
    @register_rule(primitive)
    def _unchanged(params: dict[str, Any], weight: Any, *others: Any) -> Sequence[Any]:
        if not is_followed(weight):
            raise UnsupportedUseError(next(o for o in others if is_followed(o)).path, f"primitive {primitive}")
        return [_replace(weight, primitive.bind(weight.base, *others, **params))]


def _replace(weight: SlottedWeight, base: Any, **changes: Any) -> SlottedWeight:
    fields = {"slots": weight.slots, "rule": weight.rule, "roles": weight.roles, "path": weight.path} | changes
    return SlottedWeight(base, **fields)


for _primitive in (
    *(primitives.convert_element_type_p, primitives.copy_p, primitives.sharding_constraint_p),
    *(primitives.stop_gradient_p, primitives.reduce_precision_p),
):
    _same_axes(_primitive)


@register_rule(lax.optimization_barrier_p)
def _optimization_barrier(params: dict[str, Any], *values: Any) -> Sequence[Any]:
    bases = lax.optimization_barrier_p.bind(*(value.base if is_followed(value) else value for value in values))
    return [_replace(value, base) if is_followed(value) else base for value, base in zip(values, bases, strict=True)]


@register_rule(primitives.transpose_p)
def _transpose(params: dict[str, Any], weight: SlottedWeight) -> Sequence[Any]:
    order, layers = params["permutation"], weight.layers
    if tuple(order[:layers]) != tuple(range(layers)):
        raise UnsupportedUseError(weight.path, f"a transpose {tuple(order)} that moves its layer axes")
    roles = tuple(weight.roles[axis - layers] for axis in order[layers:])
    return [_replace(weight, lax.transpose(weight.base, order), roles=roles)]


@register_rule(primitives.reshape_p)
def _reshape(params: dict[str, Any], weight: SlottedWeight) -> Sequence[Any]:
    layers, new = weight.layers, tuple(params["new_sizes"])
    if new[:layers] != weight.base.shape[:layers]:
        raise UnsupportedUseError(weight.path, f"a reshape of its layer axes, {weight.base.shape} to {new}")
    roles = _reshaped_roles(weight, weight.base.shape[layers:], new[layers:])
    return [_replace(weight, lax.reshape(weight.base, new), roles=roles)]


def _reshaped_roles(weight: SlottedWeight, old: Sequence[int], new: Sequence[int]) -> tuple[Role, ...]:
    """The roles of the new axes: an axis may split, and neighbours of one kind may merge, in their order."""
    keys: list[tuple[str, int, int]] = []
    at, after = 0, 0
    while after < len(new) or at < len(old):
        first, first_new = at, after
        size, size_new = 1, 1
        at, size = (at + 1, size * old[at]) if at < len(old) else (at, size)
        after, size_new = (after + 1, size_new * new[after]) if after < len(new) else (after, size_new)
        while size != size_new:
            if size < size_new:
                at, size = at + 1, size * old[at]
            else:
                after, size_new = after + 1, size_new * new[after]
        group = [weight.roles[axis] for axis in range(first, at)]
        if not group:  # trailing axes of size 1 belong to what came before
            group = [(keys[-1][0], keys[-1][1])] if keys else [weight.roles[0]]
        kind, place = group[0]
        if group != [(kind, place + step) for step in range(len(group))]:
            raise UnsupportedUseError(weight.path, f"a reshape of {tuple(old)} to {tuple(new)} that mixes its axes")
        keys += [(kind, place, axis) for axis in range(first_new, after)]
    order = {kind: sorted(key for key in keys if key[0] == kind) for kind in (INPUT, OUTPUT)}
    return tuple((key[0], order[key[0]].index(key)) for key in keys)


# Taking one layer out of a stack.


@register_rule(primitives.slice_p)
def _slice(params: dict[str, Any], weight: SlottedWeight) -> Sequence[Any]:
    starts, ends = params["start_indices"], params["limit_indices"]
    steps = params["strides"] or (1,) * len(starts)
    layers = weight.layers
    if not layers or any(
        (s, e, d) != (0, n, 1) for s, e, d, n in _last(layers, starts, ends, steps, weight.base.shape)
    ):
        raise UnsupportedUseError(weight.path, f"a slice {starts} to {ends} of {weight.base.shape}")

    def cut(leaf: Any) -> Any:
        rest = leaf.ndim - layers
        return lax.slice(
            leaf,
            (*starts[:layers], *[0] * rest),
            (*ends[:layers], *leaf.shape[layers:]),
            (*steps[:layers], *[1] * rest),
        )

    return [_replace(weight, cut(weight.base), slots=jax.tree.map(cut, weight.slots))]


def _last(layers: int, *columns: Sequence[int]) -> list[tuple[int, ...]]:
    return list(zip(*(column[layers:] for column in columns), strict=True))


@register_rule(primitives.dynamic_slice_p)
def _dynamic_slice(params: dict[str, Any], weight: Any, *starts: Any) -> Sequence[Any]:
    if not is_followed(weight) or any(is_followed(start) for start in starts):
        raise UnsupportedUseError(next(v for v in (weight, *starts) if is_followed(v)).path, "an index")
    layers, sizes = weight.layers, params["slice_sizes"]
    if tuple(sizes[layers:]) != weight.base.shape[layers:]:
        raise UnsupportedUseError(weight.path, f"a dynamic slice of sizes {tuple(sizes)} of {weight.base.shape}")

    def cut(leaf: Any) -> Any:
        zeros = [jnp.zeros((), jnp.int32)] * (leaf.ndim - layers)
        begin = [jnp.asarray(start, jnp.int32) for start in starts[:layers]]
        return lax.dynamic_slice(leaf, [*begin, *zeros], (*sizes[:layers], *leaf.shape[layers:]))

    return [_replace(weight, cut(weight.base), slots=jax.tree.map(cut, weight.slots))]


@register_rule(primitives.squeeze_p)
def _squeeze(params: dict[str, Any], weight: SlottedWeight) -> Sequence[Any]:
    gone = sorted(axis % weight.base.ndim for axis in params["dimensions"])
    layers = [axis for axis in gone if axis < weight.layers]
    roles = tuple(role for at, role in enumerate(weight.roles) if at + weight.layers not in gone)
    slots = jax.tree.map(lambda leaf: lax.squeeze(leaf, layers), weight.slots)
    return [_replace(weight, lax.squeeze(weight.base, gone), slots=slots, roles=_renumbered(roles))]


def _renumbered(roles: tuple[Role, ...]) -> tuple[Role, ...]:
    """The same order within each kind, counted from 0 without gaps."""
    order = {kind: sorted(place for role, place in roles if role == kind) for kind in (INPUT, OUTPUT)}
    return tuple((kind, order[kind].index(place)) for kind, place in roles)


@register_rule(primitives.broadcast_in_dim_p)
def _broadcast(params: dict[str, Any], weight: SlottedWeight, *sizes: Any) -> Sequence[Any]:
    shape, axes = params["shape"], params["broadcast_dimensions"]
    if tuple(shape) == weight.base.shape and tuple(axes) == tuple(range(weight.base.ndim)):
        return [weight]
    raise UnsupportedUseError(weight.path, f"a broadcast from {weight.base.shape} to {tuple(shape)}")
