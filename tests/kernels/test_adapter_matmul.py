"""Every token gets the product with its own adapter's dense matrix."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxsparse.kernels import adapter_matmul, adapter_slices_matmul

from experiments.shapes import NEURONS
from jaxsparse import kernels

IMPLEMENTATIONS = ["xla", "pallas"]

# (tokens, adapters, inputs, outputs, k, dtype)
SIZES = [(s.tokens, 3, s.inputs, s.outputs, s.k, s.dtype) for s in NEURONS]


def adapters_of(rng: np.random.Generator, tokens: int, adapters: int) -> np.ndarray:
    """An adapter for every token: some have none, and some numbers are none."""
    return rng.integers(-1, adapters + 1, size=tokens).astype(np.int32)


def by_token(x: Any, adapter_of_token: Any, matrices: np.ndarray) -> np.ndarray:
    rows = np.zeros((x.shape[0], matrices.shape[2]))
    for row, features, adapter in zip(rows, np.float64(x), adapter_of_token, strict=True):
        if 0 <= adapter < len(matrices):
            row[:] = features @ matrices[adapter]
    return rows


def close(found: Any, expected: np.ndarray, k: int, dtype: str = "float32", implementation: str = "pallas") -> None:
    assert found.dtype == jnp.float32
    # Bands of XLA's route are of x's dtype.
    exact = 1e-2 if dtype == "bfloat16" and implementation == "xla" else 1e-5
    np.testing.assert_allclose(found, expected, rtol=exact, atol=exact * np.sqrt(k))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens", "adapters", "inputs", "outputs", "k", "dtype"), SIZES)
def test_every_token_has_its_own_matrix(
    tokens: int,
    adapters: int,
    inputs: int,
    outputs: int,
    k: int,
    dtype: str,
    implementation: Any,
    rng: np.random.Generator,
) -> None:
    x, adapter_of_token = jnp.asarray(rng.normal(size=(tokens, inputs)), dtype), adapters_of(rng, tokens, adapters)
    index = np.argsort(rng.normal(size=(adapters, inputs, outputs)), axis=1)[:, :k].astype(np.int32)
    values = jnp.asarray(rng.normal(size=index.shape), jnp.float32)
    flat = index * outputs + np.arange(outputs, dtype=np.int32)
    matrices = np.zeros((adapters, inputs, outputs))
    np.put_along_axis(matrices, index, np.float64(values), axis=1)
    order = rng.permutation(k * outputs)

    @jax.jit
    def forms(x: jax.Array, adapter_of_token: jax.Array, index: jax.Array, flat: jax.Array, values: jax.Array) -> Any:
        by_output = adapter_matmul(x, adapter_of_token, index, values, implementation=implementation)
        flat, values = (a.reshape(adapters, -1)[:, order] for a in (flat, values))
        entries = adapter_matmul(x, adapter_of_token, flat, values, outputs, implementation=implementation)
        return by_output, entries

    expected = by_token(x, adapter_of_token, matrices)
    arguments = (jnp.asarray(array) for array in (x, adapter_of_token, index, flat, values))
    for found in forms(*arguments):
        close(found, expected, k, dtype, implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens", "adapters", "inputs", "outputs", "k", "dtype"), SIZES)
def test_slices_of_every_token_are_those_of_its_adapter(
    tokens: int,
    adapters: int,
    inputs: int,
    outputs: int,
    k: int,
    dtype: str,
    implementation: Any,
    rng: np.random.Generator,
) -> None:
    x, adapter_of_token = jnp.asarray(rng.normal(size=(tokens, inputs)), dtype), adapters_of(rng, tokens, adapters)
    index = np.argsort(rng.normal(size=(adapters, inputs)), axis=1)[:, :k].astype(np.int32)
    values = jnp.asarray(rng.normal(size=(adapters, k, outputs)), dtype)
    matrices = np.zeros((adapters, inputs, outputs))
    np.put_along_axis(matrices, index[:, :, None], np.float64(values), axis=1)
    arguments = (x, jnp.asarray(adapter_of_token), jnp.asarray(index), values)
    found = jax.jit(lambda *arrays: adapter_slices_matmul(*arrays, implementation=implementation))(*arguments)
    close(found, by_token(x, adapter_of_token, matrices), k)


def test_slices_of_bfloat16_can_be_multiplied_on_cpu() -> None:
    """At this size, XLA cannot multiply x[:, index] with anything."""
    x, index, values = jnp.ones((32, 64), "bfloat16"), jnp.zeros((1, 16), jnp.int32), jnp.ones((1, 16, 96), "bfloat16")
    found = jax.jit(adapter_slices_matmul)(x, jnp.zeros(32, jnp.int32), index, values)
    np.testing.assert_array_equal(found, np.full((32, 96), 16))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_adapter_that_is_broken_breaks_no_other_token(implementation: Any) -> None:
    x, adapter_of_token = jnp.ones((4, 5)), jnp.array([0, 1, -1, 0])
    index, values = jnp.arange(2)[:, None], jnp.array([[2.0], [jnp.nan]])

    def forms() -> list[jax.Array]:
        rows = jnp.broadcast_to(values[:, :, None], (2, 1, 3))
        return [
            adapter_matmul(x, adapter_of_token, jnp.zeros((2, 1, 3), jnp.int32), rows, implementation=implementation),
            adapter_matmul(x, adapter_of_token, index * 0, values, 3, implementation=implementation),
            adapter_slices_matmul(x, adapter_of_token, index, rows, implementation=implementation),
        ]

    for found in jax.jit(forms)():
        np.testing.assert_array_equal(found[np.array([0, 2, 3]), 0], [2, 0, 2])
        assert np.isnan(found[1, 0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_entries_may_be_sorted_beforehand_and_idle(implementation: Any, rng: np.random.Generator) -> None:
    """All but the idle ones are in one column: more than are read at a time, beside empty blocks."""
    index = jnp.stack([jnp.arange(40) * 100 + 70, jnp.arange(40) * 100 + 3]).at[:, 38:].set(4000)
    x, values = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((2, 40), (2, 40)))
    matrices = np.zeros((2, 40, 100))
    matrices[0, :38, 70], matrices[1, :38, 3] = values[:, :38]

    def product(*arrays: jax.Array) -> jax.Array:
        return adapter_matmul(*arrays, 100, is_sorted=True, implementation=implementation)

    found = jax.jit(product)(x, jnp.array([1, 0]), index, values)
    close(found, by_token(x, [1, 0], matrices), 38)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layers_may_be_scanned_and_mapped_over(implementation: Any, rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.normal(size=(2, 3, 4)), jnp.float32)
    index = jnp.asarray(rng.integers(4, size=(2, 2, 1, 5)), jnp.int32)
    values = jnp.asarray(rng.normal(size=index.shape), jnp.float32)
    adapter_of_token = jnp.array([1, -1, 0])

    def layer(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
        return adapter_matmul(x, adapter_of_token, index, values, implementation=implementation)

    expected = [layer(*arrays) for arrays in zip(x, index, values, strict=True)]
    np.testing.assert_allclose(jax.jit(jax.vmap(layer))(x, index, values), expected, rtol=1e-5, atol=1e-6)
    scanned = jax.jit(lambda *arrays: jax.lax.map(lambda arrays: layer(*arrays), arrays))
    np.testing.assert_allclose(scanned(x, index, values), expected, rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_says_so() -> None:
    product, slices = inspect.unwrap(adapter_matmul), inspect.unwrap(kernels.adapter_slices_matmul)
    x, adapters = jnp.ones((2, 3)), jnp.zeros(2, jnp.int32)
    index, values = jnp.zeros((1, 1, 4), jnp.int32), jnp.ones((1, 1, 4))
    with pytest.raises(ValueError, match=r"adapter_of_token must be \(2,\), as x has so many tokens, got \(1,\)"):
        product(x, adapters[:1], index, values)
    with pytest.raises(TypeError, match="adapter_of_token must hold integers, got float32"):
        product(x, x[:, 0], index, values)
    with pytest.raises(ValueError, match=r"one shape, got \(1, 1, 4\) and \(1, 1, 3\)"):
        product(x, adapters, index, values[..., :3])
    with pytest.raises(ValueError, match=r"\(adapters, k\) with outputs=4, got shape \(1, 1, 4\)"):
        product(x, adapters, index, values, 4)
    with pytest.raises(ValueError, match=r"\(adapters, k, outputs\) without outputs, got shape \(1, 4\)"):
        product(x, adapters, index[0], values[0])
    with pytest.raises(ValueError, match=r"values must be \(1, 4\) \+ \(outputs,\)"):
        slices(x, adapters, index[0], values)
