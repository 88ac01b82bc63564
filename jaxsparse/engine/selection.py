"""Picking supports: statistics into scores of units, scores into supports."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxsparse.common.errors import InputError
from jaxsparse.engine.description import Description
from jaxsparse.engine.places import GlobalPlaces, Places
from jaxsparse.select.scores import Draw, Entries, Score, score_dtype
from jaxsparse.subspaces.targets import ResolvedTarget

__all__ = ["score_units", "select"]


def select(
    description: Description,
    places: Places,
    old_support: Any,
    gradients: Sequence[Array | jax.ShapeDtypeStruct],
    weights: Sequence[Array],
    turn: Int[Array, ""],
) -> Any:
    """Picks the units with the best scores, as many as the old support has.

    Args:
        description: the method.
        places: where the slots lie.
        old_support: the support before, for its shape.
        gradients: of this step or calibrated, one stack of matrices per target; only their shapes, if the score does
            not look at them.
        weights: one stack of matrices per target; empty where no parameters are at hand.
        turn: how often was picked before.

    Returns:
        The new support.

    Raises:
        InputError: the score needs something that is not at hand.
    """
    given = description.given.get("support")
    if given is not None:
        return _given_support(places, given, old_support)
    known_weights: Sequence[Array | None] = weights or [None] * len(gradients)
    statistics = zip(places.counts(old_support), gradients, known_weights, strict=True)
    scores = [
        score_units(description, places.targets[number], number, count, gradient, weight, turn)
        for number, (count, gradient, weight) in enumerate(statistics)
    ]
    return places.pick(scores, old_support)


def score_units(
    description: Description,
    target: ResolvedTarget,
    number: int,
    count: int,
    gradient: Array | jax.ShapeDtypeStruct,
    weight: Array | None,
    turn: Int[Array, ""],
) -> Array:
    """Scores the units of one target; the largest are to be picked.

    Args:
        description: the method.
        target: the target.
        number: its number among the targets; a draw of its own comes with it.
        count: how many units may be picked of each of its matrices.
        gradient: of this step or calibrated, (stack, in, out).
        weight: (stack, in, out), or None where it is not at hand.
        turn: how often was picked before.

    Returns:
        Scores (stack, units).

    Raises:
        InputError: the score needs something that is not at hand.
    """
    score = description.score
    if score.draw is not None:
        units = jax.eval_shape(target.subspace.unit_scores, gradient).shape
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(description.seed), turn), number)
        unit_scores = score.draw(Draw(units[1], units[0], count, turn, key))
    else:
        unit_scores = _unit_scores(score, target, _entries(description, target, gradient, weight))
    return unit_scores if score.largest else -unit_scores


def _unit_scores(score: Score, target: ResolvedTarget, entries: Entries) -> Array:
    """Scores of units, from scores of entries; those of factors are multiplied."""
    if score.entries is not None:
        try:
            scores, view = score.entries(entries), target.view
        except (TypeError, AttributeError) as error:
            error.add_note(f"score {score.name} may look at what its `needs` name, {score.needs}; all else is None")
            raise
        matrices = (view.stack, view.in_size, view.out_size)
        if scores.ndim != 3 or any(have not in (1, all_) for have, all_ in zip(scores.shape, matrices, strict=True)):
            raise InputError(f"score {score.name} has shape {scores.shape} for {target.path}, expected {matrices}")
        return target.subspace.unit_scores(scores)
    return math.prod((_unit_scores(factor, target, entries) for factor in score.factors), start=jnp.ones([]))


def _entries(
    description: Description, target: ResolvedTarget, gradient: Array | jax.ShapeDtypeStruct, weight: Array | None
) -> Entries:
    """What the score may look at for one target."""
    dtype = score_dtype(gradient.dtype)
    found: dict[str, Any] = {"gradient": gradient, "weight": weight, "activation": None}
    readings: dict[str, tuple[ResolvedTarget, Callable[[Array], Array]]] = {
        "gradient": (target, target.view.matrices),
        "activation": (target.activation_of or target, partial(target.subspace.activations, view=target.view)),
    }
    for name, (source, read) in readings.items():
        given: Mapping[str, Any] = description.given.get(name, {})
        if not given:
            continue
        if source.path not in given:
            raise InputError(f"{description.name}: no {name} is given for target {source.path}")
        value = jnp.asarray(given[source.path])
        try:
            found[name] = read(value)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{description.name}: the {name} given for {source.path} has shape {value.shape}, which does not fit "
                f"{target.path} of shape {target.view.shape}"
            ) from error
    for name in description.score.needs:
        if found[name] is None:
            hint = f"give {name}s (js.collect_{name}s), or pick by js.calibrate"
            hint = "call update(gradients, state, params)" if name == "weight" else hint
            raise InputError(
                f"{description.name}: score {description.score.name} needs the {name} of {target.path}; {hint}"
            )
    needed = {name: found[name].astype(dtype) for name in description.score.needs}
    return Entries(**{**dict.fromkeys(Entries._fields), **needed})


def _given_support(places: Places, given: Any, old_support: Any) -> Any:
    """The support that the user supplies, checked."""
    if isinstance(places, GlobalPlaces):
        if jax.tree.map(jnp.shape, given) != jax.tree.map(jnp.shape, old_support):
            raise InputError(f"the support given must be a GlobalSupport of {places.counts(old_support)[0]} units")
        return given
    supports = []
    for target, like in zip(places.targets, jax.tree.leaves(old_support), strict=True):
        if target.path not in given:
            raise InputError(f"no support is given for target {target.path}")
        _check_units(target, given[target.path])
        support = jnp.asarray(given[target.path], jnp.int32)
        support = support.reshape(like.shape) if support.size == like.size else support
        if support.shape != like.shape:
            raise InputError(f"the support given for {target.path} has shape {support.shape}, expected {like.shape}")
        supports.append(support)
    return places.spread(supports)


def _check_units(target: ResolvedTarget, given: Any) -> None:
    """Raises an InputError for unit numbers that a target's matrices do not have, or that come twice."""
    if isinstance(given, jax.core.Tracer):
        return
    units, view = np.asarray(given), target.view
    dense = jax.ShapeDtypeStruct((view.stack, view.in_size, view.out_size), jnp.float32)
    count = jax.eval_shape(target.subspace.cut, dense).shape[1]
    if not np.issubdtype(units.dtype, np.integer) or units.size % view.stack:
        raise InputError(
            f"the support given for {target.path} must hold whole numbers for each of {view.stack} matrices; it has "
            f"shape {units.shape} of {units.dtype}"
        )
    first, last = units.min(), units.max()
    if first < 0 or last >= count:
        raise InputError(
            f"the support given for {target.path} must name units from 0 to {count - 1}, got {first}..{last}"
        )
    if not np.diff(np.sort(units.reshape(view.stack, -1), axis=1), axis=1).all():
        raise InputError(f"the support given for {target.path} names a unit twice")
