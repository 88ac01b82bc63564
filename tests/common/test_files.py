"""Files and folders appear whole or not at all, and errors are one clear line."""

import os
import stat

import pytest

from jaxsparse.common import files
from jaxsparse.common.errors import InputError


def test_write_replaces_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "new" / "a.txt"
    files.atomic_write_text(path, "first")
    files.atomic_write_text(path, "zweites ☃")
    assert path.read_text(encoding="utf-8") == "zweites ☃"
    assert os.listdir(path.parent) == ["a.txt"]


def test_written_files_are_as_readable_as_ordinary_ones(tmp_path):
    (tmp_path / "ordinary").write_bytes(b"")
    files.atomic_write_bytes(tmp_path / "atomic", b"")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ordinary", "atomic")}
    assert len(modes) == 1


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    files.atomic_write_bytes(path, b"old")
    monkeypatch.setattr(os, "fsync", _no_space)
    with pytest.raises(InputError, match=r"cannot write .*a\.bin: No space left on device"):
        files.atomic_write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def _no_space(*_):
    raise OSError(28, "No space left on device")


def test_folder_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "out"
    with files.atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "a").read_text() == "1"
    assert os.listdir(target.parent) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_folder_is_removed_on_any_error(tmp_path, error):
    def fill():
        with files.atomic_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            raise error

    with pytest.raises(error):
        fill()
    assert os.listdir(tmp_path) == []


def test_folder_refuses_what_is_there(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("old")
    (tmp_path / "file").write_text("old")
    for name, message in (("full", "is not empty"), ("file", "is a file")):
        with pytest.raises(InputError, match=message), files.atomic_folder(tmp_path / name):
            pytest.fail("the block must not run")
    assert (tmp_path / "full" / "a").read_text() == "old"


def test_folder_overwrites_when_told(tmp_path):
    for text in ("old", "new"):
        with files.atomic_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / text).write_text(text)
    assert os.listdir(tmp_path / "out") == ["new"]
    assert os.listdir(tmp_path) == ["out"]


def test_overwriting_fails_without_loss(tmp_path, monkeypatch):
    with files.atomic_folder(tmp_path / "out") as folder:
        (folder / "old").write_text("1")
    replace, calls = os.replace, []

    def second_fails(source, target):
        calls.append(source)
        if len(calls) == 2:
            _no_space()
        replace(source, target)

    monkeypatch.setattr(os, "replace", second_fails)
    with (
        pytest.raises(InputError, match="No space left"),
        files.atomic_folder(tmp_path / "out", overwrite=True),
    ):
        pass
    assert os.listdir(tmp_path / "out") == ["old"]
    assert os.listdir(tmp_path) == ["out"]


def test_check_writable_leaves_nothing(tmp_path):
    files.check_writable(tmp_path / "a" / "b", required_bytes=1)
    assert os.listdir(tmp_path) == []


def test_check_writable_names_the_reason(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file is a file, not a folder"):
        files.check_writable(tmp_path / "file" / "out")
    with pytest.raises(InputError, match=r"GB needed, .* GB free"):
        files.check_writable(tmp_path, required_bytes=10**18)

    def denied(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", denied)
    with pytest.raises(InputError, match=r"cannot write .*out: Permission denied"):
        files.check_writable(tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"), [(None, "has no a.json"), ("{", "not readable as JSON"), ("[1]", "holds a list")]
)
def test_read_json_errors(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match=message):
        files.read_json(tmp_path / "a.json")


def test_read_json(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1]}')
    assert files.read_json(tmp_path / "a.json") == {"a": [1]}
