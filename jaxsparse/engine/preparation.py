"""What a method must see of the data before the fused engine can run it: supports and first gradients."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import jax
import optax

from jaxsparse.common.errors import InputError
from jaxsparse.engine.backward import picks_in_backward
from jaxsparse.engine.calibration import LossFn, calibrate, collect_gradients, with_support
from jaxsparse.engine.description import Description, SubspaceTransformation
from jaxsparse.engine.fused import fuse
from jaxsparse.engine.low_rank import low_rank_engine
from jaxsparse.engine.low_rank_description import LowRank
from jaxsparse.engine.tuner import check_method
from jaxsparse.select.schedules import Once
from jaxsparse.subspaces.units import Coordinates

__all__ = ["EngineOf", "batches_to_see", "engine_of", "prepared", "waits_for"]

EngineOf = Literal["fused", "fused after calibration", "reference"]


def waits_for(description: Any, name: Literal["gradient", "activation"]) -> bool:
    """Whether a method picks units of matrices by a statistic that nobody has given it."""
    if not isinstance(description, Description) or description.given.get("support") is not None:
        return False
    return name in description.score.needs and not description.given.get(name)


def batches_to_see(method: SubspaceTransformation, params: Any = None) -> int:
    """Returns how many batches a method must see before the fused engine can run it.

    Args:
        method: what a constructor returned.
        params: the model's parameters, or their shapes; None: all targets have the method's own subspace.

    Returns:
        The method's `calibration_steps`; 1 where the first gradient picks and the backward pass cannot pick by it, or
        where activations pick; 0 where nothing is to be seen.

    Example:
        >>> import optax
        >>> import jaxsparse as js
        >>> batches_to_see(js.saft(optax.sgd(0.1), calibration_steps=3)), batches_to_see(js.lora(optax.sgd(0.1)))
        (3, 0)
    """
    description = method.description
    if isinstance(description, LowRank):
        start = description.start
        return start.calibration_steps if start is not None and start.gradients is None else 0
    if not isinstance(description, Description) or not isinstance(description.schedule, Once):
        return 0
    if waits_for(description, "activation"):
        return max(description.calibration_steps, 1)
    if description.calibration_steps or not picks_in_backward(description):
        return description.calibration_steps
    targets = [] if params is None else description.resolve(params)
    subspaces = {target.subspace for target in targets} or {description.subspace}
    return int(description.scope == "global" or not all(isinstance(own, Coordinates) for own in subspaces))


def prepared(
    loss_fn: LossFn, params: Any, batches: Iterable[Any], method: optax.GradientTransformation
) -> SubspaceTransformation:
    """Returns a method that has seen what it must see, by `js.calibrate` or `js.collect_gradients`.

    Args:
        loss_fn: (params, batch) -> loss, or (loss, aux).
        params: the parameters to start from.
        batches: the calibration set; every batch counts the same.
        method: what a constructor returned.

    Raises:
        InputError: there are no batches.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> loss_fn = lambda params, batch: jnp.sum(batch @ params["w"])
        >>> params, method = {"w": jnp.ones((2, 2))}, js.sift(optax.sgd(1.0), density=0.25, targets="w")
        >>> tuner = js.fuse(loss_fn, prepared(loss_fn, params, [jnp.array([[1.0, 2.0]])], method))
    """
    description = check_method(method).description
    if not isinstance(description, LowRank):
        return with_support(method, calibrate(loss_fn, params, batches, method))
    assert description.start is not None
    # On the host: they are looked at once, when factors start.
    gradients = jax.device_get(collect_gradients(loss_fn, params, batches, description.targets))
    return low_rank_engine(replace(description, start=replace(description.start, gradients=gradients)))


def engine_of(method: SubspaceTransformation) -> EngineOf:
    """Returns which engine can run a method, as far as its description shows; a model may still use weights oddly.

    Example:
        >>> import optax
        >>> import jaxsparse as js
        >>> engine_of(js.paca(optax.sgd(0.1))), engine_of(js.sift(optax.sgd(0.1), density=0.1))
        ('fused', 'fused after calibration')
    """
    sees = batches_to_see(method) > 0
    try:
        fuse(lambda params, batch: 0.0, _as_if_prepared(method) if sees else method)
    except InputError:
        return "reference"
    return "fused after calibration" if sees else "fused"


def _as_if_prepared(method: SubspaceTransformation) -> SubspaceTransformation:
    """The method with something in the place of what it has to see."""
    description = method.description
    if isinstance(description, LowRank):
        assert description.start is not None
        return low_rank_engine(replace(description, start=replace(description.start, gradients={})))
    return with_support(method, {})
