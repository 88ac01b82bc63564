"""Whether every matrix of a weight enters one product only, so that what comes back from it is never a sum.

Supports that are picked inside the backward pass come back as places and values: sums of places mean nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from jaxsparse.engine.custom_derivatives import CUSTOM
from jaxsparse.engine.interpreter import passed_through, scan_groups
from jaxsparse.engine.slotted import UnsupportedUseError
from jaxsparse.subspaces.targets import ResolvedTarget

__all__ = ["check_used_once"]

_SAME = {
    primitives.broadcast_in_dim_p,
    primitives.convert_element_type_p,
    primitives.copy_p,
    primitives.name_p,
    primitives.reduce_precision_p,
    primitives.reshape_p,
    primitives.sharding_constraint_p,
    primitives.transpose_p,
}
_MANY = 2

# What a variable holds of a weight: for every place along its axes that count layers, which layers may lie there;
# booleans (..., layers).
_Held = np.ndarray


def check_used_once(loss_fn: Callable[..., Any], params: Any, batch: Any, targets: Sequence[ResolvedTarget]) -> None:
    """Raises an error that names the first weight of which a loss uses a matrix more than once.

    Args:
        loss_fn: (params, batch) -> anything.
        params: the parameters, or their shapes.
        batch: a batch, or its shapes.
        targets: the weights in question; the axes that count layers come first.

    Raises:
        UnsupportedUseError: a matrix enters several products, or the same one in every turn of a loop.
    """
    jaxpr = jax.make_jaxpr(loss_fn)(params, batch).jaxpr
    for target in targets:
        view = target.view
        layers = np.eye(view.stack, dtype=bool).reshape(*view.shape[: view.layer_axes], view.stack)
        if _uses(jaxpr, {jaxpr.invars[target.position]: layers})[0].max() >= _MANY:
            raise UnsupportedUseError(
                target.path, "several products with one matrix while its support is picked by the gradient"
            )


def _uses(jaxpr: core.Jaxpr, held: dict[Any, _Held]) -> tuple[np.ndarray, list[_Held | None]]:
    """How many products the matrix of every layer enters, given which variables hold the weight; what results hold."""
    held = dict(held)
    counts = np.zeros(next(iter(held.values())).shape[-1] if held else 1, int)
    for equation in jaxpr.eqns:
        operands = [None if isinstance(v, core.Literal) else held.get(v) for v in equation.invars]
        first = next((operand for operand in operands if operand is not None), None)
        if first is None:
            continue
        axes, params = first.ndim - 1, equation.params
        straight_through = equation.primitive in CUSTOM and len(operands) == 1
        if equation.primitive in _SAME or straight_through:
            held[equation.outvars[0]] = first
        elif equation.primitive is primitives.stop_gradient_p:
            continue
        elif equation.primitive is lax.optimization_barrier_p:
            held.update((o, h) for o, h in zip(equation.outvars, operands, strict=True) if h is not None)
        elif equation.primitive is primitives.squeeze_p:
            gone = tuple(axis for axis in params["dimensions"] if axis < axes)
            held[equation.outvars[0]] = np.squeeze(first, gone)
        elif equation.primitive is primitives.slice_p:
            strides = params["strides"] or [1] * len(params["start_indices"])
            limits = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
            held[equation.outvars[0]] = first[tuple(slice(*limit) for limit in list(limits)[:axes])]
        elif equation.primitive is primitives.dynamic_slice_p:
            # Any of the layers, as far as one can tell.
            anywhere = _anywhere(first)
            held[equation.outvars[0]] = np.broadcast_to(anywhere, (*params["slice_sizes"][:axes], len(anywhere)))
        else:
            more, results = _uses_inside(equation, operands, _anywhere(first))
            counts += more
            held.update((o, h) for o, h in zip(equation.outvars, results, strict=False) if h is not None)
    return counts, [None if isinstance(v, core.Literal) else held.get(v) for v in jaxpr.outvars]


def _anywhere(held: _Held) -> np.ndarray:
    """The layers that a variable may hold."""
    return np.asarray(held.reshape(-1, held.shape[-1]).any(axis=0))


def _uses_inside(
    equation: Any, operands: list[_Held | None], layers: np.ndarray
) -> tuple[np.ndarray, list[_Held | None]]:
    """The uses by an equation that does more than change a layout, and what its results hold.

    `layers` are those of its first operand that holds any.
    """
    params = equation.params

    def within(jaxpr: Any, values: Sequence[_Held | None]) -> tuple[np.ndarray, list[_Held | None]]:
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        known = {v: held for v, held in zip(inner.invars, values, strict=True) if held is not None}
        return _uses(inner, known) if known else (np.zeros(len(layers), int), [None] * len(inner.outvars))

    if equation.primitive is primitives.scan_p:
        constants, carried, scanned = scan_groups(params, operands)
        nothing = [None] * len(carried)
        # A turn sees one layer, and the turns together each once; what does not change is used in every turn.
        rows = [None if held is None else held.any(axis=0) for held in scanned]
        turn, _ = within(params["jaxpr"], [*[None] * len(constants), *nothing, *rows])
        every, _ = within(params["jaxpr"], [*constants, *nothing, *[None] * len(scanned)])
        first = len(constants) + len(carried)
        sources = passed_through(params["jaxpr"].jaxpr)
        return turn + _MANY * every, [None if at is None or at < first else scanned[at - first] for at in sources]
    if equation.primitive is primitives.while_p:
        conditions, bodies = params["cond_nconsts"], params["body_nconsts"]
        rest = [None] * (len(operands) - conditions - bodies)
        body, _ = within(params["body_jaxpr"], [*operands[conditions : conditions + bodies], *rest])
        condition, _ = within(params["cond_jaxpr"], [*operands[:conditions], *rest])
        return _MANY * (body + condition), []
    if equation.primitive is primitives.cond_p:
        branches = [within(branch, operands[1:]) for branch in params["branches"]]
        results = [
            next((h for h in held if h is not None), None) for held in zip(*(b[1] for b in branches), strict=True)
        ]
        return np.max([counts for counts, _ in branches], axis=0), results
    if equation.primitive.name == "shard_map":
        return _MANY * layers.astype(int), []  # every device has a product of its own
    for name in ("jaxpr", "call_jaxpr"):
        if name in params:
            return within(params[name], operands)
    return layers.astype(int), []
