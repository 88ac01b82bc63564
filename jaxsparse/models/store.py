"""The project's own checkpoint format: a folder with config.json, metadata.json, the tokenizer, and Orbax arrays."""

import dataclasses
import json
from importlib import metadata as installed
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_folder, atomic_write_text, check_writable
from jaxsparse.common.fingerprints import combine_checksums, tensor_checksum
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.models.configs import Config, config_from_json
from jaxsparse.models.layouts import Parameter, parameters_of
from jaxsparse.models.sources import nest, parse_dtype

__all__ = ["FORMAT_VERSION", "is_stored", "read_folder", "write_folder"]

FORMAT_VERSION = 1

_METADATA = "metadata.json"

# Small enough that decoding a chunk needs little memory beside the array it lands in.
_CHUNK_BYTES = 1 << 24


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
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        check_writable(temporary, required_bytes=sum(leaf.nbytes for _, leaf in leaves) // 4)
        atomic_write_text(temporary / "config.json", json.dumps(dataclasses.asdict(config), indent=2))
        if tokenizer is not None:
            tokenizer.save(temporary)
        _write_params(temporary / "params", leaves)
        atomic_write_text(temporary / _METADATA, json.dumps(description, indent=2))
    return fingerprint


def _write_params(folder: Path, leaves: list[tuple[str, Any]]) -> None:
    tree = nest(leaves)
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(folder.absolute(), ocp.args.PyTreeSave(tree, save_args=save_args))
    except ValueError as error:  # tensorstore's spelling of an OSError
        raise InputError(f"cannot write {folder}: {_last_line(error)}") from error


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def read_folder(folder: str | Path, dtype: Any = None) -> tuple[Config, dict[str, Any], Tokenizer | None, str, str]:
    """Reads a checkpoint, tensor by tensor, and verifies the checksum of each.

    Args:
        folder: a folder that `write_folder` made.
        dtype: float32, bfloat16 or float16 to convert to; None keeps what was stored.

    Returns:
        Configuration, parameters, tokenizer or None, name, and the fingerprint of the parameters returned.

    Raises:
        InputError: a file is missing or malformed, or a tensor was altered.
    """
    folder = Path(folder)
    description = _read_json(folder / _METADATA)
    if description.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{folder} has format version {description.get('format_version')!r}; this jaxsparse reads {FORMAT_VERSION}"
        )
    config = config_from_json(_read_json(folder / "config.json"))
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.json").is_file() else None
    parameters = parameters_of(config)
    stored = description.get("tensors", {})
    if {p.path: p.shape for p in parameters} != {path: tuple(spec["shape"]) for path, spec in stored.items()}:
        raise InputError(f"{folder}: the tensors of metadata.json are not those of config.json")
    target = None if dtype is None else parse_dtype(dtype)
    loaded: dict[str, jax.Array] = {}
    checksums: dict[str, str] = {}
    with ocp.PyTreeCheckpointer() as checkpointer:
        # Largest first, so that whatever is needed on the side is needed while little is in place.
        for parameter in sorted(parameters, key=lambda p: -int(np.prod(p.shape))):
            path = parameter.path
            leaf = _read_tensor(checkpointer, folder / "params", parameter, stored[path]["dtype"])
            checksums[path] = tensor_checksum(leaf)
            if checksums[path] != stored[path]["checksum"]:
                raise InputError(f"{folder}: tensor {path} is not what was saved: its checksum differs")
            if target is not None and target != leaf.dtype:
                leaf = leaf.astype(target)
                checksums[path] = tensor_checksum(leaf)
            loaded[path] = leaf
    params = nest((parameter.path, loaded[parameter.path]) for parameter in parameters)
    return config, params, tokenizer, str(description["name"]), combine_checksums(checksums.items())


def _read_tensor(checkpointer: ocp.PyTreeCheckpointer, folder: Path, parameter: Parameter, dtype: str) -> jax.Array:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    item = nest([(parameter.path, jax.ShapeDtypeStruct(parameter.shape, parse_dtype(dtype), sharding=here))])
    arguments = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=here), item)
    restore = ocp.args.PyTreeRestore(item, restore_args=arguments, partial_restore=True)
    try:
        tree = checkpointer.restore(folder.absolute(), restore)
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"{folder}: tensor {parameter.path} cannot be read: {_last_line(error)}") from error
    leaf: jax.Array = jax.tree.leaves(tree)[0]
    return leaf


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not an object")
    return content
