"""Layers that are drawn, in the fused engine: gradients of those that sleep are neither computed nor stored.

The state is the reference engine's. Weights outside the stack, and what a layer has besides matrices, are
differentiated as JAX does it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxsparse.common.errors import InputError
from jaxsparse.engine.backward import Backward, mean_backward
from jaxsparse.engine.commit import commit_moves, read_slots
from jaxsparse.engine.description import Description
from jaxsparse.engine.fusible import drawn_support
from jaxsparse.engine.interpreter import followed
from jaxsparse.engine.layers import Layers, LayersState, layers_engine
from jaxsparse.engine.own_delta import OwnDelta
from jaxsparse.engine.places import MatrixPlaces, leaves_of
from jaxsparse.engine.reference import SubspaceState, advance, carry_over, move_slots
from jaxsparse.engine.slotted import INPUT, SlotRule, slotted
from jaxsparse.engine.tuner import StepMetrics, TunerState, step_metrics
from jaxsparse.engine.updates import all_finite
from jaxsparse.select.schedules import Progress
from jaxsparse.select.scores import score_dtype
from jaxsparse.subspaces.targets import MatrixView, ResolvedTarget, is_masked, resolve_targets

__all__ = ["FusedLayersTuner"]


@dataclass(frozen=True, eq=False)
class _AwakeSlots(SlotRule):
    """A matrix whose gradient the backward pass adds to sums that all layers share, if the layer is awake.

    As a cotangent of the layers it would be stacked over all of them, or would pass through memory in each of them.

    Slots: "slot", int32 (), the layer's place in the sums, beyond them for layers that sleep; "probe", zero, (), which
    the loss is differentiated with respect to so that there is a backward pass.

    Attributes:
        sums: a `jax.Ref` of (drawn, in, out).
    """

    sums: Any
    overlay = True

    def gradients(self, slots: Any, left: Any, right: Any) -> Any:
        """Nothing: an overlay is differentiated by JAX."""
        raise NotImplementedError

    def term(self, slots: Any, values: Float[Array, "tokens features"], side: str) -> Float[Array, "tokens ..."]:
        """Returns zeros, whose derivative adds up the gradient."""
        return _nothing(side, self.sums, slots["slot"], slots["probe"], values)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nothing(side: str, sums: Any, slot: Int[Array, ""], probe: Float[Array, ""], values: Array) -> Array:
    return jnp.zeros((values.shape[0], sums.shape[2 if side == INPUT else 1]), values.dtype)


def _nothing_forward(side: str, sums: Any, slot: Array, probe: Array, values: Array) -> tuple[Array, Any]:
    return _nothing(side, sums, slot, probe, values), (sums, slot, probe, values)


def _nothing_backward(side: str, residuals: Any, cotangent: Array) -> Any:
    sums, slot, probe, values = residuals
    left, right = (values, cotangent) if side == INPUT else (cotangent, values)

    def add() -> None:
        found = jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=sums.dtype)
        sums[slot] += found

    jax.lax.cond(slot < sums.shape[0], add, lambda: None)
    return None, None, jnp.zeros_like(probe), jnp.zeros_like(values)


_nothing.defvjp(_nothing_forward, _nothing_backward)


class _Part(NamedTuple):
    """The weights outside the stack, or those of the layers.

    Attributes:
        description: how they train.
        places: where their slots lie.
        state: the state before the step.
        due: whether layers are drawn.
        support: what trains at this step, a tree.
    """

    description: Description
    places: MatrixPlaces
    state: SubspaceState
    due: Bool[Array, ""]
    support: Any

    @classmethod
    def of(cls, description: Description, tree: Any, state: SubspaceState) -> "_Part":
        """Returns the part of a tree of parameters that has `optax.MaskedNode` where a weight is not of it."""
        places = MatrixPlaces(description.resolve(tree), jax.tree.structure(tree, is_leaf=is_masked))
        due = description.schedule.due(state.progress)
        return cls(description, places, state, due, drawn_support(description, places, state, due))

    @property
    def supports(self) -> list[Array]:
        """The support of every target."""
        return leaves_of(self.places.targets, self.support)

    def read(self, leaves: list[Any]) -> list[Array]:
        """Returns the slots' weights."""
        pairs = zip(self.places.targets, self.supports, strict=True)
        return [read_slots(t.subspace, t.view, leaves[t.position], support) for t, support in pairs]

    def stepped(self, gradients: list[Array], weights: list[Array]) -> tuple[SubspaceState, list[Array]]:
        """Returns the state after a step, and what to add to the slots' weights."""
        tree, slopes = self.places.spread(weights), self.places.spread(gradients)
        carried = carry_over(self.description, self.places, self.state, self.due, self.support, tree)
        moves, slots, master, inner = move_slots(self.description, carried, slopes, tree, {})
        progress = _advanced(self.state.progress, self.due)
        after = self.state._replace(progress=progress, support=self.support, slots=slots, master=master, inner=inner)
        return after, leaves_of(self.places.targets, moves)


def _advanced(progress: Progress, due: Array) -> Progress:
    return advance(progress, due, progress.retention, progress.retention_mean)


class FusedLayersTuner(OwnDelta):
    """Trains a model by a method that draws layers; made by `js.fuse`.

    Retention is not measured: it takes the gradients of all layers.

    Args:
        loss_fn: (params, batch) -> (loss, number of target tokens).
        description: the method.
        accumulate: micro-batches per optimizer step.
    """

    def __init__(
        self, loss_fn: Callable[[Any, Any], tuple[Array, Array]], description: Layers, accumulate: int
    ) -> None:
        self.loss_fn, self.description, self.accumulate = loss_fn, description, accumulate
        self.step = jax.jit(self._step, donate_argnums=0)

    def init(self, params: Any, *, donate: bool = False) -> TunerState:
        """Returns the state to start from.

        Args:
            params: the model's parameters.
            donate: let the first step take the parameters' memory; they cannot be used afterwards. By default
                they are copied.

        Raises:
            InputError: layers do not lie on the first axis of one array.
        """
        apart = [kind for kind in self.description.find(params).kinds if len(kind) > 1]
        if apart:
            paths = {target.position: target.path for target in self._resolved(params)}
            raise InputError(
                f"{self.description.name}: the fused engine draws layers that lie on the first axis of one array, and "
                f"{paths[apart[0][0]]} is of one layer; stack the layers, or use js.ReferenceTuner"
            )
        start = params if donate else jax.tree.map(jnp.copy, params)
        return TunerState(start, jax.jit(layers_engine(self.description).init)(params))

    def params(self, state: TunerState) -> Any:
        """Returns the model's parameters."""
        return state.params

    def _step(self, state: TunerState, batch: Any) -> tuple[TunerState, StepMetrics]:
        description, method = self.description, state.method
        trees = description.find(state.params).split(state.params)
        outside = _Part.of(description.outside, trees[0], method.outside)
        drawn = _Part.of(description.drawn, trees[1], method.drawn)
        backward = mean_backward(
            partial(self._backward, state.params, outside, drawn), [], drawn.due, batch, self.accumulate
        )
        gradients = backward.gradients[: len(outside.supports)], backward.gradients[len(outside.supports) :]

        leaves, structure = jax.tree.flatten(state.params)
        parts = (outside, drawn)
        weights = [part.read(leaves) for part in parts]
        stepped = [part.stepped(g, w) for part, g, w in zip(parts, gradients, weights, strict=True)]
        finite = all_finite((gradients, [moves for _, moves in stepped]))
        progress = _advanced(method.progress, drawn.due)
        skipped = method.progress._replace(skipped=method.progress.skipped + 1)
        taken = LayersState(progress, *(after for after, _ in stepped))
        after = jax.tree.map(partial(jnp.where, finite), taken, method._replace(progress=skipped))
        for part, own, (_, moves) in zip(parts, weights, stepped, strict=True):
            commit_moves(part.places.targets, leaves, part.supports, own, moves, finite)
        metrics = step_metrics(backward.loss, backward.tokens, after.progress, drawn.due & finite, measures=False)
        return TunerState(jax.tree.unflatten(structure, leaves), after), metrics

    def _backward(self, params: Any, outside: _Part, drawn: _Part, _: list[Array], due: Array, batch: Any) -> Backward:
        """One backward pass: the slots' gradients of the weights outside the stack, then those of the layers."""
        leaves, structure = jax.tree.flatten(params)
        awake = drawn.supports[0][0]
        views = self._matrix_views(params, drawn)
        layers = leaves[drawn.places.targets[0].position].shape[0]
        slot = jnp.full(layers, awake.size, jnp.int32).at[awake].set(jnp.arange(awake.size, dtype=jnp.int32))
        sums = {
            at: jax.new_ref(jnp.zeros((awake.size, view.in_size, view.out_size), score_dtype(leaves[at].dtype)))
            for at, view in views.items()
        }
        paths = {target.position: target.path for target in drawn.places.targets}
        targets = [*outside.places.targets, *drawn.places.targets]
        dense = {target.position: leaves[target.position] for target in targets if target.position not in views}

        def loss_of(trained: dict[int, Array], probes: dict[int, Array]) -> tuple[Array, Array]:
            seen = [trained.get(at, leaf) for at, leaf in enumerate(leaves)]
            for at, view in views.items():
                slots = {"slot": slot, "probe": probes[at]}
                seen[at] = slotted(leaves[at], view, slots, _AwakeSlots(sums[at]), paths[at])
            return followed(self.loss_fn)(jax.tree.unflatten(structure, seen), batch)

        probes = {at: jnp.zeros(layers, jnp.float32) for at in views}
        (loss, tokens), (slopes, _) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)(dense, probes)
        found = outside.read([slopes.get(at) for at in range(len(leaves))])
        for target, support in zip(drawn.places.targets, drawn.supports, strict=True):
            at = target.position
            if at in views:
                found.append(_as_slots(target, views[at], sums[at][...]))
            else:
                found.append(read_slots(target.subspace, target.view, slopes[at], support))
        return Backward(loss, tokens, [], found, None)

    def _matrix_views(self, params: Any, drawn: _Part) -> dict[int, MatrixView]:
        """How the layers' matrices are read, by position; what is no matrix is left out."""
        named = {target.position: target.view for target in self._resolved(params)}
        views = {}
        for target in drawn.places.targets:
            shape, view = target.view.shape, named[target.position]
            if (
                len(shape) > 2 and view.layer_axes != 1
            ):  # nobody named the axes of a weight of more than one output axis
                view = MatrixView(shape, tuple(range(len(shape))), shape[0], shape[1], math.prod(shape[2:]), 1, 1)
            if len(shape) > 2:
                views[target.position] = view
        return views

    def _resolved(self, params: Any) -> list[ResolvedTarget]:
        return resolve_targets(params, self.description.targets, whole=True)


def _as_slots(target: ResolvedTarget, view: MatrixView, sums: Float[Array, "drawn in out"]) -> Array:
    """The gradient of the layers that are awake as slots of whole layers."""
    drawn, shape = sums.shape[0], (sums.shape[0], *view.shape[1:])
    gradient = replace(view, shape=shape, stack=drawn).weight(sums)
    group = target.view.in_size // view.shape[0]
    return target.subspace.cut(replace(target.view, shape=shape, in_size=drawn * group).matrices(gradient))
