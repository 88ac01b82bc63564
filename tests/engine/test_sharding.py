"""Weights divided over a mesh: the trajectory of one device, and each shard's own picks.

The tests need eight devices: where there are fewer, the last one runs this file on eight virtual ones.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse.common.errors import InputError
from jaxsparse.common.paths import flatten_with_paths
from tests.engine.divided import (
    AXES,
    KERNELS,
    MESHES,
    METHODS,
    Run,
    has_devices,
    mesh_of,
    needs_devices,
    passes_on_virtual_devices,
    specs,
)


@pytest.fixture(scope="module", autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@needs_devices
@pytest.mark.parametrize(
    ("name", "shape"),
    [*(("gasdu", shape) for shape in MESHES), *((name, MESHES[3]) for name in METHODS if name != "gasdu")],
)
def test_a_mesh_follows_one_device(name, shape):
    alone, divided = Run(METHODS[name]()), Run(METHODS[name](), shape)
    np.testing.assert_allclose(divided.steps(5), alone.steps(5), rtol=1e-6)
    for ours, theirs in zip(divided.supports(), alone.supports(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    before = jax.tree.leaves(alone.params)
    pairs = zip(before, jax.tree.leaves(divided.state.params), jax.tree.leaves(alone.state.params), strict=True)
    for old, ours, theirs in pairs:
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(np.asarray(ours) == old, np.asarray(theirs) == old)


@needs_devices
@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 2, 2), (1, 4, 2)], ids=str)
def test_every_shard_picks_the_largest_entries_of_its_own(shape):
    run = Run(METHODS["gasdu"](), shape, "per_shard")
    rows = Run(METHODS["gasdu"]()).batch()
    gradient = jax.jit(jax.grad(lambda params: run.model.loss(params, rows)[0]))(run.params)
    run.state, metrics = run.tuner.step(run.state, run.batch())
    found = dict(flatten_with_paths(run.state.method.support)[0])
    kept = whole = 0.0
    for path, dense in flatten_with_paths(gradient)[0]:
        name = path.split("/")[-2]
        if name not in KERNELS:
            continue
        inputs, outputs = KERNELS[name]
        support, axis, shards = np.asarray(found[path]), 0 if name == "o_proj" else 1, shape[2]
        per_shard = round(0.02 * inputs * outputs) // shards
        assert support.shape == (2, per_shard * shards)
        for layer, matrix in enumerate(np.asarray(dense)):
            expected = []
            for flat in np.split(np.arange(inputs * outputs).reshape(inputs, outputs), shards, axis=axis):
                own = matrix.reshape(-1)[flat.reshape(-1)]
                expected.append(flat.reshape(-1)[np.argsort(-np.abs(own), kind="stable")[:per_shard]])
            np.testing.assert_array_equal(
                np.sort(support[layer].reshape(shards, -1)), np.sort(np.stack(expected)), err_msg=f"{path} {layer}"
            )
            kept += np.sum(matrix.reshape(-1)[support[layer]] ** 2)
            whole += np.sum(matrix**2)
    np.testing.assert_allclose(float(metrics.retention), kept / whole, rtol=1e-6)


@needs_devices
def test_shards_own_their_slots_through_refreshes_and_micro_batches():
    run = Run(METHODS["gasdu"](), (2, 2, 2), "per_shard", accumulate=2)
    losses = run.steps(6)
    assert np.all(np.isfinite(losses))
    changed = {
        path: np.argwhere(np.asarray(new) != np.asarray(old))
        for (path, new), old in zip(flatten_with_paths(run.state.params)[0], jax.tree.leaves(run.params), strict=True)
    }
    assert {path for path, where in changed.items() if where.size} == {
        f"layers/self_attn/{name}/kernel" for name in KERNELS
    }
    for path, where in changed.items():
        support = dict(flatten_with_paths(run.state.method.support)[0]).get(path)
        if support is not None:
            outputs = KERNELS[path.split("/")[-2]][1]
            moved = {(layer, row * outputs + column) for layer, row, column in where.tolist()}
            now = {(layer, int(index)) for layer, own in enumerate(np.asarray(support)) for index in own}
            # Three refreshes: what moved is at least the last support, and at most three of them.
            assert now <= moved
            assert len(moved) <= 3 * len(now)


@needs_devices
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_bytes_on_a_device_fall_as_the_mesh_says(shape):
    run = Run(METHODS["gasdu"](), shape, "per_shard", jnp.bfloat16)
    run.steps(2)
    for path, leaf in flatten_with_paths(run.state.params)[0]:
        axes = [axis for axis in specs(path) if axis]
        parts = np.prod([dict(zip(AXES, shape, strict=True))[axis] for axis in axes])
        assert leaf.addressable_shards[0].data.nbytes * parts == leaf.nbytes, path
    slots = [
        leaf
        for tree in (run.state.method.support, run.state.method.master, run.state.method.inner)
        for leaf in jax.tree.leaves(tree)
        if leaf.ndim == 2
    ]
    assert len(slots) == 4 * 4  # index, master and two moments of four targets
    for leaf in slots:
        assert leaf.addressable_shards[0].data.nbytes * shape[2] == leaf.nbytes


@needs_devices
@pytest.mark.parametrize("shape", MESHES[1:], ids=str)
def test_the_state_of_whole_weights_is_divided_as_they_are(shape):
    run = Run(js.full(optax.adam(1e-2)), shape, "per_shard", jnp.bfloat16)
    run.steps(2)
    sizes = dict(zip(AXES, shape, strict=True))
    checked = 0
    for tree in (run.state.method.master, run.state.method.inner):
        for path, leaf in flatten_with_paths(tree)[0]:
            name = re.search(r"(layers/|embed_tokens/|lm_head/).*(kernel|embedding)$", path)
            if name:
                parts = np.prod([sizes[axis] for axis in specs(name[0]) if axis])
                assert leaf.addressable_shards[0].data.nbytes * parts == leaf.nbytes, path
                checked += 1
    assert checked == 3 * (7 + 2)  # masters and two moments, of seven kernels, embedding and head


@needs_devices
def test_a_step_is_compiled_once():
    run = Run(METHODS["gasdu"](), (2, 2, 2), "per_shard", jnp.bfloat16)
    run.steps(3)
    assert run.tuner.step._cache_size() == 1


@needs_devices
def test_what_cannot_be_divided_is_an_error():
    mesh = mesh_of((2, 2, 2))
    with pytest.raises(InputError, match="'rows', but the mesh's axes are data, fsdp, tensor"):
        js.Sharding(mesh, specs, rows=("rows",))
    with pytest.raises(InputError, match="an axis of 7, which 2 devices cannot share equally"):
        js.Sharding(mesh, lambda path: P("tensor")).of({"w": jnp.ones(7)})
    with pytest.raises(InputError, match="'model', which the mesh does not have"):
        js.Sharding(mesh, lambda path: P("model")).of({"w": jnp.ones(8)})
    with pytest.raises(InputError, match="fewer axes than its PartitionSpec"):
        js.Sharding(mesh, lambda path: P(None, "data")).of({"w": jnp.ones(8)})
    with pytest.raises(InputError, match="a batch of 6 rows cannot be shared by 4 devices"):
        js.Sharding(mesh, specs).of_batch({"x": jnp.ones((6, 2))})
    params = {"w": jnp.ones((8, 8))}
    few = js.gasdu(optax.sgd(1.0), density=1 / 64, targets="w")
    sharding = js.Sharding(mesh, lambda path: P(None, "tensor"))
    with pytest.raises(InputError, match="1 slots a matrix, fewer than the 2 shards"):
        js.fuse(lambda p, x: jnp.sum(x @ p["w"]), few, sharding=sharding).init(params)
    layers = js.gasdu(optax.sgd(1.0), density=0.5, targets=[js.Target("w", stack_axes=(0,))])
    with pytest.raises(InputError, match="divided along its layers"):
        js.fuse(lambda p, x: jnp.sum(x @ p["w"][0]), layers, sharding=js.Sharding(mesh, lambda path: P("data"))).init(
            {"w": jnp.ones((2, 8, 8))}
        )
    with pytest.raises(InputError, match="lora cannot be told how to divide its state yet"):
        js.fuse(lambda p, x: jnp.sum(x @ p["w"]), js.lora(optax.sgd(1.0), rank=2, targets="w"), sharding=sharding)


@pytest.mark.slow
@has_devices
def test_on_eight_virtual_devices():
    passes_on_virtual_devices(__file__)
