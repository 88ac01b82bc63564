"""Weights divided over a mesh: the trajectory of one device, each shard's own picks, and what devices tell each other.

The tests need eight devices: where there are fewer, the last one runs this file on eight virtual ones.
"""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse.common.errors import InputError
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.engine.sharding import row_parts
from jaxsparse.models.functional import LanguageModel
from tests.engine.collectives import messages
from tests.models.small import LLAMA, random_params, random_rows

DEVICES = 8
AXES = ("data", "fsdp", "tensor")
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
# No two sizes are alike, so that a shape in the compiled program tells what it is.
CONFIG = dataclasses.replace(
    LLAMA, hidden_size=96, intermediate_size=160, num_heads=8, num_kv_heads=8, head_dim=16, vocab_size=80, num_layers=2
)
KERNELS = {"q_proj": (96, 128), "k_proj": (96, 128), "v_proj": (96, 128), "o_proj": (128, 96)}
SEVEN = [js.Target(rf"layers/{part}/.*_proj/kernel", stack_axes=(0,)) for part in ("self_attn", "mlp")]
METHODS = {
    "gasdu": lambda: js.gasdu(optax.adam(1e-2), density=0.02, refresh_every=2),
    "neuroada": lambda: js.neuroada(optax.adam(1e-2), k=1, targets=SEVEN),
    "s2ft": lambda: js.s2ft(optax.adam(1e-2), head_size=16, output=0.3, down=0.3),
    "full": lambda: js.full(optax.sgd(0.1)),
    "saft": lambda: saft(),
}
needs_devices = pytest.mark.skipif(jax.device_count() < DEVICES, reason=f"needs {DEVICES} devices; see the last test")


def saft():
    """A support over all targets, which leaves some matrices without any slot."""
    params = random_params(LanguageModel(CONFIG), np.random.default_rng(1), jnp.float64)
    rows = random_rows(np.random.default_rng(3), 16, 11)
    method = js.saft(optax.adam(1e-2), density=1e-4)
    support = js.calibrate(lambda params, batch: LanguageModel(CONFIG).loss(params, batch)[0], params, [rows], method)
    return js.with_support(method, support)


def specs(path):
    """How a parameter of the model is divided."""
    name = path.split("/")[-2]
    if name in ("o_proj", "down_proj"):
        return P(None, "tensor", "fsdp")
    if name.endswith("_proj"):
        return P(None, "fsdp", "tensor")
    return {"embed_tokens": P("tensor", "fsdp"), "lm_head": P("fsdp", "tensor")}.get(name, P())


def mesh_of(shape):
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3)


class Run:
    """A method on a model that is divided over a mesh, or on one device."""

    def __init__(self, method, shape=None, selection="global", dtype=jnp.float64, accumulate=1, remat="none"):
        self.sharding = None if shape is None else js.Sharding(mesh_of(shape), specs, selection=selection)
        self.model = LanguageModel(CONFIG, remat, row_parts=row_parts(None if shape is None else self.sharding))
        self.params = random_params(self.model, np.random.default_rng(1), dtype)
        self.tuner = js.fuse(self.model.loss, method, has_aux=True, accumulate=accumulate, sharding=self.sharding)
        self.state, self.rng = self.tuner.init(self.params), np.random.default_rng(2)

    def batch(self):
        rows = random_rows(self.rng, 16, 11)
        return rows if self.sharding is None else jax.device_put(rows, self.sharding.of_batch(rows))

    def steps(self, count):
        losses = []
        for _ in range(count):
            self.state, metrics = self.tuner.step(self.state, self.batch())
            losses.append(float(metrics.loss))
        return losses

    def supports(self):
        return [np.sort(np.asarray(leaf), axis=1) for leaf in jax.tree.leaves(self.state.method.support)]


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


def compiled(run):
    return messages(run.tuner.step.lower(run.state, run.batch()).compile().as_text())


def parts_of_targets(shape, *, by_tensor=True):
    """The shapes that a target or its part on a device has, sorted; without `by_tensor` only those that are whole along
    the axis that tensor shards divide."""
    _, fsdp, tensor = shape
    kernels = {(96, 128): "opens", (128, 96): "closes", (96, 160): "opens", (160, 96): "closes"}
    found = set()
    for (inputs, outputs), kind in kernels.items():
        whole, divided = (inputs, outputs) if kind == "opens" else (outputs, inputs)
        for one in {whole, whole // fsdp}:
            for other in {divided, divided // tensor} if by_tensor else {divided}:
                found.add(tuple(sorted((one, other))))
    return found


def dense(sent, shapes, *kinds):
    return {each for each in sent if each.kind in kinds and tuple(sorted(each.shape[-2:])) in shapes}


SUMS = ("all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")


@needs_devices
def test_every_message_is_seen():
    """Of each kind of operation, and of operations on several arrays."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def sent(function, *shapes):
        arrays = [jnp.ones(shape, jnp.float32) for shape in shapes]
        parts = tuple(P("x") for _ in shapes)
        mapped = jax.shard_map(function, mesh=mesh, in_specs=parts, out_specs=P("x"), check_vma=False)
        return {(m.kind, m.shape) for m in messages(jax.jit(mapped).lower(*arrays).compile().as_text())}

    several = sent(lambda a, b: sum(map(jnp.sum, jax.lax.psum((a * a, b + 1), "x")))[None], (8, 3), (8, 5))
    assert {("all-reduce", (1, 3)), ("all-reduce", (1, 5))} <= several
    assert ("all-gather", (8, 7)) in sent(lambda a: jax.lax.all_gather(a[0], "x"), (8, 7))
    assert ("reduce-scatter", (1, 7)) in sent(lambda a: jax.lax.psum_scatter(a, "x", tiled=True), (64, 7))
    assert "all-to-all" in {kind for kind, _ in sent(lambda a: jax.lax.all_to_all(a, "x", 1, 1, tiled=True), (8, 16))}
    ring = [(at, (at + 1) % 8) for at in range(8)]
    assert ("collective-permute", (1, 7)) in sent(lambda a: jax.lax.ppermute(a, "x", ring), (8, 7))
    alone = [[at] for at in range(8)]
    assert not sent(lambda a: jax.lax.psum(a, "x", axis_index_groups=alone), (8, 7))


@needs_devices
@pytest.mark.parametrize(
    ("name", "selection", "shape"),
    [
        *(("gasdu", "global", shape) for shape in MESHES),
        *((name, "per_shard", shape) for name in ("gasdu", "neuroada", "s2ft") for shape in MESHES[2:]),
    ],
)
def test_no_dense_gradient_and_under_tensor_sharding_no_whole_target_travels(name, selection, shape):
    run = Run(METHODS[name](), shape, selection)
    sent = compiled(run)
    assert sent
    # Gradients are floating-point numbers. Bits are of S²FT's slots: a head has as many rows as an eighth of a target.
    sums = [each for each in sent if each.dtype.startswith(("f", "bf"))]
    assert not dense(sums, parts_of_targets(shape), *SUMS)
    if shape[2] > 1:
        assert not dense(sent, parts_of_targets(shape, by_tensor=False), "all-gather")


@needs_devices
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_the_dense_gradients_of_full_fine_tuning_are_seen(shape):
    """What the test above looks for, where it is: summed over the devices that share the rows."""
    assert dense(compiled(Run(js.full(optax.adam(1e-2)), shape)), parts_of_targets(shape), *SUMS)


@needs_devices
def test_the_weights_that_fsdp_gathers_are_seen():
    sent = compiled(Run(METHODS["gasdu"](), (1, 8, 1)))
    assert dense(sent, parts_of_targets((1, 8, 1), by_tensor=False), "all-gather")


@needs_devices
def test_selection_by_shards_tells_nobody_what_it_picks():
    """Only sums travel: those of the products' activations, which tensor sharding takes, and of single numbers."""
    sent = compiled(Run(METHODS["gasdu"](), (1, 1, 8), "per_shard"))
    assert {each.kind for each in sent} == {"all-reduce"}
    larger = {int(np.prod(each.shape)) for each in sent if np.prod(each.shape) > CONFIG.num_layers * len(KERNELS)}
    assert larger == {16 * 11, 16 * 11 * CONFIG.hidden_size}, sent


@needs_devices
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)], ids=str)
def test_under_full_remat_every_device_attends_to_its_own_rows_alone(shape):
    alone, divided = Run(METHODS["gasdu"](), remat="full"), Run(METHODS["gasdu"](), shape, remat="full")
    np.testing.assert_allclose(divided.steps(3), alone.steps(3), rtol=1e-6)
    batch, heads = divided.batch(), CONFIG.num_heads
    of_all_rows = rf"\[16,1,11,{heads // shape[2]},{CONFIG.head_dim}\]"
    text = divided.tuner.step.lower(divided.state, batch).compile().as_text()
    assert not re.search(of_all_rows, text)
    # A model that is not told of the devices gathers them: the test sees what it looks for.
    untold = js.fuse(LanguageModel(CONFIG, "full").loss, METHODS["gasdu"](), has_aux=True, sharding=divided.sharding)
    assert re.search(of_all_rows, untold.step.lower(divided.state, batch).compile().as_text())


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


@pytest.mark.skipif(jax.device_count() >= DEVICES, reason="there are devices enough")
def test_on_eight_virtual_devices():
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", __file__]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"\d\d passed, 1 skipped", done.stdout), done.stdout[-500:]
