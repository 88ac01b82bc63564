"""Deltas as files, as the subcommands of `jaxsparse delta` name, check and describe them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import check_writable
from jaxsparse.deltas import Delta

__all__ = ["check_out", "dtype_of", "named_paths", "said_of", "size_on_disk"]


def named_paths(given: Sequence[str]) -> dict[str, Path]:
    """Returns deltas' paths by name.

    Args:
        given: NAME=PATH or a path, which is then named by its last part that is not "delta".

    Raises:
        InputError: there is no such path, or two of one name.

    Example:
        >>> named_paths(["here=."])
        {'here': PosixPath('.')}
    """
    paths: dict[str, Path] = {}
    for text in given:
        name, is_named, path = text.partition("=")
        if not is_named or Path(text).exists():
            path = text
            parts = Path(text.removesuffix(".safetensors")).resolve().parts
            name = next((part for part in reversed(parts) if part not in ("delta", "/")), "delta")
        if not name or not text or not path:
            raise InputError(f"a delta must be NAME=PATH or a path, got {text!r}")
        if name in paths:
            raise InputError(f"two deltas have the name {name!r}; name them by NAME=PATH")
        if not Path(path).exists():
            raise InputError(f"there is no delta at {path}")
        paths[name] = Path(path)
    return paths


_MARKS = ("delta.json", "config.json", "adapter_config.json")
"""A folder that holds one of these is a delta, a model or an adapter."""


def check_out(out: Path, overwrite: bool, *inputs: str | Path) -> None:
    """Checks before long work that a folder, or a .safetensors file, can be made.

    Args:
        out: its path.
        overwrite: whether what is there may be replaced, if it is a delta, a model or an adapter.
        inputs: what is read, which must not be replaced.

    Raises:
        InputError: there is something already, or it cannot be written.
    """
    is_file = out.suffix == ".safetensors"
    if is_file and out.is_dir():
        raise InputError(f"cannot write {out}: it is a folder; give a file's name")
    is_there = any(out.iterdir()) if out.is_dir() else out.exists()
    if is_there and not overwrite:
        raise InputError(f"{out} is there already; give another --out, or --overwrite")
    for source in inputs:
        if is_there and Path(source).resolve().is_relative_to(out.resolve()):
            raise InputError(f"cannot write {out}: it holds {source}, which is read; give another --out")
    if is_there and out.is_dir() and not any((out / mark).is_file() for mark in _MARKS):
        raise InputError(f"cannot overwrite {out}: it is no delta, model or adapter; give another --out")
    check_writable(out.parent if is_file else out)


def dtype_of(delta: Delta) -> str | None:
    """Returns the dtype in which a delta's base is to be read: a delta belongs to weights of one dtype.

    Args:
        delta: the delta.

    Returns:
        That of its tensors if all have one that models are read in; else None, for what the files have.
    """
    found = {tensor.dtype for tensor in delta.tensors.values()}
    return found.pop() if len(found) == 1 and found <= {"float32", "bfloat16", "float16"} else None


def size_on_disk(path: Path) -> int:
    """Returns the bytes of a file, or of all files of a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def said_of(path: Path, delta: Delta) -> dict[str, Any]:
    """Returns the numbers of a saved delta, as JSON can hold them."""
    on_disk = size_on_disk(path)
    return {
        "entries": delta.entries,
        "tensors": len(delta.tensors),
        "kinds": sorted({tensor.kind for tensor in delta.tensors.values()}),
        "bytes_on_disk": on_disk,
        "bytes_per_entry": on_disk / delta.entries if delta.entries else None,
    }
