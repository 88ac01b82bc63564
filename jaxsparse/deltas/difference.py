"""The delta between two models."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import combine_checksums, tensor_checksum
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.deltas.bits import changed_indices, gather_bits
from jaxsparse.deltas.delta import Delta, Metadata
from jaxsparse.deltas.tensors import CoordinateDelta, bits_dtype

__all__ = ["diff", "tensors_by_path"]


def tensors_by_path(tree: PyTree, name: str) -> dict[str, Any]:
    """Returns the arrays of a tree by their paths, after a check that deltas can hold them.

    Args:
        tree: a tree of arrays.
        name: what the tree is called in error messages.

    Returns:
        The leaves in flattening order.

    Raises:
        InputError: a leaf is not an array, or of a dtype that deltas do not hold; two leaves have one path.
    """
    tensors: dict[str, Any] = {}
    for path, leaf in flatten_with_paths(tree)[0]:
        if path in tensors:
            raise InputError(f"{name}: two tensors have the same path {path}")
        if not isinstance(leaf, (jax.Array, np.ndarray)):
            raise InputError(f"{name}: {path} is not an array but {type(leaf).__name__}; give parameters only")
        try:
            bits_dtype(leaf.dtype.name)
        except InputError as error:
            raise InputError(
                f"{name}: {path}: {error}; give parameters only, as nnx.state(model, nnx.Param)"
            ) from error
        tensors[path] = leaf
    return tensors


def _check_same_structure(base: dict[str, Any], tuned: dict[str, Any]) -> None:
    for names, found, lacking in (
        (base.keys() - tuned.keys(), "base", "tuned"),
        (tuned.keys() - base.keys(), "tuned", "base"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(
                f"tensor {min(names)}{more} is in {found} but not in {lacking}; both must have the same tensors"
            )
    for path, leaf in base.items():
        for what in ("shape", "dtype"):
            ours, theirs = getattr(leaf, what), getattr(tuned[path], what)
            if ours != theirs:
                raise InputError(f"tensor {path} has {what} {ours} in base but {theirs} in tuned; they must be equal")


def diff(
    base: PyTree,
    tuned: PyTree,
    *,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    budget: float | None = None,
    base_name: str | None = None,
    base_fingerprint: str | None = None,
    step: int | None = None,
) -> Delta:
    """Returns what turns a base into a tuned model, exact bit for bit.

    The trees are read tensor by tensor: the host holds at most one tensor and the delta.

    Args:
        base: the base's parameters: any tree of arrays (linen dict, `nnx.State`, plain; JAX or NumPy).
        tuned: the tuned model's parameters: the same paths, shapes and dtypes.
        method: the name of the method that tuned it, for the record.
        options: that method's options; what JSON can hold.
        budget: free coordinates / all parameters.
        base_name: the base's name, for people.
        base_fingerprint: `fingerprint(base)` where it is known already; by default it is computed, which
            brings all of the base to the host, tensor by tensor.
        step: the optimizer step of the tuned model.

    Returns:
        The delta; it holds no reference to either tree.

    Raises:
        InputError: a tensor is missing, surplus or of another shape or dtype; or see `Metadata`.

    Example:
        >>> import jax.numpy as jnp
        >>> diff({"w": jnp.zeros(4)}, {"w": jnp.zeros(4).at[2].set(1.0)}, method="gasdu")
        Delta(1 entries in 1 tensors, 8 bytes, method='gasdu')
    """
    old, new = tensors_by_path(base, "base"), tensors_by_path(tuned, "tuned")
    _check_same_structure(old, new)
    if base_fingerprint is None:
        base_fingerprint = combine_checksums((path, tensor_checksum(leaf)) for path, leaf in old.items())
    metadata = Metadata(method, options or {}, budget, base_name, base_fingerprint, step)
    tensors = {}
    for path, leaf in old.items():
        indices = changed_indices(leaf, new[path])
        before, after = gather_bits(leaf, indices), gather_bits(new[path], indices)
        tensors[path] = CoordinateDelta(
            shape=tuple(leaf.shape),
            dtype=leaf.dtype.name,
            indices=indices,
            xor=before ^ after,
            base_checksum=tensor_checksum(before),
            tuned_checksum=tensor_checksum(after),
        )
    return Delta(tensors, metadata)
