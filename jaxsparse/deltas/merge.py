"""Factors merged into weights: (W + s A B) g, rounded once, the same bits wherever one device does it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxsparse.common.fingerprints import tensor_checksum
from jaxsparse.deltas.tensors import FactorDelta
from jaxsparse.subspaces.targets import MatrixView

__all__ = ["factor_delta", "merge_factors", "plus_product"]

BANDS = 8
"""A product of factors is added to a weight in so many bands, of which one exists at a time."""


def plus_product(
    view: MatrixView,
    weight: Float[Array, "..."],
    a: Float[Array, "stack in r"],
    b: Float[Array, "stack r out"],
    scale: Any,
    gain: Float[Array, "stack out"] | None = None,
) -> Float[Array, "..."]:
    """Returns (W + s A B) g in the weight's dtype, without a product of the weight's size.

    Args:
        view: how the weight is read as matrices.
        weight: W.
        a: A, in at least float32.
        b: B.
        scale: s.
        gain: g, a factor for every output; None: 1.
    """
    if not view.is_in_order:
        total = view.matrices(weight) + scale * _product(a, b)
        return view.weight(total if gain is None else total * gain[:, None, :]).astype(weight.dtype)
    bands = next(n for n in range(BANDS, 0, -1) if view.in_size % n == 0)
    height = view.in_size // bands

    def add(number: Array, matrices: Array) -> Array:
        layer, first = number // bands, number % bands * height
        start = (layer, first, jnp.zeros_like(first))
        rows = jax.lax.dynamic_slice(a, start, (1, height, a.shape[2]))
        total = jax.lax.dynamic_slice(matrices, start, (1, height, view.out_size))
        total = total + scale * _product(rows, jax.lax.dynamic_slice_in_dim(b, layer, 1))
        if gain is not None:
            total = total * jax.lax.dynamic_slice_in_dim(gain, layer, 1)[:, None, :]
        return jax.lax.dynamic_update_slice(matrices, total.astype(matrices.dtype), start)

    matrices = weight.reshape(view.stack, view.in_size, view.out_size)
    return jax.lax.fori_loop(0, view.stack * bands, add, matrices).reshape(weight.shape)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


_merge = jax.jit(plus_product, static_argnums=0)
_merge_donated = jax.jit(plus_product, static_argnums=0, donate_argnums=1)


def merge_factors(
    view: MatrixView, weight: Any, a: Any, b: Any, scale: Any, gain: Any = None, *, donate: bool = False
) -> Float[Array, "..."]:
    """Returns (W + s A B) g as one compiled function does it; arguments as in `plus_product`.

    A tuner's parameters and an applied delta both come from here, so that they agree to the bit.

    Args:
        view: how the weight is read as matrices.
        weight: W.
        a: A.
        b: B.
        scale: s.
        gain: g; None: 1.
        donate: give the weight's memory to the result.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.subspaces.targets import matrix_view
        >>> ones = jnp.ones((1, 2, 1)), jnp.ones((1, 1, 3))
        >>> merge_factors(matrix_view((2, 3), (), (0,), (1,)), jnp.zeros((2, 3)), *ones, 2.0)
        Array([[2., 2., 2.],
               [2., 2., 2.]], dtype=float32)
    """
    factors = [None if factor is None else jnp.asarray(factor) for factor in (a, b, gain)]
    merge = _merge_donated if donate else _merge
    return merge(view, weight, factors[0], factors[1], jnp.asarray(scale, factors[0].dtype), factors[2])  # type: ignore[union-attr]


def factor_delta(
    leaf: Any, view: MatrixView, a: Any, b: Any, scale: float, gain: Any = None, *, tuned: Any = None
) -> FactorDelta:
    """Returns the delta of one tensor that changes by factors; arguments as in `plus_product`.

    Args:
        leaf: the base's tensor.
        view: how it is read as matrices.
        a: A.
        b: B.
        scale: s.
        gain: g; None: 1.
        tuned: what `merge_factors` returns of these, where that is known.

    Raises:
        InputError: the factors do not fit the tensor, or are not finite.

    Example:
        >>> from jaxsparse.subspaces.targets import matrix_view
        >>> ones = np.ones((1, 2, 1), np.float32), np.ones((1, 1, 3), np.float32)
        >>> factor_delta(jnp.zeros((2, 3)), matrix_view((2, 3), (), (0,), (1,)), *ones, 2.0).rank
        1
    """
    if tuned is None:
        tuned = merge_factors(view, leaf, a, b, scale, gain)
    return FactorDelta(
        shape=view.shape,
        dtype=leaf.dtype.name,
        base_checksum=tensor_checksum(leaf),
        tuned_checksum=tensor_checksum(tuned),
        view=view,
        a=np.array(a),
        b=np.array(b),
        scale=float(scale),
        gain=None if gain is None else np.array(gain),
    )
