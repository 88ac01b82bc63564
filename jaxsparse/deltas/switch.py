"""From one tuned model to another on a live model, at the cost of the entries that differ."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree

from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.deltas.bits import gather_bits, scatter_bits
from jaxsparse.deltas.delta import Delta
from jaxsparse.deltas.difference import tensors_by_path
from jaxsparse.deltas.patch import apply, check_bits, check_shapes, donatable, revert
from jaxsparse.deltas.tensors import CoordinateDelta, SliceDelta, TensorDelta

__all__ = ["switch"]


def switch(params: PyTree, off: Delta, on: Delta, *, base: PyTree | None = None, donate: bool = True) -> PyTree:
    """Returns another tuned model of the same base: reverts one delta and applies another.

    Of coordinates and slices it reads, checks and writes the entries of both, once, in place: the cost is that of the
    entries, whatever the model's size. Tensors that either keeps as factors are made anew from the base.

    Args:
        params: the tuned model's parameters, any tree of arrays.
        off: the delta that made it.
        on: the delta to have instead.
        base: the base's parameters, needed where `off` keeps factors.
        donate: give the memory of the changed tensors to the result; `params` must not be used any more.

    Returns:
        A tree of the same structure, shardings and array kinds.

    Raises:
        InputError: `off` did not make this model, or `on` belongs to another base; nothing is written then.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> base = {"w": jnp.zeros(3)}
        >>> one, other = ({"w": base["w"].at[at].set(1.0)} for at in (0, 2))
        >>> switch(one, diff(base, one), diff(base, other), donate=False)
        {'w': Array([0., 0., 1.], dtype=float32)}
    """
    if not (off.exact and on.exact):
        # Writes nothing that `params` holds before all checks of both have passed.
        reverted = revert(params, off, base=base)
        return apply(reverted, on, donate=donate)
    tensors = tensors_by_path(params, "the tuned model")
    for delta in (off, on):
        check_shapes(tensors, {path: (t.shape, t.dtype) for path, t in delta.tensors.items()}, "the tuned model")
    writes = {}
    for path in dict.fromkeys([*off.tensors, *on.tensors]):
        writes[path] = _exchanged(path, tensors[path], off, on)
    may_donate = donatable(tensors, donate)
    for path, (indices, bits) in writes.items():
        tensors[path] = scatter_bits(tensors[path], indices, bits, donate=may_donate(path))
    return jax.tree.unflatten(flatten_with_paths(params)[1], tensors.values())


class _Entries(NamedTuple):
    """A delta's entries of one tensor.

    Attributes:
        tensor: the tensor's delta.
        indices: positions in the flattened tensor, in the delta's own order.
    """

    tensor: CoordinateDelta | SliceDelta
    indices: np.ndarray


def _entries(tensor: TensorDelta | None) -> _Entries | None:
    if not isinstance(tensor, CoordinateDelta | SliceDelta):
        return None
    return _Entries(tensor, tensor.indices.reshape(-1))


def _exchanged(path: str, leaf: Any, off: Delta, on: Delta) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the two models differ, and the bits that the new one has there."""
    leaves, comes = _entries(off.tensors.get(path)), _entries(on.tensors.get(path))
    union = np.unique(np.concatenate([entries.indices for entries in (leaves, comes) if entries is not None]))
    bits = gather_bits(leaf, union)
    if leaves is not None:
        place = np.searchsorted(union, leaves.indices)
        own = bits[place].reshape(leaves.tensor.xor.shape)
        bits[place] = check_bits(path, leaves.tensor, own, "tuned", off.metadata).reshape(-1)
    if comes is not None:
        place = np.searchsorted(union, comes.indices)
        own = bits[place].reshape(comes.tensor.xor.shape)
        bits[place] = check_bits(path, comes.tensor, own, "base", on.metadata).reshape(-1)
    return union, bits
