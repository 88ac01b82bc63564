"""Products inside `shard_map`, with its checks of what varies over devices: kernels can be traced, XLA's routes run."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from jaxsparse.kernels import (
    adapter_matmul,
    adapter_slices_matmul,
    gather_matmul,
    sampled_matmul,
    scatter_add_unique,
)

X, DY = jnp.ones((4, 6)), jnp.ones((4, 5))
INPUTS, ADAPTERS = jnp.zeros((2, 5), jnp.int32), jnp.zeros(4, jnp.int32)
VALUES, FLAT, RANGE = jnp.ones((2, 5)), jnp.arange(7), jnp.ones(7)


def gradient(*arrays: jax.Array, **options: Any) -> Any:
    def energy(values: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.sum(gather_matmul(x, *arrays[1:-1], values, **options))

    return jax.grad(energy, argnums=(0, 1))(arrays[-1], arrays[0])[0]


# What every op takes; arrays with tokens are divided between devices.
CALLS: dict[str, tuple[Callable[..., Any], tuple[jax.Array, ...]]] = {
    "pairs": (sampled_matmul, (X, DY, FLAT // 2, FLAT % 5)),
    "outputs": (sampled_matmul, (X, DY, INPUTS)),
    "neurons' gradient": (gradient, (X, INPUTS, VALUES)),
    "entries' gradient": (partial(gradient, outputs=5), (X, FLAT, RANGE)),
    "adapters": (adapter_matmul, (X, ADAPTERS, INPUTS[None], VALUES[None])),
    "adapters' entries": (partial(adapter_matmul, outputs=5), (X, ADAPTERS, FLAT[None], RANGE[None])),
    "slices": (adapter_slices_matmul, (X, ADAPTERS, INPUTS[:, :2], jnp.ones((2, 2, 5)))),
    "scatter": (scatter_add_unique, (X, FLAT, RANGE)),
}


@pytest.mark.parametrize("name", CALLS)
def test_products_know_what_varies(name: str) -> None:
    function, arrays = CALLS[name]
    mesh = Mesh(np.array(jax.devices()[:1]), ("data",))
    specs = tuple(PartitionSpec("data" if array.shape[0] == 4 else None) for array in arrays)

    def sharded(implementation: str | None) -> Any:
        def total(*arrays: jax.Array) -> jax.Array:
            return jax.lax.psum(jnp.sum(function(*arrays, implementation=implementation)), "data")

        return jax.jit(jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=PartitionSpec()))

    assert "pallas_call" in str(sharded("pallas").trace(*arrays).jaxpr)
    expected = jnp.sum(function(*arrays, implementation="xla"))
    np.testing.assert_allclose(sharded("xla")(*arrays), expected, rtol=1e-5, atol=1e-6)
