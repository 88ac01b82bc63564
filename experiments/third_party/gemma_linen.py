"""Tunes Gemma (Flax linen) as Google DeepMind publish it: `pip install --no-deps gemma-llm==1.0.0`.

A small Gemma with weights at random; `gemma.params` reads the published ones.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from gemma import transformer

import jaxsparse as js

CONFIG = transformer.TransformerConfig(
    num_layers=1, num_embed=64, embed_dim=16, hidden_dim=32, num_heads=2, head_dim=8, num_kv_heads=1
)
MODEL = transformer.Transformer(CONFIG)

# Kernels as Gemma lays them out: q (heads, in, width), k and v (2, heads, in, width), output (heads, width, out).
METHOD = js.gasdu(
    optax.adam(1e-2),
    density=0.05,
    refresh_every=3,
    targets=[
        js.Target(r".*attn/q_einsum/w", in_axes=(1,)),
        js.Target(r".*attn/kv_einsum/w", in_axes=(2,)),
        js.Target(r".*attn/attn_vec_einsum/w", out_axes=(2,)),
    ],
)


def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
    """Mean cross-entropy of every next token; tokens (batch, length)."""
    inputs = tokens[:, :-1]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    mask = transformer.make_causal_attn_mask(jnp.ones_like(inputs, bool))
    logits, _ = MODEL.apply(params, inputs, positions, None, mask)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def start() -> tuple[Any, Any, jax.Array]:
    """Returns the loss, parameters and a batch."""
    tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, CONFIG.num_embed)
    inputs = tokens[:, :-1]
    mask = transformer.make_causal_attn_mask(jnp.ones_like(inputs, bool))
    return loss_fn, MODEL.init(jax.random.key(0), inputs, jnp.zeros_like(inputs), None, mask), tokens


def main() -> None:
    """Tunes the model for a few steps."""
    _, params, tokens = start()
    tuner = js.fuse(loss_fn, METHOD)
    state = tuner.init(params)
    for _ in range(6):
        state, metrics = tuner.step(state, tokens)
        print(f"loss {metrics.loss:.4f}, retention {metrics.retention:.3f}")
    delta = js.deltas.diff(params, tuner.params(state))
    print(f"{delta.entries} entries changed")


if __name__ == "__main__":
    main()
