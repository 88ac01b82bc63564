"""Sparse products, and their gradients, are those of the dense matrix."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxsparse.kernels import gather_matmul
from jaxsparse.kernels.blocks import chosen_sums
from jaxsparse.kernels.gather_matmul import reference

from experiments.shapes import NEURONS

IMPLEMENTATIONS = ["xla", "pallas"]

# (tokens, inputs, outputs, k, dtype)
SIZES = [(s.tokens, s.inputs, s.outputs, s.k, s.dtype) for s in NEURONS]


def neurons(rng: np.random.Generator, inputs: int, outputs: int, k: int) -> np.ndarray:
    """k distinct inputs of every output; low ones are liked best, so that many outputs share an input."""
    liking = rng.normal(size=(inputs, outputs)) - np.linspace(0, 4, inputs)[:, None]
    return np.argsort(-liking, axis=0)[:k].astype(np.int32)


def dense(flat: np.ndarray, values: Any, inputs: int, outputs: int) -> np.ndarray:
    matrix = np.zeros(inputs * outputs)
    matrix[flat] = np.asarray(values, np.float64).reshape(-1)
    return matrix.reshape(inputs, outputs)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("k", [1, 7])
def test_an_output_may_name_an_input_twice(k: int, implementation: Any, rng: np.random.Generator) -> None:
    """As padding does, with zeros, where adapters differ in size."""
    index = rng.integers(0, 16, (k, 24)).astype(np.int32)
    x, values = rng.normal(size=(5, 16)), rng.normal(size=(k, 24))
    expected = np.einsum("ko,tko->to", values, x[:, index])
    found = gather_matmul(
        jnp.asarray(x, jnp.float32), jnp.asarray(index), jnp.asarray(values, jnp.float32), implementation=implementation
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("form", ["neurons", "entries"])
@pytest.mark.parametrize(("tokens", "inputs", "outputs", "k", "dtype"), SIZES)
def test_product_and_gradients_are_those_of_the_dense_matrix(
    tokens: int,
    inputs: int,
    outputs: int,
    k: int,
    dtype: str,
    form: str,
    implementation: Any,
    rng: np.random.Generator,
) -> None:
    by_neuron = neurons(rng, inputs, outputs, k)
    flat = (by_neuron * outputs + np.arange(outputs)).reshape(-1)
    index, size = (by_neuron, None) if form == "neurons" else (rng.permutation(flat), outputs)
    places = flat if form == "neurons" else index
    x = jnp.asarray(rng.normal(size=(tokens, inputs)), dtype)
    dy = jnp.asarray(rng.normal(size=(tokens, outputs)), dtype).astype(jnp.float32)
    values = jnp.asarray(rng.normal(size=index.shape), dtype)

    @jax.jit
    def both(x: jax.Array, values: jax.Array) -> Any:
        def apply(x: jax.Array, values: jax.Array) -> jax.Array:
            return gather_matmul(x, jnp.asarray(index), values, size, implementation=implementation)

        y, transpose = jax.vjp(apply, x, values)
        return y, transpose(dy)

    y, (dx, dvalues) = both(x, values)
    assert (y.dtype, dx.dtype, dvalues.dtype) == (jnp.float32, x.dtype, values.dtype)
    matrix, wide, slopes = dense(places, values, inputs, outputs), np.float64(x), np.float64(dy)
    exact = 1e-5 if dtype == "float32" else 2**-7
    scale = np.sqrt(max(k, tokens))
    np.testing.assert_allclose(y, wide @ matrix, rtol=1e-5, atol=1e-5 * scale)
    np.testing.assert_allclose(np.float64(dx), slopes @ matrix.T, rtol=exact, atol=exact * np.sqrt(outputs))
    expected = (wide.T @ slopes).reshape(-1)[places].reshape(index.shape)
    np.testing.assert_allclose(np.float64(dvalues), expected, rtol=exact, atol=exact * scale)


def test_all_routes_agree(rng: np.random.Generator) -> None:
    """The cost model chooses among routes that compute one thing."""
    tokens, inputs, outputs, k = 5, 37, 70, 3  # more entries than a block
    index = neurons(rng, inputs, outputs, k)
    flat = (index * outputs + np.arange(outputs)).reshape(-1)
    x, y = rng.normal(size=(tokens, inputs)), rng.normal(size=(tokens, outputs))
    values = rng.normal(size=index.shape)
    matrix = dense(flat, values, inputs, outputs)

    @jax.jit
    def routes(x: jax.Array, y: jax.Array, index: jax.Array, flat: jax.Array, values: jax.Array) -> Any:
        rows, columns, entries = flat // outputs, flat % outputs, values.reshape(-1)
        there = {
            "gather": reference.neurons_by_gather(x, index, values),
            "bands": reference.neurons_by_bands(x, index, values),
            "blocks": reference.entries_by_blocks(x, rows, columns, entries, outputs),
            "entry bands": reference.entries_by_bands(x, rows, columns, entries, outputs),
        }
        back = {
            "bands": reference.neurons_transposed_by_bands(y, index, values, inputs),
            "blocks": reference.entries_by_blocks(y, columns, rows, entries, inputs),
            "entry bands": reference.entries_by_bands(y, columns, rows, entries, inputs),
        }
        return there, back

    with jax.enable_x64(True):
        found = routes(*(jnp.asarray(array) for array in (x, y, index, flat, values)))
        for group, expected in zip(found, (x @ matrix, y @ matrix.T), strict=True):
            for name, result in group.items():
                np.testing.assert_allclose(result, expected, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layers_may_be_mapped_over(implementation: Any, rng: np.random.Generator) -> None:
    index = np.stack([neurons(rng, 40, 6, 1) for _ in range(3)])
    x, values = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 4, 40), (3, 1, 6)))

    def energy(values: jax.Array, x: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.sum(jax.checkpoint(product)(x, index, values) ** 2)

    def product(*arguments: jax.Array) -> jax.Array:
        return gather_matmul(*arguments, implementation=implementation)

    arguments = values, x, jnp.asarray(index)
    found = jax.jit(jax.vmap(jax.grad(energy)))(*arguments)
    expected = jax.lax.map(lambda layer: jax.grad(energy)(*layer), arguments)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("inputs", "implementation"), [(6, "xla"), (900, "xla"), (6, "pallas")])
def test_entries_beyond_the_matrix_are_none(inputs: int, implementation: Any, rng: np.random.Generator) -> None:
    """Idle slots, on the way of many entries and on that of few, add nothing and get no gradient."""
    x, values = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((4, inputs), 4))
    index = jnp.array([5, inputs * 3, 1, inputs * 3])

    def product(values: jax.Array) -> jax.Array:
        return jnp.sum(gather_matmul(x, index, values, 3, implementation=implementation))

    found, gradient = jax.jit(jax.value_and_grad(product))(values)
    np.testing.assert_allclose(found, np.sum(x @ dense(np.array([5, 1]), values[::2], inputs, 3)), rtol=1e-4)
    assert not np.any(gradient[1::2])
    assert np.all(gradient[::2])


def test_many_entries_of_one_output_and_none_of_others(rng: np.random.Generator) -> None:
    """More entries than a kernel reads at a time in one place; all other blocks of outputs are empty."""
    x, values = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((3, 80), 80))
    index = rng.permutation(80).astype(np.int32) * 100 + 50
    found = gather_matmul(x, jnp.asarray(index), values, 100, implementation="pallas")
    np.testing.assert_allclose(found, np.float64(x) @ dense(index, values, 80, 100), rtol=1e-5, atol=1e-4)
    assert np.count_nonzero(np.any(found, axis=0)) == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("outputs", [None, 40])
def test_what_is_not_finite_stays_with_its_token(outputs: int | None, implementation: Any) -> None:
    x = jnp.ones((3, 70)).at[1, 2].set(jnp.inf).at[2, 3].set(jnp.nan)
    index = jnp.array([[2, 3] * 20]) if outputs is None else jnp.array([2 * 40, 3 * 40 + 1])
    found = gather_matmul(x, index, jnp.ones(index.shape), outputs, implementation=implementation)
    np.testing.assert_array_equal(found[0, :2], [1, 1])
    assert not np.isfinite(found[1, 0])
    assert np.isnan(found[2, 1])


def test_sums_of_chosen_rows_are_those_of_float32(rng: np.random.Generator) -> None:
    """Tensor cores take bfloat16: what is lost on the way is no more than float32 loses."""
    terms = jnp.asarray(rng.normal(size=(32, 16)) * np.exp(rng.normal(size=(32, 16)) * 8), jnp.float32)
    found = chosen_sums(jnp.eye(32, dtype=bool), terms)
    np.testing.assert_array_equal(found, terms)


def test_what_does_not_fit_says_so() -> None:
    x, index, values = jnp.ones((2, 3)), jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4))
    with pytest.raises(ValueError, match=r"one shape, got \(1, 4\) and \(1, 3\)"):
        gather_matmul(x, index, values[:, :3])
    with pytest.raises(ValueError, match=r"\(k,\) with outputs=4, got shape \(1, 4\)"):
        gather_matmul(x, index, values, 4)
    with pytest.raises(ValueError, match=r"\(k, outputs\) without outputs, got shape \(4,\)"):
        gather_matmul(x, index[0], values[0])
    with pytest.raises(ValueError, match="outputs must be at least 1, got 0"):
        gather_matmul(x, index[0], values[0], 0)
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"values of float64; try implementation='xla'"):
        gather_matmul(x, index, values.astype(jnp.float64), implementation="pallas")
