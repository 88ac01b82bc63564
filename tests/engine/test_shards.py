"""Followed weights inside `jax.shard_map`, whole on every device or divided between devices.

Here on as many devices as there are, one as a rule; the last test runs this file on four virtual ones.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsparse as js
from jaxsparse.engine.slotted import UnsupportedUseError
from tests.engine.test_flax_layers import assert_slots_have_its_entries, random_support

DEVICES = 4
# A weight (layers, in, heads, width of a head), and which of its axes are divided.
TARGET = js.Target("w", stack_axes=(0,), in_axes=(1,))
DIVIDED = {
    "nowhere": P(),
    "inputs": P(None, "model"),
    "outputs": P(None, None, "model"),
    "outputs, within heads": P(None, None, None, "model"),
    "layers": P("model"),
}
ENTRIES = js.subspaces.Coordinates(js.subspaces.Budget(density=0.3))
SLICES = [js.subspaces.Slices(2), js.subspaces.Slices(3, axis="output")]


def loss_of(where: str, check_vma: bool = True) -> Any:
    """A loss whose batch is divided over one axis of a mesh, and whose weight over the other."""
    across = 2 if jax.device_count() >= DEVICES else 1
    mesh = jax.make_mesh((across, across), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    spec = DIVIDED[where]

    def shard(w: jax.Array, x: jax.Array) -> jax.Array:
        y = jnp.einsum("lti,lihd->lthd", x, w)
        return jax.lax.psum(y, "model") if where == "inputs" else y

    inputs = {"inputs": P(None, "data", "model"), "layers": P("model", "data")}.get(where, P(None, "data"))
    outputs = {"inputs": P(None, "data"), "nowhere": P(None, "data"), "layers": P("model", "data")}.get(
        where, P(None, "data", *tuple(spec)[2:])
    )
    mapped = jax.shard_map(shard, mesh=mesh, in_specs=(spec, inputs), out_specs=outputs, check_vma=check_vma)
    return lambda params, x: jnp.sum(jnp.sin(mapped(params["w"], x)) ** 2)


def problem(rng: np.random.Generator) -> tuple[Any, Any]:
    w, x = rng.normal(size=(2, 6, 2, 4)), rng.normal(size=(2, 4, 6))
    return {"w": jnp.asarray(w, jnp.float32)}, jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("where", DIVIDED if jax.device_count() >= DEVICES else ["outputs"])
def test_slots_have_the_dense_gradient_s_entries(where: str, check_vma: bool, rng: np.random.Generator) -> None:
    params, x = problem(rng)
    size = js.select.Score("|W|", lambda entries: jnp.abs(entries.weight), needs=("weight",))
    # Many entries are read tile by tile in a loop, which does not say what varies: they need check_vma=False.
    subspaces = SLICES if check_vma else [ENTRIES, *SLICES]
    methods = [
        random_support(js.subspace_descent(optax.sgd(1.0), subspace=subspace, score=size, targets=TARGET), params, rng)
        for subspace in subspaces
    ]
    assert_slots_have_its_entries(methods, params, loss_of(where, check_vma), x, 1e-6)


def test_what_devices_cannot_tell_alone_is_an_error(rng: np.random.Generator) -> None:
    params, x = problem(rng)
    picking = js.gasdu(optax.sgd(1.0), density=0.3, targets=TARGET)
    blocks = random_support(js.smt(optax.sgd(1.0), blocks=2, size=3, scope="matrix", targets=TARGET), params, rng)
    with pytest.raises(UnsupportedUseError, match=r"weight w through several products .* picked by the gradient"):
        assert_slots_have_its_entries([picking], params, loss_of("nowhere"), x, 1e-6)
    with pytest.raises(UnsupportedUseError, match=r"weight w through jax.shard_map, which divides BlockSlots"):
        assert_slots_have_its_entries([blocks], params, loss_of("inputs"), x, 1e-6)


@pytest.mark.skipif(jax.device_count() >= DEVICES, reason="this is the run on several devices")
def test_all_of_this_holds_on_several_devices() -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", __file__]
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
