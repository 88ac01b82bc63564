"""A small model that is divided over a mesh of eight devices, virtual ones where there are fewer."""

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
from jaxsparse.engine.sharding import row_parts
from jaxsparse.models.functional import LanguageModel
from tests.models.small import LLAMA, random_params, random_rows

DEVICES = 8
AXES = ("data", "fsdp", "tensor")
MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
# No two sizes are alike, so that a shape in the compiled program tells what it is. Rows have a prime number of tokens,
# which divides no size of a weight.
TOKENS = 11
CONFIG = dataclasses.replace(
    LLAMA, hidden_size=96, intermediate_size=160, num_heads=8, num_kv_heads=8, head_dim=16, vocab_size=80, num_layers=2
)
KERNELS = {"q_proj": (96, 128), "k_proj": (96, 128), "v_proj": (96, 128), "o_proj": (128, 96)}
SEVEN = [js.Target(rf"layers/{part}/.*_proj/kernel", stack_axes=(0,)) for part in ("self_attn", "mlp")]
METHODS = {
    "gasdu": lambda: js.gasdu(optax.adam(1e-2), density=0.02, refresh_every=2),
    "neuroada": lambda: js.neuroada(optax.adam(1e-2), k=1, targets=SEVEN),
    "s2ft": lambda: js.s2ft(optax.adam(1e-2), head_size=16, output=0.3, down=0.3),
    "paca": lambda: js.paca(optax.adam(1e-2), rank=4),
    "full": lambda: js.full(optax.sgd(0.1)),
    "saft": lambda: saft(),
}
needs_devices = pytest.mark.skipif(jax.device_count() < DEVICES, reason=f"needs {DEVICES} devices; see the last test")
has_devices = pytest.mark.skipif(jax.device_count() >= DEVICES, reason="there are devices enough")


def saft():
    """A support over all targets, which leaves some matrices without any slot."""
    params = random_params(LanguageModel(CONFIG), np.random.default_rng(1), jnp.float64)
    rows = random_rows(np.random.default_rng(3), 16, TOKENS)
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
        rows = random_rows(self.rng, 16, TOKENS)
        return rows if self.sharding is None else jax.device_put(rows, self.sharding.of_batch(rows))

    def steps(self, count):
        losses = []
        for _ in range(count):
            self.state, metrics = self.tuner.step(self.state, self.batch())
            losses.append(float(metrics.loss))
        return losses

    def supports(self):
        return [np.sort(np.asarray(leaf), axis=1) for leaf in jax.tree.leaves(self.state.method.support)]


def passes_on_virtual_devices(file):
    """Runs a file of tests in a process that has eight devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={DEVICES}"
    environment = {**os.environ, "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-n", "0", file]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"\d\d passed, 1 skipped", done.stdout), done.stdout[-500:]
