"""Files and folders that appear whole or not at all."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxsparse.common.errors import InputError

__all__ = [
    "atomic_folder",
    "atomic_write_bytes",
    "atomic_write_text",
    "check_writable",
    "clear_write_errors",
    "make_shareable",
    "read_json",
]


@contextlib.contextmanager
def clear_write_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns an OSError raised while writing `path` into an InputError of one line.

    Args:
        path: the file or folder that the user asked for; the message names it.

    Raises:
        InputError: the disk is full, the folder is not writable, the path is not possible, ...
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_shareable(path: str | os.PathLike[str]) -> None:
    """Gives what a library made for its owner alone the permissions of an ordinary new file or folder.

    Args:
        path: the file or folder.
    """
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, (0o777 if os.path.isdir(path) else 0o666) & ~mask)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Writes a file under a temporary name in the same folder, syncs it, and renames it into place.

    Args:
        path: the file; its folder is made if need be. An existing file is replaced.
        data: the content.

    Raises:
        InputError: the file cannot be written; nothing is left behind, and an old file is untouched.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> atomic_write_bytes(folder / "a.bin", b"12")
        >>> (folder / "a.bin").read_bytes()
        b'12'
    """
    target = Path(path)
    with clear_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            make_shareable(temporary)
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
        _sync(target.parent)


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes text as UTF-8; otherwise as `atomic_write_bytes`.

    Args:
        path: the file.
        text: the content.

    Raises:
        InputError: the file cannot be written.
    """
    atomic_write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yields a temporary folder beside `path`, and renames it to `path` when the block ends well.

    Args:
        path: the folder to make; missing parents are made too.
        overwrite: replace a folder that exists and is not empty.

    Yields:
        The temporary folder, to be filled.

    Raises:
        InputError: `path` exists and is not an empty folder, or cannot be written. After an error in
            the block the temporary folder is gone and `path` is what it was.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "out"
        >>> with atomic_folder(target) as folder:
        ...     _ = (folder / "a.txt").write_text("12")
        >>> [file.name for file in target.iterdir()]
        ['a.txt']
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; give a folder that is new or empty")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise InputError(f"{target} is not empty; give a new folder, or allow overwriting")
    with clear_write_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            make_shareable(temporary)
            yield temporary
            for file in [*temporary.rglob("*"), temporary]:
                _sync(file)
            _replace_folder(temporary, target)
            _sync(target.parent)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _replace_folder(source: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        os.replace(source, target)
        return
    # A full folder cannot be renamed over: the old one steps aside and comes back if the new one fails.
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
    os.replace(target, aside)
    try:
        os.replace(source, target)
    except BaseException:
        os.replace(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def check_writable(folder: str | os.PathLike[str], required_bytes: int = 0) -> None:
    """Checks before long work that a folder can take its result. Leaves nothing behind.

    Args:
        folder: the output folder; it need not exist yet.
        required_bytes: how much is going to be written, in bytes, as far as is known.

    Raises:
        InputError: the folder (or the nearest parent that exists) cannot be written, its path holds a
            character that Orbax takes for a pattern, or the disk has less than `required_bytes` left.
    """
    target = Path(folder)
    if patterns := sorted(set("[]*?") & set(str(target.absolute()))):
        raise InputError(
            f"cannot write {target}: Orbax takes {' and '.join(patterns)} in {target.absolute()} for a pattern of "
            "file names; give a path without [ ] * ?"
        )
    existing = next(place for place in (target, *target.absolute().parents) if place.exists())
    if not existing.is_dir():
        raise InputError(f"cannot write {target}: {existing} is a file, not a folder")
    with clear_write_errors(target):
        with tempfile.TemporaryFile(dir=existing) as probe:
            probe.write(b"0")
            probe.flush()
        free = shutil.disk_usage(existing).free
    if free < required_bytes:
        raise InputError(
            f"cannot write {target}: {required_bytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free on that disk"
        )


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the object that a JSON file holds.

    Args:
        path: the file.

    Returns:
        The object.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    file = Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file.parent} has no {file.name}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds a {type(content).__name__}, not an object")
    return content
