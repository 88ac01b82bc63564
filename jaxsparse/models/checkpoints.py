"""Models in and out of files: one `load` for every format, `save`, `convert`, `export_hugging_face`."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import check_writable, read_json
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.data.tokenizer_formats import tokenizer_from_llama2c
from jaxsparse.data.tokenizers import Tokenizer, check_fits
from jaxsparse.models.configs import Config, config_from_hugging_face
from jaxsparse.models.fetch import cache_folder, fetch_smollm2
from jaxsparse.models.gguf_reader import GGUFSource
from jaxsparse.models.hugging_face import HuggingFaceSource, is_hugging_face, write_hugging_face
from jaxsparse.models.llama2c import Llama2cSource
from jaxsparse.models.presets import PRESETS
from jaxsparse.models.sources import TensorSource, load_params
from jaxsparse.models.store import StoredSource, is_stored, write_folder

__all__ = ["KNOWN_MODELS", "Checkpoint", "convert", "export_hugging_face", "load", "load_config", "save"]

# Models that are fetched by name.
KNOWN_MODELS = {"smollm2-135m": fetch_smollm2}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model with all that belongs to it.

    Attributes:
        config: the configuration.
        params: the parameter tree, layers stacked on axis 0.
        tokenizer: the tokenizer, or None where the files have none.
        name: what reports call it.
        fingerprint: of `params`, as `jaxsparse.common.fingerprints.fingerprint` gives it.
        folder: the folder it was loaded from or saved to, or None.
    """

    config: Config
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    name: str
    fingerprint: str
    folder: Path | None = None


def load(path_or_name: str | Path, *, dtype: Any = None, tokenizer: str | Path | None = None) -> Checkpoint:
    """Loads a model, whatever its format.

    The weights stream into place: beside them the host holds one block of one tensor.

    Args:
        path_or_name: a folder of our own format, a Hugging Face folder, a .gguf file, a llama2.c .bin
            file, or the name of a known model (smollm2-135m), which is fetched and converted once.
        dtype: float32, bfloat16 or float16; None keeps what the files have (quantised weights: float32).
        tokenizer: a folder with tokenizer.json, or a llama2.c tokenizer, instead of the model's own.

    Returns:
        The checkpoint, its parameters on the default device.

    Raises:
        InputError: it is none of these, is damaged, or its parts do not belong together.
    """
    path = _locate(path_or_name)
    source = _open(path)
    chosen = _tokenizer(source, tokenizer)
    params = load_params(source, dtype)
    folder = path if path.is_dir() else path.parent
    return Checkpoint(source.config, params, chosen, source.name, _fingerprint(source, params), folder)


def load_config(path_or_name: str | Path) -> Config:
    """Reads a model's configuration, whatever its format, and none of its weights.

    Args:
        path_or_name: as for `load`; of a Hugging Face folder config.json is enough, which can be named itself. Names
            of `PRESETS`, such as llama2-7b, need no file at all.

    Returns:
        The configuration.

    Raises:
        InputError: it is no model, or one that is not supported.
    """
    if str(path_or_name) in PRESETS and not Path(path_or_name).exists():
        return PRESETS[str(path_or_name)]
    try:
        path = _locate(path_or_name)
    except InputError as error:
        raise InputError(f"{error}; without weights also {', '.join(PRESETS)}") from None
    file = path / "config.json" if path.is_dir() and not is_stored(path) else path
    return config_from_hugging_face(read_json(file)) if file.name == "config.json" else _open(path).config


def save(
    folder: str | Path,
    config: Config,
    params: Any,
    tokenizer: Tokenizer | None,
    name: str,
    *,
    source: str = "",
    overwrite: bool = False,
) -> Checkpoint:
    """Saves a model in our own format; the folder appears whole or not at all.

    Args:
        folder: a folder that is new or empty.
        config: the configuration.
        params: the parameter tree; an NNX state or linen dict with the same paths is fine too.
        tokenizer: the tokenizer, or None.
        name: what reports call the model.
        source: where the weights came from, for the record.
        overwrite: replace what is there.

    Returns:
        What `load` would return.

    Raises:
        InputError: the folder is not empty or cannot be written, or the disk is full.
    """
    print_ = write_folder(folder, config, params, tokenizer, name, source=source, overwrite=overwrite)
    return Checkpoint(config, params, tokenizer, name, print_, Path(folder))


def convert(
    source: str | Path,
    out: str | Path,
    *,
    dtype: Any = None,
    to: str = "jaxsparse",
    tokenizer: str | Path | None = None,
    name: str | None = None,
    overwrite: bool = False,
) -> Checkpoint:
    """Converts a model of any format that `load` knows.

    Args:
        source: as `path_or_name` of `load`.
        out: a folder that is new or empty.
        dtype: float32, bfloat16 or float16; None keeps what the files have.
        to: "jaxsparse", our own format, or "hugging_face".
        tokenizer: as in `load`.
        name: what reports call the model; None: its file's or folder's name.
        overwrite: replace what is there.

    Returns:
        The converted checkpoint.

    Raises:
        InputError: as `load`; or `out` is not empty or cannot be written.
    """
    if to not in ("jaxsparse", "hugging_face"):
        raise InputError(f"to must be 'jaxsparse' or 'hugging_face', not {to!r}")
    check_writable(out)
    checkpoint = load(source, dtype=dtype, tokenizer=tokenizer)
    checkpoint = dataclasses.replace(checkpoint, name=name or checkpoint.name)
    if to == "hugging_face":
        return export_hugging_face(out, checkpoint, overwrite=overwrite)
    parts = (checkpoint.config, checkpoint.params, checkpoint.tokenizer, checkpoint.name)
    return save(out, *parts, source=str(source), overwrite=overwrite)


def export_hugging_face(
    folder: str | Path,
    checkpoint: Checkpoint,
    *,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
) -> Checkpoint:
    """Writes a model as Hugging Face lays it out; the folder appears whole or not at all.

    Args:
        folder: a folder that is new or empty.
        checkpoint: the model.
        max_shard_size: largest weights file in bytes (Hugging Face's 5 GB).
        overwrite: replace what is there.

    Returns:
        The checkpoint, with its new folder.

    Raises:
        InputError: the folder is not empty or cannot be written, or the disk is full.
    """
    parts = (checkpoint.config, checkpoint.params, checkpoint.tokenizer)
    write_hugging_face(folder, *parts, max_shard_size=max_shard_size, overwrite=overwrite)
    return dataclasses.replace(checkpoint, folder=Path(folder))


def _locate(path_or_name: str | Path) -> Path:
    path, name = Path(path_or_name), str(path_or_name)
    if path.exists():
        return path
    if name in KNOWN_MODELS:
        return _fetch(name)
    raise InputError(
        f"there is no file or folder {name}, and no model is known by that name; known: {', '.join(KNOWN_MODELS)}"
    )


def _fetch(name: str) -> Path:
    folder = cache_folder() / name
    with _lock(folder):
        if not is_stored(folder):
            convert(KNOWN_MODELS[name](), folder, name=name, overwrite=True)
    return folder


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Lets one process at a time fetch and convert; the others then find it done."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with folder.with_name(f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open(path: Path) -> TensorSource:
    if path.is_dir():
        if is_stored(path):
            return StoredSource(path)
        if is_hugging_face(path):
            return HuggingFaceSource(path)
        raise InputError(f"{path} is no model folder: it has neither our metadata.json nor Hugging Face's config.json")
    if path.suffix == ".gguf":
        return GGUFSource(path)
    if path.suffix == ".bin":
        return Llama2cSource(path)
    raise InputError(f"{path} is no model; give a model folder, a .gguf file or a llama2.c .bin file")


def _tokenizer(source: TensorSource, given: str | Path | None) -> Tokenizer | None:
    """Returns the tokenizer, and checks that it fits before any weight is read."""
    if given is None:
        tokenizer = source.tokenizer()
    elif Path(given).suffix == ".bin":
        tokenizer = tokenizer_from_llama2c(given)
    else:
        tokenizer = Tokenizer.load(given)
    if tokenizer is not None:
        check_fits(tokenizer, source.config.vocab_size)
    return tokenizer


def _fingerprint(source: TensorSource, params: Any) -> str:
    if isinstance(source, StoredSource):
        dtypes = {path: leaf.dtype.name for path, leaf in flatten_with_paths(params)[0]}
        if dtypes == {path: spec.dtype for path, spec in source.tensors.items()}:
            return source.fingerprint  # verified tensor by tensor while loading
    return fingerprint(params)
