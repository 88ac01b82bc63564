"""SpIEL in the fused engine: gradients of slots and of candidates come out of the backward pass.

The state is the reference engine's, and so is what a step makes of it; weights are read at single entries and written
in place.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxsparse.engine.backward import Backward, Energies, mean_backward, micro_batch_shapes, retained
from jaxsparse.engine.commit import commit_slots
from jaxsparse.engine.interpreter import followed
from jaxsparse.engine.own_delta import OwnDelta
from jaxsparse.engine.places import MatrixPlaces
from jaxsparse.engine.reference import advance
from jaxsparse.engine.single_use import check_used_once
from jaxsparse.engine.slot_rules import EntrySlots
from jaxsparse.engine.slotted import SlotRule, slotted
from jaxsparse.engine.spiel import clipped, of_matrices, spiel_engine, state_of
from jaxsparse.engine.spiel_description import Matrix, Now, Spiel
from jaxsparse.engine.spiel_slots import Moved, Seen, step
from jaxsparse.engine.tuner import StepMetrics, TunerState, step_metrics
from jaxsparse.engine.updates import all_finite
from jaxsparse.kernels import gradient_topk, sampled_matmul
from jaxsparse.subspaces.targets import ResolvedTarget, is_masked
from jaxsparse.subspaces.units import Coordinates

__all__ = ["FusedSpielTuner"]

_SLEEP, _WATCH, _CHOOSE = range(3)
"""What becomes of the candidates at a step."""


@dataclass(frozen=True)
class _WatchedSlots(SlotRule):
    """Entries that train, and others that are watched; the latter are chosen inside the backward pass when it is time.

    Slots: "support" and "candidates", int32 (k,); "stage", int32 (); "probe", a dict of zeros: "slot", "value", "row",
    "column" (k,) and "energy" (). The cotangents of the probe are the gradients of the support; those of the
    candidates, 0 while nobody watches, and where they lie; and the sum of squares of the whole gradient, 0 if nothing
    was chosen. Rows and columns are exact below 2**24 in float32. Cotangents that say where must never be summed: see
    `check_used_once`.

    Attributes:
        outputs: number of outputs of the matrix.
    """

    outputs: int

    def gradients(self, slots: Any, left: Array, right: Array) -> Any:
        """Returns values, places and energy."""
        trained, watched = (jnp.divmod(slots[name], self.outputs) for name in ("support", "candidates"))
        probe = slots["probe"]

        def found(values: Array, rows: Array, columns: Array, energy: Array) -> dict[str, Array]:
            parts = {"value": values, "row": rows, "column": columns, "energy": energy}
            return {name: part.astype(probe[name].dtype) for name, part in parts.items()}

        def sleep(left: Array, right: Array) -> dict[str, Array]:
            return found(jnp.zeros(watched[0].shape), *watched, jnp.zeros(()))

        def watch(left: Array, right: Array) -> dict[str, Array]:
            return found(sampled_matmul(left, right, *watched), *watched, jnp.zeros(()))

        def choose(left: Array, right: Array) -> dict[str, Array]:
            best = gradient_topk(left, right, watched[0].size)
            return found(best.values, best.rows, best.columns, best.squared_norm)

        slot = sampled_matmul(left, right, *trained).astype(probe["slot"].dtype)
        seen = jax.lax.switch(slots["stage"], [sleep, watch, choose], left, right)
        return {**dict.fromkeys(slots), "probe": {"slot": slot, **seen}}


class FusedSpielTuner(OwnDelta):
    """Trains a model by SpIEL; made by `js.fuse`.

    Candidates are chosen on the first micro-batch, and watched on all. Retention is measured where they are chosen.

    Args:
        loss_fn: (params, batch) -> (loss, number of target tokens).
        description: the method.
        accumulate: micro-batches per optimizer step.
    """

    def __init__(self, loss_fn: Callable[[Any, Any], tuple[Array, Array]], description: Spiel, accumulate: int) -> None:
        self.loss_fn, self.description, self.accumulate = loss_fn, description, accumulate
        self.step = jax.jit(self._step, donate_argnums=0)

    def init(self, params: Any, *, donate: bool = False) -> TunerState:
        """Returns the state to start from.

        Args:
            params: the model's parameters.
            donate: let the first step take the parameters' memory; they cannot be used afterwards. By default
                they are copied.
        """
        start = params if donate else jax.tree.map(jnp.copy, params)
        return TunerState(start, jax.jit(spiel_engine(self.description).init)(params))

    def params(self, state: TunerState) -> Any:
        """Returns the model's parameters."""
        return state.params

    def _step(self, state: TunerState, batch: Any) -> tuple[TunerState, StepMetrics]:
        description, method = self.description, state.method
        targets = description.resolve(state.params)
        places = MatrixPlaces(targets, jax.tree.structure(method.support, is_leaf=is_masked))
        old, now = of_matrices(description, targets, method), description.now(method.progress.steps)
        backward, seen = self._backward(targets, state.params, old, now, batch)
        slopes = [gradient.astype(m.delta.dtype) for gradient, m in zip(backward.gradients, old, strict=True)]

        leaves, structure = jax.tree.flatten(state.params)
        new, moves = [], []
        for target, *one in zip(targets, old, clipped(description, slopes), seen, strict=True):
            known: list[Any] = one
            matrix, moved = _stepped(description, now, target, leaves[target.position], *known)
            new.append(matrix)
            moves.append(moved)
        learnt = [(matrix.delta, matrix.optimizer, matrix.candidates) for matrix in new]
        finite = all_finite((slopes, [moved.change for moved in moves], learnt))

        picked = now.reselects | (method.progress.steps == 0)
        progress = advance(method.progress, picked, *retained(method.progress, backward, now.begins))
        skipped = method.progress._replace(skipped=method.progress.skipped + 1)
        taken, kept = state_of(description, places, progress, new), method._replace(progress=skipped)
        after = jax.tree.map(partial(jnp.where, finite), taken, kept)
        for target, moved in zip(targets, moves, strict=True):
            # Where nothing moves the weight keeps its bits.
            values = jnp.where(finite & (moved.change != 0), moved.after, moved.before)
            leaves[target.position] = commit_slots(
                Coordinates(description.budget), target.view, leaves[target.position], moved.index, values
            )
        metrics = step_metrics(
            backward.loss, backward.tokens, after.progress, picked & finite, measures=backward.energies is not None
        )
        return TunerState(jax.tree.unflatten(structure, leaves), after), metrics

    def _backward(
        self, targets: Sequence[ResolvedTarget], params: Any, old: Sequence[Matrix], now: Now, batch: Any
    ) -> tuple[Backward, list[Seen | None]]:
        """What the backward pass finds of the support, and of every target's candidates if there are any."""
        watches = self.description.grow == "AG"
        if watches:
            check_used_once(self.loss_fn, params, micro_batch_shapes(batch, self.accumulate), targets)

        def one(candidates: list[Array], begins: Bool[Array, ""], batch: Any) -> Backward:
            def loss_of(probes: list[Any]) -> tuple[Array, Array]:
                wrapped = [
                    {"support": matrix.support, "probe": probe} for matrix, probe in zip(old, probes, strict=True)
                ]
                stage = jnp.where(begins, _CHOOSE, jnp.where(now.watches, _WATCH, _SLEEP)).astype(jnp.int32)
                for slots, index in zip(wrapped, candidates, strict=watches):
                    slots |= {"candidates": index, "stage": jnp.broadcast_to(stage, index.shape[:1])}
                return followed(self.loss_fn)(_wrapped(targets, params, wrapped), batch)

            probes = [_probe(matrix, watches) for matrix in old]
            (loss, tokens), found = jax.value_and_grad(loss_of, has_aux=True)(probes)
            if not watches:
                return Backward(loss, tokens, [], found, None)
            index = [
                (probe["row"].astype(jnp.int32) * target.view.out_size + probe["column"].astype(jnp.int32))
                for target, probe in zip(targets, found, strict=True)
            ]
            pairs: list[Any] = [(probe["slot"], probe["value"]) for probe in found]
            kept = [jnp.sum(jnp.square(probe["slot"]), axis=1) for probe in found]
            return Backward(loss, tokens, index, pairs, Energies(kept, [probe["energy"] for probe in found]))

        candidates = [matrix.candidates.index for matrix in old] if watches else []
        backward = mean_backward(one, candidates, now.begins, batch, self.accumulate)
        if not watches:
            return backward, [None] * len(targets)
        slots, values = zip(*backward.gradients, strict=True)
        seen: list[Seen | None] = [
            Seen(index, value.astype(matrix.delta.dtype))
            for index, value, matrix in zip(backward.supports, values, old, strict=True)
        ]
        return backward._replace(gradients=list(slots)), seen


def _wrapped(targets: Sequence[ResolvedTarget], params: Any, slots: list[dict[str, Any]]) -> Any:
    """The parameters as the model is to see them."""
    leaves, structure = jax.tree.flatten(params)
    for target, own in zip(targets, slots, strict=True):
        rule = _WatchedSlots if "candidates" in own else EntrySlots
        leaves[target.position] = slotted(
            leaves[target.position], target.view, own, rule(target.view.out_size), target.path
        )
    return jax.tree.unflatten(structure, leaves)


def _probe(matrix: Matrix, watches: bool) -> Any:
    """What the loss is differentiated with respect to, for one target."""
    zeros = jnp.zeros_like(matrix.delta)
    if not watches:
        return zeros
    return {**dict.fromkeys(("slot", "value", "row", "column"), zeros), "energy": jnp.zeros_like(zeros[:, 0])}


def _stepped(
    method: Spiel,
    now: Now,
    target: ResolvedTarget,
    weight: Array,
    old: Matrix,
    slot_gradients: Array,
    seen: Seen | None,
) -> tuple[Matrix, Moved]:
    """A step of every matrix of a target."""
    view = target.view

    def one(flat: Array, *rest: Any) -> tuple[Matrix, Moved]:
        def read(index: Array) -> Array:
            return flat.at[view.place(index)].get(mode="fill", fill_value=0)

        return step(method, now, (view.in_size, view.out_size), read, *rest)

    return jax.vmap(one)(weight.reshape(view.stack, view.size), old, slot_gradients, seen)
