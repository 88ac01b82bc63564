"""Reordering the heads and channels of a model so that chosen ones come first, without changing what it computes."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num

from jaxsparse.common.errors import InputError
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.subspaces.coupled import Structure, coupled_structures
from jaxsparse.subspaces.targets import is_masked

__all__ = ["CoupledPermutation", "permute_coupled"]

_Order = Int[np.ndarray, "layers units"]
# The rank of units that are not chosen: behind all others, with room above.
_UNCHOSEN = 2**30


class Move(NamedTuple):
    """How one parameter is rearranged.

    Attributes:
        order: the unit that comes to each place, per layer.
        axis: the axis along which the units lie.
        parts: how often they lie there: 3 where one weight holds queries, keys and values, else 1.
    """

    order: _Order
    axis: int
    parts: int


@dataclass(frozen=True, eq=False)  # hashed by identity, so that `jax.jit` takes one
class CoupledPermutation:
    """A reordering of heads and channels, as a function of parameters.

    Attributes:
        moves: what happens to which parameter, by path.
    """

    moves: Mapping[str, Move]

    def __call__(self, params: Any) -> Any:
        """Returns the model with its heads and channels in the new order; every number stays what it is, bit by bit.

        Args:
            params: a tree with the paths and shapes of the model that the permutation was made for.
        """
        pairs, structure = flatten_with_paths(params, is_leaf=is_masked)
        leaves = [
            _rearranged(leaf, self.moves[path]) if path in self.moves and not is_masked(leaf) else leaf
            for path, leaf in pairs
        ]
        return jax.tree.unflatten(structure, leaves)

    def inverse(self) -> "CoupledPermutation":
        """Returns the reordering that undoes this one."""
        return CoupledPermutation(
            {path: move._replace(order=np.argsort(move.order, axis=1)) for path, move in self.moves.items()}
        )

    def sources(self, selection: Any) -> dict[str, _Order]:
        """Returns where units of the result lie in the argument.

        Args:
            selection: units by kernel path, as in `permute_coupled`.

        Returns:
            For `permute_coupled`'s inverse: where the chosen units lie in the permuted model, by kernel path.
        """
        return {
            path: np.take_along_axis(self.moves[path].order, _units(path, units, *self.moves[path].order.shape), axis=1)
            for path, units in _by_path(selection)
        }


def permute_coupled(params: Any, selection: Any, *, head_size: int | None = None) -> tuple[Any, CoupledPermutation]:
    """Puts chosen heads and channels first, in every weight that they couple, so that the outputs do not change.

    S2FT, section 3.2: after it, what a method trains is a dense block at the beginning of a weight. Chosen channels of
    a feed-forward layer come first, in the order given, in the outputs of up and gate and the inputs of down; so do
    chosen heads of an attention in the outputs of query, key and value and the inputs of output.

    Under grouped-query attention (which the paper leaves open) whole groups of heads that share a key and a value move
    together: groups with chosen heads come first, ordered by their first chosen head, and in each group its chosen
    heads come first. Heads stay whole, so rotary positions are unaffected. What is not chosen keeps its order.

    Args:
        params: a model with the structures of `js.s2ft`; every layer is permuted on its own.
        selection: for each structure, by the path of a kernel: the numbers of the chosen heads or channels, (count,)
            for all layers or (layers, count). The `support` of a state of `js.s2ft` is one. Where several kernels of a
            structure are named, the units of output (or down) come first; those of key and value are groups.
            Structures without a selection stay as they are.
        head_size: width of one attention head; None: the shapes of the parameters show it.

    Returns:
        The permuted parameters, and the inverse: a function that restores the weights bit for bit.

    Raises:
        InputError: a path that is no kernel of a coupled structure, units that do not exist or come twice, a head size
            that does not fit, or parameters of a structure that are not known.

    Example:
        >>> params = {"up_proj": {"kernel": jnp.eye(3)}, "down_proj": {"kernel": jnp.eye(3)}}
        >>> permuted, inverse = permute_coupled(params, {"down_proj/kernel": [2]})
        >>> permuted["down_proj"]["kernel"]
        Array([[0., 0., 1.],
               [1., 0., 0.],
               [0., 1., 0.]], dtype=float32)
        >>> inverse(permuted)["down_proj"]["kernel"][0]
        Array([1., 0., 0.], dtype=float32)
    """
    chosen = dict(_by_path(selection))
    pairs, _ = flatten_with_paths(params, is_leaf=is_masked)
    shapes = {path: tuple(leaf.shape) for path, leaf in pairs if not is_masked(leaf)}
    structures = coupled_structures(params)
    paths = [structure.path(role) for structure in structures for role in structure.names]
    for path in chosen:
        if path not in paths:
            raise InputError(
                f"selection names {path}, which is no kernel of a coupled structure; those are {', '.join(paths[:8])}"
            )
    moves: dict[str, Move] = {}
    for structure in structures:
        own = {role: chosen[structure.path(role)] for role in structure.names if structure.path(role) in chosen}
        if own:
            moves |= _moves(structure, own, shapes, head_size)
    permutation = CoupledPermutation(moves)
    return permutation(params), permutation.inverse()


def _by_path(selection: Any) -> Iterator[tuple[str, Any]]:
    """(path, units) of a mapping from paths, or of a tree like a support."""
    for path, units in flatten_with_paths(selection, is_leaf=lambda node: is_masked(node) or _is_list(node))[0]:
        if not is_masked(units):
            yield path, np.asarray(units)


def _is_list(node: Any) -> bool:
    """Whether a node is a list of unit numbers, and not one of a tree's own lists."""
    return isinstance(node, list) and all(np.ndim(leaf) == 0 for leaf in jax.tree.leaves(node))


def _moves(
    structure: Structure, chosen: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], head_size: int | None
) -> dict[str, Move]:
    """How the parameters of one structure are rearranged."""
    absent = {*structure.names} - {*structure.shapes}
    if absent:
        raise InputError(f"{structure.path(min(absent))} is masked: a structure is permuted as a whole")
    size = structure.unit_size(head_size)
    _check_known(structure, shapes, size)
    stack = structure.shapes[structure.joint][0] if structure.layers else 1
    counts = {role: _width(structure, role) // size for role in structure.names}
    for role in structure.names:
        if _width(structure, role) % size:
            raise InputError(f"{structure.path(role)} does not split into heads of head_size={size}")
    orders = _orders(structure, chosen, counts, stack)
    moves = {}
    for role in structure.names:
        kernel_axis = structure.layers + (role != structure.joint)
        parts = 3 if role == "query_key_value" else 1
        moves[structure.path(role)] = Move(orders[role], kernel_axis, parts)
        if role != structure.joint and structure.path(role, "bias") in shapes:
            moves[structure.path(role, "bias")] = Move(orders[role], structure.layers, parts)
    return moves


def _width(structure: Structure, role: str) -> int:
    """The number of coupled slices of a projection."""
    shape = structure.shapes[role]
    coupled = shape[structure.layers : -1] if role == structure.joint else shape[structure.layers + 1 :]
    return int(np.prod(coupled)) // (3 if role == "query_key_value" else 1)


def _check_known(structure: Structure, shapes: Mapping[str, tuple[int, ...]], head_size: int) -> None:
    """Raises an InputError for a parameter that belongs to the units in a way we do not know."""
    known = {structure.path(role, leaf) for role in structure.names for leaf in ("kernel", "bias")}
    for path, shape in shapes.items():
        part = path.removeprefix(structure.prefix)
        inside = path.startswith(structure.prefix) and part.split("/")[0] in structure.names.values()
        # Norms of queries and keys are shared by all heads, or run over all of them and mix their order.
        norm = path.startswith(structure.prefix) and re.match(r"(q|k|query|key)_(norm|layernorm|ln)/", part)
        if (inside and path not in known) or (norm and "output" in structure.names and shape[-1] != head_size):
            raise InputError(f"permute_coupled does not know how {path} of shape {shape} belongs to heads or channels")


def _orders(
    structure: Structure, chosen: Mapping[str, Any], counts: Mapping[str, int], stack: int
) -> dict[str, _Order]:
    """The new order of the units of every projection."""

    def ranks(roles: tuple[str, ...], units: int) -> _Order:
        """The place of every unit in the lists of chosen ones put together."""
        lists = [_units(structure.path(role), chosen[role], stack, units) for role in roles if role in chosen]
        listed = np.concatenate([np.empty((stack, 0), np.int32), *lists], axis=1).astype(np.int32)
        ranks = np.full((stack, units), _UNCHOSEN, np.int32)
        np.minimum.at(ranks, (np.arange(stack)[:, None], listed), np.arange(listed.shape[1], dtype=np.int32))
        return ranks

    def order(ranks: Int[np.ndarray, "*stack units"]) -> Int[np.ndarray, "*stack units"]:
        return np.argsort(ranks, axis=-1, kind="stable").astype(np.int32)

    units = counts[structure.joint]
    if structure.joint == "down":
        return dict.fromkeys(structure.names, order(ranks(("down", "up", "gate"), units)))
    groups = counts.get("key", units)
    if units % groups or counts.get("value", groups) != groups:
        raise InputError(f"the heads of {structure.prefix} do not form groups: {dict(counts)}")
    in_groups = ranks(("output", "query", "query_key_value"), units).reshape(stack, groups, -1)
    # Groups that only key or value name come after those with chosen heads.
    by_key = ranks(("key", "value"), groups) + units
    group_order = order(np.minimum(in_groups.min(axis=2), by_key))
    heads = order(in_groups) + np.arange(groups, dtype=np.int32)[None, :, None] * in_groups.shape[2]
    head_order = np.take_along_axis(heads, group_order[:, :, None], axis=1).reshape(stack, units)
    return {role: group_order if role in ("key", "value") else head_order for role in structure.names}


def _units(path: str, units: Any, stack: int, count: int) -> _Order:
    """A selection as (layers, units), checked."""
    if units.ndim == 1:
        units = np.broadcast_to(units, (stack, *units.shape))
    if units.ndim != 2 or units.shape[0] != stack or not (np.issubdtype(units.dtype, np.integer) or not units.size):
        raise InputError(
            f"selection of {path} must hold whole numbers, (count,) or (layers, count) with {stack} layers; got shape "
            f"{units.shape} of {units.dtype}"
        )
    if units.size and not 0 <= units.min() <= units.max() < count:
        raise InputError(f"selection of {path} must name units from 0 to {count - 1}, got {units.min()}..{units.max()}")
    if any(len({*row}) < len(row) for row in units.tolist()):
        raise InputError(f"selection of {path} names a unit twice: {units.tolist()}")
    return units.astype(np.int32)


def _rearranged(leaf: Num[Array | np.ndarray, "..."], move: Move) -> Num[Array, "..."]:
    """A parameter with its units in the new order."""
    shape, (layers, units) = leaf.shape, move.order.shape
    split = (*shape[: move.axis], move.parts, units, -1, *shape[move.axis + 1 :])
    index = [1] * len(split)
    index[move.axis + 1] = units
    if layers > 1:
        index[0] = layers
    taken = jnp.take_along_axis(jnp.asarray(leaf).reshape(split), move.order.reshape(index), axis=move.axis + 1)
    return taken.reshape(shape)
