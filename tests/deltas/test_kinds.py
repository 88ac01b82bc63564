"""Slices and factors beside coordinates: found, applied, reverted, refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsparse import Target
from jaxsparse.common.errors import InputError
from jaxsparse.deltas import CoordinateDelta, FactorDelta, SliceDelta, apply, diff, load, revert, save
from jaxsparse.deltas.tensors import matrix_places, slice_indices
from jaxsparse.subspaces.targets import matrix_view
from tests.deltas.models import assert_same_bits, assert_same_delta, changed, mixed_pair, random_bits, with_factors
from tests.deltas.saved import FORMS


@pytest.mark.parametrize("donate", [False, True])
@pytest.mark.parametrize("kind", ["jax", "numpy"])
def test_all_kinds_apply_and_revert_exactly(rng, donate, kind):
    base, tuned, delta = mixed_pair(rng)
    if kind == "numpy":
        base, tuned = (jax.tree.map(np.asarray, tree) for tree in (base, tuned))
    untouched = jax.tree.map(np.array, base)
    there = apply(base, delta, donate=donate)
    assert_same_bits(there, tuned)
    assert_same_bits(revert(there, delta, base=untouched, donate=donate), untouched)


@pytest.mark.parametrize("form", FORMS)
def test_all_kinds_are_saved_exactly(rng, form, tmp_path):
    base, _, delta = mixed_pair(rng)
    kinds = {path: tensor.kind for path, tensor in delta.tensors.items()}
    assert kinds["layers/down/kernel"] == kinds["layers/up/kernel"] == kinds["out/kernel"] == "slices"
    assert delta.tensors["layers/up/kernel"].axis == "output"
    assert kinds["low/kernel"] == kinds["dora/kernel"] == "factors"
    assert set(kinds.values()) == {"coordinates", "slices", "factors"}
    save(tmp_path / form, delta)
    assert_same_delta(load(tmp_path / form, base=base), delta)


@st.composite
def views(draw):
    """The arguments of `matrix_view`: a shape of up to five axes, with a role for each."""
    shape = tuple(draw(st.lists(st.integers(1, 5), min_size=2, max_size=5)))
    axes = draw(st.permutations(range(len(shape))))
    inputs = draw(st.integers(1, len(shape) - 1))
    layers = draw(st.integers(0, len(shape) - 1 - inputs))
    ends = layers, layers + inputs
    return shape, axes[: ends[0]], axes[ends[0] : ends[1]], axes[ends[1] :]


@settings(deadline=None, max_examples=100)
@given(views(), st.sampled_from(["input", "output"]), st.integers(0, 2**32 - 1))
def test_positions_of_slices_are_those_of_the_transposed_weight(given_view, axis, seed):
    rng, view = np.random.default_rng(seed), matrix_view(*given_view)
    own = view.in_size if axis == "input" else view.out_size
    slices = np.sort(np.argsort(rng.random((view.stack, own)), axis=1)[:, : rng.integers(1, own + 1)], axis=1)
    weight = np.arange(np.prod(view.shape)).reshape(view.shape)
    matrices = np.asarray(view.matrices(jnp.asarray(weight)))
    if axis == "output":
        matrices = matrices.swapaxes(1, 2)
    expected = np.take_along_axis(matrices, slices[:, :, None], axis=1)
    indices = slice_indices(view, axis, slices)
    np.testing.assert_array_equal(weight.reshape(-1)[indices], expected)
    layer, row, column = matrix_places(view, indices)
    found = np.asarray(view.matrices(jnp.asarray(weight)))[layer, row, column]
    np.testing.assert_array_equal(found, expected)


@settings(deadline=None, max_examples=50)
@given(views(), st.integers(0, 2**32 - 1), st.sampled_from(["bfloat16", "float16", "float32"]))
def test_diff_with_slices_is_exact_whatever_changed(given_view, seed, dtype):
    rng, view = np.random.default_rng(seed), matrix_view(*given_view)
    base = random_bits(rng, view.shape, dtype)
    tuned = changed(rng, base, int(rng.integers(1, base.size + 1)))
    delta = diff({"w": base}, {"w": tuned}, slices={"w": view})
    assert_same_bits(apply({"w": base}, delta), {"w": tuned})
    assert_same_bits(revert({"w": tuned}, delta), {"w": base})


def test_diff_keeps_entries_where_slices_would_take_more(rng):
    base = random_bits(rng, (2, 40, 30), "float32")
    target = Target("w", stack_axes=(0,))
    scattered = diff({"w": base}, {"w": changed(rng, base, 30)}, slices=target).tensors["w"]
    assert isinstance(scattered, CoordinateDelta)
    tuned = base.copy()
    tuned[0, [3, 9]], tuned[1, 5] = changed(rng, base[0, [3, 9]], 60), changed(rng, base[1, 5], 30)
    whole = diff({"w": base}, {"w": tuned}, slices=target).tensors["w"]
    assert isinstance(whole, SliceDelta)
    assert whole.slices.shape == (2, 2)
    assert whole.slices[0].tolist() == [3, 9]
    assert 5 in whole.slices[1]
    assert whole.entries == 90
    assert whole.stored == 120


def test_factors_need_their_base_to_revert(rng):
    base, _, delta = mixed_pair(rng)
    tuned = apply(base, delta)
    with pytest.raises(InputError, match="keeps factors of tensor dora/kernel, out of which no base comes back: give"):
        revert(tuned, delta)
    other = base | {"low/kernel": -base["low/kernel"]}
    with pytest.raises(InputError, match="belongs to another base: tensor low/kernel differs from tiny"):
        revert(tuned, delta, base=other)
    with pytest.raises(InputError, match="belongs to another base: tensor low/kernel"):
        apply(other, delta)
    with pytest.raises(InputError, match="applied already"):
        apply(base | {"low/kernel": tuned["low/kernel"]}, delta)
    with pytest.raises(InputError, match="not the one that made this model: tensor low/kernel"):
        revert(tuned | {"low/kernel": base["low/kernel"]}, delta, base=base)


def test_factors_revert_where_another_device_rounded_otherwise(rng):
    view = matrix_view((20, 30), (), (0,), (1,))
    base = jnp.asarray(rng.normal(size=(20, 30)), jnp.float32)
    tensor = with_factors(rng, base, view)
    delta = diff(
        {"w": base}, apply({"w": base}, diff({"w": base}, {"w": base}, factors={"w": tensor})), factors={"w": tensor}
    )
    exact = np.asarray(base, np.float64) + 0.5 * np.einsum("sir,sro->io", tensor.a, tensor.b, dtype=np.float64)
    elsewhere = jnp.nextafter(jnp.asarray(exact, jnp.float32), jnp.inf)
    assert_same_bits(revert({"w": elsewhere}, delta, base={"w": base}), {"w": base})


GOOD = {
    "shape": (2, 3, 4),
    "dtype": "float32",
    "base_checksum": "0" * 64,
    "tuned_checksum": "1" * 64,
    "view": matrix_view((2, 3, 4), (0,), (1,), (2,)),
}
SLICES = GOOD | {"axis": "input", "slices": np.array([[0, 2], [1, 2]], np.int32), "xor": np.ones((2, 2, 4), np.uint32)}
FACTORS = GOOD | {"a": np.ones((2, 3, 1), np.float32), "b": np.ones((2, 1, 4), np.float32), "scale": 1.0}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (SliceDelta, {}, None),
        (SliceDelta, {"axis": "both"}, "neither 'input' nor 'output'"),
        (SliceDelta, {"slices": np.array([[0, 3], [1, 2]], np.int32)}, "out of range: there are 3 input slices"),
        (SliceDelta, {"slices": np.array([[0, 0], [1, 2]], np.int32)}, "not strictly increasing"),
        (SliceDelta, {"slices": np.array([[0, 1]], np.int32)}, r"must be int32 \(2, slices\)"),
        (SliceDelta, {"xor": np.ones((2, 2, 3), np.uint32)}, "do not match"),
        (SliceDelta, {"xor": np.ones((2, 2, 4), np.uint16)}, "do not match"),
        (SliceDelta, {"shape": (4, 3, 2)}, "are not those of one of shape"),
        (FactorDelta, {}, None),
        (FactorDelta, {"a": np.ones((2, 4, 1), np.float32)}, "a must be float32 or float64"),
        (FactorDelta, {"b": np.ones((2, 2, 4), np.float32)}, "b must be float32 or float64"),
        (FactorDelta, {"b": np.full((2, 1, 4), np.nan, np.float32)}, "b has entries that are not finite"),
        (FactorDelta, {"gain": np.ones((2, 3), np.float32)}, "gain must be"),
        (FactorDelta, {"scale": float("inf")}, "a scale of inf"),
        (FactorDelta, {"dtype": "int8"}, "takes no factors"),
    ],
)
def test_impossible_tensors_are_refused(kind, change, message):
    good = SLICES if kind is SliceDelta else FACTORS
    if message is None:
        kind(**good)
        return
    with pytest.raises(InputError, match=message):
        kind(**(good | change))
