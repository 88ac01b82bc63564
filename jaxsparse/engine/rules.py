"""What primitives do to followed weights: the register of rules, and how everything else is evaluated."""

from collections.abc import Callable, Sequence
from typing import Any

from jax.extend import core

from jaxsparse.engine.slotted import SlottedWeight, UnsupportedUseError

__all__ = [
    *("Rule", "as_closed", "as_it_stands", "first_followed", "is_followed", "read", "register_rule", "rule_for"),
]

Rule = Callable[..., Sequence[Any]]
_RULES: dict[str, Rule] = {}


def register_rule(primitive: Any) -> Callable[[Rule], Rule]:
    """Registers what a primitive does to followed weights.

    An output may be followed in its turn if it has the weight's entries and every entry the gradient of the weight's.
    The example is a model that clips its weights to bounds which they never reach.

    Args:
        primitive: the `jax.extend.core.Primitive`, or its name.

    Returns:
        A decorator for `rule(params, *values) -> outputs`: `params` are the equation's, `values` its operands, arrays
        or `SlottedWeight`s, at least one of the latter; `outputs` a sequence of either.

    Example:
        >>> import dataclasses, jax, jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> from jaxsparse.engine.interpreter import register_rule
        >>> def loss_fn(params, batch):
        ...     return jnp.sum(batch @ jax.lax.clamp(-10.0, params["kernel"], 10.0))
        >>> @register_rule(jax.lax.clamp_p)
        ... def _clamp(params, low, weight, high):
        ...     return [dataclasses.replace(weight, base=jax.lax.clamp(low, weight.base, high))]
        >>> tuner = js.fuse(loss_fn, js.gasdu(optax.sgd(0.5), density=0.5, targets="kernel"))
        >>> state, _ = tuner.step(tuner.init({"kernel": jnp.ones((2, 1))}), jnp.array([[3.0, 1.0]]))
        >>> tuner.params(state)["kernel"].ravel()
        Array([-0.5,  1. ], dtype=float32)
    """
    name = primitive if isinstance(primitive, str) else primitive.name

    def register(rule: Rule) -> Rule:
        _RULES[name] = rule
        return rule

    return register


def rule_for(primitive: Any, operands: Sequence[Any]) -> Rule:
    """Returns the rule of a primitive.

    Raises:
        UnsupportedUseError: it has none; names the first followed operand.
    """
    rule = _RULES.get(primitive.name)
    if rule is None:
        raise UnsupportedUseError(first_followed(operands).path, f"primitive {primitive}")
    return rule


def is_followed(value: Any) -> bool:
    """Whether a value is a followed weight."""
    return isinstance(value, SlottedWeight)


def first_followed(values: Sequence[Any]) -> SlottedWeight:
    """Returns the first followed weight among values."""
    return next(value for value in values if isinstance(value, SlottedWeight))


def read(known: dict[Any, Any], variable: Any) -> Any:
    """Returns what a variable or a literal of a jaxpr stands for."""
    return variable.val if isinstance(variable, core.Literal) else known[variable]


def as_closed(jaxpr: Any) -> core.ClosedJaxpr:
    """Returns a jaxpr without constants as a closed one; a closed one as it is."""
    return jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else core.ClosedJaxpr(jaxpr, ())


def as_it_stands(jaxpr: core.Jaxpr, equation: Any) -> Callable[..., list[Any]]:
    """Returns one equation as a function of its operands.

    JAX's own evaluator runs it, which knows about custom derivatives and name scopes.

    Args:
        jaxpr: the jaxpr that the equation belongs to.
        equation: the equation.
    """
    inputs = list(dict.fromkeys(v for v in equation.invars if not isinstance(v, core.Literal)))
    alone = jaxpr.replace(
        constvars=[], invars=inputs, outvars=equation.outvars, eqns=[equation], effects=equation.effects
    )

    def call(*operands: Any) -> list[Any]:
        known = {v: o for v, o in zip(equation.invars, operands, strict=True) if not isinstance(v, core.Literal)}
        return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*(known[variable] for variable in inputs))

    return call
