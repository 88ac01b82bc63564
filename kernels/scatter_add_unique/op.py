"""Adding to single entries of matrices, or replacing them, in place."""

from functools import partial

from jaxsparse.kernels.blocks import as_index, check_size, fits_kernels
from jaxsparse.kernels.launch import Implementation, run
from jaxsparse.kernels.scatter_add_unique.pallas_gpu import scatter_gpu
from jaxsparse.kernels.scatter_add_unique.reference import scatter_reference
from jaxtyping import Array, Int, Num

__all__ = ["scatter_add_unique", "scatter_unique"]


def scatter_add_unique(
    w: Num[Array, "..."],
    index: Int[Array, "..."],
    values: Num[Array, "..."],
    *,
    implementation: Implementation = None,
) -> Num[Array, "..."]:
    """Returns w, with values added to its entries at `index`; in place where w's memory is donated.

    Sums are taken in promote_types(w and values, float32) and rounded once, to w's dtype; all other entries keep
    their bits.

    Args:
        w: a matrix of any shape, or a stack of them.
        index: flat indices in w, (k,), or in w[0], w[1] and so on, (stack, k); distinct in a matrix, those beyond it
            are left out.
        values: what is added, of the shape of `index`.
        implementation: "xla"; "pallas", up to 32 bits; or None for what is best on the device.

    Raises:
        ValueError: shapes do not fit, or the implementation cannot take the arguments.
        TypeError: `index` holds no integers.

    Example:
        >>> import jax.numpy as jnp
        >>> scatter_add_unique(jnp.ones((2, 2)), jnp.array([3, 0, 4]), jnp.array([1.0, 0.5, 7.0]))
        Array([[1.5, 1. ],
               [1. , 2. ]], dtype=float32)
    """
    return _scatter(w, index, values, implementation, adds=True)


def scatter_unique(
    w: Num[Array, "..."],
    index: Int[Array, "..."],
    values: Num[Array, "..."],
    *,
    implementation: Implementation = None,
) -> Num[Array, "..."]:
    """Returns w, with its entries at `index` replaced by values; in place where w's memory is donated.

    Args:
        w: a matrix of any shape, or a stack of them.
        index: flat indices in w, (k,), or in w[0], w[1] and so on, (stack, k); distinct in a matrix, those beyond it
            are left out.
        values: what the entries are to be, of the shape of `index`; rounded to w's dtype, and of this dtype with all
            their bits.
        implementation: "xla"; "pallas", up to 32 bits; or None for what is best on the device.

    Raises:
        ValueError: shapes do not fit, or the implementation cannot take the arguments.
        TypeError: `index` holds no integers.

    Example:
        >>> import jax.numpy as jnp
        >>> scatter_unique(jnp.ones((2, 2)), jnp.array([[1], [0]]), jnp.array([[5.0], [6.0]]))
        Array([[1., 5.],
               [6., 1.]], dtype=float32)
    """
    return _scatter(w, index, values.astype(w.dtype), implementation, adds=False)


def _scatter(w: Array, index: Array, values: Array, implementation: Implementation, *, adds: bool) -> Array:
    index = as_index("index", index)
    if index.shape != values.shape:
        raise ValueError(f"index and values must have one shape, got {index.shape} and {values.shape}")
    if index.ndim not in (1, 2) or (index.ndim == 2 and w.shape[:1] != index.shape[:1]):
        raise ValueError(f"index must be (k,) or {w.shape[:1]} + (k,), as w is {w.shape}, got shape {index.shape}")
    if index.size == 0 or w.size == 0:
        return w
    stack = index.shape[0] if index.ndim == 2 else 1
    check_size(w.size // stack, 1)
    found = run(
        implementation,
        (w.reshape(stack, -1), index.reshape(stack, -1), values.reshape(stack, -1)),
        xla=partial(scatter_reference, adds=adds),
        gpu=partial(scatter_gpu, adds=adds),
        reason=fits_kernels(w=w, values=values),
    )
    return found.reshape(w.shape)
