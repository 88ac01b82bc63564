"""Whole weights: full fine-tuning, and BitFit's biases. Their state is dense by nature."""

import re
from dataclasses import dataclass
from typing import Any

import jax
import optax

from jaxsparse.common.errors import InputError
from jaxsparse.engine.description import Description, SlotsDType, SubspaceTransformation
from jaxsparse.engine.reference import reference_engine
from jaxsparse.select.scores import FIRST
from jaxsparse.subspaces.targets import ResolvedTarget, Targets
from jaxsparse.subspaces.units import Everything

__all__ = ["bitfit", "full"]

# Flax, Equinox and Hugging Face call it bias, Haiku and hand-written models b; attention in one piece has in_proj_bias.
_BIAS = re.compile(r"(.*/)?(b|bias|[^/]*_bias)")


def full(
    inner: optax.GradientTransformation | None = None,
    *,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Trains every entry of every weight: full fine-tuning, what all others are measured against.

    .. math:: W \leftarrow W + \mathrm{inner}(\partial L / \partial W, W)

    Dense by nature: the inner optimizer's state has the model's size, and weights narrower than float32 have masters of
    that size too. In float32 this is `inner` alone, but for the step that a gradient which is not finite leaves out.

    Args:
        inner: optimizer of the weights; it sees them as parameters, so weight decay acts on them.
        targets: the weights that move, of any shape (`js.Target` need not name axes); None: every floating-point
            parameter. Others, such as counters and random keys, are left alone.
        slots_dtype: "promote" keeps float32 masters of narrower weights; None keeps none.
        seed: kept for the common signature; nothing is drawn.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: in `init`: targets that match nothing or are no floating-point numbers; a model without any.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"kernel": jnp.ones((4, 3)), "scale": jnp.ones(()), "count": jnp.zeros((), jnp.int32)}
        >>> state = js.full(optax.adam(1e-3)).init(params)
        >>> sum(leaf.size for leaf in jax.tree.leaves(state.inner[0].mu))
        13
    """
    return _whole(Description, "full", inner, targets, slots_dtype, seed)


def bitfit(
    inner: optax.GradientTransformation | None = None,
    *,
    targets: Targets = None,
    slots_dtype: SlotsDType = "promote",
    seed: int | jax.Array = 0,
) -> SubspaceTransformation:
    r"""Trains every bias, and nothing else.

    .. math:: b \leftarrow b + \mathrm{inner}(\partial L / \partial b, b)

    BitFit (arXiv 2106.10199), which also trains the head of a new task: name it in `targets` if there is one. The
    biases are few, and dense.

    Args:
        inner: optimizer of the biases; it sees them as parameters.
        targets: the weights that move, of any shape; None: every floating-point parameter whose name is `bias` (Flax,
            Equinox), `b` (Haiku) or ends in `_bias`, those of norms included, as in the paper.
        slots_dtype: "promote" keeps float32 masters of narrower biases; None keeps none.
        seed: kept for the common signature; nothing is drawn.

    Returns:
        A gradient transformation with state `js.SubspaceState`.

    Raises:
        InputError: in `init`: the model has no biases, as most of the LLaMA family.
        TypeError: a value of the wrong kind.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> import jaxsparse as js
        >>> params = {"dense": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
        >>> tx = js.bitfit(optax.sgd(0.5))
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["dense"]["bias"], bool((updates["dense"]["kernel"] == 0).all())
        (Array([-0.5, -0.5, -0.5], dtype=float32), True)
    """
    return _whole(_Biases, "bitfit", inner, targets, slots_dtype, seed)


@dataclass(frozen=True)
class _Biases(Description):
    """A description whose default targets are the biases."""

    def resolve(self, tree: Any) -> list[ResolvedTarget]:
        """Returns the targets in a tree shaped like the parameters."""
        targets = super().resolve(tree)
        if self.targets is not None or not targets:
            return targets
        biases = [target for target in targets if _BIAS.fullmatch(target.path)]
        if not biases:
            raise InputError(
                f"{self.name} trains biases, and this model has none: no floating-point parameter is named bias, b or "
                f"..._bias; it has {', '.join(target.path for target in targets[:5])}. targets can name others"
            )
        return biases


def _whole(
    description: type[Description], name: str, inner: Any, targets: Targets, slots_dtype: SlotsDType, seed: Any
) -> SubspaceTransformation:
    """A method that frees all of its targets, for good."""
    return reference_engine(
        description(
            name=name,
            inner=inner,
            subspace=Everything(),
            score=FIRST,
            sees="weight",
            targets=targets,
            slots_dtype=slots_dtype,
            seed=seed,
        )
    )
