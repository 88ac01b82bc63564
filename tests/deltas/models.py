"""Small bases and tuned models for the tests of deltas."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.deltas import Delta, FactorDelta, diff
from jaxsparse.deltas.merge import factor_delta, merge_factors
from jaxsparse.subspaces.targets import MatrixView, matrix_view

DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2", "int8", "int32")
}


def bits(array: Any) -> np.ndarray:
    """Returns the bit patterns of a tensor as unsigned integers."""
    host = np.asarray(array)
    return host.reshape(-1).view(f"uint{8 * host.itemsize}").reshape(host.shape)


def random_bits(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Returns a tensor of random bit patterns: NaNs of all kinds, infinities, subnormals and -0.0 among them."""
    size = int(np.prod(shape)) * DTYPES[dtype].itemsize
    return np.frombuffer(rng.bytes(size), DTYPES[dtype]).reshape(shape).copy()


def changed(rng: np.random.Generator, array: np.ndarray, entries: int) -> np.ndarray:
    """Returns a copy in which so many entries, drawn at random, have other bits."""
    result = array.copy()
    flat = result.reshape(-1).view(f"uint{8 * array.itemsize}")
    where = rng.choice(flat.size, entries, replace=False)
    flat[where] ^= rng.integers(1, 2 ** min(8 * array.itemsize, 63), entries, dtype=np.uint64).astype(flat.dtype)
    return result


def tuned_slightly(rng: np.random.Generator, array: np.ndarray, entries: int) -> np.ndarray:
    """Returns a copy in which so many entries moved as fine-tuning moves them: by some 5e-4."""
    result = array.copy()
    flat = result.reshape(-1)
    where = rng.choice(flat.size, entries, replace=False)
    flat[where] = (flat[where].astype(np.float32) + rng.normal(size=entries) * 5e-4).astype(array.dtype)
    return result


def small_pair(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns a base and a tuned model of three changed tensors and one that does not change, on the device."""
    shapes = {
        "layers": {"q_proj": {"kernel": ((3, 40, 24), "bfloat16")}, "norm": {"scale": ((3, 40), "float32")}},
        "head": {"kernel": ((24, 50), "float16")},
    }
    base: dict[str, Any] = {"embed": random_bits(rng, (50, 24), "bfloat16")}
    tuned: dict[str, Any] = {"embed": base["embed"].copy()}
    for path, (shape, dtype) in (
        (path, leaf) for path, leaf in flatten_with_paths(shapes, is_leaf=lambda x: isinstance(x, tuple))[0]
    ):
        *parents, last = path.split("/")
        left, right = base, tuned
        for parent in parents:
            left, right = left.setdefault(parent, {}), right.setdefault(parent, {})
        left[last] = random_bits(rng, shape, dtype)
        right[last] = changed(rng, left[last], left[last].size // 10)
    return on_device(base), on_device(tuned)


def with_factors(
    rng: np.random.Generator, base: Any, view: MatrixView, *, rank: int = 2, gain: bool = False
) -> FactorDelta:
    """Returns the delta of one tensor that moves by a random product of factors, and maybe a gain."""
    a = rng.normal(size=(view.stack, view.in_size, rank)).astype(np.float32)
    b = rng.normal(size=(view.stack, rank, view.out_size)).astype(np.float32)
    g = rng.uniform(0.5, 2, (view.stack, view.out_size)).astype(np.float32) if gain else None
    return factor_delta(base, view, a, b, 0.5, g)


def mixed_pair(rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any], Delta]:
    """Returns a base, a tuned model, and the delta between them, with tensors of every kind; on the device."""
    shapes: dict[str, tuple[tuple[int, ...], str]] = {
        "layers/q/kernel": ((3, 16, 8), "bfloat16"),
        "layers/down/kernel": ((3, 12, 10), "bfloat16"),
        "layers/up/kernel": ((3, 10, 12), "float32"),
        "head/kernel": ((8, 14), "float16"),
        "out/kernel": ((6, 4, 5), "float32"),
        "low/kernel": ((9, 7), "bfloat16"),
        "dora/kernel": ((2, 6, 8), "float32"),
        "norm/scale": ((8,), "float32"),
    }
    flat = {path: rng.normal(size=shape).astype(DTYPES[dtype]) for path, (shape, dtype) in shapes.items()}
    tuned = {path: leaf.copy() for path, leaf in flat.items()}
    tuned["layers/q/kernel"] = changed(rng, tuned["layers/q/kernel"], 20)
    tuned["head/kernel"] = changed(rng, tuned["head/kernel"], 9)
    for layer in range(3):
        for path, axis in (("layers/down/kernel", 0), ("layers/up/kernel", 1)):
            own = rng.choice(flat[path].shape[1 + axis], 2, replace=False)
            index = (layer, own) if axis == 0 else (layer, slice(None), own)
            tuned[path][index] = changed(rng, np.ascontiguousarray(tuned[path][index]), tuned[path][index].size)
    heads = np.ascontiguousarray(tuned["out/kernel"][:, 1])
    tuned["out/kernel"][:, 1] = changed(rng, heads, heads.size)
    views = {
        "layers/down/kernel": matrix_view((3, 12, 10), (0,), (1,), (2,)),
        "layers/up/kernel": matrix_view((3, 10, 12), (0,), (1,), (2,)),
        "out/kernel": matrix_view((6, 4, 5), (), (1, 2), (0,)),
    }
    factors = {
        "low/kernel": with_factors(rng, flat["low/kernel"], matrix_view((9, 7), (), (0,), (1,))),
        "dora/kernel": with_factors(rng, flat["dora/kernel"], matrix_view((2, 6, 8), (0,), (1,), (2,)), gain=True),
    }
    for path, tensor in factors.items():
        tuned[path] = np.array(merge_factors(tensor.view, flat[path], tensor.a, tensor.b, tensor.scale, tensor.gain))
    delta = diff(flat, tuned, slices=views, factors=factors, method="mixed", base_name="tiny")
    return on_device(flat), on_device(tuned), delta


def on_device(tree: Any) -> Any:
    """Returns the tree with JAX arrays for leaves."""
    return {key: on_device(leaf) if isinstance(leaf, dict) else jnp.asarray(leaf) for key, leaf in tree.items()}


def assert_same_bits(left: Any, right: Any) -> None:
    """Fails unless both trees have the same paths, shapes, dtypes and bits."""
    ours, theirs = dict(flatten_with_paths(left)[0]), dict(flatten_with_paths(right)[0])
    assert ours.keys() == theirs.keys()
    for path, leaf in ours.items():
        assert leaf.dtype == theirs[path].dtype, path
        np.testing.assert_array_equal(bits(leaf), bits(theirs[path]), err_msg=path)


def assert_same_delta(left: Delta, right: Delta) -> None:
    """Fails unless both deltas are the same, metadata included."""
    assert left.metadata.as_dict() == right.metadata.as_dict()
    assert left.tensors.keys() == right.tensors.keys()
    for path, ours in left.tensors.items():
        theirs = right.tensors[path]
        assert type(ours) is type(theirs), path
        for name, value in vars(ours).items():
            other = getattr(theirs, name)
            if isinstance(value, np.ndarray):
                assert value.dtype == other.dtype, (path, name)
                np.testing.assert_array_equal(value, other, err_msg=f"{path} {name}")
            else:
                assert value == other, (path, name)
