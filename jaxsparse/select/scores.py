"""What makes a coordinate worth training: scores of entries, larger is better."""

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

__all__ = ["GradientMagnitude", "Score", "score_dtype"]


def score_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype in which scores compare and slots are kept: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


@dataclass(frozen=True)
class GradientMagnitude:
    """|g|, the Gauss-Southwell rule (GASDU, equation 2).

    Example:
        >>> import jax.numpy as jnp
        >>> GradientMagnitude()(gradient=jnp.array([[[1.0, -2.0]]]), weight=None)
        Array([[[1., 2.]]], dtype=float32)
    """

    needs: tuple[Literal["gradient", "weight"], ...] = ("gradient",)

    def __call__(self, *, gradient: Float[Array, "..."], weight: Float[Array, "..."] | None) -> Float[Array, "..."]:
        """Returns the score of every entry, in at least float32."""
        return jnp.abs(gradient.astype(score_dtype(gradient.dtype)))


Score = GradientMagnitude
