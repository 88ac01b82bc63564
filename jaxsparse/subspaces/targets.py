"""Which weights may move, and how each is read as matrices."""

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int, Num

from jaxsparse.common.errors import InputError
from jaxsparse.common.paths import flatten_with_paths

__all__ = [
    "KNOWN_TARGETS",
    "MatrixView",
    "ResolvedTarget",
    "Target",
    "Targets",
    "is_masked",
    "matrix_view",
    "resolve_targets",
    "tree_size",
]


def is_masked(node: Any) -> bool:
    """Whether a node stands for a weight that does not move: `optax.masked` leaves such nodes, and so do our states.

    They count as leaves wherever we flatten, so that a weight has one position in all trees.
    """
    return isinstance(node, optax.MaskedNode)


@dataclass(frozen=True)
class Target:
    """A pattern of weights that may move, and which of their axes are inputs, outputs and layers.

    Attributes:
        pattern: a regular expression that matches the parameter's whole path (`re.fullmatch`).
        in_axes: the axes that a Flax kernel contracts with its input; None: the first axis that is no layer.
        out_axes: the axes of the outputs; None: all that are neither layers nor inputs.
        stack_axes: the axes that count layers of a scanned model; each layer is a matrix of its own.
        density: free coordinates / matrix size for these weights; None: what the method says.
        subspace: where these weights may move, one of `js.subspaces`; None: what the method says.

    Example:
        >>> Target(r".*/query/kernel", in_axes=(0,), out_axes=(1, 2)).pattern
        '.*/query/kernel'
    """

    pattern: str
    in_axes: tuple[int, ...] | None = None
    out_axes: tuple[int, ...] | None = None
    stack_axes: tuple[int, ...] = ()
    density: float | None = None
    subspace: Any = None


Targets = str | Target | Sequence[str | Target] | None

# The attention projections of the models that this package, Hugging Face and Flax users write. GASDU,
# section 5: "on the query, key, value, and output projection matrices of every transformer block".
KNOWN_TARGETS = (
    Target(r"(.*/)?layers/self_attn/(q|k|v|o)_proj/kernel", stack_axes=(0,)),
    Target(r"(.*/)?layers/attn/(c_attn|c_proj)/kernel", stack_axes=(0,)),
    Target(r"(.*/)?(layers|h|blocks)[/_]\d+/.*(q|k|v|o)_proj/kernel"),
    Target(r"(.*/)?(layers|h|blocks)[/_]\d+/.*attn/(c_attn|c_proj)/kernel"),
)


@dataclass(frozen=True)
class MatrixView:
    """Reads a weight of any axis order as a stack of (in, out) matrices, and back.

    Attributes:
        shape: the weight's own shape.
        order: the permutation that brings layers first, then inputs, then outputs.
        stack: number of matrices; 1 for a weight without layer axes.
        in_size: rows of each matrix, the inputs.
        out_size: columns of each matrix, the outputs.
        layer_axes: how many axes count layers.
        input_axes: how many axes count inputs.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    stack: int
    in_size: int
    out_size: int
    layer_axes: int = 0
    input_axes: int = 1

    @property
    def size(self) -> int:
        """Number of entries of one matrix."""
        return self.in_size * self.out_size

    @property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The axes that count layers, inputs and outputs, as `matrix_view` takes them."""
        ends = self.layer_axes, self.layer_axes + self.input_axes
        return self.order[: ends[0]], self.order[ends[0] : ends[1]], self.order[ends[1] :]

    @property
    def is_in_order(self) -> bool:
        """Whether the matrices lie in memory as the weight does, so that reading them as such moves nothing."""
        return self.order == tuple(range(len(self.shape)))

    def place(self, index: Int[Array, "..."]) -> Int[Array, "..."]:
        """Returns where entries lie in the weight's own layout.

        Args:
            index: flat indices in a matrix, in (in, out) order.

        Returns:
            Flat indices over the weight's axes that count no layers; the matrix's size for indices beyond it.
        """
        if self.is_in_order:
            return index
        beyond = index >= self.size
        stride, strides = 1, {}
        for axis in reversed(range(len(self.shape))):
            if axis not in self.order[: self.layer_axes]:
                strides[axis] = stride
                stride *= self.shape[axis]
        place = jnp.zeros_like(index)
        for axis in reversed(self.order[self.layer_axes :]):
            place = place + index % self.shape[axis] * strides[axis]
            index = index // self.shape[axis]
        return jnp.where(beyond, self.size, place)

    def matrices(self, weight: Num[Array, "..."]) -> Num[Array, "stack in out"]:
        """Returns the weight as a stack of matrices."""
        return jnp.transpose(weight, self.order).reshape(self.stack, self.in_size, self.out_size)

    def weight(self, matrices: Num[Array, "stack in out"]) -> Num[Array, "..."]:
        """Returns a stack of matrices in the weight's own layout; the inverse of `matrices`."""
        transposed = matrices.reshape([self.shape[axis] for axis in self.order])
        return jnp.transpose(transposed, [self.order.index(axis) for axis in range(len(self.shape))])


@dataclass(frozen=True)
class ResolvedTarget:
    """One weight that may move: its place in the flattened tree, its path and its matrices.

    Attributes:
        position: index among the leaves of the parameter tree.
        path: the path as a string.
        view: how the weight is read as matrices.
        density: the density that its `Target` asks for, or None.
        subspace: the subspace that its `Target` asks for, or None.
        activation_of: the weight whose inputs' activations score this one; None: itself.
    """

    position: int
    path: str
    view: MatrixView
    density: float | None = None
    subspace: Any = None
    activation_of: "ResolvedTarget | None" = None


def _matrix_view(path: str, shape: tuple[int, ...], target: Target) -> MatrixView:
    """Works out the axes of one weight, or says why it is no matrix."""
    axes = len(shape)

    def normalised(name: str, given: Sequence[int]) -> tuple[int, ...]:
        if any(not -axes <= axis < axes for axis in given):
            raise InputError(f"{name}={tuple(given)} of target {target.pattern!r} does not fit {path} of shape {shape}")
        return tuple(axis % axes for axis in given)

    stack = normalised("stack_axes", target.stack_axes)
    rest = [axis for axis in range(axes) if axis not in stack]
    if target.in_axes is None and target.out_axes is None and len(rest) < 2:
        raise InputError(
            f"target {path} is not a matrix: shape {shape}, layer axes {stack}; a target needs inputs and outputs"
        )
    if target.in_axes is None and target.out_axes is None and len(rest) != 2:
        raise InputError(
            f"target {path} has shape {shape}: name its axes by "
            f"js.Target({target.pattern!r}, stack_axes=(0,)) if the first axis counts layers, "
            "or by in_axes and out_axes"
        )
    if target.in_axes is not None:
        inputs = normalised("in_axes", target.in_axes)
        outputs = normalised("out_axes", target.out_axes) if target.out_axes is not None else None
    else:
        outputs = normalised("out_axes", target.out_axes) if target.out_axes is not None else tuple(rest[1:])
        inputs = tuple(axis for axis in rest if axis not in outputs)
    if outputs is None:
        outputs = tuple(axis for axis in rest if axis not in inputs)
    if sorted((*stack, *inputs, *outputs)) != list(range(axes)):
        raise InputError(
            f"axes of target {path} (shape {shape}) must be named once each; "
            f"got layers {stack}, inputs {inputs}, outputs {outputs}"
        )
    return matrix_view(shape, stack, inputs, outputs)


def matrix_view(
    shape: tuple[int, ...], layers: Sequence[int], inputs: Sequence[int], outputs: Sequence[int]
) -> MatrixView:
    """Returns how a weight is read as matrices, from its axes, each named once.

    Args:
        shape: the weight's shape.
        layers: axes that count layers.
        inputs: axes of the inputs.
        outputs: axes of the outputs.

    Example:
        >>> view = matrix_view((3, 4, 2, 5), (0,), (1,), (2, 3))
        >>> view.stack, view.in_size, view.out_size
        (3, 4, 10)
    """
    in_size, out_size = (math.prod(shape[axis] for axis in group) for group in (inputs, outputs))
    stack = math.prod(shape[axis] for axis in layers)
    return MatrixView(shape, (*layers, *inputs, *outputs), stack, in_size, out_size, len(layers), len(inputs))


def _whole_view(shape: tuple[int, ...]) -> MatrixView:
    """Reads a weight of any shape as it lies: its last two axes are a matrix, those before them a stack."""
    in_size, out_size = (1, 1, *shape)[-2:]
    stack, axes = math.prod(shape[:-2]), len(shape)
    return MatrixView(shape, tuple(range(axes)), stack, in_size, out_size, max(axes - 2, 0), min(max(axes - 1, 0), 1))


def _as_targets(targets: str | Target | Sequence[str | Target]) -> list[Target]:
    """Turns what the user gave into a list of `Target`s whose patterns compile."""
    given = [targets] if isinstance(targets, str | Target) else list(targets)
    if not given:
        raise InputError("targets is empty: give a regular expression or a list of js.Target")
    resolved = []
    for item in given:
        target = Target(item) if isinstance(item, str) else item
        if not isinstance(target, Target):
            raise TypeError(f"targets: expected a regular expression or js.Target, got {item!r}")
        try:
            re.compile(target.pattern)
        except re.error as error:
            raise InputError(f"targets: {target.pattern!r} is no regular expression: {error}") from None
        resolved.append(target)
    return resolved


def _unmatched(pattern: str, paths: Sequence[str]) -> InputError:
    """The error for a pattern without a match, with the paths whose components come nearest to its own."""
    wanted = [part for part in re.sub(r"[\\^$()\[\]{}?*+|.]+", "", pattern).split("/") if part]

    def likeness(path: str) -> float:
        return sum(
            max(difflib.SequenceMatcher(None, part, have).ratio() for have in path.split("/")) for part in wanted
        )

    near = sorted(paths, key=likeness, reverse=True)[:3]
    return InputError(
        f"target {pattern!r} matches no parameter (it must match the whole path); near misses: {', '.join(near)}"
    )


def resolve_targets(params: Any, targets: Targets, *, whole: bool = False) -> list[ResolvedTarget]:
    """Finds the weights that may move.

    Args:
        params: any pytree of arrays (or of anything with a shape and dtype); linen, NNX or plain.
        targets: a regular expression, `Target`s, or a list of either, the first match of a path wins; None:
            the attention projections of a known model (`KNOWN_TARGETS`), or if `whole` every floating-point weight.
        whole: weights move as a whole, so that those of any shape will do, and no axes need be named.

    Returns:
        The targets in the tree's flattening order; nothing for a tree without leaves, such as the placeholder
        of `optax.tree.map_params`.

    Raises:
        InputError: a pattern matches nothing or is no regular expression; a target is not a matrix of
            floating-point numbers, or its axes are not named.

    Example:
        >>> import jax.numpy as jnp
        >>> params = {"q_proj": {"kernel": jnp.ones((4, 6))}, "norm": {"scale": jnp.ones(4)}}
        >>> [(t.path, t.view.in_size, t.view.out_size) for t in resolve_targets(params, r".*/kernel")]
        [('q_proj/kernel', 4, 6)]
    """
    pairs, _ = flatten_with_paths(params, is_leaf=is_masked)
    if all(is_masked(leaf) for _, leaf in pairs):
        return []
    if whole and targets is None:
        return _all_whole(pairs)
    known = targets is None
    patterns = list(KNOWN_TARGETS) if targets is None else _as_targets(targets)
    unmatched = {target.pattern for target in patterns}
    resolved = []
    for position, (path, leaf) in enumerate(pairs):
        target = next((target for target in patterns if re.fullmatch(target.pattern, path)), None)
        if target is None or is_masked(leaf):
            continue
        unmatched.discard(target.pattern)
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(f"target {path} has dtype {leaf.dtype}: slots can only move floating-point weights")
        shape = tuple(leaf.shape)
        if math.prod(shape) == 0:
            raise InputError(f"target {path} is empty: shape {shape}")
        as_it_lies = whole and target.in_axes is None and target.out_axes is None
        view = _whole_view(shape) if as_it_lies else _matrix_view(path, shape, target)
        resolved.append(ResolvedTarget(position, path, view, target.density, target.subspace))
    paths = [path for path, leaf in pairs if not is_masked(leaf)]
    if known and not resolved:
        raise InputError(
            "targets is not given and this is no known model; name its weights, "
            f"for example by a regular expression that matches one of {', '.join(paths[:5])}"
        )
    if not known and unmatched:
        raise _unmatched(next(t.pattern for t in patterns if t.pattern in unmatched), paths)
    return resolved


def _all_whole(pairs: Sequence[tuple[str, Any]]) -> list[ResolvedTarget]:
    """Every floating-point weight as a target; other leaves, such as counters and random keys, are left out."""
    targets = [
        ResolvedTarget(position, path, _whole_view(tuple(leaf.shape)))
        for position, (path, leaf) in enumerate(pairs)
        if not is_masked(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating) and math.prod(leaf.shape) > 0
    ]
    if not targets:
        paths = ", ".join(path for path, _ in pairs[:5])
        raise InputError(f"the model has no floating-point parameters; it has {paths}")
    return targets


def tree_size(params: Any) -> int:
    """Returns N, the number of all entries of all arrays of a tree."""
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(params))
