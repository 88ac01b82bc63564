"""Methods of one's own: scores, statistics and supports that are handed in."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.engine.places import GlobalSupport


def run(tx: Any, params: Any, gradients: list[Any]) -> tuple[Any, Any]:
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def trees(rng: np.random.Generator, count: int) -> list[Any]:
    return [{"kernel": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)} for _ in range(count)]


def test_gasdu_is_a_composition(rng: np.random.Generator) -> None:
    params, *gradients = trees(rng, 7)
    composed = js.subspace_descent(
        optax.adam(0.1),
        subspace=js.subspaces.Coordinates(js.subspaces.Budget(density=0.2)),
        score=js.select.GRADIENT,
        schedule=js.select.Every(3),
        targets="kernel",
    )
    named = js.gasdu(optax.adam(0.1), density=0.2, refresh_every=3, targets="kernel")
    ours, named = (run(tx, params, gradients)[0] for tx in (composed, named))
    np.testing.assert_array_equal(ours["kernel"], named["kernel"])


def test_a_score_of_ones_own_picks_and_refreshes(rng: np.random.Generator) -> None:
    params, *gradients = trees(rng, 5)
    product = js.select.Score("|g||W|", lambda e: jnp.abs(e.gradient * e.weight), needs=("gradient", "weight"))
    tx = js.subspace_descent(
        subspace=js.subspaces.Neurons(2), score=product, schedule=js.select.Every(2), targets="kernel"
    )
    state = tx.init(params)
    for step, gradient in enumerate(gradients):
        _, state = tx.update(gradient, state, params)
        last = gradients[step - step % 2]["kernel"]
        scores = np.abs(np.asarray(last * params["kernel"]))
        expected = np.argsort(-scores, axis=0, kind="stable")[:2] * 4 + np.arange(4)
        np.testing.assert_array_equal(state.support["kernel"][0], expected)


@pytest.mark.parametrize("name", ["ACTIVATION", "WEIGHT_ACTIVATION"])
@pytest.mark.parametrize("least", [False, True])
def test_activations_that_are_handed_in_score_slices(name: str, least: bool, rng: np.random.Generator) -> None:
    params, gradient = trees(rng, 2)
    activation = rng.uniform(0.1, 3, size=6)
    score = js.select.smallest(getattr(js.select, name)) if least else getattr(js.select, name)
    given = {"activation": {"kernel": activation}}
    tx = js.subspace_descent(subspace=js.subspaces.Slices(2), score=score, given=given, targets="kernel")
    _, state = tx.update(gradient, tx.init(params), params)
    norms = activation * (np.linalg.norm(params["kernel"], axis=1) if name == "WEIGHT_ACTIVATION" else 1)
    np.testing.assert_array_equal(state.support["kernel"][0], np.argsort(norms if least else -norms)[:2])
    bare = js.subspace_descent(subspace=js.subspaces.Slices(2), score=score, targets="kernel")
    with pytest.raises(js.InputError, match="needs the activation of kernel"):
        bare.update(gradient, bare.init(params), params)


def test_a_support_that_is_handed_in_is_used(rng: np.random.Generator) -> None:
    params, gradient = trees(rng, 2)

    def make(support: Any) -> Any:
        return js.subspace_descent(
            optax.sgd(1.0),
            subspace=js.subspaces.Slices(2),
            score=js.select.FIRST,
            given={"support": support},
            targets="kernel",
        )

    tuned, _ = run(make({"kernel": np.array([4, 1])}), params, [gradient])
    moved = np.any(tuned["kernel"] != params["kernel"], axis=1)
    np.testing.assert_array_equal(np.flatnonzero(moved), [1, 4])
    for support, message in (({}, "no support is given for target kernel"), ({"kernel": np.arange(3)}, "has shape")):
        with pytest.raises(js.InputError, match=message):
            run(make(support), params, [gradient])


def test_blocks_and_everything_train(rng: np.random.Generator) -> None:
    params, gradient = trees(rng, 2)
    g = np.asarray(gradient["kernel"])
    for subspace, size in ((js.subspaces.Blocks(1, size=2), 4), (js.subspaces.Everything(), 24)):
        tx = js.subspace_descent(
            optax.sgd(1.0), subspace=subspace, score=js.select.SIGNED_GRADIENT, calibration_steps=1, targets="kernel"
        )
        tuned, _ = run(tx, params, [gradient, gradient])
        moved = np.asarray(tuned["kernel"] != params["kernel"])
        assert moved.sum() == size
        np.testing.assert_allclose(tuned["kernel"], np.asarray(params["kernel"]) - g * moved, rtol=1e-5)
    best = max(((i, j) for i in (0, 2, 4) for j in (0, 2)), key=lambda at: abs(g[at[0] :][:2, at[1] :][:, :2].mean()))
    tx = js.subspace_descent(
        optax.sgd(1.0), subspace=js.subspaces.Blocks(1, size=2), score=js.select.SIGNED_GRADIENT, targets="kernel"
    )
    tuned, _ = run(tx, params, [gradient])
    rows, columns = np.nonzero(np.asarray(tuned["kernel"] != params["kernel"]))
    assert (rows.min(), columns.min()) == best


def test_one_target_may_be_global_too(rng: np.random.Generator) -> None:
    params, gradient = trees(rng, 2)
    options = {"density": 0.25, "gradients": gradient, "targets": "kernel"}
    results = [
        run(js.saft(optax.adam(0.1), scope=scope, **options), params, [gradient]) for scope in ("global", "matrix")
    ]
    np.testing.assert_array_equal(results[0][0]["kernel"], results[1][0]["kernel"])
    retentions = [float(state.progress.retention) for _, state in results]
    assert retentions[0] == pytest.approx(retentions[1], rel=1e-6)


def test_global_slots_follow_their_entries_when_picked_again(rng: np.random.Generator) -> None:
    """carry="coordinate" over all matrices: momentum stays with entries that stay."""
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((3, 2))}
    gradients = [jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params) for _ in range(4)]
    tx = js.subspace_descent(
        optax.sgd(1.0, momentum=0.5),
        subspace=js.subspaces.Coordinates(js.subspaces.Budget(density=0.5)),
        score=js.select.GRADIENT,
        scope="global",
        schedule=js.select.Every(1),
        carry="coordinate",
        targets=".*",
    )
    state, update, trace, support = tx.init(params), jax.jit(tx.update), np.zeros(12), np.zeros(12, bool)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        g = np.concatenate([np.ravel(gradient["a"]), np.ravel(gradient["b"])])
        chosen = np.zeros(12, bool)
        chosen[np.argsort(-np.abs(g))[:6]] = True
        trace = np.where(chosen, g + 0.5 * np.where(support, trace, 0), 0)
        support = chosen
        moved = np.concatenate([np.ravel(updates["a"]), np.ravel(updates["b"])])
        np.testing.assert_allclose(moved, -trace, rtol=1e-5, atol=1e-6)
    assert isinstance(state.support, GlobalSupport)


@pytest.mark.parametrize("by_weight", [False, True])
def test_activations_score_entries_of_any_subspace(by_weight: bool, rng: np.random.Generator) -> None:
    """An entry's activation is that of its input."""
    params, gradient = trees(rng, 2)
    activation = rng.uniform(size=6).astype(np.float32)
    scores = np.broadcast_to(activation[:, None], (6, 4))
    scores = scores * np.abs(params["kernel"]) if by_weight else scores
    for subspace, expected in (
        (
            js.subspaces.Coordinates(js.subspaces.Budget(density=0.25)),
            np.argsort(-scores, axis=None, kind="stable")[:6],
        ),
        (js.subspaces.Neurons(2), (np.argsort(-scores, axis=0, kind="stable")[:2] * 4 + np.arange(4)).ravel()),
        (js.subspaces.Blocks(1, size=2), [np.argmax(scores.reshape(3, 2, 2, 2).mean(axis=(1, 3)))]),
    ):
        tx = js.subspace_descent(
            subspace=subspace,
            score=js.select.WEIGHT_ACTIVATION if by_weight else js.select.ACTIVATION,
            given={"activation": {"kernel": activation}},
            targets="kernel",
        )
        _, state = tx.update(gradient, tx.init(params), params)
        np.testing.assert_array_equal(np.sort(np.ravel(state.support["kernel"])), np.sort(expected))


@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        ({"given": {"gradients": {}}}, js.InputError, "given may hold"),
        (
            {"targets": js.Target("kernel", subspace="slices")},
            TypeError,
            "js.Target of kernel has the subspace 'slices'",
        ),
    ],
)
def test_choices_of_another_kind_are_errors_before_the_first_step(
    choice: dict[str, Any], error: Any, message: str
) -> None:
    choices = {"subspace": js.subspaces.Slices(1), "score": js.select.GRADIENT, "targets": "kernel"} | choice
    with pytest.raises(error, match=message):
        js.subspace_descent(**choices).init({"kernel": jnp.ones((6, 4))})


def test_scores_and_schedules_are_checked(rng: np.random.Generator) -> None:
    with pytest.raises(js.InputError, match="exactly one of entries, draw and factors"):
        js.select.Score("nothing")
    with pytest.raises(js.InputError, match="needs 'gradients'"):
        js.select.Score("typo", lambda entries: entries.gradient, needs=("gradients",))
    with pytest.raises(js.InputError, match="at least 1, got 0"):
        js.select.Every(0)
    half = js.select.Score("half", lambda entries: entries.gradient[:, :3], needs=("gradient",))
    params = trees(rng, 1)[0]
    with pytest.raises(js.InputError, match=r"score half has shape \(1, 3, 4\) for kernel"):
        js.subspace_descent(subspace=js.subspaces.Slices(1), score=half, targets="kernel").init(params)


@pytest.mark.parametrize(
    ("support", "message"),
    [([24], "from 0 to 23, got 24..24"), ([-1], "from 0 to 23"), ([1, 1], "names a unit twice"), ([1.5], "whole")],
)
def test_a_support_names_units_that_exist_once(support: list, message: str) -> None:
    tx = js.fixed_mask(density=len(support) / 24, targets="kernel")
    with pytest.raises(js.InputError, match=message):
        js.with_support(tx, {"kernel": support}).init({"kernel": jnp.ones((6, 4))})


def test_global_slots_have_one_dtype() -> None:
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2), jnp.bfloat16)}
    with pytest.raises(js.InputError, match=r"targets of one dtype, got {'a': 'float32', 'b': 'bfloat16'}"):
        js.saft(optax.adam(0.1), density=0.5, targets=".*").init(params)
