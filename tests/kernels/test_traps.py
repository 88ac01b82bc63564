"""Where Pallas's interpreter differs from a GPU, and how the kernels go round it: each trap, and our way."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

LANES = 8


def call(kernel: Any, result: Any, *arrays: Any, **options: Any) -> np.ndarray:
    shape = jax.ShapeDtypeStruct(jnp.shape(result), jnp.asarray(result).dtype)
    return np.asarray(pl.pallas_call(kernel, out_shape=shape, interpret=True, **options)(*arrays))


@pytest.mark.parametrize("idle", ["on a live place", "beyond the end"])
def test_idle_lanes_of_a_masked_store_share_no_place_with_others(idle: str) -> None:
    """The interpreter stores what was there before through idle lanes, over what another lane stores now.

    Lane 0 stores 7 at place 2; the others are idle. Our way: idle lanes point beyond the end.
    """

    def kernel(old: Any, out: Any) -> None:
        out[...] = old[...]
        lane = jnp.arange(LANES)
        place = jnp.where(lane == 0, 2, 2 if idle == "on a live place" else LANES)
        plgpu.store(out.at[place], jnp.full(LANES, 7.0), mask=lane == 0)

    found = call(kernel, jnp.zeros(LANES), jnp.zeros(LANES))
    if idle == "on a live place":
        assert found[2] == 0  # a GPU stores 7
    else:
        np.testing.assert_array_equal(found, np.where(np.arange(LANES) == 2, 7, 0))


@pytest.mark.parametrize("indices", ["shared", "unique"])
def test_atomic_adds_of_a_program_have_unique_indices(indices: str) -> None:
    """The interpreter adds only one of several lanes that share an index. Our way: indices are unique."""

    def kernel(zeros: Any, out: Any) -> None:
        lane = jnp.arange(LANES)
        plgpu.atomic_add(out, lane // 2 if indices == "shared" else lane, jnp.ones(LANES))

    found = call(kernel, jnp.zeros(LANES), jnp.zeros(LANES), input_output_aliases={0: 0})
    if indices == "shared":
        assert found.sum() == LANES // 2  # a GPU counts 8
    else:
        np.testing.assert_array_equal(found, np.ones(LANES))


def test_what_is_not_written_is_poisoned() -> None:
    """The interpreter fills results with NaN and the lowest integers: an element left out shows in any comparison."""

    def kernel(values: Any, index: Any) -> None:
        values[0], index[0] = 1.0, 1

    shapes = [jax.ShapeDtypeStruct((2,), dtype) for dtype in (jnp.float32, jnp.int32)]
    values, index = pl.pallas_call(kernel, out_shape=shapes, interpret=True)()
    np.testing.assert_array_equal(values, [1, np.nan])
    np.testing.assert_array_equal(index, [1, np.iinfo(np.int32).min])


def test_idle_lanes_of_a_load_hold_what_other_says() -> None:
    """Beyond the end of an array, a load without a mask reads something else; with one, it reads `other`."""

    def kernel(array: Any, out: Any, *, masked: bool) -> None:
        lane = jnp.arange(LANES)
        load = partial(plgpu.load, mask=lane < 5, other=0.0) if masked else plgpu.load
        out[...] = load(array.at[lane])

    array = jnp.arange(1.0, 6.0)
    np.testing.assert_array_equal(call(partial(kernel, masked=True), jnp.zeros(LANES), array), [1, 2, 3, 4, 5, 0, 0, 0])
    assert np.any(call(partial(kernel, masked=False), jnp.zeros(LANES), array)[5:] != 0)
