"""Slots' gradients, and the picking of slots, where a product's matrix and tokens are divided between devices."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.engine.sharding import Divided
from jaxsparse.kernels import gradient_topk, sampled_matmul

__all__ = ["slots_in_shards"]


def slots_in_shards(
    divided: Divided,
    due: Bool[Array, ""],
    support: Int[Array, " k"],
    left: Float[Array, "tokens inputs"],
    right: Float[Array, "tokens outputs"],
) -> dict[str, Array]:
    """Returns the gradients of slots, where they lie, and the energy of the whole gradient if they were picked.

    Every device looks at its own part of the matrix. A tile of the gradient is summed over the devices that have other
    tokens, and is dropped by all; the whole gradient exists nowhere.

    Args:
        divided: how matrix and tokens are divided.
        due: whether slots are picked anew.
        support: flat indices of the slots in the whole matrix; divided between shards that pick their own.
        left: what went into the product.
        right: the cotangents of what came out.

    Returns:
        "value", "row", "column" and "energy".
    """

    def own(due: Array, support: Array, left: Array, right: Array) -> dict[str, Array]:
        pick = partial(_picked, divided, outputs=right_size)
        sample = partial(_sampled, divided, outputs=right_size)
        return jax.lax.cond(due, pick, sample, support, left, right)

    right_size = right.shape[1]
    slots = PartitionSpec(divided.owners or None)
    rows = divided.rows or None
    in_specs = (
        PartitionSpec(),
        slots,
        PartitionSpec(rows, divided.tensor_inputs or None),
        PartitionSpec(rows, divided.tensor_outputs or None),
    )
    out_specs = {"value": slots, "row": slots, "column": slots, "energy": PartitionSpec()}
    return divided.mapped(own, in_specs, out_specs)(due, support, left, right)


def _start(divided: Divided, left: Array, right: Array) -> tuple[Array, Array]:
    return divided.starts(divided.tensor_inputs, divided.tensor_outputs, (left.shape[1], right.shape[1]))


def _picked(divided: Divided, support: Array, left: Array, right: Array, *, outputs: int) -> dict[str, Array]:
    row, column = _start(divided, left, right)
    count = support.shape[0]
    # Where all shards compete, one may hold less than all of the answer.
    best = gradient_topk(left, right, min(count, left.shape[1] * right.shape[1]), summed_over=divided.rows)
    values, rows, columns = best.values, best.rows + row, best.columns + column
    if divided.tensor and not divided.per_shard:
        gather = partial(jax.lax.all_gather, axis_name=divided.tensor, tiled=True)
        values, index = _largest(gather(values), gather(rows * outputs + columns), count)
        rows, columns = index // outputs, index % outputs
    energy = jax.lax.psum(best.squared_norm, divided.tensor)
    return {"value": values, "row": rows, "column": columns, "energy": energy}


def _largest(values: Array, index: Array, count: int) -> tuple[Array, Array]:
    """The candidates that one device would have picked, in its order: ties to the lowest index, NaN first."""
    size = jnp.where(jnp.isnan(values), jnp.inf, jnp.abs(values))
    _, index, values = jax.lax.sort((-size, index, values), num_keys=2)
    return values[:count], index[:count]


def _sampled(divided: Divided, support: Array, left: Array, right: Array, *, outputs: int) -> dict[str, Any]:
    row, column = _start(divided, left, right)
    rows, columns = support // outputs, support % outputs
    own_rows, own_columns = rows - row, columns - column
    here = (own_rows >= 0) & (own_rows < left.shape[1]) & (own_columns >= 0) & (own_columns < right.shape[1])
    place = (jnp.where(here, numbers, 0) for numbers in (own_rows, own_columns))
    found = jnp.where(here, sampled_matmul(left, right, *place), 0)
    others = tuple(axis for axis in (*divided.rows, *divided.tensor) if axis not in divided.owners)
    energy = jnp.zeros((), found.dtype)
    return {"value": jax.lax.psum(found, others), "row": rows, "column": columns, "energy": energy}
