"""Saved deltas, and how to alter what they say."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

FORMS = ["tuned", "tuned.safetensors"]
V1 = Path(__file__).parent / "format_1"


def altered_manifest(manifest: str, alter: Callable[[dict[str, Any]], object]) -> str:
    """Returns a manifest whose content went through `alter`, with a checksum that matches again."""
    envelope = json.loads(manifest)
    alter(envelope["delta"])
    text = json.dumps(envelope["delta"], sort_keys=True, separators=(",", ":"))
    envelope["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    return json.dumps(envelope)


def packed(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Returns the metadata and the arrays of a safetensors file."""
    with safe_open(path, framework="np") as opened:
        return dict(opened.metadata()), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def rewrite_manifest(path: Path, change: Callable[[str], str]) -> None:
    """Puts a changed manifest into a saved delta of either form."""
    if path.is_dir():
        file = path / "delta.json"
        file.write_text(change(file.read_text()))
        return
    metadata, arrays = packed(path)
    metadata["delta"] = change(metadata["delta"])
    save_file(arrays, path, metadata)
