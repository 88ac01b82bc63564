"""SpIEL: deltas of a few coordinates, the smallest of which are exchanged for others time and again."""

import math
import numbers
from typing import Any, Literal

import jax
import optax

from jaxsparse.common.errors import InputError
from jaxsparse.common.options import check_count
from jaxsparse.engine.description import SubspaceTransformation
from jaxsparse.engine.spiel import spiel_engine
from jaxsparse.engine.spiel_description import Spiel
from jaxsparse.subspaces.budgets import Budget
from jaxsparse.subspaces.targets import Targets

__all__ = ["spiel"]


def spiel(
    learning_rate: Any,
    *,
    total_steps: int | None = None,
    density: float | None = None,
    budget: float | None = 0.01,
    grow: Literal["AG", "MA"] = "AG",
    reselect_every: int = 20,
    accumulation_steps: int = 5,
    reselection_rate: float | jax.Array = 0.2,
    decay: Literal["linear", "cosine"] = "linear",
    b1: float | jax.Array = 0.9,
    b2: float | jax.Array = 0.999,
    epsilon: float | jax.Array = 1e-8,
    weight_decay: float | jax.Array = 0.0,
    clip: float | jax.Array | None = None,
    targets: Targets = None,
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Trains k deltas of every matrix from a random support, and every S steps exchanges the smallest for others.

    .. math:: W = W_0 + \delta, \quad \delta \text{ from } 0, \text{ in at least float32}

    A reselection comes after the update of each of the steps A - 1, S + A - 1, 2 S + A - 1, ... (from 0). It drops the
    floor(p k) slots with the smallest |delta|, whose weights go back to their base bit for bit (but for a base of -0.0,
    which becomes 0.0), and grows as many:

    * "AG" takes the best by |sum of g| over the last A steps, out of the k entries whose |g| was largest at the first
      of them; slots that stay do not count. Each slot has Adam moments with an age of their own. A newcomer's are the
      mean g and mean g^2 of those A steps, times (1 - beta^A), at age A.
    * "MA" takes the entries outside the support with the largest product of their input's and their output's SM3
      accumulator, and trains by SM3 without momentum.

    p is 1 the first time, then 0.2 (1 - t/T), where t is the number of steps taken.

    SpIEL (arXiv 2401.16405), as METHODS.md has it and after the authors' code (AlanAnsell/peft), but for three things.
    Their later phases begin a step early and so add up A + 1 gradients; here all have A. Their newcomers' first step
    corrects A + 1 gradients for age A; here for A + 1. Their "cosine" does not begin with p = 1. As there, what would
    be dropped and grown at once stays as it is, and where fewer can grow, fewer are dropped.

    SpIEL brings its own Adam or SM3, since newcomers' moments are seeded: it takes a learning rate where others take an
    inner optimizer.

    Args:
        learning_rate: a value, or a schedule of the method's own step count.
        total_steps: T, the steps of the run, over which fewer and fewer slots are exchanged; must be given (the
            command line knows it).
        density: free coordinates / size of each target. Give this with `budget=None`, or `budget`.
        budget: free coordinates / all parameters, shared in proportion to size; 0.01 in the authors' code.
        grow: "AG" (accumulated gradients) or "MA" (approximated moments).
        reselect_every: S; 20 as METHODS.md and the authors' README have it.
        accumulation_steps: A, fewer than S; 5 in the authors' code. "MA" reselects at the same steps.
        reselection_rate: p at step 0, from the second reselection on; 0.2 in the authors' code.
        decay: "linear", or "cosine": p = 0.2 (1 + cos(pi t/T)) / 2.
        b1: Adam's decay of the mean gradient.
        b2: Adam's decay of the mean square.
        epsilon: added to Adam's root, and inside SM3's; 1e-8 under the authors' trainer (1e-6 is their Adam's own).
        weight_decay: pulls deltas to 0, times the learning rate; 0 by METHODS.md (the authors try 1, 3, 10 and 30).
        clip: largest global norm of the slots' gradient; None: no limit. Candidates see unclipped gradients.
        targets: the weights that may move; None: the attention projections of a known model (the authors train all
            seven linear layers of a block).
        seed: of the first support.

    Returns:
        A gradient transformation with state `js.SpielState`, of k entries a matrix.

    Raises:
        InputError: a value out of range, or no `total_steps`.
        TypeError: a value of the wrong kind, such as an inner optimizer in place of the learning rate.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.zeros((4, 3))}
        >>> tx = js.spiel(0.1, total_steps=100, density=0.25, budget=None, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 3))}, tx.init(params), params)
        >>> [round(float(delta), 5) for delta in state.delta["kernel"][0]]
        [-0.1, -0.1, -0.1]
    """
    if isinstance(learning_rate, optax.GradientTransformation):
        raise TypeError(
            "spiel brings its own Adam, since it seeds the moments of coordinates that it grows; give it a learning "
            "rate (a value or a schedule) in place of an inner optimizer, and clip and weight_decay by name"
        )
    if not (callable(learning_rate) or isinstance(learning_rate, numbers.Real | jax.Array)):
        raise TypeError(f"learning_rate must be a number or a schedule, got {learning_rate!r}")
    if total_steps is None:
        raise InputError("spiel needs total_steps, the steps of the run: the share of exchanged slots falls over them")
    check_count("total_steps", total_steps)
    check_count("reselect_every", reselect_every)
    check_count("accumulation_steps", accumulation_steps)
    if accumulation_steps >= reselect_every:
        raise InputError(
            f"accumulation_steps must be fewer than reselect_every={reselect_every}, got {accumulation_steps}"
        )
    if grow not in ("AG", "MA"):
        raise InputError(f"grow must be 'AG' or 'MA', got {grow!r}")
    if decay not in ("linear", "cosine"):
        raise InputError(f"decay must be 'linear' or 'cosine', got {decay!r}")
    if not isinstance(reselection_rate, jax.Array) and not 0 <= reselection_rate <= 1:
        raise InputError(f"reselection_rate must lie between 0 and 1, got {reselection_rate}")
    for name, number, limit in (
        ("b1", b1, 1),
        ("b2", b2, 1),
        ("epsilon", epsilon, math.inf),
        ("weight_decay", weight_decay, math.inf),
        ("clip", 0 if clip is None else clip, math.inf),
    ):
        if not isinstance(number, jax.Array) and not 0 <= number < limit:
            raise InputError(f"{name} must be at least 0 and less than {limit}, got {number}")
    return spiel_engine(
        Spiel(
            name="spiel",
            budget=Budget(density, budget, "proportional"),
            learning_rate=learning_rate,
            total_steps=total_steps,
            grow=grow,
            reselect_every=reselect_every,
            accumulation_steps=accumulation_steps,
            reselection_rate=reselection_rate,
            decay=decay,
            b1=b1,
            b2=b2,
            epsilon=epsilon,
            weight_decay=weight_decay,
            clip=clip,
            targets=targets,
            seed=seed,
        )
    )
