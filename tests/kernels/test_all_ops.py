"""What holds for every op: narrow and wide integers, nothing at all, derivatives, sizes that do not fit."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxsparse.kernels import (
    adapter_matmul,
    adapter_slices_matmul,
    block_topk,
    gather_matmul,
    gradient_topk,
    sampled_matmul,
    scatter_add_unique,
    scatter_unique,
)

TOKENS, INPUTS, OUTPUTS = 3, 130, 7
ROUTES = ["xla", "pallas"]


def arguments(rng: np.random.Generator) -> dict[str, jax.Array]:
    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "x": normal(TOKENS, INPUTS),
        "dy": normal(TOKENS, OUTPUTS),
        "w": normal(INPUTS, OUTPUTS),
        "values": normal(4),
        "of_outputs": normal(2, OUTPUTS),
        "of_adapters": normal(2, 4),
        "of_slices": normal(2, 2, OUTPUTS),
    }


# From arrays, integers of some dtype and an implementation; in the rows of `index` an entry is none, or beyond.
OPS: dict[str, Callable[[dict[str, jax.Array], Any, str | None], Any]] = {
    "block_topk": lambda a, _, how: block_topk(a["w"], 3, implementation=how).values,
    "block_topk of columns": lambda a, _, how: block_topk(a["w"], 20, axis=-2, implementation=how).values,
    "gradient_topk": lambda a, _, how: gradient_topk(a["x"], a["dy"], 5, implementation=how).values,
    "sampled_matmul": lambda a, i, how: sampled_matmul(a["x"], a["dy"], i([5, 1]), i([0, 6]), implementation=how),
    "sampled_matmul of outputs": lambda a, i, how: sampled_matmul(a["x"], a["dy"], i([[5] * 7]), implementation=how),
    "gather_matmul": lambda a, i, how: gather_matmul(
        a["x"], i([100, -1, 0, 90]), a["values"], OUTPUTS, implementation=how
    ),
    "gather_matmul of outputs": lambda a, i, how: gather_matmul(
        a["x"], i([[3] * 7, [120] * 7]), a["of_outputs"], implementation=how
    ),
    "adapter_matmul": lambda a, i, how: adapter_matmul(
        a["x"], i([1, -1, 0]), i([[0, -1, 99, 5], [8, 3, 2, 1]]), a["of_adapters"], OUTPUTS, implementation=how
    ),
    "adapter_slices_matmul": lambda a, i, how: adapter_slices_matmul(
        a["x"], i([1, -1, 0]), i([[0, 3], [9, 8]]), a["of_slices"], implementation=how
    ),
    "scatter_add_unique": lambda a, i, how: scatter_add_unique(
        a["w"], i([3, -1, 9, 77]), a["values"], implementation=how
    ),
    "scatter_unique": lambda a, i, how: scatter_unique(a["w"], i([3, -1, 9, 77]), a["values"], implementation=how),
}


def integers(dtype: str) -> Callable[[list[Any]], jax.Array]:
    return lambda numbers: jnp.asarray(numbers, dtype)


@pytest.mark.parametrize("name", OPS)
def test_width_of_integers_changes_nothing(name: str, rng: np.random.Generator) -> None:
    given, op = arguments(rng), OPS[name]
    exact = jax.jit(lambda a: op(a, integers("int32"), "xla"))(given)
    for how in ROUTES:
        narrow = jax.jit(lambda a, how=how: op(a, integers("int8"), how))(given)
        np.testing.assert_allclose(narrow, exact, rtol=1e-5, atol=1e-5)
    with jax.enable_x64(True):
        # What runs nowhere here is traced all the same.
        wide = jax.jit(lambda a: op(a, integers("int64"), None))(given)
        assert wide.dtype == exact.dtype
        np.testing.assert_allclose(wide, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_derivatives_are_those_of_plain_xla(name: str, rng: np.random.Generator) -> None:
    given, op = arguments(rng), OPS[name]

    def slopes(how: str | None) -> Any:
        return jax.jit(jax.grad(lambda a: jnp.sum(jnp.sin(op(a, integers("int32"), how)))))(given)

    exact = slopes("xla")
    assert any(bool(jnp.any(leaf)) for leaf in jax.tree.leaves(exact))
    for how in (None, "pallas"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), slopes(how), exact)


@pytest.mark.parametrize("how", ROUTES)
def test_of_nothing_comes_nothing(how: str) -> None:
    none, index = jnp.zeros((0, 5)), jnp.zeros((1, 4), jnp.int32)
    assert gather_matmul(none, index, jnp.ones((1, 4)), implementation=how).shape == (0, 4)
    assert gather_matmul(none, index[0], jnp.ones(4), 3, implementation=how).shape == (0, 3)
    assert not gather_matmul(jnp.ones((2, 5)), index[:0], jnp.ones((0, 4)), implementation=how).any()
    assert not sampled_matmul(none, none, index[0], index[0], implementation=how).any()
    assert adapter_matmul(none, index[0, :0], index[None], jnp.ones((1, 1, 4)), implementation=how).shape == (0, 4)
    np.testing.assert_array_equal(gradient_topk(none, none, 2).values, 0)


def test_more_entries_than_an_index_can_count_are_refused() -> None:
    wide = jax.ShapeDtypeStruct((2, 70_000), jnp.float32)
    with pytest.raises(ValueError, match=r"at most 2147418112 entries, .* got 70000 \* 70000"):
        jax.eval_shape(lambda x, dy: gradient_topk(x, dy, 3), wide, wide)
    with pytest.raises(ValueError, match="flat indices are int32"):
        jax.eval_shape(lambda a: block_topk(a, 3), jax.ShapeDtypeStruct((70_000, 70_000), jnp.float32))
