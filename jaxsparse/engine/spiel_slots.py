"""One matrix under SpIEL: its deltas take a step, and some of them are exchanged for other coordinates."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from jaxsparse.engine.places import NOTHING
from jaxsparse.engine.spiel_description import SM3, Adam, Candidates, Left, Matrix, Now, Spiel
from jaxsparse.kernels import gradient_topk

__all__ = ["Moved", "Seen", "step"]


class Seen(NamedTuple):
    """The candidates and their gradients at a step that watches them; at other steps the gradients are not read.

    Attributes:
        index: int32 flat indices, (k,); new ones where candidates are chosen.
        gradient: at least float32, (k,).
    """

    index: Any
    gradient: Any


class Moved(NamedTuple):
    """What a step does to a matrix.

    Attributes:
        index: int32 flat indices, (2 k,), distinct within the matrix; its size where there is nothing to move.
        before: the weights as they were.
        after: as they are to be.
        change: after - before in the deltas' dtype, -0.0 where nothing changes.
    """

    index: Any
    before: Any
    after: Any
    change: Any


Read = Callable[[Int[Array, "..."]], Num[Array, "..."]]


def step(
    method: Spiel,
    now: Now,
    shape: tuple[int, int],
    read: Read,
    old: Matrix,
    slot_gradient: Float[Array, " k"],
    seen: Seen | None,
) -> tuple[Matrix, Moved]:
    """Takes one step; what it makes is of the support's size, whatever the matrix's.

    Args:
        method: SpIEL, written down.
        now: what is due.
        shape: inputs and outputs of the matrix.
        read: from flat indices to the matrix's entries there, 0 for indices beyond it.
        old: the state of one matrix.
        slot_gradient: what the deltas train on: the support's gradient, clipped if it is to be.
        seen: of candidates that are watched; None where SM3's accumulators say what grows.

    Returns:
        The new state, and what becomes of the matrix.
    """
    size = shape[0] * shape[1]
    index = jnp.concatenate([old.support, old.left.index])
    before = read(index)
    weights = before[: old.support.size]
    # Where a weight is not what its delta says, somebody else has moved it: the delta adopts the weight.
    as_said = _tuned(old) == weights
    delta = jnp.where(as_said, old.delta, weights.astype(old.delta.dtype) - old.base.astype(old.delta.dtype))
    trained = _trained(method, now, old._replace(delta=delta), shape[1], slot_gradient)
    if seen is not None:
        trained = trained._replace(candidates=_watched(now, old.candidates, seen))
    nothing_left = jnp.full_like(old.left.index, size)
    settled = trained._replace(left=old.left._replace(index=nothing_left))
    new = jax.lax.cond(now.reselects, partial(_reselect, method, now, shape, read), lambda matrix: matrix, settled)

    # What is left goes back to its base, now and, where that missed it, once more at the next step.
    landed = jnp.where(new.left.index == old.support, old.base, _tuned(trained))
    after = jnp.concatenate([landed, old.left.base])
    wide = delta.dtype
    change = jnp.where(after == before, NOTHING, after.astype(wide) - before.astype(wide))
    return new, Moved(index, before, after, change)


def _tuned(matrix: Matrix) -> Array:
    """The weights at the support: base + delta, rounded to the weights' dtype."""
    return (matrix.base.astype(matrix.delta.dtype) + matrix.delta).astype(matrix.base.dtype)


def _trained(method: Spiel, now: Now, matrix: Matrix, out_size: int, gradient: Float[Array, " k"]) -> Matrix:
    """The deltas and the optimizer's state after a step of Adam or SM3."""
    optimizer: Any = matrix.optimizer
    if method.grow == "AG":
        age, b1, b2 = optimizer.age + 1, *_decays(method, gradient.dtype)
        mean = b1 * optimizer.mean + (1 - b1) * gradient
        square = b2 * optimizer.square + (1 - b2) * jnp.square(gradient)
        new: Any = Adam(age, mean, square)
        direction = mean / (1 - b1**age) / (jnp.sqrt(square / (1 - b2**age)) + method.epsilon)
    else:
        rows, columns = jnp.divmod(matrix.support, out_size)
        square = jnp.minimum(optimizer.inputs[rows], optimizer.outputs[columns]) + jnp.square(gradient)
        square = square.astype(gradient.dtype)
        new = SM3(optimizer.inputs.at[rows].max(square), optimizer.outputs.at[columns].max(square))
        direction = gradient / jnp.sqrt(square + method.epsilon)
    delta = matrix.delta - now.rate * (direction + method.weight_decay * matrix.delta)
    return _like(matrix._replace(delta=delta, optimizer=new), matrix)


def _like(values: Any, others: Any) -> Any:
    """Values in the dtypes of others."""
    return jax.tree.map(lambda value, other: value.astype(other.dtype), values, others)


def _decays(method: Spiel, dtype: Any) -> tuple[Array, Array]:
    """Adam's decays as arrays, so that 1 - b and 1 - b^age round alike."""
    return jnp.asarray(method.b1, dtype), jnp.asarray(method.b2, dtype)


def _watched(now: Now, old: Candidates, seen: Seen) -> Candidates:
    """The candidates with this step's gradient, if it is watched; the first accumulation step has chosen them."""
    gradient = jnp.where(now.watches, seen.gradient, 0)
    sums = [jnp.where(now.begins, 0, total) for total in (old.gradient, old.square)]
    return Candidates(seen.index, sums[0] + gradient, sums[1] + jnp.square(gradient))


class _Pool(NamedTuple):
    """What may grow, best first.

    Attributes:
        entry: flat indices, (k,).
        score: -inf for entries that may not grow.
        slot: the slot that holds the entry; k where none does.
        candidate: the entry's number among the candidates.
    """

    entry: Int[Array, " k"]
    score: Float[Array, " k"]
    slot: Int[Array, " k"]
    candidate: Int[Array, " k"]


def _watched_pool(matrix: Matrix, dropped: Bool[Array, " k"]) -> _Pool:
    """AG: the candidates by |sum of their gradients|, without the slots that survive."""
    entry, k = matrix.candidates.index, matrix.support.size
    slot = _slot_of(matrix.support, entry)
    survives = ~dropped.at[slot].get(mode="fill", fill_value=True)
    score, best = jax.lax.top_k(jnp.where(survives, -jnp.inf, jnp.abs(matrix.candidates.gradient)), k)
    return _Pool(entry[best], score, slot[best], best)


def _slot_of(support: Int[Array, " k"], entry: Int[Array, " n"]) -> Int[Array, " n"]:
    """The slot that holds each entry; k where none does."""
    order = jnp.argsort(support).astype(jnp.int32)
    place = jnp.searchsorted(support[order], entry)
    slot = order[jnp.minimum(place, support.size - 1)]
    return jnp.where(support[slot] == entry, slot, support.size)


def _approximated_pool(matrix: Matrix) -> _Pool:
    """MA: entries outside the support by the product of SM3's accumulators; its root, lest it underflow."""
    k = matrix.support.size
    score, entry = _best_outside(*jax.tree.map(jnp.sqrt, matrix.optimizer), matrix.support)
    return _Pool(entry, score, jnp.full_like(entry, k), jnp.arange(k))


# One matrix after the other: of all scores of a matrix, only a tile exists at a time.
@jax.custom_batching.sequential_vmap
def _best_outside(inputs: Array, outputs: Array, support: Array) -> tuple[Array, Array]:
    """The k largest products of an input's and an output's number outside a support of k entries, and where.

    -inf where there are fewer.
    """

    def score(tile: Array, first: Array) -> Array:
        place = support - first * outputs.size
        inside = jnp.where(place < 0, tile.size, place)
        return tile.reshape(-1).at[inside].set(-1, mode="drop").reshape(tile.shape)  # others are at least 0

    # The products are those of one token, whose features some hardware would round.
    with jax.default_matmul_precision("highest"):
        best = gradient_topk(inputs[None], outputs[None], support.size, score=score)
    entry = best.rows * outputs.size + best.columns
    return jnp.where(_slot_of(support, entry) < support.size, -jnp.inf, best.values), entry


def _reselect(method: Spiel, now: Now, shape: tuple[int, int], read: Read, matrix: Matrix) -> Matrix:
    """Exchanges the slots with the smallest deltas for as many of the best of the pool.

    What would be dropped and grown at once stays as it is. Where the pool has fewer entries, the larger of the deltas
    that would be dropped stay too.
    """
    k, drops = matrix.support.size, jnp.floor(matrix.support.size * now.share).astype(jnp.int32)
    by_size = jnp.argsort(jnp.abs(matrix.delta))
    rank = jnp.argsort(by_size)
    dropped = rank < drops
    pool = _watched_pool(matrix, dropped) if method.grow == "AG" else _approximated_pool(matrix)
    grows = (jnp.arange(k) < drops) & (pool.score > -jnp.inf)
    joins = grows & (pool.slot == k)
    leaves = dropped.at[jnp.where(grows, pool.slot, k)].set(False, mode="drop")
    # The first to leave makes room for the first to join, and so on, until there is nobody left to join.
    turn = jnp.cumsum(leaves[by_size])[rank] - 1
    leaves &= turn < jnp.sum(joins)
    joiner = jnp.argsort(~joins)[turn]
    entry = pool.entry[joiner]

    def exchange(values: Array, newcomers: Any) -> Array:
        return jnp.where(leaves, newcomers, values).astype(values.dtype)

    new = matrix._replace(
        support=exchange(matrix.support, entry),
        delta=exchange(matrix.delta, 0),
        base=exchange(matrix.base, read(entry)),
        left=Left(jnp.where(leaves, matrix.support, shape[0] * shape[1]), matrix.base),
    )
    if method.grow == "MA":
        return new
    age, old, seen, of = method.accumulation_steps, matrix.optimizer, matrix.candidates, pool.candidate[joiner]
    b1, b2 = _decays(method, old.mean.dtype)
    # So biased, a newcomer's moments are means of its gradients once Adam corrects them for its age.
    mean = exchange(old.mean, seen.gradient[of] / age * (1 - b1**age))
    square = exchange(old.square, seen.square[of] / age * (1 - b2**age))
    return new._replace(optimizer=Adam(exchange(old.age, age), mean, square))
