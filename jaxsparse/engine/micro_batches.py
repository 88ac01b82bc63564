"""Gradients of a batch that is taken in parts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxsparse.select.scores import score_dtype

__all__ = ["mean_gradients", "split_batch"]


def split_batch(batch: Any, micro_batches: int) -> Any:
    """Returns a batch whose arrays have a new leading axis of micro-batches."""
    return jax.tree.map(lambda leaf: leaf.reshape(micro_batches, -1, *leaf.shape[1:]), batch)


def mean_gradients(
    loss_of: Callable[[Any, Any], tuple[Array, Array]], trained: Any, batch: Any, micro_batches: int
) -> tuple[Array, Array, Any]:
    """Returns the mean loss of a batch, its number of target tokens, and the mean gradients.

    Args:
        loss_of: (trained, batch) -> (mean loss, number of target tokens).
        trained: what the loss is differentiated with respect to.
        batch: the batch.
        micro_batches: how many parts the leading axis of its arrays is split into; each is weighed by its tokens.

    Example:
        >>> loss_of = lambda w, x: (jnp.sum(w * x), jnp.float32(1.0))
        >>> loss, tokens, gradient = mean_gradients(loss_of, jnp.ones(()), jnp.array([1.0, 3.0]), 2)
        >>> float(loss), float(gradient)
        (2.0, 2.0)
    """
    value_and_grad = jax.value_and_grad(loss_of, has_aux=True)
    if micro_batches == 1:
        (loss, tokens), gradients = value_and_grad(trained, batch)
        return loss, tokens, gradients

    def add(sums: Any, micro_batch: Any) -> tuple[Any, Array]:
        (loss, tokens), gradients = value_and_grad(trained, micro_batch)
        return jax.tree.map(lambda total, leaf: total + leaf * tokens, sums, (loss, gradients)), tokens

    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, score_dtype(leaf.dtype)), trained)
    (loss, gradients), tokens = jax.lax.scan(add, (jnp.zeros(()), zeros), split_batch(batch, micro_batches))
    count = jnp.maximum(jnp.sum(tokens), 1)
    means = jax.tree.map(lambda total, leaf: (total / count).astype(leaf.dtype), gradients, trained)
    return loss / count, jnp.sum(tokens), means
