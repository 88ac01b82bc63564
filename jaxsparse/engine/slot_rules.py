"""Slots' gradients straight out of the backward pass: a rule for every subspace made of units."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsparse.engine.shard_selection import slots_in_shards
from jaxsparse.engine.sharding import Divided
from jaxsparse.engine.slotted import INPUT, SlotRule
from jaxsparse.kernels import gradient_topk, sampled_matmul, sketched_energy
from jaxsparse.select.scores import GRADIENT, Entries, Score
from jaxsparse.subspaces.units import Slices

__all__ = ["BlockSlots", "EntrySlots", "PickedSlots", "SliceSlots"]


@dataclass(frozen=True)
class EntrySlots(SlotRule):
    """Single entries: sampled products.

    Slots: "support", int32 flat indices of any shape, those beyond the matrix for slots that are idle; "probe", zeros
    of that shape.

    Attributes:
        outputs: number of outputs of the matrix.
        by_output: whether the support is (k, outputs), and slots of column o lie in output o, or are idle.
    """

    outputs: int
    by_output: bool = False

    def gradients(self, slots: Any, left: Array, right: Array) -> Any:
        """Returns sum_t x[t, row] dy[t, column] of every slot."""
        rows, columns = slots["support"] // self.outputs, slots["support"] % self.outputs
        places = jnp.minimum(rows, left.shape[1] - 1)
        found = sampled_matmul(left, right, places, None if self.by_output else columns)
        return {"support": None, "probe": jnp.where(rows < left.shape[1], found, 0)}


@dataclass(frozen=True)
class SliceSlots(SlotRule):
    """Whole slices: a small dense product with the chosen activations, or the chosen cotangents.

    Slots: "support", int32 (k,) numbers of slices or of groups of slices; "probe", zeros (k, ..., other side).

    Attributes:
        units: which slices.
    """

    units: Slices

    def keep(self, slots: Any, values: Array, side: str) -> Array:
        """Returns the chosen features of the sliced side, all of the other."""
        if (side == INPUT) != (self.units.axis == "input"):
            return values
        members = slots["support"][:, None] * self.units.group + jnp.arange(self.units.group, dtype=jnp.int32)
        return values[:, members.reshape(-1)]

    def gradients(self, slots: Any, left: Array, right: Array) -> Any:
        """Returns the slices of the gradient."""
        first, second = (left, right) if self.units.axis == "input" else (right, left)
        dtype = slots["probe"].dtype
        found = jax.lax.dot_general(first, second, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
        return {"support": None, "probe": found.reshape(slots["probe"].shape)}


@dataclass(frozen=True)
class BlockSlots(SlotRule):
    """Blocks: a small dense product for each.

    Slots: "support", int32 (k,) numbers of blocks, those beyond the last for slots that are idle; "probe", zeros
    (k, rows, columns).

    Attributes:
        blocks: number of blocks of the matrix.
        across: blocks side by side along the outputs.
    """

    blocks: int
    across: int

    def gradients(self, slots: Any, left: Array, right: Array) -> Any:
        """Returns the blocks of the gradient; what lies beyond the matrix is 0."""
        _, rows, columns = slots["probe"].shape
        dtype = slots["probe"].dtype
        left, right = (jnp.pad(a, ((0, 0), (0, -a.shape[1] % n))) for a, n in ((left, rows), (right, columns)))

        def block(number: Array) -> Array:
            band = jax.lax.dynamic_slice_in_dim(left, number // self.across * rows, rows, axis=1)
            other = jax.lax.dynamic_slice_in_dim(right, number % self.across * columns, columns, axis=1)
            found = jax.lax.dot_general(band, other, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
            return jnp.where(number < self.blocks, found, 0)

        return {"support": None, "probe": jax.lax.map(block, slots["support"])}


@dataclass(frozen=True)
class PickedSlots(SlotRule):
    """Entries that are picked again inside the backward pass, when that is due, by streaming over the gradient.

    Slots: "support" int32 (k,); "due" bool (); "weight" and "activation" for scores that look at them; "key", random
    bits for sketches of the energy; "probe", a dict of zeros: "value", "row", "column" (k,) and "energy" (). The
    cotangents of the probe are the gradients of the slots, where they lie, and the sum of squares of the whole
    gradient: exact if a support was picked, else an estimate if it is to be sketched, or 0. Rows and columns are exact
    below 2**24 in float32. Cotangents that say where must never be summed: see `check_used_once`.

    Attributes:
        outputs: number of outputs of the matrix.
        score: what is picked.
        sketches: whether the energy is estimated where nothing is picked.
        divided: how the matrix is divided between devices, if it is to be picked from by shards.
    """

    outputs: int
    score: Score
    sketches: bool
    divided: Divided | None = None

    def gradients(self, slots: Any, left: Array, right: Array) -> Any:
        """Returns values, places and energy."""
        if self.divided is not None:
            probe = self._in_shards(self.divided, slots, left, right)
        else:
            probe = jax.lax.cond(slots["due"], self._picked, self._sampled, slots["support"], slots, left, right)
        return {**dict.fromkeys(slots), "probe": probe}

    def _in_shards(self, divided: Divided, slots: Any, left: Array, right: Array) -> Any:
        found = slots_in_shards(divided, slots["due"], slots["support"], left, right)
        if self.sketches:
            sketched = sketched_energy(left, right, jax.random.wrap_key_data(slots["key"]))
            found["energy"] = jnp.where(slots["due"], found["energy"], sketched)
        return {name: array.astype(slots["probe"][name].dtype) for name, array in found.items()}

    def _picked(self, support: Array, slots: Any, left: Array, right: Array) -> Any:
        score = None if self.score == GRADIENT else self._tile_score(slots)
        best = gradient_topk(left, right, support.shape[0], score=score)
        return _as_probe(slots["probe"], best.values, best.rows, best.columns, best.squared_norm)

    def _sampled(self, support: Array, slots: Any, left: Array, right: Array) -> Any:
        rows, columns = support // self.outputs, support % self.outputs
        values = sampled_matmul(left, right, rows, columns)
        energy = jnp.zeros(())
        if self.sketches:
            energy = sketched_energy(left, right, jax.random.wrap_key_data(slots["key"]))
        return _as_probe(slots["probe"], values, rows, columns, energy)

    def _tile_score(self, slots: Any) -> Callable[[Array, Array], Array]:
        entries_score = self.score.entries
        assert entries_score is not None

        def score(tile: Array, first: Array) -> Array:
            def band(name: str) -> Array | None:
                if name not in slots:
                    return None
                rows = jnp.minimum(first + jnp.arange(tile.shape[0]), slots[name].shape[0] - 1)
                return slots[name][rows].astype(tile.dtype)

            scores = entries_score(Entries(tile, band("weight"), band("activation")))
            return scores if self.score.largest else -scores

        return score


def _as_probe(probe: Any, values: Array, rows: Array, columns: Array, energy: Array) -> Any:
    found = {"value": values, "row": rows, "column": columns, "energy": energy}
    return {name: found[name].astype(probe[name].dtype) for name in probe}
