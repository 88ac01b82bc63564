"""On every backend, the largest entries of x.T @ dy are those of the dense product in double precision."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from jaxsparse.kernels.gradient_topk import pallas_gpu, pallas_tpu
from jaxsparse.kernels.gradient_topk.op import GradientTopK, gradient_topk

from experiments.shapes import SMALL, Small

# Backends, by name: the op with a `k`.
BACKENDS: dict[str, Callable[..., GradientTopK]] = {
    "xla": partial(gradient_topk, implementation="xla"),
    "gpu": partial(gradient_topk, implementation="pallas"),
    "tpu": partial(pallas_tpu.gradient_topk_tpu, interpret=True, cut=pallas_tpu.Tiling(128, 128, 64)),
}
# The kernels with few candidates and small tiles, so that few numbers have many tiles and answers need a second look.
FEW: dict[str, Callable[..., GradientTopK]] = {
    "gpu": partial(
        pallas_gpu.gradient_topk_gpu, interpret=True, count=4, cut=pallas_gpu.Tiling(16, 16, 16, warps=4, stages=2)
    ),
    "tpu": partial(pallas_tpu.gradient_topk_tpu, interpret=True, count=4, cut=pallas_tpu.Tiling(16, 16, 16)),
}
MANY = 800
"""These look a second time at arguments with a k of so many at least."""
ALL = {**BACKENDS, **{f"{name}, few candidates": backend for name, backend in FEW.items()}}


def exact(x: np.ndarray, dy: np.ndarray, k: int) -> GradientTopK:
    """The same in double precision, from the dense product."""
    with np.errstate(invalid="ignore"):
        product = x.astype(np.float64).T @ dy.astype(np.float64)
        flat = product.reshape(-1)
        size = np.where(np.isnan(flat), np.inf, np.minimum(np.abs(flat), np.finfo(float).max))
        best = np.argsort(-size, kind="stable")[:k]
        return GradientTopK(best // dy.shape[1], best % dy.shape[1], flat[best], np.sum(product**2))


def check(found: GradientTopK, x: np.ndarray, dy: np.ndarray, k: int) -> None:
    expected = exact(x, dy, k)
    np.testing.assert_array_equal(found.rows, expected.rows)
    np.testing.assert_array_equal(found.columns, expected.columns)
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_allclose(found.squared_norm, expected.squared_norm, rtol=1e-5)


@pytest.mark.parametrize(
    ("backend", "case"),
    [(backend, case) for backend in ALL for case in SMALL if backend in BACKENDS or case.k >= MANY],
    ids=str,
)
def test_entries_order_and_norm_are_those_of_the_dense_product(
    backend: str, case: Small, rng: np.random.Generator
) -> None:
    x, dy = case.arrays(rng)
    check(jax.jit(partial(ALL[backend], k=case.k))(x, dy), x, dy, case.k)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtypes", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_sums_are_accurate_to_float32(backend: str, dtypes: tuple[str, str], rng: np.random.Generator) -> None:
    x, dy = (
        rng.normal(size=(300, width)).astype(jnp.dtype(dtype)) for width, dtype in zip((70, 90), dtypes, strict=True)
    )
    found = jax.jit(partial(BACKENDS[backend], k=100))(x, dy)
    product = x.astype(np.float64).T @ dy.astype(np.float64)
    np.testing.assert_allclose(found.values, product[found.rows, found.columns], rtol=1e-4)
    np.testing.assert_allclose(np.abs(found.values), np.abs(exact(x, dy, 100).values), rtol=1e-4)
    np.testing.assert_allclose(found.squared_norm, np.sum(product**2), rtol=1e-5)


@pytest.mark.parametrize("backend", FEW)
def test_one_tile_may_hold_the_whole_answer(backend: str, rng: np.random.Generator) -> None:
    """The second look: a tile's candidates are fewer than its entries of the answer, in one tile or in some."""
    function = jax.jit(FEW[backend], static_argnames="k")
    x, dy = rng.integers(-9, 10, (20, 50)).astype(np.float32), rng.integers(-9, 10, (20, 40)).astype(np.float32)
    x[:, 17:22] *= 100
    dy[:, 33:] *= 100
    for k in (5, 100):
        check(function(x, dy, k=k), x, dy, k)


@pytest.mark.parametrize("backend", ALL)
def test_layers_may_be_mapped_over(backend: str, rng: np.random.Generator) -> None:
    case = Small(6, 20, 40, 30)
    layers = [case.arrays(rng) for _ in range(3)]
    layers[1][0][:, :5] *= 100  # in one layer the answer lies in one tile
    stacked = jax.jit(jax.vmap(partial(ALL[backend], k=case.k)))(
        *(np.stack(each) for each in zip(*layers, strict=True))
    )
    for number, layer in enumerate(layers):
        check(GradientTopK(*(field[number] for field in stacked)), *layer, case.k)


@pytest.mark.parametrize("backend", ALL)
def test_inside_scan_and_remat(backend: str, rng: np.random.Generator) -> None:
    case = Small(6, 20, 40, 30)
    layers = [case.arrays(rng) for _ in range(2)]

    @jax.jit
    def scanned(x: jax.Array, dy: jax.Array) -> Any:
        body = jax.checkpoint(lambda carry, layer: (carry, ALL[backend](*layer, k=case.k)))
        return jax.lax.scan(body, 0, (x, dy))[1]

    stacked = scanned(*(np.stack(each) for each in zip(*layers, strict=True)))
    for number, layer in enumerate(layers):
        check(GradientTopK(*(field[number] for field in stacked)), *layer, case.k)


@pytest.mark.parametrize("backend", ALL)
def test_inside_shard_map(backend: str, rng: np.random.Generator) -> None:
    """Every device finds the best of its outputs: x is whole, dy is a part."""
    case = Small(6, 20, 40, 30)
    x, dy = case.arrays(rng)
    mesh = jax.make_mesh((1,), ("outputs",), axis_types=(jax.sharding.AxisType.Auto,))

    def of_device(x: jax.Array, dy: jax.Array) -> GradientTopK:
        return jax.tree.map(lambda field: field[None], ALL[backend](x, dy, k=case.k))

    # Pallas's interpreter knows nothing of what varies over which devices.
    split = PartitionSpec("outputs")
    sharded = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(None, "outputs")),
        out_specs=split,
        check_vma=False,
    )
    check(GradientTopK(*(field[0] for field in jax.jit(sharded)(x, dy))), x, dy, case.k)


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_padding_does_not_spoil_the_norm(implementation: str) -> None:
    """What fills up the last tile is zeros, and zero times infinity is no number."""
    x, dy = jnp.ones((2, 7)), jnp.ones((2, 5)).at[0, 3].set(jnp.inf)
    assert gradient_topk(x, dy, 1, implementation=implementation).squared_norm == jnp.inf


def test_what_does_not_fit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # which users do not have on
    x, dy = jnp.ones((2, 3)), jnp.ones((2, 4))
    with pytest.raises(ValueError, match=r"same tokens, got shapes \(2, 3\) and \(1, 4\)"):
        gradient_topk(x, dy[:1], 1)
    for k in (0, 13):
        with pytest.raises(ValueError, match=rf"between 1 and 3 \* 4, got {k}"):
            gradient_topk(x, dy, k)
    with pytest.raises(ValueError, match="cannot take this: a score of your own; try implementation='xla'"):
        gradient_topk(x, dy, 1, score=lambda tile, first: tile, implementation="pallas")
    with (
        jax.enable_x64(True),
        pytest.raises(ValueError, match="cannot take this: x of float64; try implementation='xla'"),
    ):
        gradient_topk(x.astype(jnp.float64), dy, 1, implementation="pallas")
    with pytest.raises(ValueError, match="must be None, 'xla' or 'pallas', got 'triton'"):
        gradient_topk(x, dy, 1, implementation="triton")  # type: ignore[arg-type]
