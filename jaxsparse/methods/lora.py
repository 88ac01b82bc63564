"""LoRA and its relatives: W + (alpha/r) A B with factors that train, as gradient transformations.

The model stays as it is: the state holds A (in, r) and B (r, out), a dense gradient g of W gives theirs, (alpha/r) g
B^T and (alpha/r) A^T g, and an update is the change of (alpha/r) A B. In x W of a Flax kernel A meets the input.
"""

from typing import Any

import jax
import optax

from jaxsparse.engine.description import SubspaceTransformation
from jaxsparse.engine.low_rank import low_rank_engine
from jaxsparse.engine.low_rank_description import LowRank
from jaxsparse.methods.cheap_lora import chain_schedule
from jaxsparse.subspaces.targets import Targets

__all__ = ["asym_lora", "cola", "lora", "lora_plus", "low_rank_method", "rac_lora"]


def low_rank_method(
    name: str, inner: optax.GradientTransformation | None, rank: int, alpha: Any, **choices: Any
) -> SubspaceTransformation:
    """The transformation of a low-rank method."""
    return low_rank_engine(LowRank(name, inner, rank, alpha, **choices))


def lora(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Targets = None,
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""LoRA: trains A and B of W + (alpha/r) A B.

    .. math:: W = W_0 + (\alpha / r) A B, \quad A_0 \sim N(0, 0.02^2), \quad B_0 = 0

    LoRA (arXiv 2106.09685), with the start of Beyond LoRA, section 2.1. alpha/r scales the gradients of A and B too;
    Adam takes that out again, so under it alpha/r acts like a learning rate.

    Args:
        inner: optimizer of A and B; it sees them as parameters.
        rank: r; 8 is this package's choice.
        alpha: the change of W is (alpha/r) A B; None: 2 r, as in Beyond LoRA (METHODS.md).
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
        >>> params = {"kernel": jnp.zeros((4, 3))}
        >>> tx = js.lora(optax.sgd(1.0), rank=1, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 3))}, tx.init(params), params)
        >>> int(jnp.linalg.matrix_rank(updates["kernel"]))
        1
    """
    return low_rank_method(
        "lora",
        inner,
        rank,
        alpha,
        targets=targets,
        seed=seed,
    )


def lora_plus(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    ratio: float = 16.0,
    targets: Targets = None,
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""LoRA+: as `lora`, with a larger learning rate for B.

    .. math:: A \leftarrow A - \eta\, u_A, \quad B \leftarrow B - \lambda \eta\, u_B

    Beyond LoRA, section 2.1 (arXiv 2402.12354). The ratio multiplies what the inner optimizer says of B last of all,
    its weight decay included, as a learning rate of its own does.

    Args:
        inner: optimizer of A and B; it sees them as parameters.
        rank: r; 8 is this package's choice.
        alpha: the change of W is (alpha/r) A B; None: 2 r, as in Beyond LoRA (METHODS.md).
        ratio: lambda, the rate of B over that of A; 16 (METHODS.md; Beyond LoRA has 2 to 16).
        targets: the weights that may move; None: the attention projections of a known model.
        seed: of A.

    Returns:
        A gradient transformation with state `js.LowRankState`.

    Raises:
        InputError: a rank below 1 or above a side of a matrix, or an alpha or ratio that is not positive.
        TypeError: no inner optimizer, or a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.zeros((4, 3))}
        >>> tx = js.lora_plus(optax.sgd(1.0), rank=1, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 3))}, tx.init(params), params)
        >>> int(jnp.linalg.matrix_rank(updates["kernel"]))
        1
    """
    return low_rank_method(
        "lora_plus",
        inner,
        rank,
        alpha,
        ratio=ratio,
        targets=targets,
        seed=seed,
    )


def cola(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    total_steps: int | None = None,
    chains: int | None = None,
    chain_every: int | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    targets: Targets = None,
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Chain of LoRA: as `lora`, begun afresh for every chain.

    At steps t > 0 with t mod floor(T/k) = 0 the product stays in W, A is drawn anew, B is zero again, and the inner
    optimizer starts afresh. Beyond LoRA, equation 5 (arXiv 2401.04151).

    Args:
        inner: optimizer of A and B; it sees them as parameters.
        rank: r; 8 is this package's choice.
        alpha: the change of W is (alpha/r) A B; None: 2 r, as in Beyond LoRA (METHODS.md).
        total_steps: T, optimizer steps of the run; with `chains` it sets the length of a chain, floor(T / k).
        chains: k, the number of chains.
        chain_every: optimizer steps of a chain, in place of the two.
        learning_rate: if given (a value or a schedule), a step is -learning_rate(step) times what `inner` says,
            on a step count that chains do not restart: `inner=optax.scale_by_adam()` belongs to it.
        targets: the weights that may move; None: the attention projections of a known model.
        seed: of A.

    Returns:
        A gradient transformation with state `js.LowRankState`.

    Raises:
        InputError: a rank below 1 or above a side of a matrix, chains that do not fit the run, or an alpha that is
            not positive.
        TypeError: no inner optimizer, or a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.zeros((4, 3))}
        >>> tx = js.cola(optax.sgd(1.0), rank=1, chain_every=5, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 3))}, tx.init(params), params)
        >>> int(jnp.linalg.matrix_rank(updates["kernel"]))
        1
    """
    return low_rank_method(
        "cola",
        inner,
        rank,
        alpha,
        schedule=chain_schedule(total_steps, chains, chain_every),
        learning_rate=learning_rate,
        targets=targets,
        seed=seed,
    )


def asym_lora(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Targets = None,
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Asymmetric LoRA: trains B of W + (alpha/r) A B; A stays as it was drawn.

    .. math:: W = W_0 + (\alpha / r) A_0 B, \quad A_0 \sim N(0, 0.02^2), \quad B_0 = 0

    Beyond LoRA, equation 6 (arXiv 2402.16842). With the first columns of the identity as A this is `cla`: any A can
    be put into the state before the first update (`js.LowRankState`).

    Args:
        inner: optimizer of B; it sees it as parameters.
        rank: r; 8 is this package's choice.
        alpha: the change of W is (alpha/r) A B; None: 2 r, as in Beyond LoRA (METHODS.md).
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
        >>> params = {"kernel": jnp.zeros((4, 3))}
        >>> tx = js.asym_lora(optax.sgd(1.0), rank=1, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 3))}, tx.init(params), params)
        >>> int(jnp.linalg.matrix_rank(updates["kernel"]))
        1
    """
    return low_rank_method(
        "asym_lora",
        inner,
        rank,
        alpha,
        trains_a=False,
        targets=targets,
        seed=seed,
    )


def rac_lora(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    total_steps: int | None = None,
    chains: int | None = None,
    chain_every: int | None = None,
    learning_rate: optax.ScalarOrSchedule | None = None,
    targets: Targets = None,
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Randomized asymmetric chain of LoRA: as `asym_lora`, begun afresh for every chain.

    At steps t > 0 with t mod floor(T/k) = 0 the product stays in W, A is drawn anew, B is zero again, and the inner
    optimizer starts afresh. Beyond LoRA, equation 7 (arXiv 2410.08305). Two of Beyond LoRA's scripts train A too;
    that is `cola` (METHODS.md).

    Args:
        inner: optimizer of B; it sees it as parameters.
        rank: r; 8 is this package's choice.
        alpha: the change of W is (alpha/r) A B; None: 2 r, as in Beyond LoRA (METHODS.md).
        total_steps: T, optimizer steps of the run; with `chains` it sets the length of a chain, floor(T / k).
        chains: k, the number of chains.
        chain_every: optimizer steps of a chain, in place of the two.
        learning_rate: if given (a value or a schedule), a step is -learning_rate(step) times what `inner` says,
            on a step count that chains do not restart: `inner=optax.scale_by_adam()` belongs to it.
        targets: the weights that may move; None: the attention projections of a known model.
        seed: of A.

    Returns:
        A gradient transformation with state `js.LowRankState`.

    Raises:
        InputError: a rank below 1 or above a side of a matrix, chains that do not fit the run, or an alpha that is
            not positive.
        TypeError: no inner optimizer, or a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.zeros((4, 3))}
        >>> tx = js.rac_lora(optax.sgd(1.0), rank=1, chain_every=5, targets="kernel")
        >>> updates, state = tx.update({"kernel": jnp.ones((4, 3))}, tx.init(params), params)
        >>> int(jnp.linalg.matrix_rank(updates["kernel"]))
        1
    """
    return low_rank_method(
        "rac_lora",
        inner,
        rank,
        alpha,
        trains_a=False,
        schedule=chain_schedule(total_steps, chains, chain_every),
        learning_rate=learning_rate,
        targets=targets,
        seed=seed,
    )
