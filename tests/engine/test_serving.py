"""Many adapters in one batch: every row gets what its adapter, applied alone, would give it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxsparse as js
from jaxsparse.common.errors import InputError
from jaxsparse.deltas import apply, diff, stack
from jaxsparse.models.checkpoints import load
from jaxsparse.models.functional import LanguageModel
from jaxsparse.models.generate import generate
from jaxsparse.subspaces.targets import matrix_view
from tests.deltas.adapters import KINDS, adapter
from tests.deltas.models import with_factors
from tests.models.small import CONFIGS, random_params, random_tokens

NEAR = 1e-4
"""Logits this near each other may change places by rounding: no order of sums is the right one."""


def mixed(rng, base, count, size=0.3):
    """So many adapters of all kinds in turn: deltas by name, and tuned models."""
    made = {f"{KINDS[n % len(KINDS)]} {n}": adapter(rng, KINDS[n % len(KINDS)], base, size) for n in range(count)}
    return {name: delta for name, (delta, _) in made.items()}, [tuned for _, tuned in made.values()]


def assert_greedy(model, params, prompt, served, alone):
    """Fails unless both continue a prompt alike, but for a choice between equals up to rounding."""
    at = next((n for n, (ours, theirs) in enumerate(zip(served, alone, strict=True)) if ours != theirs), None)
    if at is not None:
        logits = model.logits(params, jnp.array([[*prompt, *alone[:at]]]))[0, -1]
        assert abs(float(logits[served[at]] - logits[alone[at]])) < NEAR, (at, served, alone)


@pytest.mark.parametrize("name", ["grouped", "biases", "gpt2_untied", "tied"])
def test_logits_of_every_row_are_those_of_its_adapter_alone(rng, name):
    model = LanguageModel(CONFIGS[name])
    base = random_params(model, rng)
    deltas, tuned = mixed(rng, base, 7)
    stacked, tokens = stack(deltas, base=base), random_tokens(rng, 12, 9)
    rows = [*rng.permutation(7).tolist(), None, 3, 3, None, 5]
    served = jax.jit(js.serve(model.logits))(base, stacked, stacked.numbers(rows), tokens)
    for row, number in enumerate(rows):
        alone = model.logits(base if number is None else tuned[number], tokens[row : row + 1])[0]
        np.testing.assert_allclose(served[row], alone, rtol=1e-4, atol=2e-5, err_msg=str(number))


def assert_generates_as_alone(model, base, rng, prompts, adapters, new, size=0.3):
    deltas, tuned = mixed(rng, base, adapters, size)
    names = [*deltas, None]
    rows = [names[n] for n in rng.integers(0, len(names), len(prompts))]
    served, stacked = js.ServedModel(model), stack(deltas, base=base)
    together = generate(served, served.parameters(base, stacked, rows), prompts, max_new_tokens=new, stop_ids=[])
    for number, name in enumerate(names):
        params = base if name is None else tuned[number]
        own = [row for row, named in enumerate(rows) if named == name]
        # As many rows as the whole batch, so that one shape is compiled.
        padded = [prompts[row] for row in own] + [prompts[0]] * (len(prompts) - len(own))
        alone = generate(model, params, padded, max_new_tokens=new, stop_ids=[])
        for row, tokens in zip(own, alone, strict=False):
            assert_greedy(model, params, prompts[row], together[row], tokens)


@pytest.mark.parametrize("name", ["grouped", "gpt2"])
def test_64_rows_with_16_adapters_generate_as_each_alone(rng, name):
    model = LanguageModel(CONFIGS[name])
    prompts = [random_tokens(rng, int(length)).tolist() for length in rng.integers(1, 20, 64)]
    assert_generates_as_alone(model, random_params(model, rng), rng, prompts, 16, new=8)


@pytest.mark.slow
def test_a_trained_model_serves_16_adapters(rng, shared):
    checkpoint = load(shared / "models/stories260k/stories260K.bin")
    prompts = [[1, *rng.integers(3, 500, int(length)).tolist()] for length in rng.integers(0, 10, 64)]
    model = LanguageModel(checkpoint.config)
    assert_generates_as_alone(model, checkpoint.params, rng, prompts, 16, new=24, size=0.05)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1))
def test_products_of_any_shape(seed):
    rng = np.random.default_rng(seed)
    inputs, outputs, rows, length = (int(n) for n in rng.integers(1, 9, 4))
    base = {"w": jnp.asarray(rng.normal(size=(inputs, outputs)), jnp.float32)}
    view = matrix_view((inputs, outputs), (), (0,), (1,))
    deltas, tuned = [], []
    for kind in rng.integers(0, 4, int(rng.integers(1, 6))):
        changed = np.array(base["w"])
        if kind == 0:
            mask = rng.random(changed.shape) < rng.random()
            changed[mask] += rng.normal(size=mask.sum())
        elif kind == 1:
            changed[int(rng.integers(inputs))] += 1
        elif kind == 2:
            changed[:, int(rng.integers(outputs))] += 1
        factors = {"w": with_factors(rng, base["w"], view, gain=bool(rng.integers(2)))} if kind == 3 else {}
        deltas.append(
            diff(base, {"w": jnp.asarray(changed)}, slices={"w": view} if kind in (1, 2) else None, factors=factors)
        )
        tuned.append(apply(base, deltas[-1])["w"])
    stacked = stack(deltas, base=base)
    numbers = rng.integers(-1, len(deltas), rows).astype(np.int32)
    x = jnp.asarray(rng.normal(size=(rows, length, inputs)), jnp.float32)
    served = js.serve(lambda params, x: x @ params["w"])(base, stacked, numbers, x)
    expected = [x[row] @ (base["w"] if number < 0 else tuned[number]) for row, number in enumerate(numbers)]
    np.testing.assert_allclose(served, np.stack(expected), rtol=1e-4, atol=1e-4)


def test_rows_without_an_adapter_keep_their_bits_beside_one_of_huge_numbers(rng):
    base = {"w": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)}
    huge = {"w": base["w"].at[3].set(1e30).at[5, 2].set(-1e30)}
    small = {"w": base["w"].at[1, 1].add(1.0)}
    stacked = stack({"huge": diff(base, huge), "small": diff(base, small)}, base=base)
    x = jnp.asarray(rng.normal(size=(6, 16)), jnp.float32)
    function = jax.jit(js.serve(lambda params, x: x @ params["w"]))
    rows = ["huge", None, "small", None, "huge", None]
    served = function(base, stacked, stacked.numbers(rows), x)
    plain = function(base, stacked, stacked.numbers([None] * 6), x)
    np.testing.assert_array_equal(plain, jax.jit(lambda params, x: x @ params["w"])(base, x))
    np.testing.assert_array_equal(served[1::2], plain[1::2])
    np.testing.assert_allclose(served[2], x[2] @ small["w"], rtol=1e-5, atol=1e-5)


def test_other_peoples_layers_serve_too(rng):
    dense, linear = linen.Dense(6), nnx.Linear(5, 6, rngs=nnx.Rngs(0))
    x = jnp.asarray(rng.normal(size=(4, 3, 5)), jnp.float32)
    graph, state = nnx.split(linear)
    models = {
        "linen": (dense.apply, dense.init(jax.random.key(0), x)),
        "nnx": (lambda state, x: nnx.merge(graph, state)(x), state),
    }
    for function, base in models.values():
        tuned = jax.tree.map(lambda leaf: leaf.at[2].add(1.0) if leaf.ndim == 2 else leaf, base)
        stacked = stack({"a": diff(base, tuned)}, base=base)
        served = js.serve(function)(base, stacked, stacked.numbers(["a", None, None, "a"]), x)
        np.testing.assert_allclose(served[::3], function(tuned, x)[::3], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(served[1:3], function(base, x)[1:3])


def test_what_is_not_a_product_of_rows_is_refused(rng):
    base = {"w": jnp.asarray(rng.normal(size=(5, 5)), jnp.float32)}
    stacked = stack([diff(base, {"w": base["w"].at[0, 0].add(1.0)})], base=base)
    numbers, x = stacked.numbers([0, None, 0]), jnp.ones((4, 3, 5))
    with pytest.raises(InputError, match=r"leading axes \(4, 3\) are not the 3 rows"):
        js.serve(lambda params, x: x @ params["w"])(base, stacked, numbers, x)
    with pytest.raises(InputError, match="transposed weight while rows have adapters"):
        js.serve(lambda params, x: x @ params["w"].T)(base, stacked, numbers, x[:3])
    with pytest.raises(InputError, match="rows cannot have changes of their own of weight w"):
        js.serve(lambda params, x: params["w"][x])(base, stacked, numbers, jnp.array([0, 1, 2]))
    with pytest.raises(InputError, match="there is no adapter 'b'; there are '0', or None"):
        stacked.numbers(["b"])


def test_changing_who_has_which_adapter_compiles_nothing(rng):
    base = {"w": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)}
    stacked = stack([diff(base, {"w": base["w"].at[n].add(1.0)}) for n in range(3)], base=base)
    traced = []

    def function(params, x):
        traced.append(1)
        return x @ params["w"]

    served = jax.jit(js.serve(function))
    for rows in ([0, 1], [None, 2], [2, 2]):
        served(base, stacked, stacked.numbers(rows), jnp.ones((2, 5)))
    assert len(traced) == 1


def test_parameters_without_what_adapters_change_are_an_error():
    base = {"kernel": jnp.zeros((2, 2))}
    stacked = stack([diff(base, {"kernel": jnp.ones((2, 2))})], base=base)
    rows = stacked.numbers([0, None])
    with pytest.raises(InputError, match=r"tensor kernel of shape \(2, 2\), which in params is not there"):
        js.serve(lambda p, x: x @ p["params"]["kernel"])({"params": base}, stacked, rows, jnp.ones((2, 2)))
    with pytest.raises(InputError, match=r"in params is of shape \(3, 2\)"):
        js.serve(lambda p, x: x @ p["kernel"])({"kernel": jnp.ones((3, 2))}, stacked, rows, jnp.ones((2, 3)))


@pytest.mark.parametrize("axis", ["input", "output"])
def test_narrow_changes_leave_activations_wide(axis):
    base = {"kernel": jnp.zeros((3, 3))}
    tuned = {"kernel": base["kernel"].at[(0, ...) if axis == "input" else (..., 0)].set(0.5)}
    delta = diff(base, tuned, slices={"kernel": matrix_view((3, 3), (), (0,), (1,))})
    assert delta.tensors["kernel"].axis == axis
    stacked = stack([delta], base=base, dtype=jnp.float16)
    x = jnp.array([[1e5, 0.0, 0.0]])
    served = js.serve(lambda p, x: x @ p["kernel"])(base, stacked, stacked.numbers([0]), x)
    np.testing.assert_allclose(served, x @ tuned["kernel"])
    with pytest.raises(InputError, match="dtype must be one of floating-point numbers, got int32"):
        stack([delta], base=base, dtype=jnp.int32)
    large = diff(base, {"kernel": tuned["kernel"] * 2e5})
    with pytest.raises(InputError, match="a change is too large for dtype float16"):
        stack([large], base=base, dtype=jnp.float16)
