"""LoRA-GA and LoRA-One: factors that start from the singular vectors of the first gradient."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from jaxsparse.common.options import check_positive
from jaxsparse.engine.description import SubspaceTransformation
from jaxsparse.engine.low_rank_description import GradientStart
from jaxsparse.methods.lora import low_rank_method
from jaxsparse.subspaces.targets import Targets

__all__ = ["lora_ga", "lora_one"]

Pair = tuple[Float[Array, "stack in r"], Float[Array, "stack r out"]]


def _lora_ga_factors(gradient: Float[Array, "stack in out"], rank: int, *, gamma: Any) -> Pair:
    """A from the singular vectors 1 ... r on the side of the inputs, B from r+1 ... 2r on that of the outputs."""
    inputs, _, outputs = jnp.linalg.svd(gradient, full_matrices=False)
    size = gradient.shape[2] ** 0.25 / gamma**0.5
    return size * inputs[:, :, :rank], size * outputs[:, rank : 2 * rank, :]


def _lora_one_factors(gradient: Float[Array, "stack in out"], rank: int, *, gamma: Any) -> Pair:
    """A and B from the first r singular triples of -g, each with the root of its value over the largest."""
    inputs, values, outputs = jnp.linalg.svd(-gradient, full_matrices=False)
    largest = values[:, :1]
    shares = jnp.sqrt(values[:, :rank] / jnp.where(largest == 0, 1, largest) / gamma)
    return inputs[:, :, :rank] * shares[:, None, :], shares[:, :, None] * outputs[:, :rank, :]


def lora_ga(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    gamma: float = 16.0,
    calibration_steps: int = 1,
    gradients: Mapping[str, Any] | None = None,
    targets: Targets = None,
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""LoRA-GA: as `lora`, with factors from the singular vectors of the first gradient; the model starts unchanged.

    .. math:: g = U S V^T, \quad A_0 = \frac{\text{out}^{1/4}}{\sqrt\gamma} U_{1 \dots r}, \quad
        B_0 = \frac{\text{out}^{1/4}}{\sqrt\gamma} V^T_{r+1 \dots 2r}, \quad W = W_0 - s A_0 B_0 + s A B

    LoRA-GA (arXiv 2407.05000). Followed is the authors' code (Outsider565/LoRA-GA, `lora_ga_init` with its defaults
    direction "ArB2r" and scale "stable"), written for a Flax kernel: the input's factor takes the first r singular
    vectors, the output's the next r, both with the outputs' fourth root. Two differences: the singular vectors are
    exact here, where that code has a randomised `svd_lowrank`; and the factors keep at least float32, so nothing like
    its `norm_clip` is needed. Its example scripts run with alpha/r, those of the paper with alpha/sqrt(r) and alpha =
    16: that is alpha=16*sqrt(rank) here.

    Args:
        inner: optimizer of A and B; it sees them as parameters.
        rank: r; 8 is this package's choice.
        alpha: the change of W is (alpha/r) A B; None: 2 r, as in Beyond LoRA (METHODS.md).
        gamma: makes the start small; 16, as the released configuration.
        calibration_steps: so many first updates look at their gradients, and train nothing. The state then holds a
            dense sum, which `gradients` spare.
        gradients: mean gradients by parameter path, in place of calibration steps.
        targets: the weights that may move; None: the attention projections of a known model.
        seed: kept for the common signature; nothing is drawn.

    Returns:
        A gradient transformation with state `js.LowRankState`.

    Raises:
        InputError: a rank below 1 or above half a side of a matrix, neither calibration steps nor gradients, or an
            alpha or gamma that is not positive.
        TypeError: no inner optimizer, or a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.zeros((4, 3))}
        >>> gradient = {"kernel": jnp.arange(12.0).reshape(4, 3)}
        >>> tx = js.lora_ga(optax.sgd(1.0), rank=1, targets="kernel")
        >>> first, state = tx.update(gradient, tx.init(params), params)
        >>> second, state = tx.update(gradient, state, params)
        >>> bool((first["kernel"] != 0).any()), bool((second["kernel"] != 0).any())
        (False, True)
    """
    check_positive("gamma", gamma)
    return low_rank_method(
        "lora_ga",
        inner,
        rank,
        alpha,
        start=GradientStart(partial(_lora_ga_factors, gamma=gamma), 2, True, calibration_steps, gradients),
        targets=targets,
        seed=seed,
    )


def lora_one(
    inner: optax.GradientTransformation | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    gamma: float = 128.0,
    calibration_steps: int = 1,
    gradients: Mapping[str, Any] | None = None,
    targets: Targets = None,
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""LoRA-One: as `lora`, with factors from the best rank-r step down the first gradient, which is taken.

    .. math:: -g = U S V^T, \quad A_0 = U_{1 \dots r} \sqrt{S_{1 \dots r} / (S_1 \gamma)}, \quad
        B_0 = \sqrt{S_{1 \dots r} / (S_1 \gamma)}\, V^T_{1 \dots r}, \quad W = W_0 + s A B

    LoRA-One (arXiv 2502.01235). Followed is the authors' code (YuanheZ/LoRA-One, `run_exp.py` with direction
    "LoRA-One" and scale "stable", without preconditioners, which it has not released); the README prints S for its
    square roots. The singular vectors are exact here, where that code has a randomised `svd_lowrank`. Its scripts run
    with alpha/sqrt(r) and alpha = 16: that is alpha=16*sqrt(rank) here. The product enters the weights with the last
    update that looks, or, if gradients are handed in, with the first one, which trains nothing else: its gradient is
    that of the model without the product. A matrix without any gradient stays as it is.

    Args:
        inner: optimizer of A and B; it sees them as parameters.
        rank: r; 8 is this package's choice.
        alpha: the change of W is (alpha/r) A B; None: 2 r, as in Beyond LoRA (METHODS.md).
        gamma: makes the first step small; 128, as the released configuration.
        calibration_steps: so many first updates look at their gradients, and train nothing. The state then holds a
            dense sum, which `gradients` spare.
        gradients: mean gradients by parameter path, in place of calibration steps.
        targets: the weights that may move; None: the attention projections of a known model.
        seed: kept for the common signature; nothing is drawn.

    Returns:
        A gradient transformation with state `js.LowRankState`.

    Raises:
        InputError: a rank below 1 or above a side of a matrix, neither calibration steps nor gradients, or an alpha
            or gamma that is not positive.
        TypeError: no inner optimizer, or a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.zeros((4, 3))}
        >>> gradient = {"kernel": jnp.arange(12.0).reshape(4, 3)}
        >>> tx = js.lora_one(optax.sgd(1.0), rank=1, targets="kernel")
        >>> first, state = tx.update(gradient, tx.init(params), params)
        >>> second, state = tx.update(gradient, state, params)
        >>> bool((first["kernel"] != 0).any()), bool((second["kernel"] != 0).any())
        (True, True)
    """
    check_positive("gamma", gamma)
    return low_rank_method(
        "lora_one",
        inner,
        rank,
        alpha,
        start=GradientStart(partial(_lora_one_factors, gamma=gamma), 1, False, calibration_steps, gradients),
        targets=targets,
        seed=seed,
    )
