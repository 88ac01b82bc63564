"""Small bases and tuned models for the tests of deltas."""

from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.deltas import Delta

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
        for name in ("shape", "dtype", "base_checksum", "tuned_checksum"):
            assert getattr(ours, name) == getattr(theirs, name), path
        for name in ("indices", "xor"):
            assert getattr(ours, name).dtype == getattr(theirs, name).dtype
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name), err_msg=path)
