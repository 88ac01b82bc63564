"""The metadata of a delta file as JSON: written, and read back by someone who trusts nothing.

    {"format": "jaxsparse-delta", "version": 1, "sha256": "…", "delta": {
        "method": …, "options": …, "budget": …, "base_name": …, "base_fingerprint": …, "step": …, "versions": …,
        "tensors": {path: {"kind": "coordinates", "shape": […], "dtype": "bfloat16", "entries": 5264,
                           "base_sha256": "…", "tuned_sha256": "…"}, …},
        "arrays": {"gaps_0": "sha256 of its bytes", …}}}

`sha256` is that of the value of `delta` as compact JSON with sorted keys, so no bit can flip unseen.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxsparse.common.errors import InputError
from jaxsparse.deltas.coding import TensorHeader, plane_sizes
from jaxsparse.deltas.delta import Delta, Metadata
from jaxsparse.deltas.tensors import bits_dtype

__all__ = ["FORMAT", "VERSION", "Manifest", "read_manifest", "write_manifest"]

FORMAT = "jaxsparse-delta"
VERSION = 1


class Manifest(NamedTuple):
    """What the JSON says.

    Attributes:
        metadata: the delta's metadata.
        tensors: what each tensor is, by path.
        checksums: SHA-256 of each array that holds the entries, by name.
        sizes: bytes of each of these arrays, by name.
    """

    metadata: Metadata
    tensors: Mapping[str, TensorHeader]
    checksums: Mapping[str, str]
    sizes: Mapping[str, int]


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_manifest(delta: Delta, arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the JSON text for a delta whose entries are held by `arrays`."""
    tensors = {
        path: {
            "kind": "coordinates",
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "entries": tensor.entries,
            "base_sha256": tensor.base_checksum,
            "tuned_sha256": tensor.tuned_checksum,
        }
        for path, tensor in delta.tensors.items()
    }
    checksums = {name: hashlib.sha256(array.data).hexdigest() for name, array in arrays.items()}
    content = delta.metadata.as_dict() | {"tensors": tensors, "arrays": checksums}
    digest = hashlib.sha256(_canonical(content).encode()).hexdigest()
    return _canonical({"format": FORMAT, "version": VERSION, "sha256": digest, "delta": content})


def read_manifest(text: str | bytes) -> Manifest:
    """Reads the JSON text of a delta.

    Args:
        text: what `write_manifest` returned, or anything.

    Returns:
        The checked content.

    Raises:
        InputError: not a delta, damaged, altered, from a future version, or impossible in itself.
    """
    try:
        envelope = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"its metadata is damaged: {error}") from error
    if not isinstance(envelope, dict) or envelope.get("format") != FORMAT:
        raise InputError("it is not a jaxsparse delta")
    version = _field(envelope, "version", int)
    if version != VERSION:
        raise InputError(
            f"its format version is {version}; this jaxsparse reads version {VERSION}: install a newer one"
        )
    content = _field(envelope, "delta", dict)
    try:
        canonical = _canonical(content).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"its metadata is damaged: {error}") from error
    if hashlib.sha256(canonical).hexdigest() != _field(envelope, "sha256", str):
        raise InputError("its metadata is damaged or altered: the checksum does not match")
    tensors = {path: _header(path, spec) for path, spec in _field(content, "tensors", dict).items()}
    checksums = _field(content, "arrays", dict)
    return Manifest(_metadata(content), tensors, checksums, _sizes(tensors, checksums))


def _field(content: Mapping[str, Any], name: str, *kinds: type) -> Any:
    value = content.get(name)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"its metadata is not valid: {name!r} is {str(value)[:60]!r}, expected {expected}")
    return value


def _metadata(content: Mapping[str, Any]) -> Metadata:
    nothing = type(None)
    budget = _field(content, "budget", float, int, nothing)
    versions = _field(content, "versions", dict)
    for name in versions:
        _field(versions, name, str)
    return Metadata(
        method=_field(content, "method", str, nothing),
        options=_field(content, "options", dict),
        budget=None if budget is None else float(budget),
        base_name=_field(content, "base_name", str, nothing),
        base_fingerprint=_field(content, "base_fingerprint", str, nothing),
        step=_field(content, "step", int, nothing),
        versions=versions,
    )


def _header(path: str, spec: Any) -> TensorHeader:
    try:
        if not isinstance(spec, dict):
            raise InputError("its metadata is not valid: it is not described")
        if (kind := _field(spec, "kind", str)) != "coordinates":
            raise InputError(f"it is stored as {kind!r}, which this jaxsparse cannot read: install a newer one")
        shape = tuple(_field({"shape": axis}, "shape", int) for axis in _field(spec, "shape", list))
        entries = _field(spec, "entries", int)
        header = TensorHeader(
            shape, _field(spec, "dtype", str), entries, _sha256(spec, "base_sha256"), _sha256(spec, "tuned_sha256")
        )
        bits_dtype(header.dtype)
        if len(shape) > 32 or any(axis < 1 for axis in shape) or not 1 <= entries <= math.prod(shape) <= 2**48:
            raise InputError(f"{entries} changed entries in a tensor of shape {str(shape)[:80]} are not possible")
    except InputError as error:
        raise InputError(f"tensor {path!r}: {error}") from error
    return header


def _sha256(content: Mapping[str, Any], name: str) -> str:
    value = _field(content, name, str)
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise InputError(f"its metadata is not valid: {name!r} is {value[:60]!r}, expected a SHA-256")
    return value


def _sizes(tensors: Mapping[str, TensorHeader], checksums: Mapping[str, Any]) -> dict[str, int]:
    for name in checksums:
        _sha256(checksums, name)
    gap_planes = sum(name.startswith("gaps_") for name in checksums)
    sizes = plane_sizes(tensors, gap_planes) if tensors else {}
    if sizes.keys() != checksums.keys():
        raise InputError(
            f"its metadata is not valid: it lists the arrays {sorted(checksums)[:20]}, expected {sorted(sizes)}"
        )
    return sizes
