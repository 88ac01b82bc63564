"""The fused engine: slots' gradients come out of the backward pass, and steps are written into the weights in place.

It runs the descriptions that the reference engine runs, on the same state; a dense gradient, update or copy of a
target never exists.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from jaxsparse.engine.backward import retained, sketches, slot_gradients
from jaxsparse.engine.commit import commit_moves, read_slots
from jaxsparse.engine.description import Description
from jaxsparse.engine.fused_layers import FusedLayersTuner
from jaxsparse.engine.fused_low_rank import FusedLowRankTuner
from jaxsparse.engine.fused_spiel import FusedSpielTuner
from jaxsparse.engine.fused_unmerged import FusedUnmergedTuner
from jaxsparse.engine.fusible import check_fusible, drawn_support, first_support
from jaxsparse.engine.layers import Layers
from jaxsparse.engine.low_rank_description import LowRank
from jaxsparse.engine.own_delta import OwnDelta
from jaxsparse.engine.places import MatrixPlaces, leaves_of
from jaxsparse.engine.reference import advance, carry_over, fresh_state, move_slots
from jaxsparse.engine.spiel_description import Spiel
from jaxsparse.engine.tuner import StepMetrics, TunerState, check_method, step_metrics
from jaxsparse.engine.updates import all_finite
from jaxsparse.subspaces.targets import is_masked
from jaxsparse.subspaces.units import Everything

__all__ = ["FusedTuner", "fuse"]

LossFn = Callable[[Any, Any], Any]


def fuse(
    loss_fn: LossFn, method: optax.GradientTransformation, *, has_aux: bool = False, accumulate: int = 1
) -> "FusedTuner | FusedLowRankTuner | FusedUnmergedTuner | FusedSpielTuner | FusedLayersTuner":
    """Runs a method at the cost its paper promises: dense gradients of its targets never exist.

    Args:
        loss_fn: (params, batch) -> loss, or with `has_aux` (loss, aux); any Flax, Equinox or plain JAX model.
        method: the result of a constructor with an inner optimizer.
        has_aux: whether the loss comes with auxiliary output. If that is a dict with "tokens", it weighs micro-batches
            against each other.
        accumulate: micro-batches per optimizer step; the leading axis of every array of a batch is split so. Supports
            are picked on the first.

    Returns:
        The tuner.

    Raises:
        TypeError: `method` is no result of a constructor, or has no inner optimizer.
        InputError: the method runs in the reference engine only.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params["kernel"]) ** 2)
        >>> tuner = js.fuse(loss_fn, js.gasdu(optax.sgd(0.1), density=0.5, targets="kernel"))
        >>> state = tuner.init({"kernel": jnp.ones((3, 2))})
        >>> state, metrics = tuner.step(state, jnp.ones((2, 3)))
        >>> float(metrics.loss)
        9.0
        >>> tuner.params(state)["kernel"].shape
        (3, 2)
    """
    description, with_tokens = check_method(method).description, _with_tokens(loss_fn, has_aux)
    if isinstance(description, LowRank):
        return FusedLowRankTuner(with_tokens, description, accumulate)
    if isinstance(description, Spiel):
        return FusedSpielTuner(with_tokens, description, accumulate)
    if isinstance(description, Layers):
        return FusedLayersTuner(with_tokens, description, accumulate)
    tuner = FusedUnmergedTuner if description.unmerged else FusedTuner
    return tuner(with_tokens, check_fusible(description), accumulate)


class FusedTuner(OwnDelta):
    """Trains a model by a method; made by `js.fuse`.

    `step` is one jitted function that donates its state: keep no reference to an old state. It serves steps that pick a
    support and steps that do not: the choice lies inside the backward rule of each product, so that a plain step does
    not run what picks, and costs what forward and backward cost (experiments/step_cost.py). Nothing is compiled twice.

    Retentions are measured on steps that pick by the gradient, exactly. Between them the last ones stand, or with
    `js.adaptive` they are estimated from unbiased sketches of the gradients' norms. They are those of the first
    micro-batch.

    Args:
        loss_fn: (params, batch) -> (loss, number of target tokens).
        description: the method.
        accumulate: micro-batches per optimizer step.
    """

    def __init__(
        self, loss_fn: Callable[[Any, Any], tuple[Array, Array]], description: Description, accumulate: int
    ) -> None:
        self.loss_fn, self.description, self.accumulate = loss_fn, description, accumulate
        self.step = jax.jit(self._step, donate_argnums=0)

    def init(self, params: Any, *, donate: bool = False) -> TunerState:
        """Returns the state to start from; supports that do not wait for a gradient are picked here.

        Args:
            params: the model's parameters.
            donate: let the first step take the parameters' memory; they cannot be used afterwards. By default
                they are copied.
        """
        targets = self.description.resolve(params)
        places = MatrixPlaces(targets, jax.tree.structure(params, is_leaf=is_masked))
        supports = [jnp.copy(support) for support in first_support(self.description, params)]
        shapes = jax.eval_shape(partial(_read, targets), params, supports)
        state = fresh_state(self.description, places.spread(supports), places.spread(shapes))
        return TunerState(params if donate else jax.tree.map(jnp.copy, params), state)

    def params(self, state: TunerState) -> Any:
        """Returns the model's parameters."""
        return state.params

    def _step(self, state: TunerState, batch: Any) -> tuple[TunerState, StepMetrics]:
        description, method = self.description, state.method
        targets = description.resolve(state.params)
        places = MatrixPlaces(targets, jax.tree.structure(method.support, is_leaf=is_masked))
        due = description.schedule.due(method.progress)
        supports = leaves_of(targets, drawn_support(description, places, method, due))
        backward = slot_gradients(
            *(self.loss_fn, description, targets, state.params, supports, due, batch),
            micro_batches=self.accumulate,
            step=method.progress.steps,
        )
        support, gradients = places.spread(backward.supports), places.spread(backward.gradients)
        weights = places.spread(jax.lax.optimization_barrier(_read(targets, state.params, backward.supports)))
        carried = carry_over(description, places, method, due, support, weights)
        moves, slots, master, inner = move_slots(description, carried, gradients, weights, {})

        finite = all_finite((gradients, moves))
        progress = advance(method.progress, due, *retained(method.progress, backward, due | sketches(description)))
        taken = method._replace(progress=progress, support=support, slots=slots, master=master, inner=inner)
        skipped = method.progress._replace(skipped=method.progress.skipped + 1)
        after = jax.tree.map(partial(jnp.where, finite), taken, method._replace(progress=skipped))

        leaves, structure = jax.tree.flatten(state.params)
        own, moved = leaves_of(targets, weights), leaves_of(targets, moves)
        commit_moves(targets, leaves, backward.supports, own, moved, finite)
        measured = backward.energies is not None or all(isinstance(t.subspace, Everything) for t in targets)
        metrics = step_metrics(backward.loss, backward.tokens, after.progress, due & finite, measures=measured)
        return TunerState(jax.tree.unflatten(structure, leaves), after), metrics


def _with_tokens(loss_fn: LossFn, has_aux: bool) -> LossFn:
    """The loss as (loss, number of target tokens); 1 where nobody says how many."""

    def with_tokens(params: Any, batch: Any) -> tuple[Array, Array]:
        loss, aux = loss_fn(params, batch) if has_aux else (loss_fn(params, batch), None)
        tokens = aux["tokens"] if isinstance(aux, dict) and "tokens" in aux else 1
        return loss, jnp.asarray(tokens, jnp.float32)

    return with_tokens


def _read(targets: Any, params: Any, supports: Any) -> list[Array]:
    leaves = jax.tree.leaves(params)
    return [
        read_slots(target.subspace, target.view, leaves[target.position], support)
        for target, support in zip(targets, supports, strict=True)
    ]
