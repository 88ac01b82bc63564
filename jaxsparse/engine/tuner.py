"""What trains a model: one jitted step from a batch to new weights; here by the reference engine."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxsparse.deltas.delta import Delta
from jaxsparse.engine.description import SubspaceTransformation
from jaxsparse.engine.micro_batches import mean_gradients
from jaxsparse.engine.own_delta import OwnDelta
from jaxsparse.select.schedules import Progress

__all__ = ["ReferenceTuner", "StepMetrics", "Tuner", "TunerState", "check_method", "step_metrics"]

LossFn = Callable[[Any, Any], tuple[Float[Array, ""], dict[str, Array]]]


class TunerState(NamedTuple):
    """What a training step reads and writes.

    Attributes:
        params: the model's parameters; the fused engine's low-rank methods keep the frozen weights here, and
            `tuner.params(state)` merges the factors in.
        method: the method's own state.
    """

    params: Any
    method: Any


class StepMetrics(NamedTuple):
    """What a training step reports, as arrays on the device.

    Attributes:
        loss: mean loss of the batch before the step.
        tokens: number of target tokens of the batch.
        retention: ||masked g||^2 / ||g||^2 over all targets (GASDU, equation 4). The reference engine measures it at
            every step. The fused engine sees the whole gradient only while it picks by it: between refreshes the last
            measurement stands (with `js.adaptive` an estimate), and a method that does not pick by this step's
            gradient gets NaN, "not measured". Low-rank methods retain 1.
        retention_mean: the mean of the same ratio over matrices.
        refreshed: whether this step picked a new support.
        skipped: steps left out so far because of a gradient that was not finite.
    """

    loss: Float[Array, ""]
    tokens: Float[Array, ""]
    retention: Float[Array, ""]
    retention_mean: Float[Array, ""]
    refreshed: Array
    skipped: Int[Array, ""]


def step_metrics(
    loss: Float[Array, ""], tokens: Float[Array, ""], progress: Progress, refreshed: Array, *, measures: bool
) -> StepMetrics:
    """Returns what a step of the fused engine reports.

    Args:
        loss: mean loss of the batch.
        tokens: target tokens of the batch.
        progress: after the step.
        refreshed: whether it picked a support.
        measures: whether the method's retention is measured at some steps at least.
    """
    retention, mean = (jnp.where(measures, share, jnp.nan) for share in (progress.retention, progress.retention_mean))
    return StepMetrics(loss, tokens, retention, mean, refreshed, progress.skipped)


@runtime_checkable
class Tuner(Protocol):
    """What trains a model, whichever engine it is."""

    @property
    def description(self) -> Any:
        """The method."""

    @property
    def step(self) -> Callable[[TunerState, Any], tuple[TunerState, StepMetrics]]:
        """From a state, which is donated, and a batch to the next state: one jitted function."""

    def init(self, params: Any, *, donate: bool = False) -> TunerState:
        """Returns the state to start from."""

    def params(self, state: TunerState) -> Any:
        """Returns the model's parameters."""

    def delta(
        self,
        state: TunerState,
        base: Any = None,
        *,
        options: Mapping[str, Any] | None = None,
        base_name: str | None = None,
        base_fingerprint: str | None = None,
    ) -> Delta:
        """Returns what training changed; see `OwnDelta`."""


def check_method(method: optax.GradientTransformation) -> SubspaceTransformation:
    """Returns a method that a tuner can train by.

    Raises:
        TypeError: `method` is no result of a constructor, or has no inner optimizer.
    """
    if not isinstance(method, SubspaceTransformation) or not method.description.trains:
        raise TypeError(
            "a tuner wants the result of a constructor with an inner optimizer, "
            "such as js.gasdu(optax.adam(1e-4), density=1e-4); clipping belongs inside: "
            "js.gasdu(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-4)), density=1e-4)"
        )
    return method


class ReferenceTuner(OwnDelta):
    """Trains a model by a method with dense gradients of the targets, and of nothing else.

    `step` is one jitted function that donates its state: keep no reference to an old state.

    Args:
        loss_fn: (params, batch) -> (mean loss, aux); `aux["tokens"]` is the number of target tokens and weighs
            micro-batches against each other.
        method: what a constructor returns, with an inner optimizer.
        accumulate: micro-batches per optimizer step; the leading axis of every array of a batch is split so.

    Raises:
        TypeError: `method` is no result of a constructor, or has no inner optimizer.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> def loss_fn(params, batch):
        ...     return jnp.mean((batch @ params["kernel"]) ** 2), {"tokens": jnp.array(2.0)}
        >>> tuner = ReferenceTuner(loss_fn, js.gasdu(optax.sgd(0.1), density=0.5, targets="kernel"))
        >>> state = tuner.init({"kernel": jnp.ones((3, 2))})
        >>> state, metrics = tuner.step(state, jnp.ones((2, 3)))
        >>> float(metrics.loss)
        9.0
    """

    def __init__(self, loss_fn: LossFn, method: SubspaceTransformation, *, accumulate: int = 1) -> None:
        self.loss_fn = loss_fn
        self.method = check_method(method)
        self.description = method.description
        self.accumulate = accumulate
        self.step = jax.jit(self._step, donate_argnums=0)

    def init(self, params: Any, *, donate: bool = False) -> TunerState:
        """Returns the state to start from.

        Args:
            params: the model's parameters.
            donate: let the first step take the parameters' memory; they cannot be used afterwards. By default
                they are copied.
        """
        start = params if donate else jax.tree.map(jnp.copy, params)
        return TunerState(start, jax.jit(self.method.init)(params))

    def params(self, state: TunerState) -> Any:
        """Returns the model's parameters."""
        return state.params

    def _step(self, state: TunerState, batch: Any) -> tuple[TunerState, StepMetrics]:
        leaves, structure = jax.tree.flatten(state.params)
        moving = self.method.description.moving(state.params)

        def loss_of(targets: list[Array], batch: Any) -> tuple[Array, Array]:
            loss, aux = self.loss_fn(jax.tree.unflatten(structure, _replace(leaves, moving, targets)), batch)
            return loss, aux["tokens"]

        targets = [leaves[at] for at in moving]
        loss, tokens, gradients = mean_gradients(loss_of, targets, batch, self.accumulate)
        # The method sees a whole tree; what it says of frozen weights is never computed, since nobody reads it.
        frozen = [jnp.zeros((), leaf.dtype) if at in moving else jnp.zeros_like(leaf) for at, leaf in enumerate(leaves)]
        updates, method = self.method.update(
            jax.tree.unflatten(structure, _replace(frozen, moving, gradients)), state.method, state.params
        )
        changes = [jax.tree.leaves(updates)[at] for at in moving]
        moved = [_add(leaves[at], change) for at, change in zip(moving, changes, strict=True)]
        progress = method.progress
        metrics = StepMetrics(
            loss=loss,
            tokens=tokens,
            retention=progress.retention,
            retention_mean=progress.retention_mean,
            refreshed=progress.refreshes > state.method.progress.refreshes,
            skipped=progress.skipped,
        )
        return TunerState(jax.tree.unflatten(structure, _replace(leaves, moving, moved)), method), metrics


def _add(weight: Array, change: Array) -> Array:
    """Adds an update as optax does, but where it is 0 the weight keeps its bits: some hardware flushes subnormals."""
    return jnp.where(change == 0, weight, (weight + change).astype(weight.dtype))


def _replace(leaves: list[Any], positions: list[int], values: list[Any]) -> list[Any]:
    """A copy of a list with some items exchanged."""
    replaced = list(leaves)
    for at, value in zip(positions, values, strict=True):
        replaced[at] = value
    return replaced
