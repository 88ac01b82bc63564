"""Retention: of a support on a gradient, over the steps of a run, and its bound."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.analysis.retention import measure_retention, moving_average, reuse_bound, summarise_retention
from jaxsparse.common.errors import InputError
from jaxsparse.subspaces.units import Slices

TARGETS = [js.Target("layers/kernel", stack_axes=(0,)), "o/kernel"]


def gradients(rng: np.random.Generator) -> dict:
    shapes = {"layers": {"kernel": (3, 6, 4)}, "o": {"kernel": (5, 7)}, "norm": {"scale": (6,)}}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )


def test_it_is_the_share_of_squares_that_lie_inside_the_support(rng: np.random.Generator) -> None:
    g = gradients(rng)
    picked = {
        "layers": {"kernel": jnp.asarray(np.stack([rng.permutation(24)[:5] for _ in range(3)]))},
        "o": {"kernel": jnp.asarray(rng.permutation(35)[None, :9])},
        "norm": {"scale": optax.MaskedNode()},
    }
    found = jax.jit(lambda g, s: measure_retention(g, s, targets=TARGETS))(g, picked)
    layers, o = (
        np.asarray(g["layers"]["kernel"], np.float64).reshape(3, 24),
        np.asarray(g["o"]["kernel"]).reshape(1, 35),
    )
    kept = [
        np.sum(np.take_along_axis(dense, np.asarray(where), axis=1) ** 2, axis=1)
        for dense, where in ((layers, picked["layers"]["kernel"]), (o, picked["o"]["kernel"]))
    ]
    whole = [np.sum(dense**2, axis=1) for dense in (layers, o)]
    np.testing.assert_allclose(found.by_path["layers/kernel"], kept[0] / whole[0], rtol=1e-5)
    np.testing.assert_allclose(found.overall, sum(map(np.sum, kept)) / sum(map(np.sum, whole)), rtol=1e-5)
    shares = np.concatenate(kept) / np.concatenate(whole)
    np.testing.assert_allclose(found.mean, shares.mean(), rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_the_size_of_the_gradient_does_not_matter(scale: float, rng: np.random.Generator) -> None:
    g = gradients(rng)
    tx = js.gasdu(density=0.2, targets=TARGETS)
    state = tx.update(g, tx.init(g))[1]
    scaled = jax.tree.map(lambda leaf: leaf * jnp.float32(scale), g)
    before, after = (measure_retention(each, state.support, targets=TARGETS) for each in (g, scaled))
    np.testing.assert_allclose(after.overall, before.overall, rtol=1e-5)
    assert 0 < float(before.overall) < 1


def test_it_agrees_with_what_the_engine_measures_while_a_support_ages(rng: np.random.Generator) -> None:
    tx = js.gasdu(density=0.1, refresh_every=3, targets=TARGETS)
    state = tx.init(gradients(rng))
    for step in range(5):
        g = gradients(rng)
        state = tx.update(g, state)[1]
        found = measure_retention(g, state.support, targets=TARGETS)
        np.testing.assert_allclose(found.overall, state.progress.retention, rtol=1e-5)
        np.testing.assert_allclose(found.mean, state.progress.retention_mean, rtol=1e-5)
        if step == 0:
            fresh = float(found.overall)
    assert fresh > float(found.overall) > 0


def test_slices_and_neurons_are_measured_too(rng: np.random.Generator) -> None:
    g = {"o": {"kernel": jnp.asarray(rng.normal(size=(5, 7)), jnp.float32)}}
    dense = np.asarray(g["o"]["kernel"])
    rows = {"o": {"kernel": jnp.array([[4, 1]])}}
    found = measure_retention(g, rows, targets="o/kernel", units=Slices(2))
    np.testing.assert_allclose(found.overall, np.sum(dense[[4, 1]] ** 2) / np.sum(dense**2), rtol=1e-5)
    neurons = {"o": {"kernel": jnp.asarray(np.argmax(np.abs(dense), axis=0) * 7 + np.arange(7))[None, None]}}
    found = measure_retention(g, neurons, targets="o/kernel")
    np.testing.assert_allclose(found.overall, np.sum(np.abs(dense).max(axis=0) ** 2) / np.sum(dense**2), rtol=1e-5)


def test_a_gradient_of_zero_is_retained_whole() -> None:
    g, support = {"o": {"kernel": jnp.zeros((5, 7))}}, {"o": {"kernel": jnp.array([[3]])}}
    assert float(measure_retention(g, support, targets="o/kernel").overall) == 1


def test_a_summary_sorts_steps_by_the_age_of_their_support(rng: np.random.Generator) -> None:
    period, rate = 7, rng.uniform(0.01, 0.1)
    fresh = rng.uniform(0.5, 0.9, size=5)
    age = np.arange(period)
    alpha = (fresh[:, None] * (1 - rate * age)).ravel()
    refreshed = np.tile(age == 0, 5)
    summary = summarise_retention(alpha, refreshed)
    assert summary.refreshes == 5
    np.testing.assert_allclose(summary.by_age, fresh.mean() * (1 - rate * age))
    np.testing.assert_allclose(summary.relative_by_age, 1 - rate * age)
    np.testing.assert_allclose(summary.decay, rate)
    np.testing.assert_allclose([summary.mean, summary.least], [alpha.mean(), alpha.min()])
    alpha[period + 2] = np.nan  # one step is not measured
    gap = summarise_retention(alpha, refreshed)
    assert list(gap.measured) == [5, 5, 4, 5, 5, 5, 5]
    np.testing.assert_allclose(gap.relative_by_age, summary.relative_by_age)


def test_supports_picked_anew_at_every_step_do_not_age(rng: np.random.Generator) -> None:
    summary = summarise_retention(rng.uniform(size=9), np.ones(9, bool))
    assert summary.by_age.shape == (1,)
    assert np.isnan(summary.decay)


def test_a_moving_average_keeps_a_line_and_damps_noise(rng: np.random.Generator) -> None:
    line = np.linspace(0, 1, 100)
    np.testing.assert_allclose(moving_average(line, 25), line[12:-12])
    noise = rng.normal(size=1000)
    assert moving_average(noise).std() < 0.5 * noise.std()
    assert moving_average(noise).shape == (976,)


def test_the_bound_holds_on_quadratics_and_falls_with_age(rng: np.random.Generator) -> None:
    h = rng.uniform(0.5, 1.0, size=40)
    x, rate = rng.normal(size=40), 0.02
    mask = np.zeros(40)
    mask[np.argsort(-np.abs(h * x))[:30]] = 1
    shares = []
    for _ in range(12):
        g = h * x
        shares.append(np.sum((mask * g) ** 2) / np.sum(g**2))
        x = x - rate * mask * g
    bounds = [
        reuse_bound(float(shares[0]), age, learning_rate=rate, smoothness=float(h.max()), mu=float(h.min()))
        for age in range(12)
    ]
    np.testing.assert_allclose(bounds[0], shares[0])
    assert np.all(np.array(shares) >= np.array(bounds) - 1e-12)
    assert np.all(np.diff(bounds) <= 0)
    assert 0 < bounds[1] < bounds[0]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: summarise_retention([0.5, 0.5], [False, True]), "true at the first step"),
        (lambda: summarise_retention([0.5], [True, True]), "both, got shapes"),
        (lambda: summarise_retention([float("nan")], [True]), "measured at no step"),
        (lambda: summarise_retention([85.0], [True]), "between 0 and 1, got 85"),
        (lambda: moving_average([1.0, 2.0], 3), "at least 3 values"),
        (lambda: reuse_bound(0.5, 1, learning_rate=2.0, smoothness=1.0, mu=0.1), "learning_rate=2.0 must be at most"),
        (lambda: reuse_bound(1.5, 1, learning_rate=0.1, smoothness=1.0, mu=0.1), "retention_at_refresh"),
        (lambda: measure_retention({"o": jnp.ones((2, 2))}, {"o": optax.MaskedNode()}, targets="o"), "got none"),
        (lambda: measure_retention({"o": jnp.ones((2, 2))}, {"o": jnp.zeros(3, int)}, targets="o"), "one of shape"),
        (lambda: measure_retention({"o": jnp.ones((2, 2))}, {}, targets="o"), "a leaf for every leaf"),
    ],
)
def test_what_cannot_be_measured_says_why(call: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()  # type: ignore[operator]
