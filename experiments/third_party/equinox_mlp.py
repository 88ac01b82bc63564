"""Tunes a multi-layer perceptron of Equinox: `pip install equinox`."""

from typing import Any

import equinox
import jax
import jax.numpy as jnp
import optax

import jaxsparse as js

# Equinox multiplies from the left, so that its weights are (out, in). Two inputs of every layer, trained as slices.
METHOD = js.paca(optax.adam(1e-2), rank=2, targets=js.Target(r"layers/.*weight", in_axes=(1,)))


def start() -> tuple[Any, Any, Any]:
    """Returns the loss, parameters and a batch."""
    model = equinox.nn.MLP(in_size=8, out_size=1, width_size=16, depth=2, key=jax.random.key(0))
    params, rest = equinox.partition(model, equinox.is_inexact_array)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        x, y = batch
        return jnp.mean((jax.vmap(equinox.combine(params, rest))(x) - y) ** 2)

    x = jax.random.normal(jax.random.key(1), (32, 8))
    return loss_fn, params, (x, jnp.sin(x[:, :1] + x[:, 1:2]))


def main() -> None:
    """Tunes the model for a few steps."""
    loss_fn, params, batch = start()
    tuner = js.fuse(loss_fn, METHOD)
    state = tuner.init(params)
    for _ in range(6):
        state, metrics = tuner.step(state, batch)
        print(f"loss {metrics.loss:.4f}")
    delta = js.deltas.diff(params, tuner.params(state))
    print(f"{delta.entries} entries changed")


if __name__ == "__main__":
    main()
