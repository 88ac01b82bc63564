"""Hugging Face folders, in and out: config.json, safetensors (one file or shards), tokenizer.json."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import atomic_folder, atomic_write_text, check_writable, make_shareable, read_json
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.data.tokenizers import Tokenizer
from jaxsparse.models.configs import Config, LlamaConfig, config_from_hugging_face, config_to_hugging_face
from jaxsparse.models.layouts import Parameter, parameters_of, tensor_name
from jaxsparse.models.sources import TensorSpec

__all__ = ["HuggingFaceSource", "is_hugging_face", "write_hugging_face"]

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

# Buffers that old files hold beside the parameters.
_BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


def is_hugging_face(folder: Path) -> bool:
    """Returns whether a folder looks like Hugging Face's: config.json with a model_type.

    Args:
        folder: any path.

    Returns:
        True where it does.
    """
    try:
        return "model_type" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


class HuggingFaceSource:
    """A folder as Hugging Face lays it out.

    Args:
        folder: the folder.

    Raises:
        InputError: config.json or weights are missing, malformed or not supported; a shard is missing.
    """

    interleaved = False

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.where = str(folder)
        self.name = self.folder.resolve().name
        self.config = config_from_hugging_face(read_json(self.folder / "config.json"))
        self.parameters = parameters_of(self.config)
        self.tensors: dict[str, TensorSpec] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for path in self._files():
            self._add(path)

    def tokenizer(self) -> Tokenizer | None:
        """Returns the tokenizer of the folder, or None where there is no tokenizer.json."""
        return Tokenizer.load(self.folder) if (self.folder / "tokenizer.json").is_file() else None

    def name_of(self, parameter: Parameter, layer: int) -> str:
        """Returns Hugging Face's name of one layer's tensor."""
        return tensor_name(self.config, parameter.path, layer)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Returns the rows from `start` to `stop`."""
        path, key = self._places[name]
        # Opened for each block: a file that stays mapped counts as this process's memory, page by page.
        with safe_open(path, framework="numpy") as file:
            rows: np.ndarray = file.get_slice(key)[start:stop]
        return rows

    def _files(self) -> list[Path]:
        if (self.folder / _WEIGHTS).is_file():
            return [self.folder / _WEIGHTS]
        if not (self.folder / _INDEX).is_file():
            pickled = any(self.folder.glob("*.bin"))
            hint = "; pickled weights are never read, save them as safetensors" if pickled else ""
            raise InputError(f"{self.folder} has neither {_WEIGHTS} nor {_INDEX}{hint}")
        shards = read_json(self.folder / _INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise InputError(f"{self.folder / _INDEX} has no weight_map of tensor names to file names")
        files = [self.folder / shard for shard in sorted(set(shards.values()))]
        missing = [path.name for path in files if not path.is_file()]
        if missing:
            raise InputError(f"{self.folder}: shard {', '.join(missing)} is missing, which {_INDEX} names")
        return files

    def _add(self, path: Path) -> None:
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 - not a dict
                    name = self._full_name(key)
                    if name is not None:
                        held = file.get_slice(key)
                        dtype = _DTYPES.get(held.get_dtype(), held.get_dtype())
                        self._places[name] = (path, key)
                        self.tensors[name] = TensorSpec(tuple(held.get_shape()), dtype)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a safetensors file, or truncated: {error}") from error

    def _full_name(self, key: str) -> str | None:
        """Returns the name that the whole language model has for a tensor; None for what is not needed."""
        if key.endswith(_BUFFERS):
            return None
        if key == "lm_head.weight":
            return None if self.config.tie_word_embeddings else key
        prefix = "model." if isinstance(self.config, LlamaConfig) else "transformer."
        return key if key.startswith(prefix) else prefix + key


def write_hugging_face(
    folder: str | Path,
    config: Config,
    params: Any,
    tokenizer: Tokenizer | None,
    *,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
) -> None:
    """Writes a model as Hugging Face lays it out; the folder appears whole or not at all.

    Args:
        folder: a folder that is new or empty.
        config: the configuration.
        params: the parameter tree.
        tokenizer: the tokenizer, or None.
        max_shard_size: largest size of a weights file in bytes (Hugging Face's 5 GB); a single tensor may
            be larger. The host holds one shard at a time.
        overwrite: replace what is there.

    Raises:
        InputError: the folder is not empty or cannot be written, or the disk is full.
    """
    leaves = dict(flatten_with_paths(params)[0])
    check_writable(folder, required_bytes=sum(leaf.nbytes for leaf in leaves.values()))
    with atomic_folder(folder, overwrite=overwrite) as temporary:
        fields = {**config_to_hugging_face(config), "dtype": next(iter(leaves.values())).dtype.name}
        if tokenizer is not None:
            fields |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
            tokenizer.save(temporary)
        atomic_write_text(temporary / "config.json", json.dumps(fields, indent=2))
        shards = list(_shards(config, leaves, max_shard_size))
        index: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else _WEIGHTS
            arrays = {
                tensor_name(config, parameter.path, layer): _tensor(leaves[parameter.path], parameter, layer)
                for parameter, layer in shard
            }
            try:
                save_file(arrays, temporary / file, metadata={"format": "pt"})
            except SafetensorError as error:  # the library's spelling of an OSError
                raise InputError(f"cannot write {folder}: {error}") from error
            make_shareable(temporary / file)
            index |= dict.fromkeys(arrays, file)
        if len(shards) > 1:
            total = {"total_size": sum(leaf.nbytes for leaf in leaves.values())}
            atomic_write_text(temporary / _INDEX, json.dumps({"metadata": total, "weight_map": index}, indent=2))


def _shards(config: Config, leaves: dict[str, jax.Array], max_shard_size: int) -> Iterator[list[tuple[Parameter, int]]]:
    """Yields the (parameter, layer) pairs of each file, as many as fit."""
    shard: list[tuple[Parameter, int]] = []
    size = 0
    for parameter in parameters_of(config):
        nbytes = math.prod(parameter.file_shape) * leaves[parameter.path].dtype.itemsize
        for layer in parameter.layers:
            if shard and size + nbytes > max_shard_size:
                yield shard
                shard, size = [], 0
            shard.append((parameter, layer))
            size += nbytes
    yield shard


def _tensor(leaf: jax.Array, parameter: Parameter, layer: int) -> np.ndarray:
    values = np.asarray(leaf[layer] if parameter.stacked else leaf)
    return np.ascontiguousarray(values.T if parameter.transposed else values)
