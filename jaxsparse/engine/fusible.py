"""What the fused engine can run, and the supports that it starts from."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxsparse.common.errors import InputError
from jaxsparse.engine.backward import picks_in_backward
from jaxsparse.engine.description import Description
from jaxsparse.engine.places import GlobalPlaces, GlobalSupport, MatrixPlaces, leaves_of
from jaxsparse.engine.reference import SubspaceState
from jaxsparse.engine.selection import select
from jaxsparse.select.schedules import Adaptive, Once
from jaxsparse.subspaces.units import Coordinates, Slices

__all__ = ["check_fusible", "drawn_support", "first_support"]


def check_fusible(description: Any) -> Description:
    """Returns a description that the fused engine can run.

    Raises:
        InputError: it cannot, and why.
    """
    if not isinstance(description, Description):
        raise InputError(f"{description.name} runs in the reference engine only: use js.ReferenceTuner")
    if description.calibration_steps:
        raise InputError(
            f"{description.name} with calibration_steps={description.calibration_steps} sums dense gradients; the "
            "fused engine has none: pick the support by js.calibrate and give it by js.with_support"
        )
    picks_once = isinstance(description.schedule, Once) or description.given.get("support") is not None
    if isinstance(description.schedule, Adaptive) and not picks_in_backward(description):
        raise InputError(
            f"{description.name} picks again when retention falls, and the fused engine measures it only where the "
            "gradient picks: give a number of steps, or use js.ReferenceTuner"
        )
    if description.score.entries is not None and not picks_in_backward(description) and not picks_once:
        raise InputError(
            f"{description.name}: the fused engine picks by {description.score.name} once; picking again by it is left "
            "to the reference engine"
        )
    return description


def first_support(description: Description, params: Any) -> list[Array]:
    """Returns, for every target, the support before the first step: picked, if that needs no gradient.

    Raises:
        InputError: the support waits for a gradient in a way that the backward pass cannot pick by.
    """
    places, empty, _ = description.start(params)
    if picks_in_backward(description):
        wrong = [t.path for t in places.targets if not isinstance(t.subspace, Coordinates)]
        if wrong or description.scope == "global":
            raise InputError(
                f"{description.name} picks by {description.score.name} over "
                f"{'all matrices' if description.scope == 'global' else type(places.targets[0].subspace).__name__}, "
                "which one backward pass cannot; pick the support by js.calibrate and give it by js.with_support"
            )
        return leaves_of(places.targets, empty)
    weights = [t.view.matrices(jax.tree.leaves(params)[t.position]) for t in places.targets]
    shapes: Any = [jax.ShapeDtypeStruct(weight.shape, jnp.float32) for weight in weights]
    support = select(description, places, empty, shapes, weights, jnp.zeros([], jnp.int32))
    if isinstance(places, GlobalPlaces):
        return _by_target(places, support)
    return leaves_of(places.targets, support)


def drawn_support(description: Description, places: MatrixPlaces, state: SubspaceState, due: Bool[Array, ""]) -> Any:
    """Returns the support of a step, drawn afresh if that is due and the score is of unit numbers alone."""
    if description.score.draw is None or description.given.get("support") is not None:
        return state.support
    views = [target.view for target in places.targets]
    shapes: Any = [jax.ShapeDtypeStruct((v.stack, v.in_size, v.out_size), jnp.float32) for v in views]
    turn = state.progress.refreshes
    return jax.lax.cond(
        due, lambda old: select(description, places, old, shapes, [], turn), lambda old: old, state.support
    )


def _by_target(places: GlobalPlaces, support: GlobalSupport) -> list[Array]:
    """One support over all matrices as a support for every target; idle slots fill up all but the fullest layer."""
    matrix, unit = np.asarray(support.matrix), np.asarray(support.unit)
    supports = []
    for first, target in zip(places.first_matrix, places.targets, strict=True):
        view = target.view
        if isinstance(target.subspace, Slices):
            raise InputError("scope='global' over slices runs in the reference engine only: use js.ReferenceTuner")
        idle = target.subspace.shape(view)[1]
        layers = [np.sort(unit[matrix == first + layer]) for layer in range(view.stack)]
        most = max(len(layer) for layer in layers)
        filled = [np.pad(layer, (0, most - len(layer)), constant_values=idle) for layer in layers]
        supports.append(jnp.asarray(np.stack(filled), jnp.int32))
    return supports
