"""The algebra of low-rank factors: their gradients, and what they change of a weight.

The reference engine goes from a dense gradient to that of the factors; a fused one needs `change_of_product` alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray

from jaxsparse.subspaces.targets import MatrixView

__all__ = [
    "Factors",
    "change_of_dora",
    "change_of_product",
    "directions",
    "dora_gradients",
    "factor_gradients",
    "normal_factors",
    "norms_of_columns",
    "over_norms",
    "product",
]

# The deviation of A's first entries, as Beyond LoRA has it (section 2.1).
DEVIATION = 0.02


class Factors(NamedTuple):
    """What a low-rank method keeps of a target: arrays; of a model: trees that mirror the parameters.

    Attributes:
        a: A, (stack, in, r).
        b: B, (stack, r, out).
        magnitude: m, (stack, out), for DoRA; else `optax.MaskedNode`.
    """

    a: Any
    b: Any
    magnitude: Any = optax.MaskedNode()


def product(left: Float[Array, "stack n r"], right: Float[Array, "stack r m"]) -> Float[Array, "stack n m"]:
    """Returns the matrix product in the full precision of its dtype, on accelerators too."""
    return jnp.matmul(left, right, precision="highest")


def normal_factors(key: PRNGKeyArray, view: MatrixView, rank: int, dtype: jnp.dtype) -> Factors:
    """Returns A from N(0, 0.02^2) and B = 0, so that A B is zero."""
    a = DEVIATION * jax.random.normal(key, (view.stack, view.in_size, rank), dtype)
    return Factors(a, jnp.zeros((view.stack, rank, view.out_size), dtype))


def factor_gradients(factors: Factors, gradient: Float[Array, "stack in out"], scale: Any) -> Factors:
    """Returns the gradients s g B^T and s A^T g of the factors of a weight W + s A B.

    Args:
        factors: A and B.
        gradient: g, of the weight.
        scale: s.

    Example:
        >>> import jax.numpy as jnp
        >>> ones = Factors(jnp.ones((1, 3, 1)), jnp.ones((1, 1, 2)))
        >>> factor_gradients(ones, jnp.ones((1, 3, 2)), 2.0).b
        Array([[[6., 6.]]], dtype=float32)
    """
    a = scale * product(gradient, jnp.swapaxes(factors.b, 1, 2))
    b = scale * product(jnp.swapaxes(factors.a, 1, 2), gradient)
    return Factors(a.astype(factors.a.dtype), b.astype(factors.b.dtype))


def change_of_product(old: Factors, new: Factors, scale: Any) -> Float[Array, "stack in out"]:
    """Returns s (A' B' - A B), without the cancellation of the two products: s ((A' - A) B' + A (B' - B))."""
    change = product(new.a - old.a, new.b) + product(old.a, new.b - old.b)
    return (scale * change).astype(old.b.dtype)


def norms_of_columns(matrices: Float[Array, "*copies stack in out"]) -> Float[Array, "*copies stack out"]:
    """Returns the 2-norm of the weights of every output."""
    return jnp.sqrt(jnp.sum(jnp.square(matrices), axis=-2))


def directions(
    weight: Float[Array, "stack in out"], magnitude: Float[Array, "stack out"]
) -> Float[Array, "stack in out"]:
    """Returns V / c, read off a weight W = m V / c: W over its norms, with the sign of m; 0 where W is 0."""
    norms = norms_of_columns(weight)
    signs = jnp.sign(magnitude) / jnp.where(norms == 0, 1, norms)
    return weight * signs[:, None, :]


def over_norms(magnitude: Float[Array, "*stack out"], norms: Float[Array, "*stack out"]) -> Float[Array, "*stack out"]:
    """Returns m / c; 0 for an output whose weights are all 0: it has no direction, and stays."""
    return jnp.where(norms == 0, 0, magnitude / jnp.where(norms == 0, 1, norms))


def dora_gradients(
    factors: Factors,
    norms: Float[Array, "stack out"],
    direction: Float[Array, "stack in out"],
    gradient: Float[Array, "stack in out"],
    scale: Any,
) -> Factors:
    """Returns the gradients of the factors and the magnitude of W = m V / c, c held constant (DoRA, section 4.3).

    Args:
        factors: A, B and m.
        norms: c, the norms of the columns of V.
        direction: V / c.
        gradient: of the weight.
        scale: s of V = V_0 + s A B.
    """
    of_factors = factor_gradients(factors, gradient * over_norms(factors.magnitude, norms)[:, None, :], scale)
    return of_factors._replace(magnitude=jnp.sum(gradient * direction, axis=1))


def change_of_dora(
    old: Factors,
    new: Factors,
    norms: Float[Array, "stack out"],
    direction: Float[Array, "stack in out"],
    scale: Any,
) -> tuple[Float[Array, "stack in out"], Float[Array, "stack out"]]:
    """Returns m' V' / c' - m V / c, and c'.

    Args:
        old: A, B and m.
        new: A', B' and m'.
        norms: c, the norms of the columns of V.
        direction: V / c.
        scale: s of V = V_0 + s A B.
    """
    v = direction * norms[:, None, :]
    change = change_of_product(old, new, scale)
    # One reduction for both, so that a step of nothing changes nothing, whatever the compiler does.
    before, after = norms_of_columns(jnp.stack([v, v + change]))
    ratio = over_norms(new.magnitude, after)[:, None, :]
    return (ratio - over_norms(old.magnitude, before)[:, None, :]) * v + ratio * change, after
