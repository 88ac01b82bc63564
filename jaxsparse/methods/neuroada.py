"""NeuroAda: a few inputs of every neuron."""

from typing import Literal

import jax
import optax

from jaxsparse.common.errors import InputError
from jaxsparse.engine.description import Description, SlotsDType, SubspaceTransformation
from jaxsparse.engine.reference import reference_engine
from jaxsparse.select.scores import GRADIENT, RANDOM, WEIGHT, smallest
from jaxsparse.subspaces.targets import Targets
from jaxsparse.subspaces.units import Neurons

__all__ = ["neuroada"]

_SCORES = {"magnitude": WEIGHT, "reverse": smallest(WEIGHT), "gradient": GRADIENT, "random": RANDOM}


def neuroada(
    inner: optax.GradientTransformation | None = None,
    *,
    k: int = 1,
    neurons: float = 1.0,
    select: Literal["magnitude", "reverse", "gradient", "random"] = "magnitude",
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    unmerged: bool = False,
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Trains k inputs of every neuron, those with the largest weights, picked once before training.

    A neuron is one output. With idx the k chosen inputs of each and theta (k, out) starting at zero,

    .. math:: W[\mathrm{idx}[j, i], i] = W_0[\mathrm{idx}[j, i], i] + \theta[j, i]

    and the inner optimizer moves theta by its gradient, the entries of dL/dW at the chosen places (section 3).

    Args:
        inner: optimizer of theta, AdamW in the paper; it sees theta as parameters, so weight decay acts on theta
            and not on W.
        k: free inputs of every neuron; the paper's budgets are 1 and 20 (section 5).
        neurons: share of the neurons of every matrix that train, rounded, at least one (figure 6; by default all).
            Neither the paper nor the released code says which: here those whose k picked inputs score highest in sum,
            which for "random" is any.
        select: "magnitude" picks the largest |W|; "reverse" the smallest, "gradient" the largest |g| of the first
            step, "random" any (figure 7).
        targets: the weights that may move; the paper's are all seven linear layers of a block. None: the attention
            projections of a known model.
        slots_dtype: "promote" keeps theta in float32, and commits into W in place with float32 masters of narrower
            weights; None keeps no masters. The paper keeps bf16 deltas beside W and says that no masters are needed:
            that is unmerged=True, slots_dtype="bfloat16".
        unmerged: whether training leaves W alone and adds x Delta, a sparse product, to x W: the fused engine then
            writes no weight, and `params` of its tuner returns them with theta merged in. Here, in the reference
            engine, updates are of W and every step is committed: the same trajectory up to the rounding of W.
        seed: of "random".

    Returns:
        A gradient transformation with state `js.SubspaceState`; `state.slots` holds theta.

    Raises:
        InputError: k < 1, more inputs than a neuron has, neurons outside (0, 1], or an unknown selection.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.array([[1.0, -4.0], [-3.0, 2.0]])}
        >>> tx = js.neuroada(optax.sgd(1.0), k=1, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((2, 2))}, tx.init(params), params)
        >>> optax.apply_updates(params, updates)["kernel"]
        Array([[ 1., -5.],
               [-4.,  2.]], dtype=float32)
    """
    if select not in _SCORES:
        raise InputError(f"select must be one of {', '.join(map(repr, _SCORES))}, got {select!r}")
    return reference_engine(
        Description(
            name="neuroada",
            inner=inner,
            subspace=Neurons(k, neurons),
            score=_SCORES[select],
            sees="change",
            targets=targets,
            slots_dtype=slots_dtype,
            unmerged=unmerged,
            seed=seed,
        )
    )
