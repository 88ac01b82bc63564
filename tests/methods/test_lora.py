"""Low-rank methods beside NumPy, and what they are equal to.

The NumPy side holds its own weights and gradients and shares no code with the library; what is drawn at random (A), and
the signs of singular vectors, are handed over.
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js

LAYERS, INPUTS, OUTPUTS, STEPS = 2, 6, 5, 30
# Gradient descent at Adam's rate blows rounding errors up.
RATES = {"adam": 0.05, "sgd": 0.01}
TARGET = js.Target("layers/kernel", stack_axes=(0,))


@dataclass
class Optimizer:
    """Adam or gradient descent on one array."""

    adam: bool
    count: int = 0
    m: Any = 0.0
    v: Any = 0.0

    def step(self, g: np.ndarray) -> np.ndarray:
        if not self.adam:
            return -RATES["sgd"] * g
        self.count += 1
        self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
        return -RATES["adam"] * (self.m / (1 - 0.9**self.count)) / (np.sqrt(self.v / (1 - 0.999**self.count)) + 1e-8)


@dataclass
class Peer:
    """One matrix under a low-rank method.

    Attributes:
        base: W_0, later with the merged products of finished chains.
        adam: whether the inner optimizer is Adam.
        scale: alpha / r.
        ratio: LoRA+'s.
        trains_a: whether A trains.
        period: steps of a chain.
        gamma: of the gradient's start.
        start: "normal", "ga" or "one".
        looks: first gradients whose mean decides the start.
    """

    base: np.ndarray
    adam: bool
    scale: float = 2.0
    ratio: float = 1.0
    trains_a: bool = True
    period: int | None = None
    gamma: float = 16.0
    start: str = "normal"
    looks: int = 0
    rank: int = 2
    a: Any = None
    b: Any = None
    steps: int = 0
    seen: list = field(default_factory=list)

    def weight(self) -> np.ndarray:
        return self.base if self.b is None else self.base + self.scale * self.a @ self.b

    def fresh(self, a: np.ndarray) -> None:
        self.base, self.a, self.b = self.weight(), a, np.zeros((self.rank, OUTPUTS))
        self.of_a, self.of_b = Optimizer(self.adam), Optimizer(self.adam)

    def from_gradient(self, like_a: np.ndarray, like_b: np.ndarray) -> None:
        u, s, vt = np.linalg.svd(np.mean(self.seen, axis=0))
        r = self.rank
        if self.start == "ga":
            a, b = OUTPUTS**0.25 * u[:, :r], OUTPUTS**0.25 * vt[r : 2 * r]
        else:
            a, b = -u[:, :r] * np.sqrt(s[:r] / s[0]), vt[:r] * np.sqrt(s[:r] / s[0])[:, None]
        a, b = a / np.sqrt(self.gamma), b / np.sqrt(self.gamma)
        a, b = a * np.sign(np.sum(a * like_a, axis=0)), b * np.sign(np.sum(b * like_b, axis=1))[:, None]
        self.of_a, self.of_b, self.a, self.b = Optimizer(self.adam), Optimizer(self.adam), a, b
        if self.start == "ga":
            self.base = self.base - self.scale * a @ b

    def train(self, g: np.ndarray) -> None:
        da, db = self.scale * g @ self.b.T, self.scale * self.a.T @ g
        if self.trains_a:
            self.a = self.a + self.of_a.step(da)
        self.b = self.b + self.ratio * self.of_b.step(db)
        self.steps += 1

    def step(self, g: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
        """One update; `a` and `b` are the library's afterwards."""
        if len(self.seen) < self.looks:
            self.seen.append(g)
            if len(self.seen) == self.looks:
                self.from_gradient(a, b)
            return
        if self.period is not None and self.steps % self.period == 0 and self.steps:
            self.fresh(a)  # the first step of a chain leaves A alone, for B is zero
        self.train(g)


@dataclass
class DoraPeer(Peer):
    """One matrix under DoRA, whose norms are held constant in the gradient."""

    magnitude: Any = None

    def weight(self) -> np.ndarray:
        v = super().weight()
        return v if self.magnitude is None else self.magnitude * v / np.linalg.norm(v, axis=0)

    def fresh(self, a: np.ndarray) -> None:
        super().fresh(a)
        self.magnitude, self.of_m = np.linalg.norm(self.base, axis=0), Optimizer(self.adam)

    def train(self, g: np.ndarray) -> None:
        v = Peer.weight(self)
        c = np.linalg.norm(v, axis=0)
        dm = np.sum(g * v / c, axis=0)
        super().train(g * self.magnitude / c)
        self.magnitude = self.magnitude + self.of_m.step(dm)


METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({}, {}),
    "lora alpha": ({"alpha": 3.0}, {"scale": 1.5}),
    "lora_plus": ({"ratio": 3.0}, {"ratio": 3.0}),
    "cola": ({"chain_every": 7}, {"period": 7}),
    "asym_lora": ({}, {"trains_a": False}),
    "rac_lora": ({"total_steps": 30, "chains": 4}, {"trains_a": False, "period": 7}),
    "dora": ({}, {}),
    "lora_ga": ({"calibration_steps": 2}, {"start": "ga", "looks": 2}),
    "lora_one": ({"gamma": 4.0}, {"start": "one", "looks": 1, "gamma": 4.0}),
}


@pytest.mark.parametrize("adam", [True, False], ids=["adam", "sgd"])
@pytest.mark.parametrize("name", METHODS)
def test_follows_its_paper(name: str, adam: bool, rng: np.random.Generator) -> None:
    options, choices = METHODS[name]
    x, goal = rng.normal(size=(4, INPUTS)), rng.normal(size=(LAYERS, 4, OUTPUTS))
    start = rng.normal(size=(LAYERS, INPUTS, OUTPUTS))
    make_peer = DoraPeer if name == "dora" else Peer
    peers = [make_peer(start[layer], adam, **choices) for layer in range(LAYERS)]

    def slope(layer: int) -> np.ndarray:
        """The gradient of the sum of tanh(xW - goal)^2 at the peer's own weights."""
        z = np.tanh(x @ peers[layer].weight() - goal[layer])
        return x.T @ (2 * z * (1 - z * z))

    with jax.enable_x64(True):
        params = {"layers": {"kernel": jnp.asarray(start)}, "norm": jnp.asarray(rng.normal(size=3))}
        frozen = np.asarray(params["norm"])
        inner = optax.adam(RATES["adam"]) if adam else optax.sgd(RATES["sgd"])
        tx = getattr(js, name.split()[0])(inner, rank=2, targets=[TARGET], seed=int(rng.integers(99)), **options)
        gradient = jax.jit(jax.grad(lambda p: jnp.sum(jnp.tanh(x @ p["layers"]["kernel"] - goal) ** 2)))
        state, update = tx.init(params), jax.jit(tx.update)
        if "start" not in choices:
            for layer, peer in enumerate(peers):
                peer.fresh(np.asarray(state.factors.a["layers"]["kernel"][layer]))
        for _ in range(STEPS):
            slopes = [slope(layer) for layer in range(LAYERS)]
            updates, state = update(gradient(params), state, params)
            params = optax.apply_updates(params, updates)
            for layer, peer in enumerate(peers):
                factors = (np.asarray(tree["layers"]["kernel"][layer]) for tree in state.factors[:2])
                peer.step(slopes[layer], *factors)
                np.testing.assert_allclose(params["layers"]["kernel"][layer], peer.weight(), rtol=1e-6, atol=1e-9)
                if peer.b is not None:
                    np.testing.assert_allclose(state.factors.b["layers"]["kernel"][layer], peer.b, rtol=1e-5, atol=1e-9)
        np.testing.assert_array_equal(params["norm"], frozen)
        assert np.all(params["layers"]["kernel"] != start)


def trees(rng: np.random.Generator, count: int = 1) -> list[dict[str, jax.Array]]:
    return [{"kernel": jnp.asarray(rng.normal(size=(INPUTS, OUTPUTS)), jnp.float32)} for _ in range(count)]


def run(tx: Any, params: Any, gradients: list, state: Any = None) -> tuple[Any, Any]:
    state, update = tx.init(params) if state is None else state, jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def test_asymmetric_lora_of_an_identity_is_cheap_lora(rng: np.random.Generator) -> None:
    params, *gradients = trees(rng, 8)
    asymmetric = js.asym_lora(optax.adamw(0.1, weight_decay=0.1), rank=3, alpha=5.0, targets="kernel")
    state = asymmetric.init(params)
    state = state._replace(factors=state.factors._replace(a={"kernel": jnp.eye(INPUTS, 3)[None]}))
    one, _ = run(asymmetric, params, gradients, state)
    cheap = js.cla(optax.adamw(0.1, weight_decay=0.1), rank=3, alpha=5.0, targets="kernel")
    other, _ = run(cheap, params, gradients)
    np.testing.assert_allclose(one["kernel"], other["kernel"], rtol=1e-5, atol=1e-6)
    assert np.all(one["kernel"][:3] != params["kernel"][:3])


@pytest.mark.parametrize("name", ["lora", "lora_plus", "asym_lora", "dora", "lora_ga"])
def test_the_model_starts_unchanged(name: str, rng: np.random.Generator) -> None:
    """Without a rate nothing moves, though the state is ready; with one the first step moves everything."""
    params, gradient = trees(rng, 2)
    given = {"gradients": gradient} if name == "lora_ga" else {}
    for rate in (0.0, 10.0):
        tx = getattr(js, name)(optax.sgd(rate), rank=2, targets="kernel", **given)
        tuned, state = run(tx, params, [gradient] * (1 if rate else 3))
        if rate:
            assert np.all(tuned["kernel"] != params["kernel"])
        else:
            np.testing.assert_array_equal(tuned["kernel"], params["kernel"])
            assert np.any(state.factors.a["kernel"])


def test_lora_one_starts_with_the_best_step_of_its_rank(rng: np.random.Generator) -> None:
    params, gradient = trees(rng, 2)
    u, s, vt = np.linalg.svd(gradient["kernel"])
    step = -2 / 128 / s[0] * (u[:, :2] * s[:2]) @ vt[:2]
    for given in ({}, {"gradients": gradient}):
        tx = js.lora_one(optax.sgd(0.1), rank=2, targets="kernel", **given)
        tuned, state = run(tx, params, [gradient])
        np.testing.assert_allclose(tuned["kernel"] - params["kernel"], step, atol=1e-6)
        assert (int(state.progress.steps), int(state.progress.refreshes)) == (0, 1)


def test_gradients_that_are_handed_in_spare_the_looking(rng: np.random.Generator) -> None:
    params, first, *rest = trees(rng, 6)
    for name in ("lora_ga", "lora_one"):
        make = getattr(js, name)
        looked, _ = run(make(optax.adam(0.1), rank=2, targets="kernel"), params, [first, *rest])
        handed = make(optax.adam(0.1), rank=2, targets="kernel", gradients=first)
        lead = [first] if name == "lora_one" else []  # its first update adds the product, and does not train
        other, state = run(handed, params, [*lead, *rest])
        np.testing.assert_allclose(looked["kernel"], other["kernel"], rtol=1e-5, atol=1e-6)
        assert state.evidence == ()
        assert int(state.progress.steps) == len(rest)


@pytest.mark.parametrize("name", ["cola", "rac_lora"])
def test_a_chain_ends_without_a_jump_and_begins_afresh(name: str, rng: np.random.Generator) -> None:
    params, *gradients = trees(rng, 5)
    tx = getattr(js, name)(optax.adam(0.1), rank=2, chain_every=4, targets="kernel")
    tuned, before = run(tx, params, gradients)
    still = jax.tree.map(jnp.zeros_like, params)
    after_reset, after = run(tx, tuned, [still], before)
    np.testing.assert_array_equal(after_reset["kernel"], tuned["kernel"])
    assert np.any(before.factors.b["kernel"])
    assert not np.any(after.factors.b["kernel"])
    assert np.all(before.factors.a["kernel"] != after.factors.a["kernel"])
    assert (int(before.inner[0].count), int(after.inner[0].count)) == (4, 1)
    assert not np.any(optax.tree.norm(after.inner[0].mu))
    assert (int(before.progress.refreshes), int(after.progress.refreshes)) == (1, 2)


def test_the_rate_of_a_chain_does_not_restart(rng: np.random.Generator) -> None:
    params, gradient = trees(rng, 2)
    rate = optax.linear_schedule(1.0, 0.0, 8)
    options = {"rank": 2, "alpha": 2.0, "chain_every": 2, "targets": "kernel"}
    tx = js.rac_lora(optax.identity(), learning_rate=rate, **options)
    state, g = tx.init(params), np.asarray(gradient["kernel"])
    for step in range(6):
        updates, state = tx.update(gradient, state, params)
        a = np.asarray(state.factors.a["kernel"][0])
        np.testing.assert_allclose(updates["kernel"], -(1 - step / 8) * a @ (a.T @ g), rtol=1e-4, atol=1e-7)


def test_lora_plus_is_lora_at_ratio_1_and_its_ratio_is_16(rng: np.random.Generator) -> None:
    params, *gradients = trees(rng, 4)
    results = {}
    for name, options in (("lora", {}), ("lora_plus", {"ratio": 1.0}), ("default", {}), ("16", {"ratio": 16.0})):
        make = js.lora if name == "lora" else js.lora_plus
        tx = make(optax.adam(0.01), rank=2, targets="kernel", **options)
        results[name] = np.asarray(run(tx, params, gradients)[0]["kernel"])
    np.testing.assert_array_equal(results["lora"], results["lora_plus"])
    np.testing.assert_array_equal(results["default"], results["16"])
    assert np.all(results["lora"] != results["16"])


def test_dora_splits_a_weight_into_magnitude_and_direction(rng: np.random.Generator) -> None:
    """W = m V / c; and an output whose weights are all zero stays."""
    params, *gradients = trees(rng, 6)
    params["kernel"] = params["kernel"].at[:, 2].set(0)
    tuned, state = run(js.dora(optax.adam(0.1), rank=2, targets="kernel"), params, gradients)
    a, b, m = (np.asarray(tree["kernel"][0]) for tree in state.factors)
    v = params["kernel"] + 2 * a @ b
    others = [0, 1, 3, 4]
    np.testing.assert_allclose(np.linalg.norm(v, axis=0), state.norms["kernel"][0], rtol=1e-5)
    np.testing.assert_allclose(
        tuned["kernel"][:, others], (m * v)[:, others] / np.linalg.norm(v, axis=0)[others], rtol=1e-4
    )
    assert not np.any(tuned["kernel"][:, 2])
    assert np.all(m[others] != np.linalg.norm(params["kernel"], axis=0)[others])


def test_a_matrix_without_a_first_gradient_stays_under_lora_one(rng: np.random.Generator) -> None:
    params, gradient = trees(rng, 2)
    tx = js.lora_one(optax.adam(0.1), rank=2, targets="kernel")
    tuned, state = run(tx, params, [jax.tree.map(jnp.zeros_like, params), gradient])
    np.testing.assert_array_equal(tuned["kernel"], params["kernel"])
    assert (int(state.progress.steps), int(state.progress.skipped)) == (1, 0)


KERNEL = {"kernel": jnp.ones((INPUTS, OUTPUTS))}


@pytest.mark.parametrize("name", ["lora", "lora_plus", "cola", "asym_lora", "rac_lora", "dora", "lora_ga", "lora_one"])
def test_an_inner_optimizer_is_asked_for(name: str) -> None:
    chain = {"chain_every": 2} if name in ("cola", "rac_lora") else {}
    with pytest.raises(TypeError, match=f"{name} trains factors of the weights and needs an inner optimizer"):
        getattr(js, name)(**chain)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora", {"rank": 0}, "rank must be at least 1, got 0"),
        ("lora", {"rank": 6}, "rank=6 does not fit target kernel of 6 x 5"),
        ("lora_ga", {"rank": 3}, "it has 5 singular directions, of which lora_ga needs 6"),
        ("lora", {"alpha": 0.0}, "alpha must be a positive number, got 0"),
        ("dora", {"alpha": float("nan")}, "alpha must be a positive number, got nan"),
        ("lora_plus", {"ratio": -1.0}, "ratio must be a positive number"),
        ("lora_ga", {"gamma": 0.0}, "gamma must be a positive number"),
        ("lora_one", {"calibration_steps": 0}, "give gradients, or calibration_steps of at least 1"),
        ("cola", {}, "give chain_every, or total_steps and chains"),
        ("rac_lora", {"total_steps": 5, "chains": 6}, "chains must lie between 1 and total_steps=5"),
        ("lora", {"targets": js.Target("kernel", density=0.5)}, "a low-rank method has a rank"),
        ("lora_ga", {"gradients": {"other": KERNEL["kernel"]}}, "no gradient is given for target kernel"),
        ("lora_ga", {"gradients": {"kernel": jnp.ones((5, 6))}}, r"has shape \(5, 6\), expected \(6, 5\)"),
    ],
)
def test_bad_options_are_named(name: str, options: dict, message: str) -> None:
    def use() -> None:
        tx = getattr(js, name)(optax.sgd(0.1), **{"rank": 1, "targets": "kernel", **options})
        tx.update(KERNEL, tx.init(KERNEL), KERNEL)

    with pytest.raises(js.InputError, match=message):
        use()
