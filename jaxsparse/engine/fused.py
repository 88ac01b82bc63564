"""The fused engine: slots' gradients come out of the backward pass, and steps are written into the weights in place.

It runs the descriptions that the reference engine runs, on the same state; a dense gradient, update or copy of a
target never exists.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxsparse.common.errors import InputError
from jaxsparse.common.hosts import placed
from jaxsparse.engine.backward import picks_in_backward, retained, sketches, slot_gradients
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
from jaxsparse.engine.sharding import Divided, Sharding, shared_equally
from jaxsparse.engine.spiel_description import Spiel
from jaxsparse.engine.tuner import StepMetrics, TunerState, check_method, step_metrics
from jaxsparse.engine.updates import all_finite
from jaxsparse.select.scores import GRADIENT
from jaxsparse.subspaces.targets import ResolvedTarget, is_masked
from jaxsparse.subspaces.units import Everything

__all__ = ["FusedTuner", "fuse", "is_divisible"]

LossFn = Callable[[Any, Any], Any]


def fuse(
    loss_fn: LossFn,
    method: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    accumulate: int = 1,
    sharding: Sharding | None = None,
) -> "FusedTuner | FusedLowRankTuner | FusedUnmergedTuner | FusedSpielTuner | FusedLayersTuner":
    """Runs a method at the cost its paper promises: dense gradients of its targets never exist.

    Args:
        loss_fn: (params, batch) -> loss, or with `has_aux` (loss, aux); any Flax, Equinox or plain JAX model.
        method: the result of a constructor with an inner optimizer.
        has_aux: whether the loss comes with auxiliary output. If that is a dict with "tokens", it weighs micro-batches
            against each other.
        accumulate: micro-batches per optimizer step; the leading axis of every array of a batch is split so. Supports
            are picked on the first.
        sharding: how the model and its slots are divided between devices; None: as JAX sees fit.

    Returns:
        The tuner.

    Raises:
        TypeError: `method` is no result of a constructor, or has no inner optimizer.
        InputError: the method runs in the reference engine only, or cannot be divided.

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
    if sharding is not None:
        if not is_divisible(description):
            raise InputError(
                f"{description.name} cannot be told how to divide its state yet: give no sharding, and JAX follows "
                "that of the parameters"
            )
        return FusedTuner(with_tokens, check_fusible(description), accumulate, sharding)
    if isinstance(description, LowRank):
        return FusedLowRankTuner(with_tokens, description, accumulate)
    if isinstance(description, Spiel):
        return FusedSpielTuner(with_tokens, description, accumulate)
    if isinstance(description, Layers):
        return FusedLayersTuner(with_tokens, description, accumulate)
    tuner = FusedUnmergedTuner if description.unmerged else FusedTuner
    return tuner(with_tokens, check_fusible(description), accumulate)


def is_divisible(description: Any) -> bool:
    """Whether `fuse` can be told how the method's slots are to be divided between devices."""
    return isinstance(description, Description) and not description.unmerged


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
        sharding: how weights and slots are divided between devices.
    """

    def __init__(
        self,
        loss_fn: Callable[[Any, Any], tuple[Array, Array]],
        description: Description,
        accumulate: int,
        sharding: Sharding | None = None,
    ) -> None:
        self.loss_fn, self.description, self.accumulate, self.sharding = loss_fn, description, accumulate, sharding
        self.step = jax.jit(self._step, donate_argnums=0)

    def init(self, params: Any, *, donate: bool = False) -> TunerState:
        """Returns the state to start from; supports that do not wait for a gradient are picked here.

        Args:
            params: the model's parameters.
            donate: let the first step take the parameters' memory; they cannot be used afterwards. By default
                they are copied.
        """
        targets = self.description.resolve(params)
        divided = self._divided(targets)
        places = MatrixPlaces(targets, jax.tree.structure(params, is_leaf=is_masked))
        if self.sharding is not None:
            params = jax.tree.map(placed, params, self.sharding.of(params))
        supports = [jnp.copy(support) for support in first_support(self.description, params)]
        supports = [
            support if part is None else shared_equally(part, target.path, support)
            for part, target, support in zip(divided, targets, supports, strict=True)
        ]
        shapes = jax.eval_shape(partial(_read, targets, divided), params, supports)
        state = fresh_state(self.description, places.spread(supports), places.spread(shapes))
        made = TunerState(params if donate else jax.tree.map(jnp.copy, params), state)
        return made if self.sharding is None else self.placed(made)

    def placed(self, state: TunerState, put: Callable[[Any, Any], Any] = placed) -> TunerState:
        """Returns a state of which every array is where `sharding` says: weights divided, and slots with them.

        Args:
            state: a state, on whatever devices.
            put: moves an array to a sharding.
        """
        assert self.sharding is not None
        targets, method = self.description.resolve(state.params), state.method
        places = MatrixPlaces(targets, jax.tree.structure(method.support, is_leaf=is_masked))
        everywhere = NamedSharding(self.sharding.mesh, PartitionSpec())
        parts = self._divided(targets)
        of_supports = places.spread([everywhere if part is None else part.sharding_of_slots() for part in parts])
        of_slots = places.spread(
            [
                everywhere
                if part is None
                else part.sharding_of_whole()
                if isinstance(target.subspace, Everything)
                else part.sharding_of_slots()
                for target, part in zip(targets, parts, strict=True)
            ]
        )
        mirrored = {}
        for name in ("support", "slots", "master"):
            tree, where = getattr(method, name), of_supports if name == "support" else of_slots
            mirrored[name] = jax.tree.map(put, tree, where) if jax.tree.leaves(tree) else tree
        inner = optax.tree_utils.tree_map_params(
            self.description.inner,
            put,
            method.inner,
            of_slots,
            transform_non_params=lambda leaf: put(leaf, everywhere),
        )
        progress = jax.tree.map(lambda leaf: put(leaf, everywhere), method.progress)
        params = jax.tree.map(put, state.params, self.sharding.of(state.params))
        return TunerState(params, method._replace(progress=progress, inner=inner, **mirrored))

    def params(self, state: TunerState) -> Any:
        """Returns the model's parameters."""
        return state.params

    def _divided(self, targets: Sequence[ResolvedTarget]) -> list[Divided | None]:
        if self.sharding is None:
            return [None] * len(targets)
        picks = picks_in_backward(self.description) and self.description.score == GRADIENT
        return [self.sharding.divided(target, picks=picks) for target in targets]

    def _step(self, state: TunerState, batch: Any) -> tuple[TunerState, StepMetrics]:
        description, method = self.description, state.method
        targets = description.resolve(state.params)
        divided = self._divided(targets)
        places = MatrixPlaces(targets, jax.tree.structure(method.support, is_leaf=is_masked))
        due = description.schedule.due(method.progress)
        supports = leaves_of(targets, drawn_support(description, places, method, due))
        backward = slot_gradients(
            *(self.loss_fn, description, targets, state.params, supports, due, batch),
            micro_batches=self.accumulate,
            step=method.progress.steps,
            divided=divided,
        )
        support, gradients = places.spread(backward.supports), places.spread(backward.gradients)
        weights = places.spread(jax.lax.optimization_barrier(_read(targets, divided, state.params, backward.supports)))
        carried = carry_over(description, places, method, due, support, weights)
        moves, slots, master, inner = move_slots(description, carried, gradients, weights, {})

        finite = all_finite((gradients, moves))
        progress = advance(method.progress, due, *retained(method.progress, backward, due | sketches(description)))
        taken = method._replace(progress=progress, support=support, slots=slots, master=master, inner=inner)
        skipped = method.progress._replace(skipped=method.progress.skipped + 1)
        after = jax.tree.map(partial(jnp.where, finite), taken, method._replace(progress=skipped))

        leaves, structure = jax.tree.flatten(state.params)
        own, moved = leaves_of(targets, weights), leaves_of(targets, moves)
        commit_moves(targets, leaves, backward.supports, own, moved, finite, divided)
        measured = backward.energies is not None or all(isinstance(t.subspace, Everything) for t in targets)
        metrics = step_metrics(backward.loss, backward.tokens, after.progress, due & finite, measures=measured)
        result = TunerState(jax.tree.unflatten(structure, leaves), after)
        if self.sharding is not None:
            result = self.placed(result, jax.lax.with_sharding_constraint)
        return result, metrics


def _with_tokens(loss_fn: LossFn, has_aux: bool) -> LossFn:
    """The loss as (loss, number of target tokens); 1 where nobody says how many."""

    def with_tokens(params: Any, batch: Any) -> tuple[Array, Array]:
        loss, aux = loss_fn(params, batch) if has_aux else (loss_fn(params, batch), None)
        tokens = aux["tokens"] if isinstance(aux, dict) and "tokens" in aux else 1
        return loss, jnp.asarray(tokens, jnp.float32)

    return with_tokens


def _read(targets: Any, divided: Sequence[Divided | None], params: Any, supports: Any) -> list[Array]:
    leaves = jax.tree.leaves(params)
    return [
        read_slots(target.subspace, target.view, leaves[target.position], support, part)
        for target, support, part in zip(targets, supports, divided, strict=True)
    ]
