"""Delta files: a folder (JSON and an Orbax checkpoint), or one safetensors file with the same content."""

import hashlib
import os
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_folder, atomic_write_bytes, check_writable
from jaxsparse.common.hosts import alone
from jaxsparse.deltas.coding import decode, encode
from jaxsparse.deltas.delta import Delta
from jaxsparse.deltas.difference import tensors_by_path
from jaxsparse.deltas.manifest import FORMAT, Manifest, read_manifest, write_manifest
from jaxsparse.deltas.patch import check_base, check_fingerprint, check_shapes

__all__ = ["load", "save"]

_MANIFEST = "delta.json"
_ARRAYS = "arrays"
# What a compressor makes of zeros at best: 4 bytes for a block of 128 KiB (zstd), 1:1032 (deflate). More is a bomb.
_MOST_COMPRESSION = {"zstd": 1 << 15, "deflate": 1032}
_ALLOWANCE = 1 << 20


def save(path: str | os.PathLike[str], delta: Delta, *, overwrite: bool = False) -> None:
    """Writes a delta, whole or not at all.

    Args:
        path: a new folder; or a file that ends in `.safetensors`, for the single-file form with the same
            content, as hubs like it.
        delta: the delta.
        overwrite: replace what is there.

    Raises:
        InputError: there is something already, or it cannot be written.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from jaxsparse.deltas.difference import diff
        >>> path = tempfile.mkdtemp() + "/tuned.safetensors"
        >>> save(path, diff({"w": jnp.zeros(3)}, {"w": jnp.arange(3.0)}))
        >>> load(path, base={"w": jnp.zeros(3)}).entries
        2
    """
    target = Path(path)
    arrays = encode(delta)
    manifest = write_manifest(delta, arrays)
    if target.suffix == ".safetensors":
        if target.exists() and not overwrite:
            raise InputError(f"{target} exists; give a new name, or overwrite=True")
        packed = {name: np.frombuffer(_deflate(array), np.uint8) for name, array in arrays.items()}
        metadata = {"format": FORMAT, "compression": "deflate", "delta": manifest}
        atomic_write_bytes(target, safetensors.numpy.save(packed, metadata))
        return
    check_writable(target)
    with atomic_folder(target, overwrite=overwrite) as folder:
        (folder / _MANIFEST).write_text(manifest, encoding="utf-8")
        if arrays:
            # Imported late: tuners make deltas, and who trains need not wait for Orbax before.
            import orbax.checkpoint as ocp

            options = {"use_ocdbt": True, "use_zarr3": False, "use_compression": True}
            handler = ocp.PyTreeCheckpointHandler(**options, multiprocessing_options=alone())
            with ocp.Checkpointer(handler, multiprocessing_options=alone()) as checkpointer:
                checkpointer.save(folder.resolve() / _ARRAYS, dict(arrays))


def load(path: str | os.PathLike[str], base: PyTree | None = None, *, base_fingerprint: str | None = None) -> Delta:
    """Reads a delta and checks it. Every byte is covered by a checksum; nothing is ever unpickled.

    Args:
        path: what `save` wrote.
        base: the base's parameters, to check that the delta belongs to them: shapes and dtypes before the
            entries are read, then the base's bits at the delta's entries, then the fingerprint.
        base_fingerprint: `fingerprint(base)` where it is known: compared with the delta's even without
            `base`, and spares the time to compute it from all of `base`.

    Returns:
        The delta.

    Raises:
        InputError: there is no delta; it is truncated, damaged, altered, impossible in itself or from a
            future version; or it belongs to another base.
    """
    source = Path(path)
    if not source.exists():
        raise InputError(f"there is no delta at {source}")
    try:
        return _load(source, base, base_fingerprint)
    except InputError as error:
        raise InputError(f"cannot load the delta {source}: {error}") from error
    except (OSError, MemoryError) as error:
        raise InputError(f"cannot load the delta {source}: {error or 'not enough memory'}") from error


def _load(source: Path, base: PyTree | None, base_fingerprint: str | None) -> Delta:
    manifest, read_arrays = (_open_folder if source.is_dir() else _open_safetensors)(source)
    if base is not None:
        shapes = {path: (header.shape, header.dtype) for path, header in manifest.tensors.items()}
        check_shapes(tensors_by_path(base, "base"), shapes, "base")
    arrays = read_arrays(manifest) if manifest.sizes else {}
    for name, checksum in manifest.checksums.items():
        if hashlib.sha256(arrays[name].data).hexdigest() != checksum:
            raise InputError(f"array {name} is damaged or altered: the checksum does not match")
    delta = Delta(decode(manifest.tensors, arrays), manifest.metadata)
    if base is not None:
        check_base(base, delta, base_fingerprint=base_fingerprint)
    check_fingerprint(delta, base_fingerprint)
    return delta


_Opened = tuple[Manifest, Callable[[Manifest], Mapping[str, np.ndarray]]]


def _check_claim(manifest: Manifest, stored: int, compression: str) -> None:
    claimed = sum(manifest.sizes.values())
    if claimed > stored * _MOST_COMPRESSION[compression] + _ALLOWANCE:
        raise InputError(f"it is truncated or not valid: {stored:,} bytes cannot hold the {claimed:,} that it claims")


# ---- the folder ----------------------------------------------------------------------------------------------


def _open_folder(folder: Path) -> _Opened:
    if not (folder / _MANIFEST).is_file():
        inside = f"; {folder / 'delta'} is one" if (folder / "delta" / _MANIFEST).is_file() else ""
        raise InputError(f"it is not a jaxsparse delta: {_MANIFEST} is missing{inside}")
    manifest = read_manifest((folder / _MANIFEST).read_bytes())

    def read_arrays(manifest: Manifest) -> Mapping[str, np.ndarray]:
        arrays = folder.resolve() / _ARRAYS
        stored = sum(file.stat().st_size for file in arrays.rglob("*") if file.is_file())
        _check_claim(manifest, stored, "zstd")
        try:
            reads = {name: _open_plane(arrays, name, size).read() for name, size in manifest.sizes.items()}
            return {name: read.result() for name, read in reads.items()}
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            reason = " ".join(str(error).split()).partition(" [tensorstore_spec")[0]
            raise InputError(f"its arrays are truncated or damaged: {reason}") from error

    return manifest, read_arrays


def _open_plane(folder: Path, name: str, size: int) -> Any:
    import tensorstore  # late, as Orbax

    # Orbax restores all arrays at once and leaves unhandled exceptions behind when several of them are damaged.
    files = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{folder}/"}, "path": f"{name}/"}
    plane = tensorstore.open({"driver": "zarr", "kvstore": files, "fill_missing_data_reads": False}).result()
    chunk = plane.chunk_layout.read_chunk.shape
    if plane.dtype != tensorstore.uint8 or plane.shape != (size,) or not chunk or (chunk[0] or 0) > size:
        raise InputError(f"array {name} is damaged: expected {size} bytes")
    return plane


# ---- the single file -----------------------------------------------------------------------------------------


def _open_safetensors(file: Path) -> _Opened:
    try:
        with safetensors.safe_open(file, framework="np") as opened:
            metadata = opened.metadata() or {}
    except safetensors.SafetensorError as error:
        raise InputError(f"it is truncated, damaged, or not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT or "delta" not in metadata:
        raise InputError("it is not a jaxsparse delta: the safetensors metadata do not say so")
    if (compression := metadata.get("compression")) != "deflate":
        raise InputError(f"its compression {compression!r} is not known; install a newer jaxsparse")
    manifest = read_manifest(metadata["delta"])

    def read_arrays(manifest: Manifest) -> Mapping[str, np.ndarray]:
        _check_claim(manifest, file.stat().st_size, "deflate")
        with safetensors.safe_open(file, framework="np") as opened:
            surplus = set(opened.keys()) ^ manifest.sizes.keys()
            if surplus:
                raise InputError(f"it is damaged: array {min(surplus)} is missing or surplus")
            return {name: _inflate(name, opened.get_tensor(name), size) for name, size in manifest.sizes.items()}

    return manifest, read_arrays


def _deflate(array: np.ndarray) -> bytes:
    # Byte planes hold runs and skewed bytes, but no strings that repeat: a search for them takes 5 times as long.
    compressor = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)
    return compressor.compress(array.data) + compressor.flush()


def _inflate(name: str, packed: np.ndarray, size: int) -> np.ndarray:
    decompressor = zlib.decompressobj()
    try:
        data = decompressor.decompress(packed.data, size + 1)
    except (zlib.error, ValueError, TypeError) as error:
        raise InputError(f"array {name} is damaged: {error}") from error
    if len(data) != size or not decompressor.eof or decompressor.unused_data:
        raise InputError(f"array {name} is truncated or damaged: expected {size} bytes")
    return np.frombuffer(data, np.uint8)
