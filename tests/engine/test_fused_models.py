"""On a LLaMA with grouped queries and on a GPT-2, the fused engine follows the reference engine in every method.

The reference is the method's own optax transformation on dense gradients; their pass is compiled once a model.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.engine.low_rank import LowRankState
from jaxsparse.engine.tuner import ReferenceTuner
from jaxsparse.methods.registry import METHODS
from jaxsparse.models.functional import LanguageModel
from tests.models import small

STEPS = 12


class Subject(NamedTuple):
    """A model with weights of all kinds to train.

    Attributes:
        model: four scanned layers, rematerialised.
        targets: matrices of layers, and for LLaMA one outside them; the value heads of LLaMA serve two queries each.
    """

    model: LanguageModel
    targets: list[js.Target]


SUBJECTS = {
    "llama": Subject(
        LanguageModel(dataclasses.replace(small.LLAMA, num_layers=4), remat="full"),
        [js.Target("layers/.*/v_proj/kernel", stack_axes=(0,)), js.Target("lm_head/kernel")],
    ),
    "gpt2": Subject(
        LanguageModel(dataclasses.replace(small.GPT2, num_layers=4), remat="dots"),
        [js.Target("layers/.*/(c_attn|mlp/c_proj)/kernel", stack_axes=(0,))],
    ),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A method that the fused engine runs.

    Attributes:
        constructor: takes the inner optimizer first, then keywords.
        options: keywords; targets are those of the model unless they say otherwise.
        given: what both engines are handed: the "support", the mean "gradients", or nothing.
        looks: first steps that change nothing in the reference engine, and that the fused engine has no need of.
        first: what the constructor takes first.
    """

    constructor: Callable[..., Any]
    options: dict[str, Any]
    given: str = ""
    looks: int = 0
    first: Callable[[], Any] = lambda: optax.adam(0.02)

    @property
    def name(self) -> str:
        words = [v if isinstance(v, str) else name for name, v in self.options.items() if isinstance(v, str | bool)]
        return "-".join([self.constructor.__name__, *words])


GASDU = {"density": 0.1, "refresh_every": 3}
SPIEL = {"density": 0.1, "budget": None, "total_steps": 30, "reselect_every": 4, "accumulation_steps": 2}
CASES = [
    *(Case(js.gasdu, {**GASDU, "carry": carry}) for carry in ("slot", "coordinate", "reset")),
    Case(js.fixed_mask, {"density": 0.1}),
    Case(js.neuroada, {"k": 2}),
    Case(js.neuroada, {"k": 2, "neurons": 0.5, "select": "random"}),
    Case(js.s2ft, {"output": 0.25, "down": 0.1, "head_size": 6, "targets": None}),
    Case(js.gallop, {"density": 0.1}, given="support"),
    Case(js.cla, {"rank": 2}),
    Case(js.r_cla, {"rank": 2}),
    Case(js.c3la, {"rank": 2, "chain_every": 3}),
    Case(js.r_c3la, {"rank": 2, "chain_every": 3}),
    Case(js.paca, {"rank": 2}),
    Case(js.d_paca, {"rank": 2}),
    Case(js.c_paca, {"rank": 2, "chain_every": 3}),
    Case(js.lora, {"rank": 2}),
    Case(js.lora_plus, {"rank": 2}),
    Case(js.cola, {"rank": 2, "chain_every": 3}),
    Case(js.asym_lora, {"rank": 2}),
    Case(js.rac_lora, {"rank": 2, "chain_every": 3}),
    Case(js.dora, {"rank": 2}),
    Case(js.lora_ga, {"rank": 2}, given="gradients"),
    Case(js.lora_one, {"rank": 2}, given="gradients", looks=1),  # there the first step only adds the product
    Case(js.sift, {"density": 0.1}, given="support"),
    Case(js.saft, {"density": 0.1}, given="support"),
    Case(js.shira, {"rank": 1}),
    Case(js.super_tuning, {"density": 0.1, "which": "smallest"}),
    Case(js.bitfit, {"targets": "layers/(input_layernorm/scale|ln_1/bias)"}),
    Case(js.full, {}),
    Case(js.smt, {"blocks": 5, "size": 10}, given="support"),
    Case(js.neuroada, {"k": 2, "unmerged": True}),
    *(Case(js.spiel, {**SPIEL, "grow": grow}, first=lambda: 0.02) for grow in ("AG", "MA")),
    Case(js.lisa, {"layers": 2, "every": 3, "targets": None}),
]


def attention(query: Any, key: Any, value: Any, *, mask: Any, **_: Any) -> Any:
    """`jax.nn.dot_product_attention`, whose softmax is float32 even for wider queries, in their own dtype."""
    key, value = (jnp.repeat(heads, query.shape[2] // key.shape[2], axis=2) for heads in (key, value))
    scores = jnp.einsum("bqnh,bknh->bnqk", query, key) / np.sqrt(query.shape[-1])
    seen = jnp.tril(mask)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(jnp.where(seen, scores, -1e9), axis=-1), value)


@pytest.fixture
def doubles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Arithmetic in float64 throughout."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    with jax.enable_x64(True):
        yield


def start(subject: Subject, rng: np.random.Generator, dtype: Any, rows: int = 2) -> tuple[Any, list[small.Rows]]:
    """Random parameters, and a batch for every step."""
    params = small.random_params(subject.model, rng, dtype)
    return params, [small.random_rows(rng, rows, 6) for _ in range(STEPS)]


def make(case: Case, subject: Subject, params: Any, batch: Any, **changes: Any) -> Any:
    """The method, with what it does not find itself in the fused engine."""
    options = {"targets": subject.targets, "seed": 3, **case.options, **changes}
    if case.given == "gradients":
        options["gradients"] = js.collect_gradients(subject.model.loss, params, [batch], subject.targets)
    method = case.constructor(case.first(), **options)
    if case.given == "support":
        method = js.with_support(method, js.calibrate(subject.model.loss, params, [batch], method))
    return method


@functools.cache
def dense_gradients(model: LanguageModel) -> Callable[..., Any]:
    return jax.jit(jax.value_and_grad(model.loss, has_aux=True))


class Reference(NamedTuple):
    """The loss before a step of the reference engine, and weights and state after it."""

    loss: Any
    params: Any
    method: Any


def reference_run(model: LanguageModel, method: Any, params: Any, batches: Any) -> Iterator[Reference]:
    """Steps of the reference engine."""

    @jax.jit
    def moved(params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
        updates, state = method.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(method.init)(params)
    for batch in batches:
        (loss, _), gradients = dense_gradients(model)(params, batch)
        params, state = moved(params, state, gradients)
        yield Reference(loss, params, state)


def assert_close(found: Any, expected: Any, rtol: float) -> None:
    """Differences are small beside the largest entry of an array."""

    def close(a: Any, b: Any) -> None:
        b = np.asarray(b)
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.max(np.abs(b), initial=0))

    jax.tree.map(close, found, expected)


def assert_follows(case: Case, subject: Subject, method: Any, params: Any, batches: Any, rtol: float) -> None:
    """The same losses, supports and refreshes at every step, and in the end the same weights and moments."""
    tuner = js.fuse(subject.model.loss, method, has_aux=True)
    state = tuner.init(params)
    run = reference_run(subject.model, method, params, [*batches[: case.looks], *batches])
    for batch, expected in zip(batches, itertools.islice(run, case.looks, None), strict=True):
        state, metrics = tuner.step(state, batch)
        np.testing.assert_allclose(metrics.loss, expected.loss, rtol=rtol)
        assert_same_support(state.method, expected.method)
        if metrics.refreshed and case.constructor in (js.gasdu, js.fixed_mask) and not case.given:
            progress = expected.method.progress
            np.testing.assert_allclose(metrics.retention, progress.retention, rtol=1e-6)
            np.testing.assert_allclose(metrics.retention_mean, progress.retention_mean, rtol=1e-6)
    found = tuner.params(state)
    assert_close(found, expected.params, rtol)
    if not isinstance(state.method, LowRankState):
        # Supports over all matrices lie otherwise in the two engines, but what moved shows them.
        moved = (jax.tree.map(np.not_equal, params, after) for after in (found, expected.params))
        jax.tree.map(np.testing.assert_array_equal, *moved)
        if same_places(state.method, expected.method):
            assert_close(moments(state.method), moments(expected.method), 10 * rtol)
    elif "chain_every" not in case.options:  # the weights below an overlay move only when a chain ends
        jax.tree.map(np.testing.assert_array_equal, state.params, tuner.init(params).params)


def moments(method: Any) -> Any:
    """What the inner optimizers of a method's parts remember; SpIEL's is its own."""
    parts = (method.outside, method.drawn) if isinstance(method, js.LayersState) else (method,)
    return [part.optimizer if isinstance(part, js.SpielState) else part.inner for part in parts]


def same_places(found: Any, expected: Any) -> bool:
    return jax.tree.structure(found) == jax.tree.structure(expected)


def assert_same_support(found: Any, expected: Any) -> None:
    if isinstance(found, LowRankState):
        return
    assert int(found.progress.refreshes) == int(expected.progress.refreshes)
    if same_places(found, expected):
        supports = [m.drawn.support if isinstance(m, js.LayersState) else m.support for m in (found, expected)]
        jax.tree.map(np.testing.assert_array_equal, *supports)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_method_follows_the_reference_engine(case: Case, subject: Subject, rng: np.random.Generator) -> None:
    params, batches = start(subject, rng, jnp.float64)
    assert_follows(case, subject, make(case, subject, params, batches[-1]), params, batches, 1e-10)


def momentum() -> optax.GradientTransformation:
    """Adam would blow the rounding of small gradients up to whole steps."""
    return optax.sgd(0.1, momentum=0.9)


# What picks by the gradient is handed its support: float32 has near-ties.
PLAIN = [
    Case(js.fixed_mask, {"density": 0.1}, given="support", first=momentum),
    Case(js.neuroada, {"k": 2}, first=momentum),
    Case(js.paca, {"rank": 2}, first=momentum),
    Case(js.cola, {"rank": 2, "chain_every": 3}, first=momentum),
]


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.name)
def test_single_precision_without_remat(case: Case, rng: np.random.Generator) -> None:
    subject = SUBJECTS["llama"]._replace(model=dataclasses.replace(SUBJECTS["llama"].model, remat="none"))
    params, batches = start(subject, rng, jnp.float32)
    assert_follows(case, subject, make(case, subject, params, batches[-1]), params, batches, 1e-5)


@pytest.mark.parametrize("case", PLAIN[:3], ids=lambda case: case.name)
def test_narrow_weights_follow_by_their_masters(case: Case, rng: np.random.Generator) -> None:
    """The masters of both engines move alike, and the weights are the masters rounded.

    Gradients come out of bfloat16 arithmetic, which a compiler rounds where it likes: alike is within a share of the
    largest move.
    """
    subject = SUBJECTS["llama"]
    params, batches = start(subject, rng, jnp.bfloat16)
    method = make(case, subject, params, batches[-1])
    tuner = js.fuse(subject.model.loss, method, has_aux=True)
    state = tuner.init(params)
    for batch in batches:
        state, _ = tuner.step(state, batch)
    *_, expected = reference_run(subject.model, method, params, batches)
    assert_same_support(state.method, expected.method)
    targets = method.description.resolve(params)
    trees = (params, state.params, expected.params)
    for number, target in enumerate(targets):
        base, found, told = (np.float32(jax.tree.leaves(tree)[target.position]) for tree in trees)
        free, largest = told != base, np.max(np.abs(told - base))
        assert 0 < free.sum() < free.size
        np.testing.assert_allclose(found, told, rtol=2**-7, atol=0.1 * largest)
        master, same = (jax.tree.leaves(tuned.master)[number] for tuned in (state.method, expected.method))
        assert master.dtype == jnp.float32
        np.testing.assert_allclose(master, same, rtol=0, atol=0.1 * largest)
        assert {*found[found != base].tolist()} <= {*master.astype(jnp.bfloat16).astype(jnp.float32).ravel().tolist()}


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_accumulation_follows_on_supports_handed_over(subject: Subject, rng: np.random.Generator) -> None:
    case = Case(js.gasdu, GASDU, given="support")
    params, batches = start(subject, rng, jnp.float64, rows=4)
    method = make(case, subject, params, batches[-1])
    tuners: list[Any] = [
        js.fuse(subject.model.loss, method, has_aux=True, accumulate=2),
        ReferenceTuner(subject.model.loss, method, accumulate=2),
    ]
    states = [tuner.init(params) for tuner in tuners]
    for batch in batches:
        told = []
        for number, tuner in enumerate(tuners):
            states[number], metrics = tuner.step(states[number], batch)
            told.append((metrics.loss, metrics.tokens))
        np.testing.assert_allclose(*told, rtol=1e-10)
    found, expected = states
    jax.tree.map(np.testing.assert_array_equal, found.method.support, expected.method.support)
    assert_close(found.params, expected.params, 1e-10)
    assert_close(found.method.inner, expected.method.inner, 1e-9)


def test_every_method_has_a_case() -> None:
    assert {case.constructor.__name__ for case in CASES} == {*METHODS}
