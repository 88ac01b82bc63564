"""Bit patterns of single entries: read and written by index, wherever the tensor lies.

A tensor is a NumPy array, or a JAX array on one device or sharded over many. Entries travel as unsigned
integers, because copying bfloat16 numbers is not exact everywhere: XLA for CPU widens a bfloat16 scatter
to float32 and back, which alters NaN payloads. In the host's own memory NumPy writes them in place.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.buffer_callback import buffer_callback
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int, Shaped, UInt

from jaxsparse.common.errors import InputError
from jaxsparse.deltas.tensors import bits_dtype, index_dtype

__all__ = ["Flips", "changed_indices", "expanded", "gather_bits", "in_host_memory", "scatter_bits"]

_COMPARED_AT_ONCE = 1 << 22
_MAX_INDEX = np.iinfo(np.int32).max


# ---- on the device -------------------------------------------------------------------------------------------


def _to_bits(array: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(array, bits_dtype(array.dtype.name))


def _unravel(flat: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    coordinates = []
    for axis in reversed(shape):
        coordinates.append(lax.rem(flat, jnp.int32(axis)))
        flat = lax.div(flat, jnp.int32(axis))
    return tuple(reversed(coordinates))


def _block_coordinates(levels: Any, shape: tuple[int, ...], block: tuple[int, ...], spec: Any) -> tuple[Any, Any]:
    """Returns the coordinates inside this device's block, and which of them lie in it."""
    outer_axes = _outer_axes(shape)
    *outer, inner = levels
    coordinates = _unravel(outer[0], shape[:outer_axes]) if outer else ()
    coordinates += _unravel(inner, shape[outer_axes:])
    inside = jnp.full(inner.shape, True)
    if spec is None:
        return coordinates, inside
    local = []
    for axis, coordinate in enumerate(coordinates):
        names = spec[axis] if axis < len(spec) else None
        if names is not None:
            coordinate = coordinate - lax.axis_index(names) * block[axis]
            inside &= (coordinate >= 0) & (coordinate < block[axis])
        local.append(coordinate)
    return tuple(local), inside


def _gather(array: jax.Array, levels: Any, shape: tuple[int, ...], spec: Any) -> jax.Array:
    coordinates, inside = _block_coordinates(levels, shape, array.shape, spec)
    bits = _to_bits(array).at[coordinates].get(mode="clip", wrap_negative_indices=False)
    names = _mesh_axes(spec)
    return lax.psum(jnp.where(inside, bits, 0), names) if names else bits


def _flip(array: jax.Array, levels: Any, xor: jax.Array, count: Any, shape: Any, spec: Any, on_gpu: bool) -> jax.Array:
    coordinates, _ = _block_coordinates(levels, shape, array.shape, spec)
    old = _to_bits(array).at[coordinates].get(mode="clip", wrap_negative_indices=False)
    return _scatter(array, levels, lax.optimization_barrier(old ^ xor), count, shape, spec, on_gpu)


def _scatter(
    array: jax.Array, levels: Any, bits: jax.Array, count: Any, shape: Any, spec: Any, on_gpu: bool
) -> jax.Array:
    coordinates, inside = _block_coordinates(levels, shape, array.shape, spec)
    slot = jnp.arange(bits.shape[0], dtype=jnp.int32)
    # What is padding, or lies on another device, goes to places of its own beyond the end: dropped, and still unique.
    first = jnp.where(inside & (slot < count), coordinates[0], _MAX_INDEX - slot)
    how: dict[str, Any] = {
        "mode": "drop",
        "unique_indices": True,
        "wrap_negative_indices": False,
    }
    # Where a plain copy is exact it is done in place; the detour over bits costs one temporary as large as the tensor.
    if array.dtype.itemsize >= 4 or jnp.issubdtype(array.dtype, jnp.integer) or on_gpu:
        return array.at[(first, *coordinates[1:])].set(lax.bitcast_convert_type(bits, array.dtype), **how)
    changed = _to_bits(array).at[(first, *coordinates[1:])].set(bits, **how)
    return lax.bitcast_convert_type(changed, array.dtype)


def _mesh_axes(spec: Any) -> tuple[str, ...]:
    if spec is None:
        return ()
    return tuple(
        name for names in spec if names is not None for name in ((names,) if isinstance(names, str) else names)
    )


@functools.lru_cache(maxsize=256)
def _compiled(
    kind: str, shape: tuple[int, ...], sharding: NamedSharding | None, donate: bool, on_gpu: bool = False
) -> Any:
    """Returns the jitted gather, scatter or flip; a sharded one touches each device's block and moves no weight."""
    spec = None if sharding is None else tuple(sharding.spec)
    scattered = kind != "gather"
    operation: Any = functools.partial(_gather, shape=shape, spec=spec)
    if scattered:
        operation = functools.partial(_flip if kind == "flip" else _scatter, shape=shape, spec=spec, on_gpu=on_gpu)
    if sharding is not None:
        whole = PartitionSpec()
        operation = jax.shard_map(
            operation,
            mesh=sharding.mesh,
            in_specs=(sharding.spec, whole, whole, whole) if scattered else (sharding.spec, whole),
            out_specs=sharding.spec if scattered else whole,
        )
    return jax.jit(
        operation,
        donate_argnums=0 if donate else (),
        out_shardings=sharding if scattered else None,
    )


# ---- in the host's memory ------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def _host_scatter(
    shape: tuple[int, ...], dtype: str, wide: np.dtype, run: int, donate: bool, flips: bool = False
) -> Any:
    """Returns the jitted scatter for arrays on one CPU device, whose cost is that of the entries if they are donated.

    Bits take the place of the old ones, or are combined with them by exclusive or if it `flips`. Indices and bits come
    as bytes: JAX would narrow integers of 64 bits.
    """

    def write(context: Any, out: Any, array: Any, indices: Any, bits: Any) -> None:
        # The result took over the operand's buffer.
        entries = np.asarray(out).reshape(-1).view(bits_dtype(dtype)).reshape(-1, run)
        places, new = np.asarray(indices).view(wide), np.asarray(bits).view(entries.dtype).reshape(-1, run)
        entries[places] = entries[places] ^ new if flips else new

    operation = buffer_callback(write, jax.ShapeDtypeStruct(shape, dtype), input_output_aliases={0: 0})
    return jax.jit(operation, donate_argnums=0 if donate else ())


# ---- on the host ---------------------------------------------------------------------------------------------


def _outer_axes(shape: tuple[int, ...]) -> int:
    """Returns how many leading axes need an index of their own, so that each index fits int32."""
    outer = next(axis for axis in range(len(shape) + 1) if math.prod(shape[axis:]) <= _MAX_INDEX)
    if math.prod(shape[:outer]) > _MAX_INDEX:
        raise InputError(f"a tensor of shape {shape} cannot be indexed: one of its axes is too long for int32")
    return outer


def _bucket(count: int) -> int:
    """Rounds up to 4, 5, 6 or 7 times a power of two, so that few sizes are ever compiled."""
    step = 1 << max(count.bit_length() - 3, 4)
    return -(-count // step) * step


def _levels(indices: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    padded = np.zeros(_bucket(indices.size), indices.dtype)
    padded[: indices.size] = indices
    if shape[0] + padded.size > _MAX_INDEX:
        raise InputError(f"a tensor of shape {shape} cannot be indexed: its first axis is too long for int32")
    outer = _outer_axes(shape)
    if not outer:
        return (padded.astype(np.int32, copy=False),)
    first, second = np.divmod(padded, math.prod(shape[outer:]))
    return first.astype(np.int32), second.astype(np.int32)


def expanded(indices: np.ndarray, run: int) -> np.ndarray:
    """Returns the positions of all entries of runs.

    Args:
        indices: numbers of the runs.
        run: entries of each.

    Example:
        >>> expanded(np.array([2, 0]), 3)
        array([6, 7, 8, 0, 1, 2])
    """
    if run == 1:
        return indices
    return (indices[:, None] * run + np.arange(run, dtype=indices.dtype)).reshape(-1)


def _named_sharding(array: jax.Array) -> NamedSharding | None:
    if len(array.sharding.device_set) == 1:
        return None
    if isinstance(array.sharding, NamedSharding):
        return array.sharding
    raise InputError(f"an array sharded by {array.sharding} cannot take a delta; use a NamedSharding")


def _host_bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(bits_dtype(array.dtype.name))


def gather_bits(
    array: Shaped[Array | np.ndarray, "..."], indices: Int[np.ndarray, " runs"], run: int = 1
) -> UInt[np.ndarray, " entries"]:
    """Returns the bit patterns of some entries, on the host.

    Args:
        array: a tensor of one of the dtypes that deltas hold.
        indices: positions in the flattened tensor, in range; or numbers of runs.
        run: entries of a run; the tensor is a whole number of runs.

    Returns:
        Unsigned integers as wide as the dtype.

    Example:
        >>> gather_bits(jnp.array([1.0, -0.0], jnp.bfloat16), np.array([1]))
        array([32768], dtype=uint16)
    """
    if not indices.size:
        return np.zeros(0, bits_dtype(array.dtype.name))
    if in_host_memory(array):
        return _host_bits(np.asarray(array)).reshape(-1, run)[indices].reshape(-1)
    indices = expanded(indices, run)
    if not array.ndim:
        array = array.reshape(1)
    gather = _compiled("gather", array.shape, _named_sharding(array), False)  # type: ignore[arg-type]
    return np.asarray(gather(array, _levels(indices, array.shape)))[: indices.size]


def scatter_bits(
    array: Shaped[Array | np.ndarray, "..."],
    indices: Int[np.ndarray, " runs"],
    bits: UInt[np.ndarray, " entries"],
    run: int = 1,
    *,
    donate: bool = False,
) -> Shaped[Array | np.ndarray, "..."]:
    """Returns the tensor with some entries replaced, with the same sharding, on the same devices.

    Args:
        array: a tensor of one of the dtypes that deltas hold.
        indices: positions in the flattened tensor, in range, unique; or numbers of runs.
        bits: the new bit patterns.
        run: entries of a run; the tensor is a whole number of runs.
        donate: give the tensor's memory to the result; it must not be used any more.

    Returns:
        A tensor of the same kind, NumPy or JAX.

    Example:
        >>> scatter_bits(jnp.ones(2, jnp.bfloat16), np.array([1]), np.array([32768], np.uint16))
        Array([1, -0], dtype=bfloat16)
    """
    if isinstance(array, np.ndarray):
        in_place = donate and array.flags.writeable and array.flags.c_contiguous
        result = array if in_place else np.array(array, order="C")
        result.reshape(-1).view(bits.dtype).reshape(-1, run)[indices] = bits.reshape(-1, run)
        return result
    if not indices.size:
        return array
    if not array.ndim:
        return scatter_bits(array.reshape(1), indices, bits).reshape(())
    if in_host_memory(array):
        scatter = _host_scatter(array.shape, array.dtype.name, indices.dtype, run, donate)
        return scatter(array, indices.view(np.uint8), bits.view(np.uint8))
    indices = expanded(indices, run)
    levels = _levels(indices, array.shape)
    padded = np.zeros(levels[0].size, bits.dtype)
    padded[: bits.size] = bits
    on_gpu = next(iter(array.devices())).platform == "gpu"
    scatter = _compiled("scatter", array.shape, _named_sharding(array), donate, on_gpu)
    return scatter(array, levels, padded, np.int32(bits.size))


class Flips:
    """Bits to combine with some entries of a tensor by exclusive or, kept where the tensor is: twice is not at all.

    Args:
        array: a JAX array; its shape, dtype and sharding.
        indices: positions in the flattened tensor, in range, unique; or numbers of runs.
        xor: what to combine them with.
        run: entries of a run; the tensor is a whole number of runs.
    """

    def __init__(
        self,
        array: jax.Array,
        indices: Int[np.ndarray, " runs"],
        xor: UInt[np.ndarray, " entries"],
        run: int = 1,
    ) -> None:
        if in_host_memory(array):
            self._flip = _host_scatter(array.shape or (1,), array.dtype.name, indices.dtype, run, True, True)
            self._arguments: tuple[Any, ...] = jax.device_put((indices.view(np.uint8), xor.view(np.uint8)))
            return
        indices = expanded(indices, run)
        shape, sharding = array.shape or (1,), _named_sharding(array)
        levels = _levels(indices, shape)
        padded = np.zeros(levels[0].size, xor.dtype)
        padded[: xor.size] = xor
        on_gpu = next(iter(array.devices())).platform == "gpu"
        self._flip = _compiled("flip", shape, sharding, True, on_gpu)
        place = array.sharding if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
        self._arguments = jax.device_put((levels, padded, np.int32(indices.size)), place)

    def __call__(self, array: jax.Array) -> jax.Array:
        """Returns the array with its entries flipped, in its own memory: it must not be used any more."""
        if not array.ndim:
            return self._flip(array.reshape(1), *self._arguments).reshape(())
        return self._flip(array, *self._arguments)


# ---- which entries differ ------------------------------------------------------------------------------------


@jax.jit
def _differs(a: jax.Array, b: jax.Array) -> jax.Array:
    return _to_bits(a) != _to_bits(b)


def in_host_memory(array: Any) -> bool:
    """Whether an array, NumPy's or JAX's, lies as a whole in the host's memory."""
    if isinstance(array, np.ndarray):
        return True
    return len(array.sharding.device_set) == 1 and next(iter(array.sharding.device_set)).platform == "cpu"


def changed_indices(
    a: Shaped[Array | np.ndarray, "*shape"], b: Shaped[Array | np.ndarray, "*shape"]
) -> Int[np.ndarray, " entries"]:
    """Returns where two tensors of one shape and dtype differ in bits.

    Tensors on an accelerator are compared there, and only a mask of one byte an entry comes to the host.

    Args:
        a: a tensor.
        b: a tensor of the same shape and dtype.

    Returns:
        Positions in the flattened tensor, increasing; int32 where that is enough, else int64.

    Example:
        >>> changed_indices(np.array([0.0, 1.0, np.nan]), np.array([-0.0, 1.0, np.nan]))
        array([0], dtype=int32)
    """
    on_device = not (in_host_memory(a) and in_host_memory(b)) and all(isinstance(x, jax.Array) for x in (a, b))
    if on_device and a.sharding.is_equivalent_to(b.sharding, a.ndim):  # type: ignore[union-attr]
        left, right = np.asarray(_differs(a, b)).reshape(-1), None
    else:
        left, right = _host_bits(np.asarray(a)), _host_bits(np.asarray(b))
    parts = [np.zeros(0, np.int64)]
    for start in range(0, left.size, _COMPARED_AT_ONCE):
        window = slice(start, start + _COMPARED_AT_ONCE)
        mask = left[window] if right is None else left[window] != right[window]
        parts.append(np.flatnonzero(mask) + start)
    return np.concatenate(parts).astype(index_dtype(left.size))
