"""save and load: the same delta comes back, small on disk, whole or not at all."""

import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse.deltas.files as delta_files
from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.deltas import CoordinateDelta, Delta, Metadata, apply, diff, load, save
from jaxsparse.deltas.coding import decode, encode
from jaxsparse.deltas.headers import header_of
from tests.deltas.models import (
    DTYPES,
    assert_same_bits,
    assert_same_delta,
    changed,
    random_bits,
    small_pair,
    tuned_slightly,
)
from tests.deltas.saved import FORMS, V1, altered_manifest, packed, rewrite_manifest


def stored_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in [path, *path.rglob("*")] if file.is_file())


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_delta_comes_back_the_same(rng, tmp_path, form):
    base, tuned = small_pair(rng)
    delta = diff(
        base, tuned, method="gasdu", options={"density": 0.1, "targets": ["q"]}, budget=0.1, base_name="tiny", step=3
    )
    save(tmp_path / form, delta)
    assert_same_delta(load(tmp_path / form), delta)
    assert_same_delta(load(str(tmp_path / form), base), delta)
    assert_same_bits(apply(base, load(tmp_path / form)), tuned)
    assert [file.name for file in tmp_path.iterdir()] == [form]


@pytest.mark.parametrize("form", FORMS)
def test_a_delta_without_entries(tmp_path, form):
    base = {"w": jnp.ones((3, 4)), "empty": jnp.ones((0, 4))}
    save(tmp_path / form, diff(base, base, step=5))
    delta = load(tmp_path / form, base)
    assert (delta.entries, delta.nbytes, delta.metadata.step) == (0, 0, 5)
    assert_same_bits(apply(base, delta), base)


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.sampled_from([1, 7, 300, 70_000]), st.floats(0, 1)), max_size=5
    ),
)
def test_coding_is_exact_for_all_widths_and_densities(seed, tensors):
    rng = np.random.default_rng(seed)
    base = {f"w{i}": random_bits(rng, (size,), dtype) for i, (dtype, size, _) in enumerate(tensors)}
    tuned = {
        f"w{i}": changed(rng, base[f"w{i}"], int(np.ceil(density**4 * size)))
        for i, (_, size, density) in enumerate(tensors)
    }
    assert_codes_exactly(diff(base, tuned))


def assert_codes_exactly(delta: Delta) -> None:
    planes = encode(delta)
    assert all(plane.dtype == np.uint8 and plane.ndim == 1 for plane in planes.values())
    assert_same_delta(
        Delta(decode({path: header_of(tensor) for path, tensor in delta.tensors.items()}, planes), delta.metadata),
        delta,
    )


def test_gaps_beyond_32_bits():
    indices = np.array([0, 5, 2**31, 2**34 + 7, 2**38 - 1])
    tensor = CoordinateDelta((2**8, 2**30), "bfloat16", "0" * 64, "1" * 64, indices, np.arange(1, 6, dtype=np.uint16))
    delta = Delta({"w": tensor}, Metadata())
    assert "gaps_4" in encode(delta)
    assert_codes_exactly(delta)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("tuning", [changed, tuned_slightly])
@pytest.mark.parametrize("matrices", [1, 4])
def test_bytes_per_entry_at_one_in_a_thousand_bfloat16(rng, tmp_path, form, tuning, matrices):
    base = {
        f"layers/{i}/q_proj/kernel": (rng.standard_normal((4096, 4096), np.float32) * 0.02).astype(DTYPES["bfloat16"])
        for i in range(matrices)
    }
    tuned = {path: tuning(rng, leaf, leaf.size // 1000) for path, leaf in base.items()}
    delta = diff(base, tuned, base_fingerprint="0" * 64)
    save(tmp_path / form, delta)
    bytes_per_entry = stored_bytes(tmp_path / form) / delta.entries
    print(f"{form} {tuning.__name__} {matrices}: {bytes_per_entry:.3f} bytes per entry")
    assert bytes_per_entry <= (4.0 if tuning is changed else 2.75)
    assert_same_delta(load(tmp_path / form), delta)


@pytest.mark.parametrize("form", FORMS)
def test_small_deltas_and_dense_ones_have_little_overhead(rng, tmp_path, form):
    base = {f"layers/{i}/kernel": random_bits(rng, (500, 500), "bfloat16") for i in range(20)}
    save(tmp_path / form, diff(base, {path: changed(rng, leaf, 250) for path, leaf in base.items()}))
    assert stored_bytes(tmp_path / form) < 5000 * 3.5 + 14_000
    base = {"w": np.ones((1000, 1000), DTYPES["bfloat16"])}
    save(tmp_path / f"dense_{form}", diff(base, {"w": -base["w"]}))
    assert stored_bytes(tmp_path / f"dense_{form}") < 30_000


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_overwritten_unless_asked(rng, tmp_path, form):
    first, second = diff(*small_pair(rng)), diff(*small_pair(rng))
    save(tmp_path / form, first)
    with pytest.raises(InputError, match="overwrit"):
        save(tmp_path / form, second)
    assert_same_delta(load(tmp_path / form), first)
    save(tmp_path / form, second, overwrite=True)
    assert_same_delta(load(tmp_path / form), second)


def test_a_failed_save_leaves_nothing(rng, tmp_path, monkeypatch):
    delta = diff(*small_pair(rng))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "save", full)
    monkeypatch.setattr(os, "replace", full)
    for form in FORMS:
        with pytest.raises(InputError, match="No space left"):
            save(tmp_path / form, delta)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_base_is_refused_at_load(rng, tmp_path, form):
    base, tuned = small_pair(rng)
    save(tmp_path / form, diff(base, tuned, base_name="tiny"))
    elsewhere = {**base, "embed": base["embed"].at[0, 0].set(7)}
    head = base["head"]["kernel"]
    for wrong, message in (
        (elsewhere, "belongs to another base: tiny has fingerprint"),
        ({**base, "head": {"kernel": jnp.full_like(head, 3)}}, "another base: tensor head/kernel differs"),
        ({**base, "head": {"bias": head}}, "tensor head/kernel, which base does not have"),
        ({**base, "head": {"kernel": head.T}}, r"but in base it is float16 of shape \(50, 24\)"),
        (tuned, "applied already"),
    ):
        with pytest.raises(InputError, match=message):
            load(tmp_path / form, wrong)
    with pytest.raises(InputError, match="belongs to another base"):
        load(tmp_path / form, base_fingerprint="0" * 64)
    load(tmp_path / form, elsewhere, base_fingerprint=fingerprint(base))


def test_what_is_no_delta(rng, tmp_path):
    with pytest.raises(InputError, match="there is no delta at"):
        load(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"delta\.json is missing"):
        load(tmp_path)
    other = tmp_path / "model.safetensors"
    delta_files.safetensors.numpy.save_file({"w": np.ones(3)}, other)
    with pytest.raises(InputError, match="not a jaxsparse delta"):
        load(other)
    other.write_bytes(b"\x80\x04junk")
    with pytest.raises(InputError, match="not a safetensors file"):
        load(other)


# ---- hostile files: checksums that match, contents that cannot be --------------------------------------------


def first(content):
    return content["tensors"]["head/kernel"]


def rename(content, path):
    content["tensors"][path] = content["tensors"].pop("head/kernel")


HOSTILE = [
    (lambda c: first(c).update(shape=[10**9, 10**9]), "not possible"),
    (lambda c: first(c).update(shape=[2**20, 2**20], entries=2**39), r"cannot hold the [\d,]+ that it claims"),
    (lambda c: first(c).update(shape=[-24, -50]), "not possible"),
    (lambda c: first(c).update(shape=[24, 50.0]), "'shape' is '50.0', expected int"),
    (lambda c: first(c).update(shape=[1] * 40), "not possible"),
    (lambda c: first(c).update(shape=[2, 3]), "not possible"),
    (lambda c: first(c).update(shape=[12, 12]), "an index is out of range"),
    (lambda c: first(c).update(entries=0), "not possible"),
    (lambda c: first(c).update(entries=True), "'entries' is 'True', expected int"),
    (lambda c: first(c).update(entries=119), "damaged"),
    (lambda c: first(c).update(dtype="object"), "dtype 'object' cannot be part of a delta"),
    (lambda c: first(c).update(dtype="float64"), "it lists the arrays"),
    (lambda c: first(c).update(kind="low_rank"), "stored as 'low_rank', which this jaxsparse cannot read"),
    (lambda c: first(c).update(base_sha256="x"), "expected a SHA-256"),
    (lambda c: c["tensors"].update({"head/kernel": None}), "it is not described"),
    (lambda c: rename(c, "../../etc/passwd"), "is not the path of a parameter"),
    (lambda c: rename(c, "/etc/passwd"), "is not the path of a parameter"),
    (lambda c: c["arrays"].pop("gaps_0"), "gaps of 0 bytes are not possible"),
    (lambda c: c["arrays"].update(gaps_9="0" * 64), "it lists the arrays"),
    (lambda c: c["arrays"].update({f"gaps_{i}": "0" * 64 for i in range(7)}), "gaps of 7 bytes are not possible"),
    (lambda c: c["arrays"].update({"../x": "0" * 64}), "it lists the arrays"),
    (lambda c: c["arrays"].update(gaps_0="0" * 64), "array gaps_0 is damaged or altered"),
    (lambda c: c.update(arrays=[]), "'arrays' is"),
    (lambda c: c.update(tensors={}), "it lists the arrays"),
    (lambda c: c.update(step="7"), "'step' is '7', expected int or NoneType"),
    (lambda c: c.update(step=-1), "step=-1"),
    (lambda c: c.update(budget=7), "budget=7"),
    (lambda c: c.update(options=None), "'options' is 'None', expected dict"),
    (lambda c: c.update(versions={"jax": 3}), "'jax' is '3', expected str"),
]


@pytest.fixture(params=FORMS)
def copied(saved, tmp_path, request):
    """A copy of the delta in one form, to be spoiled."""
    source = saved[0] / request.param
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tmp_path / request.param)
    return tmp_path / request.param


@pytest.mark.parametrize(("alter", "message"), HOSTILE)
def test_hostile_metadata_is_refused(copied, alter, message):
    rewrite_manifest(copied, lambda text: altered_manifest(text, alter))
    with pytest.raises(InputError, match=message) as caught:
        load(copied)
    assert str(caught.value).startswith(f"cannot load the delta {copied}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"version":2', '"version":3'), "its format version is 3; this jaxsparse reads"),
        (lambda text: text.replace('"version":2', '"version":0'), "its format version is 0"),
        (lambda text: text.replace('"tiny"', '"tony"'), "metadata is damaged or altered: the checksum"),
        (lambda text: text[:-20], "metadata is damaged"),
        (lambda _: "[" * 100_000, "metadata is damaged"),
        (lambda _: "[1]", "not a jaxsparse delta"),
        (lambda text: text.replace("0.1", "NaN"), "metadata is damaged"),
        (lambda text: text.replace("0.1", "1" * 5000), "metadata is damaged"),
    ],
)
def test_damaged_metadata_and_future_versions_are_refused(copied, change, message):
    rewrite_manifest(copied, change)
    with pytest.raises(InputError, match=message):
        load(copied)


def test_hostile_gaps_cannot_lead_outside_a_tensor(rng):
    delta = diff({"w": np.ones(100, np.float32)}, {"w": -np.ones(100, np.float32)})
    planes = encode(delta) | {f"gaps_{i}": np.full(100, 255, np.uint8) for i in range(6)}
    for width in (1, 4, 6):
        kept = {name: plane for name, plane in planes.items() if name[:5] != "gaps_" or int(name[5:]) < width}
        with pytest.raises(InputError, match="tensor w: an index is out of range"):
            decode({path: header_of(tensor) for path, tensor in delta.tensors.items()}, kept)
    zeros = {name: np.zeros_like(plane) for name, plane in planes.items() if name != "gaps_5"}
    with pytest.raises(InputError, match="an entry is listed that does not change"):
        decode({path: header_of(tensor) for path, tensor in delta.tensors.items()}, zeros)


def test_a_decompression_bomb_is_refused(saved, tmp_path):
    bomb = tmp_path / "bomb.safetensors"
    shutil.copyfile(saved[0] / "tuned.safetensors", bomb)
    metadata, arrays = packed(bomb)
    arrays["gaps_0"] = np.frombuffer(delta_files._deflate(np.zeros(10**8, np.uint8)), np.uint8)
    delta_files.safetensors.numpy.save_file(arrays, bomb, metadata)
    with pytest.raises(InputError, match="array gaps_0 is truncated or damaged: expected 420 bytes"):
        load(bomb)


def test_orbax_reads_the_arrays(saved):
    folder, *_, delta = saved
    with ocp.StandardCheckpointer() as checkpointer:
        arrays = checkpointer.restore(folder.absolute() / "tuned" / "arrays")
    decoded = decode(
        {path: header_of(tensor) for path, tensor in delta.tensors.items()},
        {name: np.asarray(array) for name, array in arrays.items()},
    )
    assert_same_delta(Delta(decoded, delta.metadata), delta)


def test_missing_parts_are_refused(saved, tmp_path):
    for name in ("arrays", "arrays/manifest.ocdbt", "arrays/d"):
        folder = tmp_path / name.replace("/", "_")
        shutil.copytree(saved[0] / "tuned", folder)
        part = folder / name
        (shutil.rmtree if part.is_dir() else os.unlink)(part)
        with pytest.raises(InputError, match="cannot load the delta"):
            load(folder)


def test_files_of_format_version_1_stay_readable():
    base = {
        "layers": {"kernel": (np.arange(240) / 16 - 7).astype(DTYPES["bfloat16"]).reshape(3, 8, 10)},
        "scale": np.linspace(-1, 1, 50, dtype=np.float32),
    }
    tuned = {"layers": {"kernel": base["layers"]["kernel"].copy()}, "scale": base["scale"].copy()}
    tuned["layers"]["kernel"].reshape(-1)[::7] *= 2
    tuned["scale"][[3, 40, 41]] = [np.inf, -0.0, 5.0]
    for form in FORMS:
        delta = load(V1 / form, base)
        assert_same_bits(apply(base, delta), tuned)
        assert (delta.metadata.method, delta.metadata.step, delta.metadata.base_name) == ("gasdu", 12, "made by hand")
