"""What devices tell each other in a step of a model that is divided over a mesh.

The tests need eight devices: where there are fewer, the last one runs this file on eight virtual ones.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse.models.functional import LanguageModel
from tests.engine.collectives import branches, messages
from tests.engine.divided import (
    CONFIG,
    KERNELS,
    MESHES,
    METHODS,
    TOKENS,
    Run,
    has_devices,
    needs_devices,
    passes_on_virtual_devices,
)


@pytest.fixture(scope="module", autouse=True)
def wide():
    with jax.enable_x64(True):
        yield


@functools.cache
def compiled(name, selection, shape):
    """A method's step, as optimised HLO, with tiles of so few rows that each is smaller than a device's part."""
    run = Run(METHODS[name](), shape, selection)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxsparse.kernels.tiles.TILES", 32)
        return run.tuner.step.lower(run.state, run.batch()).compile().as_text()


SIZES = {(96, 128): "opens", (128, 96): "closes", (96, 160): "opens", (160, 96): "closes"}
SUMS = ("all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast")


def is_large(message, shape):
    """Whether an array has as many entries as the smallest target's part on a device, and is no activation."""
    _, fsdp, tensor = shape
    part = min(inputs * outputs for inputs, outputs in SIZES) // (fsdp * tensor)
    return message.entries >= part and not any(size % TOKENS == 0 for size in message.shape)


def large_sums(text, shape):
    """What may be a dense gradient, or a device's part of one, on its way.

    A step that picks anew sums the gradient over the devices that share the rows, tile by tile, and drops each: tiles
    may travel. (Each is a quarter of the product at most, and 2²² entries; `compiled` makes them smaller.) Weights are
    gathered under FSDP, which is no sum. Gradients are floating-point numbers: read entries of weights, which travel as
    integers, may be as many as a part (S²FT's heads).
    """
    sent = (each for each in messages(text) if each.kind in SUMS and each.dtype.startswith(("f", "bf")))
    return {each for each in sent if is_large(each, shape)}


def whole_gathers(text, shape):
    """Gathers of a target that make it whole along the axis that tensor shards divide."""
    fsdp, whole = shape[1], set()
    for (inputs, outputs), kind in SIZES.items():
        along, divided = (inputs, outputs) if kind == "opens" else (outputs, inputs)
        whole |= {tuple(sorted((one, divided))) for one in (along, along // fsdp)}
    return {each for each in messages(text) if each.kind == "all-gather" and tuple(sorted(each.shape[-2:])) in whole}


def sent_by(function, *shapes):
    """Of a function of arrays that are divided over eight devices, the optimised HLO."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    arrays = [jnp.ones(shape, jnp.float32) for shape in shapes]
    mapped = jax.shard_map(function, mesh=mesh, in_specs=P("x"), out_specs=P("x"), check_vma=False)
    return jax.jit(mapped).lower(*arrays).compile().as_text()


@needs_devices
def test_every_message_is_seen():
    """Of each kind of operation, and of operations on several arrays."""

    def sent(function, *shapes):
        return {(m.kind, m.shape, m.devices) for m in messages(sent_by(function, *shapes))}

    several = sent(lambda a, b: sum(map(jnp.sum, jax.lax.psum((a * a, b + 1), "x")))[None], (8, 3), (8, 5))
    assert {("all-reduce", (1, 3), 8), ("all-reduce", (1, 5), 8)} <= several
    assert ("all-gather", (8, 7), 8) in sent(lambda a: jax.lax.all_gather(a[0], "x"), (8, 7))
    assert ("reduce-scatter", (1, 7), 8) in sent(lambda a: jax.lax.psum_scatter(a, "x", tiled=True), (64, 7))
    exchanged = sent(lambda a: jax.lax.all_to_all(a, "x", 1, 1, tiled=True), (8, 16))
    assert "all-to-all" in {kind for kind, *_ in exchanged}
    ring = [(at, (at + 1) % 8) for at in range(8)]
    assert ("collective-permute", (1, 7), 2) in sent(lambda a: jax.lax.ppermute(a, "x", ring), (8, 7))
    halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ("all-reduce", (1, 7), 4) in sent(lambda a: jax.lax.psum(a, "x", axis_index_groups=halves), (8, 7))
    alone = [[at] for at in range(8)]
    assert not sent(lambda a: jax.lax.psum(a, "x", axis_index_groups=alone), (8, 7))


def test_every_form_of_a_message_is_seen():
    """Asynchronous ones, as accelerators have, and groups as lists, counts and axes of a mesh, or parts of these."""

    def sent(line):
        return messages(f"HloModule m, num_partitions=8\n  %x = {line}")

    start = "(f32[2,3]{1,0}, f32[8,3]{1,0:T(8,128)}) all-gather-start(%a), replica_groups=[2,4]<=[4,2]T(1,0), id=1"
    assert [each.shape for each in sent(start)] == [(2, 3), (8, 3)]
    assert {each.devices for each in sent(start)} == {4}
    assert not sent("f32[8,3]{1,0} all-gather-done(%x), replica_groups=[2,4]<=[8]")
    for groups, devices in (
        ("{}", 8),
        ("{{0,2},{1,3}}", 2),
        ("mesh['a'=2,'b'=4] {'b'}", 4),
        ("mesh['a'=2,'b'=4] {'a','b':(1)2}", 4),
    ):
        (found,) = sent(f"bf16[5]{{0}} reduce-scatter(%a), replica_groups={groups}, to_apply=%sum")
        assert (found.devices, found.entries) == (devices, 5 * devices)
    for groups in ("{{0},{1}}", "[8,1]<=[8]", "mesh['a'=1,'b'=8] {'a'}", "mesh['a'=1,'b'=8] {}"):
        assert not sent(f"f32[5]{{0}} all-reduce(%a), replica_groups={groups}, to_apply=%sum")


@needs_devices
def test_what_travels_in_a_branch_is_seen():
    def function(a):
        def twice(a):
            return jax.lax.fori_loop(0, 2, lambda _, a: jax.lax.psum(a * a, "x"), a)

        return jax.lax.cond(jax.lax.pmax(a[0, 0], "x") > 0, twice, lambda a: a + 1, a)

    ((otherwise, taken),) = branches(sent_by(function, (8, 7)))
    assert not otherwise
    assert {each.shape for each in taken} == {(1, 7)}


@needs_devices
@pytest.mark.parametrize(
    ("name", "selection", "shape"),
    [
        *(("gasdu", "global", shape) for shape in MESHES),
        *((name, "per_shard", shape) for name in ("gasdu", "neuroada", "s2ft") for shape in MESHES[2:]),
        ("paca", "per_shard", MESHES[3]),
    ],
)
def test_no_dense_gradient_and_under_tensor_sharding_no_whole_target_travels(name, selection, shape):
    text = compiled(name, selection, shape)
    assert messages(text)
    assert not large_sums(text, shape)
    if shape[2] > 1:
        assert not whole_gathers(text, shape)
    if shape == (8, 1, 1):  # every device has all weights: nothing needs to be gathered either
        assert not {each for each in messages(text) if is_large(each, shape)}


@needs_devices
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)], ids=str)
def test_the_dense_gradients_of_full_fine_tuning_are_seen(shape):
    """What the test above looks for, where it is: summed over the devices that share the rows."""
    assert large_sums(compiled("full", "global", shape), shape)


@needs_devices
def test_the_weights_that_fsdp_gathers_are_seen():
    assert whole_gathers(compiled("gasdu", "global", (1, 8, 1)), (1, 8, 1))


@needs_devices
def test_selection_by_shards_tells_nobody_what_it_picks():
    """Only sums travel: those of the products' activations, which tensor sharding takes, and of single numbers."""
    text = compiled("gasdu", "per_shard", (1, 1, 8))
    sent = messages(text)
    assert {each.kind for each in sent} == {"all-reduce"}
    larger = {each.entries for each in sent if each.entries > CONFIG.num_layers * len(KERNELS)}
    assert larger == {16 * TOKENS, 16 * TOKENS * CONFIG.hidden_size}, sent


@needs_devices
@pytest.mark.parametrize("selection", ["per_shard", "global"])
def test_what_picking_anew_tells_the_others(selection):
    """What a step that picks sends beyond one that does not: by shards one number for the retention; globally, where
    the test sees it, k candidates of every shard."""
    conditionals = branches(compiled("gasdu", selection, (1, 1, 8)))
    assert len(conditionals) == len(KERNELS)
    for keeps, picks in conditionals:
        if selection == "per_shard":
            assert not keeps
            assert [each.shape for each in picks] == [()]
        else:
            slots = round(0.02 * 96 * 128)
            assert sum(each.entries for each in picks) >= 2 * 8 * slots


@needs_devices
@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)], ids=str)
def test_under_full_remat_every_device_attends_to_its_own_rows_alone(shape):
    alone, divided = Run(METHODS["gasdu"](), remat="full"), Run(METHODS["gasdu"](), shape, remat="full")
    np.testing.assert_allclose(divided.steps(3), alone.steps(3), rtol=1e-6)
    batch, heads = divided.batch(), CONFIG.num_heads
    of_all_rows = rf"\[16,1,{TOKENS},{heads // shape[2]},{CONFIG.head_dim}\]"
    text = divided.tuner.step.lower(divided.state, batch).compile().as_text()
    assert not re.search(of_all_rows, text)
    # A model that is not told of the devices gathers them: the test sees what it looks for.
    untold = js.fuse(LanguageModel(CONFIG, "full").loss, METHODS["gasdu"](), has_aux=True, sharding=divided.sharding)
    assert re.search(of_all_rows, untold.step.lower(divided.state, batch).compile().as_text())


@pytest.mark.slow
@has_devices
def test_on_eight_virtual_devices():
    passes_on_virtual_devices(__file__)
