"""Promises of the reference engine that do not depend on the method."""

from typing import Any

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse as js
from jaxsparse.common.paths import flatten_with_paths


def bits(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


DTYPES = st.sampled_from([jnp.float16, jnp.bfloat16, jnp.float32])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 7), st.integers(1, 9)),
    density=st.floats(0.01, 1.0),
    period=st.integers(1, 4),
    dtype=DTYPES,
)
def test_frozen_weights_keep_their_bits(seed: int, shape: tuple, density: float, period: int, dtype: Any) -> None:
    """Negative zeros included; and no more entries move than k times the refreshes."""
    rng = np.random.default_rng(seed)
    params = {
        "layers": {"kernel": jnp.asarray(rng.normal(size=shape), dtype)},
        "norm": jnp.array([-0.0, 0.0, 1.5], dtype),
    }
    params["layers"]["kernel"] = params["layers"]["kernel"].at[:, 0].set(-0.0)
    tx = js.gasdu(
        optax.adam(0.3), density=density, refresh_every=period, targets=js.Target("layers/kernel", stack_axes=(0,))
    )
    state, update, current, touched = tx.init(params), jax.jit(tx.update), params, set()
    for _ in range(5):
        gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), params)
        updates, state = update(gradients, state, current)
        current = optax.apply_updates(current, updates)
        touched |= {(i, int(j)) for i, row in enumerate(state.support["layers"]["kernel"]) for j in row}
    np.testing.assert_array_equal(bits(current["norm"]), bits(params["norm"]))
    changed = bits(current["layers"]["kernel"]) != bits(params["layers"]["kernel"])
    changed = {(int(i), int(j)) for i, j in np.argwhere(changed.reshape(shape[0], -1))}
    assert changed <= touched
    k = state.support["layers"]["kernel"].shape[-1]
    assert len(changed) <= shape[0] * k * int(state.progress.refreshes)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_weights_land_on_the_rounded_master(dtype: Any, rng: np.random.Generator) -> None:
    """1000 small steps move a bf16 weight by what float32 gives, to one unit in the last place."""
    start = jnp.asarray(rng.uniform(0.01, 0.03, size=(4, 4)), dtype)
    gradient = {"kernel": jnp.asarray(rng.choice([-1.0, 1.0], size=(4, 4)), dtype)}

    def train(slots_dtype: Any) -> jax.Array:
        tx = js.fixed_mask(optax.sgd(1e-5), density=1.0, targets=".*", slots_dtype=slots_dtype)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"kernel": start}
        return jax.jit(lambda c: jax.lax.scan(step, c, length=1000))((params, tx.init(params)))[0][0]["kernel"]

    wanted = np.float32(start) - 1e-2 * np.float32(gradient["kernel"])
    ulp = np.abs(np.float32(jnp.nextafter(start, jnp.full_like(start, jnp.inf))) - np.float32(start))
    assert np.all(np.abs(np.float32(train("promote")) - wanted) <= 2 * ulp)
    if dtype == jnp.bfloat16:
        np.testing.assert_array_equal(train(None), start)  # without masters every step is rounded away


def test_masters_follow_their_coordinates_and_adopt_foreign_changes(rng: np.random.Generator) -> None:
    start = {"kernel": jnp.asarray(rng.uniform(1, 2, size=(3, 4)), jnp.bfloat16)}
    tx = js.gasdu(optax.sgd(1e-4), density=0.5, refresh_every=1, targets=".*")
    gradient = jnp.arange(12.0, dtype=jnp.bfloat16).reshape(3, 4)
    state, update = tx.init(start), jax.jit(tx.update)
    _, state = update({"kernel": gradient}, state, start)
    before = dict(zip(np.ravel(state.support["kernel"]), np.ravel(state.master["kernel"]), strict=True))
    _, state = update({"kernel": gradient[::-1]}, state, start)
    after = dict(zip(np.ravel(state.support["kernel"]), np.ravel(state.master["kernel"]), strict=True))
    stayed = set(before) & set(after)
    assert 0 < len(stayed) < len(after)
    flat = np.ravel(np.float32(start["kernel"]))
    steps = np.ravel(np.float32(gradient[::-1])) * np.float32(1e-4)
    for coordinate in after:
        base = before[coordinate] if coordinate in stayed else flat[coordinate]
        assert after[coordinate] == pytest.approx(base - steps[coordinate], abs=1e-7)
    foreign = {"kernel": start["kernel"] + 1}
    updates, state = update({"kernel": gradient[::-1]}, state, foreign)
    moved = optax.apply_updates(foreign, updates)["kernel"]
    np.testing.assert_allclose(np.float32(moved), np.float32(foreign["kernel"]), atol=1e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_count(
    bad: float, dtype: Any, rng: np.random.Generator
) -> None:
    params = {"kernel": jnp.asarray(rng.normal(size=(4, 5)), dtype)}
    tx = js.gasdu(optax.adam(0.1), density=0.2, refresh_every=2, targets=".*")
    good = {"kernel": jnp.asarray(rng.normal(size=(4, 5)), dtype)}
    spoiled = {"kernel": good["kernel"].at[2, 3].set(bad)}
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(good, state, params)
        params = optax.apply_updates(params, updates)
    updates, after = update(spoiled, state, params)  # a refresh is due
    np.testing.assert_array_equal(bits(optax.apply_updates(params, updates)["kernel"]), bits(params["kernel"]))
    assert int(after.progress.skipped) == 1
    restored = after._replace(progress=after.progress._replace(skipped=state.progress.skipped))
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    _, after = update(good, after, params)  # the refresh is made up for
    assert int(after.progress.last_refresh) == 2


class Mlp(linen.Module):
    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return linen.Dense(3, name="down")(jnp.tanh(linen.Dense(8, name="up")(x)))


class NnxMlp(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.up, self.down = nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jnp.tanh(self.up(x)))


def test_linen_nnx_and_plain_trees_train_alike(rng: np.random.Generator) -> None:
    x, y = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), jnp.asarray(rng.normal(size=(6, 3)), jnp.float32)
    linen_model, nnx_model = Mlp(), NnxMlp(nnx.Rngs(int(rng.integers(2**31))))
    graph, nnx_state = nnx.split(nnx_model, nnx.Param)
    plain = nnx.to_pure_dict(nnx_state)

    def make() -> Any:
        return js.gasdu(optax.adam(0.05), density=0.2, refresh_every=2, targets=r"(.*/)?(up|down)/kernel")

    def train(params: Any, apply: Any) -> list[tuple[str, Any]]:
        tx = make()
        state, update = tx.init(params), jax.jit(tx.update)
        gradient = jax.jit(jax.grad(lambda params: jnp.mean((apply(params) - y) ** 2)))
        for _ in range(5):
            updates, state = update(gradient(params), state, params)
            params = optax.apply_updates(params, updates)
        return flatten_with_paths(params)[0]

    results = [
        train(plain, lambda params: nnx.merge(graph, params)(x)),
        train(nnx_state, lambda params: nnx.merge(graph, params)(x)),
        train({"params": plain}, lambda params: linen_model.apply(params, x)),
    ]
    optimizer = nnx.Optimizer(nnx_model, make(), wrt=nnx.Param)  # init sees Variables, update sees plain arrays
    for _ in range(5):
        gradients = nnx.grad(lambda model: jnp.mean((model(x) - y) ** 2))(nnx_model)
        optimizer.update(nnx_model, gradients)
    results.append(flatten_with_paths(nnx.state(nnx_model, nnx.Param))[0])
    for result in results[1:]:
        for (path, leaf), (other_path, other) in zip(results[0], result, strict=True):
            assert other_path.removeprefix("params/") == path
            np.testing.assert_allclose(leaf, other, rtol=1e-5, atol=1e-6)
    assert any(np.any(leaf != start) for (_, leaf), start in zip(results[0], jax.tree.leaves(plain), strict=True))


def test_scan_and_vmap_equal_a_python_loop(rng: np.random.Generator) -> None:
    tx = js.gasdu(optax.adam(0.1), density=0.3, refresh_every=2, targets=".*")
    params = {"kernel": jnp.asarray(rng.normal(size=(3, 4, 5)), jnp.float32)}  # three independent runs
    gradients = {"kernel": jnp.asarray(rng.normal(size=(6, 3, 4, 5)), jnp.float32)}

    def step(carry: Any, gradient: Any) -> Any:
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    def scanned(params: Any, gradients: Any) -> Any:
        return jax.lax.scan(step, (params, tx.init(params)), gradients)[0]

    batched, _ = jax.vmap(scanned, in_axes=(0, 1))(params, gradients)
    one_step = jax.jit(step)
    for run in range(3):
        alone = {"kernel": params["kernel"][run]}
        carry = (alone, tx.init(alone))
        for gradient in gradients["kernel"]:
            carry, _ = one_step(carry, {"kernel": gradient[run]})
        np.testing.assert_allclose(batched["kernel"][run], carry[0]["kernel"], rtol=1e-5, atol=1e-6)


def test_axes_of_dense_general_kernels_make_one_matrix(rng: np.random.Generator) -> None:
    """A kernel (layers, in, heads, head_dim) trains like its two-dimensional layers."""
    kernel = jnp.asarray(rng.normal(size=(2, 6, 3, 4)), jnp.float32)
    gradient = jnp.asarray(rng.normal(size=(2, 6, 3, 4)), jnp.float32)

    def update(params: Any, gradients: Any, target: js.Target) -> Any:
        tx = js.gasdu(optax.sgd(1.0), density=0.1, targets=[target])
        return tx.update(gradients, tx.init(params), params)[0]

    folded = update({"k": kernel}, {"k": gradient}, js.Target("k", in_axes=(1,), out_axes=(2, 3), stack_axes=(0,)))["k"]
    flat = update({"k": kernel.reshape(2, 6, 12)}, {"k": gradient.reshape(2, 6, 12)}, js.Target("k", stack_axes=(0,)))[
        "k"
    ]
    np.testing.assert_array_equal(folded.reshape(2, 6, 12), flat)
    output_first = update(
        {"k": kernel[0].transpose(1, 2, 0)}, {"k": gradient[0].transpose(1, 2, 0)}, js.Target("k", (2,), (0, 1))
    )["k"]
    np.testing.assert_array_equal(output_first.transpose(2, 0, 1), folded[0])


def test_without_inner_optimizer_it_masks_in_a_chain(rng: np.random.Generator) -> None:
    params = {"kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32), "bias": jnp.ones(5)}
    gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), params)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0), js.gasdu(density=0.2, refresh_every=5, targets="kernel"), optax.sgd(0.1)
    )
    updates, state = tx.update(gradients, tx.init(params), params)
    norm = optax.tree.norm(gradients)  # a clip outside clips the dense gradient
    chosen = np.argsort(-np.abs(gradients["kernel"]).ravel())[:6]
    expected = np.zeros(30, np.float32)
    expected[chosen] = -0.1 * np.ravel(gradients["kernel"])[chosen] / max(norm, 1)
    np.testing.assert_allclose(np.ravel(updates["kernel"]), expected, rtol=1e-5)
    assert not np.any(updates["bias"])
    assert float(optax.tree.get(state, "retention")) > 0


def test_parameters_are_asked_for_when_needed(rng: np.random.Generator) -> None:
    params = {"kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
    tx = js.gasdu(optax.sgd(0.1), density=0.2, targets=".*")
    with pytest.raises(ValueError, match="gasdu with an inner optimizer"):
        tx.update(params, tx.init(params))


def test_retention_of_huge_and_of_spoiled_gradients(rng: np.random.Generator) -> None:
    gradient = jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)
    tx = js.gasdu(density=0.25, refresh_every=9, targets=".*")
    _, state = tx.update({"k": gradient}, tx.init({"k": gradient}))
    _, huge = tx.update({"k": gradient * 1e25}, tx.init({"k": gradient}))
    assert float(huge.progress.retention) == pytest.approx(float(state.progress.retention), rel=1e-5)
    outside = next(i for i in range(20) if i not in np.asarray(state.support["k"]))
    _, spoiled = tx.update({"k": gradient.at[outside // 5, outside % 5].set(jnp.nan)}, state)
    assert np.isnan(spoiled.progress.retention)  # not "all retained"
    assert int(spoiled.progress.skipped) == 0


def test_an_infinite_step_of_the_inner_optimizer_is_skipped(rng: np.random.Generator) -> None:
    params = {"k": jnp.asarray(rng.normal(size=(4, 5)), jnp.float32)}
    tx = js.gasdu(optax.scale(1e39), density=0.25, targets=".*")
    updates, state = tx.update(jax.tree.map(lambda p: p * 1e3, params), tx.init(params), params)
    assert int(state.progress.skipped) == 1
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["k"], params["k"])
