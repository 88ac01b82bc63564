"""All methods side by side: where each is from, what it trains, and what that costs on a model."""

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import docstring_parser
import jax
import optax

from jaxsparse.common.errors import InputError
from jaxsparse.engine.description import SubspaceTransformation, count_slots
from jaxsparse.engine.preparation import EngineOf, engine_of
from jaxsparse.methods.registry import METHODS, PAPERS
from jaxsparse.subspaces.targets import tree_size

__all__ = ["Overview", "overview"]

# Options that say how much trains, and when it is chosen again.
_BUDGET = ("density", "budget", "rank", "k", "neurons", "output", "down", "blocks", "layers")
_SCHEDULE = ("refresh_every", "every", "chain_every", "reselect_every", "total_steps")
# What stands for options that a method leaves to its user; the first of these that it can do with.
_EXAMPLES: tuple[Mapping[str, Any], ...]
_EXAMPLES = ({}, {"blocks": 4}, {"density": 1e-4}, {"chain_every": 100}, {"total_steps": 1000})


@dataclass(frozen=True)
class Overview:
    """A method at its default options.

    Attributes:
        method: its name.
        paper: where it is from.
        subspace: where weights may move, in a word or two.
        trains: what it trains, in a sentence.
        engine: "fused"; "fused after calibration", where a method first looks at gradients of some batches; or
            "reference".
        budget: the options that say how much trains.
        schedule: the options that say when it is chosen again.
        examples: those of them that have no default, and are set here to some value.
        trainable: how many numbers train at a time on the model; None without a model, or where the method cannot run.
        share: the same / all parameters of the model.
        state_bytes: size of the method's whole state with Adam, indices, masters and sums of gradients included.
        problem: why the method cannot run on the model; None where it can.
    """

    method: str
    paper: str
    subspace: str
    trains: str
    engine: EngineOf
    budget: dict[str, Any]
    schedule: dict[str, Any]
    examples: tuple[str, ...]
    trainable: int | None = None
    share: float | None = None
    state_bytes: int | None = None
    problem: str | None = None


def overview(params: Any = None, *, head_size: int | None = None) -> list[Overview]:
    """Lists every method.

    Args:
        params: a model's parameters, or their shapes; None: no numbers.
        head_size: width of one attention head, for methods that ask for it.

    Returns:
        One row for each method of the registry, in its order.

    Example:
        >>> import jax.numpy as jnp
        >>> kernel = jax.ShapeDtypeStruct((2, 64, 64), jnp.float32)
        >>> rows = overview({"layers": {"self_attn": {"q_proj": {"kernel": kernel}}}})
        >>> [(row.trainable, row.share, row.state_bytes) for row in rows if row.method == "cla"]
        [(1024, 0.125, 12384)]
    """
    return [_row(name, params, head_size) for name in METHODS]


def _row(name: str, params: Any, head_size: int | None) -> Overview:
    method, examples = _example(name, head_size)
    defaults = {parameter.name: parameter.default for parameter in inspect.signature(METHODS[name]).parameters.values()}
    options = {option: value for option, value in (defaults | dict(examples)).items() if value is not None}
    row: dict[str, Any] = {
        "method": name,
        "paper": PAPERS[name],
        "subspace": method.description.subspace_name,
        "engine": engine_of(method),
        "trains": docstring_parser.parse(METHODS[name].__doc__ or "").short_description,
        "budget": {option: options[option] for option in _BUDGET if option in options},
        "schedule": {option: options[option] for option in _SCHEDULE if option in options},
        "examples": tuple(examples),
    }
    if params is not None:
        try:
            trainable = count_slots(method, params)
            with warnings.catch_warnings(action="ignore"):  # advice for runs; here there are but shapes
                state = jax.eval_shape(method.init, params)
        except InputError as error:
            row["problem"] = str(error)
        else:
            sizes = [leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)]
            row |= {"trainable": trainable, "share": trainable / tree_size(params), "state_bytes": sum(sizes)}
    return Overview(**row)


def _example(name: str, head_size: int | None) -> tuple[SubspaceTransformation, Mapping[str, Any]]:
    """The method at its default options, and the options that had to be chosen."""
    takes = inspect.signature(METHODS[name]).parameters
    rate = 1e-4
    usual = {"inner": optax.adam(rate), "head_size": head_size}
    given = {option: value for option, value in usual.items() if option in takes}
    if "inner" not in takes:
        given["learning_rate"] = rate
    for examples in _EXAMPLES[:-1]:
        try:
            return METHODS[name](**given, **examples), examples
        except (InputError, TypeError):
            continue
    return METHODS[name](**given, **_EXAMPLES[-1]), _EXAMPLES[-1]
