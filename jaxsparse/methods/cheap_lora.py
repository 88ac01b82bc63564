"""Cheap LoRA: W + (alpha/r) A B with A a choice of inputs, once or anew for every chain.

With A the columns r of the identity, A B is B in r rows of the Flax kernel (in, out) and zero elsewhere: what moves is
r input slices. B is committed into W in place, W[inputs] += (alpha/r) dB, so the forward pass stays that of the plain
model. alpha/r scales gradient and change of B, so under Adam it scales the learning rate.
"""

from typing import Any

import jax
import optax

from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count, check_positive
from jaxsparse.engine.description import Description, Sees, SlotsDType, SubspaceTransformation
from jaxsparse.engine.reference import reference_engine
from jaxsparse.select.schedules import Every, Once, Schedule
from jaxsparse.select.scores import CIRCULANT, FIRST, RANDOM, RANDOM_WINDOW, Score
from jaxsparse.subspaces.targets import Targets
from jaxsparse.subspaces.units import Slices

__all__ = ["c3la", "chain_schedule", "cla", "r_c3la", "r_cla", "slice_method"]


def slice_method(
    name: str,
    inner: optax.GradientTransformation | None,
    rank: int,
    score: Score,
    *,
    sees: Sees,
    scale: Any = 1.0,
    schedule: Schedule | None = None,
    learning_rate: Any = None,
    **common: Any,
) -> SubspaceTransformation:
    """Input slices, picked by number: once, or anew for every chain with a fresh optimizer."""
    return reference_engine(
        Description(
            name=name,
            inner=inner,
            subspace=Slices(rank),
            score=score,
            schedule=Once() if schedule is None else schedule,
            carry="slot" if schedule is None else "reset",
            sees=sees,
            scale=scale,
            learning_rate=learning_rate,
            **common,
        )
    )


def _scale(alpha: float | None, rank: int) -> Any:
    """Alpha / r; the papers' alpha is 2 r."""
    if alpha is None:
        return 2.0
    check_positive("alpha", alpha)
    check_count("rank", rank)
    return alpha / rank


def chain_schedule(total_steps: int | None, chains: int | None, chain_every: int | None) -> Every:
    """A chain reset every floor(T / k) steps."""
    if (chain_every is None) == (total_steps is None and chains is None) or (total_steps is None) != (chains is None):
        raise InputError("give chain_every, or total_steps and chains")
    if chain_every is None:
        assert total_steps is not None
        assert chains is not None
        check_count("total_steps", total_steps)
        check_count("chains", chains)
        if chains > total_steps:
            raise InputError(f"chains must lie between 1 and total_steps={total_steps}, got {chains}")
        chain_every = total_steps // chains
    check_count("chain_every", chain_every)
    return Every(chain_every)


def cla(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Cheap LoRA: trains B of W + (alpha/r) A B, where A picks the first r inputs.

    .. math:: W[0..r-1] = W_0[0..r-1] + (\alpha / r) B, \quad B_0 = 0

    Beyond LoRA, section 2.3 and algorithm 1.

    Args:
        inner: optimizer of B; it sees B as parameters.
        rank: r, the number of free input slices of every matrix.
        alpha: the change of W is (alpha/r) B; None: 2 r, as in Beyond LoRA (METHODS.md).
        targets: the weights that may move; None: the attention projections of a known model.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        seed: kept for the common signature; nothing is drawn.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: a rank below 1 or above the number of inputs, or an alpha that is not positive.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.zeros((4, 2))}
        >>> tx = js.cla(optax.sgd(1.0), rank=1, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 2))}, tx.init(params), params)
        >>> int((updates["kernel"] != 0).sum())
        2
    """
    return slice_method(
        "cla",
        inner,
        rank,
        FIRST,
        sees="change",
        scale=_scale(alpha, rank),
        targets=targets,
        slots_dtype=slots_dtype,
        seed=seed,
    )


def r_cla(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    contiguous: bool = False,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Random cheap LoRA: as `cla`, with r random inputs, drawn once for every matrix without replacement.

    Beyond LoRA, algorithm 2 and appendix E.3.1.

    Args:
        inner: optimizer of B; it sees B as parameters.
        rank: r, the number of free input slices of every matrix.
        alpha: the change of W is (alpha/r) B; None: 2 r, as in Beyond LoRA (METHODS.md).
        contiguous: draw a window of r consecutive inputs, at a multiple of r (algorithm 2), in place of any r.
        targets: the weights that may move; None: the attention projections of a known model.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        seed: of the draw.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: a rank below 1 or above the number of inputs, or an alpha that is not positive.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.zeros((4, 2))}
        >>> tx = js.r_cla(optax.sgd(1.0), rank=1, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 2))}, tx.init(params), params)
        >>> int((updates["kernel"] != 0).sum())
        2
    """
    return slice_method(
        "r_cla",
        inner,
        rank,
        RANDOM_WINDOW if contiguous else RANDOM,
        sees="change",
        scale=_scale(alpha, rank),
        targets=targets,
        slots_dtype=slots_dtype,
        seed=seed,
    )


def c3la(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    total_steps: int | None = None,
    chains: int | None = None,
    chain_every: int | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Chain of circulant cheap LoRA: chain c trains the inputs cr ... (c+1)r - 1, around the end.

    At steps t > 0 with t mod floor(T/k) = 0 the update stays in W, B is zero again, the window moves on by r and wraps
    modulo the number of inputs, and the inner optimizer starts afresh (algorithm 3 is silent there).

    Args:
        inner: optimizer of B; it sees B as parameters.
        rank: r, the number of free input slices of every matrix.
        alpha: the change of W is (alpha/r) B; None: 2 r, as in Beyond LoRA (METHODS.md).
        total_steps: T, optimizer steps of the run; with `chains` it sets the length of a chain, floor(T / k).
        chains: k, the number of chains.
        chain_every: optimizer steps of a chain, in place of the two.
        learning_rate: if given (a value or a schedule), a step is -learning_rate(step) times what `inner` says,
            on a step count that chains do not restart: `inner=optax.scale_by_adam()` belongs to it.
        targets: the weights that may move; None: the attention projections of a known model.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        seed: kept for the common signature; nothing is drawn.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: a rank below 1 or above the number of inputs, chains that do not fit the run, or an alpha that is
            not positive.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.zeros((4, 2))}
        >>> tx = js.c3la(optax.sgd(1.0), rank=1, chain_every=5, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 2))}, tx.init(params), params)
        >>> int((updates["kernel"] != 0).sum())
        2
    """
    return slice_method(
        "c3la",
        inner,
        rank,
        CIRCULANT,
        sees="change",
        scale=_scale(alpha, rank),
        schedule=chain_schedule(total_steps, chains, chain_every),
        learning_rate=learning_rate,
        targets=targets,
        slots_dtype=slots_dtype,
        seed=seed,
    )


def r_c3la(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    contiguous: bool = False,
    total_steps: int | None = None,
    chains: int | None = None,
    chain_every: int | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Chain of random cheap LoRA: as `c3la`, with r random inputs drawn afresh for every chain.

    Beyond LoRA, algorithm 4.

    Args:
        inner: optimizer of B; it sees B as parameters.
        rank: r, the number of free input slices of every matrix.
        alpha: the change of W is (alpha/r) B; None: 2 r, as in Beyond LoRA (METHODS.md).
        contiguous: draw a window of r consecutive inputs, at a multiple of r (algorithm 2), in place of any r.
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
        InputError: a rank below 1 or above the number of inputs, chains that do not fit the run, or an alpha that is
            not positive.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.zeros((4, 2))}
        >>> tx = js.r_c3la(optax.sgd(1.0), rank=1, chain_every=5, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 2))}, tx.init(params), params)
        >>> int((updates["kernel"] != 0).sum())
        2
    """
    return slice_method(
        "r_c3la",
        inner,
        rank,
        RANDOM_WINDOW if contiguous else RANDOM,
        sees="change",
        scale=_scale(alpha, rank),
        schedule=chain_schedule(total_steps, chains, chain_every),
        learning_rate=learning_rate,
        targets=targets,
        slots_dtype=slots_dtype,
        seed=seed,
    )
