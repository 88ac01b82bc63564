"""The fused engine follows the reference engine: the same supports, the same weights up to rounding."""

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


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("gasdu", {"density": 0.1, "refresh_every": 3}),
    ("gasdu", {"density": 0.1, "refresh_every": 3, "carry": "coordinate"}),
    ("gasdu", {"density": 0.1, "refresh_every": 3, "carry": "reset"}),
    ("fixed_mask", {"density": 0.1}),
    ("neuroada", {"k": 2}),
    ("neuroada", {"k": 2, "neurons": 0.5, "select": "random"}),
    ("shira", {"rank": 1}),
    ("super_tuning", {"density": 0.1, "which": "smallest"}),
    ("cla", {"rank": 2}),
    ("r_cla", {"rank": 2}),
    ("c3la", {"rank": 2, "chain_every": 3}),
    ("r_c3la", {"rank": 2, "chain_every": 3}),
    ("paca", {"rank": 2}),
    ("d_paca", {"rank": 2}),
    ("c_paca", {"rank": 2, "chain_every": 3}),
    ("full", {}),
]


@pytest.mark.parametrize(("name", "options"), METHODS, ids=lambda value: value if isinstance(value, str) else None)
def test_follows_the_reference_engine(name: str, options: dict[str, Any], rng: np.random.Generator) -> None:
    with jax.enable_x64(True):
        params, loss, batches = problem(rng, jnp.float64)
        method = getattr(js, name)(optax.adam(0.02), targets=TARGETS, seed=3, **options)
        reference = reference_tuner(loss, method)
        fused = js.fuse(loss, method)
        expected, found = reference.init(params), fused.init(params)
        for batch in batches:
            expected, told = reference.step(expected, batch)
            found, metrics = fused.step(found, batch)
            np.testing.assert_allclose(metrics.loss, told.loss, rtol=1e-10)
            assert bool(metrics.refreshed) == bool(told.refreshed)
            jax.tree.map(np.testing.assert_array_equal, found.method.support, expected.method.support)
            if told.refreshed and "gasdu" in name:
                np.testing.assert_allclose(metrics.retention, told.retention, rtol=1e-6)
                np.testing.assert_allclose(metrics.retention_mean, told.retention_mean, rtol=1e-6)
        close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)  # noqa: E731
        jax.tree.map(close, found.params, expected.params)
        jax.tree.map(close, found.method.inner, expected.method.inner)


LOW_RANK: list[tuple[str, dict[str, Any]]] = [
    ("lora_plus", {}),
    ("asym_lora", {}),
    ("cola", {"chain_every": 3}),
    ("rac_lora", {"chain_every": 3}),
    ("dora", {}),
    ("lora_ga", {"gradients": True}),
    ("lora_one", {"gradients": True}),
]


@pytest.mark.parametrize(("name", "options"), LOW_RANK, ids=lambda value: value if isinstance(value, str) else None)
def test_low_rank_overlays_follow_the_reference_engine(
    name: str, options: dict[str, Any], rng: np.random.Generator
) -> None:
    with jax.enable_x64(True):
        params, loss, batches = problem(rng, jnp.float64)
        if "gradients" in options:
            options = {"gradients": js.collect_gradients(loss, params, [batches[-1]], TARGETS)}
        method = getattr(js, name)(optax.adam(0.02), rank=2, targets=TARGETS, seed=3, **options)
        reference = reference_tuner(loss, method)
        fused = js.fuse(loss, method)
        expected, found = reference.init(params), fused.init(params)
        if name == "lora_one":  # there the first step only adds the product
            expected, _ = reference.step(expected, batches[0])
        frozen = jax.tree.map(np.asarray, found.params)
        for batch in batches:
            expected, told = reference.step(expected, batch)
            found, metrics = fused.step(found, batch)
            np.testing.assert_allclose(metrics.loss, told.loss, rtol=1e-9)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-11), fused.params(found), expected.params
        )
        if "chain_every" not in options:  # the weights move only when a chain ends
            jax.tree.map(np.testing.assert_array_equal, found.params, frozen)


@pytest.mark.parametrize("name", ["gasdu", "neuroada", "paca"])
def test_narrow_weights_move_by_their_masters(name: str, rng: np.random.Generator) -> None:
    """Steps far below an ulp add up, and without masters they do not."""
    options: dict[str, Any] = {"gasdu": {"density": 0.1}, "neuroada": {"k": 1}, "paca": {"rank": 2}}[name]
    params = {"w": jnp.asarray(rng.uniform(0.5, 1.0, size=(6, 5)), jnp.bfloat16)}
    x = jnp.ones((1, 6), jnp.bfloat16)
    moved = {}
    for slots_dtype in ("promote", None):
        method = getattr(js, name)(optax.sgd(1e-4), targets="w", slots_dtype=slots_dtype, **options)
        tuner = js.fuse(lambda p, x: jnp.sum(x @ p["w"]), method)
        state = tuner.init(params)
        for _ in range(200):
            state, _ = tuner.step(state, x)
        moved[slots_dtype] = np.float32(params["w"]) - np.float32(state.params["w"])
    free = moved["promote"] != 0
    assert free.any()
    np.testing.assert_allclose(moved["promote"][free], 0.02, atol=2**-8)
    assert not moved[None].any()


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
    """It is estimated where nothing is picked: near 1 while the gradient stays, and 0 once it is elsewhere."""
    schedule = js.adaptive(0.1, minimum=3, maximum=50)
    method = js.gasdu(optax.sgd(0.01), density=3 / 20, refresh_every=schedule, targets="w", seed=int(rng.integers(99)))
    towards = jnp.asarray(rng.normal(size=4), jnp.float32)
    tuner = js.fuse(lambda params, x: jnp.sum(x @ params["w"] * towards), method)
    state = tuner.init({"w": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)})
    told = []
    for row in (2, 2, 2, 2, 0, 0):
        state, metrics = tuner.step(state, jax.nn.one_hot(jnp.array([row]), 5))
        told.append((bool(metrics.refreshed), float(metrics.retention)))
    assert [refreshed for refreshed, _ in told] == [True, False, False, False, False, True]
    exact, *estimates = [retention for _, retention in told]
    assert all(exact / 4 <= estimate <= 1 for estimate in estimates[:3])  # sums of 4 signs are no larger
    assert estimates[3] == 0
    assert len(set(estimates[:3])) > 1  # fresh signs at every step
    assert estimates[4] == pytest.approx(exact)


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


CALIBRATED: list[tuple[str, dict[str, Any]]] = [
    ("gallop", {"density": 0.1}),
    ("smt", {"blocks": 5, "size": 5, "calibration_steps": 1}),
    (
        "s2ft",
        {
            "output": None,
            "down": None,
            "score": "gradient",
            "targets": [
                js.Target("layers/.*", stack_axes=(0,), subspace=js.subspaces.Slices(1, group=2)),
                js.Target("head", subspace=js.subspaces.Slices(2, axis="output")),
            ],
        },
    ),
]


@pytest.mark.parametrize(("name", "options"), CALIBRATED, ids=lambda value: value if isinstance(value, str) else None)
def test_calibrated_supports_are_trained_as_by_the_reference_engine(
    name: str, options: dict[str, Any], rng: np.random.Generator
) -> None:
    """Units that compete over all matrices leave some of them with fewer slots than others."""
    params, loss, batches = problem(rng)
    method = getattr(js, name)(optax.adam(0.02), **{"targets": TARGETS, **options})
    method = js.with_support(method, js.calibrate(loss, params, batches[:1], method))
    reference, fused = (
        reference_tuner(loss, method),
        js.fuse(loss, method),
    )
    expected, found = reference.init(params), fused.init(params)
    for batch in batches[1:5]:
        expected, _ = reference.step(expected, batch)
        found, _ = fused.step(found, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), found.params, expected.params)
    moved = [np.not_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (expected.params, params)), strict=True)]
    same = [np.not_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (found.params, params)), strict=True)]
    assert all(np.array_equal(a, b) for a, b in zip(moved, same, strict=True))
