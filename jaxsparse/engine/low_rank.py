"""Low-rank methods as gradient transformations: factors train, and updates are the change of their product.

W moves as W_0 + s A B does, without A and B being part of the model.
"""

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from jaxsparse.common.errors import InputError
from jaxsparse.engine.description import SubspaceTransformation
from jaxsparse.engine.factors import (
    Factors,
    change_of_dora,
    change_of_product,
    directions,
    dora_gradients,
    factor_gradients,
    product,
)
from jaxsparse.engine.low_rank_description import GradientStart, LowRank, as_trees, of_targets
from jaxsparse.engine.places import NOTHING, MatrixPlaces, leaves_of
from jaxsparse.engine.updates import all_finite, at_rate, nothing_but
from jaxsparse.select.carry import carry_inner_state
from jaxsparse.select.schedules import Once, Progress
from jaxsparse.select.scores import score_dtype
from jaxsparse.subspaces.targets import ResolvedTarget, is_masked

__all__ = [
    "LowRankState",
    "advance_factors",
    "begin_chain",
    "given_gradient",
    "low_rank_engine",
    "move_factors",
]


class LowRankState(NamedTuple):
    """State of a low-rank method; every tree mirrors the parameters, with `optax.MaskedNode` where nothing moves.

    Before the first update A may be exchanged: `state._replace(factors=state.factors._replace(a=...))`.

    Attributes:
        progress: step counts; `refreshes` counts chains. Retention is not measured, and stays 1.
        factors: A, B and DoRA's magnitude, in promote_types(weight dtype, float32).
        norms: DoRA's c, the norms (stack, out) of the columns of V; else `optax.MaskedNode`.
        inner: the inner optimizer's state, of the size of the factors that train.
        evidence: the count and the dense sums of the gradients looked at; () for methods that do not look.
    """

    progress: Progress
    factors: Factors
    norms: Any
    inner: Any
    evidence: Any


def low_rank_engine(description: LowRank) -> SubspaceTransformation:
    """Makes the optax transformation that runs a low-rank description on dense gradients.

    For float32 weights and wider, updates are exact to rounding. Narrower weights round most of a small step away,
    since the sum is kept nowhere else: `init` warns once.

    Args:
        description: the method.

    Returns:
        A transformation with state `js.LowRankState`; DoRA's `update` needs the parameters too.
    """
    return SubspaceTransformation(partial(_init, description), partial(_update, description), description)


def _init(description: LowRank, params: Any) -> LowRankState:
    assert description.inner is not None
    looks = description.start is not None and description.start.gradients is None
    if not jax.tree.leaves(params):  # the placeholder of optax.tree.map_params stands for any tree
        factors = Factors(params, params, params)
        evidence = (jnp.zeros([], jnp.int32), params) if looks else ()
        return LowRankState(Progress.start(), factors, params, description.inner.init(factors), evidence)
    places = MatrixPlaces(description.resolve(params), jax.tree.structure(params, is_leaf=is_masked))
    _warn_of_rounding(description, places.targets, params)
    factors = description.first(params)
    norms = jax.tree.map(jnp.copy, factors.magnitude)
    sums = places.spread([jnp.zeros_like(weight) for weight in description.weights(params)])
    evidence = (jnp.zeros([], jnp.int32), sums) if looks else ()
    inner = description.inner.init(description.trained(factors))
    return LowRankState(Progress.start(), factors, norms, inner, evidence)


def _warn_of_rounding(description: LowRank, targets: Sequence[ResolvedTarget], params: Any) -> None:
    dtypes = {target.path: leaf.dtype for target, leaf in zip(targets, leaves_of(targets, params), strict=True)}
    narrow = [path for path, dtype in dtypes.items() if score_dtype(dtype) != dtype]
    if narrow:
        warnings.warn(
            f"{description.name} adds a step to the weights themselves, and {len(narrow)} of them, such as {narrow[0]} "
            f"of dtype {dtypes[narrow[0]]}, round most of a small one away; use float32 weights",
            stacklevel=1,  # this line, wherever init is called from: Python then shows it once
        )


def _update(
    description: LowRank, updates: Any, state: LowRankState, params: Any = None, **extra_args: Any
) -> tuple[Any, LowRankState]:
    if description.magnitude and params is None:
        raise ValueError(f"{description.name} needs params: call update(gradients, state, params)")
    leaves = jax.tree.leaves(updates, is_leaf=is_masked)
    places = MatrixPlaces(description.resolve(updates), jax.tree.structure(state.factors.b, is_leaf=is_masked))
    gradients = [
        target.view.matrices(leaves[target.position]).astype(b.dtype)
        for target, b in zip(places.targets, leaves_of(places.targets, state.factors.b), strict=True)
    ]
    look = _look(description.start, places, state.evidence, gradients)
    due = description.schedule.due(state.progress) & look.ready
    begun = begin_chain(description, places, state, due, look.means)
    weights = description.weights(params) if description.magnitude else []
    slopes, stepped, moves = _step(description, places, begun, gradients, weights, extra_args)

    trains, else_moves = ~look.looks, [jnp.array(NOTHING, move.dtype) for move in moves]
    if description.start is not None and not description.start.offset:
        # The product is a step of its own: this gradient is that of the model without it.
        trains = trains & ~due
        products = [description.scale * product(a, b) for a, b, _ in of_targets(places, begun.factors)]
        else_moves = [jnp.where(due, p, x).astype(x.dtype) for p, x in zip(products, else_moves, strict=True)]
    moves = [jnp.where(trains, move, other) for move, other in zip(moves, else_moves, strict=True)]
    finite = all_finite((slopes, moves))
    factors, norms, inner = jax.tree.map(
        lambda old, new, moved: jnp.where(finite, jnp.where(trains, moved, new), old),
        *((which.factors, which.norms, which.inner) for which in (state, begun, stepped)),
    )
    progress = advance_factors(state.progress, finite & trains, finite & due, ~finite & ~look.looks)
    changed = {
        target.position: target.view.weight(jnp.where(finite & (move != 0), move, NOTHING))
        for target, move in zip(places.targets, moves, strict=True)
    }
    return nothing_but(updates, changed), LowRankState(progress, factors, norms, inner, look.evidence)


class _Look(NamedTuple):
    """What an update sees before it trains.

    Attributes:
        looks: whether it looks at its gradient and does not train.
        ready: whether all that the factors start from is known.
        evidence: the count and sums with this gradient.
        means: the gradients to start from, one stack of matrices per target.
    """

    looks: Bool[Array, ""]
    ready: Bool[Array, ""]
    evidence: Any
    means: list[Array]


def _look(start: GradientStart | None, places: MatrixPlaces, evidence: Any, gradients: list[Array]) -> _Look:
    if start is None:
        return _Look(jnp.array(False), jnp.array(True), (), [])
    if start.gradients is not None:
        given = zip(places.targets, gradients, strict=True)
        means = [given_gradient(start.gradients, target).astype(gradient.dtype) for target, gradient in given]
        return _Look(jnp.array(False), jnp.array(True), (), means)
    count, sums = evidence
    looks = count < start.calibration_steps
    finite = all_finite(gradients)
    counted = looks & finite
    totals = leaves_of(places.targets, sums)
    added = [jnp.where(counted, old + g, old) for old, g in zip(totals, gradients, strict=True)]
    means = [total / start.calibration_steps for total in added]
    count = count + counted
    return _Look(looks, count >= start.calibration_steps, (count, places.spread(added)), means)


def given_gradient(gradients: Mapping[str, Any], target: ResolvedTarget) -> Array:
    """Returns the gradient that the user supplies for a target, as matrices."""
    if target.path not in gradients:
        raise InputError(f"no gradient is given for target {target.path}")
    gradient = jnp.asarray(gradients[target.path])
    if gradient.shape != target.view.shape:
        raise InputError(
            f"the gradient given for {target.path} has shape {gradient.shape}, expected {target.view.shape}"
        )
    return target.view.matrices(gradient)


def begin_chain(
    description: LowRank, places: MatrixPlaces, state: LowRankState, due: Bool[Array, ""], means: list[Array]
) -> LowRankState:
    """Returns the state with fresh factors and a fresh inner optimizer, where they are due; `init` drew the first."""
    start, inner = description.start, description.inner
    if start is None and isinstance(description.schedule, Once):
        return state

    def fresh(state: LowRankState) -> LowRankState:
        dtypes = [b.dtype for b in leaves_of(places.targets, state.factors.b)]
        if start is None:
            factors = description.draw(places, dtypes, state.progress.refreshes)
        else:
            found = [start.factors(mean, description.rank) for mean in means]
            cast = zip(found, dtypes, strict=True)
            factors = as_trees(places, [Factors(a.astype(dtype), b.astype(dtype)) for (a, b), dtype in cast])
        assert inner is not None
        moments = carry_inner_state("reset", inner, state.inner, description.trained(factors), None)
        return state._replace(factors=factors, inner=moments)

    due = due & (state.progress.refreshes > 0) if start is None else due
    return jax.lax.cond(due, fresh, lambda state: state, state)


def _step(
    description: LowRank,
    places: MatrixPlaces,
    state: LowRankState,
    gradients: list[Array],
    weights: list[Array],
    extra_args: dict[str, Any],
) -> tuple[Factors, LowRankState, list[Array]]:
    """One step of the inner optimizer: the factors' gradients, the new state, and the change of every weight."""
    old, scale = of_targets(places, state.factors), description.scale
    norms = leaves_of(places.targets, state.norms)
    ways: list[Any] = []
    if description.magnitude:
        ways = [directions(weight, factors.magnitude) for weight, factors in zip(weights, old, strict=True)]
        each = zip(old, norms, ways, gradients, strict=True)
        slopes = [dora_gradients(factors, c, way, gradient, scale) for factors, c, way, gradient in each]
    else:
        slopes = [factor_gradients(factors, gradient, scale) for factors, gradient in zip(old, gradients, strict=True)]
    slope = description.trained(as_trees(places, slopes))
    factors, inner = move_factors(description, state, slope, extra_args)
    new = of_targets(places, factors)
    if description.magnitude:
        changes = [change_of_dora(*each, scale) for each in zip(old, new, norms, ways, strict=True)]
        moves, norms = [move for move, _ in changes], [c for _, c in changes]
    else:
        moves = [change_of_product(before, after, scale) for before, after in zip(old, new, strict=True)]
    return slope, state._replace(factors=factors, norms=places.spread(norms), inner=inner), moves


def move_factors(
    description: LowRank, state: LowRankState, slope: Factors, extra_args: dict[str, Any]
) -> tuple[Factors, Any]:
    """Returns the factors and the inner optimizer's state after a step, given the gradients of what trains."""
    assert description.inner is not None
    trained = description.trained(state.factors)
    steps, inner = optax.with_extra_args_support(description.inner).update(slope, state.inner, trained, **extra_args)
    steps = at_rate(steps, description.learning_rate, state.progress.steps)
    if description.ratio is not None:
        steps = steps._replace(b=jax.tree.map(lambda step: description.ratio * step, steps.b))
    moved = jax.tree.map(lambda x, step: (x + step).astype(x.dtype), trained, steps)
    return moved if description.trains_a else moved._replace(a=state.factors.a), inner


def advance_factors(
    progress: Progress, stepped: Bool[Array, ""], begun: Bool[Array, ""], skipped: Bool[Array, ""]
) -> Progress:
    """Returns the progress after an update."""
    return progress._replace(
        steps=jnp.where(stepped, optax.safe_increment(progress.steps), progress.steps),
        refreshes=progress.refreshes + begun,
        last_refresh=jnp.where(begun, progress.steps, progress.last_refresh),
        skipped=progress.skipped + skipped,
    )
