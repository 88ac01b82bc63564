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
from jaxsparse.deltas.slicing import in_slices, slice_delta, whole_slices
from jaxsparse.deltas.tensors import CoordinateDelta, FactorDelta, TensorDelta, bits_dtype, slice_indices
from jaxsparse.subspaces.targets import MatrixView, Targets, resolve_targets

__all__ = ["diff", "tensors_by_path"]

_SPARSEST_SLICES = 4
"""Slices are kept whole if no more than so many of their weights stand for one that changed: the others are zeros."""


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
    slices: Targets | Mapping[str, MatrixView] = None,
    factors: Mapping[str, FactorDelta] | None = None,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    budget: float | None = None,
    base_name: str | None = None,
    base_fingerprint: str | None = None,
    step: int | None = None,
) -> Delta:
    """Returns what turns a base into a tuned model, exact bit for bit (but for factors, which are as given).

    The trees are read tensor by tensor: the host holds at most one tensor and the delta.

    Args:
        base: the base's parameters: any tree of arrays (linen dict, `nnx.State`, plain; JAX or NumPy).
        tuned: the tuned model's parameters: the same paths, shapes and dtypes.
        slices: matrices that are kept as whole input or output slices where this is smaller, as S²FT, PaCA and cheap
            LoRA train them: a regular expression or `js.Target`s, as a method takes them; None: none.
        factors: deltas of tensors that are known already, by path, such as a tuner's factors; taken as they are.
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
        InputError: a tensor is missing, surplus or of another shape or dtype; factors belong to another base; or see
            `Metadata` and `resolve_targets`.

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
    if slices is not None and not isinstance(slices, Mapping):
        slices = {target.path: target.view for target in resolve_targets(base, slices)}
    views, tensors = dict(slices or {}), dict[str, TensorDelta](factors or {})
    _check_factors(old, tensors)
    for path, leaf in old.items():
        if path not in tensors:
            tensors[path] = _difference(leaf, new[path], views.get(path))
    return Delta(tensors, metadata)


def _check_factors(base: dict[str, Any], factors: Mapping[str, TensorDelta]) -> None:
    for path, tensor in factors.items():
        if path not in base or tensor_checksum(base[path]) != tensor.base_checksum:
            raise InputError(f"the factors of tensor {path} belong to another base")


def _difference(old: Any, new: Any, view: MatrixView | None) -> TensorDelta:
    indices = changed_indices(old, new)
    before, after = (gather_bits(leaf, indices) for leaf in (old, new))
    if view is not None and indices.size:
        axis, slices, weights = whole_slices(view, indices)
        if weights <= _SPARSEST_SLICES * indices.size:
            xor = in_slices(slice_indices(view, axis, slices), indices, before ^ after)
            return slice_delta(old, view, axis, slices, xor)
    checksums = tensor_checksum(before), tensor_checksum(after)
    return CoordinateDelta(tuple(old.shape), old.dtype.name, *checksums, indices, before ^ after)
