"""From one tuned model to another on a live model, at the cost of the entries that differ."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.deltas.bits import expanded, gather_bits, scatter_bits
from jaxsparse.deltas.delta import Delta
from jaxsparse.deltas.difference import tensors_by_path
from jaxsparse.deltas.patch import Side, apply, check_bits, check_shapes, donatable, revert

__all__ = ["switch"]


def switch(params: PyTree, off: Delta, on: Delta, *, base: PyTree | None = None, donate: bool = False) -> PyTree:
    """Returns another tuned model of the same base: reverts one delta and applies another.

    Of coordinates and slices it reads, checks and writes the entries of both, once; with `donate` in place, so that the
    cost is that of the entries, whatever the model's size. Tensors that either keeps as factors are made anew from the
    base.

    Args:
        params: the tuned model's parameters, any tree of arrays.
        off: the delta that made it.
        on: the delta to have instead.
        base: the base's parameters, needed where `off` keeps factors; its arrays are never given away.
        donate: give the memory of the changed tensors to the result; `params` must not be used any more, nor what else
            holds its arrays: `apply` shares those that do not change with its base, if that is not told here.

    Returns:
        A tree of the same structure, shardings and array kinds.

    Raises:
        InputError: `off` did not make this model, or `on` belongs to another base; nothing is written then.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> base = {"w": jnp.zeros(3)}
        >>> one, other = ({"w": base["w"].at[at].set(1.0)} for at in (0, 2))
        >>> switch(one, diff(base, one), diff(base, other))
        {'w': Array([0., 0., 1.], dtype=float32)}
    """
    if not (off.exact and on.exact):
        # Writes nothing that `params` holds before all checks of both have passed.
        reverted = revert(params, off, base=base)
        return apply(_apart(reverted, base) if donate else reverted, on, donate=donate)
    tensors = tensors_by_path(_apart(params, base) if donate else params, "the tuned model")
    for delta in (off, on):
        check_shapes(tensors, {path: (t.shape, t.dtype) for path, t in delta.tensors.items()}, "the tuned model")
    writes = {}
    for path in dict.fromkeys([*off.tensors, *on.tensors]):
        writes[path] = _exchanged(path, tensors[path], off, on)
    may_donate = donatable(tensors, donate)
    for path, (indices, bits) in writes.items():
        tensors[path] = scatter_bits(tensors[path], indices, bits.reshape(-1), bits.shape[1], donate=may_donate(path))
    return jax.tree.unflatten(flatten_with_paths(params)[1], tensors.values())


def _apart(params: PyTree, base: PyTree | None) -> PyTree:
    """Parameters of which none is an array of the base too."""
    kept = {id(leaf) for leaf in jax.tree.leaves(base)}
    return jax.tree.map(lambda leaf: leaf.copy() if id(leaf) in kept else leaf, params)


class _Write(NamedTuple):
    """New bits of runs of entries of one tensor.

    Attributes:
        indices: numbers of the runs, increasing.
        bits: (runs, entries of a run).
    """

    indices: np.ndarray
    bits: np.ndarray


def _exchanged(path: str, leaf: Any, off: Delta, on: Delta) -> _Write:
    """Returns where the two models differ, and the bits that the new one has there."""
    sides: list[tuple[Side, Delta]] = [("tuned", off), ("base", on)]
    known = [(side, delta.metadata, delta.tensors[path]) for side, delta in sides if path in delta.tensors]
    runs = _common_runs([tensor.runs for _, _, tensor in known])  # type: ignore[attr-defined]
    indices = runs[0][0] if len(runs) == 1 else np.concatenate([indices for indices, _ in runs])
    union, run = np.unique(indices), runs[0][1]
    bits = np.array(gather_bits(leaf, union, run)).reshape(-1, run)  # what comes from a device cannot be written
    for (side, metadata, tensor), (indices, _) in zip(known, runs, strict=True):
        place = np.searchsorted(union, indices)
        moved = check_bits(path, tensor, bits[place].reshape(tensor.xor.shape), side, metadata)  # type: ignore
        bits[place] = moved.reshape(-1, run)
    return _Write(union, bits)


def _common_runs(runs: list[tuple[np.ndarray, int]]) -> list[tuple[np.ndarray, int]]:
    """Returns runs of one length: entries one by one, where lengths differ."""
    if len({run for _, run in runs}) == 1:
        return runs
    return [(expanded(indices, run), 1) for indices, run in runs]
