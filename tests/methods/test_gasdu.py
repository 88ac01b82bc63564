"""GASDU and the fixed mask against NumPy written from the paper, and against the paper's theorems."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse as js


def numpy_topk(gradient: np.ndarray, k: int) -> np.ndarray:
    """Flat indices of the k largest magnitudes, ties to the lowest index."""
    return np.argsort(-np.abs(gradient).ravel(), kind="stable")[:k]


class NumpyGasdu:
    """Algorithm 1 with the choices of METHODS.md, one matrix, Adam or gradient descent on the slots."""

    def __init__(self, k: int, period: int, *, rate: float, adam: bool, carry: str) -> None:
        self.k, self.period, self.rate, self.adam, self.carry = k, period, rate, adam, carry
        self.m, self.v = np.zeros(k), np.zeros(k)
        self.index, self.t, self.adam_steps = None, 0, 0

    def step(self, weight: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        if self.t % self.period == 0:
            new = numpy_topk(gradient, self.k)
            if self.index is not None and self.carry == "reset":
                self.m, self.v, self.adam_steps = np.zeros(self.k), np.zeros(self.k), 0
            if self.index is not None and self.carry == "coordinate":
                where = {c: j for j, c in enumerate(self.index)}
                self.m = np.array([self.m[where[c]] if c in where else 0.0 for c in new])
                self.v = np.array([self.v[where[c]] if c in where else 0.0 for c in new])
            self.index = new
        self.t += 1
        g = gradient.ravel()[self.index]
        step = g
        if self.adam:
            self.adam_steps += 1
            self.m, self.v = 0.9 * self.m + 0.1 * g, 0.999 * self.v + 0.001 * g * g
            m, v = self.m / (1 - 0.9**self.adam_steps), self.v / (1 - 0.999**self.adam_steps)
            step = m / (np.sqrt(v) + 1e-8)
        weight = weight.copy()
        weight.ravel()[self.index] -= self.rate * step
        return weight


@pytest.mark.parametrize("carry", ["slot", "coordinate", "reset"])
@pytest.mark.parametrize("adam", [True, False], ids=["adam", "sgd"])
def test_follows_the_paper_for_30_steps_on_stacked_layers(adam: bool, carry: str, rng: np.random.Generator) -> None:
    layers, rows, columns, period = 2, 5, 7, 4
    features = rng.normal(size=(3, rows)).astype(np.float32)
    goal = rng.normal(size=(layers, 3, columns)).astype(np.float32)
    params = {"layers": {"kernel": jnp.asarray(rng.normal(size=(layers, rows, columns)), jnp.float32)}}

    def loss(params: dict) -> jax.Array:
        return jnp.sum(jnp.tanh(features @ params["layers"]["kernel"] - goal) ** 2)

    inner = optax.adam(0.05) if adam else optax.sgd(0.05)
    tx = js.gasdu(
        inner, density=0.2, refresh_every=period, carry=carry, targets=[js.Target(".*/kernel", stack_axes=(0,))]
    )
    state = tx.init(params)
    update, gradient = jax.jit(tx.update), jax.jit(jax.grad(loss))
    peers = [NumpyGasdu(7, period, rate=0.05, adam=adam, carry=carry) for _ in range(layers)]
    for _ in range(30):
        gradients = gradient(params)
        updates, state = update(gradients, state, params)
        expected = [
            peer.step(np.float64(w), np.float64(g))
            for peer, w, g in zip(peers, params["layers"]["kernel"], gradients["layers"]["kernel"], strict=True)
        ]
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(state.support["layers"]["kernel"], [peer.index for peer in peers])
        np.testing.assert_allclose(params["layers"]["kernel"], expected, rtol=1e-6, atol=1e-6)


def run(tx: Any, params: Any, gradients: list[Any]) -> tuple[list[Any], Any]:
    """The parameters after every step, and the last state."""
    state, trajectory, update = tx.init(params), [], jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    return trajectory, state


def random_trees(rng: np.random.Generator, steps: int, shape: tuple[int, ...] = (6, 5)) -> tuple[Any, list[Any]]:
    def draw() -> Any:
        return {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}

    return draw(), [draw() for _ in range(steps)]


def test_full_density_every_step_is_plain_sgd_to_the_bit(rng: np.random.Generator) -> None:
    params, gradients = random_trees(rng, 5)
    ours, _ = run(js.gasdu(optax.sgd(0.1), density=1.0, refresh_every=1, targets=".*"), params, gradients)
    plain, _ = run(optax.sgd(0.1), params, gradients)
    jax.tree.map(np.testing.assert_array_equal, ours, plain)


def test_an_endless_period_is_the_fixed_mask(rng: np.random.Generator) -> None:
    params, gradients = random_trees(rng, 8)
    options = {"density": 0.3, "targets": ".*"}
    ours, _ = run(js.gasdu(optax.adam(0.1), refresh_every=10**9, **options), params, gradients)
    fixed, _ = run(js.fixed_mask(optax.adam(0.1), **options), params, gradients)
    jax.tree.map(np.testing.assert_array_equal, ours, fixed)


@pytest.mark.parametrize("period", [1, 2, 3, 5])
def test_refreshes_at_step_0_and_every_period(period: int, rng: np.random.Generator) -> None:
    params, gradients = random_trees(rng, 9)
    tx = js.gasdu(density=0.2, refresh_every=period, targets=".*")
    state, supports, update = tx.init(params), [], jax.jit(tx.update)
    for gradient in gradients:
        _, state = update(gradient, state)
        supports.append(np.asarray(state.support["kernel"][0]))
    for step, support in enumerate(supports):
        np.testing.assert_array_equal(support, numpy_topk(gradients[step - step % period]["kernel"], 6))
    assert int(state.progress.refreshes) == -(-9 // period)


def test_a_schedule_of_periods_is_followed(rng: np.random.Generator) -> None:
    params, gradients = random_trees(rng, 12)
    tx = js.gasdu(density=0.2, refresh_every=lambda step: jnp.where(step < 4, 1, 4), targets=".*")
    state, picked, update = tx.init(params), [], jax.jit(tx.update)
    for gradient in gradients:
        _, state = update(gradient, state)
        picked.append(int(state.progress.last_refresh))
    assert sorted(set(picked)) == [0, 1, 2, 3, 7, 11]


def test_adaptive_refreshes_when_retention_falls_and_not_before_the_minimum(rng: np.random.Generator) -> None:
    first, other = (np.zeros((4, 4), np.float32) for _ in range(2))
    first[0], other[3] = rng.normal(size=4), rng.normal(size=4)
    first, other = ({"kernel": jnp.asarray(g)} for g in (first, other))
    tx = js.gasdu(density=0.25, refresh_every=js.adaptive(0.9, minimum=3, maximum=6), targets=".*")
    state, picked, update = tx.init(first), [], jax.jit(tx.update)
    for gradient in [first, other, other, other, other] + [other] * 7:
        _, state = update(gradient, state)
        picked.append(int(state.progress.last_refresh))
    assert picked[:4] == [0, 0, 0, 3]  # fell at once, waited for the minimum
    assert picked[4:] == [3, 3, 3, 3, 3, 9, 9, 9]  # stays high: only the maximum refreshes


def test_both_budgets_on_stacked_and_plain_targets() -> None:
    shapes = {
        "layers": {"self_attn": {"q_proj": {"kernel": (3, 8, 8)}, "k_proj": {"kernel": (3, 8, 4)}}},
        "embed": {"embedding": (100, 8)},
    }
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda x: type(x) is tuple)
    size = 3 * 64 + 3 * 32 + 800

    def counts(**options: Any) -> list[int]:
        state = jax.eval_shape(js.gasdu(optax.adam(1e-3), **options).init, params)
        return [leaf.shape[-1] for leaf in jax.tree.leaves(state.support)]

    assert counts(density=0.1) == [round(0.1 * 32), round(0.1 * 64)]  # k_proj comes first
    assert counts(budget=0.05) == [int(0.05 * size / 6)] * 2
    assert counts(budget=0.05, share="proportional") == [int(0.05 * size * n / 288) for n in (32, 64)]
    assert counts(budget=0.9) == [32, 64]  # capped at the matrix


def test_budget_gives_the_papers_counts_on_llama_2_7b() -> None:
    """METHODS.md: 5,264 slots a matrix at budget 1e-4, 1,678 at density 1e-4."""
    projections = {name: {"kernel": (32, 4096, 4096)} for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    mlp = {"gate_proj": (32, 4096, 11008), "up_proj": (32, 4096, 11008), "down_proj": (32, 11008, 4096)}
    shapes = {
        "layers": {"self_attn": projections, "mlp": mlp, "norms": (2 * 32, 4096)},
        "embed": (32000, 4096),
        "head": (4096, 32000),
        "norm": (4096,),
    }
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16), shapes, is_leaf=lambda x: type(x) is tuple)
    for options, expected in (({"budget": 1e-4}, 5264), ({"density": 1e-4}, 1678)):
        support = jax.eval_shape(js.gasdu(optax.adam(1e-4), **options).init, params).support
        assert {leaf.shape for leaf in jax.tree.leaves(support)} == {(32, expected)}


def quadratic(rng: np.random.Generator, size: int) -> tuple[Any, float, float]:
    """f(w) = 1/2 (w - w*)' H (w - w*) with eigenvalues in [mu, L]: L-smooth and mu-PL, f* = 0."""
    mu, smooth = 0.5, 4.0
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    hessian = basis * rng.uniform(mu, smooth, size) @ basis.T
    centre = rng.normal(size=size)

    def loss(weight: jax.Array) -> jax.Array:
        away = weight.reshape(-1) - centre
        return 0.5 * away @ hessian @ away

    return loss, mu, smooth


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), density=st.floats(0.05, 1.0), period=st.integers(1, 8), share=st.floats(0.1, 1.0)
)
def test_theorems_4_2_and_4_3_hold_at_every_step(seed: int, density: float, period: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    with jax.enable_x64(True):
        loss, mu, smooth = quadratic(rng, 24)
        rate = share / smooth
        tx = js.gasdu(optax.sgd(rate), density=density, refresh_every=period, targets=".*")

        @jax.jit
        def moved(tree: Any, state: Any) -> Any:
            before, gradient = jax.value_and_grad(lambda tree: loss(tree["kernel"]))(tree)
            updates, state = tx.update(gradient, state, tree)
            tree = optax.apply_updates(tree, updates)
            return before, gradient, tree, state, loss(tree["kernel"])

        tree = {"kernel": jnp.asarray(rng.normal(size=(4, 6)))}
        state = tx.init(tree)
        for step in range(20):
            before, gradient, tree, state, after = moved(tree, state)
            g = np.asarray(gradient["kernel"]).ravel()
            support = np.asarray(state.support["kernel"][0])
            retention = np.sum(g[support] ** 2) / np.sum(g**2)
            assert float(state.progress.retention) == pytest.approx(retention, rel=1e-5)
            # Theorem 4.2
            assert after <= (1 - retention * mu * rate) * before * (1 + 1e-9) + 1e-12
            # Theorem 4.3
            age = step % period
            if age == 0:
                at_refresh = retention
            rho = smooth / np.sqrt(2 * mu) * np.sqrt(rate * age / (1 - smooth * rate / 2))
            bound = max(np.sqrt(at_refresh) - rho, 0) ** 2 / (1 + rho) ** 2
            assert retention >= bound - 1e-9


def test_retention_sums_over_targets_and_its_mean_is_over_matrices(rng: np.random.Generator) -> None:
    gradients = {
        name: jnp.asarray(rng.normal(size=(2, 4, 3)) * scale, jnp.float32) for name, scale in (("a", 1), ("b", 9))
    }
    tx = js.gasdu(density=0.25, targets=js.Target(".*", stack_axes=(0,)))
    _, state = tx.update(gradients, tx.init(gradients))
    matrices = [np.float64(matrix).ravel() for leaf in gradients.values() for matrix in leaf]
    kept = [np.sum(np.sort(matrix**2)[-3:]) for matrix in matrices]
    whole = [np.sum(matrix**2) for matrix in matrices]
    assert float(state.progress.retention) == pytest.approx(sum(kept) / sum(whole), rel=1e-5)
    assert float(state.progress.retention_mean) == pytest.approx(np.mean(np.divide(kept, whole)), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"density": 0.0}, ValueError, "density must lie in"),
        ({"density": 1.5}, ValueError, "density must lie in"),
        ({"density": float("nan")}, ValueError, "density must lie in"),
        ({"budget": -1e-4}, ValueError, "budget must lie in"),
        ({}, ValueError, "exactly one of density"),
        ({"density": 0.1, "budget": 0.1}, ValueError, "got density=0.1 and budget=0.1"),
        ({"density": 0.1, "refresh_every": 0}, ValueError, "refresh_every must be at least 1"),
    ],
)
def test_bad_options_fail_at_construction(options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        js.gasdu(optax.sgd(0.1), targets=".*", **options)
