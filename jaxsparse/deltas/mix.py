"""Several deltas of one base become one."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, PyTree, UInt

from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import fingerprint, tensor_checksum
from jaxsparse.deltas.bits import gather_bits
from jaxsparse.deltas.changes import added_bits, entry_changes, moved_entries
from jaxsparse.deltas.combine import Recipe, combine
from jaxsparse.deltas.delta import Delta, Metadata
from jaxsparse.deltas.difference import tensors_by_path
from jaxsparse.deltas.merge import factor_delta
from jaxsparse.deltas.patch import check_base
from jaxsparse.deltas.slicing import in_slices, padded_slices, slice_delta
from jaxsparse.deltas.tensors import (
    CoordinateDelta,
    FactorDelta,
    SliceDelta,
    TensorDelta,
    bits_dtype,
    index_dtype,
    slice_indices,
)

__all__ = ["mix"]


class _Part(NamedTuple):
    """What one of the deltas says of a tensor."""

    number: int
    name: str
    weight: float
    tensor: TensorDelta


def mix(
    deltas: Mapping[str, Delta] | Sequence[Delta],
    *,
    base: PyTree,
    weights: Sequence[float] | None = None,
    how: str = "sum",
    density: float | None = None,
    seed: int = 0,
    overlap: str = "sum",
    base_fingerprint: str | None = None,
) -> Delta:
    """Returns the delta of a model that several deltas of one base make together.

    With d_i = tuned_i - base, as numbers in promote_types(dtype, float32), the mixed model is base + Σ w_i d_i, summed
    there and rounded once to the weight's dtype; what sums to 0 does not change. `how` says what becomes of the d_i:

    * "sum": nothing; task arithmetic (Ilharco et al. 2023) and S²FT's weighted fusion (section 6.2, "Adapter Fusion").
    * "ties" (Yadav et al. 2023, arXiv 2306.01708, algorithm 1): of every d_i the `density` largest changes stay; an
      entry's sign is that of Σ w_i d_i; the mean of those w_i d_i that have this sign is added. With all weights λ this
      is the paper's λ τ_m, whose density is 0.2. Tensors are trimmed one by one (stacked layers as one), as mergekit
      and PEFT do: one threshold for all of the model, as in the paper, would leave no change to tensors with small
      steps, and needs all of them in memory. `density` is a share of the weights that a delta changes, which for the
      paper's dense models are all weights; as a share of all weights it would trim nothing of a sparse delta.
    * "dare" (Yu et al. 2024, arXiv 2311.03099, "drop and rescale"): every change is dropped with probability
      1 - density, those that stay are divided by density; then the sum. Each delta and tensor has its own key, so that
      the order of tensors, and what other tensors there are, change nothing.
    * "dare_ties": DARE's dropping in place of TIES' trimming, then signs and means as in TIES.

    Where a change comes from one delta alone, with weight 1 and unscaled, the mixed weight has that delta's tuned bits.
    So deltas that move no weight in common, S²FT's "non-overlap" (table 5), are mixed exactly, and so is a single one.
    `overlap` says what is done with weights that several deltas move: "sum" (S²FT's "overlap"), "first" leaves them
    to the first delta that moves them, which is the nearest to non-overlap that can be made of adapters that were
    trained without a thought of each other, and "error" asserts that there are none. `overlap(deltas)` counts them.

    A tensor that all deltas keep as slices of one axis stays slices, all of theirs together; factors without a gain,
    summed, stay factors, side by side; anything else becomes coordinates. Time and memory: the entries; and for a
    tensor that one keeps as factors, one at a time, some 40 bytes a weight, and 12 more for each other delta.

    Args:
        deltas: by name; or in a row, whose names are then "0", "1", …
        base: the base's parameters, to which all of them belong.
        weights: w_i; None: 1 for all.
        how: "sum", "ties", "dare" or "dare_ties".
        density: the share of its changes that every delta keeps, in (0, 1]; for "sum" none.
        seed: the only source of DARE's randomness.
        overlap: "sum", "first" or "error"; "sum" where signs are elected.
        base_fingerprint: `fingerprint(base)` where it is known; otherwise it is computed.

    Returns:
        The delta, whose metadata record what was mixed and how.

    Raises:
        InputError: there is no delta; a delta belongs to another base; a weight, the density or the seed is not
            possible; several deltas move a weight though overlap="error"; or a sum is not finite.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> from jaxsparse.deltas.patch import apply
        >>> base = {"w": jnp.ones(3)}
        >>> a, b = diff(base, {"w": jnp.array([3.0, 1.0, 3.0])}), diff(base, {"w": jnp.array([1.0, 2.0, 2.0])})
        >>> apply(base, mix([a, b], base=base, weights=[0.5, 1.0]))["w"]
        Array([2., 2., 3.], dtype=float32)
    """
    recipe = Recipe(how, density, seed, overlap)
    named = dict(deltas) if isinstance(deltas, Mapping) else {str(i): delta for i, delta in enumerate(deltas)}
    factors = _checked_weights(named, weights)
    tensors = tensors_by_path(base, "base")
    base_fingerprint = base_fingerprint or fingerprint(base)
    for name, delta in named.items():
        try:
            check_base(base, delta, base_fingerprint=base_fingerprint)
        except InputError as error:
            raise InputError(f"cannot mix delta {name}: {error}") from error
    mixed = {}
    for path in sorted({path for delta in named.values() for path in delta.tensors}):
        parts = [
            _Part(number, name, weight, delta.tensors[path])
            for number, ((name, delta), weight) in enumerate(zip(named.items(), factors, strict=True))
            if weight and path in delta.tensors
        ]
        if parts:
            mixed[path] = _mixed(path, tensors[path], parts, recipe)
    return Delta(mixed, _metadata(named, factors, recipe, base_fingerprint))


def _checked_weights(deltas: Mapping[str, Delta], weights: Sequence[float] | None) -> list[float]:
    if not deltas:
        raise InputError("deltas is empty: give at least one delta to mix")
    given = [1.0] * len(deltas) if weights is None else [float(weight) for weight in weights]
    if len(given) != len(deltas):
        raise InputError(f"weights must be one for each of the {len(deltas)} deltas, got {len(given)}")
    for weight in given:
        if not math.isfinite(weight):
            raise InputError(f"weights must be finite numbers, got {weight}")
    return given


def _metadata(deltas: Mapping[str, Delta], weights: list[float], recipe: Recipe, base_fingerprint: str) -> Metadata:
    options: dict[str, Any] = {
        "deltas": list(deltas),
        "methods": [delta.metadata.method for delta in deltas.values()],
        "weights": weights,
        "how": recipe.how,
        "overlap": recipe.overlap,
    }
    options |= {} if recipe.density is None else {"density": recipe.density}
    options |= {"seed": recipe.seed} if recipe.drops else {}
    names = (delta.metadata.base_name for delta in deltas.values())
    base_name = next((name for name in names if name is not None), None)
    return Metadata("mix", options, base_name=base_name, base_fingerprint=base_fingerprint)


# ---- one tensor ------------------------------------------------------------------------------------------------


def _mixed(path: str, leaf: Any, parts: list[_Part], recipe: Recipe) -> TensorDelta:
    """Returns what all deltas that move a tensor make of it, in the narrowest kind that holds it."""
    if recipe.overlap == "first":
        whole = (place for place, part in enumerate(parts) if isinstance(part.tensor, FactorDelta))
        parts = parts[: next(whole, len(parts)) + 1]
    if len(parts) == 1 and parts[0].weight == 1 and recipe.keeps_all:
        return parts[0].tensor
    if recipe.how == "sum" and (recipe.overlap == "sum" or len(parts) == 1) and _have_factors_alike(parts):
        return _joined_factors(leaf, parts)
    coordinates = _summed(path, leaf, parts, recipe)
    if _have_slices_alike(parts):
        return _as_slices(leaf, coordinates, [part.tensor for part in parts])  # type: ignore[misc]
    return coordinates


def _have_factors_alike(parts: list[_Part]) -> bool:
    view = getattr(parts[0].tensor, "view", None)
    tensors = [part.tensor for part in parts]
    return all(isinstance(tensor, FactorDelta) and tensor.gain is None and tensor.view == view for tensor in tensors)


def _have_slices_alike(parts: list[_Part]) -> bool:
    first = parts[0].tensor
    return isinstance(first, SliceDelta) and all(
        isinstance(tensor, SliceDelta) and (tensor.view, tensor.axis) == (first.view, first.axis)
        for _, _, _, tensor in parts
    )


def _joined_factors(leaf: Any, parts: list[_Part]) -> FactorDelta:
    """Returns Σ w s A B as one product: the factors side by side, the scales in B, but for the first's."""
    tensors: list[Any] = [part.tensor for part in parts]
    scales = [part.weight * tensor.scale for part, tensor in zip(parts, tensors, strict=True)]
    scale = float(tensors[0].a.dtype.type(scales[0])) or 1.0
    b = [tensor.b * tensor.b.dtype.type(own / scale) for tensor, own in zip(tensors, scales, strict=True)]
    a = np.concatenate([tensor.a for tensor in tensors], axis=2)
    return factor_delta(leaf, tensors[0].view, a, np.concatenate(b, axis=1), scale)


def _summed(path: str, leaf: Any, parts: list[_Part], recipe: Recipe) -> CoordinateDelta:
    """Returns the entries that change, from the changes of all deltas side by side."""
    entries, moved, changes, xor = _side_by_side(path, leaf, [part.tensor for part in parts])
    if recipe.overlap == "error" and np.any(shared := np.count_nonzero(moved, axis=0) > 1):
        names = " and ".join(part.name for part, row in zip(parts, moved, strict=True) if np.any(row & shared))
        raise InputError(
            f"deltas {names} both move {np.count_nonzero(shared):,} weights of tensor {path}; "
            "overlap='sum' adds what they do there, overlap='first' leaves those weights to the first of them"
        )
    combined = combine(path, changes, moved, [p.number for p in parts], [p.weight for p in parts], recipe)
    old = _bits_at(leaf, entries)
    new = added_bits(path, old, np.dtype(leaf.dtype), combined.changes)
    # Sums of factors have no bits of their own: they are as rounded here.
    exact = np.array([part.tensor.exact for part in parts])
    copied = np.flatnonzero((combined.sources >= 0) & exact[combined.sources])
    new[copied] = old[copied] ^ xor[combined.sources[copied], copied]
    changed = np.flatnonzero(new != old)
    before, after = old[changed], new[changed]
    checksums = tensor_checksum(before), tensor_checksum(after)
    return CoordinateDelta(tuple(leaf.shape), leaf.dtype.name, *checksums, entries[changed], before ^ after)


def _side_by_side(
    path: str, leaf: Any, tensors: list[TensorDelta]
) -> tuple[Int[np.ndarray, " entries"], Bool[np.ndarray, "d e"], Float[np.ndarray, "d e"], UInt[np.ndarray, "d e"]]:
    """Returns the entries that any delta moves, and for each delta which it moves, by how much, and their bits."""
    exact = {row: tensor for row, tensor in enumerate(tensors) if isinstance(tensor, CoordinateDelta | SliceDelta)}
    found = {row: moved_entries(tensor) for row, tensor in exact.items()}
    if len(exact) == len(tensors):
        entries = np.unique(np.concatenate([indices for indices, _ in found.values()]))
    else:
        entries = np.arange(leaf.size, dtype=index_dtype(leaf.size))
    shape = len(tensors), entries.size
    changes = np.zeros(shape, np.promote_types(leaf.dtype, np.float32))
    moved, xor = np.zeros(shape, bool), np.zeros(shape, bits_dtype(leaf.dtype.name))
    for row, tensor in enumerate(tensors):
        if isinstance(tensor, FactorDelta):
            moved[row], changes[row] = True, _factor_changes(path, tensor, leaf, changes.dtype)
            continue
        indices, places = found[row]
        where = np.searchsorted(entries, indices)
        moved[row, where] = True
        changes[row, where] = entry_changes(path, exact[row], leaf).reshape(-1)[places]
        xor[row, where] = exact[row].xor.reshape(-1)[places]
    return entries, moved, changes, xor


def _bits_at(leaf: Any, entries: Int[np.ndarray, " entries"]) -> UInt[np.ndarray, " entries"]:
    if entries.size == leaf.size:
        return gather_bits(leaf, np.zeros(1, entries.dtype), leaf.size)
    return gather_bits(leaf, entries)


def _factor_changes(path: str, tensor: FactorDelta, leaf: Any, wide: np.dtype) -> Float[np.ndarray, " entries"]:
    """Returns (W + s A B) g - W of all weights, in the order in which they lie."""
    view = tensor.view
    with np.errstate(over="ignore", invalid="ignore"):
        change = wide.type(tensor.scale) * np.matmul(tensor.a.astype(wide), tensor.b.astype(wide))
        if tensor.gain is not None:
            old = np.transpose(np.asarray(leaf), view.order).reshape(change.shape).astype(wide)
            change = (old + change) * tensor.gain.astype(wide)[:, None, :] - old
    if not np.all(np.isfinite(change)):
        raise InputError(f"tensor {path} changes to or from numbers that are not finite")
    in_place = change.reshape([view.shape[axis] for axis in view.order])
    return np.transpose(in_place, np.argsort(view.order)).reshape(-1)


def _as_slices(leaf: Any, coordinates: CoordinateDelta, tensors: list[SliceDelta]) -> SliceDelta:
    """Returns the same change as slices: those of all deltas together."""
    view, axis = tensors[0].view, tensors[0].axis
    touched = np.zeros((view.stack, tensors[0].own_size), bool)
    for tensor in tensors:
        np.put_along_axis(touched, tensor.slices, True, axis=1)
    slices = padded_slices(touched)
    xor = in_slices(slice_indices(view, axis, slices), coordinates.indices, coordinates.xor)
    return slice_delta(leaf, view, axis, slices, xor)
