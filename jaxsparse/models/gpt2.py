"""The GPT-2 family."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxsparse.models.attention import Attend, Store, split_heads
from jaxsparse.models.configs import GPT2Config
from jaxsparse.models.decoder import INIT, Decoder, Rotary, check_remat, embedding, stack_layers

__all__ = ["GPT2"]


def _norm(config: GPT2Config, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        # E[x²] − E[x]² cancels on GPT-2's residual stream, whose mean is large.
        use_fast_variance=False,
        param_dtype=param_dtype,
        rngs=rngs,
    )


def _residual_init(config: GPT2Config) -> jax.nn.initializers.Initializer:
    """Returns the smaller initial weights of the layers that add to the residual stream (GPT-2, section 2.3)."""
    return nnx.initializers.normal(0.02 / math.sqrt(2 * config.num_layers))


class SelfAttention(nnx.Module):
    """Multi-head attention; queries, keys and values come out of one product."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike):
        width = config.hidden_size
        linear = partial(nnx.Linear, param_dtype=param_dtype, rngs=rngs)
        self.num_heads = config.num_heads
        self.c_attn = linear(width, 3 * width, kernel_init=INIT)
        self.c_proj = linear(width, width, kernel_init=_residual_init(config))

    def __call__(self, hidden: Array, attend: Attend) -> tuple[Array, Store]:
        """Mixes the tokens."""
        query, key, value = (split_heads(part, self.num_heads) for part in jnp.split(self.c_attn(hidden), 3, axis=-1))
        mixed, store = attend(query, key, value)
        return self.c_proj(mixed.reshape(hidden.shape)), store


class FeedForward(nnx.Module):
    """Two products with the tanh approximation of GELU between."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike):
        linear = partial(nnx.Linear, param_dtype=param_dtype, rngs=rngs)
        self.c_fc = linear(config.hidden_size, config.intermediate_size, kernel_init=INIT)
        self.c_proj = linear(config.intermediate_size, config.hidden_size, kernel_init=_residual_init(config))

    def __call__(self, hidden: Array) -> Array:
        """Transforms every token on its own."""
        return self.c_proj(jax.nn.gelu(self.c_fc(hidden), approximate=True))


class Block(nnx.Module):
    """One layer."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike):
        self.ln_1 = _norm(config, rngs, param_dtype)
        self.attn = SelfAttention(config, rngs, param_dtype)
        self.ln_2 = _norm(config, rngs, param_dtype)
        self.mlp = FeedForward(config, rngs, param_dtype)

    def __call__(self, hidden: Array, rotary: Rotary, attend: Attend) -> tuple[Array, Store]:
        """Adds attention, then the feed-forward layer; there are no rotary angles."""
        mixed, store = self.attn(self.ln_1(hidden), attend)
        hidden = hidden + mixed
        return hidden + self.mlp(self.ln_2(hidden)), store


class GPT2(Decoder):
    """A decoder of the GPT-2 family, in plain Flax NNX.

    Args:
        config: shapes and constants.
        rngs: draws the initial weights.
        param_dtype: dtype of the parameters, in which the model computes (norms, softmax and logits are
            float32 all the same).
        remat: `none`, `full` or `dots`, see `Decoder`.

    Example:
        >>> config = GPT2Config(
        ...     vocab_size=11, hidden_size=8, intermediate_size=32, num_layers=2, num_heads=2
        ... )
        >>> GPT2(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).shape
        (1, 3, 11)
    """

    config: GPT2Config

    def __init__(
        self,
        config: GPT2Config,
        *,
        rngs: nnx.Rngs,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        remat: str = "none",
    ):
        check_remat(remat)
        self.config, self.remat = config, remat
        self.wte = embedding(config.vocab_size, config.hidden_size, rngs, param_dtype)
        self.wpe = embedding(config.max_position_embeddings, config.hidden_size, rngs, param_dtype)
        self.layers = stack_layers(lambda rngs: Block(config, rngs, param_dtype), config.num_layers, rngs)
        self.ln_f = _norm(config, rngs, param_dtype)
        if not config.tie_word_embeddings:
            self.lm_head = nnx.Linear(
                config.hidden_size,
                config.vocab_size,
                use_bias=False,
                kernel_init=INIT,
                param_dtype=param_dtype,
                rngs=rngs,
            )

    def embed(self, tokens: Array, positions: Array) -> Array:
        """Adds the embeddings of token and position."""
        return self.wte(tokens) + self.wpe(positions)

    def finish(self, hidden: Array) -> Array:
        """Applies the final norm."""
        return self.ln_f(hidden)

    def head(self) -> tuple[Array, int]:
        """Returns the embedding if tied, else the head's kernel."""
        if self.config.tie_word_embeddings:
            return self.wte.embedding[...], 1
        return self.lm_head.kernel[...], 0
