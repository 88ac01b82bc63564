"""What holds for the decoders of every family."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxsparse.common.errors import InputError
from jaxsparse.common.paths import flatten_with_paths
from jaxsparse.models.configs import LlamaConfig
from jaxsparse.models.functional import LanguageModel
from jaxsparse.models.layouts import parameters_of
from tests.models.small import CONFIGS, GPT2, LLAMA, Rows, random_params, random_rows, random_tokens

FAMILIES = pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
VARIANTS = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


@VARIANTS
def test_parameters_have_exactly_the_documented_paths_and_shapes(config):
    leaves, _ = flatten_with_paths(LanguageModel(config).abstract(jnp.bfloat16))
    assert {path: leaf.shape for path, leaf in leaves} == {p.path: p.shape for p in parameters_of(config)}
    assert {leaf.dtype for _, leaf in leaves} == {jnp.dtype(jnp.bfloat16)}


@FAMILIES
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_initial_parameters_fit_the_abstract_ones_and_spread_as_hugging_face_has_them(config, dtype):
    wide = dataclasses.replace(config, hidden_size=96, intermediate_size=128)
    model = LanguageModel(wide)
    params = model.init(jax.random.key(3), dtype)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), model.abstract(dtype)
    )
    for path, leaf in flatten_with_paths(params)[0]:
        values = np.asarray(leaf, np.float32)
        if path.endswith("scale"):
            assert (values == 1).all(), path
        elif path.endswith("bias"):
            assert (values == 0).all(), path
        else:
            deviation = 0.02 / np.sqrt(6) if path.endswith("c_proj/kernel") else 0.02
            assert abs(values.std() / deviation - 1) < 0.05, path
            if path.startswith("layers/"):
                assert not np.array_equal(values[0], values[1]), path


@VARIANTS
def test_logits_do_not_depend_on_later_tokens(config, rng):
    model = LanguageModel(config)
    params, logits = random_params(model, rng), jax.jit(model.logits)
    tokens = random_tokens(rng, 2, 9)
    changed = tokens.copy()
    changed[:, 6] = (changed[:, 6] + 1) % config.vocab_size
    before, after = logits(params, tokens), logits(params, changed)
    assert before.dtype == jnp.float32
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (np.abs(before - after)[:, 6:].max(axis=-1) > 1e-4).all()


def test_sliding_window_hides_what_lies_further_back(rng):
    config = dataclasses.replace(CONFIGS["sliding_window"], num_layers=1)
    model = LanguageModel(config)
    params, logits = random_params(model, rng), jax.jit(model.logits)
    tokens = random_tokens(rng, 1, 9)
    changed = tokens.copy()
    changed[:, 2] = (changed[:, 2] + 1) % config.vocab_size
    change = np.abs(logits(params, tokens) - logits(params, changed)).max(axis=(0, 2))
    # A window of 3: the token itself and the two after it see the change.
    np.testing.assert_array_equal(change > 1e-6, [False] * 2 + [True] * 3 + [False] * 4)


@VARIANTS
def test_packed_rows_give_the_logits_of_their_segments_alone(config, rng):
    model = LanguageModel(config)
    params, logits = random_params(model, rng), jax.jit(model.logits)
    lengths = [5, 3, 4]
    alone = random_tokens(rng, 3, 5)  # What follows a row's length has no influence.
    tokens, expected = (
        np.concatenate([row[:length] for row, length in zip(rows, lengths, strict=True)])[None]
        for rows in (alone, np.asarray(logits(params, alone)))
    )
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    packed = logits(params, tokens, positions, np.repeat([1, 2, 3], lengths)[None])
    np.testing.assert_allclose(packed, expected, rtol=1e-5, atol=1e-5)
    unmasked = logits(params, tokens, positions, np.ones_like(positions))
    assert np.abs(unmasked - expected).max() > 1e-3


@FAMILIES
def test_positions_count_from_the_start_of_the_row_by_default(config, rng):
    model = LanguageModel(config)
    params, logits = random_params(model, rng), jax.jit(model.logits)
    rows = random_rows(rng, 2, 7)
    default = logits(params, rows.tokens)
    explicit = logits(params, rows.tokens, rows.positions, rows.segments)
    np.testing.assert_allclose(default, explicit, rtol=1e-5, atol=1e-5)
    shifted = logits(params, rows.tokens, rows.positions + 5, rows.segments)
    if config is GPT2:
        assert np.abs(default - shifted).max() > 1e-3
    else:  # Rotary positions are relative.
        np.testing.assert_allclose(default, shifted, atol=1e-4)


@FAMILIES
def test_loss_is_the_mean_over_weighted_targets(config, rng):
    rows = random_rows(rng, 3, 7)
    model = LanguageModel(config, loss_chunk=4)
    params, logits = random_params(model, rng), jax.jit(model.logits)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(params, rows.tokens), jnp.asarray(rows.targets))
    loss, aux = jax.jit(model.loss)(params, rows)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.average(losses, weights=rows.weights), rtol=1e-5)
    np.testing.assert_allclose(aux["tokens"], rows.weights.sum())
    np.testing.assert_allclose(aux["loss_sum"], (losses * rows.weights).sum(), rtol=1e-5)


def test_loss_of_a_batch_without_targets_is_zero(rng):
    model = LanguageModel(LLAMA)
    rows = random_rows(rng, 2, 5)._replace(weights=np.zeros((2, 5), np.float32))
    loss, aux = jax.jit(model.loss)(random_params(model, rng), rows)
    assert (loss, aux["tokens"]) == (0, 0)


@pytest.mark.parametrize(("config", "dtype"), [(LLAMA, jnp.float32), (LLAMA, jnp.bfloat16), (GPT2, jnp.float32)])
def test_remat_and_chunks_change_neither_loss_nor_gradients(config, dtype, rng):
    plain = LanguageModel(config, remat="none", loss_chunk=1000)
    params = random_params(plain, rng, dtype)
    rows = random_rows(rng, 2, 9)

    def loss_and_gradient(model):
        loss, gradient = jax.jit(jax.value_and_grad(lambda params: model.loss(params, rows)[0]))(params)
        return loss, [(path, np.asarray(leaf, np.float64)) for path, leaf in flatten_with_paths(gradient)[0]]

    expected_loss, expected = loss_and_gradient(plain)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.05
    for remat in ("full", "dots"):
        loss, gradient = loss_and_gradient(LanguageModel(config, remat=remat, loss_chunk=5))
        np.testing.assert_allclose(loss, expected_loss, rtol=tolerance)
        for (path, found), (_, wanted) in zip(gradient, expected, strict=True):
            assert np.linalg.norm(wanted) > 1e-5, path
            assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted), path


@pytest.mark.parametrize(("remat", "saved"), [("none", "all"), ("dots", "products with weights"), ("full", "nothing")])
def test_remat_decides_what_the_backward_pass_computes_again(remat, saved, rng):
    model = LanguageModel(LLAMA, remat=remat, loss_chunk=1000)
    params, rows = random_params(model, rng), random_rows(rng, 1, 8)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda params: model.loss(params, rows)[0]))(params))
    products = jaxpr.count("dot_general")
    # Per layer: 7 weights and 2 products of attention, forward once and backward twice; the head, thrice.
    again = {"all": 0, "products with weights": 2, "nothing": 9}[saved]
    # What nobody reads of the recomputed layer, such as its last product, is dropped.
    assert 27 + 3 + again - 1 <= products <= 27 + 3 + again


@FAMILIES
def test_bfloat16_follows_float32(config, rng):
    model = LanguageModel(config)
    params, logits = random_params(model, rng, jnp.bfloat16), jax.jit(model.logits)
    tokens = random_tokens(rng, 2, 11)
    low = logits(params, tokens)
    assert low.dtype == jnp.float32
    assert jax.eval_shape(model.hidden, params, tokens).dtype == jnp.bfloat16
    full = logits(jax.tree.map(lambda x: x.astype(jnp.float32), params), tokens)
    assert np.linalg.norm(low - full) < 0.05 * np.linalg.norm(full)


def test_seven_billion_parameters_trace_in_seconds():
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
    )
    model = LanguageModel(config, remat="full")
    params = model.abstract(jnp.bfloat16)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 6_738_415_616
    integers = jax.ShapeDtypeStruct((4, 768), jnp.int32)
    rows = Rows(integers, integers, jax.ShapeDtypeStruct((4, 768), jnp.float32), integers, integers)
    text = jax.jit(jax.grad(model.loss, has_aux=True)).lower(params, rows).as_text()
    # Neither are the layers unrolled, nor is the head widened.
    assert len(text) < 500_000
    assert "tensor<4096x32000xbf16>" in text
    assert "tensor<4096x32000xf32>" not in text


def test_bad_input_is_named(rng):
    with pytest.raises(InputError, match="remat 'some' is unknown; use one of none, full, dots"):
        LanguageModel(LLAMA, remat="some")
    with pytest.raises(InputError, match="loss_chunk must be at least 1 token, not 0"):
        LanguageModel(LLAMA, loss_chunk=0)
    model = LanguageModel(dataclasses.replace(GPT2, max_position_embeddings=8))
    with pytest.raises(InputError, match="rows of 9 tokens, but max_position_embeddings is 8"):
        model.logits(random_params(model, rng), random_tokens(rng, 1, 9))
