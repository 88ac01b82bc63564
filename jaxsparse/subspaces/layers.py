"""Whole layers: the stack of a model, whether its layers lie on one axis or in parts of their own."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxsparse.common.errors import InputError
from jaxsparse.subspaces.targets import MatrixView, ResolvedTarget, Targets, is_masked, resolve_targets
from jaxsparse.subspaces.units import Slices, Subspace

__all__ = ["STACK", "LayerStack", "WholeLayers", "find_layers"]

STACK = r"(.*?/)?(layers?|h|blocks?)"
"""What this package, Hugging Face and Flax users call a stack of layers."""


@dataclass(frozen=True)
class WholeLayers(Subspace):
    """Free layers of weights whose first axis counts layers; a unit is one layer of a weight.

    Attributes:
        count: free layers.
    """

    count: int

    def resolve(self, tree: Any, targets: Targets) -> list[ResolvedTarget]:
        """Returns the targets, of any shape; a layer is a group of input slices."""
        resolved = []
        for target in resolve_targets(tree, targets, whole=True):
            shape = target.view.shape
            outputs = shape[-1] if len(shape) > 1 else 1
            inputs = math.prod(shape) // outputs
            view = MatrixView(shape, target.view.order, 1, inputs, outputs, 0, max(len(shape) - 1, 1))
            resolved.append(replace(target, view=view, subspace=Slices(self.count, group=inputs // shape[0])))
        return resolved


@dataclass(frozen=True)
class LayerStack:
    """The stack of layers of a model, and what lies outside of it.

    Attributes:
        layers: number of layers.
        outside: positions, among the leaves of the parameters, of the weights outside the stack.
        kinds: positions of the weights of the stack: for every kind of weight that a layer has, one if the layers lie
            on its first axis, else one for each layer, in order.
    """

    layers: int
    outside: tuple[int, ...]
    kinds: tuple[tuple[int, ...], ...]

    @property
    def positions(self) -> list[int]:
        """The positions of all weights."""
        return sorted([*self.outside, *(position for kind in self.kinds for position in kind)])

    def split(self, tree: Any) -> tuple[Any, Any]:
        """Splits a tree shaped like the parameters into what lies outside the stack, and the stack.

        Returns:
            Two trees of the same structure, `optax.MaskedNode` where a weight is not theirs. Every kind of weight of
            the stack is one array with layers on its first axis, in the place of its first layer.
        """
        leaves, structure = jax.tree.flatten(tree, is_leaf=is_masked)
        outside: list[Any] = [optax.MaskedNode()] * len(leaves)
        stack: list[Any] = [optax.MaskedNode()] * len(leaves)
        for position in self.outside:
            outside[position] = leaves[position]
        for kind in self.kinds:
            own = [leaves[position] for position in kind]
            stack[kind[0]] = own[0] if len(own) == 1 else jnp.stack(own)
        return jax.tree.unflatten(structure, outside), jax.tree.unflatten(structure, stack)

    def join(self, outside: Any, stack: Any) -> dict[int, Any]:
        """Returns the weights of two trees as `split` gives them, by position."""
        outside_leaves, stack_leaves = (jax.tree.leaves(tree, is_leaf=is_masked) for tree in (outside, stack))
        found = {position: outside_leaves[position] for position in self.outside}
        for kind in self.kinds:
            together = stack_leaves[kind[0]]
            own = [together] if len(kind) == 1 else list(together)
            found |= dict(zip(kind, own, strict=True))
        return found


def find_layers(params: Any, targets: Targets, stack: str, count: int) -> LayerStack:
    """Finds the layers of a model.

    Args:
        params: any pytree of arrays (or of anything with a shape and dtype).
        targets: the weights that may move; None: every floating-point weight.
        stack: regular expression for the path of the stack. What lies under it (`layers/...`) has layers on its first
            axis; under `layers_3/...` or `layers/3/...` lies layer 3.
        count: how many layers are wanted.

    Returns:
        The weights outside and inside the stack.

    Raises:
        InputError: there is no stack, or more than one; it has fewer layers; or its layers are not alike.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"embedding": jnp.ones((9, 4)), "layers": {"kernel": jnp.ones((3, 4, 4))}}
        >>> find_layers(params, None, STACK, 2)
        LayerStack(layers=3, outside=(0,), kinds=((1,),))
    """
    resolved = resolve_targets(params, targets, whole=True)
    path = re.compile(rf"(?P<stack>{stack})([/_](?P<layer>\d+))?/(?P<weight>.+)")
    outside, stacks = [], set()
    kinds: dict[str, dict[int | None, ResolvedTarget]] = {}
    for target in resolved:
        match = path.fullmatch(target.path)
        if match is None:
            outside.append(target.position)
            continue
        stacks.add(match["stack"])
        layer = None if match["layer"] is None else int(match["layer"])
        kinds.setdefault(match["weight"], {})[layer] = target
    if len(stacks) != 1:
        raise _no_stack(sorted(stacks), stack, resolved)
    layers = _count_layers(stacks.pop(), kinds)
    if count > layers:
        raise InputError(f"layers={count} is more than the {layers} layers of the model")
    positions = [tuple(kind[layer].position for layer in sorted(kind)) for kind in kinds.values()]  # type: ignore[type-var]
    return LayerStack(layers, tuple(outside), tuple(positions))


def _no_stack(stacks: Sequence[str], pattern: str, targets: Sequence[ResolvedTarget]) -> InputError:
    if stacks:
        return InputError(f"there are several stacks of layers: {', '.join(stacks)}; name one of them by stack")
    return InputError(
        f"this model has no layers to draw from: no weight that may move lies under {pattern!r}, as "
        "layers/attention/kernel with layers on its first axis, or as layers_3/attention/kernel; it has "
        f"{', '.join(target.path for target in targets[:5])}. stack names the layers of other models"
    )


def _count_layers(stack: str, kinds: dict[str, dict[int | None, ResolvedTarget]]) -> int:
    """Number of layers, which is the same for every kind of weight, as are the shapes of its layers."""
    numbers = {layer for kind in kinds.values() for layer in kind} - {None}
    counts = set()
    for weight, kind in kinds.items():
        shapes = {target.view.shape for target in kind.values()}
        if set(kind) == {None} and shapes != {()}:
            counts.add(shapes.pop()[0])
        elif set(kind) == numbers and len(shapes) == 1:
            counts.add(len(numbers))
        else:
            having = ", ".join(f"{target.path} {target.view.shape}" for target in kind.values())
            raise InputError(
                f"{weight} must have layers on its first axis, or be alike in all {len(numbers)} layers of {stack}; "
                f"there is {having}. targets can leave it out"
            )
    if len(counts) > 1:
        having = ", ".join(f"{weight} {next(iter(kind.values())).view.shape}" for weight, kind in kinds.items())
        raise InputError(f"the weights of {stack} do not agree on the number of layers, their first axis: {having}")
    return counts.pop()
