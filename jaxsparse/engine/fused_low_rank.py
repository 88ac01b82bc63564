"""Low-rank methods in the fused engine: overlays on frozen weights, y = x W + s (x A) B, merged when a chain ends.

The state is the reference engine's. The weights do not move while a chain lasts: absorbed into narrow weights at every
step, most small steps would be lost.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsparse.common.errors import InputError
from jaxsparse.deltas.merge import factor_delta, merge_factors, plus_product
from jaxsparse.deltas.tensors import FactorDelta
from jaxsparse.engine.factors import Factors, over_norms, product
from jaxsparse.engine.interpreter import followed
from jaxsparse.engine.low_rank import LowRankState, advance_factors, begin_chain, given_gradient, move_factors
from jaxsparse.engine.low_rank_description import LowRank, of_targets
from jaxsparse.engine.micro_batches import mean_gradients
from jaxsparse.engine.own_delta import OwnDelta
from jaxsparse.engine.places import MatrixPlaces, leaves_of
from jaxsparse.engine.slotted import INPUT, SlotRule, slotted
from jaxsparse.engine.tuner import StepMetrics, TunerState
from jaxsparse.engine.updates import all_finite
from jaxsparse.select.schedules import Once, Progress
from jaxsparse.subspaces.targets import is_masked

__all__ = ["FusedLowRankTuner"]


@dataclass(frozen=True)
class _LowRankSlots(SlotRule):
    """The term s (x A) B, and for DoRA the factor m / c of every output.

    Slots: `Factors` of one matrix; with DoRA also "norms", those of the frozen weight's columns.

    Attributes:
        scale: s.
    """

    scale: float
    overlay = True

    def gradients(self, slots: Any, left: Any, right: Any) -> Any:
        """Nothing: an overlay is differentiated by JAX."""
        raise NotImplementedError

    def term(self, slots: Any, values: Array, side: str) -> Array:
        """Returns s (x A) B, or of the transposed weight s (x B^T) A^T."""
        first, second = (slots["a"], slots["b"]) if side == INPUT else (slots["b"].T, slots["a"].T)
        narrow = values.dtype
        return self.scale * ((values @ first.astype(narrow)) @ second.astype(narrow))

    def factor(self, slots: Any, added: Array) -> Array | None:
        """Returns m / c; c counts as constant (DoRA, section 4.3)."""
        gain = _gain(slots)
        return None if gain is None else gain[None]


def _gain(slots: Any) -> Array | None:
    """The factor m / c of every output; None where magnitudes do not train."""
    if "magnitude" not in slots:
        return None
    return over_norms(slots["magnitude"], jax.lax.stop_gradient(slots["norms"]))


class FusedLowRankTuner(OwnDelta):
    """Trains a model by a low-rank method; made by `js.fuse`.

    Args:
        loss_fn: (params, batch) -> (loss, number of target tokens).
        description: the method.
        accumulate: micro-batches per optimizer step.
    """

    def __init__(
        self, loss_fn: Callable[[Any, Any], tuple[Array, Array]], description: LowRank, accumulate: int
    ) -> None:
        start = description.start
        if start is not None and start.gradients is None:
            raise InputError(
                f"{description.name} starts from a dense gradient, of which the fused engine has none: give "
                "gradients=js.collect_gradients(loss_fn, params, batches, targets)"
            )
        self.loss_fn, self.description, self.accumulate = loss_fn, description, accumulate
        self.step = jax.jit(self._step, donate_argnums=0)

    def init(self, params: Any, *, donate: bool = False) -> TunerState:
        """Returns the state to start from.

        Args:
            params: the model's parameters.
            donate: let the first step take the parameters' memory; they cannot be used afterwards. By default
                they are copied.
        """
        description = self.description
        assert description.inner is not None
        places = self._places(params)
        factors = description.first(params)
        norms, inner = jax.tree.map(jnp.copy, factors.magnitude), description.inner.init(description.trained(factors))
        state = LowRankState(Progress.start(), factors, norms, inner, ())
        params = params if donate else jax.tree.map(jnp.copy, params)
        if description.start is not None:
            given = [given_gradient(description.start.gradients or {}, target) for target in places.targets]
            dtypes = [b.dtype for b in leaves_of(places.targets, factors.b)]
            means = [gradient.astype(dtype) for gradient, dtype in zip(given, dtypes, strict=True)]
            state = begin_chain(description, places, state, jnp.array(True), means)
            if description.start.offset:
                params = self._merged(params, state.factors, -1.0)
        return TunerState(params, state)

    def params(self, state: TunerState) -> Any:
        """Returns the model's parameters with the factors merged in."""
        places, leaves = self._places(state.params), jax.tree.leaves(state.params)
        for target, slots in zip(places.targets, self._slots(places, state.method), strict=True):
            leaves[target.position] = merge_factors(
                target.view, leaves[target.position], slots["a"], slots["b"], self.description.scale, _gain(slots)
            )
        return jax.tree.unflatten(jax.tree.structure(state.params), leaves)

    def factors(self, state: TunerState, tuned: Any) -> dict[str, FactorDelta]:
        """Returns the deltas of the targets, as factors; none where the frozen weights are not the base's."""
        description = self.description
        moved = description.start is not None and description.start.offset
        if moved or not isinstance(description.schedule, Once):
            return {}
        places, leaves, merged = self._places(state.params), jax.tree.leaves(state.params), jax.tree.leaves(tuned)
        found = {}
        for target, slots in zip(places.targets, self._slots(places, state.method), strict=True):
            found[target.path] = factor_delta(
                leaves[target.position],
                target.view,
                slots["a"],
                slots["b"],
                description.scale,
                _gain(slots),
                tuned=merged[target.position],
            )
        return found

    def _places(self, params: Any) -> MatrixPlaces:
        return MatrixPlaces(self.description.resolve(params), jax.tree.structure(params, is_leaf=is_masked))

    def _step(self, state: TunerState, batch: Any) -> tuple[TunerState, StepMetrics]:
        description, params, method = self.description, state.params, state.method
        places, due = self._places(params), description.schedule.due(method.progress)
        if not isinstance(description.schedule, Once):
            # What the chain learnt stays in the weights, whatever becomes of this step.
            begins = due & (method.progress.refreshes > 0)
            params = jax.lax.cond(begins, self._merged, lambda params, _: params, params, method.factors)
            method = begin_chain(description, places, method, due, [])

        def loss_of(trained: Factors, batch: Any) -> tuple[Array, Array]:
            factors = trained if description.trains_a else trained._replace(a=method.factors.a)
            return followed(self.loss_fn)(self._overlaid(places, params, method._replace(factors=factors)), batch)

        loss, tokens, slopes = mean_gradients(loss_of, description.trained(method.factors), batch, self.accumulate)
        factors, inner = move_factors(description, method, slopes, {})
        norms = self._norms(places, params, factors) if description.magnitude else method.norms
        finite = all_finite((slopes, factors))
        moved = method._replace(factors=factors, norms=norms, inner=inner)
        after = jax.tree.map(partial(jnp.where, finite), moved, method)
        progress = advance_factors(method.progress, finite, due, ~finite)
        ones = jnp.ones([])
        metrics = StepMetrics(loss, tokens, ones, ones, due, progress.skipped)
        return TunerState(params, after._replace(progress=progress)), metrics

    def _slots(self, places: MatrixPlaces, method: LowRankState) -> list[dict[str, Array]]:
        """What a target's rule reads, for every target."""
        norms = leaves_of(places.targets, method.norms)
        found = []
        for factors, c in zip(of_targets(places, method.factors), norms, strict=True):
            slots = {"a": factors.a, "b": factors.b}
            found.append(slots | {"magnitude": factors.magnitude, "norms": c} if self.description.magnitude else slots)
        return found

    def _overlaid(self, places: MatrixPlaces, params: Any, method: LowRankState) -> Any:
        leaves, structure = jax.tree.flatten(params)
        rule = _LowRankSlots(self.description.scale)
        for target, slots in zip(places.targets, self._slots(places, method), strict=True):
            leaves[target.position] = slotted(leaves[target.position], target.view, slots, rule, target.path)
        return jax.tree.unflatten(structure, leaves)

    def _merged(self, params: Any, factors: Factors, sign: float = 1.0) -> Any:
        """The parameters with s A B added to the targets."""
        places, leaves = self._places(params), jax.tree.leaves(params)
        for target, own in zip(places.targets, of_targets(places, factors), strict=True):
            scale = sign * self.description.scale
            leaves[target.position] = plus_product(target.view, leaves[target.position], own.a, own.b, scale)
        return jax.tree.unflatten(jax.tree.structure(params), leaves)

    def _norms(self, places: MatrixPlaces, params: Any, factors: Factors) -> Any:
        """The norms of the columns of V = W + s A B, by products no larger than A and B."""
        leaves, scale, norms = jax.tree.leaves(params), self.description.scale, []
        for target, (a, b, _) in zip(places.targets, of_targets(places, factors), strict=True):
            weight = target.view.matrices(leaves[target.position]).astype(b.dtype)
            shared = product(jnp.swapaxes(a, 1, 2), weight) + 0.5 * scale * product(
                product(jnp.swapaxes(a, 1, 2), a), b
            )
            squares = jnp.sum(jnp.square(weight), axis=1) + 2 * scale * jnp.sum(shared * b, axis=1)
            norms.append(jnp.sqrt(jnp.maximum(squares, 0)))
        return places.spread(norms)
