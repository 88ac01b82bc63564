"""The engine of a run: the fused one where it has a way, started as the reference engine starts."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.methods.overview import overview
from jaxsparse.train.config import Engine
from jaxsparse.train.engines import Choice, choose_engine

TARGETS = r"layer/(q_proj|o_proj)/kernel"
SLICES = [js.Target(TARGETS, subspace=js.subspaces.Slices(2))]


def problem(rng: np.random.Generator) -> tuple[Any, Callable[..., Any], list[Any]]:
    """Two layers, and batches of tokens of which not all count."""
    shapes = {"layer": {"q_proj": {"kernel": (6, 8)}, "o_proj": {"kernel": (8, 4)}}}
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32), shapes, is_leaf=lambda node: type(node) is tuple
    )
    batches = [
        (jnp.asarray(rng.normal(size=(4, 6)), jnp.float32), jnp.asarray([1.0, 1.0, 1.0, counts]))
        for counts in (0.0, 1.0, 0.0, 1.0)
    ]

    def loss(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        x, weights = batch
        y = jnp.tanh(x @ params["layer"]["q_proj"]["kernel"]) @ params["layer"]["o_proj"]["kernel"]
        return jnp.sum(weights * jnp.sum(y**2, axis=1)) / jnp.sum(weights), {"tokens": jnp.sum(weights)}

    return params, loss, batches


def choose(
    method: Any, params: Any, loss: Callable[..., Any], batches: list[Any], engine: Engine = "fused", parts: int = 1
) -> Choice:
    def first() -> Iterator[Any]:
        return iter(batches)

    return choose_engine(engine, loss, params, method, first, share_of_data=1, micro_batches=parts)


@pytest.mark.parametrize(
    ("name", "options", "looks", "micro_batches"),
    [
        ("gallop", {"density": 0.2, "calibration_steps": 2}, 2, 2),
        ("lora_ga", {"rank": 1, "calibration_steps": 2}, 2, 2),
        ("neuroada", {"k": 2, "select": "gradient"}, 0, 1),
        ("s2ft", {"score": "gradient", "targets": SLICES}, 0, 1),
        ("s2ft", {"score": "product", "targets": SLICES}, 0, 2),
    ],
)
def test_what_the_fused_engine_sees_before_is_what_the_reference_engine_spends_steps_on(
    name: str, options: dict[str, Any], looks: int, micro_batches: int, rng: np.random.Generator
) -> None:
    params, loss, batches = problem(rng)
    method = getattr(js, name)(optax.adam(0.01), **{"targets": TARGETS, **options})
    choice = choose(method, params, loss, batches, parts=micro_batches)
    assert (choice.engine, choice.notice) == ("fused", None)
    reference = choose(method, params, loss, batches, "reference").tuner
    found, expected = choice.tuner.init(params), reference.init(params)
    for batch in batches[:looks]:
        expected, _ = reference.step(expected, batch)
    for batch in batches:
        expected, told = reference.step(expected, batch)
        found, metrics = choice.tuner.step(found, batch)
        np.testing.assert_allclose(metrics.loss, told.loss, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        choice.tuner.params(found),
        reference.params(expected),
    )


def test_what_the_fused_engine_cannot_run_goes_to_the_reference_engine_and_says_why(rng: np.random.Generator) -> None:
    params, loss, batches = problem(rng)
    choices: dict[str, Any] = {"subspace": js.subspaces.Neurons(2), "score": js.select.WEIGHT}
    adaptive = js.subspace_descent(optax.adam(0.01), **choices, schedule=js.adaptive(0.5), targets=TARGETS)
    choice = choose(adaptive, params, loss, batches)
    assert choice.engine == "reference"
    assert choice.notice is not None
    assert "when retention falls" in choice.notice

    def odd(params: Any, batch: Any) -> Any:
        value, aux = loss(params, batch)
        return value + jnp.sum(jnp.sort(params["layer"]["q_proj"]["kernel"])), aux

    usual = js.gasdu(optax.adam(0.01), density=0.2, targets=TARGETS)
    choice = choose(usual, params, odd, batches)
    assert choice.engine == "reference"
    assert choice.notice is not None
    assert "layer/q_proj/kernel" in choice.notice
    _, metrics = choice.tuner.step(choice.tuner.init(params), batches[0])
    assert bool(metrics.refreshed)


def test_retention_is_not_told_where_it_is_not_measured(rng: np.random.Generator) -> None:
    params, loss, batches = problem(rng)
    measured = {"gasdu": {"density": 0.2, "refresh_every": 2}, "paca": {"rank": 1}, "full": {}}
    told: dict[str, list[float]] = {}
    for name, options in measured.items():
        tuner = choose(getattr(js, name)(optax.sgd(0.1), targets=TARGETS, **options), params, loss, batches).tuner
        state, told[name] = tuner.init(params), []
        for batch in batches:
            state, metrics = tuner.step(state, batch)
            told[name].append(float(metrics.retention))
    first, between, second, _ = told["gasdu"]
    assert 0 < first == between != second  # between refreshes the last measurement stands
    assert np.isnan(told["paca"]).all()
    assert told["full"] == [1.0] * 4


def test_the_list_of_methods_says_which_engine_runs_them() -> None:
    engines = {row.method: row.engine for row in overview()}
    assert {engines[name] for name in ("gasdu", "neuroada", "s2ft", "lora", "full")} == {"fused"}
    assert {engines[name] for name in ("gallop", "saft", "sift", "smt", "lora_ga")} == {"fused after calibration"}
