"""What a program computes and moves, counted from its jaxpr: XLA's own analysis counts the body of a loop once."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

__all__ = ["Cost", "cost_of", "kept_for_backward"]

# Operations that read and write memory of their own; elementwise ones and sums are taken as fused into these.
_MOVES = {"dot_general", "conv_general_dilated", "gather", "dynamic_slice", "top_k", "approx_top_k", "sort", "cumsum"}
# These write into an operand, of which the rest stays where it is.
_WRITES = {"scatter": 2, "scatter-add": 2, "scatter_add": 2, "dynamic_update_slice": 1}


@dataclass(frozen=True)
class Cost:
    """What a program takes.

    Attributes:
        flops: floating-point operations of its products.
        wide_flops: of them those of products with a factor wider than 16 bits.
        bytes: what products, look-ups, sorts and scatters read and write at least; all else is taken as fused into
            them.
        unknown_loops: loops of which nobody knows how often they run; their bodies are counted once.
    """

    flops: float = 0.0
    wide_flops: float = 0.0
    bytes: float = 0.0
    unknown_loops: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.flops + other.flops,
            self.wide_flops + other.wide_flops,
            self.bytes + other.bytes,
            self.unknown_loops + other.unknown_loops,
        )

    def times(self, count: int) -> "Cost":
        """Returns the cost of so many of these."""
        return Cost(self.flops * count, self.wide_flops * count, self.bytes * count, self.unknown_loops)


def cost_of(function: Callable[..., Any], *arguments: Any, refresh: bool = False) -> Cost:
    """Counts what a function computes and moves.

    Args:
        function: any function of arrays.
        arguments: its arguments; arrays, or their shapes.
        refresh: of branches that are chosen at run time count the dearest; otherwise the cheapest, as a step that
            picks no support takes them.

    Example:
        >>> import jax.numpy as jnp
        >>> ones = jax.ShapeDtypeStruct((8, 8), jnp.float32)
        >>> cost_of(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=3)[0], ones).flops
        3072.0
    """
    return _of(jax.make_jaxpr(function)(*arguments).jaxpr, refresh)


def _of(jaxpr: core.Jaxpr, refresh: bool) -> Cost:
    total, platforms = Cost(), set[Any]()
    for equation in jaxpr.eqns:
        # Where an op has a version for each kind of device, plain XLA comes last: what it computes is what all do.
        if equation.primitive.name == "platform_index":
            platforms.update(equation.outvars)
        if equation.primitive.name == "cond" and platforms & set(equation.invars[:1]):
            total = total + _of(equation.params["branches"][-1].jaxpr, refresh)
        else:
            total = total + _of_equation(equation, refresh)
    return total


def _of_equation(equation: Any, refresh: bool) -> Cost:
    name, params = equation.primitive.name, equation.params
    if name == "scan":
        return _of(params["jaxpr"].jaxpr, refresh).times(params["length"])
    if name == "while":
        body = _of(params["body_jaxpr"].jaxpr, refresh)
        return body if body == Cost() else body + Cost(unknown_loops=1)
    if name == "cond":
        return _of_branches([_of(branch.jaxpr, refresh) for branch in params["branches"]], refresh)
    if name == "pallas_call":
        return _of_kernel(equation)
    if name == "shard_map":
        return _of(_plain(params["jaxpr"]), refresh).times(params["mesh"].size)
    inner = [_plain(value) for value in params.values() if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]
    if inner:
        # Of a function with derivatives of its own: the function, not its rules.
        return _of(inner[0], refresh)
    flops = _flops_of_product(equation) if name == "dot_general" else 0.0
    return Cost(flops, flops if _is_wide(equation) else 0.0, _bytes(equation))


def _of_branches(costs: list[Cost], refresh: bool) -> Cost:
    order = lambda cost: (cost.flops, cost.bytes)  # noqa: E731
    return max(costs, key=order) if refresh else min(costs, key=order)


def _of_kernel(equation: Any) -> Cost:
    """What a Pallas kernel says of itself, or its operands and results once."""
    estimate = equation.params.get("cost_estimate")
    if estimate is not None:
        flops = float(estimate.flops)
        return Cost(flops, flops if _is_wide(equation) else 0.0, float(estimate.bytes_accessed))
    return Cost(bytes=sum(map(_size, [*equation.invars, *equation.outvars])))


def _plain(jaxpr: Any) -> core.Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _flops_of_product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = equation.invars[0].aval, equation.outvars[0].aval
    return 2.0 * math.prod(result.shape) * math.prod(left.shape[axis] for axis in contracted)


def _is_wide(equation: Any) -> bool:
    """Whether a floating-point operand has more than 16 bits."""
    dtypes = [getattr(variable.aval, "dtype", None) for variable in equation.invars]
    return any(dtype is not None and jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 2 for dtype in dtypes)


def _bytes(equation: Any) -> float:
    name = equation.primitive.name
    if name in _WRITES:
        return 2 * sum(map(_size, equation.invars[_WRITES[name] :]))
    if name in ("gather", "dynamic_slice"):
        return 2 * sum(map(_size, equation.outvars)) + sum(map(_size, equation.invars[1:]))
    return sum(map(_size, [*equation.invars, *equation.outvars])) if name in _MOVES else 0.0


def _size(variable: Any) -> float:
    aval = variable.aval
    if not hasattr(aval, "shape") or not hasattr(aval.dtype, "itemsize"):
        return 0.0
    return float(np.prod(aval.shape, dtype=float) * aval.dtype.itemsize)


def kept_for_backward(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the bytes of activations that a step keeps of all its layers from the forward to the backward pass.

    A model whose layers are a scan, as ours are, stacks them; the backward pass is the scan that runs in reverse.

    Args:
        function: the step.
        arguments: its arguments; arrays, or their shapes.
    """
    return _stacked(jax.make_jaxpr(function)(*arguments).jaxpr)


def _stacked(jaxpr: core.Jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        params = equation.params
        inner = [_plain(value) for value in params.values() if isinstance(value, core.Jaxpr | core.ClosedJaxpr)]
        within = sum(map(_stacked, inner[:1]))
        if equation.primitive.name != "scan":
            total += within
        elif not params["reverse"]:
            # Over layers, what it stacks; over micro-batches, which drop theirs one by one, that of one of them.
            total += max(within, sum(map(_size, equation.outvars[params["num_carry"] :])))
    return total
