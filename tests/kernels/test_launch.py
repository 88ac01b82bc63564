"""Which route an op takes by the device that is here."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jaxsparse.kernels import block_topk, launch


@pytest.mark.parametrize(("capability", "by_kernel"), [("7.5", False), ("8.0", True), ("9.0", True), (None, True)])
def test_gpus_that_triton_refuses_take_plain_xla(monkeypatch, rng, capability, by_kernel):
    device = SimpleNamespace() if capability is None else SimpleNamespace(compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(launch, "_is_older_gpu", launch._is_older_gpu.__wrapped__)
    matrix = jnp.asarray(rng.normal(size=(64, 48)), jnp.float32)
    # The routes of all devices are traced wherever a program runs; this op has no kernel for TPUs.
    traced = str(jax.make_jaxpr(lambda matrix: block_topk(matrix, 5))(matrix))
    assert ("pallas_call" in traced) == by_kernel
