"""The bounds of Beyond LoRA: against the paper's expansions, and what they order."""

import itertools
import math

import numpy as np
import pytest

from jaxsparse.analysis.bounds import (
    CorrectionTerms,
    base_bound,
    correction_terms,
    generalisation_bound,
    trained_parameters,
    update_bound,
)
from jaxsparse.common.errors import InputError

LAYERS = [(64, 32), (32, 96), (48, 48)]


def bound(method: str, **changes: int) -> float:
    return update_bound(method, LAYERS, **{"rank": 4, "samples": 1000, "chains": 6, **changes})


def test_the_orders_that_the_paper_claims() -> None:
    assert bound("lora") == bound("lora_plus")
    assert bound("cla") == bound("r_cla") == bound("paca") == bound("asym_lora") < bound("lora")
    assert bound("c3la") == bound("r_c3la") == bound("rac_lora") == bound("c_paca") > bound("r_cla")
    assert math.isclose(bound("rac_lora"), math.sqrt(6) * bound("asym_lora"))
    assert math.isclose(bound("cola"), math.sqrt(6) * bound("lora"))
    assert bound("cola") > bound("c3la")


@pytest.mark.parametrize("method", ["lora", "cla", "c3la", "cola", "rac_lora", "full"])
def test_bounds_grow_with_rank_and_layers_and_fall_with_samples(method: str) -> None:
    assert math.isclose(bound(method, samples=4000), bound(method) / 2)
    assert math.isclose(bound(method, bits=8), bound(method) / 2)
    assert math.isclose(update_bound(method, LAYERS, rank=4, samples=1000, chains=6, sigma=3.0), 3 * bound(method))
    assert update_bound(method, LAYERS * 2, rank=4, samples=1000, chains=6) > bound(method)
    if method != "full":
        assert math.isclose(bound(method, rank=16), 2 * bound(method))


def test_the_formula_of_the_paper() -> None:
    r, n, q, k, sigma = 4, 1000, 32, 6, 1.0
    outputs, both = sum(o for _, o in LAYERS), sum(i + o for i, o in LAYERS)
    assert math.isclose(bound("c3la"), math.sqrt(2 * r * q * sigma**2 * k * math.log(2) * outputs / n))
    assert math.isclose(bound("lora_plus"), math.sqrt(2 * r * q * sigma**2 * math.log(2) * both / n))
    assert trained_parameters("full", LAYERS, rank=4) == 64 * 32 + 32 * 96 + 48 * 48


def test_the_base_is_bounded_better_by_more_samples_and_worse_by_more_certainty() -> None:
    values = [base_bound(n, epsilon=0.01, delta=0.05, loss_bound=2.0) for n in (100, 1000, 10_000)]
    assert values == sorted(values, reverse=True)
    assert base_bound(100, epsilon=0.01, delta=0.001, loss_bound=2.0) > values[0]
    assert math.isclose(values[1], 0.01 + 2 * math.sqrt((3 * math.log(1000 / 0.05) + 8) / 1000))


def expansion(kept: np.ndarray, added: np.ndarray, lipschitz: np.ndarray, offsets: np.ndarray, size: float) -> float:
    """Every product of Theorem 1 but those of `kept` alone, one by one."""
    layers, total = len(kept), 0.0
    for below in range(layers):  # what enters below a layer: the input, or the offset of the activation there
        enters = size if below == 0 else offsets[below - 1]
        above = range(below, layers)
        for choice in itertools.product((0, 1), repeat=len(above)):
            if any(choice):
                factors = [
                    (added if pick else kept)[at] * lipschitz[at] for pick, at in zip(choice, above, strict=True)
                ]
                total += enters * math.prod(factors)
    return total


@pytest.mark.parametrize("layers", [1, 2, 3, 6])
def test_correction_terms_are_the_sums_that_the_theorem_writes_out(layers: int, rng: np.random.Generator) -> None:
    w, d, lipschitz, offsets = rng.uniform(0.1, 2, size=(4, layers))
    terms = correction_terms(
        list(w),
        list(d),
        input_bound=1.7,
        loss_lipschitz=0.6,
        activation_lipschitz=list(lipschitz),
        activation_offsets=list(offsets),
    )
    np.testing.assert_allclose(terms.of_update, 1.2 * expansion(w, d, lipschitz, offsets, 1.7), rtol=1e-9)
    np.testing.assert_allclose(terms.of_base, 1.2 * expansion(d, w, lipschitz, offsets, 1.7), rtol=1e-9)


def test_an_update_of_nothing_costs_nothing_and_a_small_one_is_not_lost_to_rounding(rng: np.random.Generator) -> None:
    w = list(rng.uniform(1, 3, size=5))
    assert correction_terms(w, [0.0] * 5, input_bound=1.0, activation_offsets=[1.0] * 5).of_update == 0
    tiny = correction_terms(w, [1e-20] * 5, input_bound=1.0).of_update
    slope = 2 * sum(math.prod(w) / each for each in w)
    np.testing.assert_allclose(tiny, slope * 1e-20, rtol=1e-9)


def test_the_bound_is_an_upper_bound_on_a_network(rng: np.random.Generator) -> None:
    base, update = rng.normal(size=(2, 4, 8, 8))
    update *= 0.1
    norms = [[float(np.linalg.norm(w, 2)) for w in each] for each in (base, update)]
    terms = correction_terms(*norms, input_bound=1.0)
    x = rng.normal(size=(500, 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)

    def outputs(weights: np.ndarray) -> np.ndarray:
        hidden = x
        for w in weights:
            hidden = np.maximum(hidden @ w, 0)
        return hidden

    distance = np.linalg.norm(outputs(base + update) - outputs(base), axis=1).max()
    assert 2 * distance <= terms.of_update
    assert generalisation_bound(0.1, 0.2, terms) == min(0.1 + terms.of_update, 0.2 + terms.of_base)


def test_what_exceeds_a_float_is_infinite() -> None:
    assert correction_terms([1e200] * 3, [1.0] * 3, input_bound=1.0) == CorrectionTerms(math.inf, math.inf)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bound("gasdu"), "method 'gasdu' has no bound in Beyond LoRA"),
        (lambda: bound("cla", rank=33), "rank=33 is more than the 32 inputs"),
        (lambda: bound("cla", samples=0), "samples must be at least 1"),
        (lambda: update_bound("cla", [], rank=1, samples=1), "at least one layer"),
        (lambda: base_bound(10, epsilon=0.1, delta=0.5, loss_bound=1.0), "delta must be below 0.5"),
        (lambda: correction_terms([1.0, 2.0], [1.0], input_bound=1.0), "update_norms must hold 2 numbers"),
        (lambda: correction_terms([1.0], [-1.0], input_bound=1.0), "not negative"),
        (lambda: correction_terms([], [], input_bound=1.0), "base_norms must hold at least 1"),
    ],
)
def test_bad_numbers_say_why(call: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()  # type: ignore[operator]
