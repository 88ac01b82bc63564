"""From the base to the tuned model, and back."""

from collections import Counter
from typing import Any, Literal

import jax
import numpy as np
from jaxtyping import PyTree

from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import fingerprint, tensor_checksum
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.deltas.bits import gather_bits, scatter_bits
from jaxsparse.deltas.delta import Delta
from jaxsparse.deltas.difference import tensors_by_path
from jaxsparse.deltas.tensors import TensorDelta

__all__ = ["apply", "check_base", "check_fingerprint", "check_shapes", "revert"]

_Side = Literal["base", "tuned"]


def check_shapes(tensors: dict[str, Any], shapes: dict[str, tuple[tuple[int, ...], str]], name: str) -> None:
    """Checks that a model has the tensors of a delta.

    Args:
        tensors: the model's arrays by path.
        shapes: the shape and the dtype's name of each of the delta's tensors, by path.
        name: what the model is called in error messages.

    Raises:
        InputError: a tensor is missing, or has another shape or dtype.
    """
    for path, (shape, dtype) in shapes.items():
        if path not in tensors:
            raise InputError(f"the delta changes tensor {path}, which {name} does not have")
        leaf = tensors[path]
        if tuple(leaf.shape) != shape or leaf.dtype.name != dtype:
            raise InputError(
                f"the delta's tensor {path} is {dtype} of shape {shape}, but in {name} it is "
                f"{leaf.dtype.name} of shape {tuple(leaf.shape)}"
            )


def check_fingerprint(delta: Delta, base_fingerprint: str | None) -> None:
    """Raises an InputError if both fingerprints are known and differ."""
    expected = delta.metadata.base_fingerprint
    if expected is not None and base_fingerprint is not None and expected != base_fingerprint:
        raise InputError(
            f"the delta belongs to another base: {delta.metadata.base_name or 'its base'} has fingerprint "
            f"{expected[:16]}…, this one {base_fingerprint[:16]}…"
        )


def check_base(base: PyTree, delta: Delta, *, base_fingerprint: str | None = None) -> None:
    """Checks that a delta belongs to a base, as thoroughly as possible.

    Args:
        base: the base's parameters.
        delta: the delta.
        base_fingerprint: `fingerprint(base)` where it is known; otherwise it is computed from all of the base.

    Raises:
        InputError: the fingerprints differ; or a tensor is missing, misshapen or not the base's.
    """
    check_fingerprint(delta, base_fingerprint)
    _moved_bits(tensors_by_path(base, "base"), delta, "base", "tuned")
    if base_fingerprint is None and delta.metadata.base_fingerprint is not None:
        check_fingerprint(delta, fingerprint(base))


def apply(base: PyTree, delta: Delta, *, donate: bool = False, base_fingerprint: str | None = None) -> PyTree:
    """Returns the tuned model, exact bit for bit.

    All checks come before the first write. Only the changed entries are read and written; a sharded
    tensor is changed on each device's own block. Time and memory: the entries, plus, for tensors of one or two
    bytes an entry, one temporary of the tensor's size; without `donate`, also a copy of every changed tensor.

    Args:
        base: the base's parameters, any tree of arrays. Tensors that do not change are shared with the result.
        delta: what `diff` or `load` returned.
        donate: give the memory of the changed tensors to the result; `base` must not be used any more.
        base_fingerprint: `fingerprint(base)` where it is known; compared with the delta's. The entries
            that the delta changes are compared in any case.

    Returns:
        A tree of the same structure, shardings and array kinds.

    Raises:
        InputError: the delta belongs to another base, or is applied already.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> base, tuned = {"w": jnp.zeros(3)}, {"w": jnp.arange(3.0)}
        >>> apply(base, diff(base, tuned))
        {'w': Array([0., 1., 2.], dtype=float32)}
    """
    check_fingerprint(delta, base_fingerprint)
    return _move(base, delta, "base", "tuned", donate)


def revert(tuned: PyTree, delta: Delta, *, donate: bool = False) -> PyTree:
    """Returns the base, exact bit for bit: the inverse of `apply`.

    Args:
        tuned: the tuned model's parameters, any tree of arrays.
        delta: the delta that made it.
        donate: give the memory of the changed tensors to the result; `tuned` must not be used any more.

    Returns:
        A tree of the same structure, shardings and array kinds.

    Raises:
        InputError: the delta is not the one that made this model.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> base, tuned = {"w": jnp.zeros(3)}, {"w": jnp.arange(3.0)}
        >>> revert(tuned, diff(base, tuned))
        {'w': Array([0., 0., 0.], dtype=float32)}
    """
    return _move(tuned, delta, "tuned", "base", donate)


def _checksum(tensor: TensorDelta, side: _Side) -> str:
    return tensor.base_checksum if side == "base" else tensor.tuned_checksum


def _moved_bits(tensors: dict[str, Any], delta: Delta, source: _Side, target: _Side) -> dict[str, np.ndarray]:
    """Returns the new bit patterns of every changed entry, after all checks."""
    check_shapes(tensors, {path: (t.shape, t.dtype) for path, t in delta.tensors.items()}, f"the {source} model")
    moved = {}
    for path, tensor in delta.tensors.items():
        old = gather_bits(tensors[path], tensor.indices)
        checksum = tensor_checksum(old)
        if checksum == _checksum(tensor, target) != _checksum(tensor, source):
            done = "applied already" if source == "base" else "not applied"
            raise InputError(f"the delta is {done}: tensor {path} holds the bits of the {target} model")
        if checksum != _checksum(tensor, source):
            raise InputError(
                f"the delta belongs to another base: tensor {path} differs from "
                f"{delta.metadata.base_name or 'its base'} at the {tensor.entries:,} entries that the delta changes"
            )
        moved[path] = old ^ tensor.xor
        if tensor_checksum(moved[path]) != _checksum(tensor, target):
            raise InputError(f"the delta is damaged: tensor {path} would not come out as the {target} model's")
    return moved


def _move(tree: PyTree, delta: Delta, source: _Side, target: _Side, donate: bool) -> PyTree:
    tensors = tensors_by_path(tree, f"the {source} model")
    moved = _moved_bits(tensors, delta, source, target)
    uses = Counter(id(leaf) for leaf in tensors.values())
    for path, bits in moved.items():
        leaf = tensors[path]
        # A tied weight is one array at two paths: the other path still needs it.
        tensors[path] = scatter_bits(leaf, delta.tensors[path].indices, bits, donate=donate and uses[id(leaf)] == 1)
    return jax.tree.unflatten(flatten_with_paths(tree)[1], tensors.values())
