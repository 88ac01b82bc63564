"""Models from other packages, unmodified, are tuned by the fused engine as by the reference engine."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsparse as js
from jaxsparse.engine.places import leaves_of
from jaxsparse.engine.tuner import check_method

STEPS = 6
EXAMPLES = [("gemma", "gemma_linen"), ("attnax", "attnax_nnx"), ("equinox", "equinox_mlp")]


@pytest.mark.parametrize(("package", "example"), EXAMPLES)
def test_the_example_trains_as_the_reference_engine_does(package: str, example: str) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed: see the extra third-party in pyproject.toml")
    module = importlib.import_module(f"experiments.third_party.{example}")
    loss_fn, params, batch = module.start()
    fused = js.fuse(loss_fn, module.METHOD)
    reference = js.ReferenceTuner(lambda p, b: (loss_fn(p, b), {"tokens": jnp.ones(())}), module.METHOD)
    found, expected = fused.init(params), reference.init(params)
    losses: list[float] = []
    allowed = None
    for _ in range(STEPS):
        found, metrics = fused.step(found, batch)
        expected, _ = reference.step(expected, batch)
        losses.append(float(metrics.loss))
        allowed = union(allowed, freed(module.METHOD, params, found.method.support))

    assert losses[-1] < losses[0], losses
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)  # noqa: E731
    jax.tree.map(close, fused.params(found), expected.params)
    targets = {target.position: target for target in check_method(module.METHOD).description.resolve(params)}
    moved = 0
    for position, (old, new) in enumerate(zip(jax.tree.leaves(params), jax.tree.leaves(found.params), strict=True)):
        may_move = targets[position].view.weight(allowed[position]) if position in targets else 0
        assert not np.any((old != new) & (may_move == 0))
        moved += int(np.sum(old != new))
    assert 0 < moved <= sum(int(jnp.sum(mask)) for mask in allowed.values())


def freed(method: Any, params: Any, support: Any) -> dict[int, jax.Array]:
    """For every target, by position, 1 where a support frees an entry of its matrices."""
    targets = check_method(method).description.resolve(params)
    masks = {}
    for target, units in zip(targets, leaves_of(targets, support), strict=True):
        ones = jnp.ones((*units.shape, *target.subspace.shape(target.view)[2:]))
        masks[target.position] = target.subspace.scatter(target.view, units, ones, 0.0)
    return masks


def union(first: dict[int, jax.Array] | None, second: dict[int, jax.Array]) -> dict[int, jax.Array]:
    return second if first is None else {at: jnp.maximum(mask, first[at]) for at, mask in second.items()}
