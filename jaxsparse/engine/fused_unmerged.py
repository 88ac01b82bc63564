"""Slots beside frozen weights in the fused engine: y = x W + x Delta, where Delta holds the slots and never exists.

The state is the reference engine's, without masters: weights are not written, so none need be kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxsparse.common.errors import InputError
from jaxsparse.engine.commit import commit_slots, read_slots
from jaxsparse.engine.description import Description
from jaxsparse.engine.fusible import first_support
from jaxsparse.engine.interpreter import followed
from jaxsparse.engine.micro_batches import mean_gradients
from jaxsparse.engine.own_delta import OwnDelta
from jaxsparse.engine.places import MatrixPlaces, leaves_of
from jaxsparse.engine.reference import SubspaceState, advance, fresh_state, step_slots
from jaxsparse.engine.slotted import INPUT, SlotRule, slotted
from jaxsparse.engine.tuner import StepMetrics, TunerState, step_metrics
from jaxsparse.engine.updates import all_finite
from jaxsparse.kernels import gather_matmul
from jaxsparse.select.scores import score_dtype
from jaxsparse.subspaces.targets import is_masked
from jaxsparse.subspaces.units import Coordinates, Neurons

__all__ = ["EntryOverlay", "FusedUnmergedTuner"]


@dataclass(frozen=True)
class EntryOverlay(SlotRule):
    """The term x Delta of single entries, by a sparse product.

    Slots: "support", int32 flat indices of one matrix, (k,), those beyond it for slots that are idle, or
    (k, neurons), every column the inputs of one neuron; "change", the entries of Delta, of that shape.

    Attributes:
        inputs: number of inputs of the matrix.
        outputs: number of its outputs.
    """

    inputs: int
    outputs: int
    overlay = True

    def gradients(self, slots: Any, left: Any, right: Any) -> Any:
        """Nothing: an overlay is differentiated by JAX."""
        raise NotImplementedError

    def term(self, slots: Any, values: Array, side: str) -> Float[Array, "tokens ..."]:
        """Returns x Delta, or of the transposed weight x Delta^T."""
        support, change = slots["support"], slots["change"]
        if side == INPUT and support.ndim == 2:
            return self._of_neurons(values, support, change)
        flat, entries = support.reshape(-1), change.reshape(-1)
        if side == INPUT:
            return gather_matmul(values, flat, entries, self.outputs)
        size = self.inputs * self.outputs
        across = jnp.where(flat < size, flat % self.outputs * self.inputs + flat // self.outputs, size)
        return gather_matmul(values, across, entries, self.inputs)

    def _of_neurons(self, values: Array, support: Array, change: Array) -> Array:
        product = gather_matmul(values, support // self.outputs, change)
        if support.shape[1] == self.outputs:
            return product
        neurons = support[0] % self.outputs
        whole = jnp.zeros((self.outputs, values.shape[0]), product.dtype)
        return whole.at[neurons].set(product.T, unique_indices=True).T


class FusedUnmergedTuner(OwnDelta):
    """Trains the slots of a method beside weights that it never writes; made by `js.fuse`.

    `step` is one jitted function that donates its state: keep no reference to an old state.

    Args:
        loss_fn: (params, batch) -> (loss, number of target tokens).
        description: the method, unmerged.
        accumulate: micro-batches per optimizer step.
    """

    def __init__(
        self, loss_fn: Callable[[Any, Any], tuple[Array, Array]], description: Description, accumulate: int
    ) -> None:
        self.loss_fn, self.description, self.accumulate = loss_fn, description, accumulate
        self.step = jax.jit(self._step, donate_argnums=0)
        self._merge = jax.jit(self._merged)  # one function for all calls of `params`: it compiles once

    def init(self, params: Any, *, donate: bool = False) -> TunerState:
        """Returns the state to start from, with all slots 0; supports are picked here.

        Args:
            params: the model's parameters.
            donate: let the first step take the parameters' memory; they cannot be used afterwards. By default
                they are copied.

        Raises:
            InputError: the slots of a target are not single entries, or the support waits for a gradient.
        """
        places = self._places(params)
        for target in places.targets:
            if not isinstance(target.subspace, Coordinates | Neurons):
                raise InputError(
                    f"{self.description.name}: unmerged=True is for single entries, js.subspaces.Coordinates or "
                    f"Neurons; {target.path} has {type(target.subspace).__name__}"
                )
        supports = [jnp.copy(support) for support in first_support(self.description, params)]
        leaves = leaves_of(places.targets, params)
        shapes = [
            jax.ShapeDtypeStruct(support.shape, leaf.dtype) for support, leaf in zip(supports, leaves, strict=True)
        ]
        state = fresh_state(self.description, places.spread(supports), places.spread(shapes))
        state = state._replace(master=places.spread([optax.MaskedNode() for _ in supports]))
        return TunerState(params if donate else jax.tree.map(jnp.copy, params), state)

    def params(self, state: TunerState) -> Any:
        """Returns the model's parameters with the slots merged in: added in at least float32, and rounded."""
        return self._merge(state.params, state.method)

    def _places(self, params: Any) -> MatrixPlaces:
        return MatrixPlaces(self.description.resolve(params), jax.tree.structure(params, is_leaf=is_masked))

    def _step(self, state: TunerState, batch: Any) -> tuple[TunerState, StepMetrics]:
        description, params, method = self.description, state.params, state.method
        places, due = self._places(params), description.schedule.due(method.progress)

        def loss_of(changes: list[Array], batch: Any) -> tuple[Array, Array]:
            return followed(self.loss_fn)(self._overlaid(places, params, method, changes), batch)

        loss, tokens, slopes = mean_gradients(loss_of, self._changes(places, method), batch, self.accumulate)
        gradients = places.spread(slopes)
        steps, inner = step_slots(description, method, gradients, method.slots, {})
        slots = jax.tree.map(jnp.add, method.slots, steps)

        finite = all_finite((gradients, slots))
        progress = advance(method.progress, due, method.progress.retention, method.progress.retention_mean)
        taken = method._replace(progress=progress, slots=slots, inner=inner)
        skipped = method.progress._replace(skipped=method.progress.skipped + 1)
        after = jax.tree.map(partial(jnp.where, finite), taken, method._replace(progress=skipped))
        metrics = step_metrics(loss, tokens, after.progress, due & finite, measures=False)
        return TunerState(params, after), metrics

    def _changes(self, places: MatrixPlaces, method: SubspaceState) -> list[Array]:
        """What the slots add to the weights, in at least float32: so are its gradients."""
        slots = leaves_of(places.targets, method.slots)
        return [slot.astype(score_dtype(slot.dtype)) * self.description.scale for slot in slots]

    def _overlaid(self, places: MatrixPlaces, params: Any, method: SubspaceState, changes: list[Array]) -> Any:
        leaves, structure = jax.tree.flatten(params)
        supports = leaves_of(places.targets, method.support)
        for target, support, change in zip(places.targets, supports, changes, strict=True):
            rule = EntryOverlay(target.view.in_size, target.view.out_size)
            slots = {"support": support, "change": change}
            leaves[target.position] = slotted(leaves[target.position], target.view, slots, rule, target.path)
        return jax.tree.unflatten(structure, leaves)

    def _merged(self, params: Any, method: SubspaceState) -> Any:
        places, (leaves, structure) = self._places(params), jax.tree.flatten(params)
        supports = leaves_of(places.targets, method.support)
        for target, support, change in zip(places.targets, supports, self._changes(places, method), strict=True):
            leaf = leaves[target.position]
            old = read_slots(target.subspace, target.view, leaf, support)
            # Where nothing changes the weight keeps its bits.
            new = jnp.where(change != 0, (old + change).astype(leaf.dtype), old)
            leaves[target.position] = commit_slots(target.subspace, target.view, leaf, support, new)
        return jax.tree.unflatten(structure, leaves)
