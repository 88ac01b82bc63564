"""From the base to the tuned model, and back."""

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import fingerprint, tensor_checksum
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.deltas.bits import gather_bits, scatter_bits
from jaxsparse.deltas.delta import Delta, Metadata
from jaxsparse.deltas.difference import tensors_by_path
from jaxsparse.deltas.merge import merge_factors
from jaxsparse.deltas.tensors import CoordinateDelta, FactorDelta, SliceDelta, TensorDelta

__all__ = [
    *("Side", "apply", "base_of_factors", "check_base", "check_bits", "check_fingerprint", "check_shapes"),
    *("donatable", "merged", "moved_bits", "revert"),
]

Side = Literal["base", "tuned"]
_ROUNDINGS = 8
"""Sums of factors made on two devices differ by at most so many roundings of the largest weight."""


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
    tensors = tensors_by_path(base, "base")
    moved_bits(tensors, delta, "base", "tuned")
    for path, tensor in delta.tensors.items():
        if isinstance(tensor, FactorDelta):
            _check_base_of_factors(path, tensor, tensors[path], delta.metadata)
    if base_fingerprint is None and delta.metadata.base_fingerprint is not None:
        check_fingerprint(delta, fingerprint(base))


def apply(base: PyTree, delta: Delta, *, donate: bool = False, base_fingerprint: str | None = None) -> PyTree:
    """Returns the tuned model, exact bit for bit; factors are added in at least float32 and rounded once.

    All checks come before the first write. Of coordinates and slices only the entries are read and written; a sharded
    tensor is changed on each device's own block. Time and memory: the entries, plus, for sharded tensors on CPU and for
    tensors on TPU, of one or two bytes an entry, one temporary of the tensor's size; without `donate`, also a copy of
    every changed tensor. Factors take time and memory of their tensors, one at a time.

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
    tensors = tensors_by_path(base, "the base model")
    moved = moved_bits(tensors, delta, "base", "tuned")
    for path, tensor in delta.tensors.items():
        if isinstance(tensor, FactorDelta):
            _check_base_of_factors(path, tensor, tensors[path], delta.metadata)
    may_donate = donatable(tensors, donate)
    _write(tensors, delta, moved, may_donate)
    for path, tensor in delta.tensors.items():
        if isinstance(tensor, FactorDelta):
            tensors[path] = merged(tensor, tensors[path], donate=may_donate(path))
    return jax.tree.unflatten(flatten_with_paths(base)[1], tensors.values())


def revert(tuned: PyTree, delta: Delta, *, base: PyTree | None = None, donate: bool = False) -> PyTree:
    """Returns the base, exact bit for bit: the inverse of `apply`.

    Args:
        tuned: the tuned model's parameters, any tree of arrays.
        delta: the delta that made it.
        base: the base's parameters, of which those tensors are copied that the delta keeps as factors: out of a rounded
            sum they do not come back. Other deltas need none.
        donate: give the memory of the changed tensors to the result; `tuned` must not be used any more.

    Returns:
        A tree of the same structure, shardings and array kinds.

    Raises:
        InputError: the delta is not the one that made this model; or it holds factors and `base` is not given, or
            another one.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> base, tuned = {"w": jnp.zeros(3)}, {"w": jnp.arange(3.0)}
        >>> revert(tuned, diff(base, tuned))
        {'w': Array([0., 0., 0.], dtype=float32)}
    """
    tensors = tensors_by_path(tuned, "the tuned model")
    moved = moved_bits(tensors, delta, "tuned", "base")
    restored = {
        path: base_of_factors(path, tensor, tensors[path], base, delta.metadata)
        for path, tensor in delta.tensors.items()
        if isinstance(tensor, FactorDelta)
    }
    _write(tensors, delta, moved, donatable(tensors, donate))
    tensors |= restored
    return jax.tree.unflatten(flatten_with_paths(tuned)[1], tensors.values())


def donatable(tensors: dict[str, Any], donate: bool) -> Callable[[str], bool]:
    """Returns which tensors may give their memory away: not a tied weight, one array at two paths."""
    uses = Counter(id(leaf) for leaf in tensors.values())
    alone = {path for path, leaf in tensors.items() if uses[id(leaf)] == 1}
    return lambda path: donate and path in alone


# ---- entries: coordinates and slices ---------------------------------------------------------------------------


def check_bits(
    path: str, tensor: CoordinateDelta | SliceDelta, bits: np.ndarray, source: Side, metadata: Metadata
) -> np.ndarray:
    """Checks the bits of a tensor at a delta's entries, and returns those of the other side.

    Args:
        path: of the tensor.
        tensor: its delta.
        bits: of the shape of `tensor.xor`.
        source: the side that they are to be of.
        metadata: of the delta.

    Raises:
        InputError: they are not; or the other side's would not come out.
    """
    target: Side = "tuned" if source == "base" else "base"
    checksum, moved = tensor_checksum(bits), bits ^ tensor.xor
    if checksum == _checksum(tensor, target) != _checksum(tensor, source):
        done = "applied already" if source == "base" else "not applied"
        raise InputError(f"the delta is {done}: tensor {path} holds the bits of the {target} model")
    if checksum != _checksum(tensor, source):
        raise InputError(
            f"the delta belongs to another base: tensor {path} differs from "
            f"{metadata.base_name or 'its base'} at the {bits.size:,} entries that the delta keeps"
        )
    if tensor_checksum(moved) != _checksum(tensor, target):
        raise InputError(f"the delta is damaged: tensor {path} would not come out as the {target} model's")
    return moved


def _checksum(tensor: TensorDelta, side: Side) -> str:
    return tensor.base_checksum if side == "base" else tensor.tuned_checksum


def moved_bits(tensors: dict[str, Any], delta: Delta, source: Side, target: Side) -> dict[str, np.ndarray]:
    """Returns the new bit patterns of every entry of coordinates and slices, after all checks of all shapes."""
    check_shapes(tensors, {path: (t.shape, t.dtype) for path, t in delta.tensors.items()}, f"the {source} model")
    moved = {}
    for path, tensor in delta.tensors.items():
        if isinstance(tensor, CoordinateDelta | SliceDelta):
            old = gather_bits(tensors[path], *tensor.runs).reshape(tensor.xor.shape)
            moved[path] = check_bits(path, tensor, old, source, delta.metadata)
    return moved


def _write(
    tensors: dict[str, Any], delta: Delta, moved: dict[str, np.ndarray], may_donate: Callable[[str], bool]
) -> None:
    for path, bits in moved.items():
        indices, run = delta.tensors[path].runs  # type: ignore[attr-defined]
        tensors[path] = scatter_bits(tensors[path], indices, bits.reshape(-1), run, donate=may_donate(path))


# ---- factors ---------------------------------------------------------------------------------------------------


def merged(tensor: FactorDelta, leaf: Any, *, donate: bool = False) -> Any:
    """Returns a tensor with the factors merged in, as an array of the same kind and sharding."""
    result = merge_factors(tensor.view, leaf, tensor.a, tensor.b, tensor.scale, tensor.gain, donate=donate)
    return np.array(result) if isinstance(leaf, np.ndarray) else jax.device_put(result, leaf.sharding)


def _check_base_of_factors(path: str, tensor: FactorDelta, leaf: Any, metadata: Metadata) -> None:
    checksum = tensor_checksum(leaf)
    if checksum == tensor.tuned_checksum != tensor.base_checksum:
        raise InputError(f"the delta is applied already: tensor {path} holds the bits of the tuned model")
    if checksum != tensor.base_checksum:
        raise InputError(
            f"the delta belongs to another base: tensor {path} differs from {metadata.base_name or 'its base'}"
        )


def base_of_factors(path: str, tensor: FactorDelta, leaf: Any, base: PyTree | None, metadata: Metadata) -> Any:
    """Returns a copy of the base's tensor, of the kind and sharding of the tuned one.

    Raises:
        InputError: there is no base, or another; or the tuned tensor is not what the factors make of it.
    """
    if base is None:
        raise InputError(f"the delta keeps factors of tensor {path}, out of which no base comes back: give base=")
    held = tensors_by_path(base, "base")
    check_shapes(held, {path: (tensor.shape, tensor.dtype)}, "base")
    _check_base_of_factors(path, tensor, held[path], metadata)
    if tensor_checksum(leaf) != tensor.tuned_checksum and not _agree(merged(tensor, held[path]), leaf):
        raise InputError(f"the delta is not the one that made this model: tensor {path} is not base plus factors")
    if isinstance(leaf, np.ndarray):
        return np.array(held[path])
    return jnp.copy(jax.device_put(held[path], leaf.sharding))


def _agree(one: Any, other: Any) -> bool:
    """Whether two tensors are equal up to rounding: another device adds up in another order."""
    ours, theirs = (np.asarray(tensor).astype(np.float64) for tensor in (one, other))
    allowed = _ROUNDINGS * float(jnp.finfo(one.dtype).eps) * np.max(np.abs(ours), initial=0)
    return bool(np.all(np.abs(ours - theirs) <= allowed))
