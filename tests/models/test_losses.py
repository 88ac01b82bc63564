"""The chunked cross-entropy against the plain one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxsparse.common.errors import InputError
from jaxsparse.models.losses import cross_entropy_sum


def plain(hidden, head, targets, weights):
    """The definition, in NumPy's terms."""
    logits = hidden @ head
    logarithms = logits - jnp.log(jnp.sum(jnp.exp(logits), axis=-1, keepdims=True))
    return -jnp.sum(weights * jnp.take_along_axis(logarithms, targets[..., None], axis=-1)[..., 0])


def chunked(hidden, head, targets, weights, chunk):
    return cross_entropy_sum(lambda part: part @ head, hidden, targets, weights, chunk)


def problem(rng, *batch, width=6, vocab=11, dtype=np.float32):
    return (
        jnp.asarray(rng.normal(size=(*batch, width)), dtype),
        jnp.asarray(rng.normal(size=(width, vocab)), dtype),
        jnp.asarray(rng.integers(0, vocab, batch)),
        jnp.asarray(rng.random(batch) * (rng.random(batch) > 0.3), dtype),
    )


@settings(deadline=None, max_examples=8)
@given(
    batch=st.integers(1, 4),
    length=st.integers(1, 9),
    chunk=st.integers(1, 40),
    dtype=st.sampled_from([np.float32, np.float64]),
    seed=st.integers(0, 2**31),
)
def test_value_and_gradients_equal_the_plain_loss(batch, length, chunk, dtype, seed):
    with jax.enable_x64(dtype == np.float64):
        arguments = problem(np.random.default_rng(seed), batch, length, dtype=dtype)
        by_chunks = functools.partial(chunked, chunk=chunk)
        value, gradients = jax.jit(jax.value_and_grad(by_chunks, (0, 1, 3)))(*arguments)
        expected, expected_gradients = jax.jit(jax.value_and_grad(plain, (0, 1, 3)))(*arguments)
        assert value.dtype == dtype
        tolerance = 2e-5 if dtype == np.float32 else 1e-12
        np.testing.assert_allclose(value, expected, rtol=tolerance, atol=tolerance)
        for found, wanted in zip(gradients, expected_gradients, strict=True):
            assert found.dtype == dtype
            np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def most_logits(program: str, vocab: int) -> int:
    """Returns the most entries per vocabulary entry of any array that a program's text mentions."""
    shapes = [[int(size) for size in shape.split(",")] for shape in re.findall(r"\[(\d+(?:,\d+)*)\]", program)]
    return max(math.prod(shape) // vocab for shape in shapes if vocab in shape)


@pytest.mark.parametrize("chunk", [9, 50])
def test_logits_of_all_tokens_never_exist_at_once(chunk, rng):
    tokens, vocab = 100, 211  # The width of 6 makes the head smaller than any chunk's logits.
    arguments = problem(rng, 4, tokens // 4, vocab=vocab)

    def programs(chunk):
        step = jax.jit(jax.value_and_grad(functools.partial(chunked, chunk=chunk), (0, 1)))
        return str(jax.make_jaxpr(step)(*arguments)), step.lower(*arguments).compile().as_text()

    for program in programs(chunk):
        assert 6 < most_logits(program, vocab) <= chunk
    assert [most_logits(program, vocab) for program in programs(tokens)] == [tokens, tokens]


def test_a_single_chunk_is_not_computed_again(rng):
    arguments = problem(rng, 12)
    count = {
        chunk: str(jax.make_jaxpr(jax.grad(functools.partial(chunked, chunk=chunk)))(*arguments)).count("dot_general")
        for chunk in (12, 6)
    }
    assert count == {12: 2, 6: 3}


def test_a_chunk_below_one_token_is_refused(rng):
    with pytest.raises(InputError, match="at least 1 token, not 0"):
        chunked(*problem(rng, 3), chunk=0)
