"""Deltas side by side on a device, so that every row of a batch may have its own: data for `js.serve`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Int, PyTree

from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.deltas.changes import entry_changes
from jaxsparse.deltas.delta import Delta
from jaxsparse.deltas.difference import tensors_by_path
from jaxsparse.deltas.patch import check_base
from jaxsparse.deltas.tensors import CoordinateDelta, FactorDelta, SliceDelta, TensorDelta, matrix_places
from jaxsparse.subspaces.targets import MatrixView, Targets, matrix_view, resolve_targets

__all__ = ["NOBODY", "Group", "Stacked", "TensorStack", "stack"]

NOBODY = -1
"""The number of a row's adapter where it has none: the plain base."""

_MOST_PADDING = 1.25
"""Entries are kept neuron by neuron where that takes at most so many times their number."""


class Group(NamedTuple):
    """The adapters that change one tensor in one way, padded to the largest; the first axis counts layers.

    Attributes:
        place: (stack, adapters), the place of every adapter in the group; -1 for those that are not in it.
        arrays: by name, (stack, members, ...): for "entries" flat `index` (k,), sorted by column, and `values`; for
            "neurons" `index` (k, out), inputs of every output, and `values`; for "slices" `index` (slices,), inputs,
            and `values` (slices, out); for "factors" `a` (in, r) and `b` (r, out); for "gains" `gain` (out,).
    """

    place: Int[Array, "stack adapters"]
    arrays: dict[str, Array]


@partial(jax.tree_util.register_dataclass, data_fields=["groups"], meta_fields=["view"])
@dataclass(frozen=True)
class TensorStack:
    """What all adapters change of one tensor.

    Attributes:
        groups: by kind: "entries", "neurons", "slices", "factors", "gains".
        view: how the tensor is read as matrices.
    """

    groups: dict[str, Group]
    view: MatrixView


@partial(jax.tree_util.register_dataclass, data_fields=["tensors"], meta_fields=["names"])
@dataclass(frozen=True)
class Stacked:
    """Deltas side by side; made by `stack`.

    Attributes:
        tensors: by path.
        names: of the adapters, in the order of their numbers.
    """

    tensors: dict[str, TensorStack]
    names: tuple[str, ...]

    def numbers(self, rows: Sequence[str | int | None]) -> Int[np.ndarray, " rows"]:
        """Returns the number of the adapter that every row of a batch names; -1 for None, the plain base.

        Args:
            rows: names, numbers or None.

        Raises:
            InputError: there is no such adapter.
        """
        known = {name: number for number, name in enumerate(self.names)}
        found = []
        for row in rows:
            number = NOBODY if row is None else known.get(row) if isinstance(row, str) else row
            if number is None or not NOBODY <= number < len(self.names):
                raise InputError(f"there is no adapter {row!r}; there are {', '.join(map(repr, self.names))}, or None")
            found.append(number)
        return np.array(found, np.int32)


def stack(
    deltas: Mapping[str, Delta] | Sequence[Delta],
    *,
    base: PyTree,
    targets: Targets = None,
    dtype: DTypeLike | None = None,
    base_fingerprint: str | None = None,
) -> Stacked:
    """Puts deltas of one base side by side, for batches of which every row has its own.

    Deltas may be of different kinds, at one tensor too: coordinates (kept neuron by neuron where every output has about
    as many), slices, factors.

    Args:
        deltas: by name; or in a row, whose names are then "0", "1", …
        base: the base's parameters, to which all of them belong.
        targets: of tensors that have coordinates, which axes are layers, inputs and outputs: a regular expression or
            `js.Target`s, as a method takes them. By default a tensor of two axes is (in, out), and the first of three
            under `layers`, `blocks` or `h` counts layers.
        dtype: of the changes; None: promote_types(a weight's dtype, float32). Narrower ones take less time to gather.
        base_fingerprint: `fingerprint(base)` where it is known; otherwise it is computed from all of the base.

    Returns:
        The deltas, on the default device.

    Raises:
        InputError: a delta belongs to another base, changes what is no matrix (such as a norm's scale or a bias), or
            changes a weight to or from what is not finite.

    Example:
        >>> from jaxsparse.deltas.difference import diff
        >>> base = {"kernel": jnp.zeros((4, 3))}
        >>> one, two = ({"kernel": base["kernel"].at[at, 0].set(1.0)} for at in (1, 2))
        >>> stacked = stack({"one": diff(base, one), "two": diff(base, two)}, base=base)
        >>> stacked.numbers(["two", None])
        array([ 1, -1], dtype=int32)
    """
    named = dict(deltas) if isinstance(deltas, Mapping) else {str(at): delta for at, delta in enumerate(deltas)}
    if not named:
        raise InputError("there are no deltas to stack; give at least one")
    tensors = tensors_by_path(base, "base")
    if dtype is not None and not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dtype must be one of floating-point numbers, got {jnp.dtype(dtype).name}")
    needs = any(delta.metadata.base_fingerprint for delta in named.values())
    own = base_fingerprint or (fingerprint(base) if needs else None)
    for name, delta in named.items():
        try:
            check_base(base, delta, base_fingerprint=own)
        except InputError as error:
            raise InputError(f"delta {name!r}: {error}") from error
    views = {} if targets is None else {target.path: target.view for target in resolve_targets(base, targets)}
    stacked = {}
    for path in sorted({path for delta in named.values() for path in delta.tensors}):
        members = {number: delta.tensors[path] for number, delta in enumerate(named.values()) if path in delta.tensors}
        view = _view(path, members, views)
        stacked[path] = _tensor_stack(path, view, members, tensors[path], len(named), dtype)
    return Stacked(stacked, tuple(named))


def _view(path: str, members: Mapping[int, TensorDelta], views: Mapping[str, MatrixView]) -> MatrixView:
    """How a tensor is read as matrices: as its deltas say, or else as `targets` do, or else as its path tells."""
    told = {tensor.view for tensor in members.values() if isinstance(tensor, SliceDelta | FactorDelta)}
    if len(told | ({views[path]} if path in views else set())) > 1:
        raise InputError(f"the deltas of tensor {path} do not agree which axes are inputs and outputs")
    if told or path in views:
        return next(iter(told)) if told else views[path]
    shape = next(iter(members.values())).shape
    stacks = bool(re.search(r"(^|/)(layers|blocks|h)/(?!\d)", path))
    if len(shape) == 2 and not stacks:
        return matrix_view(shape, (), (0,), (1,))
    if len(shape) == 3 and stacks:
        return matrix_view(shape, (0,), (1,), (2,))
    if len(shape) - stacks < 2:
        raise InputError(
            f"tensor {path} of shape {shape} is no matrix, and rows cannot have changes of their own there: "
            "apply that delta alone, or leave the tensor out of the method's targets"
        )
    raise InputError(f"tensor {path} has shape {shape}: name its axes by targets=[js.Target(..., in_axes=...)]")


# ---- groups ----------------------------------------------------------------------------------------------------

_Member = dict[str, np.ndarray]


def _tensor_stack(
    path: str,
    view: MatrixView,
    members: Mapping[int, TensorDelta],
    leaf: Any,
    adapters: int,
    dtype: DTypeLike | None,
) -> TensorStack:
    kinds: dict[str, dict[int, _Member]] = {}
    for number, tensor in members.items():
        for kind, arrays in _arrays(path, view, tensor, leaf).items():
            kinds.setdefault(kind, {})[number] = arrays
    return TensorStack({kind: _group(kind, view, found, adapters, dtype) for kind, found in kinds.items()}, view)


def _arrays(path: str, view: MatrixView, tensor: TensorDelta, leaf: Any) -> dict[str, _Member]:
    """The arrays of one adapter, by the group that it belongs to."""
    if isinstance(tensor, FactorDelta):
        factors = {"factors": {"a": tensor.a * tensor.a.dtype.type(tensor.scale), "b": tensor.b}}
        return factors | ({} if tensor.gain is None else {"gains": {"gain": tensor.gain}})
    assert isinstance(tensor, CoordinateDelta | SliceDelta)
    changes = entry_changes(path, tensor, leaf)
    if isinstance(tensor, CoordinateDelta):
        return _of_entries(view, tensor, changes)
    if tensor.axis == "input":
        return {"slices": {"index": tensor.slices, "values": changes}}
    # All inputs of some outputs: a product whose B has a unit row for each of them.
    units = (tensor.slices[:, :, None] == np.arange(view.out_size)).astype(changes.dtype)
    return {"factors": {"a": changes.swapaxes(1, 2), "b": units}}


def _of_entries(view: MatrixView, tensor: CoordinateDelta, changes: np.ndarray) -> dict[str, _Member]:
    layer, row, column = matrix_places(view, tensor.indices)
    order = np.lexsort((row, column, layer))
    layer, row, column, changes = layer[order], row[order], column[order], changes[order]
    counts = np.zeros((view.stack, view.out_size), np.int64)
    np.add.at(counts, (layer, column), 1)
    per_neuron = int(counts.max())
    if per_neuron * counts.size <= _MOST_PADDING * changes.size:
        place = layer, _numbers_within(layer * view.out_size + column), column
        return {"neurons": _filled((view.stack, per_neuron, view.out_size), place, row, 0, changes)}
    per_layer = int(counts.sum(axis=1).max())
    flat = row * view.out_size + column
    place_in_layer = layer, _numbers_within(layer)
    return {"entries": _filled((view.stack, per_layer), place_in_layer, flat, view.size, changes)}


def _numbers_within(groups: np.ndarray) -> np.ndarray:
    """The place of every item among those of its group, which stand together."""
    first = np.flatnonzero(np.diff(groups, prepend=-1))
    return np.arange(groups.size) - np.repeat(first, np.diff(np.append(first, groups.size)))


def _filled(
    shape: tuple[int, ...], place: tuple[np.ndarray, ...], index: np.ndarray, fill: int, changes: np.ndarray
) -> _Member:
    """Arrays of a shape with indices and changes at some places; the others add 0 to what `fill` names."""
    found = {"index": np.full(shape, fill, np.int32), "values": np.zeros(shape, changes.dtype)}
    found["index"][place] = index
    found["values"][place] = changes
    return found


def _group(
    kind: str, view: MatrixView, members: Mapping[int, _Member], adapters: int, dtype: DTypeLike | None
) -> Group:
    """Puts members side by side, padded to the largest with what changes nothing."""
    place = np.full(adapters, NOBODY, np.int32)
    place[list(members)] = np.arange(len(members))
    arrays = {}
    for name in next(iter(members.values())):
        each = [member[name] for member in members.values()]
        shape = [max(sizes) for sizes in zip(*(array.shape for array in each), strict=True)]
        fill = view.size if (kind, name) == ("entries", "index") else 0
        whole = np.full((shape[0], len(each), *shape[1:]), fill, np.result_type(*each))
        for number, array in enumerate(each):
            whole[:, number][tuple(map(slice, array.shape))] = array
        with np.errstate(over="ignore"):
            narrow = whole if name == "index" or dtype is None else whole.astype(jnp.dtype(dtype))
        if narrow is not whole and not np.all(np.isfinite(narrow.astype(whole.dtype))):
            raise InputError(f"a change is too large for dtype {jnp.dtype(dtype).name}; give a wider one")
        arrays[name] = jnp.asarray(narrow)
    return Group(jnp.tile(place, (view.stack, 1)), arrays)
