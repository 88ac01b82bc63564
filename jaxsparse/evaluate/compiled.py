"""What evaluation computes, compiled once for all calls with models and batches of one shape."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxsparse.data.batches import Batch
from jaxsparse.models.functional import LanguageModel

__all__ = ["answer_log_likelihoods", "batch_loss"]


@partial(jax.jit, static_argnames="model")
def batch_loss(model: LanguageModel, params: Any, batch: Batch) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Returns the loss of a batch and what comes with it, see `LanguageModel.loss`."""
    return model.loss(params, batch)


@partial(jax.jit, static_argnames="model")
def answer_log_likelihoods(model: LanguageModel, params: Any, batch: Batch) -> Float[Array, " rows"]:
    """Returns the log probability of every row's answer: the sum over its tokens, in nats."""
    logarithms = jax.nn.log_softmax(model.logits(params, batch.tokens, batch.positions, batch.segments))
    of_targets = jnp.take_along_axis(logarithms, jnp.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    return jnp.sum(of_targets * batch.weights, axis=-1)
