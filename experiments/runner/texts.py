"""Running text that no task is about: what a model may forget."""

import gzip
from dataclasses import dataclass
from pathlib import Path

from jaxsparse.common.errors import InputError

__all__ = ["GeneralText", "general_text"]

_FILE = "text/tinyshakespeare.txt.gz"


@dataclass(frozen=True)
class GeneralText:
    """Text in two parts that do not overlap.

    Attributes:
        train: its first nine tenths.
        held_out: its last tenth.
    """

    train: str
    held_out: str


def general_text(data_root: Path) -> GeneralText:
    """Reads the text under a data root.

    Raises:
        InputError: it is not there.
    """
    file = data_root / _FILE
    if not file.is_file():
        raise InputError(f"no {_FILE} under data_root={data_root}; it holds running text, gzipped")
    text = gzip.decompress(file.read_bytes()).decode("utf-8")
    cut = text.find("\n\n", round(0.9 * len(text)))
    return GeneralText(text[:cut], text[cut:])
