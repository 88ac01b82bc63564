"""Fingerprints: a short text that two parameter trees share only if they are bit for bit the same."""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxsparse.common.paths import flatten_with_paths

__all__ = ["StreamedChecksum", "combine_checksums", "fingerprint", "tensor_checksum"]


def tensor_checksum(array: jax.Array | np.ndarray) -> str:
    """Returns a checksum of one tensor: its dtype, shape and bits.

    Args:
        array: a tensor of any shape and dtype, bfloat16 too; NaNs differ where their bits differ.

    Returns:
        SHA-256, 64 hexadecimal digits.

    Example:
        >>> import numpy as np
        >>> tensor_checksum(np.zeros(2, np.float32)) == tensor_checksum(np.array([0.0, -0.0], np.float32))
        False
    """
    host = np.asarray(array)
    checksum = StreamedChecksum(host.dtype.name, host.shape)
    checksum.update(host)
    return checksum.hexdigest()


class StreamedChecksum:
    """The same checksum of a tensor that comes in blocks of rows, in order.

    Args:
        dtype: the name of the whole tensor's dtype.
        shape: its shape.
    """

    def __init__(self, dtype: str, shape: Sequence[int]):
        self._digest = hashlib.sha256(f"{dtype} {tuple(shape)}\n".encode())

    def update(self, rows: np.ndarray) -> None:
        """Takes the next rows in."""
        self._digest.update(np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)

    def hexdigest(self) -> str:
        """Returns the checksum of what was taken in: SHA-256, 64 hexadecimal digits."""
        return self._digest.hexdigest()


def combine_checksums(checksums: Iterable[tuple[str, str]]) -> str:
    """Returns the fingerprint of a tree from the checksums of its tensors.

    Args:
        checksums: (path, checksum) of each tensor, in any order.

    Returns:
        SHA-256 over the sorted pairs, 64 hexadecimal digits.
    """
    lines = sorted(f"{path} {checksum}\n" for path, checksum in checksums)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def fingerprint(params: Any) -> str:
    """Returns the fingerprint of a parameter tree: paths, dtypes, shapes and bits of all tensors.

    Tensors are brought to the host one at a time. Linen dicts, NNX states and plain trees with the same
    paths and tensors have the same fingerprint, whatever the order of their keys.

    Args:
        params: a tree of arrays.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> import numpy as np
        >>> a, b = np.ones(2), np.ones(3)
        >>> fingerprint({"x": a, "y": b}) == fingerprint({"y": b, "x": a})
        True
        >>> fingerprint({"x": a}) == fingerprint({"x": a.astype(np.float32)})
        False
    """
    return combine_checksums((path, tensor_checksum(leaf)) for path, leaf in flatten_with_paths(params)[0])
