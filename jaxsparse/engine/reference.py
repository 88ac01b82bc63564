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
from jaxsparse.select.carry import carry_inner_state, follow_coordinate
from jaxsparse.select.schedules import Progress
from jaxsparse.select.topk import matrix_topk
from jaxsparse.subspaces.targets import ResolvedTarget, resolve_targets, tree_size

__all__ = ["SubspaceState", "reference_engine"]

# -0.0 is the number that changes nothing when it is added, +0.0 included; +0.0 would turn a frozen -0.0 to +0.0.
_NOTHING = -0.0


class SubspaceState(NamedTuple):
    """State of a subspace method; every tree mirrors the parameters, with `optax.MaskedNode` where nothing moves.

    Attributes:
        progress: step counts and retention.
        support: int32 (stack, k) flat indices of the free coordinates of each matrix; slot j holds the
            coordinate with the j-th largest score at the last refresh.
        master: (stack, k) values of the weights at the support in the slots' dtype, where that is wider than the
            weight's; `optax.MaskedNode` where the weight is its own master.
        inner: the inner optimizer's state, of slots' size; () without inner optimizer.
    """

    progress: Progress
    support: Any
    master: Any
    inner: Any


def reference_engine(description: Description) -> SubspaceTransformation:
    """Makes the optax transformation that runs a description on dense gradients.

    Args:
        description: the method.

    Returns:
        A transformation whose `init` takes the parameters and whose `update` takes dense gradients; `update`
        needs the parameters too if there is an inner optimizer.
    """
    return SubspaceTransformation(partial(_init, description), partial(_update, description), description)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _spread(targets: Sequence[ResolvedTarget], values: Sequence[Any], like: Any, total: int) -> Any:
    """Puts one value per target into a tree shaped `like` the parameters, MaskedNode everywhere else."""
    leaves: list[Any] = [optax.MaskedNode()] * total
    for target, value in zip(targets, values, strict=True):
        leaves[target.position] = value
    return jax.tree.unflatten(like, leaves)


def _collect(targets: Sequence[ResolvedTarget], tree: Any) -> list[Any]:
    """The inverse of `_spread`; by position, since NNX hands over trees of two kinds for the same parameters."""
    leaves = jax.tree.leaves(tree, is_leaf=_is_masked)
    return [leaves[target.position] for target in targets]


def _init(description: Description, params: Any) -> SubspaceState:
    targets = resolve_targets(params, description.targets)
    leaves, structure = jax.tree.flatten(params)
    spread = partial(_spread, targets, like=structure, total=len(leaves))
    counts = description.budget.counts(targets, tree_size(params))
    supports, slots, masters = [], [], []
    for target, count in zip(targets, counts, strict=True):
        weight_dtype = leaves[target.position].dtype
        support = description.subspace.empty_support(target.view, count)
        zeros = jnp.zeros(support.shape, description.slot_dtype(weight_dtype))
        supports.append(support)
        slots.append(zeros)
        masters.append(zeros if description.inner is not None and zeros.dtype != weight_dtype else optax.MaskedNode())
    inner = () if description.inner is None else description.inner.init(spread(slots))
    return SubspaceState(Progress.start(), spread(supports), spread(masters), inner)


def _update(
    description: Description, updates: Any, state: SubspaceState, params: Any = None, **extra_args: Any
) -> tuple[Any, SubspaceState]:
    targets = resolve_targets(updates, description.targets)
    leaves, structure = jax.tree.flatten(updates)
    spread = partial(_spread, like=jax.tree.structure(state.support, is_leaf=_is_masked), total=len(leaves))
    gradients = [target.view.matrices(leaves[target.position]) for target in targets]
    weights = _weights(description, targets, params)

    due = description.schedule.due(state.progress)
    old_supports = _collect(targets, state.support)
    supports = jax.lax.cond(due, partial(_select, description), lambda old, *_: old, old_supports, gradients, weights)
    slot_gradients = [description.subspace.gather(g, s) for g, s in zip(gradients, supports, strict=True)]
    progress = _advance(state.progress, due, *_retention(gradients, slot_gradients))

    if description.inner is None:
        moves, masters, inner = slot_gradients, state.master, state.inner
    else:
        dtypes = [description.slot_dtype(w.dtype) for w in weights]
        wide = [g.astype(dtype) for g, dtype in zip(slot_gradients, dtypes, strict=True)]
        # The inner optimizer sees a change of the weights that starts at zero in every step (GASDU, appendix F).
        zeros = spread(targets, [jnp.zeros_like(g) for g in wide])
        carried = _carry(description, state, due, spread(targets, supports), zeros)
        steps, inner = description.inner.update(spread(targets, wide), carried.inner, zeros, **extra_args)
        slot_weights = [description.subspace.gather(w, s) for w, s in zip(weights, supports, strict=True)]
        commits = map(_commit, _collect(targets, steps), slot_weights, _collect(targets, carried.master))
        moves, new_masters = map(list, zip(*commits, strict=True)) if targets else ([], [])
        masters = spread(targets, new_masters)
    finite = jnp.array([jnp.isfinite(g).all() for g in slot_gradients], bool).all()
    new_state = SubspaceState(progress, spread(targets, supports), masters, inner)
    skipping = state._replace(progress=state.progress._replace(skipped=state.progress.skipped + 1))
    new_state = jax.tree.map(partial(jnp.where, finite), new_state, skipping)

    masked = [jnp.full_like(leaf, _NOTHING) for leaf in leaves]
    for target, support, move in zip(targets, supports, moves, strict=True):
        kept = jnp.where(finite, move, jnp.array(_NOTHING, move.dtype))
        dense = description.subspace.scatter(target.view, support, kept, fill=_NOTHING)
        masked[target.position] = target.view.weight(dense)
    return jax.tree.unflatten(structure, masked), new_state


def _weights(description: Description, targets: Sequence[ResolvedTarget], params: Any) -> list[Array]:
    """The targets' weights as matrices; an empty list if none are given and none are needed."""
    if params is not None:
        leaves = jax.tree.leaves(params)
        return [target.view.matrices(leaves[target.position]) for target in targets]
    if description.inner is not None:
        raise ValueError(
            f"{description.name} with an inner optimizer needs params: call update(gradients, state, params)"
        )
    return []


def _select(
    description: Description, old_supports: list[Array], gradients: list[Array], weights: list[Array]
) -> list[Array]:
    """Picks a support of the old one's size for every matrix."""
    known_weights: Sequence[Array | None] = weights or [None] * len(gradients)
    scored = zip(gradients, known_weights, old_supports, strict=True)
    return [matrix_topk(description.score(gradient=g, weight=w), old.shape[-1]) for g, w, old in scored]


def _retention(gradients: list[Array], slot_gradients: list[Array]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """||masked g||^2 / ||g||^2 over all targets, and its mean over matrices; 1 where nothing is to be retained."""
    if not gradients:
        return jnp.ones([]), jnp.ones([])

    def energy(entries: Array) -> Float[Array, " stack"]:
        return jnp.sum(jnp.square(entries.reshape(entries.shape[0], -1).astype(jnp.float32)), axis=-1)

    kept = jnp.concatenate([energy(g) for g in slot_gradients])
    whole = jnp.concatenate([energy(g) for g in gradients])
    ratios = jnp.where(whole > 0, kept / jnp.where(whole > 0, whole, 1), 1)
    total = jnp.sum(whole)
    return jnp.where(total > 0, jnp.sum(kept) / jnp.where(total > 0, total, 1), 1), jnp.mean(ratios)


def _advance(
    progress: Progress, due: Bool[Array, ""], retention: Float[Array, ""], retention_mean: Float[Array, ""]
) -> Progress:
    """Progress after a step that was taken."""
    return Progress(
        steps=optax.safe_increment(progress.steps),
        refreshes=progress.refreshes + due,
        last_refresh=jnp.where(due, progress.steps, progress.last_refresh),
        retention=retention,
        retention_mean=retention_mean,
        retention_at_refresh=jnp.where(due, retention, progress.retention_at_refresh),
        skipped=progress.skipped,
    )


def _carry(
    description: Description, state: SubspaceState, due: Bool[Array, ""], supports: Any, zeros: Any
) -> SubspaceState:
    """The state on the new supports: moments by the method's carry, masters with their coordinates."""

    def refresh(state: SubspaceState) -> SubspaceState:
        inner = carry_inner_state(description.carry, description.inner, state.inner, zeros, state.support, supports)
        follow = partial(follow_coordinate, newcomer=jnp.nan)
        master = jax.tree.map(
            lambda master, *moved: master if _is_masked(master) else follow(master, *moved),
            *(state.master, state.support, supports),
            is_leaf=_is_masked,
        )
        return state._replace(support=supports, master=master, inner=inner)

    return jax.lax.cond(due, refresh, lambda state: state._replace(support=supports), state)


def _commit(step: Array, weight: Array, master: Any) -> tuple[Array, Any]:
    """The number to add to each slot's weight for a step of the inner optimizer, and the new masters."""
    if _is_masked(master):
        return step.astype(weight.dtype), master
    wide = weight.astype(master.dtype)
    # A weight that is not what its master rounds to was changed by someone else, or is new in the support.
    master = jnp.where(master.astype(weight.dtype) == weight, master, wide) + step
    return master.astype(weight.dtype).astype(master.dtype) - wide, master
