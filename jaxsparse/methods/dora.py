"""DoRA: magnitude and direction of the weights of every output train apart."""

import jax
import optax

from jaxsparse.engine.description import SubspaceTransformation
from jaxsparse.methods.lora import low_rank_method
from jaxsparse.subspaces.targets import Targets

__all__ = ["dora"]


def dora(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Targets = None,
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Trains a magnitude for every output, and its direction by a low-rank product.

    .. math:: W = m \cdot V / c, \quad V = W_0 + (\alpha / r) A B, \quad c = \|V\|_2 \text{ of every output}, \quad
        m_0 = \|W_0\|_2, \quad A_0 \sim N(0, 0.02^2), \quad B_0 = 0

    DoRA (arXiv 2402.09353, equation 5). The gradient takes the norm c for a constant (section 4.3, equation 11), as
    the authors' released code does by default (`dora_simple`). An output whose weights are all zero has no direction,
    and stays as it is; the authors' code divides by zero there. The state holds c too, from which V = W c / m.

    Args:
        inner: optimizer of A, B and m; it sees them as parameters.
        rank: r; 8 is this package's choice (the paper's tables: 16 and 32, and half of that).
        alpha: the change of V is (alpha/r) A B; None: 2 r, as in the released scripts.
        targets: the weights that may move; None: the attention projections of a known model.
        seed: of A.

    Returns:
        A gradient transformation with state `js.LowRankState`.

    Raises:
        InputError: a rank below 1 or above a side of a matrix, or an alpha that is not positive.
        TypeError: no inner optimizer, or a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.arange(12.0).reshape(4, 3)}
        >>> tx = js.dora(optax.sgd(1.0), rank=1, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 3))}, tx.init(params), params)
        >>> state.factors.magnitude["kernel"].shape, bool((updates["kernel"] != 0).all())
        ((1, 3), True)
    """
    return low_rank_method(
        "dora",
        inner,
        rank,
        alpha,
        magnitude=True,
        targets=targets,
        seed=seed,
    )
