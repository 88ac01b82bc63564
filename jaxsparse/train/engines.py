"""Which engine runs a method, and what the method must see of the data before."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsparse.common.errors import InputError
from jaxsparse.data.batches import Batch
from jaxsparse.engine.description import SubspaceTransformation
from jaxsparse.engine.fused import fuse, is_divisible
from jaxsparse.engine.micro_batches import split_batch
from jaxsparse.engine.preparation import batches_to_see, prepared, waits_for
from jaxsparse.engine.sharding import Sharding
from jaxsparse.engine.slotted import UnsupportedUseError
from jaxsparse.engine.tuner import LossFn, ReferenceTuner, Tuner
from jaxsparse.train.config import Engine

__all__ = ["Choice", "choose_engine"]


class Choice(NamedTuple):
    """What is to run a method.

    Attributes:
        tuner: makes the steps.
        engine: which engine that is.
        notice: why it is not the engine asked for; None where it is.
    """

    tuner: Tuner
    engine: Engine
    notice: str | None


def choose_engine(
    wanted: Engine,
    loss_fn: LossFn,
    params: Any,
    method: SubspaceTransformation,
    first_batches: Callable[[], Iterator[Batch]],
    *,
    share_of_data: int,
    micro_batches: int = 1,
    sharding: Sharding | None = None,
) -> Choice:
    """Returns a tuner of the engine that is wanted, or of the reference engine where the fused one has no way.

    Args:
        wanted: the engine asked for.
        loss_fn: (params, batch) -> (loss, aux).
        params: the model's parameters.
        method: what trains it.
        first_batches: makes an iterator of the run's batches, from the first.
        share_of_data: batches to collect activations on.
        micro_batches: parts of a batch that exist at a time.
        sharding: how the parameters are divided between devices, if they are.

    Raises:
        InputError: the method cannot run on the model at all.
    """

    def seen(count: int) -> SubspaceTransformation:
        batches = first_batches()
        return prepared(_in_parts(loss_fn, micro_batches), params, [next(batches) for _ in range(count)], method)

    reads_activations = waits_for(method.description, "activation")
    notice = None
    if wanted == "fused":
        try:
            count = share_of_data if reads_activations else batches_to_see(method, params)
            ready = seen(count) if count else method
            told = sharding if is_divisible(ready.description) else None
            tuner = fuse(loss_fn, ready, has_aux=True, accumulate=micro_batches, sharding=told)
            # Traced once, and by the first step no more: a model may use a weight in a way that has no rule.
            jax.eval_shape(tuner.step, jax.eval_shape(tuner.init, params), next(first_batches()))
        except (InputError, UnsupportedUseError) as error:
            notice = f"running on the reference engine: {error}"
        else:
            return Choice(tuner, "fused", None)
    method = seen(share_of_data) if reads_activations else method
    jax.eval_shape(method.init, params)  # complains about what does not fit the model
    return Choice(ReferenceTuner(loss_fn, method, accumulate=micro_batches), "reference", notice)


def _in_parts(loss_fn: LossFn, parts: int) -> Callable[[Any, Any], Array]:
    """The loss of a batch, whose activations exist for one part of it at a time."""

    def part(params: Any, batch: Any) -> tuple[Array, Array]:
        loss, aux = loss_fn(params, batch)
        return loss * aux["tokens"], aux["tokens"]

    def mean(params: Any, batch: Any) -> Array:
        losses, tokens = jax.lax.map(jax.checkpoint(lambda one: part(params, one)), split_batch(batch, parts))
        return jnp.sum(losses) / jnp.maximum(jnp.sum(tokens), 1)

    return mean if parts > 1 else lambda params, batch: loss_fn(params, batch)[0]
