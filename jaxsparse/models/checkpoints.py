"""Models in and out of files: one `load` for every format, one `save`, one `convert`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.data.tokenizers import Tokenizer, check_fits
from jaxsparse.models import store
from jaxsparse.models.configs import Config
from jaxsparse.models.fetch import cache_folder, fetch_smollm2
from jaxsparse.models.gguf_reader import GGUFSource
from jaxsparse.models.sources import load_params

__all__ = ["KNOWN_MODELS", "Checkpoint", "load", "save"]

# Models that are fetched by name.
KNOWN_MODELS = {"smollm2-135m": fetch_smollm2}


@dataclass(frozen=True)
class Checkpoint:
    """A model with all that belongs to it.

    Attributes:
        config: the configuration.
        params: the parameter tree, layers stacked on axis 0.
        tokenizer: the tokenizer, or None where the files have none.
        name: what reports call it.
        fingerprint: of `params`, as `jaxsparse.common.fingerprints.fingerprint` gives it.
        folder: where it was loaded from or saved to.
    """

    config: Config
    params: dict[str, Any]
    tokenizer: Tokenizer | None
    name: str
    fingerprint: str
    folder: Path | None = None


def load(path_or_name: str | Path, *, dtype: Any = None) -> Checkpoint:
    """Loads a model, whatever its format.

    Args:
        path_or_name: a folder of ours, a .gguf file, or the name of a known model, which is
            fetched and converted once.
        dtype: float32, bfloat16 or float16; None keeps what the files have (quantised weights: float32).

    Returns:
        The checkpoint.

    Raises:
        InputError: it is none of these, or damaged, or its parts do not belong together.
    """
    path = Path(path_or_name)
    if not path.exists() and str(path_or_name) in KNOWN_MODELS:
        path = _fetch(str(path_or_name))
    if path.is_dir() and store.is_stored(path):
        config, params, tokenizer, name, print_ = store.read_folder(path, dtype)
        checkpoint = Checkpoint(config, params, tokenizer, name, print_, path)
    elif path.suffix == ".gguf" and path.is_file():
        source = GGUFSource(path)
        params = load_params(source.config, source, dtype)
        checkpoint = Checkpoint(source.config, params, source.tokenizer(), path.stem, fingerprint(params), path.parent)
    else:
        raise InputError(f"{path_or_name} is no model; known names: {', '.join(KNOWN_MODELS)}")
    if checkpoint.tokenizer is not None:
        check_fits(checkpoint.tokenizer, checkpoint.config.vocab_size)
    return checkpoint


def _fetch(name: str) -> Path:
    folder = cache_folder() / name
    if not store.is_stored(folder):
        checkpoint = load(KNOWN_MODELS[name]())
        save(folder, checkpoint.config, checkpoint.params, checkpoint.tokenizer, name, overwrite=True)
    return folder


def save(
    folder: str | Path,
    config: Config,
    params: Any,
    tokenizer: Tokenizer | None,
    name: str,
    *,
    overwrite: bool = False,
) -> Checkpoint:
    """Saves a model in our own format; the folder appears whole or not at all.

    Args:
        folder: a folder that is new or empty.
        config: the configuration.
        params: the parameter tree.
        tokenizer: the tokenizer, or None.
        name: what reports call the model.
        overwrite: replace what is there.

    Returns:
        What `load` would return.

    Raises:
        InputError: the folder is not empty or cannot be written, or the disk is full.
    """
    print_ = store.write_folder(folder, config, params, tokenizer, name, overwrite=overwrite)
    return Checkpoint(config, params, tokenizer, name, print_, Path(folder))
