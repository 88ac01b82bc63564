"""The contract that optax asks of every contributed optimizer, on matrix problems, for every method."""

import copy
import functools
from operator import attrgetter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.methods.table import ROWS, Row

INNERS = {
    "none": lambda: None,
    "scale": lambda: optax.scale(-0.1),  # takes no extra arguments
    "momentum": lambda: optax.sgd(0.02, momentum=0.9),
    "adam": lambda: optax.adam(0.05),
}
LAYERS = "layers/b"
rows = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
# How a method meets inner optimizers is one code for all: the first row tries them all, the others one.
PAIRS = [(row, inner) for row in ROWS for inner in (INNERS if row is ROWS[0] else ["adam"])]
inners = pytest.mark.parametrize(("row", "inner"), PAIRS, ids=lambda value: getattr(value, "name", value))


def with_dtypes(*others: Any) -> Any:
    """Rows and inner optimizers in bfloat16, which differs most from what other tests see; the first row in others."""
    cases = [
        (row, inner, dtype) for row, inner in PAIRS for dtype in (jnp.bfloat16, *(others if row is ROWS[0] else ()))
    ]
    return pytest.mark.parametrize(
        ("row", "inner", "dtype"), cases, ids=lambda value: getattr(value, "name", getattr(value, "__name__", value))
    )


def first(row: Row, inner: str) -> Any:
    """What a constructor takes first."""
    return 0.05 if row.own else INNERS[inner]()


def make(row: Row, inner: str, **options: Any) -> optax.GradientTransformationExtraArgs:
    return row.constructor(first(row, inner), **{**row.options, "targets": row.targets, **options})


class Compiled:
    """A method of the table with its functions compiled; kept, since what compiles takes most of these tests' time."""

    def __init__(self, row: Row, inner: str) -> None:
        self.tx = make(row, inner)
        self.init, self.update = jax.jit(self.tx.init), jax.jit(self.tx.update)
        self.donating_step = jax.jit(self._step, donate_argnums=(0, 1))

    def _step(self, params: dict, state: Any, loss: Any) -> tuple[dict, Any]:
        updates, state = self.tx.update(jax.grad(loss)(params), state, params, unexpected=1)
        return optax.apply_updates(params, updates), state


@functools.cache
def compiled(name: str, inner: str) -> Compiled:
    return Compiled(next(row for row in ROWS if row.name == name), inner)


def parabola(target: dict, params: dict) -> jax.Array:
    return sum(jnp.sum(jnp.square((params[name] - target[name]).astype(jnp.float32))) for name in target)


@jax.jit
def gradients_of(loss: Any, params: dict) -> dict:
    return jax.grad(loss)(params)


def problem(rng: np.random.Generator, dtype: Any = jnp.float32) -> tuple[dict, Any]:
    """Two matrices, one of which may be a stack of layers, and a parabola over them, which is a pytree."""
    shapes = {"a": (2, 3), LAYERS: (5, 2)}
    target = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in shapes.items()}
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), target)
    return params, jax.tree_util.Partial(parabola, target)


def compilations(function: Any, *args: Any) -> int:
    """Number of compilations that a call causes."""
    count = 0

    def listen(event: str, *_: Any, **__: Any) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.block_until_ready(function(*args))
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    return count


@inners
def test_accepts_extra_arguments_and_does_not_recompile(row: Row, inner: str, rng: np.random.Generator) -> None:
    method = compiled(row.name, inner)
    params, loss = problem(rng)
    params, state = method.donating_step(params, method.init(params), loss)
    assert compilations(method.donating_step, params, state, loss) == 0
    assert compilations(jax.jit(lambda x: x * rng.normal()), jnp.ones(3)) > 0  # the counter counts


@inners
def test_converges_when_every_entry_can_move(row: Row, inner: str, rng: np.random.Generator) -> None:
    if row.converging is None or inner == "none":
        pytest.skip("frees a part of the entries, or only masks")
    tx = make(row, inner, **row.converging)
    params, loss = problem(rng)
    before = loss(params)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3000))((params, tx.init(params)))
    assert loss(params) < 1e-2 * before


@inners
def test_state_survives_tree_map_params(row: Row, inner: str, rng: np.random.Generator) -> None:
    method = compiled(row.name, inner)
    tx = method.tx
    params, loss = problem(rng)
    _, state = method.update(gradients_of(loss, params), method.init(params), params)
    mapped = optax.tree.map_params(tx, lambda leaf: leaf, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)
    marked = optax.tree.map_params(tx, lambda _: True, state, transform_non_params=lambda _: False)
    marks = dict(zip(map(id, jax.tree.leaves(state)), jax.tree.leaves(marked), strict=True))
    assert all(marks[id(leaf)] for leaf in jax.tree.leaves([attrgetter(name)(state) for name in row.mirrors]))
    assert not any(marks[id(leaf)] for leaf in state.progress)


@rows
def test_inner_state_has_one_entry_for_everything_that_trains(row: Row, rng: np.random.Generator) -> None:
    method = compiled(row.name, "adam")
    params, loss = problem(rng)
    state = method.init(params)
    for _ in range(row.looks + 1):
        updates, state = method.update(gradients_of(loss, params), state, params)
    moved = sum(int(jnp.sum(leaf != 0)) for leaf in jax.tree.leaves(updates))
    moments = jax.tree.leaves(row.moments(state))
    if row.slots is not None:
        trained = sum(row.slots(*leaf.shape) for leaf in jax.tree.leaves(params))
        assert sum(leaf.size for leaf in moments) == 2 * trained
        return
    assert sum(int(jnp.sum(leaf != 0)) for leaf in moments) == 2 * moved
    assert row.filled or sum(leaf.size for leaf in moments) == 2 * moved
    assert (moved == sum(leaf.size for leaf in jax.tree.leaves(params))) == row.dense
    masters = [attrgetter(name)(state) for name in row.mirrors if name.endswith("master")]
    assert jax.tree.leaves(masters) == []  # float32 weights are their own masters


@inners
def test_equals_itself_under_inject_hyperparams(row: Row, inner: str, rng: np.random.Generator) -> None:
    params, loss = problem(rng)
    options = {**row.options, "targets": row.targets}
    method = compiled(row.name, inner)
    factory = functools.partial(row.constructor, first(row, inner))
    injected = optax.inject_hyperparams(factory, static_args=row.static)(**options)
    state, injected_state = method.init(params), jax.jit(injected.init)(params)
    injected_update = jax.jit(injected.update)
    for _ in range(4):
        gradients = gradients_of(loss, params)
        updates, state = method.update(gradients, state, params)
        injected_updates, injected_state = injected_update(gradients, injected_state, params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, injected_updates)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), tuple(state), tuple(injected_state.inner_state)
        )
        params = optax.apply_updates(params, updates)


@with_dtypes(jnp.float16, jnp.float32)
def test_parameters_keep_their_dtype_and_state_its_types(
    row: Row, inner: str, dtype: Any, rng: np.random.Generator
) -> None:
    """Updates of narrow weights are float32 by design (DESIGN.md, "Precision"); what is applied keeps the dtype."""
    method = compiled(row.name, inner)
    params, loss = problem(rng, dtype)
    with row.warning(dtype):
        state = method.tx.init(params)
    updates, new_state = method.update(gradients_of(loss, params), state, params)
    expected = jnp.dtype(dtype) if inner == "none" else jnp.dtype(jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {expected}
    assert {leaf.dtype for leaf in jax.tree.leaves(optax.apply_updates(params, updates))} == {jnp.dtype(dtype)}
    types = [jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.asarray(leaf).dtype), tree) for tree in (state, new_state)]
    assert types[0] == types[1]
    jax.lax.cond(jnp.array(True), lambda: state, lambda: new_state)


@with_dtypes(jnp.float32)
def test_multi_steps_emits_nothing_until_the_last_micro_batch(
    row: Row, inner: str, dtype: Any, rng: np.random.Generator
) -> None:
    params, loss = problem(rng, dtype)
    method = compiled(row.name, inner)
    accumulated = optax.MultiSteps(method.tx, every_k_schedule=3)
    with row.warning(dtype):
        state, plain_state = accumulated.init(params), method.tx.init(params)
    update = jax.jit(accumulated.update)
    for step in range(6):
        gradients = gradients_of(loss, params)
        updates, state = update(gradients, state, params)
        if step % 3 < 2:
            assert not any(np.any(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves(updates))
        else:  # three equal gradients have that gradient as their mean
            plain, plain_state = method.update(gradients, plain_state, params)
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=1e-2, atol=1e-6),
                updates,
                plain,
            )
            params = optax.apply_updates(params, updates)
    # A step is an optimizer step: micro-batches do not count.
    assert int(state.inner_opt_state.progress.steps) == 2 - row.looks


@rows
def test_inner_schedule_equals_constant(row: Row, rng: np.random.Generator) -> None:
    params, loss = problem(rng)
    results = []
    rate = optax.constant_schedule(0.05)
    scheduled = row.constructor(rate if row.own else optax.adam(rate), **row.options, targets=row.targets)
    constant = compiled(row.name, "adam")
    for init, update in ((constant.init, constant.update), (jax.jit(scheduled.init), jax.jit(scheduled.update))):
        current, state = params, init(params)
        for _ in range(5):
            updates, state = update(gradients_of(loss, current), state, current)
            current = optax.apply_updates(current, updates)
        results.append(current)
    jax.tree.map(np.testing.assert_array_equal, *results)


@rows
def test_init_works_on_shapes_alone(row: Row, rng: np.random.Generator) -> None:
    method = compiled(row.name, "adam")
    params, _ = problem(rng)
    shapes = jax.eval_shape(method.tx.init, params)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(jnp.shape, method.init(params))


@rows
def test_a_step_may_donate_parameters_and_state(row: Row, rng: np.random.Generator) -> None:
    method = compiled(row.name, "adam")
    params, loss = problem(rng)
    state = method.init(params)
    updates, _ = method.update(gradients_of(loss, params), state, params)
    expected = optax.apply_updates(params, updates)
    moved, _ = method.donating_step(params, state, loss)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), moved, expected)


@inners
def test_trains_its_part_under_masked_and_partition(row: Row, inner: str, rng: np.random.Generator) -> None:
    """What optax's wrappers leave out is no weight of ours, and what they leave in trains as if it were alone."""
    params, loss = problem(rng)
    tx = compiled(row.name, inner).tx
    labels = {"a": "other", LAYERS: "ours"}
    wrapped = {
        "masked": optax.masked(tx, {"a": False, LAYERS: True}),
        "partition": optax.partition({"ours": tx, "other": optax.sgd(0.1)}, labels),
    }

    @jax.jit
    def updates(params: dict) -> tuple[Any, dict[str, Any]]:
        def of(tx: Any, params: dict, gradients: dict) -> Any:
            return tx.update(gradients, tx.init(params), params)[0][LAYERS]

        gradients = jax.grad(loss)(params)
        alone = of(tx, {LAYERS: params[LAYERS]}, {LAYERS: gradients[LAYERS]})
        return alone, {name: of(wrapper, params, gradients) for name, wrapper in wrapped.items()}

    alone, found = updates(params)
    for update in found.values():
        np.testing.assert_allclose(update, alone, rtol=1e-5, atol=1e-7)


@rows
def test_survives_a_copy_with_its_description(row: Row) -> None:
    tx = make(row, "adam")
    assert copy.deepcopy(tx).description.name == row.name
