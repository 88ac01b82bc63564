"""What makes a unit worth training: scores, of which the largest (or smallest) are picked."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PRNGKeyArray

from jaxsparse.common.errors import InputError

__all__ = [
    "ACTIVATION",
    "CIRCULANT",
    "FIRST",
    "GRADIENT",
    "RANDOM",
    "RANDOM_WINDOW",
    "SIGNED_GRADIENT",
    "WEIGHT",
    "WEIGHT_ACTIVATION",
    "Draw",
    "Entries",
    "Score",
    "gradient_over_weight",
    "product",
    "score_dtype",
    "smallest",
]


def score_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype in which scores compare and slots are kept: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


class Entries(NamedTuple):
    """What a score of entries may look at, in at least float32; what `needs` does not name may be None.

    Attributes:
        gradient: dL/dW of this step, or its mean over a calibration set; (stack, in, out).
        weight: W; (stack, in, out).
        activation: 2-norm of every input over a calibration set, (stack, in, 1); for output slices of every output,
            (stack, 1, out).
    """

    gradient: Any
    weight: Any
    activation: Any


class Draw(NamedTuple):
    """What a score of unit numbers may look at.

    Attributes:
        units: number of units of each matrix.
        stack: number of matrices.
        picked: how many are picked.
        turn: how often was picked before.
        key: fresh randomness for every target and turn.
    """

    units: int
    stack: int
    picked: int
    turn: Int[Array, ""]
    key: PRNGKeyArray


@dataclass(frozen=True)
class Score:
    """A rule that scores entries, or unit numbers where it looks at no values.

    Attributes:
        name: what reports call it.
        entries: from `Entries` to scores (stack, in, out); units are then scored by their subspace.
        draw: from a `Draw` to scores (stack, units).
        factors: scores of entries; a unit's score is the product of what these give it. Exactly one of `entries`,
            `draw` and `factors` is given.
        needs: the fields of `Entries` that must be at hand.
        largest: pick the largest scores, or the smallest.

    Example:
        >>> import jax.numpy as jnp
        >>> product = Score("|g||W|", lambda e: jnp.abs(e.gradient * e.weight), needs=("gradient", "weight"))
        >>> product.entries(Entries(jnp.array([[[2.0]]]), jnp.array([[[-3.0]]]), None))
        Array([[[6.]]], dtype=float32)
    """

    name: str
    entries: Callable[[Entries], Array] | None = None
    draw: Callable[[Draw], Array] | None = None
    factors: tuple["Score", ...] = ()
    needs: tuple[str, ...] = ()
    largest: bool = True

    def __post_init__(self) -> None:
        if sum(bool(given) for given in (self.entries, self.draw, self.factors)) != 1:
            raise InputError(f"score {self.name} needs exactly one of entries, draw and factors")
        if unknown := {*self.needs} - {*Entries._fields}:
            raise InputError(
                f"score {self.name} needs {min(unknown)!r}; what can be had is {', '.join(Entries._fields)}"
            )


def smallest(score: Score) -> Score:
    """Returns the score with the smallest picked in place of the largest.

    Example:
        >>> smallest(WEIGHT).largest
        False
    """
    return replace(score, name=f"smallest {score.name}", largest=not score.largest)


def product(*factors: Score) -> Score:
    """Returns the product of scores of units, such as the norm of a slice times that of its activations (S2FT-S).

    Example:
        >>> product(WEIGHT, ACTIVATION).needs
        ('weight', 'activation')
    """
    needs = tuple(dict.fromkeys(name for factor in factors for name in factor.needs))
    return Score(" * ".join(factor.name for factor in factors), factors=factors, needs=needs)


def gradient_over_weight(epsilon: float = 1e-8) -> Score:
    """Returns |g| / (|W| + epsilon), GaLLoP's score (epsilon as in METHODS.md)."""
    return Score(
        "|g|/(|W|+eps)",
        lambda entries: jnp.abs(entries.gradient) / (jnp.abs(entries.weight) + epsilon),
        needs=("gradient", "weight"),
    )


def _numbers(draw: Draw, start: Array | int) -> Array:
    """Scores that pick the units from `start` on, around the end."""
    behind = (jnp.arange(draw.units) - start) % draw.units
    return jnp.broadcast_to(-behind.astype(jnp.float32), (draw.stack, draw.units))


def _window(draw: Draw) -> Array:
    starts = jax.random.randint(draw.key, (draw.stack, 1), 0, max(draw.units // draw.picked, 1)) * draw.picked
    return -((jnp.arange(draw.units) - starts) % draw.units).astype(jnp.float32)


GRADIENT = Score("|g|", lambda entries: jnp.abs(entries.gradient), needs=("gradient",))
"""The Gauss-Southwell rule (GASDU, equation 2)."""
SIGNED_GRADIENT = Score("g", lambda entries: entries.gradient, needs=("gradient",))
"""For units that average before they take the magnitude (SMT's blocks)."""
WEIGHT = Score("|W|", lambda entries: jnp.abs(entries.weight), needs=("weight",))
ACTIVATION = Score("|x|", lambda entries: entries.activation, needs=("activation",))
WEIGHT_ACTIVATION = Score(
    "|W||x|", lambda entries: jnp.abs(entries.weight) * entries.activation, needs=("weight", "activation")
)
RANDOM = Score("random", draw=lambda draw: jax.random.uniform(draw.key, (draw.stack, draw.units)))
RANDOM_WINDOW = Score("random window", draw=_window)
"""Consecutive units from a random multiple of their number (Beyond LoRA, algorithm 2)."""
FIRST = Score("first", draw=lambda draw: _numbers(draw, 0))
CIRCULANT = Score("circulant", draw=lambda draw: _numbers(draw, draw.turn * draw.picked % draw.units))
"""Chain c takes units cr ... (c+1)r - 1, around the end (Beyond LoRA, c3LA)."""
