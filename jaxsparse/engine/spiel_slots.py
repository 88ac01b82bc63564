"""One matrix under SpIEL: its deltas take a step, and some of them are exchanged for other coordinates."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.engine.places import NOTHING
from jaxsparse.engine.spiel_description import SM3, Adam, Candidates, Left, Matrix, Now, Spiel

__all__ = ["step"]


def step(
    method: Spiel,
    now: Now,
    old: Matrix,
    weight: Float[Array, "in out"],
    gradient: Float[Array, "in out"],
    slot_gradient: Float[Array, " k"],
) -> tuple[Matrix, Float[Array, "in out"]]:
    """Takes one step.

    Args:
        method: SpIEL, written down.
        now: what is due.
        old: the state of one matrix.
        weight: the matrix.
        gradient: its dense gradient, which candidates are chosen by.
        slot_gradient: what the deltas train on: the support's gradient, clipped if it is to be.

    Returns:
        The new state, and what to add to the matrix.
    """
    flat = weight.reshape(-1)
    index = jnp.concatenate([old.support, old.left.index])
    before = flat.at[index].get(mode="fill", fill_value=0)
    weights = before[: old.support.size]
    # Where a weight is not what its delta says, somebody else has moved it: the delta adopts the weight.
    as_said = _tuned(old) == weights
    delta = jnp.where(as_said, old.delta, weights.astype(old.delta.dtype) - old.base.astype(old.delta.dtype))
    trained = _trained(method, now, old._replace(delta=delta), gradient.shape[1], slot_gradient)
    if method.grow == "AG":
        trained = trained._replace(candidates=_watched(now, old.candidates, gradient.reshape(-1)))
    nothing_left = jnp.full_like(old.left.index, flat.size)
    settled = trained._replace(left=old.left._replace(index=nothing_left))
    new = jax.lax.cond(now.reselects, partial(_reselect, method, now), lambda matrix, _: matrix, settled, flat)

    # What is left goes back to its base, now and, where that missed it, once more at the next step.
    landed = jnp.where(new.left.index == old.support, old.base, _tuned(trained))
    after = jnp.concatenate([landed, old.left.base])
    wide = delta.dtype
    changes = jnp.where(after == before, NOTHING, after.astype(wide) - before.astype(wide))
    move = jnp.full(flat.shape, NOTHING, wide).at[index].set(changes, mode="drop")
    return new, move.reshape(weight.shape)


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


def _watched(now: Now, old: Candidates, gradient: Float[Array, " size"]) -> Candidates:
    """The candidates with this step's gradient, if it is watched; the first accumulation step chooses them."""

    def choose(old: Candidates) -> Candidates:
        largest = jax.lax.top_k(jnp.abs(gradient), old.index.size)[1]
        return Candidates(largest, jnp.zeros_like(old.gradient), jnp.zeros_like(old.square))

    chosen = jax.lax.cond(now.begins, choose, lambda old: old, old)
    seen = jnp.where(now.watches, gradient[chosen.index], 0)
    return chosen._replace(gradient=chosen.gradient + seen, square=chosen.square + jnp.square(seen))


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


def _watched_pool(matrix: Matrix, dropped: Bool[Array, " k"], size: int) -> _Pool:
    """AG: the candidates by |sum of their gradients|, without the slots that survive."""
    entry, k = matrix.candidates.index, matrix.support.size
    slot_of = jnp.full(size, k, jnp.int32).at[matrix.support].set(jnp.arange(k, dtype=jnp.int32))
    slot = slot_of[entry]
    survives = ~dropped.at[slot].get(mode="fill", fill_value=True)
    score, best = jax.lax.top_k(jnp.where(survives, -jnp.inf, jnp.abs(matrix.candidates.gradient)), k)
    return _Pool(entry[best], score, slot[best], best)


def _approximated_pool(matrix: Matrix) -> _Pool:
    """MA: entries outside the support by the product of SM3's accumulators; its root, lest it underflow."""
    k = matrix.support.size
    score = jnp.sqrt(matrix.optimizer.inputs)[:, None] * jnp.sqrt(matrix.optimizer.outputs)
    score, entry = jax.lax.top_k(score.reshape(-1).at[matrix.support].set(-jnp.inf), k)
    return _Pool(entry, score, jnp.full_like(entry, k), jnp.arange(k))


def _reselect(method: Spiel, now: Now, matrix: Matrix, weight: Float[Array, " size"]) -> Matrix:
    """Exchanges the slots with the smallest deltas for as many of the best of the pool.

    What would be dropped and grown at once stays as it is. Where the pool has fewer entries, the larger of the deltas
    that would be dropped stay too.
    """
    k, drops = matrix.support.size, jnp.floor(matrix.support.size * now.share).astype(jnp.int32)
    by_size = jnp.argsort(jnp.abs(matrix.delta))
    rank = jnp.argsort(by_size)
    dropped = rank < drops
    pool = _watched_pool(matrix, dropped, weight.size) if method.grow == "AG" else _approximated_pool(matrix)
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
        base=exchange(matrix.base, weight[entry]),
        left=Left(jnp.where(leaves, matrix.support, weight.size), matrix.base),
    )
    if method.grow == "MA":
        return new
    age, old, seen, of = method.accumulation_steps, matrix.optimizer, matrix.candidates, pool.candidate[joiner]
    b1, b2 = _decays(method, old.mean.dtype)
    # So biased, a newcomer's moments are means of its gradients once Adam corrects them for its age.
    mean = exchange(old.mean, seen.gradient[of] / age * (1 - b1**age))
    square = exchange(old.square, seen.square[of] / age * (1 - b2**age))
    return new._replace(optimizer=Adam(exchange(old.age, age), mean, square))
