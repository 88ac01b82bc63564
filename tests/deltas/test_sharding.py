"""Deltas on sharded models: eight virtual devices need a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from jaxsparse.deltas import apply, bits, diff, revert
from tests.deltas.models import assert_same_bits, changed, random_bits

rng = np.random.default_rng()
specs = {"a": P("x", None, "y"), "b": P(None, ("x", "y")), "c": P(), "d": P("y"), "e": P(None, "x")}
shapes = {"a": (4, 6, 16), "b": (5, 24), "c": (7, 3), "d": (8,), "e": (3, 20)}
dtypes = {"a": "bfloat16", "b": "float16", "c": "float32", "d": "bfloat16", "e": "float32"}
for kind in (AxisType.Auto, AxisType.Explicit):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))
    host = {name: random_bits(rng, shapes[name], dtypes[name]) for name in shapes}
    host_tuned = {name: changed(rng, leaf, max(1, leaf.size // 5)) for name, leaf in host.items()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    base, tuned = jax.device_put(host, shardings), jax.device_put(host_tuned, shardings)
    delta = diff(base, tuned)
    assert delta.entries == diff(host, host_tuned).entries == diff(base, host_tuned).entries
    for donate in (False, True):
        there = apply(jax.device_put(host, shardings), delta, donate=donate)
        assert_same_bits(there, host_tuned)
        back = revert(there, delta, donate=donate)
        assert_same_bits(back, host)
        for name, sharding in shardings.items():
            assert there[name].sharding == back[name].sharding == sharding, name
    for name in "abe":
        indices = delta.tensors[name].indices
        levels = bits._levels(indices, shapes[name])
        values = np.zeros(levels[0].size, delta.tensors[name].xor.dtype)
        scatter = bits._compiled("scatter", shapes[name], shardings[name], False)
        text = scatter.lower(base[name], levels, values, np.int32(indices.size)).compile().as_text()
        assert not re.search("all-gather|all-reduce|all-to-all|collective-permute", text), name
print("exact on", len(jax.devices()), "devices")
"""


def test_sharded_models_are_exact_keep_their_shardings_and_move_no_weight():
    root = Path(__file__).parents[2]
    environment = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exact on 8 devices" in done.stdout
