"""Picking supports: statistics into scores of units, scores into supports."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxsparse.common.errors import InputError
from jaxsparse.engine.description import Description
from jaxsparse.engine.places import GlobalPlaces, Places
from jaxsparse.select.scores import Draw, Entries, score_dtype
from jaxsparse.subspaces.targets import ResolvedTarget

__all__ = ["select"]


def select(
    description: Description,
    places: Places,
    old_support: Any,
    gradients: list[Array],
    weights: list[Array],
    turn: Int[Array, ""],
) -> Any:
    """Picks the units with the best scores, as many as the old support has.

    Args:
        description: the method.
        places: where the slots lie.
        old_support: the support before, for its shape.
        gradients: of this step or calibrated, one stack of matrices per target.
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
    scores = []
    known_weights: Sequence[Array | None] = weights or [None] * len(gradients)
    key = jax.random.fold_in(jax.random.key(description.seed), turn)
    counts = places.counts(old_support)
    for number, (target, gradient, weight) in enumerate(zip(places.targets, gradients, known_weights, strict=True)):
        if description.score.entries is None:
            assert description.score.draw is not None
            units = jax.eval_shape(target.subspace.unit_scores, gradient).shape
            draw = Draw(units[1], units[0], counts[number], turn, jax.random.fold_in(key, number))
            unit_scores = description.score.draw(draw)
        else:
            entries = _entries(description, target, gradient, weight)
            unit_scores = target.subspace.unit_scores(description.score.entries(entries))
        scores.append(unit_scores if description.score.largest else -unit_scores)
    return places.pick(scores, old_support)


def _entries(description: Description, target: ResolvedTarget, gradient: Array, weight: Array | None) -> Entries:
    """What the score may look at for one target."""
    dtype = score_dtype(gradient.dtype)
    shape = gradient.shape
    found: dict[str, Any] = {"gradient": gradient, "weight": weight, "activation": None}
    for name, view in (("gradient", target.view.matrices), ("activation", lambda a: a.reshape(shape[0], shape[1], 1))):
        given: Mapping[str, Any] = description.given.get(name, {})
        if given:
            if target.path not in given:
                raise InputError(f"{description.name}: no {name} is given for target {target.path}")
            found[name] = view(jnp.asarray(given[target.path]))
    for name in description.score.needs:
        if found[name] is None:
            hint = "call update(gradients, state, params)" if name == "weight" else f"give {name}s by js.calibrate"
            raise InputError(
                f"{description.name}: score {description.score.name} needs the {name} of {target.path}; {hint}"
            )
    return Entries(**{name: value if value is None else value.astype(dtype) for name, value in found.items()})


def _given_support(places: Places, given: Mapping[str, Any], old_support: Any) -> Any:
    """The support that the user supplies, checked."""
    if isinstance(places, GlobalPlaces):
        return given
    supports = []
    for target, like in zip(places.targets, jax.tree.leaves(old_support), strict=True):
        if target.path not in given:
            raise InputError(f"no support is given for target {target.path}")
        support = jnp.asarray(given[target.path], jnp.int32)
        support = support.reshape(like.shape) if support.size == like.size else support
        if support.shape != like.shape:
            raise InputError(f"the support given for {target.path} has shape {support.shape}, expected {like.shape}")
        supports.append(support)
    return places.spread(supports)
