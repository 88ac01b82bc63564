"""The LLaMA family: LLaMA 1 to 3, Mistral, TinyLlama, DeepSeek-Coder, SmolLM2."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxsparse.models.attention import Attend, Store, split_heads
from jaxsparse.models.configs import LlamaConfig
from jaxsparse.models.decoder import INIT, Decoder, Rotary, check_remat, embedding, stack_layers
from jaxsparse.models.rotary import angles, frequencies, rotate

__all__ = ["Llama"]


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike):
        linear = partial(
            nnx.Linear, use_bias=config.attention_bias, kernel_init=INIT, param_dtype=param_dtype, rngs=rngs
        )
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.q_proj = linear(config.hidden_size, config.num_heads * config.head_dim)
        self.k_proj = linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.v_proj = linear(config.hidden_size, config.num_kv_heads * config.head_dim)
        self.o_proj = linear(config.num_heads * config.head_dim, config.hidden_size)

    def __call__(self, hidden: Array, rotary: tuple[Array, Array], attend: Attend) -> tuple[Array, Store]:
        """Mixes the tokens."""
        query = rotate(split_heads(self.q_proj(hidden), self.num_heads), *rotary)
        key = rotate(split_heads(self.k_proj(hidden), self.num_kv_heads), *rotary)
        value = split_heads(self.v_proj(hidden), self.num_kv_heads)
        mixed, store = attend(query, key, value)
        return self.o_proj(mixed.reshape(*hidden.shape[:-1], -1)), store


class FeedForward(nnx.Module):
    """The gated layer: down(silu(gate) * up)."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike):
        linear = partial(nnx.Linear, use_bias=config.mlp_bias, kernel_init=INIT, param_dtype=param_dtype, rngs=rngs)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, hidden: Array) -> Array:
        """Transforms every token on its own."""
        return self.down_proj(jax.nn.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Block(nnx.Module):
    """One layer."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs, param_dtype: jax.typing.DTypeLike):
        norm = partial(nnx.RMSNorm, config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype, rngs=rngs)
        self.input_layernorm = norm()
        self.self_attn = SelfAttention(config, rngs, param_dtype)
        self.post_attention_layernorm = norm()
        self.mlp = FeedForward(config, rngs, param_dtype)

    def __call__(self, hidden: Array, rotary: tuple[Array, Array], attend: Attend) -> tuple[Array, Store]:
        """Adds attention, then the feed-forward layer."""
        mixed, store = self.self_attn(self.input_layernorm(hidden), rotary, attend)
        hidden = hidden + mixed
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), store


class Llama(Decoder):
    """A decoder of the LLaMA family, in plain Flax NNX.

    Args:
        config: shapes and constants.
        rngs: draws the initial weights.
        param_dtype: dtype of the parameters, in which the model computes (norms, rotary angles, softmax
            and logits are float32 all the same).
        remat: `none`, `full` or `dots`, see `Decoder`.

    Example:
        >>> config = LlamaConfig(
        ...     vocab_size=11,
        ...     hidden_size=8,
        ...     intermediate_size=12,
        ...     num_layers=2,
        ...     num_heads=2,
        ...     num_kv_heads=1,
        ...     head_dim=4,
        ... )
        >>> Llama(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).shape
        (1, 3, 11)
    """

    config: LlamaConfig

    def __init__(
        self,
        config: LlamaConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        remat: str = "none",
    ):
        check_remat(remat)
        self.config, self.remat = config, remat
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size, rngs, param_dtype)
        self.layers = stack_layers(lambda rngs: Block(config, rngs, param_dtype), config.num_layers, rngs)
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, param_dtype=param_dtype, rngs=rngs)
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
        """Looks the tokens up."""
        return self.embed_tokens(tokens)

    def rotary(self, positions: Array) -> Rotary:
        """Returns cosines and sines of the positions."""
        return angles(positions, frequencies(self.config))

    def finish(self, hidden: Array) -> Array:
        """Applies the final norm."""
        return self.norm(hidden)

    def head(self) -> tuple[Array, int]:
        """Returns the embedding if tied, else the head's kernel."""
        if self.config.tie_word_embeddings:
            return self.embed_tokens.embedding[...], 1
        return self.lm_head.kernel[...], 0

    def window(self) -> int | None:
        """Returns the sliding window."""
        return self.config.sliding_window
