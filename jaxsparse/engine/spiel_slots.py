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
    weights = flat[old.support]
    # Where a weight is not what its delta says, somebody else has moved it: the delta adopts the weight.
    as_said = _tuned(old) == weights
    delta = jnp.where(as_said, old.delta, weights.astype(old.delta.dtype) - old.base.astype(old.delta.dtype))
    trained = _trained(method, now, old._replace(delta=delta), gradient.shape[1], slot_gradient)
    if method.grow == "AG":
        watched = jax.lax.cond(now.watches, partial(_watch, now), lambda c, _: c, old.candidates, gradient.reshape(-1))
        trained = trained._replace(candidates=watched)
    nothing_left = jnp.full_like(old.left.index, flat.size)
    settled = trained._replace(left=old.left._replace(index=nothing_left))
    new = jax.lax.cond(now.reselects, partial(_reselect, method, now), lambda matrix, _: matrix, settled, flat)

    # What is left goes back to its base, now and, where that missed it, once more at the next step.
    landed = jnp.where(new.left.index == old.support, old.base, _tuned(trained))
    index = jnp.concatenate([old.support, old.left.index])
    before = flat.at[index].get(mode="fill", fill_value=0)
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
        age = optimizer.age + 1
        mean = method.b1 * optimizer.mean + (1 - method.b1) * gradient
        square = method.b2 * optimizer.square + (1 - method.b2) * jnp.square(gradient)
        denominator = jnp.sqrt(square / (1 - method.b2**age)) + method.epsilon
        new: Any = Adam(age, mean, square)
        direction = mean / (1 - method.b1**age) / denominator
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


def _watch(now: Now, old: Candidates, gradient: Float[Array, " size"]) -> Candidates:
    """The candidates with this step's gradient; the first accumulation step chooses them."""

    def choose(old: Candidates) -> Candidates:
        largest = jax.lax.top_k(jnp.abs(gradient), old.index.size)[1]
        return Candidates(largest, jnp.zeros_like(old.gradient), jnp.zeros_like(old.square))

    chosen = jax.lax.cond(now.begins, choose, lambda old: old, old)
    seen = gradient[chosen.index]
    return chosen._replace(gradient=chosen.gradient + seen, square=chosen.square + jnp.square(seen))


class _Pool(NamedTuple):
    """What may grow, best first.

    Attributes:
        entry: flat indices, (k,).
        score: -inf for entries that may not grow.
        slot: the slot that holds the entry; k where none does.
        source: number of the candidate.
    """

    entry: Int[Array, " k"]
    score: Float[Array, " k"]
    slot: Int[Array, " k"]
    source: Int[Array, " k"]


def _watched_pool(matrix: Matrix, dropped: Bool[Array, " k"]) -> _Pool:
    """AG: the candidates by |sum of their gradients|, without the slots that survive."""
    index, k = matrix.candidates.index, matrix.support.size
    by_index = jnp.argsort(matrix.support)
    nearest = jnp.minimum(jnp.searchsorted(matrix.support[by_index], index), k - 1)
    slot = by_index[nearest]
    held = matrix.support[slot] == index
    score = jnp.where(held & ~dropped[slot], -jnp.inf, jnp.abs(matrix.candidates.gradient))
    score, best = jax.lax.top_k(score, k)
    return _Pool(index[best], score, jnp.where(held, slot, k)[best], best)


def _approximated_pool(matrix: Matrix) -> _Pool:
    """MA: entries outside the support by the product of SM3's accumulators; its root, lest it underflow."""
    k = matrix.support.size
    score = jnp.sqrt(matrix.optimizer.inputs)[:, None] * jnp.sqrt(matrix.optimizer.outputs)
    score, index = jax.lax.top_k(score.reshape(-1).at[matrix.support].set(-jnp.inf), k)
    return _Pool(index, score, jnp.full_like(index, k), jnp.arange(k))


def _reselect(method: Spiel, now: Now, matrix: Matrix, weight: Float[Array, " size"]) -> Matrix:
    """Exchanges the slots with the smallest deltas for as many of the best of the pool.

    What would be dropped and grown at once stays as it is. Where the pool has fewer entries, the larger of the deltas
    that would be dropped stay too.
    """
    k = matrix.support.size
    numbers = jnp.arange(k)
    drops = jnp.floor(k * now.share).astype(jnp.int32)
    order = jnp.argsort(jnp.abs(matrix.delta))
    rank = jnp.zeros_like(order).at[order].set(numbers)
    dropped = rank < drops
    pool = _watched_pool(matrix, dropped) if method.grow == "AG" else _approximated_pool(matrix)
    grown = (numbers < drops) & (pool.score > -jnp.inf)
    stays = jnp.zeros(k, bool).at[jnp.where(grown, pool.slot, k)].set(True, mode="drop")
    leavers = jnp.argsort(jnp.where(dropped & ~stays, rank, k))
    joins = grown & (pool.slot == k)
    joiners = jnp.argsort(jnp.where(joins, numbers, k))
    exchanged = numbers < jnp.sum(joins)

    def exchange(values: Array, newcomers: Any) -> Array:
        """Values of slots, with newcomers' (in the pool's order) in place of leavers'."""
        put = jnp.where(exchanged, jnp.broadcast_to(newcomers, (k,))[joiners], values[leavers])
        return values.at[leavers].set(put.astype(values.dtype), unique_indices=True)

    new = matrix._replace(
        support=exchange(matrix.support, pool.entry),
        delta=exchange(matrix.delta, 0.0),
        base=exchange(matrix.base, weight[pool.entry]),
        left=Left(jnp.where(exchange(jnp.zeros(k, bool), True), matrix.support, weight.size), matrix.base),
    )
    if method.grow == "MA":
        return new
    age, seen = method.accumulation_steps, matrix.candidates
    # So biased, a newcomer's moments are means of its gradients once Adam corrects them for its age.
    mean, square = (
        total[pool.source] / age * (1 - decay**age)
        for total, decay in ((seen.gradient, method.b1), (seen.square, method.b2))
    )
    old = matrix.optimizer
    seeded = Adam(exchange(old.age, age), exchange(old.mean, mean), exchange(old.square, square))
    return new._replace(optimizer=seeded)
