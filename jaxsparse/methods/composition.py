"""Methods of one's own: the four choices in one expression."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxsparse.engine.description import Description, Scope, Sees, SlotsDType, SubspaceTransformation
from jaxsparse.engine.reference import reference_engine
from jaxsparse.select.carry import Carry
from jaxsparse.select.schedules import Once, Schedule
from jaxsparse.select.scores import Score
from jaxsparse.subspaces.targets import Targets
from jaxsparse.subspaces.units import Subspace

__all__ = ["subspace_descent"]


def subspace_descent(
    inner: optax.GradientTransformation | None = None,
    *,
    subspace: Subspace,
    score: Score,
    scope: Scope = "matrix",
    schedule: Schedule | None = None,
    carry: Carry = "slot",
    sees: Sees = "zeros",
    calibration_steps: int = 0,
    given: Mapping[str, Mapping[str, Any]] | None = None,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    unmerged: bool = False,
    seed: int | jax.Array = 0,
    name: str = "subspace_descent",
) -> SubspaceTransformation:
    """Trains the units of a subspace that a score picks: every method of this package is a call of this.

    Args:
        inner: optimizer of the slots; None: the transformation only masks gradients.
        subspace: where a weight may move: `js.subspaces.Coordinates`, `Neurons`, `Slices`, `CoupledSlices`,
            `Blocks`, `Everything`.
        score: which units are picked: one of `js.select`, or `js.select.Score` of your own.
        scope: whether units compete inside their matrix, or over all matrices ("global").
        schedule: when they are picked again: `js.select.Once()` (the default), `js.select.Every(M)`,
            `js.adaptive(...)`.
        carry: what then happens to the optimizer's moments: "slot", "coordinate" or "reset".
        sees: what the inner optimizer gets as parameters: "zeros", the "change" of the slots since they were
            picked, or the "weight" itself. Weight decay acts on that.
        calibration_steps: so many first updates change nothing; the mean of their gradients picks. The state then
            holds a dense sum.
        given: statistics by parameter path, in place of this step's: "gradient", "activation" (the 2-norm of every
            input), or "support", the units themselves.
        targets: the weights that may move; None: the attention projections of a known model.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        unmerged: whether the fused engine leaves weights alone while it trains and adds the product with the slots,
            which must be entries that hold a "change" and are picked once, to theirs.
        seed: of scores that draw.
        name: what errors and reports call the method.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: a value out of range; in `update`: the score needs something that is not at hand.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> product = js.select.Score(
        ...     "|g||W|", lambda entries: jnp.abs(entries.gradient * entries.weight), needs=("gradient", "weight")
        ... )
        >>> tx = js.subspace_descent(
        ...     optax.adam(1e-3), subspace=js.subspaces.Neurons(2), score=product, schedule=js.adaptive(0.8),
        ...     carry="coordinate", targets="kernel",
        ... )
        >>> tx.init({"kernel": jnp.ones((6, 4))}).support["kernel"].shape
        (1, 2, 4)
    """
    return reference_engine(
        Description(
            name=name,
            inner=inner,
            subspace=subspace,
            score=score,
            scope=scope,
            schedule=Once() if schedule is None else schedule,
            carry=carry,
            sees=sees,
            calibration_steps=calibration_steps,
            given=given or {},
            targets=targets,
            slots_dtype=slots_dtype,
            unmerged=unmerged,
            seed=seed,
        )
    )
