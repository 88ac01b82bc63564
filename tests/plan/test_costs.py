"""Flops and bytes of programs, against what a hand counts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxsparse as js
from jaxsparse.models.functional import LanguageModel
from jaxsparse.models.presets import PRESETS
from jaxsparse.plan.absent import DEVICES
from jaxsparse.plan.costs import Cost, cost_of
from jaxsparse.plan.steps import _seconds
from jaxsparse.subspaces.targets import tree_size
from tests.models.small import random_rows

A, B = jax.ShapeDtypeStruct((3, 8, 16), jnp.float32), jax.ShapeDtypeStruct((3, 16, 5), jnp.bfloat16)


def test_a_product_counts_twice_its_sizes_and_what_it_reads_and_writes():
    cost = cost_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b.astype(jnp.float32)), A, B)
    assert cost.flops == 2 * 3 * 8 * 16 * 5
    assert cost.bytes == 4 * 3 * (8 * 16 + 16 * 5 + 8 * 5)


def test_products_in_float32_are_told_apart_and_take_a_gpu_longer():
    narrow, wide = (jax.ShapeDtypeStruct((64, 64), dtype) for dtype in (jnp.bfloat16, jnp.float32))
    cost = cost_of(lambda narrow, wide: (narrow @ narrow, wide @ wide @ wide), narrow, wide)
    assert cost.wide_flops == 2 * 2 * 64**3 == cost.flops * 2 / 3
    h100, v5e = DEVICES["h100"], DEVICES["v5e"]
    assert h100.flops == pytest.approx(2 * h100.wide_flops, rel=0.01)  # TF32
    assert v5e.flops == v5e.wide_flops  # factors are rounded to bfloat16
    many = Cost(flops=3e15, wide_flops=2e15)
    assert _seconds(many, 1, h100) == pytest.approx(1e15 / 989e12 + 2e15 / 495e12)
    assert _seconds(many, 2, v5e) == pytest.approx(3e15 / 197e12 / 2)


def test_loops_count_as_often_as_they_run():
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    once = cost_of(lambda x: x @ x, x)
    scanned = cost_of(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=7)[0], x)
    looped = cost_of(lambda x: jax.lax.fori_loop(0, 7, lambda _, x: x @ x, x), x)
    assert scanned.flops == looped.flops == 7 * once.flops
    assert scanned.unknown_loops == 0
    unknown = cost_of(lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) > 0, lambda x: x @ x, x), x)
    assert (unknown.flops, unknown.unknown_loops) == (once.flops, 1)


def test_branches_are_the_cheapest_or_on_a_refreshing_step_the_dearest():
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    function = lambda x: jax.lax.cond(jnp.sum(x) > 0, lambda x: x @ x @ x, lambda x: x @ x, x)  # noqa: E731
    assert cost_of(function, x).flops == 2 * 8**3
    assert cost_of(function, x, refresh=True).flops == 4 * 8**3


def test_what_is_computed_again_counts_again():
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    layer = lambda x: jnp.sin(jnp.sin(x @ x) @ x)  # noqa: E731
    plain = cost_of(jax.grad(lambda x: jnp.sum(layer(x))), x)
    again = cost_of(jax.grad(lambda x: jnp.sum(jax.checkpoint(layer)(x))), x)
    assert plain.flops == 6 * 2 * 8**3
    assert again.flops > plain.flops


@pytest.mark.parametrize("name", ["llama2-7b", "llama3-8b", "gpt2"])
def test_a_forward_pass_takes_two_flops_a_weight_and_token(name):
    model = LanguageModel(PRESETS[name])
    params = model.abstract(jnp.bfloat16)
    rows = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, random_rows(np.random.default_rng(), 2, 64)))
    embeddings = {"llama2-7b": 1, "llama3-8b": 1, "gpt2": 0}[name]  # a tied one is a product too
    weights = tree_size(params) - embeddings * model.config.vocab_size * model.config.hidden_size
    assert cost_of(model.loss, params, rows).flops == pytest.approx(2 * weights * 2 * 64, rel=0.05)


def test_a_fused_step_costs_no_weight_gradients_but_where_it_refreshes():

    model = LanguageModel(PRESETS["llama2-7b"])
    params = model.abstract(jnp.bfloat16)
    rows = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, random_rows(np.random.default_rng(), 2, 64)))
    tuner = js.fuse(model.loss, js.gasdu(optax.adam(1e-4), density=1e-4), has_aux=True)
    state = jax.eval_shape(tuner.init, params)
    forward = cost_of(model.loss, params, rows).flops
    plain, refreshing = (cost_of(tuner.step, state, rows, refresh=refresh).flops for refresh in (False, True))
    assert plain == pytest.approx(2 * forward, rel=0.1)
    # Four of a layer's seven products, a third of its weights, have a gradient of their own size then.
    targets = 4 * 32 * 4096**2
    assert refreshing - plain == pytest.approx(2 * targets * 2 * 64, rel=0.05)
