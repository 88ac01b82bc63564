"""The project's own checkpoint format: a folder with config.json, metadata.json, the tokenizer, and Orbax arrays."""

import dataclasses
import json
import re
from importlib import metadata as installed
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_folder, atomic_write_text, check_writable, read_json
from jaxsparse.common.fingerprints import StreamedChecksum, combine_checksums, tensor_checksum
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.models.configs import Config, config_from_json
from jaxsparse.models.layouts import Parameter, parameters_of
from jaxsparse.models.sources import TensorSpec, nest

__all__ = ["FORMAT_VERSION", "StoredSource", "is_stored", "write_folder"]

FORMAT_VERSION = 1

_METADATA = "metadata.json"
_PARAMS = "params"

# Small enough that decoding a chunk needs little memory beside the array it lands in.
_CHUNK_BYTES = 1 << 22


def is_stored(folder: Path) -> bool:
    """Returns whether a folder is one that `write_folder` made.

    Args:
        folder: any path.

    Returns:
        True where metadata.json says so.
    """
    try:
        return json.loads((folder / _METADATA).read_text(encoding="utf-8")).get("format") == "jaxsparse"
    except (OSError, ValueError, AttributeError):
        return False


def write_folder(
    folder: str | Path,
    config: Config,
    params: Any,
    tokenizer: Tokenizer | None,
    name: str,
    *,
    source: str = "",
    overwrite: bool = False,
) -> str:
    """Writes a checkpoint; the folder appears whole or not at all.

    Args:
        folder: a folder that is new or empty.
        config: the model's configuration.
        params: its parameter tree.
        tokenizer: its tokenizer, or None.
        name: what reports call the model.
        source: where the weights came from, for the record.
        overwrite: replace what is there.

    Returns:
        The fingerprint of `params`.

    Raises:
        InputError: the folder is not empty or cannot be written, or the disk is full.
    """
    leaves, _ = flatten_with_paths(params)
    checksums = {path: tensor_checksum(leaf) for path, leaf in leaves}
    fingerprint = combine_checksums(checksums.items())
    description = {
        "format": "jaxsparse",
        "format_version": FORMAT_VERSION,
        "name": name,
        "fingerprint": fingerprint,
        "tensors": {
            path: {"dtype": leaf.dtype.name, "shape": leaf.shape, "checksum": checksums[path]} for path, leaf in leaves
        },
        "source": source,
        "versions": {package: installed.version(package) for package in ("jaxsparse", "jax", "orbax-checkpoint")},
    }
    # Asked beforehand, as Orbax reports a full disk by pages of log; compression may need less.
    check_writable(folder, required_bytes=sum(leaf.nbytes for _, leaf in leaves))
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        atomic_write_text(temporary / "config.json", json.dumps(dataclasses.asdict(config), indent=2))
        if tokenizer is not None:
            tokenizer.save(temporary)
        try:
            _write_params(temporary / _PARAMS, leaves)
        except ValueError as error:  # tensorstore's spelling of an OSError
            raise InputError(f"cannot write {folder}: {_reason(error)}") from error
        atomic_write_text(temporary / _METADATA, json.dumps(description, indent=2))
    return fingerprint


def _write_params(folder: Path, leaves: list[tuple[str, Any]]) -> None:
    tree = nest(leaves)
    save_args = jax.tree.map(_save_args, tree)
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.resolve(), ocp.args.PyTreeSave(tree, save_args=save_args))


def _save_args(leaf: Any) -> ocp.SaveArgs:
    # Without the hint a stack of matrices is cut across its rows, and reading layer by layer would decode
    # every chunk again for each layer.
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if leaf.ndim > 2 else ())


def _reason(error: Exception) -> str:
    """Returns what the operating system said, out of tensorstore's account of how it came to that."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return re.sub(r" \[.*", "", lines[-1]).rsplit(": ", 1)[-1]


class StoredSource:
    """A folder that `write_folder` made; every tensor's checksum is verified as it is read.

    Args:
        folder: the folder.

    Raises:
        InputError: a file is missing or malformed.
    """

    interleaved = False

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.where = str(folder)
        description = read_json(self.folder / _METADATA)
        version = description.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(f"{folder} has format version {version!r}; this jaxsparse reads {FORMAT_VERSION}")
        try:
            self.name = str(description["name"])
            stored = description["tensors"].items()
            self.tensors = {path: TensorSpec(tuple(spec["shape"]), spec["dtype"]) for path, spec in stored}
            self._checksums = {path: str(spec["checksum"]) for path, spec in stored}
            self.fingerprint = combine_checksums(self._checksums.items())
            if self.fingerprint != description["fingerprint"]:
                raise ValueError("the checksums are not those of the fingerprint")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"{self.folder / _METADATA} is damaged: {error!r}") from error
        self.config = config_from_json(read_json(self.folder / "config.json"))
        self.parameters = [parameter.as_held() for parameter in parameters_of(self.config)]
        self._progress: dict[str, StreamedChecksum] = {}
        # Few threads: what each of them has freed stays with this process.
        limits = {name: {"limit": 1} for name in ("data_copy_concurrency", "file_io_concurrency")}
        self._context = tensorstore.Context(limits)

    def tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer that was stored, or None."""
        return Tokenizer.load(self.folder) if (self.folder / "tokenizer.json").is_file() else None

    def name_of(self, parameter: Parameter, layer: int) -> str:
        """Returns the parameter's path: layers are stacked here too."""
        return parameter.path

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns the rows from `start` to `stop`.

        Raises:
            InputError: they cannot be read, or end a tensor that is not what was stored.
        """
        spec = self.tensors[name]
        try:
            # Orbax restores whole tensors only, with one more copy of each; blocks come from the library
            # underneath.
            array = _open_array(self.folder / _PARAMS, name, self._context)
            rows: np.ndarray = array[start:stop].read().result()
        except (ValueError, IndexError) as error:
            raise InputError(
                f"{self.where}: tensor {name} cannot be read, its file is damaged or missing: {_reason(error)}"
            ) from error
        progress = self._progress.setdefault(name, StreamedChecksum(spec.dtype, spec.shape))
        progress.update(rows)
        if stop == spec.shape[0] and progress.hexdigest() != self._checksums[name]:
            raise InputError(f"{self.where}: tensor {name} is not what was saved: its checksum differs")
        return rows


def _open_array(folder: Path, path: str, context: tensorstore.Context) -> tensorstore.TensorStore:
    base = {"driver": "file", "path": f"{folder.resolve()}/"}
    store = {"driver": "ocdbt", "base": base, "path": path.replace("/", ".")}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True, read=True, context=context).result()
