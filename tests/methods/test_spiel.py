"""SpIEL beside a NumPy re-implementation, and what it promises of bases, ages and newcomers."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

LAYERS, INPUTS, OUTPUTS, STEPS = 2, 6, 5, 39
TARGET = js.Target("layers/kernel", stack_axes=(0,))
OPTIONS: dict[str, Any] = {
    "total_steps": 40,
    "density": 0.6,
    "budget": None,
    "reselect_every": 6,
    "accumulation_steps": 2,
    "reselection_rate": 0.5,
}


class Peer:
    """SpIEL on one matrix, coordinate by coordinate, after the paper: dictionaries keyed by flat index."""

    def __init__(self, weight: np.ndarray, support: np.ndarray, grow: str, decay: float, cosine: bool) -> None:
        self.base, self.grow, self.decay, self.cosine = weight.ravel().copy(), grow, decay, cosine
        self.delta = {int(c): 0.0 for c in support}
        self.adam = {int(c): (0.0, 0.0, 0) for c in support}
        self.rows, self.columns = np.zeros(INPUTS), np.zeros(OUTPUTS)
        self.candidates: dict[int, list[float]] = {}

    def step(self, t: int, gradient: np.ndarray, rate: float, shrink: float) -> None:
        g = gradient.ravel()
        bounds = {c: min(self.rows[c // OUTPUTS], self.columns[c % OUTPUTS]) + g[c] ** 2 for c in self.delta}
        for c in self.delta:
            if self.grow == "AG":
                m, v, age = self.adam[c]
                m, v, age = 0.9 * m + 0.1 * shrink * g[c], 0.999 * v + 0.001 * (shrink * g[c]) ** 2, age + 1
                self.adam[c] = (m, v, age)
                way = (m / (1 - 0.9**age)) / (math.sqrt(v / (1 - 0.999**age)) + 1e-8)
            else:
                way = g[c] / math.sqrt(bounds[c] + 1e-8)
                self.rows[c // OUTPUTS] = max(self.rows[c // OUTPUTS], bounds[c])
                self.columns[c % OUTPUTS] = max(self.columns[c % OUTPUTS], bounds[c])
            self.delta[c] -= rate * (way + self.decay * self.delta[c])
        if t % 6 == 0:
            self.candidates = {int(c): [] for c in np.argsort(-np.abs(g), kind="stable")[: len(self.delta)]}
        if t % 6 < 2:
            for c in self.candidates:
                self.candidates[c].append(g[c])
        if t % 6 == 1:
            falling = (1 + math.cos(math.pi * (t + 1) / 40)) / 2 if self.cosine else 1 - (t + 1) / 40
            self.reselect(1.0 if t == 1 else 0.5 * falling)

    def reselect(self, share: float) -> None:
        count = int(len(self.delta) * share)
        dropped = sorted(self.delta, key=lambda c: abs(self.delta[c]))[:count]
        if self.grow == "AG":
            survivors = set(self.delta) - set(dropped)
            allowed = [c for c in self.candidates if c not in survivors]
            allowed.sort(key=lambda c: -abs(sum(self.candidates[c])))
        else:
            scores = np.outer(self.rows, self.columns).ravel()
            allowed = [int(c) for c in np.argsort(-scores, kind="stable") if c not in self.delta]
        grown = allowed[:count]
        joining = [c for c in grown if c not in dropped]
        for c in [c for c in dropped if c not in grown][: len(joining)]:
            del self.delta[c], self.adam[c]
        for c in joining:
            self.delta[c] = 0.0
            seen = np.array(self.candidates.get(c, [0.0]))
            self.adam[c] = (seen.mean() * (1 - 0.9**2), (seen**2).mean() * (1 - 0.999**2), 2)

    def weight(self) -> np.ndarray:
        weight = self.base.copy()
        for c, delta in self.delta.items():
            weight[c] += delta
        return weight.reshape(INPUTS, OUTPUTS)


@pytest.mark.parametrize(
    ("grow", "more"), [("AG", {"weight_decay": 0.3, "clip": 0.5}), ("MA", {"decay": "cosine"})], ids=["AG", "MA"]
)
def test_follows_its_paper(grow: str, more: dict[str, Any], rng: np.random.Generator) -> None:
    features, goal = rng.normal(size=(4, INPUTS)), rng.normal(size=(LAYERS, 4, OUTPUTS))
    start = {"layers": {"kernel": rng.normal(size=(LAYERS, INPUTS, OUTPUTS))}, "norm": rng.normal(size=3)}
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, start)
        tx = js.spiel(
            lambda step: 0.1 - 0.002 * step, targets=[TARGET], seed=int(rng.integers(99)), grow=grow, **OPTIONS, **more
        )
        gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.tanh(features @ p["layers"]["kernel"] - goal) ** 2)))
        state, update = tx.init(params), jax.jit(tx.update)
        supports = np.asarray(state.support["layers"]["kernel"])
        assert supports.shape == (LAYERS, 18)
        peers = [
            Peer(weight, support, grow, more.get("weight_decay", 0.0), "decay" in more)
            for weight, support in zip(start["layers"]["kernel"], supports, strict=True)
        ]
        changes = 0
        for t in range(STEPS):
            gradients = gradient(params)
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            dense = np.asarray(gradients["layers"]["kernel"])
            slots = np.concatenate([g.ravel()[list(p.delta)] for g, p in zip(dense, peers, strict=True)])
            shrink = min(1.0, more.get("clip", np.inf) / np.linalg.norm(slots))
            for layer, peer in enumerate(peers):
                before = set(peer.delta)
                peer.step(t, dense[layer], 0.1 - 0.002 * t, shrink)
                changes += len(set(peer.delta) - before)
                np.testing.assert_allclose(params["layers"]["kernel"][layer], peer.weight(), rtol=1e-6, atol=1e-9)
                support = [int(c) for c in state.support["layers"]["kernel"][layer]]
                assert set(support) == set(peer.delta)
                if grow == "AG":
                    found = [np.asarray(part["layers"]["kernel"][layer]) for part in state.optimizer]
                    wanted = np.array([peer.adam[c] for c in support])
                    np.testing.assert_array_equal(found[0], wanted[:, 2])
                    np.testing.assert_allclose(found[1], wanted[:, 0], rtol=1e-6, atol=1e-12)
                    np.testing.assert_allclose(found[2], wanted[:, 1], rtol=1e-6, atol=1e-12)
        assert changes > 10
        assert int(state.progress.refreshes) == 1 + 7
        np.testing.assert_array_equal(params["norm"], start["norm"])


def test_the_share_is_one_at_first_then_falls_to_zero() -> None:
    for decay, later in (
        ("linear", [0.2 * (1 - 27 / 60), 0.0, 0.0]),
        ("cosine", [0.1 * (1 + math.cos(0.45 * math.pi)), 0, 0]),
    ):
        method = js.spiel(0.1, total_steps=60, decay=decay).description
        shares = [float(method.share(jnp.array(step))) for step in (4, 26, 59, 99)]
        np.testing.assert_allclose(shares, [1.0, *later], atol=1e-7)


def bits(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize(("grow", "dtype"), [("AG", jnp.float32), ("MA", jnp.bfloat16)])
def test_dropped_coordinates_are_back_at_their_base_bit_for_bit(
    grow: str, dtype: Any, rng: np.random.Generator
) -> None:
    """Deltas are far larger than many bases, so that one sum of update and weight cannot restore them."""
    values = rng.choice([-1, 1], size=(2, 8, 6)) * 10.0 ** rng.uniform(-7, 0, size=(2, 8, 6))
    base = jnp.asarray(values, dtype).at[:, 0, :3].set(-0.0)
    params = {"k": base, "rest": jnp.array([-0.0, 1.0], dtype)}
    tx = js.spiel(0.3, targets=js.Target("k", stack_axes=(0,)), grow=grow, **{**OPTIONS, "density": 0.3})
    state, update = tx.init(params), jax.jit(tx.update)
    touched = np.zeros((2, 48), bool)
    for t in range(22):
        if t == 9:  # right after a reselection: a step that is skipped takes nothing back, and forgets nothing
            spoiled = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
            updates, state = update(spoiled, state, params)
            np.testing.assert_array_equal(bits(optax.apply_updates(params, updates)["k"]), bits(params["k"]))
            assert int(state.progress.skipped) == 1
        touched[np.arange(2)[:, None], np.asarray(state.support["k"])] = True
        gradients = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), params)
        updates, state = update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        outside = np.ones((2, 48), bool)
        outside[np.arange(2)[:, None], np.asarray(state.support["k"])] = False
        now, then = (np.asarray(tree).reshape(2, 48) for tree in (params["k"], base))
        if t % 6 != 1:  # the step after a reselection corrects what one sum rounds away
            np.testing.assert_array_equal(now[outside], then[outside])
            same = bits(now) == bits(then)
            assert np.all(same[outside & ((then != 0) | ~touched)])
        else:
            np.testing.assert_allclose(np.float32(now[outside]), np.float32(then[outside]), atol=1e-3)
    assert np.sum(touched) > 2 * 14  # there was something to restore
    np.testing.assert_array_equal(bits(params["rest"]), bits(jnp.array([-0.0, 1.0], dtype)))
    inside = np.asarray(state.delta["k"], np.float32) + np.float32(np.asarray(state.base["k"]))
    weights = np.take_along_axis(now, np.asarray(state.support["k"]), axis=1)
    np.testing.assert_allclose(np.float32(weights), inside, rtol=jnp.finfo(dtype).eps, atol=1e-6)


def test_ages_do_not_stall_under_bf16_weights() -> None:
    """A bf16 count stops at 256 (METHODS.md); small steps of bf16 weights add up in the deltas."""
    params = {"k": jnp.ones((4, 4), jnp.bfloat16)}
    tx = js.spiel(1e-5, targets="k", **{**OPTIONS, "density": 1.0})
    gradient = {"k": jnp.ones((4, 4), jnp.bfloat16)}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=1000))((params, tx.init(params)))
    np.testing.assert_array_equal(state.optimizer.age["k"], 1000)
    np.testing.assert_allclose(state.delta["k"], -1e-2, rtol=1e-3)
    np.testing.assert_allclose(np.float32(params["k"]), 0.99, atol=4e-3)


def test_with_every_entry_free_it_is_adam(rng: np.random.Generator) -> None:
    """All that is dropped grows again at once, and so stays."""
    params = {"k": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
    gradients = jnp.asarray(rng.normal(size=(20, 6, 5)), jnp.float32)
    results = []
    for tx in (js.spiel(0.05, targets="k", **{**OPTIONS, "density": 1.0}), optax.adam(0.05)):
        current, state, update = params, tx.init(params), jax.jit(tx.update)
        for gradient in gradients:
            updates, state = update({"k": gradient}, state, current)
            current = optax.apply_updates(current, updates)
        results.append(current["k"])
    np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5)


def test_a_delta_adopts_what_others_do_to_its_weight(rng: np.random.Generator) -> None:
    params = {"k": jnp.asarray(rng.normal(size=(4, 5)), jnp.bfloat16)}
    tx = js.spiel(0.0, targets="k", **OPTIONS)
    state = tx.init(params)
    moved = {"k": params["k"] + 1}
    updates, state = jax.jit(tx.update)(params, state, moved)
    np.testing.assert_array_equal(optax.apply_updates(moved, updates)["k"], moved["k"])
    index = np.asarray(state.support["k"][0])
    change = np.float32(moved["k"]) - np.float32(params["k"])
    np.testing.assert_array_equal(state.delta["k"][0], change.ravel()[index])


def test_budgets_are_shared_in_proportion_to_size() -> None:
    params = {"a": jnp.ones((10, 10)), "b": jnp.ones((10, 30)), "rest": jnp.ones(600)}
    state = js.spiel(0.1, total_steps=9, targets="a|b").init(params)
    assert [state.support[name].shape for name in "ab"] == [(1, 2), (1, 7)]
    assert len(set(np.asarray(state.support["b"][0]).tolist())) == 7


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"total_steps": None}, js.InputError, "spiel needs total_steps"),
        ({"total_steps": 0}, js.InputError, "total_steps must be at least 1"),
        ({"reselect_every": 2.5}, TypeError, "reselect_every"),
        ({"accumulation_steps": 6}, js.InputError, "accumulation_steps must be fewer than reselect_every=6, got 6"),
        ({"grow": "sm3"}, (js.InputError, TypeError), "grow"),
        ({"reselection_rate": 1.5}, js.InputError, "reselection_rate must lie between 0 and 1, got 1.5"),
        ({"b2": 1.0}, js.InputError, "b2 must be at least 0 and less than 1, got 1.0"),
        ({"clip": -1.0}, js.InputError, "clip must be at least 0"),
        ({"budget": 0.01}, js.InputError, "exactly one of density"),
        ({"density": 1.5}, js.InputError, "density must lie in"),
        ({"learning_rate": optax.adam(0.1)}, TypeError, "spiel brings its own Adam"),
        ({"learning_rate": None}, TypeError, "learning_rate must be a number or a schedule"),
        ({"targets": js.Target("k", subspace=js.subspaces.Slices(1))}, js.InputError, "trains coordinates"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        js.spiel(**{"learning_rate": 0.1, "targets": "k", **OPTIONS, **options}).init({"k": jnp.ones((4, 4))})


def test_parameters_are_asked_for() -> None:
    params = {"k": jnp.ones((4, 4))}
    tx = js.spiel(0.1, targets="k", **OPTIONS)
    with pytest.raises(ValueError, match="spiel needs params"):
        tx.update(params, tx.init(params))
