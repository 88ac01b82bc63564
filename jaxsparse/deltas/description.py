"""What a delta touches, and what several touch in common, in numbers."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxsparse.common.errors import InputError
from jaxsparse.deltas.changes import moved_entries
from jaxsparse.deltas.delta import Delta
from jaxsparse.deltas.tensors import CoordinateDelta, FactorDelta, SliceDelta, TensorDelta

__all__ = ["describe", "layer_counts", "overlap"]

_MOST_DIGITS = 4
"""Of the number of a layer: no model has more, whatever a file says."""
_STACKS = frozenset({"layers", "blocks", "h"})


def layer_counts(path: str, tensor: TensorDelta) -> dict[int | None, tuple[int, int]]:
    """Returns how many weights of each layer change, and how many it has.

    Args:
        path: of the tensor. A number in it is the layer; the leading axis of a tensor under `layers`, `blocks` or `h`
            without a number in its path counts layers.
        tensor: its delta.

    Returns:
        By layer, in order; the layer of a tensor that belongs to none is None.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> base = {"layers": {"kernel": jnp.zeros((3, 2, 2))}}
        >>> tuned = {"layers": {"kernel": base["layers"]["kernel"].at[1, 0].set(1.0)}}
        >>> layer_counts("layers/kernel", diff(base, tuned).tensors["layers/kernel"])
        {0: (0, 4), 1: (2, 4), 2: (0, 4)}
    """
    parts = path.split("/")
    if numbers := [int(part) for part in parts if part.isdecimal() and len(part) <= _MOST_DIGITS]:
        return {numbers[0]: (tensor.entries, tensor.size)}
    if not _STACKS & set(parts) or len(tensor.shape) < 2:
        return {None: (tensor.entries, tensor.size)}
    layers, own = tensor.shape[0], math.prod(tensor.shape[1:])
    indices = _indices(tensor)
    if isinstance(tensor, FactorDelta) and tensor.view.stack == layers:
        counts = [own if moved else 0 for moved in tensor.moved_layers]
    else:
        counts = [own] * layers if indices is None else np.bincount(indices // own, minlength=layers).tolist()
    return {layer: (count, own) for layer, count in enumerate(counts)}


def describe(delta: Delta) -> dict[str, Any]:
    """Returns what a delta holds, as a dict that JSON can hold.

    Args:
        delta: any delta.

    Returns:
        `entries` (weights that change; of factors those that may), `stored` (weights, or entries of factors), `bytes`
        (in host memory), `kinds`, `layers` (all those touched, in order, as `layer_counts` has them), all metadata, and
        `tensors`: for each path
        `shape`, `dtype`, `kind`, `entries`, `density` (entries / size), `stored`, `bytes` and `layers`; of slices also
        `axis` and `slices` (how many of each matrix), of factors `rank` and `gain` (whether there is one).

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> base = {"layers": {"kernel": jnp.zeros((3, 2, 2))}}
        >>> tuned = {"layers": {"kernel": base["layers"]["kernel"].at[1].set(1.0)}}
        >>> describe(diff(base, tuned))["tensors"]["layers/kernel"]["layers"]
        [1]
    """
    tensors = {path: _described(path, tensor) for path, tensor in delta.tensors.items()}
    return {
        "entries": delta.entries,
        "stored": delta.stored,
        "bytes": delta.nbytes,
        "kinds": sorted({tensor.kind for tensor in delta.tensors.values()}),
        "layers": sorted({layer for tensor in tensors.values() for layer in tensor["layers"]}),
        "tensors": tensors,
        **delta.metadata.as_dict(),
    }


def _described(path: str, tensor: TensorDelta) -> dict[str, Any]:
    said: dict[str, Any] = {
        "shape": list(tensor.shape),
        "dtype": tensor.dtype,
        "kind": tensor.kind,
        "entries": tensor.entries,
        "density": tensor.entries / tensor.size,
        "stored": tensor.stored,
        "bytes": tensor.nbytes,
        "layers": [layer for layer, (count, _) in layer_counts(path, tensor).items() if count and layer is not None],
    }
    if isinstance(tensor, SliceDelta):
        said |= {"axis": tensor.axis, "slices": tensor.slices.shape[1]}
    if isinstance(tensor, FactorDelta):
        said |= {"rank": tensor.rank, "gain": tensor.gain is not None}
    return said


def overlap(deltas: Mapping[str, Delta] | Sequence[Delta]) -> list[dict[str, Any]]:
    """Returns how many weights every two of several deltas move in common, as JSON can hold it.

    S²FT (table 5) found that adapters are mixed best that moved different weights; this measures how far they did. Of
    slices those weights count that change; factors move all of their tensor. No tensor is formed.

    Args:
        deltas: by name, of one base; or in a row, whose names are then "0", "1", …

    Returns:
        For every pair `deltas` (their names), `entries` (of each), `shared`, `share` (of the smaller one, in 0 … 1),
        `jaccard` (shared / moved by either), and `tensors`: the same numbers for each path that both change.

    Raises:
        InputError: the deltas belong to different models.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> base = {"w": jnp.zeros(4)}
        >>> a, b = diff(base, {"w": jnp.array([1.0, 1, 0, 0])}), diff(base, {"w": jnp.array([0.0, 1, 1, 1])})
        >>> [(pair["deltas"], pair["shared"], pair["share"], pair["jaccard"]) for pair in overlap([a, b])]
        [(['0', '1'], 1, 0.5, 0.25)]
    """
    named = dict(deltas) if isinstance(deltas, Mapping) else {str(i): delta for i, delta in enumerate(deltas)}
    pairs = list(itertools.combinations(named, 2))
    tensors: dict[tuple[str, str], dict[str, dict[str, Any]]] = {pair: {} for pair in pairs}
    for path in sorted({path for delta in named.values() for path in delta.tensors}):
        moved = {name: delta.tensors[path] for name, delta in named.items() if path in delta.tensors}
        _check_one_model(path, moved)
        indices = {name: _indices(tensor) for name, tensor in moved.items()}
        for one, other in itertools.combinations(moved, 2):
            shared = _shared(moved[one], indices[one], moved[other], indices[other])
            tensors[one, other][path] = _measured(moved[one].entries, moved[other].entries, shared)
    found = []
    for pair in pairs:
        shared = sum(tensor["shared"] for tensor in tensors[pair].values())
        sizes = named[pair[0]].entries, named[pair[1]].entries
        found.append({"deltas": list(pair), **_measured(*sizes, shared), "tensors": tensors[pair]})
    return found


def _indices(tensor: TensorDelta) -> Int[np.ndarray, " entries"] | None:
    """Returns which weights move; None for all of them."""
    return moved_entries(tensor)[0] if isinstance(tensor, CoordinateDelta | SliceDelta) else None


def _shared(
    one: TensorDelta, places: Int[np.ndarray, " m"] | None, other: TensorDelta, others: Int[np.ndarray, " n"] | None
) -> int:
    if places is None or others is None:
        return min(one.entries, other.entries)
    return np.intersect1d(places, others, assume_unique=True).size


def _measured(one: int, other: int, shared: int) -> dict[str, Any]:
    return {
        "entries": [one, other],
        "shared": shared,
        "share": shared / max(min(one, other), 1),
        "jaccard": shared / max(one + other - shared, 1),
    }


def _check_one_model(path: str, tensors: Mapping[str, TensorDelta]) -> None:
    first, *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first[1].shape:
            raise InputError(
                f"deltas {first[0]} and {name} belong to different models: tensor {path} is of shape "
                f"{first[1].shape} in one and {tensor.shape} in the other"
            )
