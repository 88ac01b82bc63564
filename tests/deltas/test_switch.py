"""Switching between deltas: the same bits as reverting and applying, in place, or nothing at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsparse.common.errors import InputError
from jaxsparse.deltas import apply, bits, diff, live, revert, switch
from jaxsparse.subspaces.targets import matrix_view
from tests.deltas.models import assert_same_bits, changed, mixed_pair, on_device, random_bits, with_factors


def tuned_models(rng, dtype="bfloat16"):
    """A base and three tuned models with deltas: coordinates, slices, both; overlapping."""
    base = {"q": random_bits(rng, (30, 20), dtype), "down": random_bits(rng, (2, 16, 10), dtype), "s": np.ones(5)}
    base["s"] = base["s"].astype(base["q"].dtype)
    view = matrix_view((2, 16, 10), (0,), (1,), (2,))
    tuned = []
    for number in range(3):
        one = {name: leaf.copy() for name, leaf in base.items()}
        if number != 1:
            one["q"] = changed(rng, one["q"], 200)
        if number != 0:
            own = np.ascontiguousarray(one["down"][:, 2 * number : 2 * number + 3])
            one["down"][:, 2 * number : 2 * number + 3] = changed(rng, own, own.size)
        tuned.append(one)
    return base, tuned, [diff(base, one, slices={"down": view}) for one in tuned]


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["bfloat16", "float16", "float32"]), st.booleans(), st.booleans())
def test_switching_gives_the_bits_of_the_other_model(seed, dtype, donate, as_numpy):
    _, tuned, deltas = tuned_models(np.random.default_rng(seed), dtype)
    place = (lambda tree: jax.tree.map(np.array, tree)) if as_numpy else on_device
    for off in range(3):
        for on in range(3):
            params = place(tuned[off])
            assert_same_bits(switch(params, deltas[off], deltas[on], donate=donate), tuned[on])
            if not donate:
                assert_same_bits(params, tuned[off])


def test_switching_writes_in_place(rng):
    _, tuned, deltas = tuned_models(rng)
    params = on_device(tuned[0])
    places = {name: leaf.unsafe_buffer_pointer() for name, leaf in params.items()}
    for on in (1, 2, 0):
        params = switch(params, deltas[(on - 1) % 3], deltas[on], donate=True)
        assert {name: leaf.unsafe_buffer_pointer() for name, leaf in params.items()} == places


def test_a_wrong_switch_writes_nothing(rng):
    base, tuned, deltas = tuned_models(rng)
    params = on_device(tuned[0])
    with pytest.raises(InputError, match=r"another base|not applied"):
        switch(params, deltas[1], deltas[2])
    foreign = {name: changed(rng, leaf, leaf.size) for name, leaf in base.items()}
    other = diff(foreign, {name: changed(rng, leaf, 3) for name, leaf in foreign.items()})
    with pytest.raises(InputError, match="belongs to another base"):
        switch(params, deltas[0], other)
    assert_same_bits(params, tuned[0])


@pytest.mark.parametrize("donate", [False, True])
def test_factors_switch_by_way_of_the_base(rng, donate):
    base, tuned, delta = mixed_pair(rng)
    q = {"layers/q/kernel": jnp.asarray(changed(rng, np.asarray(base["layers/q/kernel"]), 5))}
    other = diff(base, base | q)
    there = switch(jax.tree.map(jnp.copy, tuned), delta, other, base=base, donate=donate)
    assert_same_bits(there, base | q)
    assert_same_bits(switch(there, other, delta, donate=donate), tuned)
    with pytest.raises(InputError, match="give base="):
        switch(tuned, delta, other)


def walk(base, tuned, deltas):
    names = ["a", "b", "c"]
    model = live(on_device(base), dict(zip(names, deltas, strict=True)))
    for name in ["a", "c", "b", None, "b", "b", "a", None]:
        model = model.switch(name)
        assert model.current == name
        assert_same_bits(model.params, base if name is None else tuned[names.index(name)])
    return model


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_live_model_walks_between_deltas(rng, dtype):
    walk(*tuned_models(rng, dtype))


def test_a_live_model_on_an_accelerator(rng, monkeypatch):
    """The same by XLA's scatter, as where the weights are not in the host's memory."""
    monkeypatch.setattr(bits, "in_host_memory", lambda array: isinstance(array, np.ndarray))
    walk(*tuned_models(rng))


def test_a_live_model_writes_in_place_and_copies_what_it_was_given(rng):
    base, _, deltas = tuned_models(rng)
    given_base = on_device(base)
    model = live(given_base, {"a": deltas[0], "b": deltas[1]})
    places = {name: leaf.unsafe_buffer_pointer() for name, leaf in model.params.items()}
    for name in ("a", "b", None):
        model = model.switch(name)
        assert {name: leaf.unsafe_buffer_pointer() for name, leaf in model.params.items()} == places
    assert_same_bits(given_base, base)


def test_a_live_model_refuses_what_it_cannot_take(rng):
    base, tuned, deltas = tuned_models(rng)
    with pytest.raises(InputError, match="there is no delta 'z'; there are 'a'"):
        live(on_device(base), {"a": deltas[0]}).switch("z")
    with pytest.raises(InputError, match=r"applied already|another base"):
        live(on_device(tuned[0]), {"a": deltas[0]})
    with pytest.raises(InputError, match="NumPy array"):
        live(base, {"a": deltas[0]})
    low = {"w": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)}
    factors = {"w": with_factors(rng, low["w"], matrix_view((6, 4), (), (0,), (1,)))}
    with pytest.raises(InputError, match="delta 'a' keeps factors of tensor w"):
        live(low, {"a": diff(low, low, factors=factors)})


def test_a_switch_is_a_revert_and_an_apply(rng):
    _, tuned, deltas = tuned_models(rng)
    expected = apply(revert(on_device(tuned[2]), deltas[2]), deltas[0])
    assert_same_bits(switch(on_device(tuned[2]), deltas[2], deltas[0], donate=True), expected)


def test_donating_spares_the_base(rng):
    base = {"a": jnp.zeros(3), "b": jnp.zeros(3)}
    one = diff(base, {**base, "a": jnp.ones(3)})
    two = diff(base, {**base, "b": jnp.full(3, 7.0)})
    for kind in (jnp.asarray, np.asarray):
        own = jax.tree.map(kind, base)
        there = switch(apply(own, one), one, two, base=own, donate=True)
        np.testing.assert_array_equal(there["b"], np.full(3, 7.0))
        np.testing.assert_array_equal(own["b"], np.zeros(3))
    view = matrix_view((4, 3), (), (0,), (1,))
    base = {name: jnp.asarray(rng.normal(size=(4, 3)), jnp.float32) for name in "wz"}
    pair = [diff(base, base, factors={name: with_factors(rng, base[name], view)}) for name in "wz"]
    params = apply(base, pair[0])
    for off in (0, 1, 0):
        params = switch(params, pair[off], pair[1 - off], base=base, donate=True)
    assert_same_bits(params, apply(base, pair[1]))


def test_live_takes_tied_weights_and_scalars():
    shared = jnp.zeros(4)
    base = {"a": shared, "b": shared, "s": jnp.float32(1)}
    tuned = {"a": jnp.ones(4), "b": jnp.full(4, 2.0), "s": jnp.float32(3)}
    delta = diff(base, tuned)
    model = live(base, {"x": delta}, donate=True).switch("x")
    assert_same_bits(model.params, tuned)
    np.testing.assert_array_equal(model.switch(None).params["s"], 1.0)
