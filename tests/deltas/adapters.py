"""Adapters of every kind for a model's kernels, made without training."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.deltas import Delta, apply, diff
from jaxsparse.subspaces.targets import MatrixView, matrix_view
from tests.deltas.models import with_factors

KINDS = ("coordinates", "neurons", "input slices", "output slices", "factors", "gain", "several")


def kernels(base: Any) -> dict[str, MatrixView]:
    """Returns the views of a language model's stacked kernels by path."""
    return {
        path: matrix_view(leaf.shape, (0,), (1,), (2,))
        for path, leaf in flatten_with_paths(base)[0]
        if path.endswith("kernel") and leaf.ndim == 3
    }


def adapter(rng: np.random.Generator, kind: str, base: Any, size: float = 0.3) -> tuple[Delta, Any]:
    """Returns a delta of one kind that moves about two kernels of three, and the tuned model."""
    views = kernels(base)
    chosen = [path for path in views if rng.random() < 0.7] or list(views)[:1]
    pairs, structure = flatten_with_paths(base)
    tuned = dict(pairs)
    slices, factors = {}, {}
    for number, path in enumerate(chosen):
        view = views[path]
        own = KINDS[number % 6] if kind == "several" else kind
        if own in ("factors", "gain"):
            factors[path] = with_factors(rng, tuned[path], view, rank=int(rng.integers(1, 4)), gain=own == "gain")
            continue
        tuned[path] = jnp.asarray(_moved(rng, own, np.array(tuned[path]), size))
        if own.endswith("slices"):
            slices[path] = view
    delta = diff(base, jax.tree.unflatten(structure, tuned.values()), slices=slices, factors=factors)
    return delta, apply(base, delta)


def _moved(rng: np.random.Generator, kind: str, stack: np.ndarray, size: float) -> np.ndarray:
    for weight in stack:
        inputs, outputs = weight.shape
        if kind == "coordinates":
            entries = rng.choice(weight.size, int(rng.integers(1, weight.size // 8)), replace=False)
            weight.reshape(-1)[entries] += size * rng.normal(size=entries.size)
        elif kind == "neurons":
            rows = np.argsort(rng.random((inputs, outputs)), axis=0)[:2]
            weight[rows, np.arange(outputs)] += size * rng.normal(size=rows.shape)
        elif kind == "input slices":
            rows = rng.choice(inputs, 3, replace=False)
            weight[rows] += size * rng.normal(size=(3, outputs))
        else:
            columns = rng.choice(outputs, 3, replace=False)
            weight[:, columns] += size * rng.normal(size=(inputs, 3))
    return stack
