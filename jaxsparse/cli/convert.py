"""`jaxsparse convert`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from jaxsparse.cli.arguments import parse
from jaxsparse.models.checkpoints import convert
from jaxsparse.subspaces.targets import tree_size

__all__ = ["ConvertConfig", "main"]


@dataclass(frozen=True)
class ConvertConfig:
    """Converts a model to a Flax checkpoint, or back to Hugging Face's format.

    Reads Hugging Face folders (safetensors, sharded or not), .gguf files, llama2.c .bin files, and our own folders;
    tensor by tensor, so a model needs little more memory than its own size. The folder appears whole or not at all.

    Example: jaxsparse convert --source SmolLM2-135M-Instruct.Q4_1.gguf --out models/smollm2 --dtype bfloat16
    """

    source: str
    """A folder, a file, or a known name such as smollm2-135m."""
    out: Path
    """The folder to make."""
    to: Literal["jaxsparse", "hugging_face"] = "jaxsparse"
    """The format to write."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the weights; None keeps what the files have (float32 for quantised ones)."""
    tokenizer: Path | None = None
    """A tokenizer file or folder, where it does not lie beside the model."""
    name: str | None = None
    """What reports call the model; None: its file's or folder's name."""
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Replace a folder that exists."""


def main(arguments: Sequence[str]) -> int:
    """Parses the arguments, converts, and says what came out."""
    config = parse(lambda given: ConvertConfig, "jaxsparse convert", arguments)
    checkpoint = convert(
        config.source,
        config.out,
        to=config.to,
        dtype=config.dtype,
        tokenizer=config.tokenizer,
        name=config.name,
        overwrite=config.overwrite,
    )
    Console(soft_wrap=True).print(
        f"{config.out}: {checkpoint.name}, {tree_size(checkpoint.params):,} parameters, "
        f"fingerprint {checkpoint.fingerprint[:16]}",
        highlight=False,
    )
    return 0
