"""The largest entries are those that sorting finds, whatever finds them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxsparse.kernels import block_topk
from jaxsparse.kernels.block_topk.pallas_gpu import Blocks, Columns, block_topk_gpu, column_topk_gpu

KINDS = ["normal", "ties", "zero", "one block", "inf and nan"]


def matrix(rng: np.random.Generator, kind: str, shape: tuple[int, ...], dtype: str) -> jax.Array:
    a = rng.normal(size=shape)
    if kind == "ties":
        a = rng.integers(-2, 3, size=shape).astype(float)
    elif kind == "zero":
        a = np.where(rng.random(shape) < 0.5, 0.0, -0.0)
    elif kind == "one block":
        a[..., :2, :] *= 100
    elif kind == "inf and nan":
        a[rng.random(shape) < 0.2] = np.inf
        a[rng.random(shape) < 0.2] = -np.nan
        a[rng.random(shape) < 0.2] = np.nan
    return jnp.asarray(a, dtype)


def expected(a: Any, k: int, axis: int) -> np.ndarray:
    """Places of the largest: NaN first, then by magnitude, ties to the lowest."""
    magnitude = np.abs(np.asarray(a, np.float64))
    is_number = ~np.isnan(magnitude)
    return np.lexsort((np.where(is_number, -magnitude, 0), is_number), axis=axis).take(range(k), axis)


def check(found: Any, a: jax.Array, k: int, axis: int) -> None:
    np.testing.assert_array_equal(found.index, expected(a, k, axis))
    assert found.index.dtype == jnp.int32
    bits = f"uint{8 * a.dtype.itemsize}"
    values = np.take_along_axis(np.asarray(a), np.asarray(found.index), axis)
    np.testing.assert_array_equal(np.asarray(found.values).view(bits), values.view(bits))


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize(
    ("shape", "k", "dtype"), [((7, 31), 20, "float32"), ((12, 11), 132, "bfloat16"), ((1, 1), 1, "float32")]
)
def test_largest_of_a_matrix(
    shape: tuple[int, int], k: int, dtype: str, implementation: Any, rng: np.random.Generator
) -> None:
    compiled = jax.jit(partial(block_topk, k=k, implementation=implementation))
    for kind in KINDS:
        a = matrix(rng, kind, shape, dtype)
        check(compiled(a), a.reshape(-1), k, 0)


@pytest.mark.parametrize("k", [1, 3, 40, 217])
def test_many_blocks_of_which_one_may_hold_all(k: int, rng: np.random.Generator) -> None:
    """Two candidates of a block, of 64: where its share is larger, the second pass finds it."""
    compiled = jax.jit(partial(block_topk_gpu, k=k, cut=Blocks(size=64, warps=1), count=2, interpret=True))
    for kind in KINDS:
        a = matrix(rng, kind, (7, 31), "float32").reshape(-1)
        check(compiled(a), a, k, 0)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("axis", [-1, -2])
def test_largest_of_every_neuron(axis: int, implementation: Any, rng: np.random.Generator) -> None:
    shape, k = (9, 13), 4
    compiled = jax.jit(partial(block_topk, k=k, axis=axis, implementation=implementation))
    for kind in KINDS:
        a = matrix(rng, kind, shape, "float32")
        check(compiled(a), a, k, axis)


@pytest.mark.parametrize("k", [1, 5, 21])
def test_columns_of_several_programs(k: int, rng: np.random.Generator) -> None:
    compiled = jax.jit(partial(column_topk_gpu, k=k, cut=Columns(rows=8, columns=4, warps=1), interpret=True))
    for kind in KINDS:
        a = matrix(rng, kind, (21, 10), "bfloat16")
        check(compiled(a), a, k, 0)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_matrices_of_a_stack_are_each_by_itself(implementation: Any, rng: np.random.Generator) -> None:
    a = matrix(rng, "ties", (2, 3, 5, 6), "float32")
    found = jax.jit(partial(block_topk, k=8, implementation=implementation))(a)
    mapped = jax.vmap(jax.vmap(partial(block_topk, k=8, implementation=implementation)))(a)
    for place in np.ndindex(2, 3):
        check(jax.tree.map(lambda part: part[place], found), a[place].reshape(-1), 8, 0)  # noqa: B023
    jax.tree.map(np.testing.assert_array_equal, found, mapped)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must lie between 1 and 6, the entries that there are, got 0"),
        ({"k": 7}, "k must lie between 1 and 6, .* got 7"),
        ({"k": 4, "axis": -1}, "k must lie between 1 and 3, .* got 4"),
        ({"k": 1, "axis": 0}, "axis must be None, -2 .* got 0"),
        ({"k": 1, "implementation": "cuda"}, "implementation must be None, 'xla' or 'pallas', got 'cuda'"),
    ],
)
def test_what_is_out_of_range_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        block_topk(jnp.ones((2, 3)), **options)


def test_kernels_refuse_float64() -> None:
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match="cannot take this: a of float64; try implementation='xla'"),
    ):
        block_topk(jnp.ones((2, 3), jnp.float64), 1, implementation="pallas")
