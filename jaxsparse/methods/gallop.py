"""GaLLoP: large gradients on small weights."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxsparse.common.errors import InputError
from jaxsparse.engine.description import Description, Scope, SlotsDType, SubspaceTransformation
from jaxsparse.engine.reference import reference_engine
from jaxsparse.methods.mean_gradient import mean_gradient
from jaxsparse.select.scores import gradient_over_weight
from jaxsparse.subspaces.budgets import Budget
from jaxsparse.subspaces.targets import Targets
from jaxsparse.subspaces.units import Coordinates

__all__ = ["gallop"]


def gallop(
    inner: optax.GradientTransformation | None = None,
    *,
    density: float | None = None,
    budget: float | None = None,
    scope: Scope = "global",
    epsilon: float = 1e-8,
    calibration_steps: int = 1,
    gradients: Mapping[str, Any] | None = None,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Trains the entries whose mean gradient is largest in relation to the weight, picked once.

    .. math:: s = |\bar g| / (|W| + \epsilon), \quad \bar g = \text{mean of } \partial L / \partial W \text{ at } W_0

    The abstract says "the largest gradient magnitudes on downstream tasks and the smallest pre-trained magnitudes"; the
    quotient and epsilon come from secondary sources (METHODS.md).

    Args:
        inner: optimizer of the slots; it sees zeros as parameters.
        density: free coordinates / size of the targets. Give this or `budget`.
        budget: free coordinates / all parameters.
        scope: "global": entries compete over all targets; "matrix": inside each matrix.
        epsilon: keeps the quotient finite.
        calibration_steps: so many first updates change nothing; the mean of their gradients picks. The state then
            holds a dense sum, which `gradients` spare.
        gradients: mean gradients by parameter path, in place of calibration steps.
        targets: the weights that may move; None: the attention projections of a known model.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        seed: kept for the common signature; nothing is drawn.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: a value out of range, or neither calibration steps nor gradients.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.array([[1.0, 4.0], [0.5, 2.0]])}
        >>> tx = js.gallop(optax.sgd(1.0), density=0.25, gradients=params, targets="kernel", epsilon=1.0)
        >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"]
        Array([[1. , 3. ],
               [0.5, 2. ]], dtype=float32)
    """
    if not epsilon > 0:
        raise InputError(f"epsilon must be positive, got {epsilon}")
    return reference_engine(
        Description(
            name="gallop",
            inner=inner,
            subspace=Coordinates(Budget(density, budget, "proportional")),
            score=gradient_over_weight(epsilon),
            scope=scope,
            **mean_gradient("gallop", gradients, calibration_steps),
            targets=targets,
            slots_dtype=slots_dtype,
            seed=seed,
        )
    )
