"""Every method beside a plain NumPy re-implementation written from its paper, 30 steps on two stacked layers.

The NumPy side shares no code with the library; where a method draws at random it is handed the drawn units.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

LAYERS, INPUTS, OUTPUTS, STEPS = 2, 6, 5, 30
TARGET = js.Target("layers/kernel", stack_axes=(0,))


@dataclass
class Peer:
    """One method on one matrix.

    Attributes:
        pick: from (W, g, turn) to the flat indices that may move, in the order of the slots.
        period: steps between picks; None: once.
        looks: first steps that only look at gradients.
        scale: change of the weight for a change of its slot.
        reset: whether a pick zeroes the moments and their count.
    """

    pick: Callable[[np.ndarray, np.ndarray, int], np.ndarray]
    period: int | None = None
    looks: int = 0
    scale: float = 1.0
    reset: bool = False
    index: np.ndarray | None = None
    seen: Any = 0.0
    turn: int = 0
    steps: int = 0
    adam_steps: int = 0
    m: Any = 0.0
    v: Any = 0.0

    def step(self, weight: np.ndarray, gradient: np.ndarray, rate: float, adam: bool) -> np.ndarray:
        if self.looks:
            self.seen, self.looks = self.seen + gradient, self.looks - 1
            if not self.looks:
                self.index = self.pick(weight, self.seen, 0).ravel()
            return weight
        if self.index is None or (self.period is not None and self.steps % self.period == 0):
            self.index = self.pick(weight, gradient, self.turn).ravel()
            self.turn += 1
            if self.reset:
                self.m, self.v, self.adam_steps = 0.0, 0.0, 0
        self.steps += 1
        g = step = gradient.ravel()[self.index] * self.scale
        if adam:
            self.adam_steps += 1
            self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
            step = self.m / (1 - 0.9**self.adam_steps)
            step = step / (np.sqrt(self.v / (1 - 0.999**self.adam_steps)) + 1e-8)
        weight = weight.copy()
        weight.ravel()[self.index] -= rate * self.scale * step
        return weight


def largest(scores: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores.ravel(), kind="stable")[:k]


def rows(inputs: Any) -> np.ndarray:
    """Flat indices of whole input slices."""
    return np.asarray(inputs)[:, None] * OUTPUTS + np.arange(OUTPUTS)


def neurons(scores: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-scores, axis=0, kind="stable")[:k] * OUTPUTS + np.arange(OUTPUTS)


def strong_neurons(scores: np.ndarray, k: int, count: int) -> np.ndarray:
    best = np.argsort(-scores, axis=0, kind="stable")[:k]
    strength = np.take_along_axis(scores, best, axis=0).sum(axis=0)
    chosen = np.sort(np.argsort(-strength, kind="stable")[:count])
    return best[:, chosen] * OUTPUTS + chosen


K = round(0.2 * INPUTS * OUTPUTS)
# Constructor, its options, and the NumPy peer; a peer of None is handed the units that were drawn.
METHODS: dict[str, tuple[Any, dict[str, Any], Callable[[], Peer]]] = {
    "fixed_mask": (js.fixed_mask, {"density": 0.2}, lambda: Peer(lambda w, g, turn: largest(np.abs(g), K))),
    "sift": (js.sift, {"density": 0.2}, lambda: Peer(lambda w, g, turn: largest(np.abs(g), K), looks=1)),
    "saft in matrices": (
        js.saft,
        {"density": 0.2, "scope": "matrix", "calibration_steps": 3},
        lambda: Peer(lambda w, g, turn: largest(np.abs(g), K), looks=3),
    ),
    "gallop in matrices": (
        js.gallop,
        {"density": 0.2, "scope": "matrix", "calibration_steps": 2},
        lambda: Peer(lambda w, g, turn: largest(np.abs(g / 2) / (np.abs(w) + 1e-8), K), looks=2),
    ),
    "super_tuning": (js.super_tuning, {"density": 0.2}, lambda: Peer(lambda w, g, turn: largest(np.abs(w), K))),
    "super_tuning smallest": (
        js.super_tuning,
        {"density": 0.2, "which": "smallest"},
        lambda: Peer(lambda w, g, turn: largest(-np.abs(w), K)),
    ),
    "shira": (js.shira, {"rank": 1}, lambda: Peer(None)),
    "neuroada": (js.neuroada, {"k": 2}, lambda: Peer(lambda w, g, turn: neurons(np.abs(w), 2))),
    "neuroada reverse": (
        js.neuroada,
        {"k": 2, "select": "reverse"},
        lambda: Peer(lambda w, g, turn: neurons(-np.abs(w), 2)),
    ),
    "neuroada gradient": (
        js.neuroada,
        {"k": 2, "select": "gradient"},
        lambda: Peer(lambda w, g, turn: neurons(np.abs(g), 2)),
    ),
    "neuroada of some neurons": (
        js.neuroada,
        {"k": 2, "neurons": 0.6},
        lambda: Peer(lambda w, g, turn: strong_neurons(np.abs(w), 2, 3)),
    ),
    "neuroada random": (js.neuroada, {"k": 2, "select": "random"}, lambda: Peer(None)),
    "cla": (js.cla, {"rank": 2}, lambda: Peer(lambda w, g, turn: rows([0, 1]), scale=2.0)),
    "cla alpha": (js.cla, {"rank": 2, "alpha": 3.0}, lambda: Peer(lambda w, g, turn: rows([0, 1]), scale=1.5)),
    "r_cla": (js.r_cla, {"rank": 2}, lambda: Peer(None, scale=2.0)),
    "r_cla contiguous": (js.r_cla, {"rank": 2, "contiguous": True}, lambda: Peer(None, scale=2.0)),
    "c3la": (
        js.c3la,
        {"rank": 4, "chain_every": 7},
        lambda: Peer(lambda w, g, turn: rows((4 * turn + np.arange(4)) % INPUTS), period=7, scale=2.0, reset=True),
    ),
    "r_c3la": (js.r_c3la, {"rank": 2, "total_steps": 30, "chains": 4}, lambda: Peer(None, 7, 0, 2.0, reset=True)),
    "paca": (js.paca, {"rank": 2}, lambda: Peer(None)),
    "d_paca": (js.d_paca, {"rank": 2}, lambda: Peer(lambda w, g, turn: rows([0, 1]))),
    "c_paca": (js.c_paca, {"rank": 2, "chain_every": 7}, lambda: Peer(None, 7, reset=True)),
}


def flat_support(name: str, support: np.ndarray) -> np.ndarray:
    """Flat indices of one matrix's support, in the order of its slots."""
    slices = name.split()[0] in ("cla", "r_cla", "c3la", "r_c3la", "paca", "d_paca", "c_paca")
    return rows(support).ravel() if slices else support.ravel()


@jax.jit
@jax.grad
def gradient_of_a_layer(params: dict, features: np.ndarray, goal: np.ndarray) -> jax.Array:
    return jnp.sum(jnp.tanh(features @ params["layers"]["kernel"] - goal) ** 2)


@pytest.mark.parametrize("adam", [True, False], ids=["adam", "sgd"])
@pytest.mark.parametrize("name", METHODS)
def test_follows_its_paper(name: str, adam: bool, rng: np.random.Generator) -> None:
    constructor, options, make_peer = METHODS[name]
    features = rng.normal(size=(4, INPUTS))
    goal = rng.normal(size=(LAYERS, 4, OUTPUTS))
    start = {"layers": {"kernel": rng.normal(size=(LAYERS, INPUTS, OUTPUTS))}, "norm": rng.normal(size=3)}
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, start)
        tx = constructor(optax.adam(0.05) if adam else optax.sgd(0.05), targets=[TARGET], seed=7, **options)
        state, update, peers = tx.init(params), jax.jit(tx.update), [make_peer() for _ in range(LAYERS)]
        for _ in range(STEPS):
            gradients = gradient_of_a_layer(params, features, goal)
            before = np.asarray(params["layers"]["kernel"])
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
            for layer, peer in enumerate(peers):
                support = flat_support(name, np.asarray(state.support["layers"]["kernel"][layer]))
                if make_peer().pick is None:  # random: handed over, and checked to be distinct
                    assert len(set(support)) == len(support)
                    peer.pick = lambda w, g, turn, support=support: support
                moved = peer.step(before[layer], np.asarray(gradients["layers"]["kernel"][layer]), 0.05, adam)
                np.testing.assert_allclose(params["layers"]["kernel"][layer], moved, rtol=1e-6, atol=1e-9)
                if peer.steps:
                    assert set(peer.index) == set(support)
        np.testing.assert_array_equal(params["norm"], start["norm"])
        assert not np.array_equal(params["layers"]["kernel"], start["layers"]["kernel"])


@pytest.mark.parametrize("name", ["saft", "gallop"])
def test_units_compete_over_all_targets(name: str, rng: np.random.Generator) -> None:
    """One threshold: the picked entries are the best of all matrices together, and train like any others."""
    weights = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(2, 4, 5)) * 3}
    means = {"a": rng.normal(size=(3, 4)), "b": rng.normal(size=(2, 4, 5)) * 2}
    params, gradients = (jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree) for tree in (weights, means))
    targets = [js.Target("a"), js.Target("b", stack_axes=(0,))]
    options = {"density": 0.25, "targets": targets}
    results = []
    for how in ({"gradients": gradients}, {"calibration_steps": 2}):
        tx = getattr(js, name)(optax.adam(0.1), **options, **how)
        state, current = tx.init(params), params
        for _ in range(3 if "gradients" in how else 5):
            updates, state = jax.jit(tx.update)(gradients, state, current)
            current = optax.apply_updates(current, updates)
        results.append(current)
    scores = {
        path: np.abs(g) / (np.abs(weights[path]) + 1e-8) if name == "gallop" else np.abs(g) for path, g in means.items()
    }
    total = round(0.25 * 12) + 2 * round(0.25 * 20)
    threshold = np.sort(np.concatenate([s.ravel() for s in scores.values()]))[-total]
    for path, start in params.items():
        for current in results:
            np.testing.assert_array_equal(current[path] != start, scores[path] >= threshold)
        np.testing.assert_allclose(results[0][path], results[1][path], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("one", "other"), [("paca", "r_cla"), ("d_paca", "cla"), ("c_paca", "r_c3la")])
def test_paca_is_cheap_lora_at_alpha_equal_to_rank(one: str, other: str, rng: np.random.Generator) -> None:
    chain = {"chain_every": 4} if one == "c_paca" else {}
    params = {"kernel": jnp.asarray(rng.normal(size=(6, 5)), jnp.float32)}
    results = []
    for name, options in ((one, {}), (other, {"alpha": 3.0})):
        tx = getattr(js, name)(optax.adam(0.1), rank=3, seed=5, targets="kernel", **chain, **options)
        state, update, current = tx.init(params), jax.jit(tx.update), params
        for step in range(10):
            gradient = {"kernel": jnp.sin(current["kernel"] * (step + 1))}
            updates, state = update(gradient, state, current)
            current = optax.apply_updates(current, updates)
        results.append(current["kernel"])
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-6)
    assert not np.array_equal(results[0], params["kernel"])


@pytest.mark.parametrize(("inputs", "rank"), [(6, 2), (7, 3)])
def test_c3la_visits_every_input(inputs: int, rank: int, rng: np.random.Generator) -> None:
    """Proposition 1, and where the rank does not divide the inputs too: the window wraps."""
    params = {"kernel": jnp.asarray(rng.normal(size=(inputs, 4)), jnp.float32)}
    tx = js.c3la(optax.sgd(0.1), rank=rank, chain_every=2, targets="kernel")
    state, update, current = tx.init(params), jax.jit(tx.update), params
    for _ in range(2 * -(-inputs // rank)):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, current)
        current = optax.apply_updates(current, updates)
    assert np.all(current["kernel"] != params["kernel"])


def test_chains_keep_what_was_learnt_and_the_rate_does_not_restart(rng: np.random.Generator) -> None:
    params = {"kernel": jnp.zeros((4, 2))}
    rate = optax.linear_schedule(1.0, 0.0, 8)
    tx = js.c3la(optax.identity(), rank=1, alpha=1.0, chain_every=2, learning_rate=rate, targets="kernel")
    state, update, current, moves = tx.init(params), jax.jit(tx.update), params, []
    for _ in range(6):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, current)
        moves.append(float(-jnp.sum(updates["kernel"][:, 0])))
        current = optax.apply_updates(current, updates)
    np.testing.assert_allclose(moves, [1 - step / 8 for step in range(6)])
    np.testing.assert_allclose(
        current["kernel"][:, 0], [-(1 + 7 / 8), -(6 / 8 + 5 / 8), -(4 / 8 + 3 / 8), 0], rtol=1e-6
    )


def test_weight_decay_of_neuroada_acts_on_theta_and_of_paca_on_the_weights(rng: np.random.Generator) -> None:
    params = {"kernel": jnp.asarray(rng.uniform(1, 2, size=(4, 3)), jnp.float32)}
    decayed = optax.chain(optax.add_decayed_weights(0.5), optax.scale(-1.0))
    still = jax.tree.map(jnp.zeros_like, params)
    for constructor, options, moves in ((js.neuroada, {"k": 1}, False), (js.d_paca, {"rank": 1}, True)):
        tx = constructor(decayed, targets="kernel", **options)
        updates, _ = tx.update(still, tx.init(params), params)
        assert bool(jnp.any(updates["kernel"] != 0)) is moves


def test_neuroada_with_all_inputs_is_full_training(rng: np.random.Generator) -> None:
    params = {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    gradients = {"kernel": jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)}
    tx = js.neuroada(optax.adam(0.1), k=4, targets="kernel")
    updates, _ = tx.update(gradients, tx.init(params), params)
    plain, _ = optax.adam(0.1).update(gradients, optax.adam(0.1).init(params), params)
    np.testing.assert_allclose(updates["kernel"], plain["kernel"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: js.neuroada(k=0), "k, the inputs of every neuron"),
        (lambda: js.cla(rank=0), "number of slices must be at least 1"),
        (lambda: js.cla(rank=2, alpha=-1.0), "alpha must be a positive number, got -1"),
        (lambda: js.cla(rank=0, alpha=1.0), "rank must be at least 1, got 0"),
        (lambda: js.c3la(rank=2), "give chain_every, or total_steps and chains"),
        (lambda: js.c3la(rank=2, total_steps=5), "give chain_every, or total_steps and chains"),
        (lambda: js.c3la(rank=2, total_steps=5, chains=6), "chains must lie between 1 and total_steps=5"),
        (lambda: js.c_paca(rank=2, chain_every=0), "chain_every must be at least 1"),
        (lambda: js.gallop(density=0.1, calibration_steps=0), "gallop needs gradients"),
        (lambda: js.gallop(density=0.1, epsilon=0.0), "epsilon must be positive"),
        (lambda: js.saft(calibration_steps=0), "saft needs gradients"),
        (lambda: js.saft(density=2.0), "density must lie in"),
        (lambda: js.saft(budget=0.1), "None for the other; got density=0.001 and budget=0.1"),
        (lambda: js.shira(rank=0), "rank must be at least 1, got 0"),
        (lambda: js.shira(rank=9, targets="k").init({"k": jnp.ones((4, 4))}), "rank=9 frees 72 entries of k"),
        (
            lambda: js.gallop(density=0.1, gradients={"other": jnp.ones((4, 4))}, targets="k").update(
                {"k": jnp.ones((4, 4))}, js.gallop(density=0.1, targets="k").init({"k": jnp.ones((4, 4))})
            ),
            "no gradient is given for target k",
        ),
        (
            lambda: js.super_tuning(targets="k").update(
                {"k": jnp.ones((4, 4))}, js.super_tuning(targets="k").init({"k": jnp.ones((4, 4))})
            ),
            r"needs the weight of k",
        ),
    ],
)
def test_bad_options_are_named(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(js.InputError, match=message):
        make()


@pytest.mark.parametrize("constructor", [js.shira, js.neuroada, js.cla, js.super_tuning])
def test_a_density_that_a_method_has_no_use_for_is_an_error(constructor: Callable[..., Any]) -> None:
    options = {} if constructor is js.super_tuning else {"rank" if constructor is not js.neuroada else "k": 1}
    tx = constructor(targets=js.Target("k", density=0.25), **options)
    params = {"k": jnp.ones((4, 4))}
    if constructor is js.super_tuning:
        assert tx.init(params).support["k"].shape == (1, 4)
        return
    with pytest.raises(js.InputError, match=r"js.Target of k asks for density=0.25"):
        tx.init(params)
