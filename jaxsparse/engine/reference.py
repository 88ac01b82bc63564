"""The reference engine: dense gradients in, masked updates out.

It is the definition of every method: pure, exact, and at home in any optax pipeline.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxsparse.engine.description import Description, SubspaceTransformation
from jaxsparse.engine.places import NOTHING, Places, leaves_of
from jaxsparse.engine.selection import select
from jaxsparse.engine.updates import all_finite, at_rate, nothing_but
from jaxsparse.select.carry import carry_inner_state
from jaxsparse.select.schedules import Progress
from jaxsparse.select.scores import score_dtype
from jaxsparse.subspaces.targets import ResolvedTarget, is_masked

__all__ = [
    "SubspaceState",
    "advance",
    "carry_over",
    "fresh_state",
    "move_slots",
    "ratio",
    "reference_engine",
    "retention",
    "step_slots",
]


class SubspaceState(NamedTuple):
    """State of a subspace method; every tree mirrors the parameters, with `optax.MaskedNode` where nothing moves.

    With scope "global" there is one support and one array of slots instead of trees.

    Attributes:
        progress: step counts and retention.
        support: int32 unit numbers of every matrix, (stack, ...); for coordinates (stack, k) flat indices, slot j
            the one with the j-th largest score at the last refresh.
        slots: the change of every slot since it was picked, for methods whose inner optimizer sees that; else
            `optax.MaskedNode`.
        master: the weights at the support in the slots' dtype, where that is wider than the weight's; else
            `optax.MaskedNode`, and the weight is its own master.
        inner: the inner optimizer's state, of slots' size; () without inner optimizer.
        evidence: dense sums of gradients while calibrating; () for methods that do not.
    """

    progress: Progress
    support: Any
    slots: Any
    master: Any
    inner: Any
    evidence: Any


def reference_engine(description: Description) -> SubspaceTransformation:
    """Makes the optax transformation that runs a description on dense gradients.

    Args:
        description: the method.

    Returns:
        A transformation whose `init` takes the parameters and whose `update` takes dense gradients; `update`
        needs the parameters too if there is an inner optimizer or the score looks at weights.
    """
    return SubspaceTransformation(partial(_init, description), partial(_update, description), description)


def _init(description: Description, params: Any) -> SubspaceState:
    if not jax.tree.leaves(params):  # the placeholder of optax.tree.map_params stands for any tree
        inner = () if description.inner is None else description.inner.init(params)
        evidence = (jnp.zeros([], jnp.int32), params) if description.calibration_steps else ()
        return SubspaceState(Progress.start(), params, params, params, inner, evidence)
    places, support, slot_weights = description.start(params)
    weights = jax.eval_shape(partial(_weights, description, places.targets), params)
    # Statistics that the score needs and nobody gave are an error now, and not in the first step.
    jax.eval_shape(partial(select, description, places), support, weights, weights, jnp.zeros([], jnp.int32))
    return fresh_state(description, support, slot_weights, _no_evidence(description, places, params))


def fresh_state(description: Description, support: Any, slot_weights: Any, evidence: Any = ()) -> SubspaceState:
    """Returns the state before the first step.

    Args:
        description: the method.
        support: the support to start from.
        slot_weights: shapes and dtypes of the weights at the support.
        evidence: sums to begin calibrating with.
    """
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, description.slot_dtype(w.dtype)), slot_weights)
    nothing = jax.tree.map(lambda _: optax.MaskedNode(), zeros)
    wide = jax.tree.map(lambda w: jnp.zeros(w.shape, description.master_dtype(w.dtype)), slot_weights)
    has_master = jax.tree.map(lambda w, m: description.inner is not None and w.dtype != m.dtype, slot_weights, wide)
    master = jax.tree.map(lambda has, m: m if has else optax.MaskedNode(), has_master, wide)
    inner = () if description.inner is None else description.inner.init(zeros)
    slots = zeros if description.sees == "change" else nothing
    return SubspaceState(Progress.start(), support, slots, master, inner, evidence)


def _no_evidence(description: Description, places: Places, params: Any) -> Any:
    """Sums to begin calibrating with: dense, one stack of matrices per target."""
    if not description.calibration_steps:
        return ()
    leaves = leaves_of(places.targets, params)
    views = [target.view for target in places.targets]
    sums = [
        jnp.zeros((view.stack, view.in_size, view.out_size), score_dtype(leaf.dtype))
        for view, leaf in zip(views, leaves, strict=True)
    ]
    return jnp.zeros([], jnp.int32), places.spread(sums)


def _update(
    description: Description, updates: Any, state: SubspaceState, params: Any = None, **extra_args: Any
) -> tuple[Any, SubspaceState]:
    targets = description.resolve(updates)
    leaves = jax.tree.leaves(updates, is_leaf=is_masked)
    mirror = state.evidence[1] if description.calibration_steps else state.support
    places = description.places(targets, jax.tree.structure(mirror, is_leaf=is_masked))
    gradients = [target.view.matrices(leaves[target.position]) for target in targets]
    weights = _weights(description, targets, params)

    calibrating, evidence, mean_gradients = _calibrate(description, state.evidence, targets, places, gradients)
    due = description.schedule.due(state.progress) & ~calibrating
    pick = partial(select, description, places)
    support = jax.lax.cond(
        due, pick, lambda old, *_: old, state.support, mean_gradients, weights, state.progress.refreshes
    )
    slot_gradients = places.gather(gradients, support)
    kept = retention(gradients, slot_gradients, per_matrix=description.scope == "matrix")
    progress = advance(state.progress, due, *kept)

    if description.inner is None:
        moves, slots, master, inner = slot_gradients, state.slots, state.master, state.inner
    else:
        slot_weights = places.gather(weights, support)
        carried = carry_over(description, places, state, due, support, slot_weights)
        moves, slots, master, inner = move_slots(description, carried, slot_gradients, slot_weights, extra_args)

    finite = all_finite((slot_gradients, moves))
    takes = finite & ~calibrating
    choose = partial(jax.tree.map, partial(jnp.where, takes))
    skipped = state.progress._replace(skipped=state.progress.skipped + (~finite & ~calibrating))
    taken = state._replace(progress=progress, support=support, slots=slots, master=master, inner=inner)
    new_state = choose(taken, state._replace(progress=skipped))._replace(evidence=evidence)
    kept = jax.tree.map(lambda move: jnp.where(takes, move, jnp.array(NOTHING, move.dtype)), moves)
    scattered = zip(targets, places.scatter(support, kept), strict=True)
    return nothing_but(updates, {target.position: target.view.weight(dense) for target, dense in scattered}), new_state


def _weights(description: Description, targets: Sequence[ResolvedTarget], params: Any) -> list[Array]:
    """The targets' weights as matrices; an empty list if none are given and none are needed."""
    if params is not None:
        leaves = jax.tree.leaves(params, is_leaf=is_masked)
        return [target.view.matrices(leaves[target.position]) for target in targets]
    if description.inner is not None:
        raise ValueError(
            f"{description.name} with an inner optimizer needs params: call update(gradients, state, params)"
        )
    return []


def _calibrate(
    description: Description, evidence: Any, targets: Sequence[ResolvedTarget], places: Places, gradients: list[Array]
) -> tuple[Bool[Array, ""], Any, list[Array]]:
    """Whether this step only looks, the sums with its gradients, and the gradients to pick by."""
    if not description.calibration_steps:
        return jnp.zeros([], bool), (), gradients
    count, sums = evidence
    calibrating = count < description.calibration_steps
    finite = all_finite(gradients)
    counted = calibrating & finite
    old = leaves_of(targets, sums)
    added = [jnp.where(counted, s + g, s) for s, g in zip(old, gradients, strict=True)]
    means = [s / description.calibration_steps for s in added]
    return calibrating, (count + counted, places.spread(added)), means


def retention(
    gradients: list[Array], slot_gradients: Any, *, per_matrix: bool = True
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns how much of the gradients the slots retain.

    Args:
        gradients: dense, one stack of matrices per target.
        slot_gradients: the slots' share of them.
        per_matrix: whether the slots' leaves are one per target and start with its stack.

    Returns:
        ||masked g||^2 / ||g||^2 over all targets, and its mean over matrices (without matrices, the former again);
        1 where nothing is to be retained.
    """
    slots = jax.tree.leaves(slot_gradients)
    if not gradients or not slots:
        return jnp.ones([]), jnp.ones([])
    # In units of the largest entry: squares of large gradients would overflow.
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(g)).astype(jnp.float32) for g in gradients]))
    kept = [_energy(g, largest) for g in slots]
    whole = jnp.concatenate([_energy(g, largest) for g in gradients])
    share = ratio(sum(jnp.sum(k) for k in kept), jnp.sum(whole))
    return share, jnp.mean(ratio(jnp.concatenate(kept), whole)) if per_matrix else share


def _energy(entries: Array, unit: Float[Array, ""]) -> Float[Array, " stack"]:
    """Sum of squares of every matrix."""
    scaled = entries.reshape(entries.shape[0], -1).astype(jnp.float32) / jnp.where(unit == 0, 1, unit)
    return jnp.sum(jnp.square(scaled), axis=-1)


def ratio(part: Any, whole: Array) -> Array:
    """Returns part / whole, and 1 for 0 / 0."""
    return jnp.where(whole == 0, 1, part / jnp.where(whole == 0, 1, whole))


def advance(
    progress: Progress, picked: Bool[Array, ""], retention: Float[Array, ""], retention_mean: Float[Array, ""]
) -> Progress:
    """Returns the progress after a step that was taken, and that picked a support or did not."""
    return Progress(
        steps=optax.safe_increment(progress.steps),
        refreshes=progress.refreshes + picked,
        last_refresh=jnp.where(picked, progress.steps, progress.last_refresh),
        retention=retention,
        retention_mean=retention_mean,
        retention_at_refresh=jnp.where(picked, retention, progress.retention_at_refresh),
        skipped=progress.skipped,
    )


def carry_over(
    description: Description, places: Places, state: SubspaceState, due: Bool[Array, ""], support: Any, weights: Any
) -> SubspaceState:
    """Returns the state on the new support: moments and changes by the method's carry, masters with their units."""

    def refresh(state: SubspaceState) -> SubspaceState:
        moved = places.moved(state.support, support)
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, description.slot_dtype(w.dtype)), weights)
        inner = carry_inner_state(description.carry, description.inner, state.inner, zeros, moved)
        slots = state.slots
        if description.carry == "reset":
            slots = jax.tree.map(jnp.zeros_like, slots)
        elif description.carry == "coordinate":
            slots = _follow(slots, moved, 0.0)
        # A newcomer's master is NaN, which is not what its weight says: it adopts the weight.
        return state._replace(support=support, slots=slots, master=_follow(state.master, moved, jnp.nan), inner=inner)

    return jax.lax.cond(due, refresh, lambda state: state._replace(support=support), state)


def _follow(values: Any, moved: Any, newcomer: float) -> Any:
    """Slots that stay with their units; nodes without slots stay as they are."""
    return jax.tree.map(lambda v, m: v if is_masked(v) else m.follow(v, newcomer), values, moved, is_leaf=is_masked)


def move_slots(
    description: Description, state: SubspaceState, slot_gradients: Any, weights: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any, Any, Any]:
    """Returns one step of the inner optimizer: what to add to every slot's weight, slots, masters and inner state."""
    wide = jax.tree.map(lambda w: w.astype(description.master_dtype(w.dtype)), weights)
    master = jax.tree.map(
        lambda m, w, x: x if is_masked(m) else jnp.where(m.astype(w.dtype) == w, m, x),
        *(state.master, weights, wide),
        is_leaf=is_masked,
    )
    seen = {
        "zeros": lambda: jax.tree.map(jnp.zeros_like, wide),
        "change": lambda: state.slots,
        "weight": lambda: master,
    }[description.sees]()
    steps, inner = step_slots(description, state, slot_gradients, seen, extra_args)
    slots = jax.tree.map(jnp.add, state.slots, steps) if description.sees == "change" else state.slots
    if description.unmerged:  # the weights are to say what the slots say, however much of a step those round away
        steps = jax.tree.map(lambda new, old, x: _as_kept(new, x) - old.astype(x.dtype), slots, state.slots, wide)
    changes = jax.tree.map(lambda step, x: (step * description.scale).astype(x.dtype), steps, wide)
    new_master = jax.tree.map(
        lambda old, m, change: old if is_masked(old) else m + change, state.master, master, changes, is_leaf=is_masked
    )
    # Where a weight has a master, the update is the difference that lands on the rounded master.
    moves = jax.tree.map(
        lambda new, w, x, change: change if is_masked(new) else new.astype(w.dtype).astype(x.dtype) - x,
        *(new_master, weights, wide, changes),
        is_leaf=is_masked,
    )
    return moves, slots, new_master, inner


def _as_kept(slots: Array, like: Array) -> Array:
    """Slots in a wider dtype as they are once rounded to their own; XLA may drop a cast there and back."""
    kept = jnp.finfo(slots.dtype)
    return jax.lax.reduce_precision(slots.astype(like.dtype), kept.nexp, kept.nmant)


def step_slots(
    description: Description, state: SubspaceState, slot_gradients: Any, seen: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any]:
    """Returns what the inner optimizer says of the slots' gradients, and its new state.

    Args:
        description: the method.
        state: the state on the support that the gradients belong to.
        slot_gradients: gradients of the weights at the support.
        seen: what the inner optimizer gets as parameters, in the slots' dtype.
        extra_args: what else it gets.
    """
    gradients = jax.tree.map(lambda g, x: g.astype(x.dtype) * description.scale, slot_gradients, seen)
    assert description.inner is not None
    update = optax.with_extra_args_support(description.inner).update
    steps, inner = update(gradients, state.inner, seen, **extra_args)
    return at_rate(steps, description.learning_rate, state.progress.steps), inner
