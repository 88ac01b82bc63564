"""Sampled products are entries of the dense one."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxsparse.kernels import sampled_matmul
from jaxsparse.kernels.sampled_matmul import reference
from jaxsparse.kernels.sampled_matmul.pallas_gpu import Tiling, sampled_matmul_gpu

from experiments.shapes import NEURONS
from jaxsparse import kernels

IMPLEMENTATIONS = ["xla", "pallas"]

# (tokens, inputs, outputs, k, dtype)
SIZES = [(s.tokens, s.inputs, s.outputs, s.k, s.dtype) for s in NEURONS]


def arrays(rng: np.random.Generator, tokens: int, inputs: int, outputs: int, dtype: str) -> list[jax.Array]:
    return [jnp.asarray(rng.normal(size=(tokens, size)), dtype) for size in (inputs, outputs)]


def product(x: Any, dy: Any) -> np.ndarray:
    return np.float64(x).T @ np.float64(dy)


def close(found: Any, expected: Any, tokens: int) -> None:
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.sqrt(tokens))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens", "inputs", "outputs", "k", "dtype"), SIZES)
def test_samples_are_entries_of_the_dense_product(
    tokens: int, inputs: int, outputs: int, k: int, dtype: str, implementation: Any, rng: np.random.Generator
) -> None:
    x, dy = arrays(rng, tokens, inputs, outputs, dtype)
    rows = rng.integers(inputs, size=(k, outputs)).astype(np.int32)
    columns = rng.integers(outputs, size=rows.shape).astype(np.int32)

    @jax.jit
    def both(*arguments: jax.Array) -> Any:
        of_pairs = sampled_matmul(*arguments, implementation=implementation)
        return of_pairs, sampled_matmul(*arguments[:3], implementation=implementation)

    of_pairs, of_outputs = both(x, dy, jnp.asarray(rows), jnp.asarray(columns))
    assert of_pairs.dtype == of_outputs.dtype == jnp.float32
    close(of_pairs, product(x, dy)[rows, columns], tokens)
    close(of_outputs, product(x, dy)[rows, np.arange(outputs)], tokens)


@pytest.mark.parametrize("transposed", [True, False])
def test_tokens_may_be_split_and_read_either_way(transposed: bool, rng: np.random.Generator) -> None:
    x, dy = arrays(rng, 75, 20, 6, "bfloat16")
    rows, columns = (rng.integers(size, size=33).astype(np.int32) for size in (20, 6))
    cut = Tiling(8, 16, programs=12, transposed=transposed)
    found = sampled_matmul_gpu(x, dy, jnp.asarray(rows), jnp.asarray(columns), interpret=True, cut=cut)
    close(found, product(x, dy)[rows, columns], 75)


def test_all_routes_agree(rng: np.random.Generator) -> None:
    x, dy = rng.normal(size=(5, 37)), rng.normal(size=(5, 11))
    rows = rng.integers(37, size=(3, 11))
    columns = np.broadcast_to(np.arange(11), rows.shape)
    with jax.enable_x64(True):
        arguments = [jnp.asarray(array) for array in (x, dy, rows, columns)]
        for found in (
            reference.gathered(*arguments),
            reference.tiled(*arguments),
            reference.neurons_gathered(*arguments[:3]),
            sampled_matmul(*arguments),
        ):
            np.testing.assert_allclose(found, product(x, dy)[rows, columns], rtol=1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_finite_stays_with_its_samples(implementation: Any) -> None:
    x, dy = jnp.zeros((3, 400)).at[1, 2].set(jnp.inf).at[2, 3].set(jnp.nan), jnp.ones((3, 4))
    found = sampled_matmul(x, dy, jnp.array([2, 3, 4]), jnp.array([0, 1, 2]), implementation=implementation)
    np.testing.assert_array_equal(found, [np.inf, np.nan, 0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layers_may_be_mapped_over(implementation: Any, rng: np.random.Generator) -> None:
    x, dy = (jnp.asarray(rng.normal(size=(3, 4, size)), jnp.float32) for size in (40, 6))
    rows = jnp.asarray(rng.integers(40, size=(3, 2, 6)), jnp.int32)

    @jax.jit
    def layers(x: jax.Array, dy: jax.Array, rows: jax.Array) -> jax.Array:
        return jax.vmap(lambda *layer: sampled_matmul(*layer, implementation=implementation))(x, dy, rows)

    expected = [product(*layer)[index, np.arange(6)] for *layer, index in zip(x, dy, rows, strict=True)]
    close(layers(x, dy, rows), expected, 4)


def test_nothing_of_nothing() -> None:
    rows = jnp.zeros((0, 4), jnp.int32)
    assert sampled_matmul(jnp.ones((2, 3)), jnp.ones((2, 4)), rows, implementation="pallas").shape == (0, 4)
    assert not np.any(sampled_matmul(jnp.ones((0, 3)), jnp.ones((0, 4)), jnp.zeros((2, 4), jnp.int32)))


def test_what_does_not_fit_says_so() -> None:
    sampled_matmul = inspect.unwrap(kernels.sampled_matmul)  # users have no jaxtyping check before it
    x, dy, rows = jnp.ones((2, 3)), jnp.ones((2, 4)), jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=r"same tokens, got shapes \(2, 3\) and \(1, 4\)"):
        sampled_matmul(x, dy[:1], rows)
    with pytest.raises(ValueError, match=r"one shape, got \(1, 4\) and \(4,\)"):
        sampled_matmul(x, dy, rows, rows[0])
    with pytest.raises(ValueError, match=r"\(k, 4\) without columns, got shape \(1, 3\)"):
        sampled_matmul(x, dy, rows[:, :3])
    with pytest.raises(TypeError, match="columns must hold integers, got float32"):
        sampled_matmul(x, dy, rows, dy[:1])
    with pytest.raises(ValueError, match="'xla' or 'pallas', got 'triton'"):
        sampled_matmul(x, dy, rows, implementation="triton")
    with jax.enable_x64(True), pytest.raises(ValueError, match=r"x of float64; try implementation='xla'"):
        sampled_matmul(x.astype(jnp.float64), dy, rows, implementation="pallas")
