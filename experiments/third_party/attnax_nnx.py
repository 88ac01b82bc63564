"""Tunes a decoder of attnax (Flax NNX: grouped-query attention, rotary positions, SwiGLU): `pip install attnax`."""

from typing import Any

import attnax
import jax
import optax
from flax import nnx

import jaxsparse as js

CONFIG = attnax.TransformerConfig(
    num_layers=1,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    d_ff=32,
    vocab_size=64,
    max_len=16,
    dropout_rate=0.0,
    pos_emb_type="rope",
    ff_activation="swiglu",
)

# Three inputs of every neuron, those with the largest weights.
METHOD = js.neuroada(optax.adam(3e-3), k=3, targets=r"layers/.*kernel")


def loss_of(graph: nnx.GraphDef[Any], rest: nnx.State) -> Any:
    """The loss as a function of the parameters; the table of embeddings is the head, too."""

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params, rest)
        logits = model.token_embed.embed.attend(model(tokens[:, :-1], deterministic=True))
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    return loss_fn


def start() -> tuple[Any, Any, jax.Array]:
    """Returns the loss, parameters and a batch."""
    graph, params, rest = nnx.split(attnax.TransformerDecoder(nnx.Rngs(0), CONFIG), nnx.Param, ...)
    tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, CONFIG.vocab_size)
    return loss_of(graph, rest), params, tokens


def main() -> None:
    """Tunes the model for a few steps."""
    loss_fn, params, tokens = start()
    tuner = js.fuse(loss_fn, METHOD)
    state = tuner.init(params)
    for _ in range(6):
        state, metrics = tuner.step(state, tokens)
        print(f"loss {metrics.loss:.4f}")
    delta = js.deltas.diff(params, tuner.params(state))
    print(f"{delta.entries} entries changed")


if __name__ == "__main__":
    main()
