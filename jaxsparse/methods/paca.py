"""PaCA: trains a few input slices of W directly."""

import jax
import optax

from jaxsparse.engine.description import SlotsDType, SubspaceTransformation
from jaxsparse.methods.cheap_lora import chain_schedule, slice_method
from jaxsparse.select.scores import FIRST, RANDOM
from jaxsparse.subspaces.targets import Targets

__all__ = ["c_paca", "d_paca", "paca"]


def paca(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""PaCA: trains r random input slices of W directly.

    No alpha/r (Beyond LoRA, appendix B.2; PaCA's own code scales by it). With alpha = r and no weight decay it is
    `r_cla`.

    Args:
        inner: optimizer of the slices; it sees those of W as parameters, so weight decay acts on them.
        rank: r, the number of free input slices of every matrix.
        targets: the weights that may move; None: the attention projections of a known model.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        seed: of the draw.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: a rank below 1 or above the number of inputs.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.zeros((4, 2))}
        >>> tx = js.paca(optax.sgd(1.0), rank=1, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 2))}, tx.init(params), params)
        >>> int((updates["kernel"] != 0).sum())
        2
    """
    return slice_method(
        "paca",
        inner,
        rank,
        RANDOM,
        sees="weight",
        targets=targets,
        slots_dtype=slots_dtype,
        seed=seed,
    )


def d_paca(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Deterministic PaCA: trains the first r input slices of W directly.

    With alpha = r and no weight decay it is `cla`.

    Args:
        inner: optimizer of the slices; it sees those of W as parameters, so weight decay acts on them.
        rank: r, the number of free input slices of every matrix.
        targets: the weights that may move; None: the attention projections of a known model.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        seed: kept for the common signature; nothing is drawn.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: a rank below 1 or above the number of inputs.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.zeros((4, 2))}
        >>> tx = js.d_paca(optax.sgd(1.0), rank=1, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 2))}, tx.init(params), params)
        >>> int((updates["kernel"] != 0).sum())
        2
    """
    return slice_method(
        "d_paca",
        inner,
        rank,
        FIRST,
        sees="weight",
        targets=targets,
        slots_dtype=slots_dtype,
        seed=seed,
    )


def c_paca(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    total_steps: int | None = None,
    chains: int | None = None,
    chain_every: int | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Chain of PaCA: trains r random input slices of W directly, drawn afresh for every chain.

    At a reset the inner optimizer starts afresh; with alpha = r and no weight decay it is `r_c3la`.

    Args:
        inner: optimizer of the slices; it sees those of W as parameters, so weight decay acts on them.
        rank: r, the number of free input slices of every matrix.
        total_steps: T, optimizer steps of the run; with `chains` it sets the length of a chain, floor(T / k).
        chains: k, the number of chains.
        chain_every: optimizer steps of a chain, in place of the two.
        learning_rate: if given (a value or a schedule), a step is -learning_rate(step) times what `inner` says,
            on a step count that chains do not restart: `inner=optax.scale_by_adam()` belongs to it.
        targets: the weights that may move; None: the attention projections of a known model.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        seed: of the draw.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: a rank below 1 or above the number of inputs, or chains that do not fit the run.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.zeros((4, 2))}
        >>> tx = js.c_paca(optax.sgd(1.0), rank=1, chain_every=5, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 2))}, tx.init(params), params)
        >>> int((updates["kernel"] != 0).sum())
        2
    """
    return slice_method(
        "c_paca",
        inner,
        rank,
        RANDOM,
        sees="weight",
        schedule=chain_schedule(total_steps, chains, chain_every),
        learning_rate=learning_rate,
        targets=targets,
        slots_dtype=slots_dtype,
        seed=seed,
    )
