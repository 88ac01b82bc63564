"""Spoiled delta files: one kind of error, or exactly the delta that was saved; never a wrong model."""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxsparse.common.errors import InputError
from jaxsparse.deltas import apply, load
from tests.deltas.models import assert_same_bits, assert_same_delta
from tests.deltas.saved import FORMS, altered_manifest, rewrite_manifest


def loads_the_same_or_not_at_all(saved, form, spoil):
    source, base, tuned, delta = saved
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / form
        (shutil.copytree if (source / form).is_dir() else shutil.copyfile)(source / form, path)
        spoil(path)
        try:
            loaded = load(path)
        except InputError:
            return
    assert_same_delta(loaded, delta)
    assert_same_bits(apply(base, loaded), tuned)


@pytest.fixture(params=["entries", "all kinds"], scope="module")
def either(request, saved, saved_kinds):
    """A saved delta of coordinates alone, and one of every kind."""
    return saved if request.param == "entries" else saved_kinds


def spoil_bytes(data):
    def spoil(path):
        files = sorted(file for file in [path, *path.rglob("*")] if file.is_file())
        # Orbax names its data files at random; their sizes put them in an order that a failing example can repeat.
        file = data.draw(st.sampled_from(sorted(files, key=lambda file: file.stat().st_size)))
        content = bytearray(file.read_bytes())
        kind = data.draw(st.sampled_from(["flip a bit", "overwrite", "truncate", "append", "remove", "insert"]))
        where = data.draw(st.integers(0, max(len(content) - 1, 0)))
        if kind == "flip a bit" and content:
            content[where] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "overwrite":
            junk = data.draw(st.binary(min_size=1, max_size=20))
            content[where : where + len(junk)] = junk
        elif kind == "truncate":
            del content[where:]
        elif kind == "append":
            content += data.draw(st.binary(min_size=1, max_size=20))
        elif kind == "insert":
            content[where:where] = data.draw(st.binary(min_size=1, max_size=20))
        file.write_bytes(content)
        if kind == "remove":
            file.unlink()

    return spoil


def check_bytes(saved, data):
    loads_the_same_or_not_at_all(saved, data.draw(st.sampled_from(FORMS)), spoil_bytes(data))


FUZZ = {"deadline": None, "suppress_health_check": list(HealthCheck)}


@settings(max_examples=100, **FUZZ)
@given(st.data())
def test_spoiled_files(either, data):
    check_bytes(either, data)


@pytest.mark.slow
@settings(max_examples=500, **FUZZ)
@given(st.data())
def test_many_spoiled_files(either, data):
    check_bytes(either, data)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([]) | st.just({})


def places(value):
    """Returns all (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in [(value, key), *places(inner)]]


@settings(max_examples=150, **FUZZ)
@given(st.data())
def test_altered_metadata_with_a_checksum_that_matches(either, data):
    """What is only told of a delta may be forged; what it does to a model may not."""
    source, base, tuned, _ = either
    form = data.draw(st.sampled_from(FORMS))

    def alter(content):
        container, key = data.draw(st.sampled_from(places(content)))
        what = data.draw(st.sampled_from(["set", "add", "remove", "rename"]))
        if what == "set":
            container[key] = data.draw(VALUES)
        elif what == "add" and isinstance(container[key], int):
            container[key] += data.draw(st.integers(-3, 3))
        elif what == "remove":
            del container[key]
        elif what == "rename" and isinstance(container, dict):
            container[data.draw(st.text(max_size=5) | st.sampled_from(["embed", "..", "gaps_2"]))] = container.pop(key)

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / form
        (shutil.copytree if (source / form).is_dir() else shutil.copyfile)(source / form, path)
        rewrite_manifest(path, lambda text: altered_manifest(text, alter))
        try:
            loaded = load(path)
            result = apply(base, loaded)
        except InputError:
            return
    assert_same_bits(result, tuned)


def test_every_byte_of_the_manifest_is_covered(saved, tmp_path):
    manifest = (saved[0] / "tuned" / "delta.json").read_bytes()
    (tmp_path / "delta.json").write_bytes(manifest)
    shutil.copytree(saved[0] / "tuned" / "arrays", tmp_path / "arrays")
    rng = np.random.default_rng()
    for where in rng.choice(len(manifest), 300, replace=False):
        spoiled = bytearray(manifest)
        spoiled[where] ^= 1 << rng.integers(8)
        (tmp_path / "delta.json").write_bytes(spoiled)
        with pytest.raises(InputError, match="cannot load the delta"):
            load(tmp_path)
    assert json.loads(manifest)["version"] == 2
