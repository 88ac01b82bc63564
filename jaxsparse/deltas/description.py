"""What a delta touches, in numbers."""

import math
from typing import Any

import numpy as np

from jaxsparse.deltas.delta import Delta
from jaxsparse.deltas.tensors import TensorDelta

__all__ = ["describe"]

_STACKS = frozenset({"layers", "blocks", "h"})


def _layers(path: str, tensor: TensorDelta) -> list[int]:
    """Returns the layers touched, from a number in the path, or from the leading axis of stacked layers."""
    parts = path.split("/")
    numbers = [int(part) for part in parts if part.isdecimal()]
    if numbers:
        return numbers[:1]
    if _STACKS & set(parts) and len(tensor.shape) >= 2:
        return np.unique(tensor.indices // math.prod(tensor.shape[1:])).tolist()
    return []


def describe(delta: Delta) -> dict[str, Any]:
    """Returns what a delta holds, as a dict that JSON can hold.

    Args:
        delta: any delta.

    Returns:
        `entries`, `bytes` (in host memory), `layers` (all those touched, in order; the leading axis of a tensor
        under `layers`, `blocks` or `h` without a number in its path counts as layers), all metadata, and
        `tensors`: for each path `shape`, `dtype`, `entries`, `density` (entries / size), `bytes` and `layers`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> base = {"layers": {"kernel": jnp.zeros((3, 2, 2))}}
        >>> tuned = {"layers": {"kernel": base["layers"]["kernel"].at[1].set(1.0)}}
        >>> describe(diff(base, tuned))["tensors"]["layers/kernel"]["layers"]
        [1]
    """
    tensors = {
        path: {
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "entries": tensor.entries,
            "density": tensor.entries / tensor.size,
            "bytes": tensor.nbytes,
            "layers": _layers(path, tensor),
        }
        for path, tensor in delta.tensors.items()
    }
    layers = sorted({layer for tensor in tensors.values() for layer in tensor["layers"]})  # type: ignore[attr-defined]
    return {
        "entries": delta.entries,
        "bytes": delta.nbytes,
        "layers": layers,
        "tensors": tensors,
        **delta.metadata.as_dict(),
    }
