"""diff, apply and revert: exact both ways on any tree, and nothing written where anything is wrong."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.deltas import CoordinateDelta, Delta, Metadata, apply, bits, describe, diff, revert
from tests.deltas.models import DTYPES, assert_same_bits, changed, random_bits, small_pair

JAX_DTYPES = sorted(DTYPES.keys() - {"float64"})


def assert_exact_both_ways(base, tuned, **options):
    delta = diff(base, tuned)
    there = apply(base, delta, **options)
    assert_same_bits(there, tuned)
    assert_same_bits(revert(there, delta, **options), base if not options else revert(tuned, delta))
    return delta


@settings(deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(JAX_DTYPES),
    st.sampled_from([(), (1,), (7,), (16, 9), (3, 8, 5), (2, 3, 4, 5)]),
    st.sampled_from([0.0, 0.01, 0.3, 1.0]),
)
def test_exact_both_ways_for_all_dtypes_shapes_and_densities(seed, dtype, shape, density):
    rng = np.random.default_rng(seed)
    base = random_bits(rng, shape, dtype)
    entries = int(np.ceil(density * base.size))
    tuned = changed(rng, base, entries)
    delta = assert_exact_both_ways({"w": jnp.asarray(base)}, {"w": jnp.asarray(tuned)})
    assert delta.entries == entries
    assert_exact_both_ways({"w": base}, {"w": tuned})


def test_float64_is_exact_too(rng):
    base = random_bits(rng, (30, 20), "float64")
    tuned = changed(rng, base, 77)
    assert assert_exact_both_ways({"w": base}, {"w": tuned}).tensors["w"].xor.dtype == np.uint64
    with jax.enable_x64(True):
        assert_exact_both_ways({"w": jnp.asarray(base)}, {"w": jnp.asarray(tuned)})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_change_of_bits_counts(dtype):
    width = DTYPES[dtype].itemsize * 8
    infinity = int(np.array(np.inf, DTYPES[dtype]).view(f"u{width // 8}"))
    special = [
        0,
        1 << (width - 1),
        1,
        infinity,
        infinity | 1,
        infinity | (1 << (width - 1)),
        infinity | 5,
        (1 << width) - 1,
    ]
    base = np.array(special, f"u{width // 8}").view(DTYPES[dtype])
    tuned = np.roll(base, 1)
    delta = assert_exact_both_ways({"w": jnp.asarray(base)}, {"w": jnp.asarray(tuned)})
    assert delta.entries == len(special)


@pytest.mark.parametrize("shape", [(40, 30, 50), (40, 1, 3, 500), (41, 1499)])
def test_tensors_too_large_for_one_int32_index(rng, shape, monkeypatch):
    monkeypatch.setattr(bits, "_MAX_INDEX", 2000)
    base = random_bits(rng, shape, "bfloat16")
    tuned = changed(rng, base, 300)
    bits._compiled.cache_clear()
    assert_exact_both_ways({"w": jnp.asarray(base)}, {"w": jnp.asarray(tuned)})
    bits._compiled.cache_clear()


def as_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(bits, "in_host_memory", lambda array: isinstance(array, np.ndarray))


def test_an_axis_too_long_for_int32_is_refused(monkeypatch):
    as_on_an_accelerator(monkeypatch)
    monkeypatch.setattr(bits, "_MAX_INDEX", 2000)
    for shape in ((2001,), (1995,), (3000, 2)):
        base = jnp.ones(shape)
        with pytest.raises(InputError, match="too long for int32"):
            diff({"w": base}, {"w": -base})


@pytest.mark.slow
def test_a_tensor_of_more_than_two_to_the_31_entries(rng):
    shape = (3, 2**15, 2**15)
    base = jax.lax.broadcasted_iota(jnp.int8, shape, 2)
    indices = np.unique(np.append(rng.integers(0, 3 * 2**30, 5000), [0, 2**31 - 1, 2**31, 3 * 2**30 - 1]))
    before = bits.gather_bits(base, indices)
    np.testing.assert_array_equal(before, (indices % 2**15).astype(np.uint8))
    tuned = bits.scatter_bits(base, indices, before ^ np.uint8(3), donate=True)
    np.testing.assert_array_equal(bits.gather_bits(tuned, indices), before ^ np.uint8(3))
    between = np.setdiff1d(np.append(indices - 1, indices + 1), indices)[1:-1]
    np.testing.assert_array_equal(bits.gather_bits(tuned, between), (between % 2**15).astype(np.uint8))


class Block(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(5, param_dtype=jnp.bfloat16)(linen.LayerNorm()(x))


def nudged(tree):
    return jax.tree.map(lambda x: x.at[..., 0].add(0.5), tree)


def test_linen_nnx_and_plain_trees(rng):
    key = jax.random.key(int(rng.integers(2**31)))
    variables = Block().init(key, jnp.ones((2, 4)))
    assert_exact_both_ways(variables, nudged(variables))

    model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(key)), nnx.Linear(6, 2, rngs=nnx.Rngs(key)))
    graph, state = nnx.split(model, nnx.Param)
    delta = assert_exact_both_ways(state, nudged(state))
    assert "layers/0/kernel" in delta.tensors
    tuned = nnx.merge(graph, apply(state, delta))
    assert_same_bits(nnx.state(tuned, nnx.Param), nudged(state))
    assert_same_bits(apply(nnx.to_pure_dict(state), delta), nnx.to_pure_dict(nudged(state)))

    assert_exact_both_ways([jnp.ones(3), (jnp.ones(2),)], [jnp.ones(3), (jnp.zeros(2),)])
    assert_exact_both_ways(jnp.ones(3), jnp.zeros(3))


def test_the_input_stays_usable_unless_donated(rng):
    base, tuned = small_pair(rng)
    delta = diff(base, tuned)
    before = jax.tree.map(np.array, base)
    apply(base, delta)
    assert_same_bits(base, before)
    assert_same_bits(apply(base, delta, donate=True), tuned)
    assert base["layers"]["norm"]["scale"].is_deleted()
    assert not base["embed"].is_deleted()
    again = revert(jax.tree.map(jnp.copy, tuned), delta, donate=True)
    assert_same_bits(again, before)


def test_numpy_trees_are_changed_in_place_only_when_donated(rng):
    base = random_bits(rng, (20, 30), "bfloat16")
    tuned = changed(rng, base, 50)
    delta, before = diff({"w": base}, {"w": tuned}), base.copy()
    assert_same_bits(apply({"w": base}, delta), {"w": tuned})
    assert_same_bits({"w": base}, {"w": before})
    assert apply({"w": base}, delta, donate=True)["w"] is base
    assert_same_bits({"w": base}, {"w": tuned})
    base.setflags(write=False)
    assert_same_bits(revert({"w": base}, delta, donate=True), {"w": before})
    transposed = np.asfortranarray(before)
    assert_same_bits(apply({"w": transposed}, delta, donate=True), {"w": tuned})


def test_donating_a_tied_weight_spares_its_other_use(rng):
    weight = jnp.asarray(random_bits(rng, (30, 20), "float32"))
    new = jnp.asarray(changed(rng, np.asarray(weight), 40))
    assert_exact_both_ways({"embed": weight, "head": weight}, {"embed": new, "head": new}, donate=True)


def test_donated_float32_is_written_in_place():
    scatter = bits._compiled("scatter", (2048, 2048), None, True)
    arguments = jnp.ones((2048, 2048)), (np.arange(64, dtype=np.int32),), np.arange(64, dtype=np.uint32), np.int32(64)
    memory = scatter.lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 10_000
    assert memory.alias_size_in_bytes == memory.output_size_in_bytes == 4 * 2048**2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float8_e5m2"])
def test_donated_host_memory_is_written_in_place(rng, dtype):
    weight = jnp.asarray(random_bits(rng, (300, 200), dtype))
    new, place = changed(rng, np.asarray(weight), 50), weight.unsafe_buffer_pointer()
    tuned = apply({"w": weight}, diff({"w": np.asarray(weight).copy()}, {"w": new}), donate=True)["w"]
    assert tuned.unsafe_buffer_pointer() == place
    assert weight.is_deleted()
    assert_same_bits({"w": tuned}, {"w": new})


def test_few_sizes_are_compiled():
    assert len({bits._bucket(count) for count in range(1, 100_000)}) < 80
    assert all(count <= bits._bucket(count) <= max(1.25 * count, count + 16) for count in range(1, 100_000, 7))


def test_host_memory_stays_under_the_largest_tensor_and_the_delta(rng):
    base = {name: random_bits(rng, (1000, 1000), "float32") for name in "abcdefgh"}
    tuned = {name: changed(rng, leaf, 1000) for name, leaf in base.items()}
    tracemalloc.start()
    delta = diff(base, tuned)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000 + 2 * delta.nbytes


def test_accelerators_compare_on_the_device(rng, monkeypatch):
    as_on_an_accelerator(monkeypatch)
    monkeypatch.setattr(bits, "_COMPARED_AT_ONCE", 100)
    assert_exact_both_ways(*small_pair(rng))


def test_what_a_delta_says_of_itself(rng):
    base, tuned = small_pair(rng)
    delta = diff(
        base, tuned, method="gasdu", options={"density": 1e-4, "targets": ("q",)}, budget=1e-4, base_name="tiny", step=7
    )
    assert repr(delta).startswith(f"Delta({delta.entries:,} entries in 3 tensors")
    assert "'gasdu'" in repr(delta)
    assert delta.metadata.base_fingerprint == fingerprint(base)
    assert delta.metadata.options["targets"] == ["q"]
    assert {"jaxsparse", "jax", "python"} <= delta.metadata.versions.keys()
    assert delta.entries == 288 + 12 + 120
    assert delta.nbytes == 6 * 288 + 8 * 12 + 6 * 120
    told = json.loads(json.dumps(describe(delta)))
    assert told["entries"] == delta.entries
    assert told["method"] == "gasdu"
    assert told["layers"] == sorted(
        set((delta.tensors["layers/q_proj/kernel"].indices // 960).tolist())
        | set((delta.tensors["layers/norm/scale"].indices // 40).tolist())
    )
    assert told["tensors"]["head/kernel"] == {
        "shape": [24, 50], "dtype": "float16", "kind": "coordinates", "entries": 120, "stored": 120, "density": 0.1,
        "bytes": 720, "layers": [],
    }  # fmt: skip


def test_layers_are_read_from_numbers_in_the_path(rng):
    base = {"blocks": [{"kernel": jnp.ones((2, 3))} for _ in range(4)]}
    tuned = {"blocks": [{"kernel": jnp.full((2, 3), 1.0 + i % 2)} for i in range(4)]}
    assert describe(diff(base, tuned))["layers"] == [1, 3]


def test_a_delta_is_immutable(rng):
    delta = diff(*small_pair(rng))
    tensor = delta.tensors["head/kernel"]
    with pytest.raises(ValueError, match="read-only"):
        tensor.indices[0] = 1
    with pytest.raises(ValueError, match="read-only"):
        tensor.xor[0] = 1
    with pytest.raises(TypeError):
        delta.tensors["x"] = tensor
    with pytest.raises(TypeError):
        delta.metadata.options["x"] = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        delta.metadata = Metadata()


@pytest.mark.parametrize(
    ("tuned", "message"),
    [
        ({"a": jnp.ones((2, 3))}, "tensor b is in base but not in tuned"),
        (
            {"a": jnp.ones((2, 3)), "b": jnp.ones(2), "c": jnp.ones(1), "d": jnp.ones(1)},
            "tensor c and 1 more is in tuned",
        ),
        ({"a": jnp.ones((3, 2)), "b": jnp.ones(2)}, r"tensor a has shape \(2, 3\) in base but \(3, 2\)"),
        ({"a": jnp.ones((2, 3)), "b": jnp.ones(2, jnp.bfloat16)}, "tensor b has dtype float32 in base but bfloat16"),
        ({"a": jnp.ones((2, 3)), "b": 3.0}, "tuned: b is not an array but float"),
        ({"a": jnp.ones((2, 3)), "b": jax.random.key(0)}, "tuned: b: dtype 'key<fry>' cannot be part of a delta"),
        ({"a": jnp.ones((2, 3)), "b": jnp.ones(2, bool)}, "tuned: b: dtype 'bool' cannot be part of a delta"),
    ],
)
def test_models_of_another_structure_are_refused(tuned, message):
    with pytest.raises(InputError, match=message):
        diff({"a": jnp.ones((2, 3)), "b": jnp.ones(2)}, tuned)


def test_ambiguous_and_impossible_paths_are_refused():
    with pytest.raises(InputError, match="two tensors have the same path a/b"):
        diff({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, {"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)})
    for path in ("../a", "/a", "a\n", "a\\b", "x/./y"):
        with pytest.raises(InputError, match="is not the path of a parameter"):
            diff({path: jnp.ones(1)}, {path: jnp.zeros(1)})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"options": {"f": print}}, "options must be what JSON can hold"),
        ({"options": {"f": float("nan")}}, "options must be what JSON can hold"),
        ({"budget": 0.0}, "budget=0.0"),
        ({"step": -1}, "step=-1"),
    ],
)
def test_metadata_out_of_range_is_refused(values, message):
    with pytest.raises(InputError, match=message):
        diff({"w": jnp.ones(2)}, {"w": jnp.zeros(2)}, **values)


def wrong_bases(base):
    flipped = base["head"]["kernel"].at[:].multiply(2)
    kernel = base["head"]["kernel"]
    return {
        "belongs to another base: tensor head/kernel differs": {**base, "head": {"kernel": flipped}},
        "changes tensor head/kernel, which the base model does not have": {**base, "head": {"bias": kernel}},
        r"tensor head/kernel is float16 of shape \(24, 50\), but .* of shape \(50, 24\)": {
            **base,
            "head": {"kernel": kernel.T},
        },
        r"tensor head/kernel is float16 of shape \(24, 50\), but in the base model it is bfloat16": {
            **base,
            "head": {"kernel": kernel.astype(jnp.bfloat16)},
        },
    }


def test_a_wrong_base_is_refused_before_anything_is_written(rng):
    base, tuned = small_pair(rng)
    base["head"]["kernel"] = jnp.ones((24, 50), jnp.float16) * 3
    delta = diff(base, tuned)
    for message, wrong in wrong_bases(base).items():
        with pytest.raises(InputError, match=message):
            apply(wrong, delta, donate=True)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(wrong))
    with pytest.raises(InputError, match=r"belongs to another base: .*fingerprint"):
        apply(base, delta, base_fingerprint="0" * 64)
    assert_same_bits(apply(base, delta, base_fingerprint=fingerprint(base)), tuned)


def test_applying_or_reverting_twice_is_refused(rng):
    base, tuned = small_pair(rng)
    delta = diff(base, tuned)
    with pytest.raises(InputError, match="applied already"):
        apply(tuned, delta)
    with pytest.raises(InputError, match="not applied"):
        revert(base, delta)


def test_a_delta_altered_in_memory_is_refused(rng):
    base, tuned = small_pair(rng)
    delta = diff(base, tuned)
    tensor = delta.tensors["head/kernel"]
    altered = dataclasses.replace(tensor, xor=tensor.xor[::-1].copy())
    with pytest.raises(InputError, match="the delta is damaged: tensor head/kernel"):
        apply(base, Delta({**delta.tensors, "head/kernel": altered}, delta.metadata), donate=True)
    assert_same_bits(apply(base, delta), tuned)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": np.array([1, 1, 2], np.int32)}, "strictly increasing"),
        ({"indices": np.array([2, 1, 3], np.int32)}, "strictly increasing"),
        ({"indices": np.array([-1, 1, 3], np.int32)}, "out of range"),
        ({"indices": np.array([0, 1, 12], np.int32)}, "out of range"),
        ({"indices": np.array([0, 1, 2], np.int64)}, "uint16 bits at int32 indices"),
        ({"xor": np.array([1, 0, 1], np.uint16)}, "does not change"),
        ({"xor": np.array([1, 2, 1], np.uint32)}, "not uint32"),
        ({"dtype": "complex64"}, "dtype 'complex64' cannot be part of a delta"),
        ({"shape": (3, -4)}, "is not possible for a tensor"),
        ({"shape": (2**30, 2**30)}, "is not possible for a tensor"),
    ],
)
def test_impossible_tensors_are_refused(change, message):
    good = {
        "shape": (3, 4),
        "dtype": "bfloat16",
        "indices": np.array([0, 5, 11], np.int32),
        "xor": np.array([1, 2, 3], np.uint16),
        "base_checksum": "0" * 64,
        "tuned_checksum": "0" * 64,
    }
    CoordinateDelta(**good)
    with pytest.raises(InputError, match=message):
        CoordinateDelta(**(good | change))
