"""What becomes of an inner optimizer's state when the support moves."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse as js
from jaxsparse.engine.places import Moved
from jaxsparse.select.carry import carry_inner_state
from jaxsparse.subspaces.units import follow


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), stack=st.integers(1, 3), k=st.integers(1, 12), size=st.integers(12, 40))
def test_values_stay_with_their_coordinate(seed: int, stack: int, k: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    old, new = (np.stack([rng.permutation(size)[:k] for _ in range(stack)]).astype(np.int32) for _ in range(2))
    values = rng.normal(size=(stack, k)).astype(np.float32)
    followed = follow(jnp.asarray(values), jnp.asarray(old), jnp.asarray(new), -7.0)
    for row in range(stack):
        owner = dict(zip(old[row], values[row], strict=True))
        np.testing.assert_array_equal(followed[row], [owner.get(c, np.float32(-7.0)) for c in new[row]])


@pytest.mark.parametrize(
    "inner",
    [
        optax.adam(0.1),
        optax.chain(optax.clip(1.0), optax.adagrad(0.1)),
        optax.sgd(0.1, momentum=0.9),
        optax.partition({"fast": optax.adam(0.1), "slow": optax.sgd(0.1)}, lambda slots: {"a": "fast", "b": "slow"}),
    ],
)
def test_each_carry_keeps_what_it_says(inner: optax.GradientTransformation, rng: np.random.Generator) -> None:
    slots = {"a": jnp.zeros((1, 3)), "b": optax.MaskedNode()}
    old = {"a": jnp.array([[4, 7, 1]], jnp.int32), "b": optax.MaskedNode()}
    new = {"a": jnp.array([[7, 2, 4]], jnp.int32), "b": optax.MaskedNode()}
    _, state = inner.update({**slots, "a": jnp.asarray(rng.normal(size=(1, 3)), jnp.float32)}, inner.init(slots), slots)

    def moments(state: object) -> list[np.ndarray]:
        found: list[np.ndarray] = []
        optax.tree.map_params(inner, lambda leaf: found.append(np.asarray(leaf)) or leaf, state)
        return found

    before, fresh = moments(state), moments(inner.init(slots))
    moved = jax.tree.map(lambda old, new: Moved(lambda values, newcomer: follow(values, old, new, newcomer)), old, new)
    after = {c: moments(carry_inner_state(c, inner, state, slots, moved)) for c in ("slot", "coordinate", "reset")}
    assert before
    for at, moment in enumerate(before):
        np.testing.assert_array_equal(after["slot"][at], moment)
        np.testing.assert_array_equal(after["reset"][at], fresh[at])
        newcomer = fresh[at][0, 1]
        np.testing.assert_array_equal(after["coordinate"][at], [[moment[0, 1], newcomer, moment[0, 0]]])


def test_an_inner_state_that_does_not_mirror_the_slots_is_refused() -> None:
    tx = js.gasdu(optax.sm3(0.1), density=0.5, carry="coordinate", targets=".*")
    params = {"a": jnp.ones((3, 4))}
    with pytest.raises(js.InputError, match="carry='coordinate' needs an inner optimizer"):
        tx.update(params, tx.init(params), params)
