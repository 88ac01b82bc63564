"""SMT: the blocks of the attention projections whose mean gradient is largest."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax

from jaxsparse.common.errors import InputError
from jaxsparse.engine.description import Description, Scope, SlotsDType, SubspaceTransformation
from jaxsparse.engine.reference import reference_engine
from jaxsparse.methods.mean_gradient import mean_gradient
from jaxsparse.select.scores import SIGNED_GRADIENT
from jaxsparse.subspaces.blocks import Blocks
from jaxsparse.subspaces.budgets import Budget
from jaxsparse.subspaces.targets import ResolvedTarget, Targets

__all__ = ["smt"]

# Of a known model's attention projections SMT leaves out the one behind the heads.
_OUTPUT_PROJECTION = re.compile(r".*(o_proj|c_proj)/kernel")


@dataclass(frozen=True)
class _QueryKeyValue(Description):
    """A description whose default targets are the query, key and value projections of a known model."""

    def resolve(self, tree: Any) -> list[ResolvedTarget]:
        """Returns the targets in a tree shaped like the parameters."""
        targets = super().resolve(tree)
        if self.targets is not None:
            return targets
        return [target for target in targets if not _OUTPUT_PROJECTION.fullmatch(target.path)]


def smt(
    inner: optax.GradientTransformation | None = None,
    *,
    blocks: int | None = None,
    density: float | None = None,
    budget: float | None = None,
    size: int = 256,
    scope: Scope = "global",
    calibration_steps: int = 100,
    gradients: Mapping[str, Any] | None = None,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Trains the blocks of the weights whose mean gradient over calibration data is largest, picked once.

    .. math:: s(\mathrm{block}) = | \mathrm{mean}_{(i, j) \in \mathrm{block}} \bar g_{ij} |

    SMT (arXiv 2405.15525), as METHODS.md has it: the mean comes first, then the magnitude, as in the authors' default.
    Their code needs matrices that blocks divide; here a block at the edge ends with the matrix, and its mean is over
    what it has. Where matrices are narrower than a block, their blocks are as wide as the matrix.

    Args:
        inner: optimizer of the slots; it sees zeros as parameters.
        blocks: n, the number of free blocks of all targets together; under scope "matrix" of every matrix. Give this,
            `density` or `budget`.
        density: free entries / entries of the targets; the number of blocks that comes nearest.
        budget: free entries / all parameters (0.86 % in the authors' README); the number of blocks that comes nearest.
        size: rows and columns of a block; 256 in the paper.
        scope: "global": blocks compete over all targets; "matrix": inside each matrix.
        calibration_steps: so many first updates change nothing; the mean of their gradients picks. 100 batches in the
            paper (whose code trains all weights meanwhile). The state then holds a dense sum, which `gradients` spare.
        gradients: mean gradients by parameter path, in place of calibration steps.
        targets: the weights that may move; None: the query, key and value projections of a known model (GPT-2: c_attn,
            which holds all three); an unknown model must name its weights.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        seed: kept for the common signature; nothing is drawn.

    Returns:
        A gradient transformation with state `js.SubspaceState`. Its slots hold whole blocks, (n, size, size) and less
        where all targets are narrower; what a block at the edge lacks is there as slots that never move.

    Raises:
        InputError: a value out of range, more blocks than there are, or neither calibration steps nor gradients.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"a": jnp.zeros((4, 2)), "b": jnp.zeros((2, 3))}
        >>> means = {"a": jnp.ones((4, 2)).at[2:].set(-3.0), "b": jnp.ones((2, 3)).at[:, 2].set(2.0)}
        >>> tx = js.smt(optax.sgd(1.0), blocks=2, size=2, gradients=means, targets=".*")
        >>> updates, state = tx.update(means, tx.init(params), params)
        >>> updates["b"]
        Array([[-0., -0., -2.],
               [-0., -0., -2.]], dtype=float32)
    """
    given = [
        name for name, value in (("blocks", blocks), ("density", density), ("budget", budget)) if value is not None
    ]
    if len(given) != 1:
        raise InputError(f"smt needs exactly one of blocks, density and budget; got {' and '.join(given) or 'none'}")
    share = None if blocks is not None else Budget(density, budget, "proportional")
    return reference_engine(
        _QueryKeyValue(
            name="smt",
            inner=inner,
            subspace=Blocks(blocks, size=size, budget=share),
            score=SIGNED_GRADIENT,
            scope=scope,
            **mean_gradient("smt", gradients, calibration_steps),
            targets=targets,
            slots_dtype=slots_dtype,
            seed=seed,
        )
    )
