"""The k largest entries of x.T @ dy."""

from collections.abc import Callable
from functools import partial

from jaxsparse.kernels.blocks import check_size, fits_kernels
from jaxsparse.kernels.gradient_topk.pallas_gpu import gradient_topk_gpu
from jaxsparse.kernels.gradient_topk.pallas_tpu import gradient_topk_tpu
from jaxsparse.kernels.gradient_topk.reference import GradientTopK, gradient_topk_reference, magnitude
from jaxsparse.kernels.launch import Implementation, run
from jaxtyping import Array, Float

__all__ = ["GradientTopK", "gradient_topk"]


def gradient_topk(
    x: Float[Array, "tokens inputs"],
    dy: Float[Array, "tokens outputs"],
    k: int,
    *,
    score: Callable[[Array, Array], Array] | None = None,
    summed_over: tuple[str, ...] = (),
    implementation: Implementation = None,
) -> GradientTopK:
    """Returns the k entries of x.T @ dy that are largest in magnitude; the product never exists as a whole.

    Exact; ties go to the lowest flat index, and NaN counts as larger than any number, as in `lax.top_k`.

    Args:
        x: activations.
        dy: cotangents of the outputs, of the same tokens.
        k: how many, between 1 and inputs * outputs.
        score: what is largest instead: from a tile (rows, outputs) of the product and its first row to scores, which
            must be above -inf.
        summed_over: axes of a mesh, inside `shard_map`, along which devices hold other tokens: every tile is summed
            over them before its best are taken, and all devices return the same.
        implementation: "xla"; "pallas", without `score` and `summed_over` and up to float32; or None for what is best
            on the device.

    Returns:
        Rows, columns and values in promote_types(x and dy, float32), best first, and the sum of squares of all entries.

    Raises:
        ValueError: shapes do not fit, k is out of range, or the implementation cannot take the arguments.

    Example:
        >>>         >>> best = gradient_topk(jnp.eye(2), jnp.array([[1.0, -5.0], [3.0, 2.0]]), 2)
        >>> best.rows, best.columns, best.values
        (Array([0, 1], dtype=int32), Array([1, 0], dtype=int32), Array([-5.,  3.], dtype=float32))
    """
    if x.ndim != 2 or dy.ndim != 2 or x.shape[0] != dy.shape[0]:
        raise ValueError(f"x and dy must have the same tokens, got shapes {x.shape} and {dy.shape}")
    if not 1 <= k <= x.shape[1] * dy.shape[1]:
        raise ValueError(f"k must lie between 1 and {x.shape[1]} * {dy.shape[1]}, got {k}")
    check_size(x.shape[1], dy.shape[1])
    reason = (
        "no tokens"
        if x.shape[0] == 0
        else "a score of your own"
        if score is not None
        else "tokens of other devices"
        if summed_over
        else fits_kernels(x=x, dy=dy)
    )
    return run(
        implementation,
        (x, dy),
        xla=partial(gradient_topk_reference, k=k, score=score or magnitude, summed_over=summed_over),
        gpu=partial(gradient_topk_gpu, k=k),
        tpu=partial(gradient_topk_tpu, k=k),
        reason=reason,
    )
