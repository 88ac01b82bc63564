"""Entries are added to, or replaced, and all others keep their bits."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxsparse.kernels import scatter_add_unique, scatter_unique

from jaxsparse import kernels

IMPLEMENTATIONS = ["xla", "pallas"]

# (stack, shape of a matrix, k, dtype): odd sizes; more than a block; all entries; one of one.
SIZES = [(3, (13, 71), 300, "bfloat16"), (None, (4, 3, 5), 60, "float32"), (1, (1, 1), 1, "bfloat16")]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("stack", "shape", "k", "dtype"), SIZES)
def test_sums_are_rounded_once(
    stack: int | None, shape: tuple[int, ...], k: int, dtype: str, implementation: Any, rng: np.random.Generator
) -> None:
    layers, size = stack or 1, int(np.prod(shape))
    w = jnp.asarray(rng.normal(size=(layers, *shape)), dtype)
    index = np.stack([rng.permutation(size)[:k] for _ in range(layers)]).astype(np.int32)
    values = jnp.asarray(rng.normal(size=index.shape) * 1e-2, jnp.float32)
    sums, replaced = (np.array(w.reshape(layers, -1)) for _ in range(2))
    for layer, places in enumerate(index):
        sums[layer, places] = (np.float32(sums[layer, places]) + np.float32(values[layer])).astype(w.dtype)
        replaced[layer, places] = np.float32(values[layer]).astype(w.dtype)
    if stack is None:
        w, index, values = w[0], index[0], values[0]
    functions = scatter_add_unique, scatter_unique
    both = jax.jit(lambda *arrays: [function(*arrays, implementation=implementation) for function in functions])
    for found, expected in zip(both(w, jnp.asarray(index), values), (sums, replaced), strict=True):
        assert found.dtype == w.dtype
        np.testing.assert_array_equal(np.float64(found), np.float64(expected.reshape(w.shape)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_all_else_keeps_its_bits(dtype: str, implementation: Any, rng: np.random.Generator) -> None:
    """All bit patterns there are in 16 bits, NaN among them; indices beyond the matrix, on both sides, touch none."""
    if (implementation, dtype) == ("pallas", "bfloat16"):
        pytest.skip("interpret mode is XLA on CPU, whose scatters do not keep all bits of narrow NaN")
    bits = np.arange(2**16, dtype=np.uint32) << (0 if dtype == "bfloat16" else 16)
    bits = jnp.asarray(bits + (dtype == "float32"), f"uint{8 * jnp.dtype(dtype).itemsize}").reshape(256, 256)
    index = jnp.array([5, -1, 2**16, 300, 2**16 - 1])

    @jax.jit
    def scatter(bits: jax.Array, values: jax.Array) -> jax.Array:
        w = jax.lax.bitcast_convert_type(bits, dtype)
        values = jax.lax.bitcast_convert_type(values, dtype)
        found = scatter_unique(w, index, values, implementation=implementation)
        return jax.lax.bitcast_convert_type(found, bits.dtype)

    values = bits[255, -5:]  # NaN that differ in their bits
    expected = np.array(bits)
    expected[0, 5], expected[1, 44], expected[255, 255] = values[0], values[3], values[4]
    np.testing.assert_array_equal(scatter(bits, values), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layers_may_be_mapped_over(implementation: Any, rng: np.random.Generator) -> None:
    w = jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)
    index, values = jnp.array([[0, 19], [3, 4], [20, 7]]), jnp.ones((3, 2))
    stacked = scatter_add_unique(w, index, values, implementation=implementation)
    mapped = jax.jit(jax.vmap(lambda *layer: scatter_add_unique(*layer, implementation=implementation)))
    np.testing.assert_array_equal(mapped(w, index, values), stacked)
    assert np.sum(np.asarray(stacked != w)) == 5


def test_what_is_donated_is_written_in_place() -> None:
    w = jnp.zeros((300, 400))  # of narrow floats, XLA on CPU copies the bits
    scatter = jax.jit(scatter_add_unique, donate_argnums=0)
    compiled = scatter.lower(w, jnp.arange(7), jnp.ones(7)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < w.nbytes


def test_what_does_not_fit_says_so() -> None:
    scatter = inspect.unwrap(kernels.scatter_add_unique)
    w, index, values = jnp.zeros((2, 3)), jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 1))
    with pytest.raises(TypeError, match="index must hold integers, got float32"):
        scatter(w, values, values)
    with pytest.raises(ValueError, match=r"one shape, got \(2, 1\) and \(1,\)"):
        scatter(w, index, values[0])
    with pytest.raises(ValueError, match=r"\(k,\) or \(2,\) \+ \(k,\), as w is \(2, 3\), got shape \(1, 1\)"):
        scatter(w, index[:1], values[:1])
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"w of float64; try implementation='xla'"):
        scatter(w.astype(jnp.float64), index, values, implementation="pallas")
