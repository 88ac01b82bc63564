"""GASDU: Gauss-Southwell-k dynamic update, and the fixed mask it is compared with."""

import jax
import optax

from jaxsparse.engine.description import Description, SlotsDType, SubspaceTransformation
from jaxsparse.engine.reference import reference_engine
from jaxsparse.select.carry import Carry
from jaxsparse.select.schedules import Once, RefreshEvery, refresh_schedule
from jaxsparse.select.scores import GRADIENT
from jaxsparse.subspaces.budgets import Budget, Share
from jaxsparse.subspaces.targets import Targets
from jaxsparse.subspaces.units import Coordinates

__all__ = ["fixed_mask", "gasdu"]


def gasdu(
    inner: optax.GradientTransformation | None = None,
    *,
    density: float | None = None,
    budget: float | None = None,
    share: Share = "even",
    refresh_every: RefreshEvery = 50,
    carry: Carry = "slot",
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Trains the k entries of every matrix whose gradient is largest, picked again every M steps.

    At the steps 0, M, 2M, ... the mask of each target matrix becomes the top k of |g|, g = dL/dW of that step;
    every step then moves W by the inner optimizer's answer to the masked gradient (Algorithm 1 and equation 2;
    the refreshing step trains the new mask with its own gradient):

    .. math:: W \leftarrow W + \mathrm{inner}(\Lambda \odot g), \quad \Lambda = \mathrm{TopK}(|g|, k)

    With an inner optimizer its state has k entries per matrix and weights outside the mask stay bit-identical.
    Without one the transformation only masks gradients, to be followed by others in a chain; a link with
    momentum then also moves entries that have left the mask.

    A gradient that is NaN or infinite inside the mask leaves weights and state as they were and is counted in
    `state.progress.skipped`; a refresh that was due happens on the next step.

    Args:
        inner: optimizer of the slots; it sees zeros as parameters (appendix F: the slots are a change of W that
            starts at zero in every step). For weights narrower than float32 the update that comes out is a
            float32 difference that lands on the rounded master, so `gasdu` must be the chain's last link.
        density: free coordinates / size of each target, k = max(1, round(density * size)). Give this or `budget`.
        budget: free coordinates / all parameters. The paper's runs are `budget=1e-4, share="even"`.
        share: how a budget is spread over the matrices: "even" (section 5 and the released code) or "proportional".
        refresh_every: M, optimizer steps between refreshes (default 50, section 5); a schedule from the step to
            M; or `js.adaptive(...)`, which can be written adaptive:THRESHOLD:MINIMUM:MAXIMUM (adaptive:0.8:10:400).
        carry: what a refresh does to the moments: "slot" keeps them with the slot (appendix F), "coordinate"
            keeps those of coordinates that stay and starts newcomers afresh, "reset" starts the whole inner
            state afresh, schedules inside it included.
        targets: the weights that may move: a regular expression for whole paths, or `js.Target`s; None: the
            attention projections of a known model (section 5: q, k, v, o).
        slots_dtype: "promote" keeps float32 masters of narrower weights at the support; None keeps none, as the
            released code: small steps then vanish in the rounding.
        seed: kept for the common signature; GASDU draws nothing.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: density or budget outside (0, 1], both or neither given, refresh_every < 1, unknown carry
            or share; in `init`: a target that matches nothing or is no matrix.
        TypeError: a value of the wrong kind, or a traced density or budget.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"q_proj": {"kernel": jnp.ones((4, 3))}}
        >>> tx = js.gasdu(optax.sgd(0.5), density=0.25, refresh_every=10, targets=r".*/kernel")
        >>> state = tx.init(params)
        >>> gradients = {"q_proj": {"kernel": jnp.arange(12.0).reshape(4, 3)}}
        >>> updates, state = tx.update(gradients, state, params)
        >>> optax.apply_updates(params, updates)["q_proj"]["kernel"]
        Array([[ 1. ,  1. ,  1. ],
               [ 1. ,  1. ,  1. ],
               [ 1. ,  1. ,  1. ],
               [-3.5, -4. , -4.5]], dtype=float32)
    """
    return reference_engine(
        Description(
            name="gasdu",
            inner=inner,
            subspace=Coordinates(Budget(density, budget, share)),
            score=GRADIENT,
            schedule=refresh_schedule(refresh_every),
            carry=carry,
            targets=targets,
            slots_dtype=slots_dtype,
            seed=seed,
        )
    )


def fixed_mask(
    inner: optax.GradientTransformation | None = None,
    *,
    density: float | None = None,
    budget: float | None = None,
    share: Share = "even",
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    """Trains the k entries of every matrix whose first gradient is largest, for good.

    The static baseline of GASDU (section 5, "Fixed Mask": "selects the largest gradient coordinates once on the
    first batch and keeps them fixed thereafter"); it is `gasdu` with an infinite refresh period.

    Args:
        inner: optimizer of the slots, as in `gasdu`.
        density: free coordinates / size of each target. Give this or `budget`.
        budget: free coordinates / all parameters.
        share: how a budget is spread: "even" or "proportional".
        targets: the weights that may move, as in `gasdu`.
        slots_dtype: as in `gasdu`.
        seed: kept for the common signature; nothing is drawn.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: as in `gasdu`.
        TypeError: as in `gasdu`.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> tx = js.fixed_mask(optax.adam(1e-3), density=0.5, targets="kernel")
        >>> tx.init({"kernel": jnp.ones((4, 3))}).support["kernel"].shape
        (1, 6)
    """
    return reference_engine(
        Description(
            name="fixed_mask",
            inner=inner,
            subspace=Coordinates(Budget(density, budget, share)),
            score=GRADIENT,
            schedule=Once(),
            carry="slot",
            targets=targets,
            slots_dtype=slots_dtype,
            seed=seed,
        )
    )
