"""Cross-entropy that never holds the logits of all tokens."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxsparse.common.errors import InputError

__all__ = ["cross_entropy_sum"]


def cross_entropy_sum(
    project: Callable[[Float[Array, "chunk width"]], Float[Array, "chunk vocab"]],
    hidden: Float[Array, "*batch width"],
    targets: Int[Array, "*batch"],
    weights: Float[Array, "*batch"],
    chunk: int,
) -> Float[Array, ""]:
    """Returns the weighted sum of the targets' negative log-likelihoods.

    The tokens go through the head in chunks, forward and (computed again) backward, so that at most
    (chunk, vocab) logits exist at a time. A single chunk is not computed again.

    Args:
        project: from hidden states to logits; what it closes over gets its gradient.
        hidden: hidden states of all tokens.
        targets: the tokens to predict, inside the vocabulary even where the weight is 0.
        weights: 0 for tokens that do not count.
        chunk: most tokens in a chunk.

    Returns:
        The sum, in float32 at least.

    Raises:
        InputError: chunk is below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> uniform = lambda hidden: jnp.zeros((hidden.shape[0], 8))
        >>> total = cross_entropy_sum(
        ...     uniform, jnp.ones((5, 3)), jnp.arange(5), jnp.ones(5), chunk=2
        ... )
        >>> round(float(total / jnp.log(8.0)), 4)
        5.0
    """
    if chunk < 1:
        raise InputError(f"loss chunk must be at least 1 token, not {chunk}")

    def chunk_sum(hidden: Array, targets: Array, weights: Array) -> Array:
        logits = project(hidden)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return jnp.sum(losses * weights)

    flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), weights.reshape(-1)
    tokens = targets.size
    if tokens <= chunk:
        return chunk_sum(*flat)
    chunks = -(-tokens // chunk)
    parts = tuple(_interleave(array, chunks) for array in flat)
    sums = jax.lax.map(lambda part: jax.checkpoint(chunk_sum, prevent_cse=False)(*part), parts)
    return jnp.sum(sums)


def _interleave(array: Array, chunks: int) -> Array:
    """Pads the leading axis with zeros and deals it out to the chunks: (n, …) to (chunks, size, …).

    Every chunk takes each chunks-th token, so that a batch sharded over devices stays so in every chunk.
    """
    size = -(-array.shape[0] // chunks)
    padding = [(0, size * chunks - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, padding).reshape(size, chunks, *array.shape[1:]).swapaxes(0, 1)
