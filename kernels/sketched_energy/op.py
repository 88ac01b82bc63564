"""An unbiased estimate of the squared norm of x.T @ dy."""

import jax
import jax.numpy as jnp
from jaxsparse.kernels.tiles import accumulation_dtype
from jaxtyping import Array, Float, PRNGKeyArray

__all__ = ["sketched_energy"]


def sketched_energy(
    x: Float[Array, "tokens inputs"],
    dy: Float[Array, "tokens outputs"],
    key: PRNGKeyArray,
    *,
    samples: int = 8,
) -> Float[Array, ""]:
    """Returns an unbiased estimate of the sum of squares of x.T @ dy, at the cost of a few of its columns.

    With random signs Z (outputs, samples), the mean of ||x.T @ (dy @ Z)||^2 / samples over Z is ||x.T @ dy||^2; its
    deviation is at most sqrt(2 / samples) times that, where the product has rank 1, and less where it has more.

    Args:
        x: activations.
        dy: cotangents of the outputs, of the same tokens.
        key: draws the signs.
        samples: how many.

    Returns:
        The estimate in promote_types(x and dy, float32).

    Raises:
        ValueError: shapes do not fit, or samples < 1.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> float(sketched_energy(jnp.ones((1, 3)), jnp.array([[2.0]]), jax.random.key(0)))  # ||(2, 2, 2)||^2
        12.0
    """
    if x.shape[0] != dy.shape[0]:
        raise ValueError(f"x and dy must have the same tokens, got shapes {x.shape} and {dy.shape}")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    dtype = accumulation_dtype(x, dy)
    signs = jax.random.rademacher(key, (dy.shape[1], samples), dy.dtype)
    mixed = jnp.matmul(dy, signs, preferred_element_type=dtype).astype(x.dtype)
    columns = jax.lax.dot_general(x, mixed, (((0,), (0,)), ((), ())), preferred_element_type=dtype)
    return jnp.sum(jnp.square(columns)) / samples
