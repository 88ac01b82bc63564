"""The metadata of a delta file as JSON: written, and read back by someone who trusts nothing.

    {"format": "jaxsparse-delta", "version": 2, "sha256": "…", "delta": {
        "method": …, "options": …, "budget": …, "base_name": …, "base_fingerprint": …, "step": …, "versions": …,
        "tensors": {path: {"kind": "coordinates", "shape": […], "dtype": "bfloat16", "entries": 5264,
                           "base_sha256": "…", "tuned_sha256": "…"}, …},
        "arrays": {"gaps_0": "sha256 of its bytes", …}}}

Tensors of other kinds have, in place of entries, {"kind": "slices", "axis": "input", "slices": 32, "layers": [0],
"inputs": [1], "outputs": [2]} or {"kind": "factors", "rank": 8, "gain": false, "width": 32, "layers": …}.

`sha256` is that of the value of `delta` as compact JSON with sorted keys, so no bit can flip unseen.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxsparse.common.errors import InputError
from jaxsparse.deltas.coding import plane_sizes
from jaxsparse.deltas.delta import Delta, Metadata
from jaxsparse.deltas.headers import Header, field, header_of, read_header, sha256_field

__all__ = ["FORMAT", "VERSION", "Manifest", "read_manifest", "write_manifest"]

FORMAT = "jaxsparse-delta"
VERSION = 2
_READABLE = (1, 2)  # version 1 knew coordinates alone


class Manifest(NamedTuple):
    """What the JSON says.

    Attributes:
        metadata: the delta's metadata.
        tensors: what each tensor is, by path.
        checksums: SHA-256 of each array that holds the entries, by name.
        sizes: bytes of each of these arrays, by name.
    """

    metadata: Metadata
    tensors: Mapping[str, Header]
    checksums: Mapping[str, str]
    sizes: Mapping[str, int]


def _canonical(content: Any) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def write_manifest(delta: Delta, arrays: Mapping[str, np.ndarray]) -> str:
    """Returns the JSON text for a delta whose entries are held by `arrays`."""
    tensors = {path: header_of(tensor).spec() for path, tensor in delta.tensors.items()}
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
    version = field(envelope, "version", int)
    if version not in _READABLE:
        raise InputError(
            f"its format version is {version}; this jaxsparse reads versions 1 to {VERSION}: install a newer one"
        )
    content = field(envelope, "delta", dict)
    try:
        canonical = _canonical(content).encode()
    except (ValueError, RecursionError) as error:
        raise InputError(f"its metadata is damaged: {error}") from error
    if hashlib.sha256(canonical).hexdigest() != field(envelope, "sha256", str):
        raise InputError("its metadata is damaged or altered: the checksum does not match")
    tensors = {path: read_header(path, spec) for path, spec in field(content, "tensors", dict).items()}
    checksums = field(content, "arrays", dict)
    return Manifest(_metadata(content), tensors, checksums, _sizes(tensors, checksums))


def _metadata(content: Mapping[str, Any]) -> Metadata:
    nothing = type(None)
    budget = field(content, "budget", float, int, nothing)
    versions = field(content, "versions", dict)
    for name in versions:
        field(versions, name, str)
    return Metadata(
        method=field(content, "method", str, nothing),
        options=field(content, "options", dict),
        budget=None if budget is None else float(budget),
        base_name=field(content, "base_name", str, nothing),
        base_fingerprint=field(content, "base_fingerprint", str, nothing),
        step=field(content, "step", int, nothing),
        versions=versions,
    )


def _sizes(tensors: Mapping[str, Header], checksums: Mapping[str, Any]) -> dict[str, int]:
    for name in checksums:
        sha256_field(checksums, name)
    gap_planes = sum(name.startswith("gaps_") for name in checksums)
    sizes = plane_sizes(tensors, gap_planes) if tensors else {}
    if sizes.keys() != checksums.keys():
        raise InputError(
            f"its metadata is not valid: it lists the arrays {sorted(checksums)[:20]}, expected {sorted(sizes)}"
        )
    return sizes
