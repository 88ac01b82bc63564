"""Small models that between them use every option of both families, and random input for them."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxsparse.models.configs import Config, GPT2Config, LlamaConfig, RopeScaling

LLAMA = LlamaConfig(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    max_position_embeddings=256,
)
GPT2 = GPT2Config(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    max_position_embeddings=256,
)
LLAMA3_SCALING = RopeScaling("llama3", 8.0, 1.0, 4.0, 32)
CONFIGS: dict[str, Config] = {
    "grouped": LLAMA,
    "tied": dataclasses.replace(LLAMA, tie_word_embeddings=True),
    "wide_heads": dataclasses.replace(LLAMA, num_kv_heads=4, head_dim=8),
    "biases": dataclasses.replace(LLAMA, attention_bias=True, mlp_bias=True),
    "llama3_rope": dataclasses.replace(LLAMA, rope_theta=5e5, rope_scaling=LLAMA3_SCALING),
    "linear_rope": dataclasses.replace(LLAMA, rope_scaling=RopeScaling("linear", 4.0)),
    "sliding_window": dataclasses.replace(LLAMA, sliding_window=3),
    "gpt2": GPT2,
    "gpt2_untied": dataclasses.replace(GPT2, tie_word_embeddings=False),
}


class Rows(NamedTuple):
    """A batch as the models read it."""

    tokens: Any
    targets: Any
    weights: Any
    positions: Any
    segments: Any


def random_tokens(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random tokens of the small vocabulary."""
    return rng.integers(0, LLAMA.vocab_size, shape, dtype=np.int32)


def random_rows(rng: np.random.Generator, batch: int, length: int) -> Rows:
    """Rows of one sequence each; about a third of the targets do not count."""
    return Rows(
        tokens=random_tokens(rng, batch, length),
        targets=random_tokens(rng, batch, length),
        weights=(rng.random((batch, length)) > 0.3).astype(np.float32),
        positions=np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
        segments=np.ones((batch, length), np.int32),
    )


@functools.cache
def shapes(model: Any, dtype: Any) -> dict[str, Any]:
    """The shapes of a model's parameters, for which it is traced once."""
    return model.abstract(dtype)


def random_params(model: Any, rng: np.random.Generator, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Parameters of size 0.2 throughout, biases and norms too: large enough that every one of them matters."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(1.0 if leaf.ndim == 1 else 0.0, 0.2, leaf.shape), leaf.dtype),
        shapes(model, dtype),
    )
