"""What tuners say that they changed: applied to the base it gives the tuner's own parameters, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.common.errors import InputError
from jaxsparse.common.fingerprints import fingerprint
from jaxsparse.deltas import CoordinateDelta, FactorDelta, SliceDelta
from tests.deltas.models import assert_same_bits

TARGETS = [js.Target(r"layers/.*/kernel", stack_axes=(0,))]
ADAM = optax.adam(1e-2)
KINDS = {
    "gasdu": (lambda: js.gasdu(ADAM, density=0.1, refresh_every=2, targets=TARGETS), CoordinateDelta),
    "neuroada": (lambda: js.neuroada(ADAM, k=1, targets=TARGETS), CoordinateDelta),
    "unmerged": (lambda: js.neuroada(ADAM, k=1, targets=TARGETS, unmerged=True), CoordinateDelta),
    "paca": (lambda: js.paca(ADAM, rank=2, targets=TARGETS), SliceDelta),
    "c3la": (
        lambda: js.c3la(optax.scale_by_adam(), rank=1, chain_every=2, learning_rate=1e-2, targets=TARGETS),
        SliceDelta,
    ),
    "full": (lambda: js.full(ADAM), CoordinateDelta),
    "lora": (lambda: js.lora(ADAM, rank=2, targets=TARGETS), FactorDelta),
    "dora": (lambda: js.dora(ADAM, rank=2, targets=TARGETS), FactorDelta),
    "cola": (
        lambda: js.cola(optax.scale_by_adam(), rank=2, chain_every=2, learning_rate=1e-2, targets=TARGETS),
        CoordinateDelta,
    ),
}


def loss_fn(params, batch):
    def layer(x, weights):
        return jnp.tanh(x @ weights["up"]["kernel"]) @ weights["down"]["kernel"], None

    return jnp.mean(jax.lax.scan(layer, batch, params["layers"])[0] ** 2)


def model(rng, dtype):
    shapes = {"up": (3, 16, 12), "down": (3, 12, 16)}
    return {"layers": {n: {"kernel": jnp.asarray(rng.normal(size=s), dtype)} for n, s in shapes.items()}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", KINDS)
def test_base_and_delta_are_the_tuned_model(rng, name, dtype):
    make, kind = KINDS[name]
    base = model(rng, dtype)
    tuner = js.fuse(loss_fn, make())
    state = tuner.init(base)
    for _ in range(4):
        state, _ = tuner.step(state, jnp.asarray(rng.normal(size=(8, 16)), dtype))
    tuned = tuner.params(state)
    delta = tuner.delta(state, base, options={"rank": 2}, base_name="small")
    assert {type(tensor) for tensor in delta.tensors.values()} == {kind}
    assert_same_bits(js.deltas.apply(base, delta), tuned)
    assert_same_bits(js.deltas.revert(tuned, delta, base=base), base)
    about = delta.metadata
    assert (about.method, about.step, about.base_name) == (tuner.description.name, 4, "small")
    assert about.base_fingerprint == fingerprint(base)
    assert 0 < about.budget <= 1


@pytest.mark.parametrize("name", ["gasdu", "paca", "lora"])
def test_the_reference_engine_says_it_too(rng, name):
    make, kind = KINDS[name]
    base = model(rng, "float32")
    tuner = js.ReferenceTuner(lambda params, batch: (loss_fn(params, batch), {"tokens": jnp.float32(1)}), make())
    state = tuner.init(base)
    for _ in range(3):
        state, _ = tuner.step(state, jnp.asarray(rng.normal(size=(8, 16)), jnp.float32))
    delta = tuner.delta(state, base)
    assert_same_bits(js.deltas.apply(base, delta), tuner.params(state))
    expected = CoordinateDelta if name == "lora" else kind
    assert {type(tensor) for tensor in delta.tensors.values()} == {expected}


def test_factors_need_no_base_and_refuse_another(rng):
    base = model(rng, "float32")
    tuner = js.fuse(loss_fn, KINDS["lora"][0]())
    state = tuner.init(base)
    state, _ = tuner.step(state, jnp.asarray(rng.normal(size=(8, 16)), jnp.float32))
    assert_same_bits(js.deltas.apply(base, tuner.delta(state)), tuner.params(state))
    with pytest.raises(InputError, match="belong to another base"):
        tuner.delta(state, model(rng, "float32"))


def test_weights_trained_in_place_need_their_base(rng):
    tuner = js.fuse(loss_fn, KINDS["gasdu"][0]())
    with pytest.raises(InputError, match=r"gasdu writes what it learns into the weights: give delta\(state, base\)"):
        tuner.delta(tuner.init(model(rng, "float32")))


def test_heads_of_s2ft_are_kept_as_slices(rng):
    base = model(rng, "bfloat16")
    method = js.subspace_descent(
        ADAM,
        subspace=js.subspaces.Slices(count=2, group=4),
        score=js.select.RANDOM,
        targets=TARGETS,
    )
    tuner = js.fuse(loss_fn, method)
    state = tuner.init(base)
    state, _ = tuner.step(state, jnp.asarray(rng.normal(size=(8, 16)), jnp.bfloat16))
    delta = tuner.delta(state, base)
    assert {tensor.slices.shape for tensor in delta.tensors.values()} == {(3, 8)}
    assert_same_bits(js.deltas.apply(base, delta), tuner.params(state))
    assert np.all(np.diff(delta.tensors["layers/up/kernel"].slices.reshape(3, 2, 4), axis=2) == 1)
