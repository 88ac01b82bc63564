"""What the fused engine promises beside following the reference engine on models (test_fused_models.py)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.engine.slotted import UnsupportedUseError
from jaxsparse.engine.tuner import ReferenceTuner

TARGETS = [js.Target("layers/.*", stack_axes=(0,)), js.Target("head")]
STEPS = 8


def problem(rng: np.random.Generator, dtype: Any = jnp.float32) -> tuple[Any, Callable[..., Any], Any]:
    """Three scanned and rematerialised layers and a head, the loss, and a batch for every step."""

    def loss(params: Any, x: jax.Array) -> jax.Array:
        layer = jax.checkpoint(lambda x, w: x + jnp.tanh(x @ w["up"]) @ w["down"])
        x, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["layers"])
        return jnp.mean((x @ params["head"] - 1) ** 2)

    shapes = {"layers": {"up": (3, 8, 10), "down": (3, 10, 8)}, "head": (8, 4)}
    params = {
        "layers": {name: jnp.asarray(rng.normal(size=s) / 3, dtype) for name, s in shapes["layers"].items()},
        "head": jnp.asarray(rng.normal(size=shapes["head"]) / 3, dtype),
    }
    return params, loss, jnp.asarray(rng.normal(size=(STEPS, 6, 8)), dtype)


def reference_tuner(loss: Callable[..., Any], method: Any) -> ReferenceTuner:
    return ReferenceTuner(lambda params, batch: (loss(params, batch), {"tokens": jnp.ones(())}), method)


@pytest.mark.parametrize(
    ("name", "options"),
    [("fixed_mask", {"density": 0.1}), ("neuroada", {"k": 1}), ("paca", {"rank": 2})],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_narrow_weights_move_as_wide_ones_do(name: str, options: dict[str, Any], rng: np.random.Generator) -> None:
    """A thousand steps far below an ulp add up to what float32 weights move by; without masters they are nothing."""
    start = jnp.asarray(rng.uniform(0.02, 0.03, size=(6, 5)) * rng.choice([-1, 1], size=(6, 5)), jnp.bfloat16)
    x = jnp.asarray(rng.choice([-1, 1], size=(1, 6)), jnp.bfloat16)

    def after_a_thousand_steps(weights: jax.Array, slots_dtype: str | None) -> np.ndarray:
        method = getattr(js, name)(optax.sgd(1e-5), targets="w", slots_dtype=slots_dtype, **options)
        tuner = js.fuse(lambda params, x: jnp.sum(x.astype(params["w"].dtype) @ params["w"]), method)
        run = jax.jit(lambda state: jax.lax.fori_loop(0, 1000, lambda _, state: tuner.step(state, x)[0], state))
        return np.float32(run(tuner.init({"w": weights})).params["w"])

    wide = after_a_thousand_steps(start.astype(jnp.float32), "promote")
    narrow = after_a_thousand_steps(start, "promote")
    free = wide != np.float32(start)
    assert 0 < free.sum() < free.size
    np.testing.assert_allclose(np.abs(wide - np.float32(start))[free], 0.01, rtol=1e-3)
    ulp = 2.0 ** (np.floor(np.log2(np.abs(wide))) - 7)
    assert (np.abs(narrow - wide) <= ulp).all()
    np.testing.assert_array_equal(after_a_thousand_steps(start, None), np.float32(start))


def test_accumulation_is_the_mean_over_micro_batches(rng: np.random.Generator) -> None:
    params, loss, batches = problem(rng)
    method = js.neuroada(optax.adam(0.02), k=2, targets=TARGETS)
    results = []
    for accumulate in (1, 3):
        tuner = js.fuse(loss, method, accumulate=accumulate)
        state = tuner.init(params)
        for batch in batches:
            state, _ = tuner.step(state, batch)
        results.append(state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)


def test_accumulation_picks_on_the_first_micro_batch(rng: np.random.Generator) -> None:
    params, loss, batches = problem(rng)
    method = js.gasdu(optax.sgd(0.02), density=0.1, targets=TARGETS)
    whole, first = js.fuse(loss, method, accumulate=3), js.fuse(loss, method)
    found, _ = whole.step(whole.init(params), batches[0])
    expected, _ = first.step(first.init(params), batches[0][:2])
    jax.tree.map(np.testing.assert_array_equal, found.method.support, expected.method.support)


def test_adaptive_refreshes_wait_for_retention_to_fall(rng: np.random.Generator) -> None:
    """It is estimated where nothing is picked: near what it was while the gradient stays, 0 once it is elsewhere."""
    schedule = js.adaptive(0.05, minimum=3, maximum=50)
    method = js.gasdu(optax.sgd(0.01), density=1 / 20, refresh_every=schedule, targets="w", seed=int(rng.integers(99)))
    towards = jnp.asarray(rng.uniform(1, 1.3, size=4), jnp.float32)
    tuner = js.fuse(lambda params, x: jnp.sum(x @ params["w"] * towards), method)
    state = tuner.init({"w": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)})
    told = []
    for row in (2,) * 13 + (0, 0):
        state, metrics = tuner.step(state, jax.nn.one_hot(jnp.array([row]), 5))
        told.append((bool(metrics.refreshed), float(metrics.retention)))
    assert [refreshed for refreshed, _ in told] == [True] + [False] * 13 + [True]
    exact, *estimates, elsewhere, again = [retention for _, retention in told]
    assert exact == pytest.approx(np.max(towards) ** 2 / np.sum(np.square(towards)))
    assert all(exact / 4 <= estimate <= 1 for estimate in estimates)  # squared sums of 4 signed numbers are no larger
    # Fresh signs at every step. One sketch says 1 at most once in 100 times, so that twelve alike are not chance.
    assert len(set(estimates)) > 1
    assert elsewhere == 0
    assert again == pytest.approx(exact)


def test_retention_is_that_of_the_micro_batch_that_picks(rng: np.random.Generator) -> None:
    params, loss, batches = problem(rng)
    method = js.gasdu(optax.sgd(0.02), density=0.1, targets=TARGETS)
    whole, first = js.fuse(loss, method, accumulate=3), js.fuse(loss, method)
    _, found = whole.step(whole.init(params), batches[0])
    _, expected = first.step(first.init(params), batches[0][:2])
    np.testing.assert_allclose(found.retention, expected.retention, rtol=1e-5)
    np.testing.assert_allclose(found.retention_mean, expected.retention_mean, rtol=1e-5)


def test_a_step_that_is_not_finite_is_skipped_and_tried_again(rng: np.random.Generator) -> None:
    params, loss, batches = problem(rng)
    tuner = js.fuse(loss, js.gasdu(optax.adam(0.1), density=0.1, targets=TARGETS))
    state, metrics = tuner.step(tuner.init(params), batches[0] * jnp.nan)
    assert int(metrics.skipped) == 1
    assert not bool(metrics.refreshed)
    jax.tree.map(np.testing.assert_array_equal, state.params, params)
    state, metrics = tuner.step(state, batches[0])
    assert bool(metrics.refreshed)
    assert int(state.method.progress.steps) == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_a_matrix_that_is_used_twice_cannot_be_picked_by_its_gradient(rng: np.random.Generator) -> None:
    params, loss, batches = problem(rng)

    def twice(params: Any, x: jax.Array) -> jax.Array:
        return loss(params, x) + jnp.sum(x @ params["head"])

    tuner = js.fuse(twice, js.gasdu(optax.sgd(0.1), density=0.1, targets=TARGETS))
    with pytest.raises(UnsupportedUseError, match="weight head through several products with one matrix"):
        tuner.step(tuner.init(params), batches[0])
    method = js.neuroada(optax.sgd(0.1), k=1, targets=TARGETS)
    fixed = js.fuse(twice, method)  # sums of gradients are gradients
    expected = reference_tuner(twice, method)
    found, _ = fixed.step(fixed.init(params), batches[0])
    told, _ = expected.step(expected.init(params), batches[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found.params, told.params)


def test_layers_may_be_unrolled(rng: np.random.Generator) -> None:
    """Static slices of a stack are matrices of their own."""
    params, loss, batches = problem(rng)

    def unrolled(params: Any, x: jax.Array) -> jax.Array:
        for layer in range(3):
            x = x + jnp.tanh(x @ params["layers"]["up"][layer]) @ params["layers"]["down"][layer]
        return jnp.mean((x @ params["head"] - 1) ** 2)

    method = js.gasdu(optax.adam(0.1), density=0.1, refresh_every=2, targets=TARGETS)
    results = []
    for function in (loss, unrolled):
        tuner = js.fuse(function, method)
        state = tuner.init(params)
        for batch in batches:
            state, _ = tuner.step(state, batch)
        results.append(state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *results)


def test_what_runs_in_the_reference_engine_only_says_so() -> None:
    loss = lambda p, x: jnp.sum(x @ p["w"])  # noqa: E731
    with pytest.raises(js.InputError, match=r"calibration_steps=1 sums dense gradients.*js\.calibrate"):
        js.fuse(loss, js.gallop(optax.adam(0.1), density=0.1))
    with pytest.raises(TypeError, match="clipping belongs inside"):
        js.fuse(loss, optax.chain(js.gasdu(density=0.1), optax.sgd(0.1)))
    tuner = js.fuse(loss, js.neuroada(optax.adam(0.1), select="gradient", targets="w"))
    with pytest.raises(js.InputError, match=r"one backward pass cannot; pick the support by js\.calibrate"):
        tuner.init({"w": jnp.ones((3, 4))})


def test_calibrated_slices_are_trained_as_by_the_reference_engine(rng: np.random.Generator) -> None:
    """Groups of input slices, and output slices."""
    params, loss, batches = problem(rng)
    targets = [
        js.Target("layers/.*", stack_axes=(0,), subspace=js.subspaces.Slices(1, group=2)),
        js.Target("head", subspace=js.subspaces.Slices(2, axis="output")),
    ]
    method = js.s2ft(optax.adam(0.02), output=None, down=None, score="gradient", targets=targets)
    method = js.with_support(method, js.calibrate(loss, params, batches[:1], method))
    reference, fused = reference_tuner(loss, method), js.fuse(loss, method)
    expected, found = reference.init(params), fused.init(params)
    for batch in batches[1:5]:
        expected, _ = reference.step(expected, batch)
        found, _ = fused.step(found, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found.params, expected.params)
    moved = [np.not_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (expected.params, params)), strict=True)]
    same = [np.not_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (found.params, params)), strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(moved, same, strict=True))
