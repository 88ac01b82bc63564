"""SpIEL's engine: k deltas of every matrix against an untouched base, some of which are exchanged every S steps.

Like the reference engine it takes dense gradients and returns masked updates; what is dense lives within an update.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxsparse.engine.description import SubspaceTransformation
from jaxsparse.engine.places import NOTHING, MatrixPlaces, leaves_of
from jaxsparse.engine.reference import advance, retention
from jaxsparse.engine.spiel_description import SM3, Adam, Candidates, Left, Matrix, Now, Spiel
from jaxsparse.engine.spiel_slots import Seen, step
from jaxsparse.engine.updates import all_finite, nothing_but
from jaxsparse.select.schedules import Progress
from jaxsparse.select.scores import score_dtype
from jaxsparse.subspaces.targets import ResolvedTarget, is_masked

__all__ = ["SpielState", "clipped", "of_matrices", "spiel_engine", "state_of"]


class SpielState(NamedTuple):
    """State of SpIEL; every tree mirrors the parameters, with `optax.MaskedNode` where nothing moves.

    Attributes:
        progress: step counts and retention.
        support: int32 flat indices, (stack, k).
        delta: the change of every slot against its base, in at least float32.
        base: the weights at the support before SpIEL moved them, in their own dtype.
        optimizer: `Adam` or `SM3`, of trees.
        candidates: `Candidates`, of trees; () where SM3's accumulators say what grows.
        left: `Left`, of trees.
    """

    progress: Progress
    support: Any
    delta: Any
    base: Any
    optimizer: Any
    candidates: Any
    left: Any


def spiel_engine(method: Spiel) -> SubspaceTransformation:
    """Makes the optax transformation that runs SpIEL on dense gradients.

    Args:
        method: SpIEL, written down.

    Returns:
        A transformation with state `SpielState`; `update` needs the parameters.
    """
    return SubspaceTransformation(partial(_init, method), partial(_update, method), method)


def _init(method: Spiel, params: Any) -> SpielState:
    if not jax.tree.leaves(params):  # the placeholder of optax.tree.map_params stands for any tree
        return SpielState(Progress.start(), *jax.tree.unflatten(method.parts, [params] * method.parts.num_leaves))
    targets, key = method.resolve(params), jax.random.key(method.seed)
    places = MatrixPlaces(targets, jax.tree.structure(params, is_leaf=is_masked))
    weights = _matrices(targets, params)
    matrices = [
        _start(method, jax.random.fold_in(key, number), weight, count)
        for number, (weight, count) in enumerate(zip(weights, method.counts(params), strict=True))
    ]
    return state_of(method, places, Progress.start(), matrices)


def _matrices(targets: Sequence[ResolvedTarget], tree: Any) -> list[Array]:
    """The targets' leaves of a tree, as matrices."""
    return [target.view.matrices(leaf) for target, leaf in zip(targets, leaves_of(targets, tree), strict=True)]


def _start(method: Spiel, key: PRNGKeyArray, weight: Float[Array, "stack in out"], count: int) -> Matrix:
    """A random support of every matrix, with nothing learnt."""
    stack, in_size, out_size = weight.shape
    size, wide = in_size * out_size, score_dtype(weight.dtype)
    support = jax.lax.top_k(jax.random.uniform(key, (stack, size)), count)[1]

    def zeros(dtype: Any = wide, width: int = count) -> Array:
        return jnp.zeros((stack, width), dtype)

    base = jnp.take_along_axis(weight.reshape(stack, size), support, axis=1)
    left = Left(jnp.full((stack, count), size, jnp.int32), zeros(weight.dtype))
    if method.grow == "MA":
        return Matrix(support, zeros(), base, SM3(zeros(width=in_size), zeros(width=out_size)), (), left)
    adam, candidates = Adam(zeros(jnp.int32), zeros(), zeros()), Candidates(zeros(jnp.int32), zeros(), zeros())
    return Matrix(support, zeros(), base, adam, candidates, left)


def state_of(method: Spiel, places: MatrixPlaces, progress: Progress, matrices: Sequence[Matrix]) -> SpielState:
    """Returns the state with one tree for each part of the targets' states."""
    parts = [jax.tree.leaves(matrix) for matrix in matrices]
    trees = [places.spread([part[number] for part in parts]) for number in range(method.parts.num_leaves)]
    return SpielState(progress, *jax.tree.unflatten(method.parts, trees))


def of_matrices(method: Spiel, targets: Sequence[ResolvedTarget], state: SpielState) -> list[Matrix]:
    """Returns the state of every target; the inverse of `state_of`."""
    trees = method.parts.flatten_up_to(Matrix(*state[1:]))
    parts = zip(*(leaves_of(targets, tree) for tree in trees), strict=True)
    return [jax.tree.unflatten(method.parts, part) for part in parts]


def _update(
    method: Spiel, updates: Any, state: SpielState, params: Any = None, **extra_args: Any
) -> tuple[Any, SpielState]:
    if params is None:
        raise ValueError(f"{method.name} needs params: call update(gradients, state, params)")
    targets = method.resolve(updates)
    places = MatrixPlaces(targets, jax.tree.structure(state.support, is_leaf=is_masked))
    old = of_matrices(method, targets, state)
    dense = zip(_matrices(targets, updates), old, strict=True)
    gradients = [gradient.astype(matrix.delta.dtype) for gradient, matrix in dense]
    slot_gradients = _gather(gradients, old)
    now = method.now(state.progress.steps)
    slopes = clipped(method, slot_gradients)
    each = zip(old, _matrices(targets, params), gradients, slopes, strict=True)
    stepped = [jax.vmap(partial(_dense_step, method, now))(*one) for one in each]
    new, moves = [matrix for matrix, _ in stepped], [move for _, move in stepped]
    learnt = [(matrix.delta, matrix.optimizer, matrix.candidates) for matrix in new]
    finite = all_finite((slot_gradients, moves, learnt))

    picked = now.reselects | (state.progress.steps == 0)
    progress = advance(state.progress, picked, *retention(gradients, _gather(gradients, new)))
    skipped = state.progress._replace(skipped=state.progress.skipped + 1)
    new_state = jax.tree.map(
        partial(jnp.where, finite), state_of(method, places, progress, new), state._replace(progress=skipped)
    )
    changed = {
        target.position: target.view.weight(jnp.where(finite, move, NOTHING))
        for target, move in zip(targets, moves, strict=True)
    }
    return nothing_but(updates, changed), new_state


def clipped(method: Spiel, slot_gradients: list[Array]) -> list[Array]:
    """Returns what the deltas train on: the slots' gradients, clipped by their global norm if they are to be."""
    if method.clip is None:
        return slot_gradients
    return optax.clip_by_global_norm(method.clip).update(slot_gradients, optax.EmptyState())[0]


def _dense_step(
    method: Spiel,
    now: Now,
    old: Matrix,
    weight: Float[Array, "in out"],
    gradient: Float[Array, "in out"],
    slot_gradient: Float[Array, " k"],
) -> tuple[Matrix, Float[Array, "in out"]]:
    """One matrix's new state, and what to add to the matrix."""
    flat, slopes, seen = weight.reshape(-1), gradient.reshape(-1), None
    if method.grow == "AG":
        count = old.candidates.index.size
        index = jax.lax.cond(
            now.begins, lambda _: jax.lax.top_k(jnp.abs(slopes), count)[1], lambda index: index, old.candidates.index
        )
        seen = Seen(index, slopes[index])

    def read(index: Array) -> Array:
        return flat.at[index].get(mode="fill", fill_value=0)

    new, moved = step(method, now, (weight.shape[0], weight.shape[1]), read, old, slot_gradient, seen)
    move = jnp.full(flat.shape, NOTHING, moved.change.dtype).at[moved.index].set(moved.change, mode="drop")
    return new, move.reshape(weight.shape)


def _gather(gradients: Sequence[Array], matrices: Sequence[Matrix]) -> list[Array]:
    """The slots' gradients, (stack, k) for each target."""
    return [
        jnp.take_along_axis(gradient.reshape(gradient.shape[0], -1), matrix.support, axis=1)
        for gradient, matrix in zip(gradients, matrices, strict=True)
    ]
